"""A trial's runs gathered: what is missing or cannot be compared is named before any table."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mupkg.report.trials import bands, boxes, histories, replicate_means, shifts_tested, trial_metrics, trial_runs
from mupkg.stages.training import HISTORY

RUNS = {
    f"{arm}-seed{replicate + offset}": {"arm": arm, "seed": replicate + offset, "replicate": replicate}
    for replicate in range(2)
    for arm, offset in (("A", 0), ("B", 1000))
}


@pytest.fixture
def study(tmp_path):
    """Two arms, two replicates, two cases; B is .1 above A in replicate 0 and .3 above it in replicate 1."""
    for name, told in RUNS.items():
        folder, better = tmp_path / name, (0.1 + 0.2 * told["replicate"]) * (told["arm"] == "B")
        folder.mkdir()
        scores = {"case_id": ["x", "NA"], "DSC": [0.5 + better, 0.6 + better]}
        pd.DataFrame(scores).to_csv(folder / "metrics.csv", index=False)
        parameters = {
            "configuration": "MetricUNet-HCP",
            "margin": 0.7 if told["arm"] == "A" else 1.0,
            "seed": told["seed"],
        }
        (folder / "run.json").write_text(json.dumps({"data_fingerprint": "f", "parameters": parameters}))
        rows = {"step": [10, 20, 40], "learning_rate": [0.1, 0.05, 0.01], "validation_dsc": [np.nan, 0.4, 0.5]}
        pd.DataFrame(rows | {"cross_entropy": 0.1}).to_csv(folder / HISTORY, index=False)
    return tmp_path


def test_a_replicate_is_what_arms_share_whatever_their_seeds(study):
    metrics = trial_metrics(trial_runs(study, RUNS), None, {"margin"})
    assert sorted(set(metrics["seed"])) == [0, 1]
    means = metrics.groupby(["configuration", "seed"])["DSC"].mean()
    assert means["B"].sub(means["A"]).tolist() == pytest.approx([0.1, 0.3])
    assert set(metrics["case_id"]) == {"x", "NA"}


def test_the_area_under_the_validation_curve_is_a_run_s_own(study):
    """0 at step 0, .4 at 20, .5 at 40: (.2 * 20 + .45 * 20) / 40."""
    metrics = trial_metrics(trial_runs(study, RUNS), None, {"margin"})
    assert metrics["validation_area"].tolist() == pytest.approx([0.325] * len(metrics))


def test_shifted_tests_are_compared_once_every_run_has_them(study):
    runs = trial_runs(study, RUNS)
    for name in RUNS:
        assert shifts_tested(runs) == []
        harder = pd.read_csv(study / name / "metrics.csv", keep_default_na=False)
        harder.assign(DSC=harder["DSC"] - 0.2).to_csv(study / name / "metrics_noise.csv", index=False)
    assert shifts_tested(runs) == ["noise"]
    plain, harder = (trial_metrics(runs, None, {"margin"}, shift) for shift in (None, "noise"))
    assert (plain["DSC"] - harder["DSC"]).tolist() == pytest.approx([0.2] * len(plain))


def test_settings_that_no_arm_sets_must_be_the_same(study):
    with pytest.raises(ValueError, match=r"margin is 0\.7 in A-seed0, 1\.0 in B-seed1000"):
        trial_metrics(trial_runs(study, RUNS), None, ())


def test_every_missing_run_is_named(study):
    (study / "B-seed1001" / "metrics.csv").unlink()
    with pytest.raises(ValueError, match="1 of the protocol's 4 runs are missing: B-seed1001; start the batch again"):
        trial_runs(study, RUNS)


def test_a_test_case_of_one_replicate_alone_is_refused(study):
    table = pd.DataFrame({"split": ["test", "test"], "replicate": [np.nan, 1]}, index=["x", "y"])
    with pytest.raises(ValueError, match="y: tested, but of one replicate alone"):
        trial_metrics(trial_runs(study, RUNS), SimpleNamespace(table=table), {"margin"})


def test_learning_rates_are_summed_over_all_steps(study):
    history = histories(trial_runs(study, RUNS))
    first = history[(history["configuration"] == "A") & (history["replicate"] == 0)]
    assert first["step"].tolist() == [20, 40]
    assert first["summed_rate"].tolist() == pytest.approx([10 * 0.1 + 10 * 0.05, 10 * 0.1 + 10 * 0.05 + 20 * 0.01])


def test_the_pictures_show_every_arm_and_every_replicate(study):
    runs = trial_runs(study, RUNS)
    (ax,) = bands(histories(runs), "summed_rate").axes
    assert [line.get_label() for line in ax.lines] == ["A, n = 2 replicates", "B, n = 2 replicates"]
    assert ax.lines[0].get_xdata() == pytest.approx([1.5, 1.7]) and ax.get_xlabel() == "summed rate"
    (ax,) = replicate_means(trial_metrics(runs, None, {"margin"}), [("B", "A")], "DSC", 0.01).axes
    dots = next(line for line in ax.lines if line.get_label() == "one replicate")
    assert dots.get_xdata() == pytest.approx([0.1, 0.3])


def test_boxes_are_over_cases_and_dots_over_replicates(study):
    metrics = trial_metrics(trial_runs(study, RUNS), None, {"margin"})
    metrics.loc[0, "DSC"] = np.inf  # of A, in replicate 0
    (ax,) = boxes(metrics, {"margin": {0.7: "A", 1.0: "B"}}, ["DSC"]).axes
    dots = [line.get_ydata().tolist() for line in ax.lines if line.get_label() == "one replicate"]
    assert dots == [pytest.approx([0.6, 0.55]), pytest.approx([0.65, 0.85])]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.7", "1"] and ax.get_xlabel() == "margin"
    medians = [line.get_ydata()[0] for line in ax.lines if line.get_color() == "C1"]
    assert medians == pytest.approx([0.55, 0.75])  # of the cases' means over replicates: .5 and .6; .7 and .8
