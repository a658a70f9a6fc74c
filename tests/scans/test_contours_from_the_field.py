"""Contours as clinics have them: each is the organ that somebody drew, or is refused by patient, ROI and slice.

Truth is the closed form that the contours were drawn from. `test_dicom_rt.py` holds what needs no doubt.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import ROOT, closed, write_series, write_structures
from pydicom.uid import MRImageStorage

from mupkg.data.build import sources_from_dicom_rt, write_cohort
from mupkg.data.preprocessing import Preparation
from mupkg.scans.cases import CohortError
from mupkg.scans.dicom_rt import contourable, list_dicom, read_rtstruct, write_rtstruct

SHAPE, SPACING, ORIGIN = (16, 60, 70), (1.2, 0.9, 3.0), (-31.3, 12.7, -401.13)
Z = ORIGIN[2] + SPACING[2] * np.arange(SHAPE[0])
CENTRE, RADII = np.array([41.3, 26.2, 22.1]), np.array([19.7, 14.3, 17.2])  # mm from the first voxel


def scan(axes: np.ndarray | None = None) -> sitk.Image:
    """A CT in HU: fat, muscle, and air around."""
    z, y, x = np.indices(SHAPE)
    radius = np.hypot((x - 35) / 33, (y - 30) / 28)
    image = sitk.GetImageFromArray(np.select([radius < 0.8, radius < 1], [40 + z, -90], -1000).astype(np.int16))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection((np.eye(3) if axes is None else axes).ravel().tolist())
    return image


def placed(xy: np.ndarray, z: float, axes: np.ndarray | None = None) -> np.ndarray:
    """Points (n, 2), in voxels of slice z, as points of the patient (n, 3) in mm."""
    points = np.c_[xy, np.full(len(xy), z)] * SPACING
    return points @ (np.eye(3) if axes is None else axes).T + ORIGIN


def ring(z: float, scale: float = 1.0, n: int = 240, shift: tuple[float, float] = (0, 0)) -> np.ndarray | None:
    """Where slice z cuts the ellipsoid, scaled about its centre in the slice, and shifted in mm."""
    height = 1 - ((z * SPACING[2] - CENTRE[2]) / RADII[2]) ** 2
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    circle = np.c_[np.cos(angle), np.sin(angle)] * RADII[:2] * scale * max(height, 0) ** 0.5
    return placed((CENTRE[:2] + circle + shift) / SPACING[:2], z) if height > 0 else None


RINGS = {z: ring(z) for z in range(SHAPE[0]) if ring(z) is not None}
MIDDLE = sorted(RINGS)[len(RINGS) // 2]


def ellipsoid(scale: float = 1.0) -> np.ndarray:
    """Voxels whose centres lie in it; scaled in the slices."""
    away = (np.indices(SHAPE).T[..., ::-1] * SPACING - CENTRE) / RADII
    return ((away[..., :2] ** 2).sum(-1) < scale**2 * (1 - away[..., 2] ** 2)).T


def without(*slices: int) -> list:
    return closed(*(points for z, points in RINGS.items() if z not in slices))


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series") / "ct"
    write_series(folder, scan())
    return folder


@pytest.fixture
def read(series, tmp_path):
    """Writes these contours as the ROI Prostate, and reads it: its voxels (z, y, x), and what is noted of them."""

    def voxels(contours: list, *, folder: Path = series, fill_gaps: bool = False, **options) -> np.ndarray:
        write_structures(tmp_path / "rs.dcm", {"Prostate": contours}, **options)
        mask = read_rtstruct(tmp_path / "rs.dcm", folder, "Prostate", fill_gaps=fill_gaps)
        voxels.notes = mask.GetMetaData("notes") if mask.HasMetaDataKey("notes") else ""
        return sitk.GetArrayFromImage(mask) > 0

    return voxels


def same(label: np.ndarray, truth: np.ndarray, least: float = 0.9995) -> bool:
    return 2 * np.count_nonzero(label & truth) >= least * (label.sum() + truth.sum())


def test_the_plain_ellipsoid_is_read(read):
    assert same(read(closed(*RINGS.values())), ellipsoid()) and read.notes == ""


# Gaps


def test_a_slice_that_was_left_out_is_named(read):
    with pytest.raises(
        ValueError, match=rf"patient P1, ROI 'Prostate': the contour at {Z[MIDDLE]:.2f} mm is missing.*draw"
    ):
        read(without(MIDDLE))


def test_contours_of_thicker_slices_name_the_distance_of_these(read):
    with pytest.raises(
        ValueError, match=r"is missing.*give the series that it was drawn on, 6\.00 mm a slice, or set fill"
    ):
        read(without(*list(RINGS)[1::2]))


def test_organs_that_end_are_no_gaps(read):
    first, last = min(RINGS), max(RINGS)
    truth = ellipsoid()
    truth[[first, last]] = False
    assert same(read(without(first, last)), truth)


def cone(z: np.ndarray | float) -> np.ndarray | float:
    return 6.0 + 0.9 * z  # radius in mm


@pytest.mark.parametrize("left_out", [(7,), (3, 5, 7, 9), (4, 5, 6, 9)])
def test_gaps_are_filled_between_the_shapes_beside_them_if_asked(read, left_out):
    """A cone's slices are circles whose radii, and so whose signed distances, are linear in z: no guess is left."""
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.c_[np.cos(angle), np.sin(angle)]
    drawn = [z for z in range(2, 12) if z not in left_out]
    contours = closed(*(placed((CENTRE[:2] + cone(z) * circle) / SPACING[:2], z) for z in drawn))
    with pytest.warns(UserWarning, match=r"ROI 'Prostate': .* interpolated \(fill_gaps\)"):
        label = read(contours, fill_gaps=True)
    zyx = np.indices(SHAPE)
    away = np.hypot(zyx[2] * SPACING[0] - CENTRE[0], zyx[1] * SPACING[1] - CENTRE[1])
    inside = (zyx[0] >= 2) & (zyx[0] < 12)
    assert same(label, inside & (away < cone(zyx[0])), 0.99)
    assert not (label & (away > cone(zyx[0]) + 0.9)).any()  # by no more than a voxel
    assert not (inside & ~label & (away < cone(zyx[0]) - 0.9)).any()
    places = ", ".join(f"{Z[z]:.2f}" for z in left_out)
    assert read.notes == f"{len(left_out)} contour(s) interpolated (fill_gaps) at {places} mm"


def test_gaps_between_shapes_that_do_not_overlap_stay_refused(read):
    block = np.array([[5, 5], [15, 5], [15, 15], [5, 15]])
    contours = closed(placed(block, 4), placed(block + 40, 6))
    with pytest.raises(
        ValueError, match=rf"the contour at {Z[5]:.2f} mm is missing, and those beside it do not overlap"
    ):
        read(contours, fill_gaps=True)


def test_the_cohorts_table_says_what_was_filled(series, tmp_path):
    for number in range(3):
        uids = {"series": f"{ROOT}1{number}", "frame": f"{ROOT}9{number}"}
        write_series(tmp_path / "scans" / f"{number}", scan() + number, patient=f"P{number}", **uids)
        contours = without(*[MIDDLE] * (number == 1))
        write_structures(tmp_path / "scans" / f"{number}.dcm", {"Prostate": contours}, patient=f"P{number}", **uids)
    with pytest.raises(
        ValueError, match=r"patient P1: .*1\.dcm: patient P1, ROI 'Prostate': the contour at .* is missing"
    ):
        write_cohort(tmp_path / "none", sources_from_dicom_rt(tmp_path / "scans"), Preparation(), split_seed=0)
    sources = sources_from_dicom_rt(tmp_path / "scans", fill_gaps=True)
    with pytest.warns(UserWarning, match="interpolated"):
        table = write_cohort(tmp_path / "c", sources, Preparation(spacing_mm=(3.0, 2.0, 2.0)), split_seed=0).table
    notes = table.set_index("patient")["roi_notes"]
    assert notes["P1"] == f"1 contour(s) interpolated (fill_gaps) at {Z[MIDDLE]:.2f} mm"
    assert notes[["P0", "P2"]].isna().all()


# Outlines that meet

VERSIONS = {
    "again": ring(MIDDLE),
    "the other way round": ring(MIDDLE)[::-1],
    "from another point": np.roll(ring(MIDDLE), 71, axis=0),
    "with fewer points": ring(MIDDLE)[::2],
    "closed": np.r_[ring(MIDDLE), ring(MIDDLE)[:1]],
    "a tenth of a millimetre aside": ring(MIDDLE) + [0.05, 0.05, 0],
}


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
@pytest.mark.parametrize("times", [1, 2])
def test_an_outline_that_is_stored_again_counts_once(read, version, times):
    assert same(read(closed(*RINGS.values(), *[version] * times)), ellipsoid())


def test_a_hole_that_is_stored_again_counts_once(read):
    holes = [ring(z, 0.5) for z in RINGS]
    label = read(closed(*RINGS.values(), *holes, *(hole[::-1] for hole in holes)))
    assert same(label, ellipsoid() & ~ellipsoid(0.5))


CROSSING = {
    "crossing": ring(MIDDLE, shift=(8, 0)),
    "a version half a voxel smaller": ring(MIDDLE, 0.98),
    "a version cut on one side": np.minimum(ring(MIDDLE), [ORIGIN[0] + CENTRE[0] + 9, np.inf, np.inf]),
    "a hole that leads out": ring(MIDDLE, 0.4, shift=(15, 0)),
}


@pytest.mark.parametrize("other", CROSSING.values(), ids=CROSSING)
def test_outlines_that_cross_are_refused_by_slice(read, other):
    with pytest.raises(ValueError, match=rf"ROI 'Prostate': the contour at {Z[MIDDLE]:.2f} mm crosses another one"):
        read(closed(*RINGS.values(), other))


def test_an_outline_that_runs_round_twice_is_refused(read):
    contours = closed(*(np.tile(points, (1 + (z == MIDDLE), 1)) for z, points in RINGS.items()))
    with pytest.raises(ValueError, match=rf"the contour at {Z[MIDDLE]:.2f} mm runs round twice"):
        read(contours)


def test_outlines_made_to_be_combined_may_cross(read):
    """CLOSEDPLANAR_XOR, where the standard itself asks for the even-odd rule."""
    contours = [("CLOSEDPLANAR_XOR", ring(z, shift=(shift, 0))) for z in RINGS for shift in (0, 8)]
    away = (np.indices(SHAPE).T[..., ::-1] * SPACING - CENTRE - [8, 0, 0]) / RADII
    assert same(read(contours), ellipsoid() ^ ((away**2).sum(-1) < 1).T)


@pytest.mark.parametrize("aside", [0.14, 0.24])
def test_outlines_at_two_heights_of_one_slice_are_refused(read, aside):
    other = ring(MIDDLE, 0.5) + [0, 0, aside * SPACING[2]]
    with pytest.raises(ValueError, match=rf"at {Z[MIDDLE]:.2f}, {other[0, 2]:.2f} mm shares its slice"):
        read(closed(*RINGS.values(), other))


def test_islands_that_touch_are_whole(read):
    """Two blocks beside one another share an edge, which leads through no voxel's centre."""
    blocks = [
        np.array([[10, 10], [20.4, 10], [20.4, 30], [10, 30]]),
        np.array([[20.4, 10], [40, 10], [40, 30], [20.4, 30]]),
    ]
    label = read(closed(*(placed(block, z) for z in (4, 5) for block in blocks)))
    truth = np.zeros(SHAPE, bool)
    truth[4:6, 10:31, 10:41] = True
    np.testing.assert_array_equal(label, truth)


# Edges

TURN = np.reshape(sitk.Euler3DTransform((0, 0, 0), *np.deg2rad([12, -20, 35])).GetMatrix(), (3, 3))


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """Through the centres of a block's outermost voxels, as rt-utils traces it."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def traced() -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """Outlines through voxels' centres, and the planes of voxels that they were traced from."""
    outer, hole = box(10, 8, 40, 30), box(19, 14, 28, 22)
    outlines = {
        "block": [outer],
        "hole": [outer, hole],
        "keyhole": [np.r_[outer, outer[:1], [[19, 8]], hole, hole[:1], [[19, 8]]]],
        "slope": [np.array([[10, 10], [30, 20], [20, 40]])],
        "spur": [np.array([[10, 8], [40, 8], [40, 30], [10, 30], [10, 20], [5, 20], [10, 20]])],
        "voxel and line": [np.array([[10, 8]]), np.array([[20, 9], [25, 9]])],
    }
    y, x = np.indices(SHAPE[1:])
    block = (x >= 10) & (x <= 40) & (y >= 8) & (y <= 30)
    ring_ = block & ~((x > 19) & (x < 28) & (y > 14) & (y < 22))
    slope = (2 * (y - 10) >= x - 10) & (3 * (x - 10) >= y - 10) & (2 * (x - 30) + (y - 20) <= 0)
    line = (y == 9) & (x >= 20) & (x <= 25)
    planes = {"block": block, "hole": ring_, "keyhole": ring_, "slope": slope}
    planes |= {"spur": block | ((y == 20) & (x >= 5) & (x < 10)), "voxel and line": line | ((y == 8) & (x == 10))}
    return outlines, planes


@pytest.mark.parametrize("axes", [np.eye(3), np.diag([1.0, -1, -1]), TURN], ids=["axial", "reversed", "oblique"])
@pytest.mark.parametrize("shape", traced()[0])
def test_outlines_through_voxels_come_back_to_the_voxel_whichever_way_they_run(tmp_path, read, axes, shape):
    write_series(tmp_path / "ct", scan(axes))
    outlines, planes = traced()
    for turn in (1, -1):
        contours = closed(*(placed(xy[::turn], z, axes) for z in range(4, 8) for xy in outlines[shape]))
        label = read(contours, folder=tmp_path / "ct")
        for plane in label[4:8]:
            np.testing.assert_array_equal(plane, planes[shape])
        assert label.sum() == 4 * planes[shape].sum()


@pytest.mark.parametrize("decimals", [2, 3, 6])
def test_edges_are_found_as_closely_as_they_are_written(tmp_path, read, decimals):
    """Voxels of 0.9766 mm, whose centres have more decimals than contours."""
    image = scan()
    image.SetSpacing((0.9765625, 0.9765625, 3.0))
    write_series(tmp_path / "ct", image)
    corners = [[image.TransformIndexToPhysicalPoint((int(x), int(y), 5)) for x, y in box(10, 8, 40, 30)]]
    assert read(closed(*map(np.array, corners)), folder=tmp_path / "ct", decimals=decimals).sum() == 31 * 23


# Numbers and counts


def test_a_number_of_two_rois_is_refused_for_both_and_for_no_other(series, tmp_path):
    small, large = closed(*(ring(z, 0.5) for z in RINGS)), closed(*RINGS.values())
    rois = {"Rectum": small, "Bladder": large, "Prostate": small}
    write_structures(tmp_path / "rs.dcm", rois, numbers=[1, 3, 3])
    for name in ("Bladder", "Prostate"):
        with pytest.raises(ValueError, match=rf"patient P1, ROI '{name}': its number 3 is used twice"):
            read_rtstruct(tmp_path / "rs.dcm", series, name)
    label = sitk.GetArrayFromImage(read_rtstruct(tmp_path / "rs.dcm", series, "Rectum"))
    assert same(label > 0, ellipsoid(0.5))


def counted(number: int | None) -> list:
    return [("CLOSED_PLANAR", points, {"NumberOfContourPoints": number}) for points in RINGS.values()]


def test_points_that_were_lost_are_told_by_slice(read):
    contours = closed(*RINGS.values())
    contours[3] = ("CLOSED_PLANAR", contours[3][1][:100], {"NumberOfContourPoints": 240})
    with pytest.raises(
        ValueError, match=rf"the contour at {Z[sorted(RINGS)[3]]:.2f} mm has fewer points than it says"
    ):
        read(contours)
    thirds = [("CLOSED_PLANAR", points[:80], {"NumberOfContourPoints": 240}) for points in RINGS.values()]
    with pytest.raises(ValueError, match="has fewer points than it says"):
        read(thirds)


@pytest.mark.parametrize("number", [None, 720, 3], ids=["no number", "of numbers instead", "too few"])
def test_a_wrong_number_of_points_of_which_none_are_lost_is_noted(read, number):
    assert same(read(counted(number)), ellipsoid())
    assert read.notes == ("" if number is None else f"{len(RINGS)} contour(s) whose number of points is wrong")


def test_contours_are_moved_by_their_offset(read):
    offset = np.array([6.0, 0.0, 3.0])
    contours = [
        ("CLOSED_PLANAR", points - offset, {"ContourOffsetVector": offset.tolist(), "ContourSlabThickness": 3.0})
        for points in RINGS.values()
    ]
    assert same(read(contours), ellipsoid()) and "moved by their ContourOffsetVector" in read.notes


def test_contours_above_64_kb_are_read_and_a_wrapped_length_is_refused(series, tmp_path):
    write_structures(tmp_path / "rs.dcm", {"Prostate": closed(*(ring(z, n=4000) for z in RINGS))}, decimals=9)
    mask = read_rtstruct(tmp_path / "rs.dcm", series, "Prostate")
    assert same(sitk.GetArrayFromImage(mask) > 0, ellipsoid())
    raw, tag = bytearray((tmp_path / "rs.dcm").read_bytes()), b"\x06\x30\x50\x00"
    assert raw.count(tag + b"UN") > 3
    while (at := raw.find(tag + b"UN\0\0")) >= 0:
        length = int.from_bytes(raw[at + 8 : at + 12], "little")
        raw[at : at + 12] = tag + b"DS" + (length % 65536).to_bytes(2, "little")
    (tmp_path / "rs.dcm").write_bytes(raw)
    with pytest.raises(ValueError, match=r"rs\.dcm: "):
        read_rtstruct(tmp_path / "rs.dcm", series, "Prostate")


def test_decimal_commas_are_told_with_the_file_in_cohorts_too(series, tmp_path):
    shutil.copytree(series, tmp_path / "ct")
    path = write_structures(tmp_path / "rs.dcm", {"Prostate": closed(*RINGS.values())})
    path.write_bytes(re.sub(rb"(-?\d+)\.(\d{3})(?=\\)", rb"\1,\2", path.read_bytes()))
    fault = r"rs\.dcm: patient P1, ROI 'Prostate': has a contour of points that are no decimal numbers \(.*\d,\d\d\d"
    with pytest.raises(ValueError, match=fault):
        read_rtstruct(path, series, "Prostate")
    with pytest.raises(ValueError, match=rf"case \w+, patient P1: .*{fault}"):
        sources_from_dicom_rt(tmp_path)[0].read()


# Whose, and which


@pytest.fixture
def patient(series, tmp_path) -> Path:
    shutil.copytree(series, tmp_path / "P1" / "ct")
    return tmp_path / "P1"


def test_contours_of_another_patient_are_refused_whatever_their_frame(patient):
    write_structures(patient / "rs.dcm", {"Prostate": without()}, patient="P2", series=f"{ROOT}77")
    fault = rf"patient P2, ROI 'Prostate': was drawn on series {ROOT}77 .*, but here is {ROOT}1 of another patient"
    with pytest.raises(ValueError, match=fault):
        read_rtstruct(patient / "rs.dcm", patient / "ct", "Prostate")
    with pytest.raises(CohortError, match=fault):
        sources_from_dicom_rt(patient)


def test_contours_follow_the_uid_of_their_series_though_the_patients_id_was_changed(patient):
    write_structures(patient / "rs.dcm", {"Prostate": without()}, patient="anonymous")
    with pytest.warns(UserWarning, match="which has another patient ID"):
        (source,) = sources_from_dicom_rt(patient)
    assert same(sitk.GetArrayFromImage(source.read().label) > 0, ellipsoid())


def of_set(number: int, approval: str) -> dict[str, str]:
    return {
        "SOPInstanceUID": f"{ROOT}100{number}",
        **{"StructureSetDate": f"2020010{number}", "StructureSetLabel": f"v{number}", "ApprovalStatus": approval},
    }


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("Prostate", "Prostate", "Prostate"),
        ("Prostate", "PROSTATE", "Prostate"),
        ("Prostate", "prostate_1", ["Prostate", "prostate_*"]),  # the rejected one comes first by name
    ],
)
def test_two_structure_sets_that_fit_are_told_with_date_label_and_approval(patient, first, second, names):
    write_structures(patient / "a.dcm", {first: without(*list(RINGS)[6:])}, **of_set(1, "REJECTED"))
    write_structures(patient / "b.dcm", {second: without()}, **of_set(2, "APPROVED"))
    with pytest.raises(CohortError) as error:
        sources_from_dicom_rt(patient, names)
    assert f"'{first}' in a.dcm (date 20200101, label v1, approval REJECTED)" in str(error.value)
    assert f"'{second}' in b.dcm (date 20200102, label v2, approval APPROVED)" in str(error.value)


def test_names_in_order_choose_between_structure_sets_that_nobody_rejected(patient):
    write_structures(patient / "a.dcm", {"prostate_1": without(*list(RINGS)[6:])}, **of_set(1, "UNAPPROVED"))
    write_structures(patient / "b.dcm", {"Prostate": without()}, **of_set(2, "APPROVED"))
    (source,) = sources_from_dicom_rt(patient, ["Prostate", "prostate_*"])
    assert same(sitk.GetArrayFromImage(source.read().label) > 0, ellipsoid())


def test_a_rejected_structure_set_alone_is_taken_but_told(patient):
    write_structures(patient / "a.dcm", {"Prostate": without()}, **of_set(1, "REJECTED"))
    with pytest.warns(UserWarning, match="though its structure set is REJECTED"):
        assert len(sources_from_dicom_rt(patient)) == 1


def test_no_warning_names_a_patient_whose_id_is_hashed(patient):
    """Regression: listing told the hash, and reading the case the patient's own ID, into an executed notebook."""
    write_structures(patient / "a.dcm", {"Prostate": without()}, **of_set(1, "REJECTED"))
    with pytest.warns(UserWarning) as told:
        (source,) = sources_from_dicom_rt(patient, hash_patients=True)
        source.read()
    assert len(told) >= 2
    assert not [str(warning.message) for warning in told if "P1" in str(warning.message).replace(str(patient), "")]


def test_a_backup_copy_is_told_by_path(patient):
    write_structures(patient / "rs.dcm", {"Prostate": without()})
    shutil.copytree(patient, patient.parent / "backup" / "P1")
    paths = " and ".join(re.escape(str(place / "rs.dcm")) for place in (patient, patient.parent / "backup" / "P1"))
    with pytest.raises(CohortError, match=rf"patient P1: has one structure set twice, {paths}; keep one of them"):
        sources_from_dicom_rt(patient.parent)
    (patient.parent / "backup" / "P1" / "rs.dcm").unlink()
    with pytest.raises(ValueError, match=r"P1/ct/IM\d+\.dcm and .*backup/P1/ct/IM\d+\.dcm are only 0\.00 mm apart"):
        sources_from_dicom_rt(patient.parent)[0].read()


# Advice


def test_a_frame_of_reference_that_differs_is_what_is_told(patient):
    write_structures(patient / "rs.dcm", {"Prostate": without()}, frame=f"{ROOT}99")
    fault = (
        rf"was drawn on series {ROOT}1 in frame of reference {ROOT}99, which has 16 slices in {ROOT}9; export both"
    )
    with pytest.raises(ValueError, match=fault):
        read_rtstruct(patient / "rs.dcm", patient / "ct", "Prostate")


def test_slices_of_two_frames_of_reference_are_what_is_told(patient):
    for path in list((patient / "ct").iterdir())[:5]:
        slice_ = pydicom.dcmread(path)
        del slice_.FrameOfReferenceUID
        slice_.save_as(path)
    write_structures(patient / "rs.dcm", {"Prostate": without()})
    with pytest.raises(ValueError, match=rf"reference {ROOT}9, which has .*5 slices in none.*; export"):
        read_rtstruct(patient / "rs.dcm", patient / "ct", "Prostate")


EMPTY = {
    "no contours": ({"PTV": []}, {}),
    "no sequence of contours": ({"PTV": []}, {"ROIContourSequence": None}),
    "no ROIs": ({}, {"ROIContourSequence": None, "StructureSetROISequence": None}),
    "of nothing": ({}, {"ReferencedFrameOfReferenceSequence": None}),
}


@pytest.mark.parametrize(("rois", "tags"), EMPTY.values(), ids=EMPTY)
def test_an_empty_structure_set_is_listed_and_passed_over(patient, rois, tags):
    write_structures(patient / "rs.dcm", {"Prostate": without()})
    write_structures(patient / "template.dcm", rois, **tags | {"SOPInstanceUID": f"{ROOT}1005"})
    with pytest.warns(UserWarning, match=r"template\.dcm: has no contours, so it is passed over"):
        (source,) = sources_from_dicom_rt(patient)
    assert same(sitk.GetArrayFromImage(source.read().label) > 0, ellipsoid())
    listed = list_dicom(patient)
    assert {Path(path).name: contours for path, contours in zip(listed["path"], listed["contours"], strict=True)} == {
        "rs.dcm": len(RINGS),
        "template.dcm": 0,
    }
    (patient / "rs.dcm").unlink()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CohortError, match="patient P1 has no RTSTRUCT"),
    ):
        sources_from_dicom_rt(patient)


@pytest.mark.parametrize("kind", ["INTERPOLATED_PLANAR", None])
def test_contours_of_no_type_or_interpolated_by_their_system_are_closed(read, kind):
    contours = [(kind if z % 3 else "CLOSED_PLANAR", points) for z, points in RINGS.items()]
    assert same(read(contours), ellipsoid())
    n = sum(z % 3 > 0 for z in RINGS)
    assert read.notes == f"{n} contour(s) of no type or INTERPOLATED_PLANAR taken as closed"


@pytest.mark.parametrize("aside", [-0.24, -0.05, 0.05, 0.24])
def test_contours_beside_their_slices_are_moved_onto_them_and_noted(read, aside):
    contours = closed(*(points + [0, 0, aside * SPACING[2]] for points in RINGS.values()))
    assert same(read(contours), ellipsoid())
    assert read.notes == (f"{len(RINGS)} contour(s) moved onto their slices" if abs(aside) > 0.1 else "")


@pytest.mark.parametrize("aside", [-0.3, 0.26, 0.5])
def test_contours_farther_than_a_quarter_of_a_slice_are_refused(read, aside):
    with pytest.raises(ValueError, match="lies on no slice"):
        read(closed(*(points + [0, 0, aside * SPACING[2]] for points in RINGS.values())))


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("ctv [prostate]", "CTV [Prostate]"),
        ("CTV [a-z]", "CTV [A-Z]"),
        ("Prostate\u00a0 neu", "Prostate neu"),
        ("Prostate neu", "prostate \t NEU"),
        ("Pro\u0301state", "Pr\u00f3state"),
        ("Pr\u00d3state", "pro\u0301state"),
    ],
)
def test_names_are_compared_by_letters_not_by_how_they_are_stored(series, tmp_path, stored, asked):
    write_structures(tmp_path / "rs.dcm", {stored: without()}, SpecificCharacterSet="ISO_IR 192")
    assert same(sitk.GetArrayFromImage(read_rtstruct(tmp_path / "rs.dcm", series, asked)) > 0, ellipsoid())
    with pytest.raises(ValueError, match="has no ROIs"):
        read_rtstruct(tmp_path / "rs.dcm", series, "CTV a")


def test_a_structure_set_of_the_mr_is_named_where_the_ct_has_none(patient):
    write_series(patient / "mr", scan(), series=f"{ROOT}7", frame=f"{ROOT}8", modality="MR")
    write_structures(
        patient / "rs.dcm", {"Prostate": without()}, series=f"{ROOT}7", frame=f"{ROOT}8", kind=MRImageStorage
    )
    fault = rf"patient P1 has no RTSTRUCT, but one was drawn on MR series {ROOT}7; add it"
    with pytest.raises(CohortError, match=fault):
        sources_from_dicom_rt(patient)
    assert len(sources_from_dicom_rt(patient, modality="MR")) == 1


# Writing


def spoilt(folder: Path, **tags: object) -> None:
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        for keyword, value in tags.items():
            delattr(slice_, keyword) if value is None else setattr(slice_, keyword, value)
        slice_.save_as(path)


@pytest.mark.parametrize(
    ("tags", "fault"),
    [
        ({"StudyInstanceUID": None}, "has no StudyInstanceUID, which"),
        ({"FrameOfReferenceUID": None}, "has no FrameOfReferenceUID, which"),
        ({"StudyInstanceUID": "", "FrameOfReferenceUID": ""}, "has no StudyInstanceUID and no FrameOfReferenceUID"),
        ({"SOPInstanceUID": f"{ROOT}1.1"}, "has no SOPInstanceUID of each slice"),
        ({"SOPInstanceUID": None}, "has no SOPInstanceUID of each slice"),
    ],
)
def test_a_series_that_contours_cannot_refer_to_is_refused_before_a_mask_is_made(patient, tags, fault):
    assert len(contourable(patient / "ct").files) == SHAPE[0]
    write_structures(patient / "rs.dcm", {"Prostate": without()})
    mask = read_rtstruct(patient / "rs.dcm", patient / "ct", "Prostate")
    spoilt(patient / "ct", **tags)
    with pytest.raises(
        ValueError, match=rf"IM\d+\.dcm: {fault}.*export the series again with all fields, or write it as"
    ):
        contourable(patient / "ct")
    with pytest.raises(ValueError, match=fault):
        write_rtstruct(mask, patient / "ct", patient / "out.dcm")
    assert not (patient / "out.dcm").exists()


def test_names_keep_64_characters_in_each_of_their_groups(patient):
    groups = ["Y" * 70, "\u5c71" * 64, "z^" * 20]
    spoilt(patient / "ct", SpecificCharacterSet="ISO_IR 192", PatientName="=".join(groups))
    write_structures(patient / "rs.dcm", {"Prostate": without()})
    mask = read_rtstruct(patient / "rs.dcm", patient / "ct", "Prostate")
    write_rtstruct(mask, patient / "ct", patient / "out.dcm")
    assert str(pydicom.dcmread(patient / "out.dcm").PatientName) == "=".join([groups[0][:64], *groups[1:]])
