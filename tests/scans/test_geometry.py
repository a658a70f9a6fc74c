"""Voxels lie where the file says, or the file is refused: every voxel of these scans tells its own place."""

from __future__ import annotations

import gzip
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

from mupkg.scans.files import read_scan
from mupkg.scans.geometry import check_affines, series_geometry, series_image
from mupkg.scans.headers import Fault

N, ROWS, COLUMNS = 9, 14, 16
SPACING = (2.0, 2.5)  # mm between columns, between rows
SLOPE = 0.01  # of the stored values: as exact as they are
AT = np.array([-20.0, 30.0, -300.0])
UP = np.array([0.0, 0.0, 4.0])


def told(points: np.ndarray) -> np.ndarray:
    """The value of a voxel at these points (..., 3): different everywhere."""
    return (points - AT) @ [0.5, 0.9, 1.3]


# A DICOM series, slice by slice, to be spoiled


def series(n=N, *, step=UP, across=(1.0, 0.0, 0.0), down=(0.0, 1.0, 0.0), modality="CT") -> list[Dataset]:
    """A CT with one data set a slice; `step` leads from slice to slice, or is one place (n, 3) for each."""
    places = AT + (np.outer(np.arange(n), step) if np.ndim(step) == 1 else step)
    return [one_slice(k, place, np.array([across, down]), modality) for k, place in enumerate(places)]


def decimals(numbers) -> list[str]:
    """As DICOM has them: at most 16 characters each."""
    return [f"{number:.9g}" for number in numbers]


def one_slice(k: int, place: np.ndarray, directions: np.ndarray, modality: str) -> Dataset:
    j, i = np.indices((ROWS, COLUMNS))
    points = place + np.stack([i * SPACING[0], j * SPACING[1]], -1) @ directions
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = f"1.2.3.{k + 1}"
    header.SeriesInstanceUID, header.Modality = "1.2.3", modality
    header.ImagePositionPatient, header.ImageOrientationPatient = decimals(place), decimals(directions.ravel())
    header.PixelSpacing = decimals(SPACING[::-1])
    header.Rows, header.Columns, header.SamplesPerPixel = ROWS, COLUMNS, 1
    header.PhotometricInterpretation, header.PixelRepresentation = "MONOCHROME2", 1
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.RescaleSlope, header.RescaleIntercept = SLOPE, 0
    header.PixelData = np.round(told(points) / SLOPE).astype("<i2").tobytes()
    return header


def write(slices: list[Dataset], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for k, header in enumerate(slices):
        header.save_as(folder / f"{k:02d}.dcm", enforce_file_format=True)
    return folder


def enhanced(slices: list[Dataset]) -> list[Dataset]:
    """The same as one enhanced file."""
    groups = {
        "PlanePositionSequence": ["ImagePositionPatient"],
        "PlaneOrientationSequence": ["ImageOrientationPatient"],
        "PixelMeasuresSequence": ["PixelSpacing"],
        "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept"],
    }
    whole, frames = one_slice(0, AT, np.eye(3)[:2], "CT"), []
    for one in slices:
        frames.append(Dataset())
        for group, names in groups.items():
            item = Dataset()
            for name in names:
                setattr(item, name, getattr(one, name))
            setattr(frames[-1], group, [item])
    for name in (name for names in groups.values() for name in names):
        delattr(whole, name)
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.NumberOfFrames, whole.PerFrameFunctionalGroupsSequence = len(slices), frames
    whole.PixelData = b"".join(one.PixelData for one in slices)
    return [whole]


def assert_in_place(image: sitk.Image, least: float = 1.0) -> None:
    """Every voxel lies where its value says, but for those outside the scan; at least this share lies inside."""
    voxels = sitk.GetArrayFromImage(image).astype(float)
    k, j, i = np.indices(voxels.shape)
    axes = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    right = np.abs(voxels - told(np.stack([i, j, k], -1) @ axes.T + image.GetOrigin())) < 2 * SLOPE
    assert (right | (voxels == voxels.min())).all()
    assert right.mean() >= least
    np.testing.assert_allclose(axes.T @ axes, np.diag(np.square(image.GetSpacing())), atol=1e-6)


TURNED = {"across": (0.6, 0.8, 0.0), "down": (-0.48, 0.36, -0.8)}  # an oblique plane
ALONG = np.cross(*TURNED.values())


@pytest.mark.parametrize("packed", [list, enhanced])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("plane", [{}, {**TURNED, "step": 4 * ALONG}])
def test_a_series_lies_where_its_slices_say(plane, order, packed, tmp_path):
    image = read_scan(write(packed(series(**plane)[::order]), tmp_path / "series"))
    assert image.GetSize() == (COLUMNS, ROWS, N)
    assert image.GetSpacing() == pytest.approx((*SPACING, 4.0))
    assert not image.HasMetaDataKey("resampled")
    assert_in_place(image)


@pytest.mark.filterwarnings("ignore:.*resampled")
@pytest.mark.parametrize("packed", [list, enhanced])
@pytest.mark.parametrize("degrees", [-30, -15, 3, 20])
def test_a_tilted_series_is_resampled_to_right_angles(degrees, packed, tmp_path):
    angle = np.radians(degrees)
    tilted = series(down=(0.0, np.cos(angle), -np.sin(angle)))
    with pytest.warns(UserWarning, match=rf"series: its slices lean by {abs(degrees)}\.0 degrees.*resampled"):
        image = read_scan(write(packed(tilted), tmp_path / "series"))
    assert image.GetMetaData("resampled") == f"its slices lean by {abs(degrees)}.0 degrees (a tilted gantry)"
    assert image.GetSpacing() == pytest.approx((*SPACING, 4 * np.cos(angle)))
    assert_in_place(image, 0.5)


UNEVEN = {
    "drift": np.linspace(4, 4.6, N - 1),
    "two distances": np.repeat([2.5, 3.5], N // 2),
    "one wide gap": np.array([3, 3, 3, 4.4, 3, 3, 3, 3]),
}


@pytest.mark.parametrize("lean", [0.0, 0.2])
@pytest.mark.parametrize("how", UNEVEN)
def test_uneven_slices_are_resampled_to_even_ones(how, lean, tmp_path):
    step = np.outer(np.r_[0, np.cumsum(UNEVEN[how])], [0, lean, 1])
    with pytest.warns(
        UserWarning, match=rf"its slices are {UNEVEN[how].min():.2f} to {UNEVEN[how].max():.2f} mm apart"
    ):
        image = read_scan(write(series(step=step), tmp_path / "series"))
    assert image.GetSize()[2] * image.GetSpacing()[2] == pytest.approx(step[-1, 2], abs=image.GetSpacing()[2] + 1e-6)
    assert_in_place(image, 0.6)


def test_a_label_drawn_on_slices_goes_the_same_way_and_stays_a_label(tmp_path):
    uneven = np.outer(np.r_[0, np.cumsum(UNEVEN["drift"])], [0, 0.2, 1])
    geometry = series_geometry(write(series(step=uneven), tmp_path / "series"))
    label = np.zeros((N, ROWS, COLUMNS), np.uint8)
    label[2:7, 4:10, 3:12] = 1
    scan, drawn = series_image(geometry, np.zeros_like(label)), series_image(geometry, label, label=True)
    assert drawn.GetPixelID() == sitk.sitkUInt8
    for of in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(scan, of)() == getattr(drawn, of)()
    assert set(np.unique(sitk.GetArrayFromImage(drawn))) == {0, 1}
    _, j, i = (c.mean() for c in np.nonzero(label))  # slice 4, by symmetry
    expected = geometry.positions[4] + geometry.axes[:, :2] @ ([i, j] * np.array(SPACING))
    found = [c.mean() for c in np.nonzero(sitk.GetArrayFromImage(drawn))[::-1]]
    np.testing.assert_allclose(drawn.TransformContinuousIndexToPhysicalPoint(found), expected, atol=0.7)


def test_the_geometry_of_a_series_is_told_slice_by_slice(tmp_path):
    geometry = series_geometry(write(series(**TURNED, step=4 * ALONG)[::-1], tmp_path / "series"))
    assert [path.name for path in geometry.files] == [f"{k:02d}.dcm" for k in range(N)][::-1]
    assert geometry.uids == [f"1.2.3.{k + 1}" for k in range(N)]
    assert (geometry.spacing, geometry.size, set(geometry.frames)) == (SPACING, (COLUMNS, ROWS), {0})
    np.testing.assert_allclose(geometry.distances, 4.0 * np.arange(N))
    np.testing.assert_allclose(geometry.axes.T, [*TURNED.values(), ALONG])
    parts = enhanced(series()[:4]) + enhanced(series()[4:])
    geometry = series_geometry(write(parts, tmp_path / "enhanced"))
    assert geometry.frames == [0, 1, 2, 3, 0, 1, 2, 3, 4]


# What does not say where its slices lie, or says two things


def without(name: str, *at: int) -> Callable[[list[Dataset]], list[Dataset]]:
    def spoil(slices: list[Dataset]) -> list[Dataset]:
        for k in at or range(N):
            delattr(slices[k], name)
        return slices

    return spoil


def changed(name: str, value: object, *at: int) -> Callable[[list[Dataset]], list[Dataset]]:
    def spoil(slices: list[Dataset]) -> list[Dataset]:
        for k in at or range(N):
            setattr(slices[k], name, value)
        return slices

    return spoil


def moved(*by: float, at: tuple[int, ...]) -> Callable[[list[Dataset]], list[Dataset]]:
    def spoil(slices: list[Dataset]) -> list[Dataset]:
        for k in at:
            slices[k].ImagePositionPatient = decimals(np.array(slices[k].ImagePositionPatient, float) + by)
        return slices

    return spoil


def shorter(slices: list[Dataset]) -> list[Dataset]:
    slices[5].Rows -= 4
    slices[5].PixelData = slices[5].PixelData[: -4 * COLUMNS * 2]
    return slices


def second_acquisition(slices: list[Dataset]) -> list[Dataset]:
    return slices + moved(0, 0, 0.5, at=range(N))(changed("AcquisitionNumber", 2)(series()))


def radial(slices: list[Dataset]) -> list[Dataset]:
    """Planes through one axis, their corners at equal distances."""
    turns = np.radians(15 * np.arange(N))
    rays = np.c_[np.cos(turns), np.sin(turns), 0 * turns]
    return [one_slice(k, AT - 20 * ray, np.array([ray, [0, 0, -1]]), "CT") for k, ray in enumerate(rays)]


def localizers(slices: list[Dataset]) -> list[Dataset]:
    x, y, z = np.eye(3)
    return [one_slice(k, AT, np.array(plane), "CT") for k, plane in enumerate([(x, y), (y, -z), (x, -z)])]


SAGITTAL, SAME = [0, 1, 0, 0, 0, -1], "keep one copy or acquisition"
FIT, ALONE = "does not fit with the other slices by its", "the parallel slices of one scan alone"
ALL_FIELDS = "with all fields kept"
REFUSED = {
    "no position": (without("ImagePositionPatient"), "00.dcm: its ImagePositionPatient is missing", ALL_FIELDS),
    "one position alone": (without("ImagePositionPatient", *range(1, N)), "01.dcm: its ImagePosition", ALL_FIELDS),
    "an empty position": (changed("ImagePositionPatient", None, 3), "03.dcm: its ImagePosition", ALL_FIELDS),
    "half a position": (changed("ImagePositionPatient", [1, 2], 3), "03.dcm: cannot be read", "copy or export"),
    "no orientation": (without("ImageOrientationPatient", 2), "02.dcm: its ImageOrientationPatient", ALL_FIELDS),
    "no pixel spacing": (without("PixelSpacing"), "00.dcm: its PixelSpacing is missing", ALL_FIELDS),
    "pixel spacing 0": (changed("PixelSpacing", [0, 0]), "00.dcm: its rows and columns", ALL_FIELDS),
    "no right angle": (changed("ImageOrientationPatient", [1, 0, 0, 0.1, 0.995, 0]), "00.dcm: its rows", ALL_FIELDS),
    "no unit vectors": (changed("ImageOrientationPatient", [2, 0, 0, 0, 2, 0]), "00.dcm: its rows", ALL_FIELDS),
    "a sagittal slice": (changed("ImageOrientationPatient", SAGITTAL, 6), f"06.dcm {FIT} ImageOrientation", ALONE),
    "a mirrored slice": (changed("ImageOrientationPatient", [-1, 0, 0, 0, 1, 0], 6), f"06.dcm {FIT} Image", ALONE),
    "a wider slice": (changed("PixelSpacing", [2.6, 2.1], 4), f"04.dcm {FIT} PixelSpacing", ALONE),
    "half with other pixels": (changed("PixelSpacing", [1.6, 1.6], 5, 6, 7, 8), f"{FIT} PixelSpacing", ALONE),
    "a shorter slice": (shorter, f"05.dcm {FIT} Rows or Columns", ALONE),
    "shifted aside": (moved(3, 0, 0, at=(4,)), f"04.dcm {FIT} ImagePositionPatient", ALONE),
    "half shifted aside": (moved(0, 3, 0, at=(5, 6, 7, 8)), f"{FIT} ImagePositionPatient", ALONE),
    "radial planes": (radial, f"{FIT} ImageOrientationPatient", ALONE),
    "localizers": (localizers, f"{FIT} ImageOrientationPatient", ALONE),
    "slices side by side": (lambda _: series(step=(4.0, 0, 1.0)), "lie beside one another", "a stack of slices"),
    "a slice missing": (lambda s: s[:3] + s[4:], "02.dcm and 03.dcm some may be missing", "copy the series again"),
    "a slice twice": (lambda s: [*s, s[3]], "03.dcm and 09.dcm are only 0.00 mm apart", SAME),
    "all slices twice": (lambda s: s + s, "are only 0.00 mm apart", SAME),
    "two acquisitions": (second_acquisition, "00.dcm and 09.dcm are only 0.50 mm apart", SAME),
    "a CT without intercept": (without("RescaleIntercept"), "00.dcm: its RescaleIntercept is missing", ALL_FIELDS),
    "one without intercept": (without("RescaleIntercept", 7), "07.dcm: its RescaleIntercept is missing", ALL_FIELDS),
    "slope 0": (changed("RescaleSlope", 0), "00.dcm: its RescaleSlope is 0", "single-frame"),
    "a table of values": (
        changed("ModalityLUTSequence", [Dataset()], 1),
        "01.dcm: its RescaleSlope is 0",
        "single-frame",
    ),
    "a high bit above the stored ones": (
        changed("BitsStored", 12, 4),
        "04.dcm: its HighBit is 15",
        "with HighBit 11",
    ),
    "inverted": (
        changed("PhotometricInterpretation", "MONOCHROME1"),
        "00.dcm: is cut short, or is no MONOCH",
        "copy it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_series_that_is_no_volume_is_refused_by_slice_or_field(name, tmp_path):
    spoil, named, cure = REFUSED[name]
    folder = write(spoil(series()), tmp_path / "series")
    with pytest.raises(ValueError) as error:
        read_scan(folder)
    assert str(folder) in str(error.value) and named in str(error.value) and cure in str(error.value)
    assert "missing" not in str(error.value) or "twice" not in name  # copies are not taken for a gap


def frame_without(group: str) -> Callable[[Dataset], None]:
    return lambda whole: delattr(whole.PerFrameFunctionalGroupsSequence[4], group)


def other_rescale(whole: Dataset) -> None:
    whole.PerFrameFunctionalGroupsSequence[4].PixelValueTransformationSequence[0].RescaleSlope = 2


def one_place_for_all(whole: Dataset) -> None:
    """As a multi-frame secondary capture may have it."""
    del whole.PerFrameFunctionalGroupsSequence
    whole.ImagePositionPatient, whole.ImageOrientationPatient = AT.tolist(), [1, 0, 0, 0, 1, 0]
    whole.PixelSpacing, whole.SpacingBetweenSlices, whole.RescaleIntercept = list(SPACING), 4, 0


ENHANCED = {
    "no groups": (
        lambda whole: delattr(whole, "PerFrameFunctionalGroupsSequence"),
        "ImagePositionPatient is missing",
    ),
    "one place for all frames": (one_place_for_all, "its ImagePositionPatient is missing"),
    "a frame without position": (frame_without("PlanePositionSequence"), "its ImagePositionPatient is missing"),
    "a frame without spacing": (frame_without("PixelMeasuresSequence"), "its PixelSpacing is missing"),
    "a frame without rescale": (frame_without("PixelValueTransformationSequence"), "RescaleIntercept is missing"),
    "a frame of another rescale": (other_rescale, "its RescaleSlope is 0 or differs between its frames"),
}


@pytest.mark.parametrize("name", ENHANCED)
def test_an_enhanced_file_that_does_not_place_its_frames_is_refused(name, tmp_path):
    spoil, named = ENHANCED[name]
    (whole,) = enhanced(series())
    spoil(whole)
    with pytest.raises(ValueError, match=rf"00\.dcm: .*{named}.*; export (it|the series) again"):
        read_scan(write([whole], tmp_path / "series"))


def test_frames_of_two_time_points_are_told_from_a_volume(tmp_path):
    with pytest.raises(ValueError, match=r"frame 1 of 00\.dcm and frame 10 of 00\.dcm are only 0\.00 mm apart"):
        read_scan(write(enhanced(series() + series()), tmp_path / "series"))


def test_an_enhanced_file_can_be_given_itself(tmp_path):
    write(enhanced(series()), tmp_path / "series")
    assert_in_place(read_scan(tmp_path / "series" / "00.dcm"))


# What lies beside a scan, and other ways to write it


def test_what_may_lie_beside_a_scan_is_passed_over(tmp_path):
    folder = write(series(), tmp_path / "series")
    for modality in ("RTSTRUCT", "RTDOSE", "SEG", "SR"):
        other = series(1, modality=modality)[0]
        other.SeriesInstanceUID = "1.2.4"
        other.save_as(folder / f"{modality}.dcm", enforce_file_format=True)
    (folder / "readme.txt").write_text("hello " * 50)
    (folder / "._00.dcm").write_bytes(bytes(200))
    assert_in_place(read_scan(folder))


def test_a_bare_data_set_without_preamble_is_read(tmp_path):
    folder = write(series(), tmp_path / "series")
    for path in folder.iterdir():
        header = dcmread(path)
        header.file_meta, header.preamble = FileMetaDataset(), None
        dcmwrite(path, header, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
    assert_in_place(read_scan(folder))


def test_every_slice_has_its_own_rescale(tmp_path):
    slices = series(modality="MR")
    for k, header in enumerate(slices[::2]):
        header.RescaleSlope = SLOPE * (k + 2)
        header.PixelData = (np.frombuffer(header.PixelData, "<i2") / (k + 2)).round().astype("<i2").tobytes()
    voxels = sitk.GetArrayFromImage(read_scan(write(slices, tmp_path / "series")))
    truth = sitk.GetArrayFromImage(read_scan(write(series(), tmp_path / "plain")))
    np.testing.assert_allclose(voxels, truth, atol=4 * SLOPE)


def test_a_ct_without_slope_has_a_slope_of_1(tmp_path):
    slices = without("RescaleSlope")(changed("RescaleIntercept", -1024)(series()))
    stored = [np.frombuffer(one.PixelData, "<i2").reshape(ROWS, COLUMNS) for one in slices]
    voxels = sitk.GetArrayFromImage(read_scan(write(slices, tmp_path / "series")))
    np.testing.assert_array_equal(voxels, np.array(stored) - 1024.0)


@pytest.mark.parametrize("codec", ["JPEG", "JPEG2000"])
def test_compressed_slices_are_read(codec, tmp_path):
    folder = write(changed("RescaleSlope", 1)(series()), tmp_path / "series")
    truth = sitk.GetArrayFromImage(read_scan(folder))
    for path in folder.iterdir():
        writer, image = sitk.ImageFileWriter(), sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkInt16)
        for key in ("0008|0060", "0020|000e", "0020|0032", "0020|0037"):
            image.SetMetaData(key, sitk.ReadImage(str(path)).GetMetaData(key))
        writer.KeepOriginalImageUIDOn()
        writer.SetUseCompression(True)
        writer.SetCompressor(codec)
        writer.SetFileName(str(path))
        writer.Execute(image)
        assert dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(folder)), truth)


@pytest.mark.parametrize("bytes_left", [0, 100, 300, 500, -1])
def test_a_slice_that_is_cut_is_named(bytes_left, tmp_path):
    """The last slice: nothing else would tell that it is gone."""
    path = write(series(), tmp_path / "series") / f"{N - 1:02d}.dcm"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match=rf"{path.name}: .*(copy it|export the series) again"):
        read_scan(path.parent)


@pytest.mark.parametrize("uids", [["1.2.8", "1.2.9"], [f"1.2.{n}" for n in range(N)], ["1.2.8", ""], ["1.2.8"]])
def test_slices_of_several_frames_of_reference_are_told(uids, tmp_path):
    """They may lie anywhere to one another; most often they do not, and an anonymiser made the UIDs up."""
    slices = series()
    for k, header in enumerate(slices):
        header.FrameOfReferenceUID = uids[k % len(uids)]
    folder = write(slices, tmp_path / "series")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_in_place(read_scan(folder))
    frames = {*uids} - {""}
    told = [f"{folder}: its slices name {len(frames)} frames of reference ({min(frames)} and others)"]
    assert [str(warning.message).partition(";")[0] for warning in caught] == told * (len(frames) > 1)


# NIfTI


def ras(step=UP) -> np.ndarray:
    """The affine (3, 4) of the scan as NIfTI has it."""
    return np.array([[-1], [-1], [1]]) * np.c_[np.diag([*SPACING, 0])[:, :2], step, AT]


def nifti(path: Path, *, order="<", units=2, qfac=1.0, pixdim=(*SPACING, 4.0), **forms) -> Path:
    """A NIfTI of exactly these fields: sform (3, 4) with scode, qform (b, c, d, x, y, z) with qcode."""
    header = bytearray(352)
    fields = {
        "size": (0, "i", 348),
        "dim": (40, "8h", 3, COLUMNS, ROWS, N, 1, 1, 1, 1),
        "type": (70, "2h", 16, 32),
        "pixdim": (76, "8f", qfac, *pixdim, 1, 1, 1, 1),
        "offset": (108, "f", 352),
        "units": (123, "B", units),
        "codes": (252, "2h", forms.get("qcode", 0), forms.get("scode", 0)),
        "qform": (256, "6f", *forms.get("qform", [0] * 6)),
        "sform": (280, "12f", *np.ravel(forms.get("sform", [0] * 12))),
        "magic": (344, "4s", b"n+1\0"),
    }
    for at, kind, *values in fields.values():
        struct.pack_into(order + kind, header, at, *values)
    k, j, i = np.indices((N, ROWS, COLUMNS))
    voxels = told(AT + np.stack([i * SPACING[0], j * SPACING[1], k * 4.0], -1))
    path.write_bytes(bytes(header) + voxels.astype(order + "f4").tobytes())
    return path


QFORM = (0, 0, 1, *ras()[:, 3])  # half a turn about the patient's axis
BOTH = {"sform": ras(), "scode": 1, "qform": QFORM, "qcode": 1}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "fields",
    [
        BOTH,
        {**BOTH, "scode": 0, "sform": ras() * 7},
        {**BOTH, "qcode": 0, "qform": (1, 0, 0, 5, 6, 7)},
        {**BOTH, "qfac": 0.0},
        {**BOTH, "units": 0},
        {**BOTH, "units": 10},
        {**BOTH, "qform": (*QFORM[:3], *(ras()[:, 3] + [0.15, 0, 0]))},  # less than a tenth of a voxel
    ],
)
def test_a_nifti_lies_where_its_sform_or_qform_says(fields, order, tmp_path):
    assert_in_place(read_scan(nifti(tmp_path / "scan.nii", order=order, **fields)))


@pytest.mark.parametrize(("units", "factor"), [(1, 1e-3), (3, 1e3)])
def test_metres_and_microns_become_millimetres(units, factor, tmp_path):
    qform = (*QFORM[:3], *(ras()[:, 3] * factor))
    scaled = {**BOTH, "sform": ras() * factor, "qform": qform, "pixdim": np.array([*SPACING, 4.0]) * factor}
    assert_in_place(read_scan(nifti(tmp_path / "scan.nii", units=units, **scaled)))


MIRRORED, SHEARED, SINGULAR, ENDLESS = (ras() for _ in range(4))
MIRRORED[0] *= -1
SHEARED[1, 2] = 0.5
SINGULAR[1, :3] = 0
ENDLESS[0, 0] = np.inf
TURN = np.radians(12)
ROTATED = np.array([[np.cos(TURN), -np.sin(TURN), 0], [np.sin(TURN), np.cos(TURN), 0], [0, 0, 1]]) @ ras()
DIFFER, WRITE = r"its sform and its {} place a voxel [\d.na]+ voxels apart", "save it with the right affine"
NIFTI_REFUSED = {
    "qform elsewhere": ({**BOTH, "qform": (0, 0, 1, 0, 0, 0)}, DIFFER.format("qform"), WRITE),
    "qform a fifth of a voxel away": (
        {**BOTH, "qform": (*QFORM[:3], *(ras()[:, 3] + [0.4, 0, 0]))},
        DIFFER.format("qform"),
        WRITE,
    ),
    "sform turned by 12 degrees": ({**BOTH, "sform": ROTATED}, DIFFER.format("qform"), WRITE),
    "sform mirrored": ({**BOTH, "sform": MIRRORED}, DIFFER.format("qform"), WRITE),
    "qform upside down": ({**BOTH, "qfac": -1.0}, DIFFER.format("qform"), WRITE),
    "pixdim of 1 mm": ({**BOTH, "qcode": 0, "pixdim": (1, 1, 1)}, DIFFER.format("pixdim"), WRITE),
    "pixdim of 1 mm, qform too": ({**BOTH, "pixdim": (1, 1, 1)}, DIFFER.format("pixdim"), WRITE),
    "slices 4.1 mm apart": ({**BOTH, "qcode": 0, "pixdim": (*SPACING, 4.1)}, DIFFER.format("pixdim"), WRITE),
    "no handedness": ({**BOTH, "qfac": 5.0}, DIFFER.format("qform"), WRITE),
    "no handedness, no sform": ({**BOTH, "qfac": np.nan, "scode": 0}, "its axes are", "copy or export"),
    "no codes": ({**BOTH, "scode": 0, "qcode": 0}, "does not say where its voxels lie", WRITE),
    "unknown units": ({**BOTH, "units": 5}, r"does not say where its voxels lie \(.*unit 5", WRITE),
    "sheared": ({**BOTH, "sform": SHEARED}, "not at right angles", "nibabel.processing.resample_to_output"),
    "sheared, no qform": ({"sform": SHEARED, "scode": 1}, "not at right angles", "resample_to_output"),
    "singular": ({"sform": SINGULAR, "scode": 1}, "which no scan has", "copy or export it again"),
    "endless": ({**BOTH, "sform": ENDLESS}, "which no scan has", "copy or export it again"),
}


@pytest.mark.parametrize("name", NIFTI_REFUSED)
def test_a_nifti_that_says_two_things_or_none_is_refused(name, tmp_path):
    fields, named, cure = NIFTI_REFUSED[name]
    with pytest.raises(ValueError, match=rf"scan\.nii: .*{named}.*{cure}"):
        read_scan(nifti(tmp_path / "scan.nii", **fields))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("order", ["<", ">"])
def test_voxels_of_a_nifti_that_are_no_numbers_are_counted(order, pack, tmp_path):
    """Regression: ITK read them as 0, water."""
    content = bytearray(nifti(tmp_path / "whole.nii", order=order, **BOTH).read_bytes())
    for voxel, value in ((0, np.nan), (777, np.inf), (N * ROWS * COLUMNS - 1, -np.inf)):
        struct.pack_into(order + "f", content, 352 + 4 * voxel, value)
    path = tmp_path / ("scan.nii" if pack is bytes else "scan.nii.gz")
    path.write_bytes(pack(bytes(content)))
    with pytest.raises(ValueError, match=rf"{path.name}: 3 voxel\(s\) in it are NaN or infinite; export the scan"):
        read_scan(path)


# MHA and NRRD


def lines(path: Path, old: str, new: str) -> Path:
    """A scan in this format with one line of its header replaced."""
    image = read_scan(nifti(path.with_suffix(".nii"), **BOTH))
    sitk.WriteImage(image, str(path), useCompression=False)
    content = path.read_bytes()
    assert content.count(old.encode()) == 1
    path.write_bytes(content.replace(old.encode(), new.encode()))
    return path


NRRD_PLACE = "space directions: (2,0,0) (0,2.5,0) (0,0,4)"
RIGHT_LINES = [
    ("mha", "TransformMatrix", "TransformMatrix"),
    ("mha", "TransformMatrix", "Rotation"),
    ("mha", "Offset", "Position"),
    ("nrrd", "left-posterior-superior", "LPS"),
    ("nrrd", "kinds: domain", 'space units: "mm" "mm" "mm"\nkinds: domain'),
]


@pytest.mark.parametrize(("ending", "old", "new"), RIGHT_LINES)
def test_mha_and_nrrd_lie_where_they_say(ending, old, new, tmp_path):
    assert_in_place(read_scan(lines(tmp_path / f"scan.{ending}", old, new)))


@pytest.mark.parametrize(("space", "flips"), [("right-anterior-superior", (-1, -1, 1)), ("LAS", (1, -1, 1))])
def test_a_nrrd_in_another_space_lies_at_the_same_place(space, flips, tmp_path):
    path = lines(tmp_path / "scan.nrrd", "left-posterior-superior", space)
    x, y, z = (AT * flips).tolist()
    axes = [f"({a * flips[0]},{b * flips[1]},{c})" for a, b, c in np.diag([*SPACING, 4.0]).tolist()]
    content = path.read_bytes().replace(NRRD_PLACE.encode(), f"space directions: {' '.join(axes)}".encode())
    path.write_bytes(content.replace(b"space origin: (-20,30,-300)", f"space origin: ({x},{y},{z})".encode()))
    assert_in_place(read_scan(path))


@pytest.mark.parametrize(
    ("ending", "old", "new", "named"),
    [
        ("mha", "TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "", "no line `TransformMatrix`"),
        ("mha", "Offset = -20 30 -300\n", "", "no line `Offset`"),
        ("mha", "Offset", "Origin = 0 0 0\nOffset", "repeats another one"),
        ("mha", "NDims = 3\n", "NDims = 3\nDistanceUnits = cm\n", "DistanceUnits is cm, not mm"),
        ("mha", "TransformMatrix = 1 0 0 0 1 0", "TransformMatrix = 1 0 0 0.2 1 0", "not at right angles"),
        ("nrrd", "space: left-posterior-superior\n", "space dimension: 3\n", "no line `space`"),
        ("nrrd", "left-posterior-superior", "scanner-xyz", "its space is scanner-xyz"),
        ("nrrd", NRRD_PLACE, "spacings: 2 2.5 4", "no line `space directions`"),
        ("nrrd", NRRD_PLACE, NRRD_PLACE.replace("(2,0,0)", "none"), "not those of three axes"),
        ("nrrd", NRRD_PLACE, NRRD_PLACE.replace("(0,0,4)", "(0,1,4)"), "not at right angles"),
        ("nrrd", "space origin: (-20,30,-300)\n", "", "no line `space origin`"),
        ("nrrd", "kinds: domain", 'space units: "m" "m" "m"\nkinds: domain', "its units are m, not mm"),
    ],
)
def test_mha_and_nrrd_that_do_not_place_their_voxels_are_refused(ending, old, new, named, tmp_path):
    with pytest.raises(ValueError, match=rf"scan\.{ending}: .*{named}.*; "):
        read_scan(lines(tmp_path / f"scan.{ending}", old, new))


def test_a_format_without_a_place_is_refused(tmp_path):
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkUInt16), str(tmp_path / "scan.tif"))
    with pytest.raises(ValueError, match=r"scan\.tif: .*does not say where voxels lie; convert it to \.nii\.gz"):
        read_scan(tmp_path / "scan.tif")


# The rule itself


@pytest.mark.parametrize(("apart", "fine"), [(0.09, True), (0.11, False), (np.nan, False)])
@pytest.mark.parametrize("what", ["shift", "scale", "turn"])
def test_affines_agree_to_a_tenth_of_a_voxel_at_the_corners(what, apart, fine):
    size, first = (101, 51, 26), np.diag([2.0, 2.5, 4.0, 1.0])
    other = first.copy()
    if what == "shift":
        other[1, 3] = apart * 2.5
    elif what == "scale":
        other[2, 2] *= 1 + apart / 25
    else:
        other[0, 2] = apart * 2 / 25
    if fine:
        check_affines(size, {"first": first, "other": other})
    else:
        with pytest.raises(Fault, match="its first and its other place a voxel"):
            check_affines(size, {"first": first, "other": other})


def test_axes_are_at_right_angles_to_a_tenth_of_a_voxel():
    for shear, fine in ((0.035, True), (0.045, False)):
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[0, 1] = shear
        if fine:
            check_affines((10, 11, 10), {"first": affine})
        else:
            with pytest.raises(Fault, match="not at right angles"):
                check_affines((10, 11, 10), {"first": affine})
