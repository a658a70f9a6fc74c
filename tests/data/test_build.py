"""Where cohorts come from: every source gives the cases that lie there, or says what is missing."""

import gzip
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from dicom_series import ROOT, write_series
from pydicom import dcmread

from mupkg.data.build import (
    LAYOUTS,
    Source,
    sources_from_dicom_rt,
    sources_from_pattern,
    sources_from_phantoms,
    sources_from_table,
    write_cohort,
)
from mupkg.data.cohort import CohortError, patients, table_faults
from mupkg.data.phantom import make_phantom
from mupkg.data.preprocessing import Preparation
from mupkg.scans.cases import Case
from mupkg.scans.dicom_rt import write_rtstruct

SHAPE = (6, 12, 14)
MR = Preparation(modality="MR", spacing_mm=(5.0, 4.0, 4.0))


def scan(low=1, seed=0) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(seed).integers(low, 400, SHAPE).astype(np.int16))
    image.SetSpacing((4.0, 4.0, 5.0))
    return image


def mask(outer=1, inner=None) -> sitk.Image:
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[1:5, 3:10, 3:10] = outer
    voxels[1:5, 5:8, 5:8] = outer if inner is None else inner
    label = sitk.GetImageFromArray(voxels)
    label.CopyInformation(scan())
    return label


def write(image: sitk.Image, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture
def table_folder(tmp_path):
    for seed, case_id in enumerate(("007", "b", "c")):
        write(scan(seed=seed), tmp_path / f"{case_id}.mha")
        write(mask(), tmp_path / "contours" / f"{case_id}.mha")
    return tmp_path


def write_table(folder, name="cohort.csv", **columns):
    table = pd.DataFrame({"case_id": ["007", "b", "c"]})
    table["image"], table["label"] = table["case_id"] + ".mha", "contours/" + table["case_id"] + ".mha"
    table.assign(**columns).to_csv(folder / name, index=False)
    return folder / name


def test_every_source_names_its_case_as_the_case_names_itself():
    (source,) = sources_from_phantoms([5], (12.0, 12.0, 12.0))
    assert source.case_id == source.read().case_id == "phantom-0005"
    assert source.columns == {"label": "phantom-0005", "seed": 5}


def test_promise12(tmp_path):
    for number in ("00", "01", "02"):
        write(scan(seed=int(number)), tmp_path / f"Case{number}.mhd")
        write(mask(), tmp_path / f"Case{number}_segmentation.mhd")
    sources = sources_from_pattern(tmp_path, modality="MR", **LAYOUTS["promise12"])
    assert [source.case_id for source in sources] == ["Case00", "Case01", "Case02"]
    case = sources[1].read()
    assert case.modality == "MR" and sitk.GetArrayFromImage(case.label).sum() == 4 * 7 * 7
    cohort = write_cohort(tmp_path / "out", sources, MR, split_seed=0)
    assert list(cohort.table["source"]) == ["Case00.mhd", "Case01.mhd", "Case02.mhd"]
    assert set(cohort.table["modality"]) == {"MR"}


def test_decathlon(tmp_path):
    write(sitk.JoinSeries([scan(), scan() + 1000]), tmp_path / "imagesTr" / "prostate_00.nii.gz")
    write(mask(1, 2), tmp_path / "labelsTr" / "prostate_00.nii.gz")
    for folder in ("imagesTr", "labelsTr"):  # its archives bring such files along
        (tmp_path / folder / "._prostate_00.nii.gz").write_bytes(b"\0")
    write(scan(), tmp_path / "imagesTs" / "prostate_03.nii.gz")
    (source,) = sources_from_pattern(tmp_path, modality="MR", **LAYOUTS["decathlon"])
    case = source.read()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(case.image), sitk.GetArrayFromImage(scan()))
    assert sitk.GetArrayFromImage(case.label).sum() == 4 * 7 * 7
    other = LAYOUTS["decathlon"] | {"label_values": (2,), "channel": 1}
    (source,) = sources_from_pattern(tmp_path, modality="MR", **other)
    case = source.read()
    assert sitk.GetArrayFromImage(case.image).min() > 1000
    assert sitk.GetArrayFromImage(case.label).sum() == 4 * 3 * 3


def test_a_pattern_may_name_folders(tmp_path):
    for name in ("a", "b"):
        write(scan(), tmp_path / name / "t2.nii.gz")
        write(mask(), tmp_path / name / "roi.nii.gz")
    write(scan(), tmp_path / "deeper" / "c" / "t2.nii.gz")
    sources = sources_from_pattern(tmp_path, "{case}/t2.nii.gz", "{case}/roi.nii.gz", modality="MR")
    assert [source.case_id for source in sources] == ["a", "b"]
    assert sources[1].read().case_id == "b"


def test_dots_of_a_pattern_are_dots(tmp_path):
    write(scan(), tmp_path / "a_image.nii.gz")
    (tmp_path / "a_imagexnii.gz").write_text("")
    write(mask(), tmp_path / "a_label.nii.gz")
    found = sources_from_pattern(tmp_path, "{case}_image.nii.gz", "{case}_label.nii.gz", modality="MR")
    assert [source.case_id for source in found] == ["a"]


def test_all_missing_labels_are_told(tmp_path):
    for name in ("a", "b", "c"):
        write(scan(), tmp_path / f"{name}_image.mha")
    write(mask(), tmp_path / "b_label.mha")
    with pytest.raises(CohortError) as error:
        sources_from_pattern(tmp_path, "{case}_image.mha", "{case}_label.mha", modality="MR")
    first, second = error.value.faults
    assert first == "case a: no label a_label.mha beside a_image.mha; add it or move the image"
    assert second.startswith("case c: ")


def test_a_pattern_that_cannot_be_or_finds_nothing(tmp_path):
    for folder, image, label, fault in (
        (tmp_path, "{case}.mha", "{case}_label.mha", "no file there matches"),
        (tmp_path, "image.mha", "{case}.mha", "it is 'image.mha'"),
        (tmp_path, "{case}.mha", "{case}{case}.mha", "it is '{case}{case}.mha'"),
        (tmp_path / "absent", "{case}.mha", "{case}_label.mha", "there is no such folder"),
    ):
        with pytest.raises(CohortError) as error:
            sources_from_pattern(folder, image, label, modality="MR")
        assert fault in str(error.value)


def test_patterns_that_are_the_same_or_lead_out_are_refused(tmp_path):
    write(scan(), tmp_path / "in" / "a.mha")
    write(mask(), tmp_path / "labs" / "a.mha")
    with pytest.raises(CohortError, match=r"are both '\{case\}\.mha'; give labels another one"):
        sources_from_pattern(tmp_path / "in", "{case}.mha", "{case}.mha", modality="MR")
    with pytest.raises(CohortError, match=r"must hold .* not lead out of the folder by / or \.\.; .*'\.\./labs"):
        sources_from_pattern(tmp_path / "in", "{case}.mha", "../labs/{case}.mha", modality="MR")


def test_case_folders_may_be_links_and_circles_end(tmp_path):
    """They were passed over without a word."""
    for name in "ab":
        write(scan(), tmp_path / "elsewhere" / name / "t2.mha")
        write(mask(), tmp_path / "elsewhere" / name / "roi.mha")
    (folder := tmp_path / "in").mkdir()
    for name in "ab":
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "a" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    found = sources_from_pattern(folder, "{case}/t2.mha", "{case}/roi.mha", modality="MR")
    assert [source.case_id for source in found] == ["a", "b"]
    (folder / "c").symlink_to(tmp_path / "elsewhere" / "a")
    with pytest.raises(
        CohortError,
        match=r"cases a, c: have one and the same image .*a/t2\.mha and .*c/t2\.mha; give each its own",
    ):
        sources_from_pattern(folder, "{case}/t2.mha", "{case}/roi.mha", modality="MR")
    (folder / "c").unlink()
    (folder / "d").mkdir()
    (folder / "d" / "t2.mha").symlink_to(tmp_path / "absent.mha")
    write(mask(), folder / "d" / "roi.mha")
    lost = sources_from_pattern(folder, "{case}/t2.mha", "{case}/roi.mha", modality="MR")[-1]
    with pytest.raises(ValueError, match=r"case d: .*d/t2\.mha: .*there is no such file"):
        lost.read()


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    for name in "ab":
        write(scan(), tmp_path / name / "t2.mha")
        write(mask(), tmp_path / name / "roi.mha")
    scandir = os.scandir

    def closed(place):
        if Path(place).name == "b":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(CohortError, match=r"/b: cannot be read \(Permission denied\); give yourself read permission"):
        sources_from_pattern(tmp_path, "{case}/t2.mha", "{case}/roi.mha", modality="MR")


def test_a_broken_file_is_found_when_it_is_read(tmp_path):
    write(scan(), tmp_path / "a.mha")
    (tmp_path / "a_label.mha").write_text("torn")
    (source,) = sources_from_pattern(tmp_path, "{case}.mha", "{case}_label.mha", modality="MR")
    with pytest.raises(ValueError, match=r"^case a: .*a_label\.mha: .*; copy or export it again"):
        source.read()


# Tables


@pytest.mark.parametrize("split", [{}, {"split": None}])
def test_a_table_without_a_split_has_it_drawn(table_folder, split):
    write_table(table_folder, **split)
    sources = sources_from_table(table_folder, modality="MR")
    assert sources[0].case_id == "007"
    cohort = write_cohort(table_folder / "out", sources, MR, split_seed=0)
    assert set(cohort.table["split"]) == {"train", "validation", "test"}
    assert list(cohort.table.columns[:4]) == ["case_id", "image", "label", "split"]


def test_a_table_keeps_its_split_and_what_else_it_knows(table_folder):
    columns = {"split": ["test", "validation", "train"], "PSA (ng/ml)": [4.5, 7.0, None], "modality": "MR"}
    write_table(table_folder, **columns)
    cohort = write_cohort(table_folder / "out", sources_from_table(table_folder, modality="MR"), MR, split_seed=0)
    assert list(cohort.table["split"]) == columns["split"]
    assert cohort.table["PSA (ng/ml)"]["b"] == 7.0
    assert set(cohort.table["modality"]) == {"MR"}
    assert cohort.table["image"]["b"] == "images/b.nii.gz"


def test_a_table_that_tells_another_modality_is_refused(table_folder):
    """It was overwritten without a word."""
    write_table(table_folder, modality=["MR", "CT", None])
    with pytest.raises(CohortError) as error:
        sources_from_table(table_folder, modality="MR")
    (fault,) = error.value.faults
    assert fault.startswith("case b: is CT in ") and fault.endswith("cohort.csv, not MR; set modality to it")


def test_a_split_filled_in_part_names_the_cases(table_folder):
    write_table(table_folder, split=["test", None, None])
    with pytest.raises(CohortError) as error:
        sources_from_table(table_folder, modality="MR")
    assert [fault[:7] for fault in error.value.faults] == ["case b:", "case c:"]
    assert all("has a label but no split; fill it" in fault for fault in error.value.faults)


def test_a_table_of_another_name_is_the_one_that_is_read(table_folder):
    write_table(table_folder)
    mine = write_table(table_folder, "mine.csv")
    mine.write_text("\n".join(mine.read_text(encoding="utf-8").splitlines()[:2]))
    assert len(sources_from_table(mine, modality="MR")) == 1
    assert len(sources_from_table(table_folder, modality="MR")) == 3


def test_a_table_without_needed_columns_is_refused(table_folder):
    (table_folder / "cohort.csv").write_text("case_id,image\nb,b.mha\n")
    with pytest.raises(CohortError, match=r"lacks the column\(s\) label"):
        sources_from_table(table_folder, modality="MR")


# Who is who


def three_of(folder: Path, names: dict[str, int], image="_t2w.mha", label="_roi.mha") -> None:
    for name, seed in names.items():
        write(scan(seed=seed), folder / f"{name}{image}")
        write(mask(), folder / f"{name}{label}")


STUDIES = {f"{patient}_{1000000 + n}": n for n, patient in enumerate((10000, 10000, 10000, 10001, 10002, 10003))}


@pytest.mark.parametrize("way", ["pattern", "table"])
def test_names_that_may_tell_a_patient_are_not_taken_for_patients(tmp_path, way):
    """Regression: three studies of one patient in training and test."""
    three_of(tmp_path, STUDIES)
    table = pd.DataFrame({"case_id": [*STUDIES]})
    table = table.assign(image=table["case_id"] + "_t2w.mha", label=table["case_id"] + "_roi.mha")
    table.to_csv(tmp_path / "cohort.csv", index=False)
    with pytest.raises(
        CohortError, match=r"10000_1000002: look like scans of one patient, 10000\. Say who is who in a"
    ):
        if way == "table":
            sources = sources_from_table(tmp_path, modality="MR")
        else:
            sources = sources_from_pattern(tmp_path, "{case}_t2w.mha", "{case}_roi.mha", modality="MR")
        write_cohort(tmp_path / "out", sources, MR, split_seed=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True])
def test_a_table_says_who_is_who(tmp_path, single):
    """Of a patient with several scans, and where every scan is another patient's."""
    three_of(tmp_path, STUDIES)
    table = pd.DataFrame({"case_id": [*STUDIES]})
    table = table.assign(image=table["case_id"] + "_t2w.mha", label=table["case_id"] + "_roi.mha")
    table["patient"] = table["case_id"] if single else table["case_id"].str.partition("_")[0]
    table.to_csv(tmp_path / "cohort.csv", index=False)
    for seed in range(3):
        sources = sources_from_table(tmp_path, modality="MR")
        split = write_cohort(tmp_path / "out", sources, MR, split_seed=seed).table.groupby("patient")["split"]
        assert split.nunique().tolist() == [1] * len(split) and len(split) == (6 if single else 4)


@pytest.mark.parametrize(
    "names", [["prostate_00", "prostate_01", "prostate_02"], ["Case00", "Case01"], ["P1_a", "P1_b"], ["a-1", "b-2"]]
)
def test_names_with_the_same_beginning_are_no_patients_of_their_own(names):
    assert not table_faults(pd.DataFrame({"case_id": names, "label": "x"}))


@pytest.mark.parametrize("patterns", [("{patient}_{case}.mha", "{case}.mha"), ("{case}.mha", "{patient}.mha")])
def test_a_pattern_tells_cases_alone_and_a_table_the_rest(tmp_path, patterns):
    with pytest.raises(
        CohortError, match=r"a pattern must hold \{case\} once.* whose patients are known, in a table"
    ):
        sources_from_pattern(tmp_path, *patterns, modality="MR")


def test_labels_without_an_image_are_told(tmp_path):
    """Regression: two of five cases were left out without a word."""
    three_of(tmp_path, dict(zip("abcde", range(5), strict=True)))
    (tmp_path / "d_t2w.mha").rename(tmp_path / "d_t2.mha")
    (tmp_path / "e_t2w.mha").rename(tmp_path / "e_t2w.nii")
    with pytest.raises(CohortError) as error:
        sources_from_pattern(tmp_path, "{case}_t2w.mha", "{case}_roi.mha", modality="MR")
    for name, fault in zip(("d_roi.mha", "e_roi.mha"), error.value.faults, strict=True):
        assert fault.startswith(f"{name}: no image matching '{{case}}_t2w.mha' belongs to this label")


def test_the_longer_pattern_says_what_a_file_is(tmp_path):
    three_of(tmp_path, {"a": 0}, image="_image.mha", label=".mha")
    (source,) = sources_from_pattern(tmp_path, "{case}_image.mha", "{case}.mha", modality="MR")
    assert source.columns == {"source": "a_image.mha", "label": "a.mha"}


def test_the_same_voxels_under_two_names_are_refused(tmp_path):
    """In whatever file, type, direction and place."""
    three_of(tmp_path, {"a": 0, "b": 1, "c": 2})
    again = sitk.Flip(sitk.Cast(scan(seed=1), sitk.sitkFloat32), [True, False, True])
    label = sitk.Flip(mask(), [True, False, True])
    for image, name in ((again, "d_t2w.mha"), (label, "d_roi.mha")):
        image.SetOrigin([x + 7 for x in image.GetOrigin()])
        write(image, tmp_path / name)
    sources = sources_from_pattern(tmp_path, "{case}_t2w.mha", "{case}_roi.mha", modality="MR")
    with pytest.raises(CohortError) as error:
        write_cohort(tmp_path / "out", sources, MR, split_seed=0)
    assert error.value.faults == ["cases b, d: have the same voxels; leave one of them out"]
    assert not (tmp_path / "out").exists()


# Planning scans


def planned(scans: Path, patients: Sequence[str], places: Sequence[str] | None = None) -> Path:
    """Every patient's scan and structure set, each in a folder of its own."""
    phantom = make_phantom(0, spacing_mm=(7.0, 6.0, 6.0))
    for number, patient in enumerate(patients):
        place = scans / (places or list(map(str, range(len(patients)))))[number]
        uids = {"series": f"{ROOT}1{number}", "frame": f"{ROOT}9{number}"}
        write_series(place, phantom.image + number, patient=patient, **uids)
        write_rtstruct(phantom.label, place, place.parent / f"Kontur_{number}.dcm")
    return scans


@pytest.mark.slow
@pytest.mark.parametrize("ids", [("12", "12.0"), ("4711", "04711"), ("P 1", "p1")])
def test_a_planned_patient_of_two_spellings_is_one(tmp_path, ids):
    scans = planned(tmp_path, [*ids, "B", "C"])
    for hash_patients in (False, True):
        sources = sources_from_dicom_rt(scans, hash_patients=hash_patients)
        table = pd.DataFrame([{"case_id": source.case_id, **source.columns} for source in sources])
        assert len(set(table["case_id"])) == 4 and len(set(patients(table))) == 3


def test_slices_in_another_frame_of_reference_are_told_when_they_are_left_out(tmp_path):
    """Regression: half of a scan went without a word."""
    scans = planned(tmp_path, ["A"])
    paths = sorted((tmp_path / "0").iterdir())  # from the top down
    for path in paths[:3]:
        header = dcmread(path)
        header.FrameOfReferenceUID = f"{ROOT}8"
        header.save_as(path)
    with pytest.warns(UserWarning, match=r"ROI 'Prostate': 3 slices of series .* are in another frame of reference"):
        (source,) = sources_from_dicom_rt(scans)
    assert source.read().image.GetSize()[2] == len(paths) - 3


@pytest.mark.slow
def test_with_hash_patients_nothing_of_a_path_or_a_person_enters_a_cohort(tmp_path):
    """Regression: a case was called by its folder, and that by the patient's name."""
    places = [f"SURNAME^GIVEN_1950010{number}/Planungs-CT {number}" for number in range(3)]
    scans = planned(tmp_path / "scans", ["ID-47110", "ID-47111", "ID-47112"], places)
    sources = sources_from_dicom_rt(scans, hash_patients=True)
    preparation, cohort = Preparation(spacing_mm=(6.0, 5.0, 5.0)), tmp_path / "data" / "cohort"
    write_cohort(cohort, sources, preparation, split_seed=0, source="dicom_rt")
    names = {"ID-4711", "Doe^John", "19500102", str(scans)}
    for path in scans.rglob("*"):
        names |= {*path.relative_to(scans).parts, path.stem}
    files = [path for path in cohort.rglob("*") if path.is_file()]
    assert len(files) == 3 * 4 + 3 and len(names) > 3 * 4
    for path in files:
        content = path.read_bytes()
        unpacked = gzip.decompress(content) if path.suffix == ".gz" else b""
        whole = b"\n".join([str(path.relative_to(cohort)).encode(), content, unpacked])
        assert not [name for name in names if name.encode() in whole], path


def test_a_cohort_made_again_leaves_its_folders_permissions_alone(tmp_path):
    """Regression: patients' folders that were closed to others were open afterwards."""
    of_mr, folder = partial(Case, label=mask(), modality="MR"), tmp_path / "patients"
    sources = [Source(i, partial(of_mr, i, scan(seed=n)), {"label": i}) for n, i in enumerate("abc")]
    write_cohort(folder, sources, MR, split_seed=0)
    for place in (folder, folder / "images"):
        place.chmod(0o700)
    write_cohort(folder, sources, MR, split_seed=0)
    assert [place.stat().st_mode & 0o777 for place in (folder, folder / "images")] == [0o700, 0o700]
