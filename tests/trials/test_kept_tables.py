"""What the kept tables answer, computed a second time; and whether protocols came before their runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.optimize import minimize
from scipy.stats import t

from mupkg.stages.runs import RUN
from mupkg.trials import kept, statistics
from mupkg.trials.protocol import Study

ROOT = Path(__file__).parents[2]


def kept_differences(trial: str, arm: str, against: str) -> np.ndarray:
    """DSC of one arm minus that of the other: case x replicate, from cases.csv and nothing of ours."""
    table = pd.read_csv(ROOT / "outputs" / "reference" / trial / "cases.csv")
    of = table.pivot_table("DSC", "case_id", ["configuration", "seed"])
    return (of[arm] - of[against]).to_numpy()


def kept_answer(trial: str, arm: str, against: str) -> pd.Series:
    table = pd.read_csv(ROOT / "outputs" / "reference" / trial / "answers.csv").query("metric == 'DSC'")
    return table.set_index(["configuration", "against"]).loc[(arm, against)]


class Restricted:
    """The restricted likelihood of d = mean + case + replicate + rest, written down as matrices; nothing is balanced.

    Its parameters are the logarithms of the three standard deviations.
    """

    def __init__(self, d: np.ndarray) -> None:
        self.d = d.ravel()
        case, replicate = (place.ravel() for place in np.indices(d.shape))
        self.draws = np.hstack([np.eye(d.shape[0])[case], np.eye(d.shape[1])[replicate]])
        self.ones = np.ones_like(self.d)
        self.number = np.array(d.shape)

    def mean_and_deviance(self, logs: np.ndarray) -> tuple[float, float, float]:
        """The generalised least squares mean, its variance, and -2 log likelihood but for a constant."""
        case, replicate, rest = np.exp(2 * np.asarray(logs))
        inner = np.diag(np.repeat(1 / np.array([case, replicate]), self.number)) + self.draws.T @ self.draws / rest

        def inverse_times(values: np.ndarray) -> np.ndarray:  # Woodbury: only 120 x 120 is ever solved
            return values / rest - self.draws @ np.linalg.solve(inner, self.draws.T @ values) / rest**2

        precision = self.ones @ inverse_times(self.ones)
        mean = self.ones @ inverse_times(self.d) / precision
        left = self.d - mean
        determinant = np.linalg.slogdet(inner)[1] + len(self.d) * np.log(rest)
        determinant += self.number @ np.log([case, replicate])
        return mean, 1 / precision, determinant + np.log(precision) + left @ inverse_times(left)

    def maximised(self) -> np.ndarray:
        start = np.log(np.full(3, self.d.std()))
        options = {"xatol": 1e-8, "fatol": 1e-9, "maxiter": 4000}
        return minimize(lambda x: self.mean_and_deviance(x)[2], start, method="Nelder-Mead", options=options).x


@pytest.mark.parametrize(("trial", "arm", "against"), [("e1", "HCP", "UNet"), ("e1n", "HCNP", "HCP")])
def test_restricted_maximum_likelihood_gives_the_kept_answer(trial, arm, against):
    model, row = Restricted(kept_differences(trial, arm, against)), kept_answer(trial, arm, against)
    best = model.maximised()
    mean, variance, _ = model.mean_and_deviance(best)
    assert np.exp(best) == pytest.approx(row[["case_sd", "replicate_sd", "rest_sd"]].astype(float), rel=1e-4)
    assert mean == pytest.approx(row["mean_difference"], abs=1e-9)
    half = t.ppf(0.975, row["df"]) * np.sqrt(variance)
    assert (mean - half, mean + half) == pytest.approx((row["low"], row["high"]), abs=1e-6)


def all_signs(means: np.ndarray) -> float:
    """The share of all 2^R choices of signs whose mean is as far from zero, every one of them counted."""
    sums = np.zeros(1)
    for value in means:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= abs(means.sum()) * (1 - 1e-12)))


@pytest.mark.parametrize(("arm", "against"), [("HCP", "shuffled"), ("shuffled", "UNet")])
def test_all_million_signs_give_the_kept_sign_flip(arm, against):
    """The kept p is of 20 000 draws: within four of its standard errors."""
    means, row = kept_differences("e4", arm, against).mean(axis=0), kept_answer("e4", arm, against)
    exact = all_signs(means)
    assert row["collapsed"] + row["collapsed_against"] == 1 and len(means) == 20
    spread = np.sqrt(exact / statistics.SIGN_FLIPS)
    assert row["p_sign_flip"] == pytest.approx(exact, abs=4 * spread + 2 / statistics.SIGN_FLIPS)


# Protocols and their runs


def git(repository: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=repository, text=True)


def committed(repository: Path, protocol: Path) -> datetime | None:
    """Since when the protocol says what it says now, but for its comments; None if this is not committed at all."""
    now, since = yaml.safe_load(protocol.read_text(encoding="utf-8")), None
    name = protocol.relative_to(repository).as_posix()
    for line in git(repository, "log", "--format=%H %cI", "--", name).splitlines():
        commit, date = line.split()
        if yaml.safe_load(git(repository, "show", f"{commit}:{name}")) != now:
            break
        since = datetime.fromisoformat(date)
    return since


def begun(run: Path) -> datetime | None:
    """When the training began; None if its record was made from tables, which do not tell."""
    record = json.loads((run / RUN).read_text(encoding="utf-8"))
    if "written" not in record:
        return None
    return datetime.fromisoformat(record["written"]) - timedelta(seconds=record["training_seconds"])


def before_every_protocol(repository: Path, runs: Path) -> tuple[list[str], int]:
    """The runs that began before any protocol that tells them so was committed, and how many have a date.

    A run may serve several protocols; what a later one says of runs that are there is said in its comment.
    """
    start = {path.parent: begun(path.parent) for path in runs.glob(f"*/*-seed*/{RUN}")}
    start = {run: date for run, date in start.items() if date}
    since: dict[Path, list[datetime]] = {run: [] for run in start}
    for protocol in (repository / "notebooks" / "studies" / "trials").glob("*.yaml") if start else ():
        study, date = Study.read(protocol), committed(repository, protocol)
        for name, told in study.run_parameters.items():
            run = runs / study.study / name
            if date and run in start and not kept.parameter_fault(run, told):
                since[run].append(date)
    late = datetime.max.replace(tzinfo=UTC)
    return sorted(run.name for run, date in start.items() if date < min(since[run], default=late)), len(start)


def test_protocols_were_committed_before_their_runs_began():
    asked = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if asked.stdout.strip() != "false":
        pytest.skip("without the whole history nothing tells when protocols were committed")
    early, dated = before_every_protocol(ROOT, ROOT / kept.KEPT)
    if not dated:
        pytest.skip("no kept run has a date: those made from tables do not tell when they were trained")
    assert early == []


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """The smoke trial's protocol, committed at noon, and a kept run of it."""
    for who in ("AUTHOR", "COMMITTER"):
        for what, value in {"NAME": "a", "EMAIL": "a@b", "DATE": "2026-01-01T12:00:00+00:00"}.items():
            monkeypatch.setenv(f"GIT_{who}_{what}", value)
    protocol = tmp_path / "notebooks" / "studies" / "trials" / "smoke.yaml"
    protocol.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / protocol.relative_to(tmp_path), protocol)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "protocol")
    (tmp_path / "runs" / "smoke-trials" / "UNet-seed0").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("minute", "change", "early"),
    [
        (3, "", []),
        (3, "# a comment\n", []),
        (1, "", ["UNet-seed0"]),  # it began a minute before noon
        (3, "segment_case: true\n", ["UNet-seed0"]),  # never committed so
    ],
)
def test_a_run_that_began_before_its_protocol_is_named(minute, change, early, repository):
    told = Study.read(repository / "notebooks/studies/trials/smoke.yaml").run_parameters["UNet-seed0"]
    record = {"parameters": told, "written": f"2026-01-01T12:0{minute}:00+00:00", "training_seconds": 120}
    (repository / "runs" / "smoke-trials" / "UNet-seed0" / RUN).write_text(json.dumps(record))
    with (repository / "notebooks/studies/trials/smoke.yaml").open("a") as file:
        file.write(change)
    assert before_every_protocol(repository, repository / "runs") == (early, 1)
