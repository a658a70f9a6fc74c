"""What the tissues of a CT measure: mean, noise and its grain, by one estimator for real scans and phantoms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import SimpleITK as sitk
from scipy import ndimage

from mupkg.scans.cases import BODY_HU

TREND_MM = 9.0  # structure slower than this (Gaussian sigma) is anatomy and is taken off before noise is measured
FAT_WINDOW_HU = (-130.0, -70.0)
MUSCLE_WINDOW_HU = (20.0, 80.0)


def fat_and_muscle(image: sitk.Image) -> dict[str, np.ndarray]:
    """Pure fat and pure muscle of a CT, by intensity: boolean arrays (z, y, x) named "fat" and "muscle".

    Body voxels whose surroundings (median of 3 x 3 x 3) lie in the tissue's window of HU, eroded by one voxel so
    that no voxel shares an edge with another tissue. Nothing but the image is used, so that it works alike on a
    real scan and a phantom. "muscle" holds every soft tissue of that density.
    """
    smooth = ndimage.median_filter(sitk.GetArrayViewFromImage(image).astype(np.float32), 3)
    body = ndimage.binary_erosion(ndimage.binary_fill_holes(smooth > BODY_HU), iterations=2)
    windows = {"fat": FAT_WINDOW_HU, "muscle": MUSCLE_WINDOW_HU}
    return {
        name: ndimage.binary_erosion(body & (smooth > low) & (smooth < high), ndimage.generate_binary_structure(3, 1))
        for name, (low, high) in windows.items()
    }


def tissue_statistics(image: sitk.Image, regions: dict[str, np.ndarray]) -> pd.DataFrame:
    """Mean, noise and correlation length of each region of a CT; one row a region.

    Columns: `voxels`; `mean_hu`; `noise_hu`, the standard deviation after the slow trend (a Gaussian mean of
    `TREND_MM`, in plane, within the region) is taken off; `correlation_mm`, the in-plane distance at which the
    autocorrelation of that residual falls to 1/e (pairs of voxels within the region, mean of both in-plane axes,
    linear interpolation between lags). An empty region gives NaN. Compare scans on the same voxel size only:
    noise and its grain depend on it. `regions` maps a name to a boolean array (z, y, x) on the image's grid.
    """
    hu = sitk.GetArrayViewFromImage(image).astype(np.float64)
    spacing = np.array(image.GetSpacing()[::-1])
    rows = {}
    for name, region in regions.items():
        if region.shape != hu.shape:
            raise ValueError(f"region {name!r} has shape {region.shape}, the image has {hu.shape}")
        if not region.any():
            rows[name] = {"voxels": 0, "mean_hu": np.nan, "noise_hu": np.nan, "correlation_mm": np.nan}
            continue
        box = ndimage.find_objects(region.astype(np.uint8))[0]
        inside, values = region[box], hu[box]
        mean = values[inside].mean()
        sigma = (0.0, *(TREND_MM / spacing[1:]))
        weight = ndimage.gaussian_filter(inside.astype(np.float64), sigma, mode="constant")
        trend = ndimage.gaussian_filter(np.where(inside, values - mean, 0.0), sigma, mode="constant")
        residual = np.where(inside, values - mean - trend / np.maximum(weight, 1e-6), 0.0)
        lengths = [_fall_to_1_over_e(residual, inside, axis) * spacing[axis] for axis in (1, 2)]
        rows[name] = {
            "voxels": int(inside.sum()),
            "mean_hu": mean,
            "noise_hu": residual[inside].std(),
            "correlation_mm": float(np.mean(lengths)),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("region")


def _fall_to_1_over_e(residual: np.ndarray, inside: np.ndarray, axis: int) -> float:
    """Lag, in voxels, at which the autocorrelation along `axis` falls to 1/e; NaN if it does not."""
    r, m = np.moveaxis(residual, axis, 0), np.moveaxis(inside, axis, 0)
    before, level = 1.0, np.exp(-1)
    for lag in range(1, len(r)):
        both = m[lag:] & m[:-lag]
        if both.sum() < 2:
            return np.nan
        a, b = r[lag:][both], r[:-lag][both]
        now = float((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))
        if now <= level:
            return lag - 1 + (before - level) / (before - now)
        before = now
    return np.nan
