"""Scans and contours made harder: does a gain hold where it is needed? Not in the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
from jaxtyping import UInt8
from scipy import ndimage

from mupkg.stages.regions import Regions
from mupkg.stages.runs import Shift

NOISE_HU = 40.0  # standard deviation
CONTRAST = 0.7  # of what tissues differ from one another
MIDDLE_HU = 40.0  # muscle stays where it is
SMOOTH_MM = 6.0  # standard deviation of the Gaussian that a contour's error is smoothed with


def check_ct(shifts: Sequence[Shift], modality: str) -> None:
    """ValueError if scans that are no CT shall be shifted: noise and contrast are in HU."""
    if shifts and modality != "CT":
        raise ValueError(f"test_shifts: {', '.join(shifts)} is for CT; these scans are {modality}, so leave it out")


def shifted(image: sitk.Image, shift: Shift, seed: int) -> sitk.Image:
    """A CT with Gaussian noise ("noise"), paler tissues ("contrast"), or slices twice as thick ("thick").

    Args:
        seed: of the noise, above 0: SimpleITK takes 0 for the time of day.
    """
    image = sitk.Cast(image, sitk.sitkFloat32)
    if shift == "noise":
        noise = sitk.AdditiveGaussianNoiseImageFilter()
        noise.SetStandardDeviation(NOISE_HU)
        noise.SetSeed(seed)
        noise.SetNumberOfWorkUnits(1)  # each piece of the image has draws of its own, so that their number would tell
        return noise.Execute(image)
    if shift == "contrast":
        tissue = sitk.Clamp(image, sitk.sitkFloat32, -300.0, 2000.0) - MIDDLE_HU  # air stays air
        return tissue * CONTRAST + MIDDLE_HU + sitk.Clamp(image + 300.0, sitk.sitkFloat32, -2000.0, 0.0)
    return sitk.BinShrink(image, [1, 1, 2])


def redrawn(
    label: UInt8[np.ndarray, "z y x"], spacing_mm: Sequence[float], sd_mm: float, seed: int
) -> UInt8[np.ndarray, "z y x"]:
    """A label as another observer might have drawn it: its contour moves in and out, smoothly.

    To the signed distance from the contour comes a Gaussian random field of standard deviation `sd_mm`, smooth over
    `SMOOTH_MM`; what stays positive is prostate.
    """
    if sd_mm == 0 or not (inside := label == 1).any():  # without noise, no voxel is read from the disk
        return label
    spacing = np.asarray(spacing_mm, float)
    half = spacing.min() / 2  # distances are from voxel centre to voxel centre, and the contour lies between
    outwards = ndimage.distance_transform_edt(~inside, spacing) - half
    distance = np.where(inside, ndimage.distance_transform_edt(inside, spacing) - half, -outwards)
    white = np.random.default_rng(seed).normal(size=label.shape)
    noise = ndimage.gaussian_filter(white, SMOOTH_MM / spacing, mode="wrap")  # as strong at the border as inside
    return (distance + sd_mm * noise / noise.std() > 0).astype(np.uint8)


def redrawn_all(regions: Regions, labels: Sequence[np.ndarray], sd_mm: float, seed: int) -> list[np.ndarray]:
    """The labels of a study's first training regions, redrawn; the same ones where `sd_mm` is 0."""
    cases = zip(regions.ids("train"), labels, strict=False)  # perhaps the first cases alone
    return [
        redrawn(label, regions.spacing_mm(case), sd_mm, seed * 10**5 + n) for n, (case, label) in enumerate(cases)
    ]
