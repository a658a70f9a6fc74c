"""Scans read and written: a damaged file is refused by name, and none is left half-written."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk

from mupkg.data.writing import whole_file

TWO_FILES = (".mhd", ".nhdr", ".hdr", ".img")  # a header and its voxels apart: never whole at one stroke
UNCHECKED = TWO_FILES[1:]  # ITK reads the missing end of such a pair as zeros
UNEVEN_SLICES = 0.1  # of the slice distance; more means that slices are missing
MOST_VOXELS = 2**30  # in one file; what claims more is broken, or no scan of a pelvis
MOST_PER_BYTE = 1100  # voxels a stored byte may stand for; deflate can pack no tighter
LONGEST_AXIS = 10.0  # of a direction's numbers, which should be no larger than 1
MOST_DIMENSIONS = 10  # in the header of an MHA or MHD; ITK has room for so many
META_NUMBERS = dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), 2)  # key: how often times NDims
META_NUMBERS |= dict.fromkeys(("DimSize", "ElementSpacing", "ElementSize", "Offset", "Position", "Origin"), 1)
META_NUMBERS |= {"CenterOfRotation": 1, "ElementNumberOfChannels": 0}
NRRD_FIELD = re.compile(  # of its specification, without those that lead to another file or skip bytes
    "type|dimension|sizes|spacings|encoding|endian|space|kinds|units|labels|content|min|max|number|centers|centerings|"
    "thicknesses|oldmin|oldmax|axismins|axismaxs|blocksize|sampleunits|spacedimension|spaceunits|spaceorigin|"
    "spacedirections|measurementframe"
)
NRRD_LINE = 1000  # characters of a field; a longer one that is wrong crashes the process
HEADER_BYTES = 2**20  # read of a file to see its header
META_WORDS = {"BinaryData": ("True",), "CompressedData": ("False", "True"), "HeaderSize": ("0", "-1")}


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
            voxels, begin, packed = _meta_voxels(path, start)
        elif name.endswith(".nrrd") or start.startswith(b"NRRD"):
            begin, packed = _nrrd_voxels(start)
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
            _check_nifti(path, zlib.decompressobj(47).decompress(start, 1024) if packed else start)
        if packed:
            with voxels.open("rb") as file:
                file.seek(begin)
                held = _unpacked_size(file)
    except zlib.error as error:
        raise ValueError(f"{voxels}: is damaged ({error}); copy or export it again") from error
    if held < needed:
        what = f"cut short, {held} of {needed} bytes are there"
        raise ValueError(f"{voxels}: cannot be read as an image ({what}); copy or export it again")


def _meta_voxels(path: Path, start: bytes) -> tuple[Path, int, bool]:
    """Where an MHA or MHD has its voxels, from which byte on, and whether packed, if its header is in order."""
    header, end = _meta_header(start)
    dimensions, file = int(header["NDims"]), header["ElementDataFile"]
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"NDims is {dimensions}")
    for key, power in META_NUMBERS.items():
        numbers = header.get(key, "").split()
        if key in header and len([float(number) for number in numbers]) != dimensions**power:
            raise ValueError(f"{key} does not hold {dimensions**power} number(s)")
    if not all(size.isdecimal() and int(size) > 0 for size in header["DimSize"].split()):
        raise ValueError(f"DimSize is {header['DimSize']}")
    if "ElementSpacing" not in header and "ElementSize" not in header:  # ITK would take 1 mm
        raise ValueError("ElementSpacing is missing")
    for key, allowed in META_WORDS.items():
        if header.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} is {header[key]}, not {' or '.join(allowed)}")
    if (path.suffix.lower() == ".mha") != (file == "LOCAL") or file.startswith("LIST") or "%" in file:
        raise ValueError(f"ElementDataFile is {file}: a .mha holds its voxels (LOCAL), a .mhd names their file")
    voxels, begin = (path, end) if file == "LOCAL" else (path.parent / file, 0)
    packed = header.get("CompressedData") == "True"
    size = str(voxels.stat().st_size - begin)
    if packed and header.get("CompressedDataSize", size if begin == 0 else "missing") != size:  # as ITK needs it
        raise ValueError(f"CompressedDataSize is not {size}, the bytes there are in {voxels.name}")
    return voxels, begin, packed


def _meta_header(start: bytes) -> tuple[dict[str, str], int]:
    """The lines `key = value` of an MHA or MHD from its first bytes, and the byte after the last of them."""
    end = re.search(rb"^ElementDataFile[ \t]*[=:][^\r\n]*\r?(\n|\Z)", start, re.MULTILINE)
    if end is None:
        raise ValueError("ElementDataFile is missing")
    header: dict[str, str] = {}
    for line in filter(str.strip, start[: end.end()].decode("latin-1").split("\n")):
        key, *value = re.split("[=:]", line, maxsplit=1)
        if not value or key.strip() in header:
            raise ValueError(f"a line is {line[:80]!r}, not `key = value`, or not once")
        header[key.strip()] = value[0].strip()
    return header, end.end()


def _nrrd_voxels(start: bytes) -> tuple[int, bool]:
    """From which byte on a NRRD has its voxels, and whether packed, if its header is in order."""
    end = re.search(rb"\r?\n\r?\n", start)
    if end is None or not start.startswith(b"NRRD"):
        raise ValueError("it does not begin with NRRD, or an empty line does not end it")
    fields: dict[str, str] = {}
    for line in start[: end.start()].decode("latin-1").split("\n")[1:]:
        if line.startswith("#") or ":=" in line:
            continue
        name, _, value = line.partition(": ")
        name = name.replace(" ", "").lower()
        if not NRRD_FIELD.fullmatch(name) or name in fields or len(value) > NRRD_LINE:
            raise ValueError(
                f"a line is {line[:80]!r}, which one file with all its voxels does not have, or once only"
            )
        fields[name] = value.strip()
    if "spacings" not in fields and "spacedirections" not in fields:  # ITK would take 1 mm
        raise KeyError("spacings")
    if fields["encoding"].lower() not in ("raw", "gzip", "gz"):
        raise ValueError(f"encoding is {fields['encoding']}, not raw or gzip")
    return end.end(), fields["encoding"].lower() != "raw"


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


def _check_nifti(path: Path, header: bytes) -> None:
    second = header[4:7] == b"n+2"
    if not second and header[344:347] != b"n+1":
        raise ValueError(f"{path}: lacks the mark of NIfTI, so its orientation is unknown; export it again")
    order = "<" if header[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
    spacing = struct.unpack_from(f"{order}3{'d' if second else 'f'}", header, 112 if second else 80)
    if not all(0 < s < math.inf for s in spacing):  # ITK would take 1 mm
        raise ValueError(f"{path}: its spacing is {spacing} mm; export it again with a positive one")


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
