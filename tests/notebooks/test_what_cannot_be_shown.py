"""What cannot be shown is said."""

from __future__ import annotations

import builtins
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from bright_study import SPLITS, WORKING, bright_case, two_runs

from mupkg.data.build import Source, write_cohort
from mupkg.stages import inference

LOAD_NETWORK = inference.load_network  # before a fixture puts an oracle in its place


def test_a_test_region_without_prostate_has_an_empty_row_and_no_picture(study, monkeypatch, capsys):
    path = study.regions.folder / "regions" / "d_label.npy"
    np.save(path, np.zeros_like(np.load(path)))
    two_runs(study)
    monkeypatch.setattr(inference, "load_network", LOAD_NETWORK)
    names = study.notebook("05")
    assert "test regions that hold no prostate: d\n" in capsys.readouterr().out
    assert set(names["ranked"]) == {"e", "f"} and set(names["chosen"]) == {"e", "f"}
    table = pd.read_csv(study.root / "study" / "report" / "embedding_separation.csv", index_col="case_id")
    assert len(table) == 6
    assert table.loc["d", ["silhouette", "Fisher ratio"]].isna().all(axis=None)
    assert table.loc[["e", "f"]].notna().all(axis=None)


def test_pictures_without_any_prostate_are_refused(study):
    for path in (study.regions.folder / "regions").glob("[def]_label.npy"):
        np.save(path, np.zeros_like(np.load(path)))
    two_runs(study)
    with pytest.raises(ValueError, match="no test region holds any prostate; look at stage 1"):
        study.notebook("05")


def test_a_seed_without_a_run_is_named(study):
    two_runs(study)
    with pytest.raises(
        ValueError, match=r"no finished run of any configuration with seed 4; train it with notebook 03 .*, or choose"
    ):
        study.notebook("05", seed=4)


@pytest.mark.parametrize("unlabelled", ["c", "abc", "abcdef"])
def test_notebook_1_shows_cases_without_a_label(unlabelled, study, monkeypatch, capsys):
    def source(case_id: str) -> Source:
        case = bright_case(case_id)
        return Source(case_id, lambda: replace(case, label=None) if case_id in unlabelled else case, {})

    shutil.rmtree(study.root / "cohort")
    write_cohort(study.root / "cohort", map(source, SPLITS), WORKING, split_seed=0)
    monkeypatch.setattr(builtins, "display", lambda *_: None, raising=False)
    names = study.notebook("01")
    labelled = len(SPLITS) - len(unlabelled)
    assert f"{labelled} of 6 cases have a label\n" in capsys.readouterr().out
    assert set(names["scans"]) == {"a", "b", "c"}
    assert set(names["curves"]) == {"a", "b", "c"} - set(unlabelled)
    sizes = pd.read_csv(study.root / "study" / "report" / "prostate_ml.csv", index_col="split")
    assert sizes["count"].sum() == labelled


def test_notebook_4_says_when_configurations_differ_in_their_number_of_seeds(study, capsys):
    said = "The number of seeds differs"
    for run in ("UNet-seed0", "MetricUNet-R-seed0"):
        study.test(run)
    study.notebook("04", "everything = ")
    assert said not in capsys.readouterr().out
    study.test("UNet-seed1")
    study.notebook("04", "everything = ")
    assert said in capsys.readouterr().out
