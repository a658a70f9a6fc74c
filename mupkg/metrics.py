"""Segmentation metrics, in millimetres and honest about empty masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import ndimage
from scipy.spatial import KDTree

METRICS = ("DSC", "SEN", "PPV", "ASD", "HD95", "HD", "aRVD")


def surface_points(
    mask: Bool[np.ndarray, "*spatial"], spacing_mm: Sequence[float] | np.ndarray
) -> Float[np.ndarray, "s d"]:
    """Centres in mm of the foreground voxels with a face neighbour in the background; the array's border counts.

    The mask must not be empty.
    """
    box = _bounding_box(mask)  # only the organ, not the whole scan
    inside = mask[box]
    surface = inside & ~ndimage.binary_erosion(inside)
    corner = np.array([s.start for s in box])
    return (np.argwhere(surface) + corner) * np.asarray(spacing_mm, dtype=float)


def _bounding_box(mask: Bool[np.ndarray, "*spatial"]) -> tuple[slice, ...]:
    """The smallest box around a mask's foreground, narrowed axis by axis, so that each look is at less."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hit = np.flatnonzero(mask[tuple(box)].any(axis=others))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def segmentation_metrics(
    prediction: Shaped[np.ndarray, "..."],
    truth: Shaped[np.ndarray, "..."],
    *,
    spacing_mm: Sequence[float] | np.ndarray,
) -> dict[str, float]:
    """All metrics of one case (Section IV-B; aRVD as in PROMISE12).

    DSC, SEN (sensitivity), PPV from voxel counts; ASD, HD95 and HD in mm: the mean of the two directed mean
    surface distances, and the larger of the two directed 95th percentiles (reading R11) and maxima; aRVD in %.

    Both masks empty: DSC 1, distances and aRVD 0, SEN and PPV NaN. One empty: DSC 0, distances inf, and NaN
    where a ratio is undefined (PPV without prediction; SEN and aRVD without truth).

    Args:
        prediction, truth: 2D or 3D, the same shape; boolean, or 0 and 1 in any type.
        spacing_mm: voxel size in array order (z, y, x) or (y, x).

    Raises:
        ValueError: shapes that differ, masks of other values or dimensions, a spacing that is not one finite
            positive number an axis.
    """
    prediction, truth = _as_mask(prediction, "prediction"), _as_mask(truth, "truth")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape} but truth is {truth.shape}: bring them to one grid")
    spacing = np.asarray(spacing_mm, dtype=float)
    if spacing.shape != (truth.ndim,) or not np.all(np.isfinite(spacing) & (spacing > 0)):
        raise ValueError(f"spacing_mm must be {truth.ndim} finite positive numbers in array order, not {spacing_mm}")

    predicted, true, both = (int(np.count_nonzero(m)) for m in (prediction, truth, prediction & truth))
    overlap = {
        "DSC": 2 * both / (predicted + true) if predicted + true else 1.0,
        "SEN": both / true if true else float("nan"),
        "PPV": both / predicted if predicted else float("nan"),
    }
    if not predicted or not true:
        distance = 0.0 if predicted == true else float("inf")
        distances = dict.fromkeys(("ASD", "HD95", "HD"), distance)
    else:
        distances = _surface_distances(surface_points(prediction, spacing), surface_points(truth, spacing))
    volume_error = 100 * abs(predicted - true) / true if true else (0.0 if not predicted else float("nan"))
    return overlap | distances | {"aRVD": volume_error}


def _surface_distances(a: Float[np.ndarray, "s d"], b: Float[np.ndarray, "t d"]) -> dict[str, float]:
    a_to_b, b_to_a = KDTree(b).query(a)[0], KDTree(a).query(b)[0]
    return {
        "ASD": float(a_to_b.mean() + b_to_a.mean()) / 2,
        "HD95": float(max(np.percentile(a_to_b, 95), np.percentile(b_to_a, 95))),
        "HD": float(max(a_to_b.max(), b_to_a.max())),
    }


def _as_mask(array: Shaped[np.ndarray, "..."], name: str) -> Bool[np.ndarray, "*spatial"]:
    array = np.asarray(array)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} must be 2D or 3D, not {array.ndim}D")
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be boolean (or hold 0 and 1 only)")
    return array.astype(bool)
