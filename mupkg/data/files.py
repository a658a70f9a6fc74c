"""Files that are whole or not there, and scans read and written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

TWO_FILES = (".mhd", ".nhdr", ".hdr", ".img")  # a header and its voxels apart: never whole at one stroke
UNEVEN_SLICES = 0.1  # of the slice distance; more means that slices are missing


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` only if the block ends well.

    The temporary name keeps the file's ending, because writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_image(image: sitk.Image, path: str | Path, *, compress: bool = True) -> None:
    """Write a volume whole, in the format of the path's ending; one file, so not .mhd but .mha."""
    if Path(path).suffix in TWO_FILES:
        raise ValueError(f"{path}: would be two files; choose .mha, .nrrd or .nii.gz")
    with whole_file(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=compress)


def read_scan(path: str | Path, *, channel: int | None = None) -> sitk.Image:
    """A 3D scan: a file that SimpleITK reads (NIfTI, MHA, MHD, NRRD, ...), or a folder with one DICOM series.

    Args:
        channel: which volume of a 4D file to take (Decathlon's prostate: 0 is T2).

    Raises:
        ValueError: naming the file and the way out, if it cannot be read, is not a 3D scalar volume, or if the
            folder holds no series or several.
    """
    path = Path(path)
    if path.is_dir():
        return _read_dicom(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1] if path.is_file() else "there is no such file"
        raise ValueError(f"{path}: cannot be read as an image ({reason})") from error
    if image.GetDimension() == 4 and channel is not None:
        if not 0 <= channel < image.GetSize()[3]:
            raise ValueError(f"{path}: has {image.GetSize()[3]} channels, no channel {channel}")
        image = sitk.Extract(image, [*image.GetSize()[:3], 0], [0, 0, 0, channel])
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"{path}: {image.GetDimension()}D with {image.GetNumberOfComponentsPerPixel()} component(s) per voxel; "
            "a 3D scalar volume is needed (for a 4D file, choose a channel)"
        )
    return image


def _read_dicom(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = f"holds {len(series)} DICOM series: {', '.join(series)}" if series else "holds no DICOM series"
        raise ValueError(f"{folder}: {found}; give a folder with exactly one image series")
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series[0]))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise ValueError(f"{folder}: its DICOM series cannot be read ({str(error).splitlines()[-1]})") from error
    if image.HasMetaDataKey("ITK_non_uniform_sampling_deviation"):  # ITK only warns and stretches the slice distance
        origins = [reader.GetMetaData(z, "0020|0032").split("\\") for z in range(image.GetSize()[2])]
        gaps = np.linalg.norm(np.diff(np.array(origins, float), axis=0), axis=1)
        if np.ptp(gaps) > UNEVEN_SLICES * np.median(gaps):
            raise ValueError(
                f"{folder}: its slices are not evenly spaced, some may be missing; copy the series again"
            )
    return image
