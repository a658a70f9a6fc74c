"""Preparing a scan (METHOD.md, "Preparing a scan"): working grid, body crop, intensities to 0..255.

The prepared volume is uint8, so that a cohort is small and can be memory-mapped; the networks see it / 255.
Arrays are (z, y, x) and spacings are given in that order; SimpleITK's own sizes and points are (x, y, z).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import SimpleITK as sitk
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat

from mupkg.scans.cases import BODY_HU, MOST_VOXELS, Case, Point

BODY_GRID_MM = 4.0  # the body's outline is needed to a few mm only
TABLE_OPENING_MM = 12.0  # what is thinner than twice this (table top, sheets, tubes) is not body
ROUNDING = 1e-6  # of a voxel
AIR = 0  # the prepared volume's value outside the scan


def _is_interval(window: tuple[float, float]) -> tuple[float, float]:
    if not window[0] < window[1]:
        raise ValueError("must be (low, high) with low < high")
    return window


HuRange = Annotated[tuple[float, float], AfterValidator(_is_interval)]
CT_WINDOW: HuRange = (-160.0, 240.0)  # reading R1
Extent = Annotated[float, Field(strict=True, gt=0, le=1000)]  # mm; strict: True is no length


class Preparation(BaseModel):
    """How scans are prepared; stored with a cohort and with every trained run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    modality: Literal["CT", "MR"] = "CT"
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)  # working grid (z, y, x)
    channel: int | None = Field(None, ge=0)  # which volume of a 4D file; None: files are 3D
    window_hu: HuRange = CT_WINDOW  # CT window that becomes 0..255 (reading R1)


class Grid(BaseModel):
    """Stage 1's voxel size and the region it hands to stage 2, both in mm."""

    model_config = ConfigDict(allow_inf_nan=False)

    coarse_mm: Extent = 4.0
    region_mm: tuple[Extent, Extent, Extent] = (128.0, 128.0, 128.0)  # edge lengths (z, y, x)


class Prepared(NamedTuple):
    """A scan on the working grid, cropped to the body; image uint8 0..255, label uint8 0/1 or None."""

    image: sitk.Image
    label: sitk.Image | None


def array_spacing(image: sitk.Image) -> tuple[float, float, float]:
    """Voxel size in mm in array order (z, y, x)."""
    return image.GetSpacing()[::-1]


def resample(image: sitk.Image, spacing_mm: Sequence[float], *, label: bool = False) -> sitk.Image:
    """The same physical extent with another voxel size (z, y, x); trilinear, labels nearest neighbour.

    Grids begin at the same outer face; where the sizes do not divide, they end within half a new voxel of each other.
    """
    old, new = np.array(image.GetSpacing()), np.array(spacing_mm[::-1], dtype=float)
    if np.allclose(old, new, rtol=1e-6):
        return image
    size = np.maximum(1, np.round(np.array(image.GetSize()) * old / new)).astype(int)
    grid = sitk.Image(size.tolist(), image.GetPixelID())
    grid.SetSpacing(new.tolist())
    grid.SetDirection(image.GetDirection())
    # the outer faces of both grids coincide, not the centres of their first voxels
    grid.SetOrigin(image.TransformContinuousIndexToPhysicalPoint(((new / old - 1) / 2).tolist()))
    # Voxel centres of a finer grid may lie half a voxel outside the old ones: the nearest value holds there.
    kind = sitk.sitkNearestNeighbor if label else sitk.sitkLinear
    return sitk.Resample(image, grid, sitk.Transform(), kind, useNearestNeighborExtrapolator=True)


def largest_component(mask: sitk.Image) -> sitk.Image:
    """The largest connected component (faces) of a binary image; empty stays empty."""
    return sitk.Equal(sitk.RelabelComponent(sitk.ConnectedComponent(mask), sortByObjectSize=True), 1)


def body_mask(image: sitk.Image, modality: str) -> sitk.Image:
    """The body on a coarse grid: above -400 HU, opened to cut off the table; MR: Otsu of the logarithm."""
    coarse = resample(image, np.maximum(array_spacing(image), BODY_GRID_MM))
    if modality == "MR":
        # Otsu's threshold of the logarithm: on a linear scale the bright spot of an endorectal coil draws it so high
        # that the body falls apart and the prostate with it (seen in 6 of 40 PROMISE12 cases).
        low, high = np.percentile(sitk.GetArrayFromImage(coarse), [0.5, 99.5])
        span = float(high - low)
        lifted = sitk.Clamp(sitk.Cast(coarse, sitk.sitkFloat32) - float(low), sitk.sitkFloat32, 0.0, span)
        return largest_component(sitk.OtsuThreshold(sitk.Log(lifted / max(span, 1e-6) + 0.01), 0, 1))
    body = sitk.Cast(coarse, sitk.sitkFloat32) > BODY_HU  # an unsigned image would wrap the threshold round
    radius = [max(1, round(TABLE_OPENING_MM / s)) for s in coarse.GetSpacing()[:2]] + [0]
    return largest_component(sitk.BinaryMorphologicalOpening(body, radius))


def body_crop(image: sitk.Image, body: sitk.Image) -> sitk.Image:
    """The image cut to the body's bounding box; the whole image if there is no body to be seen."""
    corners = box_corners(body)
    if corners is None:
        return image
    low, high = (np.array(image.TransformPhysicalPointToContinuousIndex(c)) for c in corners)
    # A face that lies on a voxel's own, but for rounding, takes no further voxel in.
    start = np.clip(np.floor(low + 0.5 + ROUNDING), 0, np.array(image.GetSize()) - 1).astype(int)
    stop = np.clip(np.ceil(high + 0.5 - ROUNDING), start + 1, image.GetSize()).astype(int)
    return sitk.RegionOfInterest(image, (stop - start).tolist(), start.tolist())


def rescale(image: sitk.Image, body: sitk.Image, preparation: Preparation) -> sitk.Image:
    """Intensities to uint8 0..255: a fixed HU window, or for MR the body's 0.5 and 99.5 percentiles."""
    low, high = preparation.window_hu
    if preparation.modality == "MR":
        inside = sitk.GetArrayFromImage(label_on(image, body)) == 1
        values = sitk.GetArrayFromImage(image)
        low, high = np.percentile(values[inside] if inside.any() else values, [0.5, 99.5])
        high = max(high, low + 1e-6)  # a constant image becomes all zero
    scaled = (sitk.Cast(image, sitk.sitkFloat32) - float(low)) * (255.0 / float(high - low))
    return sitk.Cast(sitk.Round(sitk.Clamp(scaled, sitk.sitkFloat32, 0.0, 255.0)), sitk.sitkUInt8)


def prepare(case: Case, preparation: Preparation) -> Prepared:
    """Working grid, body crop and intensities of one case.

    Axes are permuted and flipped to the anatomical order first (an oblique direction is kept: slices stay as
    acquired), so that every network sees every patient the same way round.

    Raises:
        ValueError: naming the case, if the working grid would be larger than any scan needs.
    """
    extent = np.multiply(case.image.GetSize(), case.image.GetSpacing())
    voxels = np.prod(extent) / np.prod(preparation.spacing_mm)
    if not voxels <= MOST_VOXELS:
        raise ValueError(
            f"case {case.case_id}: its {extent.round().tolist()} mm (x, y, z) would take {voxels:.1e} voxels of "
            f"{preparation.spacing_mm} mm (z, y, x); choose a coarser spacing_mm, or mend the scan's own spacing"
        )
    image = resample(sitk.DICOMOrient(case.image, "LPS"), preparation.spacing_mm)
    body = body_mask(image, preparation.modality)
    prepared = body_crop(rescale(image, body, preparation), body)
    if case.label is None:
        return Prepared(prepared, None)
    return Prepared(prepared, label_on(prepared, sitk.DICOMOrient(case.label, "LPS")))


def whole_label(case: Case, preparation: Preparation) -> sitk.Image:
    """A case's label on its working grid before the body crop, to see what the crop has cost."""
    label = sitk.DICOMOrient(case.label, "LPS")
    return label_on(resample(label, preparation.spacing_mm, label=True), label)


def label_on(grid: sitk.Image, label: sitk.Image) -> sitk.Image:
    """A label on another image's grid: the nearest voxel's value, background outside. uint8 0/1."""
    return sitk.Resample(label, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)


def crop_region(prepared: sitk.Image, centre: Point, region_mm: Sequence[float]) -> sitk.Image:
    """The fixed region around a physical point, on the prepared image's own voxels, padded with air.

    Args:
        centre: (x, y, z) in mm. region_mm: edge lengths (z, y, x).
    """
    spacing, direction = prepared.GetSpacing(), prepared.GetDirection()
    size = np.maximum(1, np.round(np.array(region_mm[::-1]) / spacing)).astype(int)
    middle = np.array(prepared.TransformPhysicalPointToContinuousIndex(centre))
    start = np.round(middle - (size - 1) / 2)
    origin, nearest = prepared.TransformContinuousIndexToPhysicalPoint(start.tolist()), sitk.sitkNearestNeighbor
    return sitk.Resample(prepared, size.tolist(), sitk.Transform(), nearest, origin, spacing, direction, AIR)


def to_scan_grid(probability: sitk.Image, scan: sitk.Image) -> sitk.Image:
    """The foreground probability, linearly on the scan's own grid, cut at 0.5; background outside. uint8 0/1."""
    on_scan = sitk.Resample(probability, scan, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    return sitk.Greater(on_scan, 0.5)  # a tie is background, as in argmax


def centroid(mask: sitk.Image) -> Point | None:
    """The foreground's centroid, a physical point (x, y, z) in mm; None if the mask is empty."""
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(sitk.Cast(mask, sitk.sitkUInt8))
    return shape.GetCentroid(1) if shape.HasLabel(1) else None


def box_corners(mask: sitk.Image) -> tuple[Point, Point] | None:
    """Where the foreground's bounding box begins and ends, two physical points (x, y, z) in mm."""
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(sitk.Cast(mask, sitk.sitkUInt8))
    if not shape.HasLabel(1):
        return None
    box = np.array(shape.GetBoundingBox(1))
    ends = (box[:3] - 0.5, box[:3] + box[3:] - 0.5)
    return tuple(mask.TransformContinuousIndexToPhysicalPoint(end.tolist()) for end in ends)
