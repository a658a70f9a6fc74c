"""Every figure that README.md states of a trial follows from the tables in outputs/reference: `make claims`.

`python tests/test_claims.py` prints the figures as README.md must have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from mupkg.parameters import Study, Trial
from mupkg.report import statistics

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "outputs" / "reference"
LEAST = 0.75  # of validation DSC; a run that reaches it has left the plateau
TRIALS = sorted(path.parent.name for path in REFERENCE.glob("*/cases.csv"))


@cache
def cases(name: str) -> pd.DataFrame:
    return pd.read_csv(REFERENCE / name / "cases.csv", dtype={"case_id": str})


@cache
def protocol(name: str) -> Trial:
    return Study.checked(yaml.safe_load((REFERENCE / name / "protocol.yaml").read_text(encoding="utf-8"))).trial


def arms(name: str) -> Iterator[str]:
    """A row of a table for each arm: means over cases, mean ± std over replicates, and how many collapsed."""
    fallen = statistics.collapsed(cases(name))["configuration"].value_counts()
    for arm, rows in cases(name).groupby("configuration", sort=False):
        by_replicate = rows.groupby("seed")[["DSC", "DSC_all", "ASD", "HD95"]].mean()
        with np.errstate(invalid="ignore"):  # inf - inf
            mean, std = by_replicate.mean(), by_replicate.std()
        dsc = " | ".join(f"{mean[n]:.3f} ± {std[n]:.3f}" for n in ("DSC", "DSC_all"))
        mm = " | ".join(
            f"{mean[n]:.2f} ± {std[n]:.2f}" if np.isfinite(mean[n]) else "infinite" for n in ("ASD", "HD95")
        )
        yield f"| {arm} | {dsc} | {mm} | {fallen.get(arm, 0)} of {len(by_replicate)} |"


def answers(name: str) -> Iterator[str]:
    """The trial's answer to each contrast of its protocol, on its primary outcome."""
    trial = protocol(name)
    named = [(*pair, trial.primary) for pair in trial.contrasts]
    margins = {trial.primary: trial.margin}
    table = statistics.contrasts(cases(name), trial.contrasts, [trial.primary], margins=margins, named=named)
    yield from table["answer"]


def single_seeds(name: str) -> Iterator[str]:
    """What a study with one seed would have reported of each contrast."""
    trial = protocol(name)
    for arm, against in trial.contrasts:
        d = statistics.differences(cases(name), arm, against, trial.primary)
        p, means = statistics.papers_t_test(d), d.mean()
        better, worse = ((p < 0.05) & (means > 0)).sum(), ((p < 0.05) & (means < 0)).sum()
        yield (
            f"{arm} against {against}: p < .05 in {better + worse} of {len(p)} replicates, {better} times better and "
            f"{worse} times worse; differences from {means.min():+.3f} to {means.max():+.3f}, "
            f"standard deviation {means.std():.3f}"
        )


def trained(name: str) -> Iterator[str]:
    """How many runs of each arm have left the plateau, and how good these are."""
    histories = pd.read_csv(REFERENCE / name / "validations.csv").rename(columns={"replicate": "seed"})
    best = histories.groupby(["configuration", "seed"], sort=False)["validation_dsc"].max()
    test = cases(name).groupby(["configuration", "seed"])["DSC"].mean()
    for arm, values in best.groupby("configuration", sort=False):
        left = values[values > LEAST]
        dsc = test.loc[left.index]
        yield f"| {arm} | {len(left)} of {len(values)} | {dsc.mean():.3f} ± {dsc.std():.3f} |"


CLAIMS = [
    (name, claim, text) for name in TRIALS for claim in (arms, answers, single_seeds, trained) for text in claim(name)
]


def unwrapped(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("name", "claim", "text"), CLAIMS, ids=lambda value: getattr(value, "__name__", None))
def test_the_readme_says_what_the_tables_say(name, claim, text):
    assert unwrapped(text) in unwrapped((ROOT / "README.md").read_text(encoding="utf-8"))


def test_there_are_claims_to_check():
    assert {"e1"} <= set(TRIALS) and len(CLAIMS) >= 4


if __name__ == "__main__":
    for name, claim, text in CLAIMS:
        print(f"{name} {claim.__name__}: {text}")
