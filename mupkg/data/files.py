"""Scans read and written: a damaged file is refused by name, and none is left half-written."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from mupkg.data.headers import check_nifti, meta_voxels, nrrd_voxels, unpacked_size
from mupkg.data.writing import whole_file

TWO_FILES = (".mhd", ".nhdr", ".hdr", ".img")  # a header and its voxels apart: never whole at one stroke
UNCHECKED = TWO_FILES[1:]  # ITK reads the missing end of such a pair as zeros
UNEVEN_SLICES = 0.1  # of the slice distance; more means that slices are missing
MOST_VOXELS = 2**30  # in one file; what claims more is broken, or no scan of a pelvis
MOST_PER_BYTE = 1100  # voxels a stored byte may stand for; deflate can pack no tighter
LONGEST_AXIS = 10.0  # of a direction's numbers, which should be no larger than 1
HEADER_BYTES = 2**20  # read of a file to see its header


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
    with readable(path):
        if path.is_dir():
            return _read_dicom(path)
        if not path.is_file():
            raise ValueError(f"{path}: cannot be read as an image (there is no such file); check its name")
        try:
            _check_file(path)
            image = sitk.ReadImage(str(path))
        except RuntimeError as error:
            reason = _reason(error)
            raise ValueError(f"{path}: cannot be read as an image ({reason}); copy or export it again") from error
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


def closed(path: str | Path, error: OSError) -> str:
    """What to tell of a file or folder that may not be read."""
    return f"{path}: cannot be read ({error.strerror or error}); give yourself read permission"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A missing permission inside the block becomes a ValueError that names the file and says so."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(closed(error.filename or path, error)) from error


def _check_file(path: Path) -> None:
    """What ITK passes over: it reads damaged files with voxels of 0, guesses a missing spacing, trusts any size."""
    name = path.name.lower()
    if name.removesuffix(".gz").endswith(UNCHECKED):
        raise ValueError(f"{path}: is one of two files, header and voxels apart; convert them to one .nii.gz or .mha")
    nifti = name.endswith((".nii", ".nii.gz"))
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    voxels, begin, packed = path, 0, start.startswith(b"\x1f\x8b")
    try:  # ITK trusts these headers: a wrong one can crash the process
        if meta := name.endswith((".mha", ".mhd")):
            voxels, begin, packed = meta_voxels(path, start)
        elif name.endswith(".nrrd") or start.startswith(b"NRRD"):
            begin, packed = nrrd_voxels(start)
    except (KeyError, ValueError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        fault = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: cannot be read as an image (its header: {fault}); copy or export it again"
        ) from error
    reader = _header([path], path.stat().st_size + (0 if voxels == path else voxels.stat().st_size))
    if not all(0 < spacing < math.inf for spacing in reader.GetSpacing()[:3]):
        raise ValueError(f"{path}: its spacing is {reader.GetSpacing()} mm; export it again with a positive one")
    if any(abs(axis) > LONGEST_AXIS for axis in reader.GetDirection()):  # ITK would never come back
        raise ValueError(f"{path}: its axes are {reader.GetDirection()}, which no scan has; copy or export it again")
    if start[128:132] == b"DICM" and reader.GetSize()[2:] in ((), (1,)):
        raise ValueError(f"{path}: is one slice of a DICOM series; give the folder of the series")
    needed, held = 0, voxels.stat().st_size - begin
    if nifti:
        sizes = [int(reader.GetMetaData(f"dim[{axis}]")) for axis in range(1, 1 + int(reader.GetMetaData("dim[0]")))]
        needed = math.prod(sizes) * int(reader.GetMetaData("bitpix")) // 8 + int(reader.GetMetaData("vox_offset"))
    elif packed or meta:
        needed = _bytes_of(reader)
    try:
        if nifti:
            check_nifti(path, zlib.decompressobj(47).decompress(start, 1024) if packed else start)
        if packed:
            with voxels.open("rb") as file:
                file.seek(begin)
                held = unpacked_size(file)
    except zlib.error as error:
        raise ValueError(f"{voxels}: is damaged ({error}); copy or export it again") from error
    if held < needed:
        what = f"cut short, {held} of {needed} bytes are there"
        raise ValueError(f"{voxels}: cannot be read as an image ({what}); copy or export it again")


def _header(files: Sequence[Path], stored: int) -> sitk.ImageFileReader:
    """The header of the first of files that make a volume together; ValueError if they cannot hold what it claims."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(files[0]))
    reader.ReadImageInformation()
    voxels = math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * len(files)
    if not 0 < voxels <= min(MOST_VOXELS, stored * MOST_PER_BYTE):
        sizes = " x ".join(map(str, reader.GetSize()))
        raise ValueError(f"{files[0]}: claims {sizes} voxels, which it cannot hold; copy or export it again")
    return reader


def _bytes_of(reader: sitk.ImageFileReader) -> int:
    """Bytes that the voxels of this header take, unpacked."""
    one = sitk.Image([1] * reader.GetDimension(), reader.GetPixelID(), reader.GetNumberOfComponents())
    return math.prod(reader.GetSize()) * one.GetNumberOfComponentsPerPixel() * one.GetSizeOfPixelComponent()


def _read_dicom(folder: Path) -> sitk.Image:
    for path in folder.iterdir():  # GDCM passes over what it may not read
        if path.is_file():
            path.open("rb").close()
    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = f"holds {len(series)} DICOM series: {', '.join(series)}" if series else "holds no DICOM series"
        raise ValueError(f"{folder}: {found}; give a folder with exactly one image series")
    names = reader.GetGDCMSeriesFileNames(str(folder), series[0])
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        _header([Path(name) for name in names], sum(Path(name).stat().st_size for name in names))
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
