"""A trial is continued in a fresh clone where nothing is left of its runs but what `make keep` kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from mupkg.trials.kept import KEPT

ROOT = Path(__file__).parents[2]
STUDY, REPORT = "outputs/smoke-trials", "outputs/smoke-trials/report/smoke"
FIRST, SECOND = ("UNet-seed0", "HCNP-seed1000"), ("UNet-seed1", "HCNP-seed1001")


class Clone:
    """The repository without data and outputs."""

    def __init__(self, folder: Path, python: list[str]) -> None:
        self.folder, self.begins = folder, python
        folder.mkdir()
        shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
        for name in ("notebooks", "mupkg"):
            ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)

    def python(self, *arguments: str) -> str:
        """What a command of this clone says."""
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        command = [*self.begins, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    def trial(self, *options: str) -> str:
        """`make trial TRIAL=smoke`"""
        profile = ("--workflow-profile", "notebooks/studies/profiles/laptop")
        file = ("--configfile", "notebooks/studies/trials/smoke.yaml")
        return self.python("snakemake", "--cores", "2", *profile, *file, *options)

    def keep_and_lose_the_rest(self) -> None:
        """`make keep`; then the machine is lost, with all that git ignores."""
        self.python("mupkg.trials.kept", STUDY)
        for name in ("data", STUDY, ".snakemake"):
            shutil.rmtree(self.folder / name)

    def trained(self) -> list[str]:
        return sorted(path.name for path in (self.folder / STUDY).glob("*-seed*"))

    def kept(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (self.folder / KEPT / "smoke-trials").rglob("*.*")}

    def cases(self) -> pd.DataFrame:
        table = pd.read_csv(self.folder / REPORT / "cases.csv")
        return table.sort_values(["configuration", "seed", "case_id"], ignore_index=True)


@pytest.mark.timeout(900)
def test_a_trial_goes_on_from_kept_runs_alone(tmp_path, warm):
    clone = Clone(tmp_path / "clone", warm)
    clone.trial("--until", *(f"{STUDY}/{run}/metrics.csv" for run in FIRST))
    assert clone.trained() == sorted(FIRST)
    clone.keep_and_lose_the_rest()
    before = clone.kept()

    done = clone.trial()
    assert clone.trained() == sorted(SECOND)  # what is kept was not trained again
    assert "rule restore_stage1:" in done and "rule stage1:" not in done
    assert {path.parent.name for path in before} == {*FIRST, "stage1"}
    assert clone.kept() == before
    whole = clone.cases()
    assert whole.groupby(["configuration", "seed"]).size().tolist() == [2, 2, 2, 2]
    measured = pd.concat(pd.read_csv(path) for path in before if path.name == "metrics.csv")
    of_kept = whole[whole["seed"] == 0].set_index("case_id")["DSC"]
    assert sorted(of_kept) == pytest.approx(sorted(measured["DSC"]), abs=1e-5)

    clone.keep_and_lose_the_rest()
    assert {path.parent.name for path in clone.kept()} == {*FIRST, *SECOND, "stage1"}
    done = clone.trial()
    for rule in ("prepare_cohort", "stage1", "stage2"):
        assert f"rule {rule}:" not in done
    assert "rule analyse_trial:" in done and clone.trained() == []
    pd.testing.assert_frame_equal(clone.cases(), whole, atol=2e-5, check_dtype=False)  # kept, 0.0 is 0
