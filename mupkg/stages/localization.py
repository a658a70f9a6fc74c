"""Stage 1: find the prostate and cut a fixed region around it (Section III-A)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import SimpleITK as sitk
from torch import nn

from mupkg.data.preprocessing import array_spacing, box_corners, centroid, largest_component, resample
from mupkg.scans.cases import Case, Point
from mupkg.stages.landmarks import FemoralHeads, femoral_heads
from mupkg.stages.prediction import predict_volume

if TYPE_CHECKING:  # a new scan needs no cohort
    from mupkg.data.cohort import Cohort

COARSE_CHANNELS = 5
FEWEST_SLICES = 16


class Location(NamedTuple):
    """Where the prostate is thought to be; points are physical (x, y, z) in mm."""

    centre: Point
    coarse_centre: Point | None
    heads_centre: Point | None
    fallback: str  # "" if both parts were found, otherwise what was done without which, and why
    coarse_box: tuple[Point, Point] | None = None  # corners of the coarse mask's bounding box


def coarse(image: sitk.Image, coarse_mm: float = 4.0, *, label: bool = False) -> sitk.Image:
    """A prepared volume on stage 1's grid: voxels of `coarse_mm`, a quarter of the paper's 1 mm grid.

    An axis that is coarser already stays as it is, and a short scan keeps slices thin enough for 16 of them.
    """
    own = np.array(array_spacing(image))
    wanted = np.full(3, coarse_mm)
    wanted[0] = min(coarse_mm, own[0] * image.GetSize()[2] / FEWEST_SLICES)
    return resample(image, np.maximum(own, wanted), label=label)


class NotLocated(ValueError):
    """Stage 1 found no prostate in a scan."""


def coarse_volumes(cohort: Cohort, split: str, coarse_mm: float = 4.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images and labels of one split on stage 1's grid, uint8 (z, y, x); ValueError if the split is empty."""
    if not cohort.ids(split):
        raise ValueError(
            f"{cohort.folder}: has no labelled {split} cases; cases without a label cannot be trained on"
        )
    prepared = [cohort.prepared(case_id) for case_id in cohort.ids(split)]
    images = [sitk.GetArrayFromImage(coarse(p.image, coarse_mm)) for p in prepared]
    return images, [sitk.GetArrayFromImage(coarse(p.label, coarse_mm, label=True)) for p in prepared]


def coarse_mask(network: nn.Module, prepared: sitk.Image, coarse_mm: float = 4.0) -> sitk.Image:
    """The largest component of what stage 1 calls prostate (reading R12), on its own grid; uint8 0/1, maybe empty."""
    small = coarse(prepared, coarse_mm)
    probability = predict_volume(network, sitk.GetArrayFromImage(small), channels=COARSE_CHANNELS)
    mask = sitk.GetImageFromArray((probability > 0.5).astype(np.uint8))
    mask.CopyInformation(small)
    return largest_component(mask)


def locate(case: Case, prepared: sitk.Image, network: nn.Module, *, coarse_mm: float = 4.0) -> Location:
    """The region's centre: the average of the coarse mask's and the femoral heads' centres.

    Heads are looked for in CT only. One part missing: the other alone, said in `fallback`.

    Raises:
        NotLocated: naming the case, if neither part is found.
    """
    seen = coarse_mask(network, prepared, coarse_mm)
    rough = centroid(seen)
    sought = case.modality == "CT"
    heads = femoral_heads(case.image) if sought else FemoralHeads(reason="MR: no femoral heads are sought")
    heads_centre = None if heads.left is None else tuple(np.mean([heads.left, heads.right], axis=0).tolist())
    parts = [part for part in (rough, heads_centre) if part is not None]
    if not parts:
        raise NotLocated(
            f"case {case.case_id}: the prostate cannot be located: the coarse mask is empty, and there are no "
            f"femoral heads ({heads.reason}). Check its field of view and intensities, or train stage 1 longer."
        )
    fallback = ""
    if rough is None:
        fallback = "heads alone: the coarse mask is empty"
    elif heads_centre is None:
        fallback = f"coarse centre alone: {heads.reason}"
    # as regions.csv holds it: the same region, to the voxel, when it is cut again
    centre = tuple(np.mean(parts, axis=0).round(4).tolist())
    return Location(centre, rough, heads_centre, fallback, box_corners(seen))
