"""A trial's runs gathered: what is missing or cannot be compared is named before any table."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from mupkg.stages.training import HISTORY
from mupkg.trials.protocol import Study
from mupkg.trials.tables import (
    answers,
    histories,
    promised,
    rankings,
    shifts_tested,
    single_seeds,
    trial_metrics,
    trial_runs,
)

RUNS = {
    f"{arm}-seed{replicate + offset}": {"arm": arm, "seed": replicate + offset, "replicate": replicate}
    | {"configuration": "MetricUNet-HCP", "margin": margin}
    for replicate in range(2)
    for arm, offset, margin in (("A", 0, 0.7), ("B", 1000, 1))
}


@pytest.fixture
def study(tmp_path):
    """Two arms, two replicates, two cases; B is .1 above A in replicate 0 and .3 above it in replicate 1."""
    for name, told in RUNS.items():
        folder, better = tmp_path / name, (0.1 + 0.2 * told["replicate"]) * (told["arm"] == "B")
        folder.mkdir()
        scores = {"case_id": ["x", "NA"], "DSC": [0.5 + better, 0.6 + better]}
        pd.DataFrame(scores).to_csv(folder / "metrics.csv", index=False)
        parameters = told | {"margin": float(told["margin"])}
        (folder / "run.json").write_text(json.dumps({"data_fingerprint": "f", "parameters": parameters}))
        rows = {"step": [10, 20, 40], "learning_rate": [0.1, 0.05, 0.01], "validation_dsc": [np.nan, 0.4, 0.5]}
        pd.DataFrame(rows | {"cross_entropy": 0.1}).to_csv(folder / HISTORY, index=False)
    return tmp_path


def test_a_replicate_is_what_arms_share_whatever_their_seeds(study):
    metrics = trial_metrics(trial_runs(study, RUNS, {}), None)
    assert sorted(set(metrics["seed"])) == [0, 1]
    means = metrics.groupby(["configuration", "seed"])["DSC"].mean()
    assert means["B"].sub(means["A"]).tolist() == pytest.approx([0.1, 0.3])
    assert set(metrics["case_id"]) == {"x", "NA"}


def test_runs_in_folds_are_told_apart_by_repeat_and_fold(study):
    """Four replicates are two repeats of two folds, each with test cases and regions of its own."""
    told = {}
    for replicate in range(4):
        for arm in "AB":
            run = study / f"{arm}-seed{replicate}"
            if not run.exists():
                shutil.copytree(study / "A-seed0", run)
            scores = {"case_id": [f"case{replicate % 2}"], "DSC": [0.5 + replicate / 10]}
            pd.DataFrame(scores).to_csv(run / "metrics.csv", index=False)
            told[run.name] = {"arm": arm, "seed": replicate, "replicate": replicate, "steps": 8}
            told[run.name] |= {"stage1": f"stage1-replicate{replicate}"}
            record = {"data_fingerprint": f"f{replicate}", "parameters": {**told[run.name]}}
            (run / "run.json").write_text(json.dumps(record))
    runs = trial_runs(study, told, {})
    metrics = trial_metrics(runs, None, folds=2)
    found = metrics.query("configuration == 'A'").set_index(["seed", "fold"])
    assert found["case_id"].to_dict() == {(0, 0): "case0", (0, 1): "case1", (1, 0): "case0", (1, 1): "case1"}
    assert found["DSC"].tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8])
    record["parameters"]["steps"] = 7  # in both runs of one fold, which alike do not show it
    for arm in "AB":
        record["parameters"]["arm"] = arm
        (study / f"{arm}-seed3" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="A-seed3: steps is 7, not 8; B-seed3: steps is 7, not 8"):
        trial_runs(study, told, {})


def test_the_area_under_the_validation_curve_is_a_run_s_own(study):
    """0 at step 0, .4 at 20, .5 at 40: (.2 * 20 + .45 * 20) / 40."""
    metrics = trial_metrics(trial_runs(study, RUNS, {}), None)
    assert metrics["validation_area"].tolist() == pytest.approx([0.325] * len(metrics))


def test_shifted_tests_are_compared_once_every_run_has_them(study):
    runs = trial_runs(study, RUNS, {})
    for name in RUNS:
        assert shifts_tested(runs) == []
        harder = pd.read_csv(study / name / "metrics.csv", keep_default_na=False)
        harder.assign(DSC=harder["DSC"] - 0.2).to_csv(study / name / "metrics_noise.csv", index=False)
    assert shifts_tested(runs) == ["noise"]
    plain, harder = (trial_metrics(runs, None, shift) for shift in (None, "noise"))
    assert (plain["DSC"] - harder["DSC"]).tolist() == pytest.approx([0.2] * len(plain))


def test_every_missing_run_is_named(study):
    (study / "B-seed1001" / "metrics.csv").unlink()
    with pytest.raises(ValueError, match=r"plans 4 runs, but B-seed1001: is missing; .* start the batch again"):
        trial_runs(study, RUNS, {})


@pytest.mark.parametrize(
    ("recorded", "fault"),
    [
        ({"replicate": 1}, "B-seed1000: replicate is 1, not 0"),
        ({"seed": 7}, "B-seed1000: seed is 7, not 1000"),
        ({"margin": 0.9}, r"B-seed1000: margin is 0\.9, not 1\.0"),
        ({"configuration": "UNet"}, "B-seed1000: configuration is 'UNet', not 'MetricUNet-HCP'"),
    ],
)
def test_a_run_that_was_told_something_else_is_named(study, recorded, fault):
    path = study / "B-seed1000" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"parameters": record["parameters"] | recorded}))
    with pytest.raises(ValueError, match=f"plans 4 runs, but {fault}; remove what was told"):
        trial_runs(study, RUNS, {})


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_text("step\n1\n")])
def test_a_run_without_a_history_is_named(study, spoil):
    runs = trial_runs(study, RUNS, {})
    spoil(study / "A-seed1" / HISTORY)
    for ask in (histories, lambda runs: trial_metrics(runs, None)):
        with pytest.raises(ValueError, match=r"A-seed1.history\.csv: (there is no|lacks) .*; train this run again"):
            ask(runs)


def test_learning_rates_are_summed_over_all_steps(study):
    history = histories(trial_runs(study, RUNS, {}))
    first = history[(history["configuration"] == "A") & (history["replicate"] == 0)]
    assert first["step"].tolist() == [10, 20, 40]
    assert first["summed_rate"].tolist() == pytest.approx([1.0, 1.0 + 10 * 0.05, 1.0 + 10 * 0.05 + 20 * 0.01])


def test_runs_of_no_trial_have_their_seeds_for_replicates(study):
    runs = trial_runs(study, RUNS, {}).drop(columns="replicate")
    assert sorted(set(histories(runs)["replicate"])) == [0, 1, 1000, 1001]


def test_of_a_distance_more_is_worse_and_the_papers_dsc_says_nothing():
    """B lies .2 mm farther off than A in every case and replicate, give or take."""
    arms = {"A": {"configuration": "UNet"}, "B": {"configuration": "MetricUNet-HCP"}}
    trial = {"name": "t", "arms": arms, "replicates": 6, "contrasts": [["B", "A"]], "primary": "ASD", "margin": 0.1}
    study = Study.checked({"study": "s", "cohort": "c", "prepare": {"replicates": 6, "phantoms": 8}, "trial": trial})
    rng, rows = np.random.default_rng(0), []
    for arm, seed, case in ((a, r, c) for a in "AB" for r in range(6) for c in range(8)):
        noise = rng.normal(0, 0.02)
        row = {"configuration": arm, "seed": seed, "case_id": str(case), "DSC": 0.9}
        rows.append(row | {"ASD": 1.5 + 0.2 * (arm == "B") + noise})
    metrics = pd.DataFrame(rows)
    (one_seed,) = single_seeds(study.trial, metrics).to_dict("records")
    assert (one_seed["says better"], one_seed["says worse"]) == (0, 6)
    table = answers(study.trial, metrics, ["ASD"])
    assert table["verdict"].tolist() == ["harm"]
    ranked = rankings(study.trial, table)
    assert ranked["paper: difference"].isna().all() and ranked["the paper's ranking"].tolist() == [""]
    assert promised(study).empty  # E1's variances are those of DSC


@pytest.mark.parametrize(
    ("arm", "against", "said"),
    [
        ("MetricUNet-HR", "MetricUNet-C", "a tie"),
        ("MetricUNet-R", "UNet", "supported"),
        ("UNet", "MetricUNet-R", "contradicted"),
    ],
)
def test_the_paper_s_ranking_is_supported_contradicted_or_none(arm, against, said):
    """Ours is sure; the paper prints one DSC for HR and C, and puts R above UNet."""
    arms = {"A": {"configuration": arm}, "B": {"configuration": against}}
    trial = {"name": "t", "replicates": 6, "arms": arms, "contrasts": [["A", "B"]]}
    study = Study.checked({"study": "s", "cohort": "c", "prepare": {"replicates": 6, "phantoms": 8}, "trial": trial})
    rng = np.random.default_rng(0)
    places = [(name, r, c) for name in "AB" for r in range(6) for c in range(8)]
    metrics = pd.DataFrame(places, columns=["configuration", "seed", "case_id"]).astype({"case_id": str})
    metrics["DSC"] = 0.8 + 0.05 * (metrics["configuration"] == "A") + rng.normal(0, 0.005, len(metrics))
    (ranking,) = rankings(study.trial, answers(study.trial, metrics, ["DSC"]))["the paper's ranking"]
    assert ranking == said
