"""Segmentation metrics, in millimetres and honest about empty masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import ndimage
from scipy.spatial import KDTree

BINS = 15  # of probability


def surface(mask: Bool[np.ndarray, "*spatial"]) -> Bool[np.ndarray, "*spatial"]:
    """The foreground voxels with a face neighbour in the background; the array's border counts as background."""
    return mask & ~ndimage.binary_erosion(mask)


def dice(prediction: Shaped[np.ndarray, "..."], truth: Shaped[np.ndarray, "..."]) -> float:
    """The DSC alone, of masks as in `segmentation_metrics`; 1 if both are empty."""
    prediction, truth = _masks(prediction, truth)
    size = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return float(2 * np.count_nonzero(prediction & truth) / size) if size else 1.0


class TwoMasks(NamedTuple):
    """A prediction and the truth, cut to the organ, and what metrics are worked out from."""

    prediction: Bool[np.ndarray, "*spatial"]
    truth: Bool[np.ndarray, "*spatial"]
    spacing_mm: Float[np.ndarray, " d"]
    voxels: tuple[int, int, int]  # how many are predicted, true, and both
    # Millimetres from every surface voxel to the other surface: of the prediction, and of the truth.
    surface_distances: tuple[Float[np.ndarray, " s"], Float[np.ndarray, " t"]] | None  # None if a mask is empty

    def by_distance(self, of: Callable[..., float], same: float = 0.0, apart: float = float("inf")) -> float:
        """`of` the surface distances; without a surface `same` if both masks are empty, `apart` if one is."""
        if self.surface_distances is not None:
            return of(*self.surface_distances)
        return same if not any(self.voxels) else apart


class Metric(NamedTuple):
    """How a metric is worked out, shown and judged. To add one: an entry of METRICS, its test, METHOD.md."""

    of: Callable[[TwoMasks], float] | None  # None: not from two masks, see `calibration` and `trials.tables`
    better: int  # 1: more is better; -1: less is
    unit: str = ""
    digits: int = 3  # behind the point
    headline: int = 0  # its place among the columns of the short tables, from 1 on; 0: it is not there
    title: str = ""  # where the name does not do


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _volume_error(masks: TwoMasks) -> float:
    predicted, true, _ = masks.voxels
    return 100 * abs(predicted - true) / true if true else (0.0 if not predicted else float("nan"))


METRICS: dict[str, Metric] = {  # in the order of the columns of metrics.csv
    "DSC": Metric(lambda m: dice(m.prediction, m.truth), 1, headline=1),
    "SEN": Metric(lambda m: _ratio(m.voxels[2], m.voxels[1]), 1, headline=3),
    "PPV": Metric(lambda m: _ratio(m.voxels[2], m.voxels[0]), 1, headline=4),
    "ASD": Metric(lambda m: m.by_distance(lambda a, b: (a.mean() + b.mean()) / 2), -1, "mm", 2, headline=2),
    "HD95": Metric(
        lambda m: m.by_distance(lambda a, b: max(np.percentile(a, 95), np.percentile(b, 95))), -1, "mm", 2, headline=5
    ),
    "HD": Metric(lambda m: m.by_distance(lambda a, b: max(a.max(), b.max())), -1, "mm", 2),
    "aRVD": Metric(_volume_error, -1, "%", 2, headline=6),
    "surface_DSC_2mm": Metric(None, 1, title="surface DSC, 2 mm"),
    "Brier": Metric(None, -1, digits=4),
    "ECE": Metric(None, -1, digits=4),
    "validation_area": Metric(None, 1),
    "log_sd": Metric(None, -1, title="log of the sd over cases"),
}


def metric_of(column: str) -> Metric:
    """The metric in a column of a table, with or without the largest-component step (`_all`)."""
    return METRICS[column.removesuffix("_all")]


def with_unit(column: str) -> str:
    """A column's name with the metric's unit, for axes and tables: "ASD (mm)"."""
    return f"{column} ({unit})" if (unit := metric_of(column).unit) else column


def headline() -> list[str]:
    """The metrics of the short tables, in their order."""
    return sorted((name for name in METRICS if METRICS[name].headline), key=lambda name: METRICS[name].headline)


def segmentation_metrics(
    prediction: Shaped[np.ndarray, "..."],
    truth: Shaped[np.ndarray, "..."],
    *,
    spacing_mm: Sequence[float] | np.ndarray,
    tolerance_mm: float | None = None,
) -> dict[str, float]:
    """All metrics of one case (Section IV-C; aRVD as in PROMISE12).

    DSC, SEN (sensitivity), PPV from voxel counts; ASD, HD95 and HD in mm: the mean of the two directed mean
    surface distances, and the larger of the two directed 95th percentiles (reading R11) and maxima; aRVD in %.

    Both masks empty: DSC 1, distances and aRVD 0, SEN and PPV NaN. One empty: DSC 0, distances inf, and NaN
    where a ratio is undefined (PPV without prediction; SEN and aRVD without truth).

    Args:
        prediction, truth: 2D or 3D, the same shape; boolean, or 0 and 1 in any type.
        spacing_mm: voxel size in array order (z, y, x) or (y, x).
        tolerance_mm: adds `surface_DSC`, the share of both surfaces that lies within it of the other (Nikolov et al.,
            JMIR 23, 2021; not in the paper): what a person need not correct. Both empty: 1, one empty: 0.

    Raises:
        ValueError: shapes that differ, masks of other values or dimensions, a spacing that is not one finite
            positive number an axis.
    """
    prediction, truth = _masks(prediction, truth)
    spacing = np.asarray(spacing_mm, dtype=float)
    if spacing.shape != (truth.ndim,) or not np.all(np.isfinite(spacing) & (spacing > 0)):
        raise ValueError(f"spacing_mm must be {truth.ndim} finite positive numbers in array order, not {spacing_mm}")
    boxes = ndimage.find_objects((prediction | truth).astype(np.uint8))
    box = boxes[0] if boxes else (slice(0),) * truth.ndim  # only the organ, not the whole scan
    prediction, truth = prediction[box], truth[box]
    voxels = tuple(int(np.count_nonzero(mask)) for mask in (prediction, truth, prediction & truth))
    a, b = surface(prediction), surface(truth)
    distances = (_directed(a, b, spacing), _directed(b, a, spacing)) if voxels[0] and voxels[1] else None
    masks = TwoMasks(prediction, truth, spacing, voxels, distances)
    row = {name: float(metric.of(masks)) for name, metric in METRICS.items() if metric.of}
    if tolerance_mm is None:
        return row
    near = lambda *distances: (np.concatenate(distances) <= tolerance_mm).mean()  # noqa: E731
    return row | {"surface_DSC": float(masks.by_distance(near, same=1.0, apart=0.0))}


def calibration(probability: Float[np.ndarray, "*spatial"], truth: Bool[np.ndarray, "*spatial"]) -> dict[str, float]:
    """Whether probabilities mean what they say, over all voxels. Not in the paper.

    `Brier`: the mean squared error of the probability (Brier 1950). `ECE`, expected calibration error: in `BINS`
    equal bins of probability, the distance between mean probability and share of foreground, weighted by the bin's
    size (Guo et al., ICML 2017). Most voxels are sure background, so both are small in any region.
    """
    probability, truth = probability.ravel().astype(np.float64), truth.ravel()
    number = np.minimum((probability * BINS).astype(int), BINS - 1)
    gap = np.bincount(number, probability, BINS) - np.bincount(number, truth, BINS)
    brier = float(np.square(probability - truth).mean())
    return {"Brier": brier, "ECE": float(np.abs(gap).sum() / len(truth))}


def _directed(
    of: Bool[np.ndarray, "*spatial"], other: Bool[np.ndarray, "*spatial"], spacing: Float[np.ndarray, " d"]
) -> Float[np.ndarray, " s"]:
    """The distance in mm of every voxel `of` one surface to the nearest of the other, in no particular order."""
    distances = np.zeros(np.count_nonzero(of))  # 0 for voxels on both, so only the rest is looked up
    apart = np.argwhere(of & ~other) * spacing
    # Grid points lie in planes: a balanced tree spends long on finding medians among them, and gains nothing.
    tree = KDTree(np.argwhere(other) * spacing, leafsize=24, balanced_tree=False)
    distances[: len(apart)] = tree.query(apart)[0]
    return distances


def _masks(prediction: Shaped[np.ndarray, "..."], truth: Shaped[np.ndarray, "..."]) -> list[np.ndarray]:
    """Both as boolean masks of one shape; ValueError if they are none."""
    masks = []
    for name, array in (("prediction", np.asarray(prediction)), ("truth", np.asarray(truth))):
        if array.ndim not in (2, 3):
            raise ValueError(f"{name} must be 2D or 3D, not {array.ndim}D")
        masks.append(array.astype(bool, copy=False))
        if array.dtype != bool and not (masks[-1] == array).all():
            raise ValueError(f"{name} must be boolean (or hold 0 and 1 only)")
    if masks[0].shape != masks[1].shape:
        raise ValueError(f"prediction is {masks[0].shape} but truth is {masks[1].shape}: bring them to one grid")
    return masks
