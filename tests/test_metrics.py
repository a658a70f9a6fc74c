"""The metrics: against brute force, against MONAI, cases by hand, and masks that are empty."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from scipy import ndimage

from mupkg.metrics import METRICS, calibration, dice, segmentation_metrics, surface

ANISOTROPIC = {2: (2.5, 0.8), 3: (3.0, 1.25, 0.9)}


def is_surface(mask: np.ndarray, voxel: tuple[int, ...]) -> bool:
    """A foreground voxel with a face neighbour in the background; outside the array is background."""
    for axis in range(mask.ndim):
        for step in (-1, 1):
            at = voxel[axis] + step
            if not 0 <= at < mask.shape[axis] or not mask[(*voxel[:axis], at, *voxel[axis + 1 :])]:
                return True
    return False


def naive_surface(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    voxels = [v for v in map(tuple, np.argwhere(mask).tolist()) if is_surface(mask, v)]
    return np.array(voxels) * np.array(spacing)


def naive_percentile(values: np.ndarray, q: float) -> float:
    ordered = sorted(values)
    place = q / 100 * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def naive_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """METHOD's definitions from the full table of distances."""
    a, b = naive_surface(prediction, spacing), naive_surface(truth, spacing)
    table = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2))
    to_truth, to_prediction = table.min(axis=1), table.min(axis=0)
    true_positive = (prediction & truth).sum()
    return {
        "DSC": 2 * true_positive / (prediction.sum() + truth.sum()),
        "SEN": true_positive / truth.sum(),
        "PPV": true_positive / prediction.sum(),
        "ASD": (to_truth.mean() + to_prediction.mean()) / 2,
        "HD95": max(naive_percentile(to_truth, 95), naive_percentile(to_prediction, 95)),
        "HD": max(to_truth.max(), to_prediction.max()),
        "aRVD": abs(prediction.sum() - truth.sum()) / truth.sum() * 100,
    }


def blob(shape: tuple[int, ...], seed: int, *, interior: bool = False) -> np.ndarray:
    """A ragged random organ, with islands and holes; `interior` keeps it off the array's border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    mask = noise > np.quantile(noise, 0.7)
    if interior:
        inner = np.zeros(shape, bool)
        inner[(slice(2, -2),) * len(shape)] = True
        mask &= inner
    return mask


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(14, 17), (1, 12, 13), (9, 10, 11), (5, 1, 9)])
def test_agrees_with_brute_force_on_random_masks(shape, seed):
    prediction, truth, spacing = blob(shape, seed), blob(shape, seed + 100), ANISOTROPIC[len(shape)]
    found = segmentation_metrics(prediction, truth, spacing_mm=spacing)
    assert list(found) == [name for name, metric in METRICS.items() if metric.of]
    assert found == pytest.approx(naive_metrics(prediction, truth, spacing), rel=0, abs=1e-9)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_brute_force_on_white_noise(seed):
    """Nothing but islands and holes."""
    rng = np.random.default_rng(seed)
    prediction, truth = rng.random((2, 6, 7, 8)) < 0.4
    found = segmentation_metrics(prediction, truth, spacing_mm=ANISOTROPIC[3])
    assert found == pytest.approx(naive_metrics(prediction, truth, ANISOTROPIC[3]), rel=0, abs=1e-9)


# --- MONAI ---

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own affair


def one_hot(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(24, 20), (14, 15, 16)])
def test_agrees_with_monai_where_the_definitions_are_the_same(shape, seed):
    prediction, truth = blob(shape, seed, interior=True), blob(shape, seed + 100, interior=True)
    spacing = ANISOTROPIC[len(shape)]
    found = segmentation_metrics(prediction, truth, spacing_mm=spacing)
    p, t = one_hot(prediction), one_hot(truth)
    assert found["DSC"] == pytest.approx(compute_dice(p, t, include_background=False).item(), rel=1e-5)
    for name, percentile in (("HD", None), ("HD95", 95)):
        expected = compute_hausdorff_distance(p, t, percentile=percentile, spacing=spacing).item()
        assert found[name] == pytest.approx(expected, rel=1e-5)
    directed = [compute_average_surface_distance(*pair, spacing=spacing).item() for pair in ((p, t), (t, p))]
    assert found["ASD"] == pytest.approx(np.mean(directed), rel=1e-5)


def test_monais_symmetric_surface_distance_pools_the_points_where_ours_averages_the_directions():
    """So a large surface outweighs a small one there, and here both count the same."""
    truth, prediction = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    truth[4:16, 4:16] = True  # 44 surface pixels
    prediction[9, 4] = True  # one, on the truth's surface
    ours = segmentation_metrics(prediction, truth, spacing_mm=(1, 1))["ASD"]
    pooled = compute_average_surface_distance(one_hot(prediction), one_hot(truth), symmetric=True).item()
    back = compute_average_surface_distance(one_hot(truth), one_hot(prediction)).item()
    assert ours == pytest.approx((0 + back) / 2)
    assert pooled == pytest.approx((1 * 0 + 44 * back) / 45)
    assert pooled > 1.9 * ours


# --- by hand ---


def box(shape: tuple[int, ...], *ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


@pytest.mark.parametrize(("axis", "mm"), [(0, 3.0), (1, 1.25), (2, 0.9)])
def test_two_voxels_two_steps_apart_are_so_many_mm_apart(axis, mm):
    prediction, truth = np.zeros((2, 5, 5, 5), bool)
    prediction[1, 1, 1] = True
    truth[tuple(3 if a == axis else 1 for a in range(3))] = True
    found = segmentation_metrics(prediction, truth, spacing_mm=(3.0, 1.25, 0.9))
    distances = dict.fromkeys(("ASD", "HD95", "HD"), 2 * mm)
    assert found == pytest.approx({"DSC": 0, "SEN": 0, "PPV": 0, "aRVD": 0} | distances, abs=1e-12)


def test_a_square_and_its_left_half():
    truth, half = box((8, 8), (2, 6), (2, 6)), box((8, 8), (2, 6), (2, 4))
    found = segmentation_metrics(half, truth, spacing_mm=(1.0, 2.0))
    # All 8 pixels of the half are surface. 6 lie on the square's; its two inner ones are 1 mm below or above an
    # end row. The square's other 6 surface pixels are 2 mm (two in the end rows) or 4 mm (four at the right).
    assert (found["DSC"], found["SEN"], found["PPV"], found["aRVD"]) == (2 * 8 / 24, 0.5, 1.0, 50.0)
    assert found["ASD"] == pytest.approx(((2 * 1) / 8 + (2 * 2 + 4 * 4) / 12) / 2)
    assert found["HD"] == found["HD95"] == 4.0


def test_identical_masks_are_perfect_and_swapping_masks_swaps_sen_and_ppv():
    a, b = blob((9, 10, 11), 1), blob((9, 10, 11), 2)
    same = segmentation_metrics(a, a, spacing_mm=(1, 1, 1))
    assert same == {"DSC": 1, "SEN": 1, "PPV": 1, "ASD": 0, "HD95": 0, "HD": 0, "aRVD": 0}
    ab, ba = (segmentation_metrics(*pair, spacing_mm=(3, 1, 1)) for pair in ((a, b), (b, a)))
    assert (ab["SEN"], ab["PPV"]) == (ba["PPV"], ba["SEN"])
    assert [ab[m] for m in ("DSC", "ASD", "HD95", "HD")] == [ba[m] for m in ("DSC", "ASD", "HD95", "HD")]


def test_hd95_is_the_larger_directed_percentile_not_that_of_all_distances():
    """Reading R11: a stray voxel is 1 of 5 predicted points, but only 1 of all the distances there are."""
    truth = box((1, 60), (0, 1), (0, 40))
    prediction = box((1, 60), (0, 1), (0, 4)) | box((1, 60), (0, 1), (59, 60))
    found = segmentation_metrics(prediction, truth, spacing_mm=(1, 1))
    to_prediction = [min(abs(x - p) for p in (0, 1, 2, 3, 59)) for x in range(40)]
    assert found["HD95"] == pytest.approx(max(np.percentile([0, 0, 0, 0, 20], 95), np.percentile(to_prediction, 95)))
    pooled = np.percentile([0, 0, 0, 0, 20, *to_prediction], 95)
    assert found["HD95"] != pytest.approx(pooled, abs=0.01)


def test_arvd_has_no_sign_and_is_a_percentage_of_the_truth():
    truth, larger, smaller = (box((1, 30), (0, 1), (0, n)) for n in (10, 25, 5))
    assert segmentation_metrics(larger, truth, spacing_mm=(1, 1))["aRVD"] == 150
    assert segmentation_metrics(smaller, truth, spacing_mm=(1, 1))["aRVD"] == 50


# --- surfaces ---


def test_the_arrays_border_counts_as_background():
    spacing = (2.0, 1.0, 1.0)
    inner = 2 * 3 * 4
    assert surface(np.ones((4, 5, 6), bool)).sum() == 4 * 5 * 6 - inner
    shrunk = box((4, 5, 6), (1, 3), (1, 4), (1, 5))
    assert segmentation_metrics(shrunk, np.ones((4, 5, 6), bool), spacing_mm=spacing)["HD"] == pytest.approx(6**0.5)


def test_every_voxel_of_a_single_slice_in_3d_is_surface():
    disc = blob((1, 12, 12), 0)
    assert np.array_equal(surface(disc), disc)
    flat = disc[0]
    assert surface(flat).sum() < flat.sum()


@pytest.mark.parametrize("shape", [(14, 17), (9, 10, 11), (1, 12, 13)])
def test_a_surface_is_what_looking_at_every_voxels_neighbours_gives(shape):
    mask = blob(shape, 3)
    expected = np.zeros(shape, bool)
    for voxel in map(tuple, np.argwhere(mask).tolist()):
        expected[voxel] = is_surface(mask, voxel)
    assert np.array_equal(surface(mask), expected)


@pytest.mark.parametrize("at", [(0, 0, 0), (3, 4, 5), (6, 7, 8)])
def test_where_the_organ_lies_in_the_array_does_not_matter(at):
    organ, other = blob((5, 5, 5), 0), blob((5, 5, 5), 1)
    expected = segmentation_metrics(np.pad(organ, 2), np.pad(other, 2), spacing_mm=(3, 1, 2))
    moved = np.zeros((2, 11, 12, 13), bool)
    for array, mask in zip(moved, (organ, other), strict=True):
        array[tuple(slice(a, a + 5) for a in at)] = mask
    assert segmentation_metrics(*moved, spacing_mm=(3, 1, 2)) == pytest.approx(expected, rel=1e-12)


# --- empty masks (METHOD's table) ---

NAN, INF = float("nan"), float("inf")
EMPTY = {
    "both": {"DSC": 1, "SEN": NAN, "PPV": NAN, "ASD": 0, "HD95": 0, "HD": 0, "aRVD": 0},
    "prediction": {"DSC": 0, "SEN": 0, "PPV": NAN, "ASD": INF, "HD95": INF, "HD": INF, "aRVD": 100},
    "truth": {"DSC": 0, "SEN": NAN, "PPV": 0, "ASD": INF, "HD95": INF, "HD": INF, "aRVD": NAN},
}


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4)])
@pytest.mark.parametrize("empty", EMPTY)
def test_empty_masks_are_never_an_exception_and_never_a_silent_zero(empty, shape):
    full, none = box(shape, (1, 3), (1, 3)), np.zeros(shape, bool)
    prediction, truth = none if empty != "truth" else full, none if empty != "prediction" else full
    found = segmentation_metrics(prediction, truth, spacing_mm=(1,) * len(shape))
    assert found == pytest.approx(EMPTY[empty], nan_ok=True)


# --- arguments ---


# --- the DSC alone ---


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_dice_is_the_dsc_of_all_metrics(seed, dtype):
    prediction, truth = blob((9, 10, 11), seed), blob((9, 10, 11), seed + 100)
    found = dice(prediction.astype(dtype), truth)
    assert type(found) is float
    assert found == segmentation_metrics(prediction, truth, spacing_mm=ANISOTROPIC[3])["DSC"]
    assert found == pytest.approx(naive_metrics(prediction, truth, ANISOTROPIC[3])["DSC"])


def test_dice_by_hand_and_of_empty_masks():
    nothing, one, two = np.zeros((3, 4), bool), np.eye(3, 4) > 0, np.ones((3, 4), bool)
    assert dice(one, two) == 2 * 3 / (3 + 12)
    assert (dice(nothing, nothing), dice(nothing, two), dice(two, nothing)) == (1, 0, 0)


@pytest.mark.parametrize("wrong", [np.zeros((3, 5), bool), np.full((3, 4), 2), np.zeros(4, bool)], ids=str)
def test_dice_of_masks_that_do_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match=r"bring them to one grid|truth must be"):
        dice(np.zeros((3, 4), bool), wrong)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_masks_of_zeros_and_ones_are_as_good_as_boolean_ones(dtype):
    a, b = blob((9, 10), 1), blob((9, 10), 2)
    expected = segmentation_metrics(a, b, spacing_mm=(2, 1))
    assert segmentation_metrics(a.astype(dtype), b.astype(dtype), spacing_mm=(2, 1)) == expected
    assert segmentation_metrics(a.astype(dtype), b, spacing_mm=np.array([2.0, 1.0])) == expected


def test_masks_are_left_as_they_were():
    a, b = blob((9, 10), 1), blob((9, 10), 2)
    before = a.copy(), b.copy()
    segmentation_metrics(a, b, spacing_mm=(2, 1))
    assert np.array_equal(a, before[0])
    assert np.array_equal(b, before[1])


def test_masks_may_be_views_that_are_not_contiguous():
    a, b = blob((18, 20), 1), blob((18, 20), 2)
    expected = segmentation_metrics(a[::2, ::-1].copy(), b[::2, ::-1].copy(), spacing_mm=(2, 1))
    assert segmentation_metrics(a[::2, ::-1], b[::2, ::-1], spacing_mm=(2, 1)) == expected


@pytest.mark.parametrize(
    "spacing", [(1, 1), (1, 1, 1, 1), (1, 0, 1), (1, -1, 1), (1, NAN, 1), (1, INF, 1), ((1, 1, 1),), 1.0, None]
)
def test_a_spacing_that_is_no_voxel_size_is_refused(spacing, unchecked):
    with pytest.raises(ValueError, match="spacing_mm must be 3 finite positive numbers"):
        segmentation_metrics(np.ones((2, 3, 4), bool), np.ones((2, 3, 4), bool), spacing_mm=spacing)


def test_spacing_has_no_default():
    with pytest.raises(TypeError, match="spacing_mm"):
        segmentation_metrics(np.ones((2, 3), bool), np.ones((2, 3), bool))


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 3, 2), (2, 3), (1, 2, 3, 4)])
def test_shapes_that_differ_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)|must be 2D or 3D"):
        segmentation_metrics(np.ones(shape, bool), np.ones((2, 3, 4), bool), spacing_mm=(1, 1, 1))


@pytest.mark.parametrize("shape", [(), (5,), (2, 2, 2, 2)])
def test_only_2d_and_3d_are_taken(shape):
    with pytest.raises(ValueError, match="prediction must be 2D or 3D"):
        segmentation_metrics(np.ones(shape, bool), np.ones(shape, bool), spacing_mm=(1,) * len(shape))


@pytest.mark.parametrize("value", [2, -1, 0.5, NAN])
@pytest.mark.parametrize("wrong", ["prediction", "truth"])
def test_masks_of_other_values_are_refused_by_name(value, wrong):
    masks = {"prediction": np.ones((3, 4)), "truth": np.ones((3, 4))}
    masks[wrong][1, 1] = value
    with pytest.raises(ValueError, match=f"{wrong} must be boolean"):
        segmentation_metrics(**masks, spacing_mm=(1, 1))


# Beyond the paper


def surface_dice(a, b, *, spacing_mm, tolerance_mm=2.0):
    return segmentation_metrics(a, b, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)["surface_DSC"]


def test_two_plates_apart_agree_within_a_tolerance_or_not_at_all():
    truth, shifted = np.zeros((12, 6, 6), bool), np.zeros((12, 6, 6), bool)
    truth[2], shifted[5] = True, True  # 3 slices of 1.5 mm: 4.5 mm apart everywhere
    for tolerance, share in ((4.4, 0.0), (4.5, 1.0)):
        assert surface_dice(truth, shifted, spacing_mm=(1.5, 1, 1), tolerance_mm=tolerance) == share


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 3.5])
def test_the_share_of_the_surface_is_the_naive_one(tolerance):
    rng, spacing = np.random.default_rng(5), np.array([3.0, 1.0, 2.0])
    for _ in range(5):
        a, b = rng.random((5, 7, 6)) > 0.6, rng.random((5, 7, 6)) > 0.7
        points = [np.argwhere(surface(mask)) * spacing for mask in (a, b)]
        apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
        near = (apart.min(1) <= tolerance).sum() + (apart.min(0) <= tolerance).sum()
        expected = near / (len(points[0]) + len(points[1]))
        assert surface_dice(a, b, spacing_mm=spacing, tolerance_mm=tolerance) == pytest.approx(expected)


def test_the_share_of_empty_surfaces():
    full, empty = np.ones((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    assert surface_dice(empty, empty, spacing_mm=(1, 1, 1)) == 1
    assert surface_dice(full, empty, spacing_mm=(1, 1, 1)) == surface_dice(empty, full, spacing_mm=(1, 1, 1)) == 0
    with pytest.raises(ValueError, match="spacing_mm must be 3 finite"):
        surface_dice(full, full, spacing_mm=(1, 1))
    assert "surface_DSC" not in segmentation_metrics(full, full, spacing_mm=(1, 1, 1))


def test_calibration_in_closed_form():
    half = np.full((2, 3, 4), 0.5, np.float32)
    truth = np.zeros((2, 3, 4), bool)
    truth[0] = True  # half of the voxels: .5 is the right probability, though it decides nothing
    assert calibration(half, truth) == pytest.approx({"Brier": 0.25, "ECE": 0.0})
    assert calibration(truth.astype(np.float32), truth) == {"Brier": 0.0, "ECE": 0.0}
    assert calibration((~truth).astype(np.float32), truth) == {"Brier": 1.0, "ECE": 1.0}
    assert calibration(np.full((2, 3, 4), 0.8, np.float32), truth)["ECE"] == pytest.approx(0.3)


def test_calibration_is_the_naive_one():
    rng = np.random.default_rng(3)
    probability = rng.random(2000).astype(np.float32)
    truth = rng.random(2000) < probability**2
    edges = np.linspace(0, 1, 16)
    naive = 0.0
    for low, high in pairwise(edges):
        inside = (probability >= low) & (probability < high)
        naive += inside.mean() * abs(probability[inside].mean() - truth[inside].mean())
    assert calibration(probability, truth)["ECE"] == pytest.approx(naive, abs=1e-5)


def test_which_metrics_are_better_when_they_are_larger():
    more = {name for name, metric in METRICS.items() if metric.better == 1}
    less = {name for name, metric in METRICS.items() if metric.better == -1}
    assert more == {"DSC", "SEN", "PPV", "surface_DSC_2mm", "validation_area"}
    assert less == {"ASD", "HD95", "HD", "aRVD", "Brier", "ECE", "log_sd"}
