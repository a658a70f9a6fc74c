"""Where voxels lie: all that places a voxel must be in the file, agree, and make one grid with right angles.

Points are (x, y, z) in mm in the patient's frame (to the left, the back and the head), as in DICOM and SimpleITK.
An affine is the 4 x 4 matrix that takes a voxel's index (i, j, k, 1) to the point of its centre.
"""

from __future__ import annotations

import itertools
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from pydicom import Dataset, dcmread
from scipy.interpolate import interp1d

AGREE = 0.1  # of a voxel: what is no farther apart lies at the same place
WIDE_GAP = 1.5  # of the usual slice distance: where slices are farther apart, some are missing
SAME_PLACE = 0.25  # of the mean slice distance: closer slices show the same place twice
NO_SCAN = ("RT", "SEG", "SR", "REG", "PR", "KO")  # what the modalities begin with that may lie beside a scan
GROUPS = {  # where an enhanced file keeps what it says of a frame
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
}
EXPORT = "export the series again from the archive, unchanged"


class Series(NamedTuple):
    """A DICOM series: n parallel slices of one size, in order along their normal.

    Their distances may be uneven, and they may lean (a tilted gantry): then positions do not lie along the normal.
    """

    files: list[Path]  # of each slice
    frames: list[int]  # the slice's number in its file, from 0: enhanced files hold several
    uids: list[str]  # SOPInstanceUID of each slice's file
    positions: np.ndarray  # (n, 3): the centre of each slice's first voxel
    distances: np.ndarray  # (n,): mm from the first slice along the normal
    axes: np.ndarray  # (3, 3), unit columns: along a row (to the next column), along a column, the normal
    spacing: tuple[float, float]  # mm from column to column and from row to row
    size: tuple[int, int]  # columns, rows

    @property
    def irregular(self) -> str:
        """Why the slices make no grid as they are, in words; "" if they do."""
        n, reasons = len(self.files), []
        lean = (self.positions[-1] - self.positions[0]) @ self.axes[:, :2]
        if (np.abs(lean) > AGREE * np.array(self.spacing)).any():
            angle = np.degrees(np.arctan2(np.linalg.norm(lean), self.distances[-1]))
            reasons.append(f"its slices lean by {angle:.1f} degrees (a tilted gantry)")
        if np.abs(self.distances * (n - 1) / self.distances[-1] - np.arange(n)).max() > AGREE:
            gaps = np.diff(self.distances)
            reasons.append(f"its slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart")
        return " and ".join(reasons)


def series_geometry(folder: str | Path) -> Series:
    """Where the slices of the one DICOM scan in a folder, or in an enhanced file, lie; read from their headers alone.

    Objects of radiotherapy, segmentations and reports that lie beside it are passed over.

    Raises:
        ValueError: naming the slice and the field, if there is no series or there are several, if slices lack what
            places them, are of another size or orientation, shifted aside, missing, or at the same place.
    """
    folder, series = Path(folder), defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        if path.is_file() and (header := _header(path)) is not None:
            series[str(header.get("SeriesInstanceUID"))].append((path, header))
    if len(series) != 1:
        found = [f"{uid} ({len(files)} files: {files[0][0].name}, ...)" for uid, files in series.items()]
        found = f"holds {len(series)} DICOM series: {', '.join(found)}" if series else "holds no DICOM series"
        raise ValueError(f"{folder}: {found}; give a folder with exactly one image series")
    ((_, files),) = series.items()
    return _in_order(folder, [frame for path, header in files for frame in _frames(path, header)])
