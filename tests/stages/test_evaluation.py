"""A run on a cohort that it was not trained on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mupkg.stages.evaluation import evaluate_elsewhere
from mupkg.stages.inference import Pipeline, measure, segment
from mupkg.stages.localization import NotLocated


def test_on_its_own_cohort_it_is_what_segmenting_gives(cohort, run_folder):
    ids = cohort.ids("test")
    table = evaluate_elsewhere(run_folder, cohort, ids)
    assert table["case_id"].tolist() == ids and table["located"].all()
    case = cohort.case(ids[0])
    expected = measure(segment(case.image, run_folder), case)
    assert {name: table[name].iloc[0] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_a_case_without_a_location_is_an_empty_mask_and_said(cohort, run_folder, monkeypatch):
    def lost(self, image, **_):
        raise NotLocated("nowhere")

    monkeypatch.setattr(Pipeline, "__call__", lost)
    row = evaluate_elsewhere(run_folder, cohort, cohort.ids("test")).iloc[0]
    assert not row["located"] and row["DSC"] == 0 and np.isinf(row["HD95"])


def test_other_errors_are_not_taken_for_an_empty_mask(cohort, run_folder, monkeypatch):
    def broken(self, image, **_):
        raise ValueError("broken")

    monkeypatch.setattr(Pipeline, "__call__", broken)
    with pytest.raises(ValueError, match="broken"):
        evaluate_elsewhere(run_folder, cohort, cohort.ids("test"))


def test_scans_are_prepared_as_their_modality_asks_on_the_run_s_own_grid(cohort, run_folder, monkeypatch):
    seen = []

    def look(self, image, **_):
        seen.append(self.preparation)
        raise NotLocated("seen enough")

    monkeypatch.setattr(Pipeline, "__call__", look)
    other = cohort.preparation.model_copy(update={"modality": "MR", "spacing_mm": (9.0, 9.0, 9.0)})
    elsewhere = SimpleNamespace(case=cohort.case, preparation=other)
    evaluate_elsewhere(run_folder, elsewhere, cohort.ids("test"))
    own = Pipeline.load(run_folder).preparation
    assert own.modality == "CT" and seen == [own.model_copy(update={"modality": "MR"})]


def test_a_case_without_a_label_is_named(cohort, run_folder):
    unlabelled = SimpleNamespace(
        case=lambda case_id: replace(cohort.case(case_id), label=None), preparation=cohort.preparation
    )
    with pytest.raises(ValueError, match=f"case {cohort.ids('test')[0]}: has no label"):
        evaluate_elsewhere(run_folder, unlabelled, cohort.ids("test"))
