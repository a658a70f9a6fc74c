"""A model card says what the run's files say, and says what they do not."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from mupkg.data.phantom import make_phantom
from mupkg.stages import card
from mupkg.stages.cards import UNKNOWN, mean_and_sd, trained_on, unlike
from mupkg.stages.runs import write_json

DATA = {
    "source": "phantoms",
    "modality": "CT",
    "cases": {"train": 28, "validation": 4, "test": 8},
    "patients": {"train": 20, "validation": 3, "test": 5},
    "spacing_mm": [[2.5, 0.9, 0.9], [3.0, 0.9, 0.9]],
    "extent_mm": [[240.0, 440.0, 440.0], [300.0, 460.0, 460.0]],
}
PARAMETERS = {"configuration": "MetricUNet-HC", "seed": 7, "steps": 1234, "cohort": "pelvis"}
RECORD = {
    "parameters": PARAMETERS,
    "data": DATA,
    "data_fingerprint": "feedc0de",
    "never_left_plateau": False,
    "commit": "abc",
}


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run-seed7"
    write_json(folder / "run.json", RECORD | {"parameters": PARAMETERS | {"data_folder": str(tmp_path)}})
    (folder / "metrics.csv").write_text("case_id,DSC,ASD,PPV\na,0.8,1.5,0.5\nb,0.9,2.5,\nc,0.4,inf,0.7\n")
    return folder


def test_a_card_says_what_the_files_say(run):
    text = card(run)
    for words in (
        "# Model card: run-seed7",
        "| configuration | MetricUNet-HC |",
        "| seed, steps | 7, 1234 |",
        "| cohort | pelvis |",
        "| fingerprint of its regions | feedc0de |",
        "| source | phantoms: made-up CT, no patients |",
        "| modality | CT |",
        "train 28 case(s) of 20 patient(s), validation 4 case(s) of 3 patient(s), test 8 case(s) of 5 patient(s)",
        "2.5 to 3 × 0.9 × 0.9 mm",
        "240 to 300 × 440 to 460 × 440 to 460 mm",
        "commit abc",
        "3 test case(s), one training (seed 7)",
        f"| DSC | {np.mean([0.8, 0.9, 0.4]):.3f} ± {np.std([0.8, 0.9, 0.4], ddof=1):.3f} | 3 |",
        "| ASD (mm) | inf | ",  # an empty mask is not left out of a mean
        "| PPV | 0.600 ± 0.141 | 2 |",
        "Lowest DSC of a case: 0.400.",
        "no medical device",
        "must not be applied to patients",
        "Apache-2.0",
    ):
        assert words in text
    assert "HD95" not in text and "plateau" not in text and str(run.parent) not in text


@pytest.mark.parametrize("word", ["never_left_plateau", "collapsed"])  # the second in records of before
def test_a_run_that_never_left_the_plateau_and_one_without_a_test_are_called_so(run, word):
    record = {name: value for name, value in RECORD.items() if name != "never_left_plateau"}
    write_json(run / "run.json", record | {word: True})
    assert "0.75: this run never left the plateau.**" in card(run)
    (run / "metrics.csv").write_text("case_id,DSC,PPV\na,0,\n")
    assert "| DSC | 0.000 | 1 |" in card(run) and "PPV" not in card(run)  # one case has no deviation
    (run / "metrics.csv").unlink()
    assert "**Not tested: metrics.csv is missing" in card(run) and "±" not in card(run)


def test_what_a_run_of_before_did_not_record_is_called_unknown(run):
    write_json(run / "run.json", {})
    text = card(run)
    assert text.count(UNKNOWN) == 13 and "take it for unfit for patients" in text
    image = make_phantom(0, spacing_mm=(9.0, 8.0, 8.0)).image
    (said,) = unlike(run, image)
    assert UNKNOWN in said and "not compared" in said
    write_json(run / "run.json", RECORD | {"data": DATA | {"source": "dicom_rt"}})
    assert "made-up" not in card(run) and "unfit" not in card(run)


@pytest.mark.parametrize("content", [None, "", "[1]", "no JSON"])
def test_without_a_record_there_is_no_card(run, content):
    (run / "run.json").unlink()
    if content is not None:
        (run / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: does not tell how the run was made"):
        card(run)


def test_a_broken_table_is_not_passed_over(run):
    (run / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"metrics\.csv: is not a CSV table"):
        card(run)


@pytest.fixture(scope="module")
def image() -> sitk.Image:
    return make_phantom(0, spacing_mm=(9.0, 8.0, 8.0)).image


def trained_on_scans_like(image, run, **changed) -> Path:
    spacing = image.GetSpacing()[::-1]
    extent = np.multiply(spacing, image.GetSize()[::-1]).tolist()
    alike = {"modality": "CT", "spacing_mm": [spacing] * 2, "extent_mm": [extent] * 2}
    write_json(run / "run.json", {"data": alike | changed})
    return run


def test_a_scan_like_the_training_scans_passes(image, run):
    trained_on_scans_like(image, run)
    assert unlike(run, image) == []
    slightly = sitk.Image(image)
    slightly.SetSpacing(np.multiply(image.GetSpacing(), 1.05).tolist())
    assert unlike(run, slightly) == []


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_other_voxels_and_another_field_are_told(image, run, axis, factor):
    other, spacing = sitk.Image(image), list(image.GetSpacing())
    spacing[axis] *= factor
    other.SetSpacing(spacing)
    voxels, field = unlike(trained_on_scans_like(image, run), other)
    assert voxels.startswith("This scan's voxels: ") and field.startswith("This scan's field of view: ")
    assert f"{spacing[axis]:g}" in voxels and "the training scans': 9 × 8 × 8 mm" in voxels


def test_another_modality_is_told_by_the_header_or_else_by_the_values(image, run):
    (said,) = unlike(trained_on_scans_like(image, run, modality="MR"), image)
    assert said == "This scan's values are like those of a CT in HU; the run was trained on MR."
    (said,) = unlike(trained_on_scans_like(image, run), sitk.Abs(image))
    assert said == "This scan's values are unlike those of a CT in HU; the run was trained on CT."
    series = sitk.Image(image)
    series.SetMetaData("modality", "MR")
    (said,) = unlike(run, series)
    assert said == "This scan is MR; the run was trained on CT."


def test_a_run_records_what_it_learns_from(cohort, regions, run):
    data = trained_on(cohort, regions)
    assert json.loads(json.dumps(data)) == data
    assert data["cases"] == {"train": 1, "validation": 1, "test": 1} and data["modality"] == "CT"
    (case_id,) = regions.ids("train")
    scan = cohort.case(case_id).image
    assert data["spacing_mm"][0] == data["spacing_mm"][1] == pytest.approx(scan.GetSpacing()[::-1])
    write_json(run / "run.json", {"data": data})
    assert unlike(run, scan) == []
    assert "patients" not in data and data["source"] == "phantoms"


def test_patients_are_counted_once_and_scans_measured_over_those_that_are_learnt_from(cohort, regions):
    spacing, size = ([[3.0, 1.0, 1.0], [5.0, 0.5, 1.0], [9.0, 9.0, 9.0]], [[10, 20, 30], [6, 50, 20], [1, 1, 1]])
    columns = {"spacing_zyx_mm": map(json.dumps, spacing), "size_zyx": map(json.dumps, size)}
    table = cohort.table.loc[regions.table.index].assign(patient=["A", "a ", "B"])
    table = table.assign(**{name: [*values] for name, values in columns.items()})
    own = replace(regions, table=regions.table.assign(split="train"))
    data = trained_on(replace(cohort, table=table), own, training_cases=2)
    assert data["patients"] == {"train": 1, "validation": 0, "test": 0} and data["cases"]["train"] == 2
    assert data["spacing_mm"] == [[3.0, 0.5, 1.0], [5.0, 1.0, 1.0]]
    assert data["extent_mm"] == [[30.0, 20.0, 20.0], [30.0, 25.0, 30.0]]
    assert trained_on(replace(cohort, table=table), own)["patients"]["train"] == 2


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.25], "0.250"), ([0.5, 0.7], "0.600 ± 0.141"), ([1.0, math.inf], "inf")],
)
def test_a_single_value_has_no_standard_deviation(values, text):
    assert mean_and_sd(pd.Series(values)) == text
