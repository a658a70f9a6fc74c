"""Contrasts that no protocol named: RESULTS.md calls them post hoc."""

from __future__ import annotations

import pages
import pytest


def mean_over_replicates(trial: str, arms: list[str], replicates: int) -> float:
    table = pages.cases(trial)
    table = table[table["configuration"].isin(arms) & (table["seed"] < replicates)]
    return table.groupby(["configuration", "seed"])["DSC"].mean().mean()


@pytest.mark.parametrize(
    ("first", "second", "arm", "arms", "replicates"),
    [
        ("hcp_again", "hcp_again", "HCP", ["HCP"], 20),
        ("hcp_again", "hcp_again", "HCP and HCP-again", ["HCP", "HCP-again"], 20),
        ("e3", "hcp_again", "HN", ["HN"], 5),
        ("e3", "hcp_again", "with normalize", pages.study("e3").trial.means["with normalize"], 5),
    ],
)
def test_a_contrast_after_the_fact_is_the_difference_of_the_means_over_shared_replicates(
    first, second, arm, arms, replicates
):
    spec = {"trial": first, "post_hoc": second, "arm": arm, "against": "UNet and UNet-again"}
    row = pages._after_the_fact(spec).iloc[0]
    ours = mean_over_replicates(first, arms, replicates)
    theirs = mean_over_replicates("hcp_again", ["UNet", "UNet-again"], replicates)
    assert row["replicates"] == replicates
    assert row["mean_difference"] == pytest.approx(ours - theirs, abs=1e-9)
