"""A run tested on its study's test cases, on harder scans, and on a cohort that it was not trained on."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from mupkg.metrics import calibration, segmentation_metrics
from mupkg.scans.cases import Case
from mupkg.stages import evaluation
from mupkg.stages.evaluation import evaluate_elsewhere, mask_metrics
from mupkg.stages.inference import Pipeline, load_network, segment
from mupkg.stages.localization import NotLocated


def array(image):
    return sitk.GetArrayFromImage(image)


# On the study's own test cases


def test_a_run_is_measured_on_the_scans_own_grid(cohort, regions, copied, bones):
    table = evaluation.evaluate_run(copied, cohort, regions)
    (case_id,) = cohort.ids("test")
    case = cohort.case(case_id)
    mask = sitk.ReadImage(str(copied / "predictions" / f"{case_id}.nii.gz"))
    assert mask.GetSize() == case.image.GetSize()
    row = table.iloc[0]
    truth, prediction = array(case.label) > 0, array(mask) > 0
    assert prediction.any()
    expected = segmentation_metrics(prediction, truth, spacing_mm=(7, 6, 6))
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["aRVD"] != row["aRVD_all"] and row["SEN"] <= row["SEN_all"]
    stored = pd.read_csv(copied / "metrics.csv")
    pd.testing.assert_frame_equal(stored, table)
    assert stored["case_id"].tolist() == [case_id]
    near = segmentation_metrics(prediction, truth, spacing_mm=(7, 6, 6), tolerance_mm=2.0)["surface_DSC"]
    assert row["surface_DSC_2mm"] == near
    network, _ = load_network(copied / "weights.safetensors")
    heat = array(evaluation.region_probability(network, regions.image(case_id)))
    expected = calibration(heat, regions.volume(case_id, "label") == 1)
    assert {name: row[name] for name in expected} == pytest.approx(expected)


@pytest.mark.slow
def test_harder_scans_change_the_metrics_and_nothing_else(cohort, regions, copied, bones):
    plain = evaluation.evaluate_run(copied, cohort, regions)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    brier = {plain["Brier"].iloc[0]}
    for shift in ("noise", "contrast", "thick"):
        harder = evaluation.evaluate_run(copied, cohort, regions, shift)
        assert harder["case_id"].tolist() == plain["case_id"].tolist() and list(harder) == list(plain)
        brier.add(harder["Brier"].iloc[0])
        pd.testing.assert_frame_equal(pd.read_csv(copied / f"metrics_{shift}.csv"), harder)
    assert len(brier) == 4
    assert {path: path.read_bytes() for path in before} == before


def test_every_scan_is_shifted_as_asked_with_noise_of_its_own(cohort, regions, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "shifted", lambda image, shift, seed: asked.append((shift, seed)) or image)
    for case_id in cohort.ids():
        region = regions.image(case_id)
        evaluation._shifted_region(cohort.case(case_id), region, cohort.preparation, "contrast")
    assert {shift for shift, _ in asked} == {"contrast"} and len({*asked}) == len(cohort.ids())
    assert all(seed > 0 for _, seed in asked)


def test_the_last_weights_are_measured_beside_the_best_ones(cohort, regions, copied, bones):
    evaluation.evaluate_run(copied, cohort, regions)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    shutil.copy(copied / "last.safetensors", copied / "weights.safetensors")  # as if the last ones had been the best
    as_best = evaluation.evaluate_run(copied, cohort, regions)
    for path, content in before.items():
        path.write_bytes(content)
    last = evaluation.evaluate_run(copied, cohort, regions, last=True)
    pd.testing.assert_frame_equal(last, as_best)
    pd.testing.assert_frame_equal(pd.read_csv(copied / "metrics_last.csv"), last)
    assert {path: path.read_bytes() for path in before} == before


def test_the_region_of_an_unshifted_scan_is_the_region(cohort, regions, monkeypatch):
    """So that a shift changes the scan alone and not its place."""
    (case_id,) = cohort.ids("test")
    monkeypatch.setattr(evaluation, "shifted", lambda image, shift, seed: image)
    same = evaluation._shifted_region(cohort.case(case_id), regions.image(case_id), cohort.preparation, "noise")
    np.testing.assert_array_equal(array(same), regions.volume(case_id))


def test_mr_is_not_shifted_in_hu(cohort, regions):
    (case_id,) = cohort.ids("test")
    case = replace(cohort.case(case_id), modality="MR")
    with pytest.raises(ValueError, match=r"test_shifts: .* is for CT; these scans are MR, so leave it out"):
        evaluation._shifted_region(case, regions.image(case_id), cohort.preparation, "noise")


def test_training_on_more_cases_than_there_are_is_refused(regions):
    """Regression: arms "of 28" and "of 50" were the same run where there were 28 cases."""
    count = len(regions.ids("train"))
    assert len(regions.volumes("train", count)[0]) == count
    more = replace(regions, table=regions.table.assign(split="train"))
    images, labels = more.volumes("train", 2)
    assert len(images) == len(labels) == 2 < len(more.ids("train"))
    with pytest.raises(ValueError, match=f"training_cases: {count + 1} are asked for, but .* has {count} train"):
        regions.volumes("train", count + 1)


def test_the_largest_component_is_taken_before_the_scans_grid(tmp_path, monkeypatch):
    """Section 3.5. Two pieces with a voxel of 0.5 between them, which only on the scan's finer grid become one."""
    voxels = np.zeros((6, 8, 12), np.float32)
    voxels[2:4, 2:6, 2:5], voxels[2:4, 2:6, 5], voxels[2:4, 2:6, 6:8] = 1, 0.5, 1
    probability = sitk.GetImageFromArray(voxels)
    probability.SetSpacing((2.0, 2.0, 2.0))
    scan = sitk.GetImageFromArray(np.zeros((12, 16, 24), np.int16))
    scan.SetOrigin((-0.5, -0.5, -0.5))  # both grids fill the same space
    label = sitk.Cast(sitk.Resample(probability, scan) > 0.5, sitk.sitkUInt8)
    assert sitk.GetArrayFromImage(sitk.ConnectedComponent(label)).max() == 1
    cohort = SimpleNamespace(case=lambda case_id: Case(case_id, scan, label))
    regions = SimpleNamespace(
        ids=lambda split: ["a"], image=lambda case_id: probability, volume=lambda case_id, kind: voxels > 0.5
    )
    monkeypatch.setattr(evaluation, "load_network", lambda path: (None, {}))
    monkeypatch.setattr(evaluation, "region_probability", lambda network, region: probability)
    row = evaluation.evaluate_run(tmp_path, cohort, regions).iloc[0]
    mask = array(sitk.ReadImage(str(tmp_path / "predictions" / "a.nii.gz")))
    columns = np.flatnonzero(mask.any(axis=(0, 1)))
    assert columns.min() == 4 and columns.max() < 11  # of the larger piece alone, which ends at 10 mm
    assert row["DSC_all"] == 1 and row["SEN"] < 0.8 and row["PPV"] == 1


def test_metrics_are_in_mm_of_the_scan():
    voxels = np.zeros((6, 6, 6), np.uint8)
    voxels[2:4, 2:4, 2:4] = 1
    label = sitk.GetImageFromArray(voxels)
    label.SetSpacing((2.0, 3.0, 5.0))
    shifted = sitk.GetImageFromArray(np.roll(voxels, 1, axis=0))
    shifted.CopyInformation(label)
    found = mask_metrics(shifted, Case("a", label, label))
    assert found["DSC"] == 0.5 and found["HD"] == 5.0


# On another cohort


@pytest.mark.slow
def test_on_its_own_cohort_it_is_what_segmenting_gives(cohort, run_folder):
    ids = cohort.ids("test")
    table = evaluate_elsewhere(run_folder, cohort, ids)
    assert table["case_id"].tolist() == ids and table["located"].all()
    case = cohort.case(ids[0])
    expected = mask_metrics(segment(case.image, run_folder), case)
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
