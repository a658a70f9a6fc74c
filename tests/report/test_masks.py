"""A mask never takes the place of another one."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import write_series
from matplotlib import pyplot as plt

from mupkg.report import masks
from mupkg.report.masks import new_mask_path, scan_name, write_mask
from mupkg.scans.dicom_rt import read_rtstruct
from mupkg.stages import Pipeline
from mupkg.stages.localization import Location
from mupkg.stages.runs import write_json

ROOT = Path(__file__).parents[2]


def scan(seed):
    return sitk.GetImageFromArray(np.random.default_rng(seed).integers(-1000, 500, (3, 4, 5)).astype(np.int16))


def segmented(folder, seed, name="scans/P1/ct.nii.gz", run="runs/UNet-seed0"):
    mask = new_mask_path(folder, name)
    write_mask(scan(seed), mask, scan=name, run=run)
    return mask


def same(mask, seed):
    return sitk.Hash(sitk.ReadImage(str(mask))) == sitk.Hash(scan(seed))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("scans/1.2.840.0.nii.gz", "1.2.840.0"),
        ("scans/1.2.840.1.nii.gz", "1.2.840.1"),
        ("scans/1.2.840.1", "1.2.840.1"),  # a DICOM series' folder
        ("scans/P1/", "P1"),
        ("ct.v2.MHA", "ct.v2"),
        ("ct.NII", "ct"),
        ("ct.gz", "ct.gz"),
        ("ct.nrrd", "ct"),
        (".nii.gz", "scan"),
        (".", "scan"),
    ],
)
def test_a_name_loses_known_endings_alone(path, name):
    assert scan_name(path) == name


@pytest.mark.parametrize("name", ["scans/P1/ct.nii.gz", "scans/P2/ct.nii.gz", "ct.mha", "scans/ct"])
def test_a_result_is_not_written_over(tmp_path, name):
    first = segmented(tmp_path, 1, "scans/P1/ct.nii.gz", "runs/UNet-seed1")
    with pytest.raises(ValueError, match=r"ct_prostate\.nii\.gz: is there already; choose another .* or remove that"):
        segmented(tmp_path, 2, name)
    assert same(first, 1)
    record = json.loads((tmp_path / "ct_prostate.json").read_bytes())
    assert record == {"scan": "scans/P1/ct.nii.gz", "run": "runs/UNet-seed1"}
    assert same(segmented(tmp_path / "P2", 2, name), 2)


def test_a_mask_without_a_record_is_left_alone(tmp_path):
    (tmp_path / "ct_prostate.nii.gz").write_bytes(b"a mask")
    with pytest.raises(ValueError, match="is there already"):
        segmented(tmp_path, 1)
    assert (tmp_path / "ct_prostate.nii.gz").read_bytes() == b"a mask"


def test_a_break_before_the_mask_is_written_leaves_the_name_free(tmp_path, monkeypatch):
    new_mask_path(tmp_path, "ct.nii.gz")
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(masks, "write_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        segmented(tmp_path, 1)
    assert same(segmented(tmp_path, 2), 2)


def notebook_9(**parameters):
    """Its cells run here."""
    (path,) = (ROOT / "notebooks").glob("09_*.ipynb")
    cells = ["".join(c["source"]) for c in json.loads(path.read_bytes())["cells"] if c["cell_type"] == "code"]
    cells.insert(1, "\n".join(f"{key} = {value!r}" for key, value in parameters.items()))
    namespace = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)


class Bright:
    """Instead of a trained run: what is above 400 HU."""

    preparation = SimpleNamespace(modality="CT", channel=None)

    def __call__(self, image, **options):
        location = Location((0.0, 0.0, 0.0), None, None, "")
        return SimpleNamespace(mask=sitk.Cast(image > 400, sitk.sitkUInt8), location=location, volume_ml=1.0)


@pytest.mark.slow
def test_notebook_9_keeps_the_results_of_all_patients_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", lambda folder: Bright())
    plt.switch_backend("Agg")
    names = ("1.2.840.0.nii.gz", "1.2.840.1.nii.gz", "P1/ct.nii.gz", "P2/ct.nii.gz")
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sitk.WriteImage(scan(number), str(tmp_path / name))
    output = tmp_path / "segmented"
    write_json(tmp_path / "UNet-seed0" / "run.json", {})

    def run(name):
        notebook_9(run=str(tmp_path / "UNet-seed0"), scan=str(tmp_path / name), output=str(output))

    for name in names[:3]:
        run(name)
    stems = ("1.2.840.0", "1.2.840.1", "ct")
    files = {f"{stem}_prostate{ending}" for stem in stems for ending in (".nii.gz", ".json", ".png", ".svg")}
    assert {path.name for path in output.iterdir()} == files
    for name in names:
        with pytest.raises(ValueError, match="is there already; choose another output folder"):
            run(name)
    for number, stem in enumerate(stems):
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(output / f"{stem}_prostate.nii.gz")))
        np.testing.assert_array_equal(mask, sitk.GetArrayFromImage(scan(number)) > 400)


def test_notebook_9_gives_a_dicom_series_its_contours_back(tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", lambda folder: Bright())
    plt.switch_backend("Agg")
    write_series(tmp_path / "P1", scan(1))
    parameters = {"configuration": "UNet", "seed": 3, "cohort": "phantoms-quick"}
    write_json(tmp_path / "UNet-seed3" / "run.json", {"data_fingerprint": "abc", "parameters": parameters})
    notebook_9(run=str(tmp_path / "UNet-seed3"), scan=str(tmp_path / "P1"), output=str(tmp_path / "segmented"))
    written = tmp_path / "segmented" / "P1_prostate_rtstruct.dcm"
    mask = sitk.GetArrayFromImage(read_rtstruct(written, tmp_path / "P1", "Prostate"))
    np.testing.assert_array_equal(mask, sitk.GetArrayFromImage(scan(1)) > 400)
    told = pydicom.dcmread(written).StructureSetDescription
    for words in ("no medical device", "UNet-seed3", "configuration UNet", "cohort phantoms-quick", "data abc"):
        assert words in told
