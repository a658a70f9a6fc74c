"""Contours against closed forms, real structure sets against their masks, and bad ones told by ROI and slice."""

import gzip
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import ROOT, closed, write_series, write_structures
from pydicom.uid import MRImageStorage, RLELossless

from mupkg.data.build import sources_from_dicom_rt, write_cohort
from mupkg.data.phantom import make_phantom
from mupkg.data.preprocessing import Preparation
from mupkg.scans.cases import CohortError, grid_difference, name_faults
from mupkg.scans.dicom_rt import (
    NO_DEVICE,
    list_dicom,
    pseudonym,
    read_rtstruct,
    write_rtstruct,
)
from mupkg.scans.files import read_scan
from mupkg.stages import segment

# Ellipsoids in mm from the first voxel along rows, columns and the normal: (centre, radii), off the voxels' centres.
BODY = np.array([[49.17, 45.43, 31.3], [26.31, 22.14, 24.7]])
HOLE = np.array([[51.3, 44.2, 32.3], [8.23, 7.12, 11.3]])
ISLAND = np.array([[81.7, 60.9, 27.1], [4.31, 6.72, 9.9]])


def turned(x: float, y: float, z: float) -> np.ndarray:
    """A rotation about the three axes one after the other, in degrees."""
    turn = sitk.Euler3DTransform((0, 0, 0), *np.deg2rad([x, y, z]))
    return np.reshape(turn.GetMatrix(), (3, 3))


AXES = {"axial": np.eye(3), "reversed": np.diag([1.0, -1.0, -1.0]), "oblique": turned(12, -20, 35)}


def scan(axes=AXES["axial"], shape=(24, 110, 120), spacing=(0.9, 0.8, 2.5)) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16))
    image.SetSpacing(spacing)
    image.SetDirection(axes.ravel().tolist())
    image.SetOrigin((-37.3, 12.7, -401.13))
    return image


def outline(ellipsoid: np.ndarray, height: float) -> np.ndarray | None:
    """The ellipse in which a slice at this height cuts an ellipsoid, as a polygon of 240 points in the slice."""
    centre, radii = ellipsoid
    inside = 1 - ((height - centre[2]) / radii[2]) ** 2
    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    circle = np.c_[np.cos(angle), np.sin(angle)]
    return centre[:2] + np.sqrt(inside) * radii[:2] * circle if inside > 0 else None


def in_patient(image: sitk.Image, polygon: np.ndarray, height: float) -> np.ndarray:
    """A polygon in a slice, in mm from the first voxel, as points of the patient."""
    points = np.c_[polygon, np.full(len(polygon), height)]
    return np.array(image.GetOrigin()) + points @ np.reshape(image.GetDirection(), (3, 3)).T


def contours_of(image: sitk.Image, *solids: np.ndarray, keyhole: bool = False) -> list[np.ndarray]:
    """The outlines of solids on every slice; with `keyhole` a line leads from the first to the second, and back."""
    found = []
    for height in np.arange(image.GetSize()[2]) * image.GetSpacing()[2]:
        polygons = [polygon for solid in solids if (polygon := outline(solid, height)) is not None]
        if keyhole and len(polygons) == 2:
            outer, inner = polygons
            polygons = [np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])]
        found += [in_patient(image, polygon, height) for polygon in polygons]
    return found


def inside(image: sitk.Image, ellipsoid: np.ndarray) -> np.ndarray:
    """Which voxel centres lie in an ellipsoid, by its formula."""
    zyx = np.indices(image.GetSize()[::-1]).T[..., ::-1] * image.GetSpacing()
    return ((((zyx - ellipsoid[0]) / ellipsoid[1]) ** 2).sum(-1) < 1).T


def voxels(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def dice(a: sitk.Image, b: sitk.Image) -> float:
    a, b = voxels(a) != 0, voxels(b) != 0
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("shape", ["plain", "hole", "keyhole", "island", "hole and island"])
def test_contours_become_the_closed_form_they_were_drawn_from(tmp_path, axes, shape):
    image, solids, sign = scan(axes), [BODY], [1]
    for word, solid, counts in (("hole", HOLE, -1), ("island", ISLAND, 1)):
        if word in shape or (word == "hole" and shape == "keyhole"):
            solids, sign = [*solids, solid], [*sign, counts]
    write_series(tmp_path / "ct", image)
    contours = contours_of(image, *solids, keyhole=shape == "keyhole")
    write_structures(tmp_path / "rs.dcm", {"Prostate": closed(*contours)})
    mask = read_rtstruct(tmp_path / "rs.dcm", tmp_path / "ct", "Prostate")
    truth = sum(counts * inside(image, solid) for counts, solid in zip(sign, solids, strict=True)).astype(bool)
    found = voxels(mask).astype(bool)
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) >= 0.9999
    assert found.sum() == pytest.approx(truth.sum(), rel=1e-3)
    exact = sum(c * 4 / 3 * np.pi * solid[1].prod() for c, solid in zip(sign, solids, strict=True))
    assert found.sum() * np.prod(mask.GetSpacing()) == pytest.approx(exact, rel=1e-3)
    assert voxels(mask).dtype == np.uint8 and voxels(mask).max() == 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A series and a structure set with the body as its ROI, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("plain")
    image = scan(shape=(20, 110, 90), spacing=(1.1, 0.8, 3.0))
    write_series(folder / "ct", image)
    write_structures(folder / "rs.dcm", {"Prostate": closed(*contours_of(image, BODY))})
    return folder


@pytest.fixture
def body(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "body")
    return tmp_path / "body"


PLAIN = scan(shape=(20, 110, 90), spacing=(1.1, 0.8, 3.0))
DRAWN = contours_of(PLAIN, BODY)


def read(folder: Path, roi: str = "Prostate") -> sitk.Image:
    return read_rtstruct(folder / "rs.dcm", folder / "ct", roi)


def test_the_mask_lies_on_the_grid_of_the_scan(body):
    mask, image = read(body), read_scan(body / "ct")
    assert mask.GetSize() == image.GetSize()
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, name)(), getattr(image, name)(), atol=1e-9)
    label = sitk.GetImageFromArray(inside(PLAIN, BODY).astype(np.uint8))
    assert dice(mask, label) > 0.9995


@pytest.mark.parametrize("name", ["STS_001/CT", "STS_001/MR_T1", "STS_002/CT"])
def test_real_contours_are_the_sets_own_masks_and_survive_being_written(tmp_path, real_scan, name):
    series, structures = (real_scan(f"rt_sts/{name}/dicom/{path}") for path in ("image", "mask/RS.dcm"))
    roi = f"GTV_Mass_{name.split('/')[1]}"
    with pytest.warns(UserWarning, match="was drawn on a series that is not there"):
        mask = read_rtstruct(structures, series, roi)
    truth = sitk.ReadImage(real_scan(f"rt_sts/{name}/nifti/mask/mask.nii.gz"))
    assert np.count_nonzero(voxels(mask) != voxels(truth)) == 0
    write_rtstruct(mask, series, tmp_path / "rs.dcm")
    np.testing.assert_array_equal(voxels(read_rtstruct(tmp_path / "rs.dcm", series, "Prostate")), voxels(mask))


# Writing


def noise(image: sitk.Image, share: float = 0.5) -> sitk.Image:
    """A mask with every kind of neighbourhood, up to the edges."""
    mask = sitk.GetImageFromArray((np.random.default_rng(1).random(image.GetSize()[::-1]) < share).astype(np.uint8))
    mask.CopyInformation(image)
    return mask


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_any_mask_survives_being_written(tmp_path, axes):
    image = scan(axes, shape=(4, 9, 11))
    write_series(tmp_path / "ct", image)
    for share in (0.5, 0.02, 1.1):
        write_rtstruct(noise(read_scan(tmp_path / "ct"), share), tmp_path / "ct", tmp_path / "rs.dcm")
        np.testing.assert_array_equal(voxels(read(tmp_path)), voxels(noise(read_scan(tmp_path / "ct"), share)))


def test_written_contours_enclose_the_volume_of_the_mask(body):
    """By the shoelace formula, so that a reader's and a writer's errors cannot cancel out."""
    mask = read(body)
    write_rtstruct(mask, body / "ct", body / "out.dcm")
    volume = 0.0
    for contour in pydicom.dcmread(body / "out.dcm").ROIContourSequence[0].ContourSequence:
        x, y, _ = np.reshape(np.array(contour.ContourData, float), (-1, 3)).T
        volume += abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 * PLAIN.GetSpacing()[2]
    assert volume == pytest.approx(voxels(mask).sum() * np.prod(mask.GetSpacing()), rel=0.01)


def test_what_a_written_structure_set_says(body):
    about = {"name": "Prostata é", "description": "MetricUNet-HCP, phantoms"}
    write_rtstruct(read(body), body / "ct", body / "out.dcm", **about)
    written, slices = pydicom.dcmread(body / "out.dcm"), sorted(f"{ROOT}1.{z + 1}" for z in range(20))
    assert (written.ApprovalStatus, written.Modality, written.PatientID) == ("UNAPPROVED", "RTSTRUCT", "P1")
    assert str(written.PatientName) == "Doe^John" and written.StudyInstanceUID == f"{ROOT}2"
    assert written.StructureSetDescription == f"{NO_DEVICE} MetricUNet-HCP, phantoms"
    assert "no medical device" in NO_DEVICE
    (frame,) = written.ReferencedFrameOfReferenceSequence
    (series,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert frame.FrameOfReferenceUID == f"{ROOT}9" and series.SeriesInstanceUID == f"{ROOT}1"
    assert sorted(image.ReferencedSOPInstanceUID for image in series.ContourImageSequence) == slices
    (roi,), (drawn,) = written.StructureSetROISequence, written.ROIContourSequence
    assert (roi.ROIName, roi.ROIGenerationAlgorithm, list(drawn.ROIDisplayColor)) == (
        "Prostata é",
        "AUTOMATIC",
        [0, 255, 0],
    )
    for contour in drawn.ContourSequence:
        z = int(contour.ContourImageSequence[0].ReferencedSOPInstanceUID.rsplit(".", 1)[1]) - 1
        numbers = contour.get_item("ContourData").value.split(b"\\")
        assert max(map(len, numbers)) <= 16
        points = np.reshape(np.array(contour.ContourData, float), (-1, 3))
        np.testing.assert_allclose(points[:, 2], PLAIN.GetOrigin()[2] + 3.0 * z, atol=5e-4)
        assert contour.NumberOfContourPoints == len(points)


def dciodvfy(path: Path) -> str:
    """What Debian's checker of DICOM files says."""
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=True)
    return said.stderr + said.stdout


needs_dciodvfy = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy (Debian's dicom3tools) is not installed"
)


@needs_dciodvfy
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_dciodvfy_finds_no_error_in_a_written_structure_set(tmp_path, axes):
    image = scan(axes, shape=(4, 9, 11))
    write_series(tmp_path / "ct", image)
    write_rtstruct(noise(read_scan(tmp_path / "ct")), tmp_path / "ct", tmp_path / "rs.dcm", description="a model")
    said = dciodvfy(tmp_path / "rs.dcm")
    assert "RTStructureSet" in said and "Error" not in said


@needs_dciodvfy
@pytest.mark.parametrize("name", ["STS_001/CT", "STS_001/MR_T1"])
def test_dciodvfy_finds_no_error_though_the_real_series_has_some(tmp_path, real_scan, name):
    """Its study ID is longer than DICOM allows."""
    series = real_scan(f"rt_sts/{name}/dicom/image")
    write_rtstruct(noise(read_scan(series), 0.00001), series, tmp_path / "rs.dcm")
    assert "Error" not in dciodvfy(tmp_path / "rs.dcm")


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda mask: mask * 0, "the mask is empty"),
        (lambda mask: mask[:, :, 1:], "the mask is not on the grid"),
        (lambda mask: sitk.Flip(mask, (False, False, True), flipAboutOrigin=False), "the mask is not on the grid"),
    ],
)
def test_a_mask_that_is_not_the_series_is_not_written(body, spoil, fault):
    with pytest.raises(ValueError, match=fault):
        write_rtstruct(spoil(read(body)), body / "ct", body / "out" / "rs.dcm")
    assert not (body / "out").exists()


def test_a_series_must_be_the_only_one_and_have_a_frame_of_reference(body):
    mask = read(body)
    write_series(body / "two", PLAIN, frame="", series=f"{ROOT}5")
    with pytest.raises(ValueError, match=r"IM999\.dcm: has no FrameOfReferenceUID"):
        write_rtstruct(mask, body / "two", body / "out.dcm")
    shutil.copy(body / "ct" / "IM999.dcm", body / "two" / "other.dcm")
    with pytest.raises(ValueError, match="two: holds 2 DICOM series"):
        write_rtstruct(mask, body / "two", body / "out.dcm")
    assert not (body / "out.dcm").exists()


def test_nothing_half_written_takes_the_place_of_a_structure_set(body, monkeypatch):
    def full_disk(dataset, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    mask, before = read(body), (body / "rs.dcm").read_bytes()
    monkeypatch.setattr(pydicom.Dataset, "save_as", full_disk)
    with pytest.raises(OSError, match=r"rs\.dcm: cannot be written"):
        write_rtstruct(mask, body / "ct", body / "rs.dcm")
    assert (body / "rs.dcm").read_bytes() == before
    assert sorted(path.name for path in body.iterdir()) == ["ct", "rs.dcm"]


def test_slices_that_lean_or_are_uneven_take_their_contours_along(tmp_path):
    """A tilted gantry, whose slices step along z; and the 3.8 mm gap of a series with 3 mm slices."""
    tilt = np.deg2rad(15)
    leaning = scan(np.array([[1, 0, 0], [0, np.cos(tilt), 0], [0, -np.sin(tilt), 1]]), (20, 110, 90), (1.1, 0.8, 3.0))
    write_series(tmp_path / "leaning" / "ct", leaning)
    write_series(tmp_path / "uneven" / "ct", PLAIN)
    for z in range(10, 20):
        path = tmp_path / "uneven" / "ct" / f"IM{999 - z}.dcm"
        header = pydicom.dcmread(path)
        header.ImagePositionPatient[2] += 0.8
        header.save_as(path)
    moved = [contour + [0, 0, 0.8 * (contour[0, 2] > PLAIN.GetOrigin()[2] + 28)] for contour in DRAWN]
    for name, image, contours in (("leaning", leaning, contours_of(leaning, BODY)), ("uneven", PLAIN, moved)):
        folder = tmp_path / name
        write_structures(folder / "rs.dcm", {"Prostate": closed(*contours)})
        mask = read(folder)
        with pytest.warns(UserWarning, match="was resampled"):
            grid = read_scan(folder / "ct")
        assert mask.GetSize() == grid.GetSize()
        np.testing.assert_allclose(mask.GetOrigin(), grid.GetOrigin())
        label = sitk.GetImageFromArray(inside(image, BODY).astype(np.uint8))
        label.CopyInformation(image)
        assert dice(mask, sitk.Resample(label, mask, sitk.Transform(), sitk.sitkNearestNeighbor)) > 0.97
        write_rtstruct(mask, folder / "ct", folder / "rs.dcm")
        assert dice(read(folder), mask) > 0.98


# What is there, and what is wrong with it


def test_everything_in_a_folder_is_listed(tmp_path):
    """Two patients, folders nested anyhow, a structure set without its series, series without any, junk."""
    write_series(tmp_path / "a" / "b" / "ct", PLAIN)
    write_series(
        tmp_path / "mr", scan(shape=(3, 9, 9)), patient="P2", series=f"{ROOT}3", frame=f"{ROOT}8", modality="MR"
    )
    rois = {"Prostate": closed(*DRAWN), "Empty": [], "Marker": [("POINT", DRAWN[0][:1])]}
    write_structures(tmp_path / "a" / "b" / "ct" / "rs.dcm", rois)
    write_structures(tmp_path / "lost.dcm", {"Rectum": closed(*DRAWN)}, patient="P3", series="1.2.3", frame="1.2.4")
    (tmp_path / "a" / "notes.txt").write_text("no DICOM")
    table = list_dicom(tmp_path)
    assert list(table) == ["patient", "series", "modality", "slices", "roi", "contours", "path"]
    rs, lost = str(tmp_path / "a" / "b" / "ct" / "rs.dcm"), str(tmp_path / "lost.dcm")
    assert table.astype(object).where(table.notna(), None).to_numpy().tolist() == [
        ["P1", f"{ROOT}1", "CT", 20, "Empty", 0, rs],
        ["P1", f"{ROOT}1", "CT", 20, "Marker", 1, rs],
        ["P1", f"{ROOT}1", "CT", 20, "Prostate", len(DRAWN), rs],
        ["P2", f"{ROOT}3", "MR", 3, None, 0, str(tmp_path / "mr")],
        ["P3", "1.2.3", "", 0, "Rectum", 1 * len(DRAWN), lost],
    ]


def test_a_folder_without_dicom_gives_an_empty_table(tmp_path):
    assert list_dicom(tmp_path).empty
    with pytest.raises(ValueError, match="absent: there is no such folder"):
        list_dicom(tmp_path / "absent")


def test_real_structure_sets_go_to_the_series_of_their_kind(real_scan):
    """CT and MR of a patient share a frame of reference, and their structure sets name series that are not there."""
    table = list_dicom(real_scan("rt_sts")).set_index("roi")
    assert list(table.index) == ["GTV_Mass_MR_T1", "GTV_Mass_CT", "GTV_Mass_CT"]
    assert list(table["modality"]) == ["MR", "CT", "CT"] and list(table["contours"]) == [32, 32, 16]
    assert list(table["patient"]) == ["STS_001", "STS_001", "STS_002"] and list(table["slices"]) == [59, 59, 48]


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts the bytes that are read")
def test_of_large_files_little_is_read(body):
    """Two GB each: no DICOM, DICOM by its first bytes alone, the voxels of a scan, something wrapped in DICOM."""
    for name, group in (("voxels", 0x7FE0), ("wrapped", 0x0042)):
        element = pydicom.dcmread(body / "ct" / "IM998.dcm")
        element.SeriesInstanceUID = f"{ROOT}7"
        del element.PixelData
        element.save_as(body / f"{name}.dcm")
        with (body / f"{name}.dcm").open("ab") as file:
            file.write(group.to_bytes(2, "little") + b"\x10\0OB\0\0" + (2**31 - 2).to_bytes(4, "little"))
    starts = {"zeros": b"", "no DICOM": b"\0" * 128 + b"DICM", "tag": b"\x08\0\x05\0" + b"\xff" * 60}
    starts["group"] = b"\0" * 128 + b"DICM\x02\0\0\0UL\x04\0\0\0\0\0"
    for name, start in starts.items():
        (body / f"{name}.dcm").write_bytes(start)
    for path in body.glob("*.dcm"):
        if path.name != "rs.dcm":
            with path.open("ab") as file:
                file.truncate(2**31)
    before = bytes_read()
    with pytest.raises(CohortError, match=r"group\.dcm: is cut short or damaged"):
        list_dicom(body)
    (body / "group.dcm").unlink()
    table = list_dicom(body)
    assert bytes_read() - before < 2**22
    assert list(table["slices"]) == [20, 2]


def test_voxels_of_frames_and_files_without_their_first_part_are_listed(body):
    """As some archives leave them: without the preamble, or without all that is on the file itself."""
    for number, path in enumerate([*(body / "ct").iterdir(), body / "rs.dcm"]):
        whole = path.read_bytes()
        path.write_bytes(whole[132:] if number % 2 else whole[144 + int.from_bytes(whole[140:144], "little") :])
    assert list(list_dicom(body)["slices"]) == [20]
    assert voxels(read(body)).any()


def roi(*contours: tuple[str, np.ndarray], **options: str) -> Callable[[Path], object]:
    return lambda folder: write_structures(folder / "rs.dcm", {"Prostate": list(contours)}, **options)


def moved(x: float, y: float, z: float) -> list[tuple[str, np.ndarray]]:
    return closed(*(contour + [x, y, z] for contour in DRAWN))


def twice(folder: Path) -> None:
    write_structures(folder / "rs.dcm", [("Prostate", closed(*DRAWN)), ("Prostate", closed(*DRAWN[:3]))])


def cut(folder: Path) -> None:
    path = folder / "rs.dcm"
    path.write_bytes(path.read_bytes()[:-2000])


def a_slice_missing(folder: Path) -> None:
    (folder / "ct" / "IM989.dcm").unlink()


BAD = {
    "missing": (
        lambda folder: write_structures(folder / "rs.dcm", {"Bladder": closed(*DRAWN), "Rectum": []}),
        r"rs\.dcm: has no ROIs 'Prostate', but Bladder, Rectum; name another",
    ),
    "empty": (roi(), r"rs\.dcm: patient P1, ROI 'Prostate': has no contours; draw it"),
    "points": (
        roi(("POINT", DRAWN[0][:1]), ("POINT", DRAWN[2][:1])),
        r"patient P1, ROI 'Prostate': the contour at -392\.13, -386\.13 mm is a POINT, so it encloses nothing; draw",
    ),
    "smaller than a voxel": (
        roi(*closed(DRAWN[0][0] + 0.1 * np.eye(3)[[0, 0, 1]])),
        "encloses the centre of no voxel",
    ),
    "open": (
        roi(*closed(*DRAWN[1:]), ("OPEN_PLANAR", DRAWN[0])),
        r"patient P1, ROI 'Prostate': the contour at -392\.13 mm is OPEN_PLANAR, .*close it",
    ),
    "between slices": (
        roi(*moved(0, 0, 1.5)),
        r"ROI 'Prostate': the contour at -390\.63, .* mm lies on no slice; give",
    ),
    "above": (roi(*moved(0, 0, 90)), r"at -302\.13, .* mm lies on no slice; .*slices lie at -401\.13 to -344\.13 mm"),
    "aside": (roi(*moved(60, 0, 0)), r"mm leads out of its slice; give the series that it was drawn on, uncropped"),
    "in another plane": (roi(*closed(DRAWN[0][:, [0, 2, 1]])), "lies on no slice"),
    "half a point": (
        roi(("CLOSED_PLANAR", DRAWN[0].ravel()[:-1])),
        "has a contour without x, y and z of every point",
    ),
    "no number": (roi(("CLOSED_PLANAR", np.full((5, 3), np.nan))), "has a contour without x, y and z"),
    "a slice is missing": (a_slice_missing, "its slices are not evenly spaced: .* some may be missing"),
    "twice": (twice, r"rs\.dcm: has 2 ROIs 'Prostate', .*; name another, or mend it"),
    "another series": (
        roi(*closed(*DRAWN), series="1.2.4", frame="1.2.3"),
        rf"was drawn on series 1\.2\.4 of frame of reference 1\.2\.3, but here is {ROOT}1; choose the folder of that",
    ),
    "of MR": (roi(*closed(*DRAWN), series="1.2.4", kind=MRImageStorage), "was drawn on series 1.2.4"),
    "cut short": (cut, r"rs\.dcm: cannot be read as a structure set \(.*; copy or export it again"),
    "no structure set": (
        lambda folder: shutil.copy(folder / "ct" / "IM999.dcm", folder / "rs.dcm"),
        r"rs\.dcm: is not a DICOM structure set",
    ),
    "not there": (lambda folder: (folder / "rs.dcm").unlink(), r"rs\.dcm: there is no such file"),
}


@pytest.mark.parametrize(("spoil", "fault"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_told_by_file_patient_roi_and_slice(body, spoil, fault):
    spoil(body)
    with pytest.raises(ValueError, match=fault):
        read(body)


def test_a_structure_set_cut_anywhere_is_never_read_as_another(body):
    whole, mask = (body / "rs.dcm").read_bytes(), voxels(read(body))
    for length in np.linspace(0, len(whole) - 1, 30).astype(int):
        (body / "rs.dcm").write_bytes(whole[:length])
        try:
            assert np.array_equal(voxels(read(body)), mask)
        except ValueError as error:
            assert re.search(r"rs\.dcm: (is not a DICOM|is cut short|cannot be read as)", str(error))


def test_marks_beside_contours_are_passed_over(body):
    before = voxels(read(body))
    write_structures(body / "rs.dcm", {"Prostate": [("POINT", DRAWN[0][:1]), *closed(*DRAWN)]})
    np.testing.assert_array_equal(voxels(read(body)), before)


def test_names_are_found_whatever_their_case_where_only_one_is_meant(body):
    small, large = closed(*DRAWN[:3]), closed(*DRAWN)
    write_structures(body / "rs.dcm", {"PROSTATE ": small, "Bladder": large})
    assert voxels(read(body)).any(axis=(1, 2)).sum() == 3
    write_structures(body / "rs.dcm", {"PROSTATE": large, "Prostate": small, "prostate": large})
    assert voxels(read(body)).any(axis=(1, 2)).sum() == 3
    with pytest.raises(ValueError, match="has 3 ROIs 'pRostate'"):
        read(body, "pRostate")


# Cohorts


def uids_of(number: int) -> dict[str, str]:
    return {"series": f"{ROOT}1{number}", "frame": f"{ROOT}9{number}"}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Five phantoms as patients, CT and structure set in folders nested anyhow; and the phantoms."""
    folder, cases = tmp_path_factory.mktemp("phantoms"), {}
    for seed in range(5):
        case = make_phantom(seed, spacing_mm=(7.0, 6.0, 6.0))
        place, patient = folder / ("deep/er" if seed % 2 else "") / f"Doe {seed}", f"MRN/{seed}"
        write_series(place / "ct", case.image, patient=patient, **uids_of(seed))
        write_rtstruct(case.label, place / "ct", place / ("ct" if seed % 3 else "") / "rs.dcm")
        cases[patient] = case
    return folder, cases


@pytest.mark.slow
def test_five_phantom_patients_become_a_cohort(phantoms, tmp_path):
    folder, cases = phantoms
    assert list_dicom(folder)["patient"].tolist() == list(cases)
    sources = sources_from_dicom_rt(folder, ["Prostata", "prost*"])
    cohort = write_cohort(tmp_path / "cohort", sources, Preparation(spacing_mm=(6.0, 5.0, 5.0)), split_seed=0)
    assert cohort.table["patient"].tolist() == list(cases) and set(cohort.table["roi"]) == {"Prostate"}
    assert set(cohort.table["split"]) == {"train", "validation", "test"}
    for found, case in zip(cohort.cases(), cases.values(), strict=True):
        np.testing.assert_array_equal(voxels(found.image), voxels(case.image))
        np.testing.assert_array_equal(voxels(found.label), voxels(case.label))
        assert grid_difference(found.image, case.image) is None


@pytest.mark.slow
def test_a_run_trained_on_contours_gives_contours_back(phantoms, tmp_path, trained_on):
    """From structure sets to a structure set: prepared, trained for a dozen steps, segmented, written, read."""
    sources = sources_from_dicom_rt(phantoms[0])
    cohort = write_cohort(tmp_path / "cohort", sources, Preparation(spacing_mm=(6.0, 5.0, 5.0)), split_seed=0)
    run = trained_on(cohort, tmp_path / "study")
    series = phantoms[0] / "Doe 0" / "ct"
    mask = segment(read_scan(series), run)
    write_rtstruct(mask, series, tmp_path / "out.dcm", description=run.name)
    assert voxels(mask).any()
    np.testing.assert_array_equal(voxels(read_rtstruct(tmp_path / "out.dcm", series, "Prostate")), voxels(mask))


def test_nothing_of_a_header_enters_a_cohort_but_what_the_table_needs(phantoms, tmp_path):
    sources = sources_from_dicom_rt(phantoms[0], hash_patients=True)[:3]
    cohort = write_cohort(tmp_path / "cohort", sources, Preparation(spacing_mm=(6.0, 5.0, 5.0)), split_seed=0)
    assert all(re.fullmatch("[0-9a-f]{12}", patient) for patient in cohort.table["patient"])
    assert list(cohort.table["case_id"]) == list(cohort.table["patient"]) and "source" not in cohort.table
    listed = list_dicom(phantoms[0], hash_patients=True)
    assert list(listed) == ["patient", "modality", "slices", "roi", "contours"]
    assert {*cohort.table["patient"]} < {*listed["patient"]} == {*map(pseudonym, phantoms[1])}
    for path in (tmp_path / "cohort").rglob("*.*"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for secret in (b"Doe", b"MRN", b"19500102", b"20200102", ROOT.encode()):
            assert secret not in content, (path, secret)


def test_several_scans_of_a_patient_are_cases_of_one_patient(tmp_path):
    for number, (patient, date) in enumerate([("A", "20200103"), ("A", "20200102"), ("B", "20200101")]):
        uids = uids_of(number)
        write_series(tmp_path / f"{number}", PLAIN, patient=patient, **uids, StudyDate=date)
        write_structures(
            tmp_path / f"{number}.dcm", {"Prostate": closed(*DRAWN[: 5 + number])}, patient=patient, **uids
        )
    sources = sources_from_dicom_rt(tmp_path)
    a, b = pseudonym("A"), pseudonym("B")
    named = [(source.case_id, source.columns["patient"]) for source in sources]
    assert named == [(f"{a}-1", "A"), (f"{a}-2", "A"), (b, "B")]
    assert [voxels(s.read().label).any(axis=(1, 2)).sum() for s in sources] == [6, 5, 7]  # by date


def test_scans_of_another_modality_or_without_contours_are_left_out(body):
    write_series(body / "cbct", PLAIN, series=f"{ROOT}5", frame=f"{ROOT}6")
    write_series(body / "mr", PLAIN, series=f"{ROOT}7", modality="MR")
    write_structures(body / "mr.dcm", {"Prostate": closed(*DRAWN[:3])}, series="1.2.3", kind=MRImageStorage)
    (source,) = sources_from_dicom_rt(body)
    np.testing.assert_array_equal(voxels(source.read().label), voxels(read(body)))
    with pytest.warns(UserWarning, match="was drawn on a series that is not there"):
        (source,) = sources_from_dicom_rt(body, modality="MR")
    assert voxels(read_scan(body / "mr")).shape == voxels(read(body)).shape


def test_an_empty_roi_gives_way_to_one_with_contours_and_the_first_name_counts(body):
    rois = {"Prostate": [], "prostate_old": closed(*DRAWN[:3]), "CTV_prostate": closed(*DRAWN)}
    write_structures(body / "rs.dcm", rois)
    for names, slices in ((["Prostate", "prostate_*"], 3), (["CTV*", "prostate_*"], len(DRAWN)), ("prostate_OLD", 3)):
        (source,) = sources_from_dicom_rt(body, names)
        assert voxels(source.read().label).any(axis=(1, 2)).sum() == slices
    with pytest.raises(CohortError, match=r"patient P1: has 2 ROIs '\*prostate\*', but 'prostate_old' in rs.dcm and"):
        sources_from_dicom_rt(body, "*prostate*")


def test_all_that_is_wrong_with_a_folder_is_told_at_once(tmp_path):
    def patient(name: str, rois: dict | None, number: int, **options: str) -> None:
        uids = uids_of(number)
        write_series(tmp_path / name, PLAIN, patient=name, **uids)
        if rois is not None:
            write_structures(tmp_path / f"{name}.dcm", rois, patient=name, **uids | options)

    patient("fine", {"Prostate": closed(*DRAWN)}, 1)
    patient("bare", None, 2)
    patient("other", {"Bladder": closed(*DRAWN)}, 3)
    patient("lost", {"Prostate": closed(*DRAWN)}, 4, series="1.2.3", frame="1.2.4")
    patient("two", {"Prostate": closed(*DRAWN)}, 5)
    write_structures(tmp_path / "two2.dcm", {"Prostate": closed(*DRAWN)}, **uids_of(5))
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "two2.dcm").read_bytes()[:-3000])
    with pytest.raises(CohortError) as error:
        sources_from_dicom_rt(tmp_path)
    faults = "\n".join(error.value.faults)
    assert len(error.value.faults) == 6
    for fault in (
        "cut.dcm: cannot be read as a structure set",
        "bare: patient bare has no RTSTRUCT; add it",
        "other: patient other: has no ROIs 'Prostate', but Bladder",
        "lost.dcm: patient lost, ROI 'Prostate': was drawn on series 1.2.3",
        "lost: patient lost has no RTSTRUCT",
        f"patient two: has one structure set twice, {tmp_path}/two.dcm and {tmp_path}/two2.dcm; keep one of them",
    ):
        assert fault in faults


def test_contours_that_are_wrong_are_told_when_a_case_is_read(body):
    write_structures(body / "rs.dcm", {"Prostate": [*closed(*DRAWN), ("OPEN_PLANAR", DRAWN[2])]})
    (source,) = sources_from_dicom_rt(body)
    with pytest.raises(
        ValueError,
        match=r"case \w{12}, patient P1: .*rs\.dcm: patient P1, ROI 'Prostate': the contour at .* OPEN_PLANAR",
    ):
        source.read()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"PixelData": None}, "ct"),
        ({"PatientID": ""}, r"has no Patient ID \(0010,0020\)"),
        ({"Modality": "PT"}, "no CT series"),
    ],
    ids=["no voxels", "no patient", "no CT"],
)
def test_a_series_that_cannot_be_a_case_is_told(body, change, fault):
    for path in (body / "ct").iterdir():
        slice_ = pydicom.dcmread(path)
        for keyword, value in change.items():
            slice_.__delattr__(keyword) if value is None else slice_.__setattr__(keyword, value)
        slice_.save_as(path)
    with pytest.raises(ValueError, match=fault):
        sources_from_dicom_rt(body)[0].read()


def test_packed_voxels_are_read_or_the_file_is_named(body):
    """Run lengths are unpacked by GDCM; high-throughput JPEG 2000 is not."""
    (source,) = sources_from_dicom_rt(body)
    before = voxels(source.read().image)
    for path in (body / "ct").iterdir():
        slice_ = pydicom.dcmread(path)
        slice_.compress(RLELossless)
        slice_.save_as(path)
    np.testing.assert_array_equal(voxels(source.read().image), before)
    slice_.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"
    slice_.save_as(path)
    with pytest.raises(ValueError, match=rf"case \w+, patient P1: .*{path.name}: cannot be read as an image"):
        source.read()


def test_a_pseudonym_is_a_safe_name_of_one_patient_alone():
    """Whatever the ID holds; spellings that differ in zeros and signs alone are one patient's."""
    ids = ["a/b", "..", "007", "a_c", "ab", "Müller 1", "患者"]
    assert not list(name_faults(map(pseudonym, ids))) and len({*map(pseudonym, ids)}) == len(ids)
    assert {pseudonym(name) for name in ("P1", "p-01", " P 001 ", "Ｐ1")} == {pseudonym("P1")}
    assert pseudonym("P1") != pseudonym("P10") != pseudonym("P11")


@pytest.mark.slow
@pytest.mark.parametrize("hash_patients", [False, True])
def test_scans_of_a_patient_stay_on_one_side_of_the_split(tmp_path, hash_patients):
    """Two scans each of four patients, one of whom is spelt in two ways."""
    image = make_phantom(0, spacing_mm=(7.0, 6.0, 6.0))
    for number, patient in enumerate(["A", "A", "B", "B", "C", "C", "D", "d "]):
        uids, place = uids_of(number), tmp_path / "scans" / str(number)
        write_series(place, image.image + number, patient=patient, **uids)
        write_rtstruct(image.label, place, place / "rs.dcm")
    sources = sources_from_dicom_rt(tmp_path / "scans", hash_patients=hash_patients)
    assert len({source.case_id for source in sources}) == 8
    for seed in range(2):
        folder = tmp_path / f"cohort{seed}"
        table = write_cohort(folder, sources, Preparation(spacing_mm=(6.0, 5.0, 5.0)), split_seed=seed).table
        assert (table.groupby(table["case_id"].str[:12])["split"].nunique() == 1).all()
        assert set(table["split"]) == {"train", "validation", "test"}


def test_without_voxels_a_series_is_told_with_its_patient(body):
    (source,) = sources_from_dicom_rt(body)
    path = body / "ct" / "IM990.dcm"
    slice_ = pydicom.dcmread(path)
    del slice_.PixelData
    slice_.save_as(path)
    with pytest.raises(
        ValueError,
        match=r"case \w{12}, patient P1: .*IM990\.dcm: cannot be read as an image .* export the series again",
    ):
        source.read()
