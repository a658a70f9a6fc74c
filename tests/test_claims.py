"""Every figure of a trial that README.md and outputs/reference/README.md state follows from tables: `make claims`.

`python tests/test_claims.py` writes outputs/reference/README.md anew, from the tables alone; README.md quotes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from mupkg.report import results
from mupkg.trials import statistics
from mupkg.trials.protocol import Study, Trial

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "outputs" / "reference"
PAGE = REFERENCE / "README.md"
LEAST = 0.75  # of validation DSC; a run that reaches it has left the plateau
TRIALS = sorted(path.parent.name for path in REFERENCE.glob("*/cases.csv"))
DECIMALS = {"DSC": 3, "DSC_all": 3, "ASD": 2, "HD95": 2, "surface_DSC_2mm": 3, "Brier": 4, "ECE": 4}
TITLES = {"DSC_all": "DSC, all", "ASD": "ASD mm", "HD95": "HD95 mm", "surface_DSC_2mm": "surface DSC, 2 mm"}
OF_NNUNET = ["DSC", "DSC_all", "ASD", "HD95"]
OUTCOMES = (*DECIMALS, "validation_area")

ABOUT = """# What the trials measured

Generated from the tables in these folders by `python tests/test_claims.py`; `make claims` fails where it no longer
holds. README.md, "Answers", says what follows. Nothing here is measured on patients, except where it says MR.

A row of a table of arms is the mean ± standard deviation over replicates of the mean over test cases. DSC and mm are
measured with the largest component, "all" without. A collapsed run finds no prostate. An answer gives the verdict,
the mean difference, its 95 % interval over cases and replicates, and p after Holm over the contrasts of the protocol.
"""


@cache
def cases(name: str, shift: str = "") -> pd.DataFrame:
    return pd.read_csv(REFERENCE / name / f"cases{shift}.csv", dtype={"case_id": str})


def protocol_text(name: str) -> str:
    return (REFERENCE / name / "protocol.yaml").read_text(encoding="utf-8")


@cache
def protocol(name: str) -> Trial:
    return Study.checked(yaml.safe_load(protocol_text(name))).trial


def measured(name: str) -> list[str]:
    """The outcomes that every run of a trial has."""
    found = cases(name).groupby(["configuration", "seed"]).count().gt(0).all()
    return [outcome for outcome in OUTCOMES if found.get(outcome, False)]


def arms(name: str) -> Iterator[str]:
    """A row of a table for each arm: means over cases, mean ± std over replicates, and how many collapsed."""
    fallen = results.mostly_empty_on_test(cases(name))["configuration"].value_counts()
    for arm, rows in cases(name).groupby("configuration", sort=False):
        by_replicate = rows.groupby(results.trainings(rows))[[n for n in measured(name) if n in DECIMALS]].mean()
        with np.errstate(invalid="ignore"):  # inf - inf
            mean, std = by_replicate.mean(), by_replicate.std()
        cells = [f"{mean[n]:.{k}f} ± {std[n]:.{k}f}" if np.isfinite(mean[n]) else "infinite" for n, k in of(mean)]
        yield f"| {arm} | {' | '.join(cells)} | {fallen.get(arm, 0)} of {len(by_replicate)} |"


def of(mean: pd.Series) -> Iterator[tuple[str, int]]:
    return ((outcome, DECIMALS[outcome]) for outcome in mean.index)


def judged(name: str, shift: str = "") -> pd.DataFrame:
    """The arms, and the levels of the trial's factors if it has any."""
    return statistics.with_main_effects(cases(name, shift), protocol(name).levels)


def compared(name: str, outcomes: list[str], shift: str = "") -> pd.DataFrame:
    trial = protocol(name)
    named = [(*pair, trial.primary) for pair in trial.pairs] if trial.primary in outcomes and not shift else []
    margins = {trial.primary: trial.margin, f"{trial.primary}_all": trial.margin}
    return statistics.contrasts(judged(name, shift), trial.pairs, outcomes, margins=margins, named=named)


def answers(name: str) -> Iterator[str]:
    """The trial's answer to each contrast of its protocol, on its primary outcome."""
    yield from compared(name, [protocol(name).primary])["answer"]


def others(name: str) -> Iterator[str]:
    """On the other outcomes."""
    if outcomes := [outcome for outcome in measured(name) if outcome != protocol(name).primary]:
        yield from compared(name, outcomes)["answer"]


def shifted(name: str) -> Iterator[str]:
    """The primary outcome on harder scans."""
    for path in sorted(REFERENCE.glob(f"{name}/cases_*.csv")):
        shift = path.stem.removeprefix("cases")
        for answer in compared(name, [protocol(name).primary], shift)["answer"]:
            yield f"{shift.removeprefix('_')}: {answer}"


def single_seeds(name: str) -> Iterator[str]:
    """What a study with one seed would have reported of each contrast."""
    trial = protocol(name)
    for arm, against in trial.pairs:
        d = statistics.differences(judged(name), arm, against, trial.primary)
        p, means = statistics.papers_t_test(d), d.mean()
        better, worse = ((p < 0.05) & (means > 0)).sum(), ((p < 0.05) & (means < 0)).sum()
        yield (
            f"{arm} against {against}: p < .05 in {better + worse} of {len(p)} replicates, {better} times better and "
            f"{worse} times worse; differences from {means.min():+.3f} to {means.max():+.3f}, "
            f"standard deviation {means.std():.3f}"
        )


def mixed(name: str) -> Iterator[str]:
    """Of a factorial trial: the interactions that each effect may be instead."""
    yield from (f"{factor}: {others}" for factor, others in statistics.aliases(protocol(name).levels).items())


def trained(name: str) -> Iterator[str]:
    """How many runs of each arm have left the plateau, and how good these are."""
    histories, tested = pd.read_csv(REFERENCE / name / "validations.csv"), cases(name)
    if "fold" in tested:  # k folds are k replicates
        tested = tested.assign(seed=tested["seed"] * tested["fold"].nunique() + tested["fold"])
    best = histories.groupby(["configuration", "replicate"], sort=False)["validation_dsc"].max()
    test = tested.groupby(["configuration", "seed"])["DSC"].mean()
    for arm, values in best.groupby("configuration", sort=False):
        left = values[values > LEAST]
        dsc = test.loc[left.index]
        yield f"| {arm} | {len(left)} of {len(values)} | {dsc.mean():.3f} ± {dsc.std():.3f} |"


def section(name: str) -> Iterator[str]:
    """What a trial asked, as its protocol says, and everything that its tables answer."""
    comment = [line.removeprefix("#").strip() for line in protocol_text(name).split("\n\n")[0].splitlines()]
    comment = comment[: next(n for n, line in enumerate([*comment, "study:"]) if line.startswith(("make", "study:")))]
    yield f"## {name}\n\n" + "\n".join(f"> {line}" for line in comment)
    columns = [TITLES.get(n, n) for n in measured(name) if n in DECIMALS]
    yield table(["arm", *columns, "collapsed"], arms(name))
    for title, lines in {
        "The answer": answers(name),
        "Each effect is mixed with interactions": mixed(name),
        "On other outcomes": others(name),
        "On harder scans": shifted(name),
        "What one seed would have told, by the paper's test over cases": single_seeds(name),
    }.items():
        if points := "\n".join(f"* {line}" for line in lines):
            yield f"**{title}**\n\n{points}"
    yield table(["arm", f"best validation DSC above {LEAST}", "their test DSC"], trained(name))
    yield from (f"![]({path.relative_to(REFERENCE).as_posix()})" for path in sorted((REFERENCE / name).glob("*.png")))


def nnunet() -> Iterator[str]:
    """nnU-Net without and with the branch, and ours of that replicate: mean ± std over the cases of a training."""
    found = pd.read_csv(REFERENCE / "nnunet" / "per_case.csv", dtype={"case_id": str})
    ours = cases("e1").query("seed == 1")
    assert set(ours["case_id"]) == set(found["case_id"])
    for name, rows in pd.concat([found, ours]).groupby("configuration", sort=False):
        with np.errstate(invalid="ignore"):  # inf - inf
            mean, std = (rows[OF_NNUNET].agg(how) for how in ("mean", "std"))
        cells = [f"{mean[n]:.{k}f} ± {std[n]:.{k}f}" if np.isfinite(mean[n]) else "infinite" for n, k in of(mean)]
        yield f"| {name} | {' | '.join(cells)} | {len(rows)} |"


def nnunets_section() -> Iterator[str]:
    yield "## nnunet\n\n" + (REFERENCE / "nnunet" / "protocol.md").read_text(encoding="utf-8").strip()
    yield table(["run", *(TITLES.get(n, n) for n in OF_NNUNET), "cases"], nnunet())


def table(columns: list[str], rows: Iterator[str]) -> str:
    return "\n".join([f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|", *rows])


@cache
def page() -> str:
    parts = [part for name in TRIALS for part in section(name)]
    return "\n\n".join([ABOUT.strip(), *parts, *nnunets_section()]) + "\n"


def unwrapped(text: str) -> str:
    return " ".join(text.split())


TOLD = unwrapped((ROOT / "README.md").read_text(encoding="utf-8").split("## Answers")[1].split("**PROMISE12")[0])
ROWS = [line for line in page().splitlines() if line.startswith("| ") and "±" in line]
FIGURE = "|".join(
    [
        r"[+-]\d+\.\d+ \[[^]]+\]",
        r"p < \.05 in \d+ of \d+ replicates, \d+ times better and \d+ times worse",
        r"differences from [+-]\d\.\d+ to [+-]\d\.\d+, standard deviation \d\.\d+",
        r"p = [\de.-]+\d",
        r"\d+\.\d+ ± \d+\.\d+",
    ]
)


def stated(text: str = TOLD) -> list[str]:
    """Every figure of a trial in README.md's answers: intervals, counts and spreads, and means with their ±."""
    return re.findall(FIGURE, text)


def test_the_page_is_what_the_tables_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tests/test_claims.py`, then see README.md"


def beginnings(text: str, mark: str) -> set[str]:
    parts = text.split(mark)
    return {mark.join(parts[:n]) for n in range(1, len(parts) + 1)}


@cache
def founded() -> list[str]:
    """Every sentence and row of the page, and every beginning of one; the longest first."""
    claimed = {told for name in TRIALS for claim in (answers, others, shifted, single_seeds) for told in claim(name)}
    sentences = {part for told in claimed for part in beginnings(told, "; ")}
    sentences |= {told.partition("; ")[2] for name in TRIALS for told in single_seeds(name)}  # the differences alone
    rows = {part + " |" for row in ROWS for part in beginnings(row.removesuffix(" |"), " | ") if "±" in part}
    paper = results.published(4)
    printed = {f"{mean:.2f} ± {std:.2f} mm" for mean, std in zip(paper["HD95_mean"], paper["HD95_std"], strict=True)}
    return sorted(sentences | rows | printed, key=len, reverse=True)


def unfounded(text: str) -> list[str]:
    """The figures of a text that stand in no sentence and no row of the page, nor in the beginning of one."""
    for told in founded():
        text = text.replace(told, "")
    return stated(text)


def test_the_readme_says_what_the_tables_say():
    assert len(stated()) > 15 and unfounded(TOLD) == []


@pytest.mark.parametrize("name", TRIALS)
def test_the_readme_answers_every_trial(name):
    assert any(answer.split(";")[0] in TOLD for answer in answers(name))


@pytest.mark.parametrize("row", list(nnunet()))
def test_the_readme_has_every_row_of_nnunet(row):
    assert row in TOLD


@pytest.mark.parametrize("figure", sorted({*stated()}))
def test_a_figure_that_does_not_follow_is_found(figure):
    changed = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), figure)
    assert changed in unfounded(TOLD.replace(figure, changed))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
