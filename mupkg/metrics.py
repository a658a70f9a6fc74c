"""Segmentation metrics, in millimetres and honest about empty masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.spatial import KDTree

METRICS = ("DSC", "SEN", "PPV", "ASD", "HD95", "HD", "aRVD")


def surface(mask: Bool[np.ndarray, "*spatial"]) -> Bool[np.ndarray, "*spatial"]:
    """The foreground voxels with a face neighbour in the background; the array's border counts as background."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        kept, neighbour = np.moveaxis(inside, axis, 0), np.moveaxis(mask, axis, 0)
        kept[1:] &= neighbour[:-1]
        kept[:-1] &= neighbour[1:]
        kept[[0, -1]] = False
    return mask & ~inside


def _bounding_box(masks: Sequence[Bool[np.ndarray, "*spatial"]]) -> tuple[slice, ...]:
    """The smallest box around all masks' foreground, narrowed axis by axis, so that each look is at less."""
    box: list[slice] = []
    for axis in range(masks[0].ndim):
        others = tuple(other for other in range(masks[0].ndim) if other != axis)
        hit = np.flatnonzero(np.any([mask[tuple(box)].any(axis=others) for mask in masks], axis=0))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, 0))
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

    box = _bounding_box((prediction, truth))  # only the organ, not the whole scan
    prediction, truth = prediction[box], truth[box]
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
        distances = _surface_distances(surface(prediction), surface(truth), spacing)
    volume_error = 100 * abs(predicted - true) / true if true else (0.0 if not predicted else float("nan"))
    return overlap | distances | {"aRVD": volume_error}


def _surface_distances(
    a: Bool[np.ndarray, "*spatial"], b: Bool[np.ndarray, "*spatial"], spacing: Float[np.ndarray, " d"]
) -> dict[str, float]:
    a_to_b, b_to_a = _directed(a, b, spacing), _directed(b, a, spacing)
    return {
        "ASD": float(a_to_b.mean() + b_to_a.mean()) / 2,
        "HD95": float(max(np.percentile(a_to_b, 95), np.percentile(b_to_a, 95))),
        "HD": float(max(a_to_b.max(), b_to_a.max())),
    }


def _directed(
    of: Bool[np.ndarray, "*spatial"], other: Bool[np.ndarray, "*spatial"], spacing: Float[np.ndarray, " d"]
) -> Float[np.ndarray, " s"]:
    """Every voxel's distance in mm to the nearest of the other surface, in no particular order."""
    distances = np.zeros(np.count_nonzero(of))  # 0 for voxels on both, so only the rest is looked up
    apart = np.argwhere(of & ~other) * spacing
    # Points of a grid lie in planes, where medians (a balanced tree) are dear to find and gain nothing.
    tree = KDTree(np.argwhere(other) * spacing, leafsize=24, balanced_tree=False)
    distances[: len(apart)] = tree.query(apart)[0]
    return distances


def _as_mask(array: Shaped[np.ndarray, "..."], name: str) -> Bool[np.ndarray, "*spatial"]:
    array = np.asarray(array)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} must be 2D or 3D, not {array.ndim}D")
    mask = array.astype(bool, copy=False)
    if array.dtype != bool and not (mask == array).all():
        raise ValueError(f"{name} must be boolean (or hold 0 and 1 only)")
    return mask
