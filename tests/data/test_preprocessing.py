"""Scans of any orientation are prepared alike and come back to their own grid; nothing of the prostate is lost."""

import ast
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from mupkg.data.preprocessing import (
    Preparation,
    array_spacing,
    body_crop,
    body_mask,
    centroid,
    crop_region,
    largest_component,
    prepare,
    resample,
    rescale,
    to_scan_grid,
)
from mupkg.scans.cases import Case

ROOT = Path(__file__).parents[2]
SPACING = (4.0, 2.5, 3.0)  # z, y, x: all different
SHAPE = (26, 60, 70)
OBLIQUE = Rotation.from_euler("xyz", (12, -8, 17), degrees=True).as_matrix()
# how the voxels lie in the file: the order of its axes (x, y, z), which of them run backwards, and the direction
ORIENTATIONS = {
    "as it is": ((0, 1, 2), (), np.eye(3)),
    "flipped": ((0, 1, 2), (0, 2), np.eye(3)),
    "permuted": ((2, 0, 1), (), np.eye(3)),
    "oblique": ((0, 1, 2), (), OBLIQUE),
    "all of it": ((1, 2, 0), (0, 1), OBLIQUE),
}
each_orientation = pytest.mark.parametrize("orientation", ORIENTATIONS)


def ellipsoid(shape, spacing, centre, radii):
    grid = np.meshgrid(*(s * np.arange(n) for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1


def image_of(voxels, spacing=SPACING) -> sitk.Image:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((-81.3, 47.1, -605.7))
    return image


def flipped(image: sitk.Image, axes) -> sitk.Image:
    """The same volume in space with some axes stored backwards."""
    size, direction = np.array(image.GetSize()), np.array(image.GetDirection()).reshape(3, 3)
    first = [int(size[axis] - 1) if axis in axes else 0 for axis in range(3)]
    origin = image.TransformIndexToPhysicalPoint(first)
    direction[:, list(axes)] *= -1
    turned = sitk.GetImageFromArray(np.flip(sitk.GetArrayFromImage(image), [2 - axis for axis in axes]).copy())
    turned.SetSpacing(image.GetSpacing())
    turned.SetOrigin(origin)
    turned.SetDirection(direction.ravel().tolist())
    return turned


def case_of(orientation="as it is", modality="CT", dtype=np.int16) -> Case:
    """A lopsided body with a lopsided prostate, stored one way or another."""
    body = ellipsoid(SHAPE, SPACING, (52, 70, 110), (200, 60, 85))
    prostate = ellipsoid(SHAPE, SPACING, (36, 82, 92), (15, 12, 19))
    prostate |= ellipsoid(SHAPE, SPACING, (48, 74, 104), (12, 14, 11))
    air, inside = (-1000, 20) if modality == "CT" else (3, 150)
    rng = np.random.default_rng(0)
    voxels = np.where(body, inside, air) + np.where(prostate, 60, 0) + np.where(body, rng.normal(0, 5, SHAPE), 0)
    order, axes, direction = ORIENTATIONS[orientation]
    volumes = []
    for image in (image_of(np.round(voxels).astype(dtype)), image_of(prostate.astype(np.uint8))):
        image.SetDirection(direction.ravel().tolist())
        volumes.append(flipped(sitk.PermuteAxes(image, order), axes))
    return Case("toy", *volumes, modality=modality)


def array(image):
    return sitk.GetArrayFromImage(image)


def dsc(a, b):
    return 2 * np.logical_and(array(a), array(b)).sum() / (array(a).sum() + array(b).sum())


def same_grid(a, b):
    return all(getattr(a, f"Get{p}")() == getattr(b, f"Get{p}")() for p in ("Size", "Spacing", "Origin", "Direction"))


def first_face(image):
    return np.array(image.TransformContinuousIndexToPhysicalPoint([-0.5] * 3))


def last_face(image):
    return np.array(image.TransformContinuousIndexToPhysicalPoint([n - 0.5 for n in image.GetSize()]))


# There and back again


@each_orientation
@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize(("spacing", "least"), [(SPACING, 1.0), ((3.0, 2.0, 2.0), 0.9), ((2.0, 1.0, 1.0), 0.96)])
def test_a_label_comes_back_to_its_own_grid(orientation, modality, spacing, least):
    case = case_of(orientation, modality)
    prepared = prepare(case, Preparation(modality=modality, spacing_mm=spacing))
    np.testing.assert_allclose(centroid(prepared.label), centroid(case.label), atol=0.35 * max(spacing))
    region = crop_region(prepared.label, centroid(case.label), (70, 80, 90))
    back = to_scan_grid(sitk.Cast(region, sitk.sitkFloat32), case.image)
    assert same_grid(back, case.image) and back.GetPixelID() == sitk.sitkUInt8
    assert dsc(back, case.label) >= least
    np.testing.assert_allclose(centroid(back), centroid(case.label), atol=0.35 * max(spacing))


@each_orientation
def test_however_it_is_stored_a_patient_is_prepared_the_same(orientation):
    direction = ORIENTATIONS[orientation][2]
    plain, stored = case_of("oblique" if direction is OBLIQUE else "as it is"), case_of(orientation)
    settings = Preparation(spacing_mm=(3.0, 2.0, 2.0))
    for a, b in zip(prepare(plain, settings), prepare(stored, settings), strict=True):
        np.testing.assert_allclose(b.GetOrigin(), a.GetOrigin(), atol=1e-6)
        np.testing.assert_allclose(b.GetDirection(), a.GetDirection(), atol=1e-9)
        assert np.abs(array(a).astype(int) - array(b)).max() <= 1  # a rounding at most


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.float32, np.float64])
def test_the_type_of_the_voxels_does_not_matter(dtype):
    reference = prepare(case_of(), Preparation(spacing_mm=SPACING))
    prepared = prepare(case_of(dtype=dtype), Preparation(spacing_mm=SPACING))
    np.testing.assert_array_equal(array(prepared.image), array(reference.image))
    assert prepared.image.GetPixelID() == sitk.sitkUInt8


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_an_mr_may_be_unsigned(dtype):
    reference = prepare(case_of(modality="MR"), Preparation(modality="MR"))
    prepared = prepare(case_of(modality="MR", dtype=dtype), Preparation(modality="MR"))
    np.testing.assert_allclose(array(prepared.image), array(reference.image), atol=1)


def test_a_phantom_prepared_on_its_own_grid_keeps_every_voxel_of_its_prostate(cohort):
    for case in cohort.cases():
        prepared = prepare(case, Preparation(spacing_mm=array_spacing(case.image)))
        assert array(prepared.label).sum() == array(case.label).sum()
        assert np.prod(prepared.image.GetSize()) < 0.8 * np.prod(case.image.GetSize())
        back = to_scan_grid(sitk.Cast(prepared.label, sitk.sitkFloat32), case.image)
        np.testing.assert_array_equal(array(back), array(case.label))


# Grids


@pytest.mark.parametrize("spacing", [(2.0, 5.0, 1.5), (4.0, 2.5, 3.0), (52.0, 150.0, 105.0)])
def test_resampling_keeps_the_extent_where_voxels_divide_it(spacing):
    image = case_of("all of it").image
    image = sitk.PermuteAxes(image, (2, 0, 1))
    assert image.GetSpacing() == SPACING[::-1]
    other = resample(image, spacing)
    np.testing.assert_allclose(other.GetSpacing(), spacing[::-1])
    np.testing.assert_allclose(first_face(other), first_face(image), atol=1e-9)
    np.testing.assert_allclose(last_face(other), last_face(image), atol=1e-9)
    assert other.GetPixelID() == image.GetPixelID()


@pytest.mark.parametrize("spacing", [(7.0, 7.0, 7.0), (1.7, 2.1, 9.0), (60.0, 80.0, 2.9)])
def test_resampling_keeps_the_extent_to_half_a_voxel_else(spacing):
    image = case_of().image
    other = resample(image, spacing)
    np.testing.assert_allclose(first_face(other), first_face(image), atol=1e-9)
    off = np.abs(last_face(other) - last_face(image))
    assert (off <= 0.5 * np.array(spacing[::-1]) + 1e-9).all()


def test_resampling_a_ramp_gives_the_ramp():
    z, _, x = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    ramp = image_of((10.0 * z + x).astype(np.float64))
    finer = array(resample(ramp, (2.0, 2.5, 1.5)))
    np.testing.assert_allclose(finer[:, 5, 7], 10 * np.clip((np.arange(52) + 0.5) / 2 - 0.5, 0, 25) + 3.25, atol=1e-6)


def test_resampling_a_label_makes_no_new_values():
    label = resample(
        image_of(np.random.default_rng(0).choice([0, 3], SHAPE).astype(np.uint8)), (1.9,) * 3, label=True
    )
    assert set(np.unique(array(label))) == {0, 3}


# Regions


def test_a_region_holds_the_prepared_voxels_themselves():
    voxels = np.random.default_rng(0).integers(1, 255, SHAPE).astype(np.uint8)
    for direction in (np.eye(3), OBLIQUE):
        image = image_of(voxels)
        image.SetDirection(direction.ravel().tolist())
        centre = image.TransformContinuousIndexToPhysicalPoint((33.2, 25.9, 12.6))
        region = crop_region(image, centre, (40.0, 50.0, 60.0))  # 10 x 20 x 20 voxels
        np.testing.assert_array_equal(array(region), voxels[8:18, 16:36, 24:44])
        assert region.GetSpacing() == image.GetSpacing() and region.GetDirection() == image.GetDirection()
        np.testing.assert_allclose(region.GetOrigin(), image.TransformIndexToPhysicalPoint((24, 16, 8)), atol=1e-9)


def test_outside_the_scan_a_region_is_air():
    image = image_of(np.full(SHAPE, 7, np.uint8))
    corner = array(crop_region(image, image.GetOrigin(), (40.0, 50.0, 60.0)))
    assert corner.shape == (10, 20, 20)
    expected = np.zeros((10, 20, 20), np.uint8)
    expected[-6:, -11:, -11:] = 7
    counts = [np.count_nonzero(corner.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    assert set(np.unique(corner)) == {0, 7} and all(
        abs(n - half) <= 1 for n, half in zip(counts, (5, 10, 10), strict=True)
    )
    far = crop_region(image, (5000.0, 0.0, 0.0), (40.0, 50.0, 60.0))
    assert not array(far).any()


def test_a_region_is_centred_to_half_a_voxel():
    image, rng = image_of(np.zeros(SHAPE, np.uint8)), np.random.default_rng(1)
    for _ in range(20):
        centre = image.TransformContinuousIndexToPhysicalPoint(rng.uniform(0, 25, 3).tolist())
        region = crop_region(image, centre, rng.uniform(20, 90, 3))
        middle = (first_face(region) + last_face(region)) / 2
        assert (np.abs(middle - centre) <= 0.5001 * np.array(image.GetSpacing())).all()


def test_a_region_needs_no_more_than_one_voxel():
    assert crop_region(image_of(np.ones(SHAPE, np.uint8)), (-81.3, 47.1, -605.7), (1, 1, 1)).GetSize() == (1, 1, 1)


def test_a_tie_of_the_probability_is_background():
    scan = case_of().image
    half = sitk.Image(scan.GetSize(), sitk.sitkFloat32) + 0.5
    half.CopyInformation(scan)
    assert not array(to_scan_grid(half, scan)).any()
    assert array(to_scan_grid(half + 1e-3, scan)).all()


# Body and intensities


def body_on_a_table():
    """A body of 90 mm by 65 mm half axes on a wide plate 8 mm thick, with a sheet above."""
    shape, spacing = (20, 60, 80), (4.0, 4.0, 4.0)
    body = ellipsoid(shape, spacing, (40, 110, 150), (400, 65, 90))
    voxels = np.where(body, 30, -1000)
    voxels[:, 43:45, 5:75] = 200  # y = 172 to 180 mm: it touches the body
    voxels[:, 5, 20:60] = 0
    return image_of(voxels.astype(np.int16), spacing), body


def test_table_and_sheet_are_cut_off_the_body():
    image, body = body_on_a_table()
    found = array(body_mask(image, "CT")).astype(bool)
    assert found.any(axis=(0, 2)).nonzero()[0].max() * 4 <= 184
    assert found.any(axis=(0, 1)).sum() * 4 <= 190  # the plate is 280 mm wide
    assert (found & body).sum() > 0.97 * body.sum()
    cropped = body_crop(image, body_mask(image, "CT"))
    assert cropped.GetSize()[0] * 4 <= 192 and cropped.GetSize()[1] * 4 <= 140
    assert cropped.GetSize()[2] == image.GetSize()[2]


def test_a_body_that_fills_the_scan_is_not_cropped():
    image = image_of(np.full(SHAPE, 40, np.int16))
    assert array(body_mask(image, "CT")).all()
    assert body_crop(image, body_mask(image, "CT")).GetSize() == image.GetSize()


def test_no_body_no_crop():
    image = image_of(np.full(SHAPE, -1000, np.int16))
    assert body_crop(image, body_mask(image, "CT")).GetSize() == image.GetSize()


def test_an_unsigned_scan_does_not_wrap_the_threshold_round():
    """SimpleITK casts the threshold to the image's type: -400 became 65136 and the body vanished."""
    image = image_of(np.full(SHAPE, 40, np.uint16))
    assert array(body_mask(image, "CT")).all()


def test_the_body_crop_of_a_finer_image_holds_the_whole_coarse_box():
    image, _ = body_on_a_table()
    finer = resample(image, (1.5, 1.5, 1.5))
    body = body_mask(finer, "CT")
    cropped, box = body_crop(finer, body), body_crop(body, body)
    assert all(array(box).any(axis=axes).all() for axes in ((1, 2), (0, 2), (0, 1)))  # no empty slice on its own grid
    assert (first_face(cropped) <= first_face(box) + 1e-6).all()
    assert (last_face(cropped) >= np.minimum(last_face(box), last_face(finer)) - 1e-6).all()


def test_the_outline_of_an_mr_holds_what_lies_beside_a_bright_coil():
    """On a linear scale Otsu's threshold fell between the coil's spot and the rest of the body."""
    case = case_of(modality="MR")
    voxels, label = array(case.image).astype(float), array(case.label).astype(bool)
    coil = ellipsoid(SHAPE, SPACING, (42, 108, 104), (60, 10, 14))
    voxels[coil] = 4000
    voxels *= 0.35 ** (np.arange(SHAPE[1]) < 20)[None, :, None]  # it also fades away from the coil
    image = image_of(voxels.astype(np.int16))
    outline = sitk.Resample(body_mask(image, "MR"), image, sitk.Transform(), sitk.sitkNearestNeighbor)
    assert array(outline).astype(bool)[label].all()
    assert array(outline).mean() < 0.8  # and is still no box
    linear = sitk.OtsuThreshold(image, 0, 1)
    assert array(linear).astype(bool)[label].mean() < 0.1
    prepared = prepare(Case("coil", image, case.label, modality="MR"), Preparation(modality="MR", spacing_mm=SPACING))
    assert array(prepared.label).sum() == label.sum()


def test_a_ct_window_is_fixed():
    image = image_of(np.tile(np.array([-1000, -160, -60, 40, 240, 3000], np.int16), (4, 5, 1)))
    body = image_of(np.ones((4, 5, 6), np.uint8))
    values = array(rescale(image, body, Preparation()))[0, 0]
    np.testing.assert_allclose(values, [0, 0, 63.75, 127.5, 255, 255], atol=0.5)
    values = array(rescale(image, body, Preparation(window_hu=(-1000, 3000))))[0, 0]
    np.testing.assert_allclose(values, [0, 53.55, 59.9, 66.3, 79.05, 255], atol=0.5)


def test_an_mr_is_scaled_by_the_percentiles_of_its_body():
    rng = np.random.default_rng(0)
    voxels, inside = np.full(SHAPE, 5000.0), np.zeros(SHAPE, np.uint8)
    inside[5:20, 10:50, 10:60] = 1
    voxels[inside == 1] = rng.permutation(np.linspace(200, 1200, inside.sum()))
    values = array(rescale(image_of(voxels), image_of(inside), Preparation(modality="MR")))
    expected = np.clip((voxels - 205) * 255 / 990, 0, 255)
    np.testing.assert_allclose(values, expected, atol=0.51)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("value", [-1000, 0, 300])
def test_a_constant_image_is_prepared_without_an_error(modality, value):
    prepared = prepare(
        Case("flat", image_of(np.full(SHAPE, value, np.int16)), modality=modality), Preparation(modality=modality)
    )
    assert len(np.unique(array(prepared.image))) == 1 and prepared.label is None


def test_the_largest_component_is_by_faces_and_empty_stays_empty():
    voxels = np.zeros((4, 5, 6), np.uint8)
    assert not array(largest_component(image_of(voxels))).any()
    voxels[0, 0, :3], voxels[1, 1, :2], voxels[3, 3:, 5] = 1, 1, 1
    found = array(largest_component(image_of(voxels)))
    assert found.sum() == 3 and found[0, 0, :3].all()


def test_centroids_are_physical_points():
    case = case_of("all of it")
    index = np.argwhere(array(case.label)).mean(axis=0)[::-1]
    np.testing.assert_allclose(
        centroid(case.label), case.label.TransformContinuousIndexToPhysicalPoint(index.tolist())
    )
    np.testing.assert_allclose(centroid(case.label), centroid(case_of("oblique").label), atol=1e-6)
    assert centroid(case.label * 0) is None


@pytest.mark.parametrize(
    "wrong", [{"spacing_mm": (1, 1, 0)}, {"window_hu": (240, -160)}, {"modality": "PET"}, {"x": 1}]
)
def test_a_wrong_preparation_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Preparation(**wrong)


def test_no_array_is_a_view_of_an_image_that_is_gone():
    """A view of a temporary SimpleITK image reads freed memory: coverage was once above 1."""
    calls = []
    for path in (ROOT / "mupkg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("GetArrayViewFromImage"):
                calls.append(f"{path.name}: {ast.unparse(node)}" if not isinstance(node.args[0], ast.Name) else "")
    assert not list(filter(None, calls))
