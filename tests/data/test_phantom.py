"""The phantom is a pelvis: repeatable, anatomically sane, and in its tissues like a real CT."""

from functools import cache

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from unusual import unusual_phantom

from mupkg.data.phantom import make_phantom
from mupkg.report.tissue import fat_and_muscle, tissue_statistics

COARSE = (6.0, 4.0, 4.0)
SEEDS = range(12)


@cache
def phantom(seed, spacing=COARSE):
    return make_phantom(seed, spacing_mm=spacing)


def arrays(case):
    return sitk.GetArrayFromImage(case.image), sitk.GetArrayFromImage(case.label).astype(bool)


def volume_ml(case):
    return arrays(case)[1].sum() * np.prod(case.label.GetSpacing()) / 1000


def centroid_mm(label):
    index = np.argwhere(sitk.GetArrayFromImage(label)).mean(axis=0)[::-1]
    return np.array(label.TransformContinuousIndexToPhysicalPoint(index.tolist()))


@pytest.mark.slow
def test_a_seed_is_a_phantom():
    again = make_phantom(3, spacing_mm=COARSE)
    for first, second in zip(arrays(phantom(3)), arrays(again), strict=True):
        np.testing.assert_array_equal(first, second)
    assert again.femoral_heads == phantom(3).femoral_heads
    assert len({arrays(phantom(seed))[0].tobytes() for seed in SEEDS}) == len(SEEDS)


def test_types_and_grid():
    case = phantom(0)
    assert case.modality == "CT"
    assert (case.image.GetPixelID(), case.label.GetPixelID()) == (sitk.sitkInt16, sitk.sitkUInt8)
    assert case.image.GetSpacing() == case.label.GetSpacing() == COARSE[::-1]
    assert case.image.GetOrigin() == case.label.GetOrigin()
    assert case.image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert 220 <= case.image.GetSize()[2] * COARSE[0] <= 300
    given = make_phantom(0, spacing_mm=(8, 6, 6), shape=(32, 50, 80))
    assert given.image.GetSize() == (80, 50, 32)


@pytest.mark.slow
def test_the_papers_grid_is_drawn_when_none_is_given():
    _, in_plane, slices = make_phantom(67).image.GetSpacing()  # a coarse draw: quick
    assert 0.93 <= in_plane <= 1.37
    assert 1.0 <= slices <= 3.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 8])
def test_anatomy_does_not_depend_on_spacing(seed):
    coarse, fine = phantom(seed), phantom(seed, (3.0, 2.5, 2.5))
    np.testing.assert_allclose(coarse.femoral_heads, fine.femoral_heads)
    assert volume_ml(coarse) == pytest.approx(volume_ml(fine), rel=0.04)
    np.testing.assert_allclose(centroid_mm(coarse.label), centroid_mm(fine.label), atol=0.8)


@pytest.mark.parametrize("seed", SEEDS)
def test_anatomy(seed):
    case = phantom(seed)
    hu, label = arrays(case)
    assert 15 <= volume_ml(case) <= 120
    assert ndimage.label(label)[1] == 1, "the prostate is one piece"
    where = np.argwhere(label)
    assert (where.min(axis=0) > 0).all() and (where.max(axis=0) < np.array(label.shape) - 1).all()
    smooth = ndimage.gaussian_filter(hu.astype(float), 0.5)
    assert smooth[label].min() > -200, "no air, no bowel gas within the prostate"
    assert smooth[label].max() < 200, "no bone within the prostate"

    left, right = map(np.array, case.femoral_heads)
    assert left[0] > right[0], "x counts to the patient's left"
    x, y, z = (left + right) / 2 - centroid_mm(case.label)
    assert 15 <= z <= 35
    assert abs(y) <= 15 and abs(x) <= 8
    for head in (left, right):
        index = case.image.TransformPhysicalPointToContinuousIndex(head.tolist())[::-1]
        assert ndimage.map_coordinates(smooth, np.array(index)[:, None], order=1)[0] > 180, "in the marrow"

    # Opened and cut at -400 HU, the body is the largest piece, clear of the sides of the field of view.
    pieces, _ = ndimage.label(ndimage.binary_opening(hu > -400, np.ones((1, 3, 3))))
    body = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    assert body[label].all()
    assert not body[:, :, [0, -1]].any() and not body[:, [0, -1]].any()


@pytest.mark.slow
def test_the_prostate_hardly_differs_from_its_neighbours():
    """Its soft neighbours are within 20 HU of it, and they, not fat, make up a good part of its surface."""
    soft_share, contrast = [], []
    for seed in SEEDS[:6]:
        hu, label = arrays(phantom(seed, (4.0, 3.0, 3.0)))
        smooth = ndimage.gaussian_filter(hu.astype(float), 0.7)
        rim = ndimage.binary_dilation(label, iterations=2) & ~ndimage.binary_dilation(label)
        soft = rim & (smooth > 5) & (smooth < 90)
        soft_share.append(soft.sum() / rim.sum())
        contrast.append(abs(hu[label].mean() - hu[soft].mean()))
    assert max(contrast) <= 20
    assert 0.3 < np.mean(soft_share) < 0.95


def test_contrast_medium_fills_the_bladder_only():
    plain, filled = arrays(phantom(5)), arrays(unusual_phantom(5, COARSE, contrast=True))
    np.testing.assert_array_equal(plain[1], filled[1])
    changed = filled[0] - plain[0] > 200
    assert changed.sum() * np.prod(COARSE) / 1000 > 40  # ml
    assert 250 < np.median(filled[0][changed]) < 400


def test_a_rotated_patient_has_rotated_heads():
    heads = np.array(unusual_phantom(2, COARSE, rotation_deg=(0, 0, 15)).femoral_heads)
    dx, dy, dz = heads[0] - heads[1]
    assert np.degrees(np.arctan2(dy, dx)) == pytest.approx(15, abs=0.5)
    assert dz == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "spacing", [(0, 1, 1), (-1, 1, 1), (1, 1), (1, float("nan"), 1), (1, 1, float("inf")), (40, 1, 1)]
)
def test_impossible_spacing_is_named(spacing):
    with pytest.raises(ValueError, match="spacing_mm"):
        make_phantom(0, spacing_mm=spacing)


def test_a_grid_that_cannot_hold_a_pelvis_is_named():
    with pytest.raises(ValueError, match=r"shape .*: a pelvis needs .* at least"):
        make_phantom(0, spacing_mm=COARSE, shape=(5, 80, 120))


def test_tissue_statistics_find_a_known_noise():
    """White noise through a Gaussian of sigma s falls to 1/e at 2 s."""
    noise = np.random.default_rng(0).normal(size=(12, 120, 120))
    noise = ndimage.gaussian_filter(noise, (0, 1.5, 1.5))
    noise *= 12 / noise.std()
    image = sitk.GetImageFromArray(50 + noise)
    image.SetSpacing((1.0, 1.0, 3.0))
    row = tissue_statistics(image, {"all": noise < np.inf, "none": noise > np.inf})
    assert row.loc["all", "mean_hu"] == pytest.approx(50, abs=0.3)
    assert row.loc["all", "noise_hu"] == pytest.approx(12, rel=0.05)
    assert row.loc["all", "correlation_mm"] == pytest.approx(3.0, rel=0.08)
    assert row.loc["none", "voxels"] == 0 and np.isnan(row.loc["none", "mean_hu"])
    with pytest.raises(ValueError, match="'small' has shape"):
        tissue_statistics(image, {"small": np.ones((2, 2, 2), bool)})


def ball(image, centre, radius_mm):
    index = np.array(image.TransformPhysicalPointToContinuousIndex(tuple(map(float, centre))))[::-1]
    steps = (np.indices(image.GetSize()[::-1]).T - index) * image.GetSpacing()[::-1]
    return ((steps**2).sum(axis=-1) < radius_mm**2).T


@pytest.mark.slow
def test_tissues_measure_like_a_real_ct(real_scan):
    """Means within 15 HU; noise and its grain within 25 %, by one estimator on one grid (3 mm)."""
    image, organs = (
        sitk.DICOMOrient(sitk.ReadImage(real_scan(f"ct_totalsegmentator/ts_example_{name}.nii.gz")), "LPS")
        for name in ("image", "allorgans_label")
    )
    organs = sitk.GetArrayFromImage(organs)
    clean = np.zeros(organs.shape, bool)
    clean[20:62] = True  # between the metal of one hip and the upper abdomen
    regions = {name: region & clean for name, region in fat_and_muscle(image).items()}
    regions["bladder"] = ndimage.binary_erosion(organs == 21, iterations=2) & clean
    femur = organs == 76  # the hip without metal; its head is where the bone is thickest, above the shaft
    depth = ndimage.distance_transform_edt(femur)
    depth[:6] = 0
    head = np.unravel_index(depth.argmax(), depth.shape)
    regions["head"] = ball(image, image.TransformIndexToPhysicalPoint([int(i) for i in head[::-1]]), 15) & femur
    real = tissue_statistics(image, regions)

    rows = []
    for seed in range(2):
        case = phantom(seed, (3.0, 3.0, 3.0))
        heads_slice = case.image.TransformPhysicalPointToIndex(case.femoral_heads[0])[2]
        regions = fat_and_muscle(case.image)
        for region in regions.values():
            region[: heads_slice + 10] = region[heads_slice + 52 :] = False
        with_contrast = arrays(unusual_phantom(seed, (3.0, 3.0, 3.0), contrast=True))[0]
        regions["bladder"] = ndimage.binary_erosion(with_contrast - arrays(case)[0] > 250, iterations=2)
        regions["head"] = ball(case.image, case.femoral_heads[1], 15)
        rows.append(tissue_statistics(case.image, regions))
    made = sum(rows) / len(rows)
    for name in real.index:
        assert made.mean_hu[name] == pytest.approx(real.mean_hu[name], abs=15), name
    for name in ("fat", "muscle", "bladder"):  # marrow has structure of its own, not noise
        assert made.noise_hu[name] == pytest.approx(real.noise_hu[name], rel=0.25), name
        assert made.correlation_mm[name] == pytest.approx(real.correlation_mm[name], rel=0.25), name
