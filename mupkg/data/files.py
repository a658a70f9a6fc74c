"""Scans read and written: a damaged file is refused by name, and none is left half-written."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk

from mupkg.data.writing import whole_file

TWO_FILES = (".mhd", ".nhdr", ".hdr", ".img")  # a header and its voxels apart: never whole at one stroke
UNEVEN_SLICES = 0.1  # of the slice distance; more means that slices are missing
MOST_VOXELS = 2**30  # in one file; what claims more is broken, or no scan of a pelvis
MOST_PER_BYTE = 1100  # voxels a stored byte may stand for; deflate can pack no tighter


def write_image(image: sitk.Image, path: str | Path, *, compress: bool = True) -> None:
    """Write a volume whole, in the format of the path's ending; one file, so not .mhd but .mha."""
    if Path(path).suffix in TWO_FILES:
        raise ValueError(f"{path}: would be two files; choose .mha, .nrrd or .nii.gz")
    with whole_file(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=compress)
            _check_file(temporary)  # ITK says nothing when a full disk cuts a NIfTI file
        except RuntimeError as error:
            raise OSError(_reason(error)) from error
        except ValueError as error:
            raise OSError("not all of it was written") from error


def read_scan(path: str | Path, *, channel: int | None = None) -> sitk.Image:
    """A 3D scan: a file that SimpleITK reads (NIfTI, MHA, MHD, NRRD, ...), or a folder with one DICOM series.

    Args:
        channel: which volume of a 4D file to take (Decathlon's prostate: 0 is T2).

    Raises:
        ValueError: naming the file and the way out, if it cannot be read, is damaged or claims more than it holds,
            is not a 3D scalar volume, or if the folder holds no series or several.
    """
    path = Path(path)
    if path.is_dir():
        return _read_dicom(path)
    if not path.is_file():
        raise ValueError(f"{path}: cannot be read as an image (there is no such file); check its name")
    try:
        _check_file(path)
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read as an image ({_reason(error)}); copy or export it again") from error
    if image.GetDimension() == 4 and channel is not None:
        if not 0 <= channel < image.GetSize()[3]:
            last = image.GetSize()[3] - 1
            raise ValueError(f"{path}: has {last + 1} channels, no channel {channel}; choose one from 0 to {last}")
        image = sitk.Extract(image, [*image.GetSize()[:3], 0], [0, 0, 0, channel])
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"{path}: {image.GetDimension()}D with {image.GetNumberOfComponentsPerPixel()} component(s) per voxel; "
            "a 3D scalar volume is needed (for a 4D file, choose a channel)"
        )
    return image


def _reason(error: RuntimeError) -> str:
    """ITK's last line that says something; its "Reason: No such file" is often of another file."""
    lines = [line for line in str(error).strip().splitlines() if line.strip() and not line.startswith("Reason:")]
    return lines[-1].strip() if lines else str(error)


def _check_file(path: Path) -> None:
    """What ITK passes over: it reads damaged files with voxels of 0, guesses a missing spacing, trusts any size."""
    reader = _header([path])
    if not all(0 < spacing < math.inf for spacing in reader.GetSpacing()[:3]):
        raise ValueError(f"{path}: its spacing is {reader.GetSpacing()} mm; export it again with a positive one")
    needed, held = 0, path.stat().st_size
    nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    if nifti:
        sizes = [int(reader.GetMetaData(f"dim[{axis}]")) for axis in range(1, 1 + int(reader.GetMetaData("dim[0]")))]
        needed = math.prod(sizes) * int(reader.GetMetaData("bitpix")) // 8 + int(reader.GetMetaData("vox_offset"))
    with path.open("rb") as file:
        start = file.read(2**16)
        packed = None if path.suffix.lower() in TWO_FILES else _packed_from(start)
        try:
            if nifti:
                _check_nifti(path, start if packed is None else zlib.decompressobj(47).decompress(start, 1024))
            if packed is not None:
                file.seek(packed)
                held = _unpacked_size(file)
        except zlib.error as error:
            raise ValueError(f"{path}: is damaged ({error}); copy or export it again") from error
    if held < needed:
        raise ValueError(f"{path}: is cut short, {held} of {needed} bytes are there; copy or export it again")


def _header(files: Sequence[Path]) -> sitk.ImageFileReader:
    """The header of the first of files that make a volume together; ValueError if they cannot hold what it claims."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(files[0]))
    reader.ReadImageInformation()
    voxels = math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * len(files)
    stored = sum(file.stat().st_size for file in files)
    apart = files[0].suffix.lower() in TWO_FILES
    if not 0 < voxels <= (MOST_VOXELS if apart else min(MOST_VOXELS, stored * MOST_PER_BYTE)):
        sizes = " x ".join(map(str, reader.GetSize()))
        raise ValueError(f"{files[0]}: claims {sizes} voxels, which it cannot hold; copy or export it again")
    return reader


def _check_nifti(path: Path, header: bytes) -> None:
    second = header[4:7] in (b"n+2", b"ni2")
    if not second and header[344:347] not in (b"n+1", b"ni1"):
        raise ValueError(f"{path}: lacks the mark of NIfTI, so its orientation is unknown; export it again")
    order = "<" if header[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
    spacing = struct.unpack_from(f"{order}3{'d' if second else 'f'}", header, 112 if second else 80)
    if not all(0 < s < math.inf for s in spacing):  # ITK would take 1 mm
        raise ValueError(f"{path}: its spacing is {spacing} mm; export it again with a positive one")


def _packed_from(start: bytes) -> int | None:
    """Where the packed voxels of a file begin, seen from its first bytes: .gz, .mha and .nrrd; None if unpacked."""
    if start.startswith(b"\x1f\x8b"):
        return 0
    packed = re.match(rb"NRRD.*?\nencoding: *gz.*?\r?\n\r?\n", start, re.DOTALL)
    if b"CompressedData = True" in start:
        packed = re.search(rb"\nElementDataFile *= *LOCAL\r?\n", start)
    return packed.end() if packed else None


def _unpacked_size(file: BinaryIO) -> int:
    """Bytes in a zlib stream or in gzip members, from here on; zlib.error if they are cut or a checksum is wrong."""
    size, unpacker = 0, zlib.decompressobj(47)  # 47: either kind
    while chunk := file.read(2**16):  # so no more than 72 MB at once
        size += len(unpacker.decompress(chunk))
        while unpacker.eof and unpacker.unused_data.startswith(b"\x1f\x8b"):
            left, unpacker = unpacker.unused_data, zlib.decompressobj(47)
            size += len(unpacker.decompress(left))
    if not unpacker.eof:
        raise zlib.error("it is cut short")
    return size


def _read_dicom(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = f"holds {len(series)} DICOM series: {', '.join(series)}" if series else "holds no DICOM series"
        raise ValueError(f"{folder}: {found}; give a folder with exactly one image series")
    names = reader.GetGDCMSeriesFileNames(str(folder), series[0])
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        _header([Path(name) for name in names])
        image = reader.Execute()
    except RuntimeError as error:
        raise ValueError(f"{folder}: its DICOM series cannot be read ({_reason(error)}); copy it again") from error
    if image.HasMetaDataKey("ITK_non_uniform_sampling_deviation"):  # ITK only warns and stretches the slice distance
        origins = [reader.GetMetaData(z, "0020|0032").split("\\") for z in range(image.GetSize()[2])]
        gaps = np.linalg.norm(np.diff(np.array(origins, float), axis=0), axis=1)
        if np.ptp(gaps) > UNEVEN_SLICES * np.median(gaps):
            raise ValueError(
                f"{folder}: its slices are not evenly spaced, some may be missing; copy the series again"
            )
    return image
