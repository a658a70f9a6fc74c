"""From planning scans to planning scans: five patients' CT and RTSTRUCT become a cohort, a run, and contours."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import ROOT as UID
from dicom_series import closed, item, save, write_series, write_structures
from pydicom.uid import RLELossless

from mupkg.batch import run_notebook
from mupkg.data.build import write_cohort
from mupkg.data.cohort import CohortError
from mupkg.data.phantom import make_phantom
from mupkg.parameters import CohortSettings
from mupkg.scans.dicom_rt import pseudonym, read_rtstruct, write_rtstruct
from mupkg.trials.protocol import Study

ROOT = Path(__file__).parents[2]
SECRETS = (b"Doe^John", b"MRN/4711", b"19500102", b"20200102", UID.encode())
SMOKE = {"size": "smoke", "cohort": "planning"}


def patients_into(folder: Path) -> Path:
    """Five phantom patients, each in a folder called after its pseudonym, for folders' names are no header."""
    for seed in range(5):
        case, patient = make_phantom(seed, spacing_mm=(7.0, 6.0, 6.0)), f"MRN/4711-{seed}"
        place = folder / ("deep/er" if seed % 2 else "") / pseudonym(patient)
        write_series(place / "ct", case.image, patient=patient, series=f"{UID}1{seed}", frame=f"{UID}9{seed}")
        write_rtstruct(case.label, place / "ct", place / "rs.dcm", name="PROSTATE_1")
    return folder


@pytest.fixture(scope="module")
def chain(warm, tmp_path_factory) -> Path:
    """Notebooks 00, 02, 03 and 09 at smoke size, one after the other, from DICOM to DICOM."""
    folder = tmp_path_factory.mktemp("planning")
    patients_into(folder / "scans")
    places = {"data_folder": str(folder / "data"), "outputs_folder": str(folder / "outputs")}
    told = {"source": "dicom_rt", "source_folder": str(folder / "scans"), "hash_patients": True}
    told |= {"roi": ["Prostata", "prostate_*"], "data_folder": places["data_folder"]}
    study, run = folder / "outputs" / "mine", folder / "outputs" / "mine" / "MetricUNet-HCP-seed0"
    scan = str(folder / "scans" / pseudonym("MRN/4711-0") / "ct")
    for name, target, parameters in (
        ("00_prepare_cohort", folder / "data" / "planning", SMOKE | told),
        ("02_stage1_localization", study / "stage1", SMOKE | places | {"study": "mine"}),
        ("03_stage2_training", run, SMOKE | places | {"study": "mine", "steps": 200}),  # enough to find something
        ("09_segment_a_patient", folder / "report", {"run": str(run), "scan": scan, "output": str(folder / "out")}),
    ):
        run_notebook(ROOT / "notebooks" / f"{name}.ipynb", target / f"{name}.ipynb", parameters)
    return folder


@pytest.mark.timeout(600)
def test_from_contours_to_contours(chain: Path) -> None:
    table = pd.read_csv(chain / "data/planning/cohort.csv")
    assert set(table["patient"]) == {pseudonym(f"MRN/4711-{seed}") for seed in range(5)}
    assert set(table["roi"]) == {"PROSTATE_1"} and set(table["split"]) == {"train", "validation", "test"}
    for row in table.itertuples():
        (seed,) = (seed for seed in range(5) if pseudonym(f"MRN/4711-{seed}") == row.patient)
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(chain / "data/planning" / row.label)))
        truth = sitk.GetArrayFromImage(make_phantom(seed, spacing_mm=(7.0, 6.0, 6.0)).label)
        np.testing.assert_array_equal(label, truth)
    series, written = chain / "scans" / pseudonym("MRN/4711-0") / "ct", chain / "out" / "ct_prostate_rtstruct.dcm"
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(chain / "out" / "ct_prostate.nii.gz")))
    assert mask.any()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_rtstruct(written, series, "Prostate")), mask)
    back = pydicom.dcmread(written)
    assert back.PatientID == "MRN/4711-0" and back.ApprovalStatus == "UNAPPROVED"
    assert "MetricUNet-HCP-seed0" in back.StructureSetDescription


def test_the_card_of_the_run_says_where_its_scans_came_from(chain: Path) -> None:
    card = (chain / "outputs/mine/MetricUNet-HCP-seed0/card.md").read_text(encoding="utf-8")
    for words in ("| source | dicom_rt |", "| modality | CT |", "7 × 6 × 6 mm", "no medical device"):
        assert words in card
    assert str(chain) not in card
    shown = (chain / "report/09_segment_a_patient.ipynb").read_text(encoding="utf-8")
    assert "# Model card: MetricUNet-HCP-seed0" in shown


def test_no_file_that_was_written_says_who_a_patient_is(chain: Path) -> None:
    """But the contours that go back to the planning system, which have to name their patient."""
    written = [path for name in ("data", "outputs", "report", "out") for path in (chain / name).rglob("*")]
    files = [path for path in written if path.is_file() and path.suffix != ".dcm"]
    assert len(files) > 40 and {".csv", ".json", ".ipynb", ".png", ".svg", ".md", ".gz", ".mha"} <= {
        path.suffix for path in files
    }
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert not [secret for secret in SECRETS if secret in content or secret.decode() in path.name], path


def test_without_hashes_only_the_table_names_patients(tmp_path: Path) -> None:
    patients_into(tmp_path / "scans")
    settings = CohortSettings(
        **SMOKE,
        **{"source": "dicom_rt", "source_folder": str(tmp_path / "scans"), "data_folder": str(tmp_path / "data")},
        roi="prostate_1",
    )
    write_cohort(settings.cohort_path, settings.sources(), settings.preparation, split_seed=0)
    for path in filter(Path.is_file, settings.cohort_path.rglob("*")):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = [secret for secret in SECRETS if secret in content]
        assert found == ([b"MRN/4711"] if path.name == "cohort.csv" else [])


def spoilt(folder: Path) -> dict[str, str]:
    """Patients with all that can be wrong, each beside a lot of junk, and what must be said of each of them."""
    image = make_phantom(0, spacing_mm=(7.0, 6.0, 6.0)).image
    size, spacing, origin = image.GetSize(), image.GetSpacing(), np.array(image.GetOrigin())
    middle = origin + np.multiply(size, spacing) / 2
    middle[2] = origin[2] + spacing[2] * (size[2] // 2)
    square = np.array([[-20, -20, 0], [20, -20, 0], [20, 20, 0], [-20, 20, 0]], float) + middle
    rois = {
        "missing": {"Bladder": closed(square)},
        "empty": {"Prostate": []},
        "open": {"Prostate": [("OPEN_PLANAR", square)]},
        "points": {"Prostate": [("POINT", square[:1])]},
        "above": {"Prostate": closed(square + [0, 0, 1000])},
        "outside": {"Prostate": closed(square + [1000, 0, 0])},
        "other": {"Prostate": closed(square)},
        "twice": [("Prostate", closed(square)), ("Prostate", closed(square + 1))],
        "voxelless": {"Prostate": closed(square)},
        "packed": {"Prostate": closed(square)},
    }
    for number, (name, drawn) in enumerate(rois.items()):
        uids, place = {"series": f"{UID}1{number}", "frame": f"{UID}9{number}"}, folder / name
        paths = write_series(place / "ct", image + number, patient=name, **uids)
        lost = {"series": "1.2.3", "frame": "1.2.4"} if name == "other" else {}
        write_structures(place / "rs.dcm", drawn, patient=name, **uids | lost)
        first = pydicom.dcmread(paths[0])
        if name == "voxelless":
            del first.PixelData
        elif name == "packed":
            first.compress(RLELossless)
            first.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"  # which nothing here unpacks
        first.save_as(paths[0])
        (place / "notes.txt").write_text("no DICOM")
    pdf = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1", "SOPInstanceUID": f"{UID}7", "Modality": "DOC"}
    save(item(**pdf, PatientID="missing", SeriesInstanceUID=f"{UID}77"), folder / "report.dcm")
    with (folder / "junk.raw").open("wb") as file:
        file.truncate(2**31)
    at = f"{middle[2]:.2f}"
    return {
        "missing": "patient missing: has no ROIs 'Prostate', but Bladder",
        "empty": "patient empty has no RTSTRUCT",  # an empty one is a template: told of, and passed over
        "open": f"patient open, ROI 'Prostate': the contour at {at} mm is OPEN_PLANAR",
        "points": f"patient points, ROI 'Prostate': the contour at {at} mm is a POINT",
        "above": f"patient above, ROI 'Prostate': the contour at {middle[2] + 1000:.2f} mm lies on no slice",
        "outside": f"patient outside, ROI 'Prostate': the contour at {at} mm leads out of its slice",
        "other": "patient other, ROI 'Prostate': was drawn on series 1.2.3 of frame of reference 1.2.4",
        "twice": "patient twice: has 2 ROIs 'Prostate'",
        "voxelless": "export the series again, with its voxels",
        "packed": "cannot be read as an image",
    }


def test_all_that_is_wrong_is_told_in_one_go_and_nothing_is_written(tmp_path: Path) -> None:
    told = spoilt(tmp_path / "scans")
    places = {"source_folder": str(tmp_path / "scans"), "data_folder": str(tmp_path / "data")}
    settings = CohortSettings(**SMOKE, source="dicom_rt", **places)
    assert set(settings.listing()["patient"]) == set(told)
    with pytest.raises(CohortError) as error:
        settings.sources()
    for name, words in told.items():
        assert [words in fault and f"patient {name}" in fault for fault in error.value.faults].count(True) == 1
    assert not (tmp_path / "data").exists()
    for name in told:
        if name not in ("points", "open", "above", "outside"):
            shutil.rmtree(tmp_path / "scans" / name)
    with pytest.raises(CohortError) as error:  # what is wrong with contours alone is told with all cases, too
        write_cohort(settings.cohort_path, settings.sources(), settings.preparation, split_seed=0)
    assert len(error.value.faults) == 4 and not settings.cohort_path.exists()


@pytest.mark.parametrize("roi", ["", " ", [], ["Prostate", ""]])
def test_a_name_that_is_none_is_refused_before_any_work(roi, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="roi"):
        CohortSettings.checked({"source": "dicom_rt", "source_folder": str(tmp_path), "roi": roi})


def test_pseudonyms_are_not_promised_where_none_are_given() -> None:
    with pytest.raises(
        ValueError, match=r"hash_patients does nothing with source 'phantoms'; .* set source to 'dicom_rt'"
    ):
        CohortSettings.checked({"source": "phantoms", "hash_patients": True})
    with pytest.raises(ValueError, match="fill_gaps does nothing with source 'pattern'"):
        CohortSettings.checked({"source": "pattern", "source_folder": "scans", "fill_gaps": True})


def test_a_study_file_may_name_contours_as_its_source() -> None:
    prepare = {"source": "dicom_rt", "roi": ["Prostate", "prostate_*"], "hash_patients": True}
    study = {"study": "mine", "cohort": "mine", "configurations": ["UNet"], "source_folder": "scans"}
    assert json.loads(json.dumps(Study.checked(study | {"prepare": prepare}).prepare)) == prepare
    with pytest.raises(ValueError, match=r"prepare: parameter roi"):
        Study.checked(study | {"prepare": prepare | {"roi": []}})
