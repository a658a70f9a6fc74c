"""Trivial answers that any trained network must beat: the training prostates' mean shape, and a threshold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import Bool, UInt8
from scipy import ndimage

from mupkg.data.cohort import Cohort
from mupkg.data.preprocessing import to_scan_grid
from mupkg.metrics import dice
from mupkg.stages.evaluation import mask_metrics
from mupkg.stages.regions import Regions

Volume = UInt8[np.ndarray, "z y x"]
THRESHOLDS = range(8, 256, 8)


def by_threshold(region: Volume, value: int, above: bool) -> Bool[np.ndarray, "z y x"]:
    """The largest component of the voxels above (or below) a value of the prepared region."""
    labels, count = ndimage.label(region > value if above else region < value)
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]) if count else labels > 0


def best_threshold(regions: Regions) -> partial:
    """`by_threshold` with the single value and side that give the highest mean DSC on the training regions."""
    cases = list(zip(*regions.volumes("train"), strict=True))
    rules = [partial(by_threshold, value=value, above=above) for value in THRESHOLDS for above in (True, False)]
    return max(rules, key=lambda rule: np.mean([dice(rule(np.asarray(i)), np.asarray(t)) for i, t in cases]))


def mean_shape(regions: Regions, *, in_place: bool = False) -> Bool[np.ndarray, "z y x"]:
    """Voxels that at least half of the training prostates hold when their centroids lie at the region's centre.

    Args:
        in_place: put the shape where training prostates lie in their regions on average, not at the centre. A
            harder opponent: the averaged centre of stage 1 lies a centimetre above the prostate.
    """
    labels = [np.asarray(label) for label in regions.volumes("train")[1]]
    labels = list(filter(np.any, labels))  # a region that missed its prostate has no centroid
    centroids = np.array([ndimage.center_of_mass(label) for label in labels])
    target = centroids.mean(axis=0) if in_place else (np.array(labels[0].shape) - 1) / 2
    shifts = np.floor(target - centroids + 0.5).astype(int)  # halves all one way
    moved = [ndimage.shift(label, shift, order=0) for label, shift in zip(labels, shifts, strict=True)]
    return np.mean(moved, axis=0) >= 0.5


def measure_baseline(
    answer: Callable[[Volume], Bool[np.ndarray, "z y x"]], cohort: Cohort, regions: Regions
) -> pd.DataFrame:
    """Metrics of a trivial answer on the test cases, on the scans' own grids; the same path as a network's."""
    rows = []
    for case_id in regions.ids("test"):
        case = cohort.case(case_id)
        region = regions.image(case_id)
        mask = sitk.GetImageFromArray(answer(sitk.GetArrayFromImage(region)).astype(np.float32))
        mask.CopyInformation(region)
        rows.append({"case_id": case_id} | mask_metrics(to_scan_grid(mask, case.image), case))
    return pd.DataFrame(rows)
