"""Headers of NIfTI, MHA, MHD and NRRD, checked before ITK sees them.

A malformed header can crash ITK, and what is missing ITK replaces without a word: 1 mm, an origin of 0, no rotation.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from pydicom.errors import BytesLengthException, InvalidDicomError
from scipy.spatial.transform import Rotation

AGAIN = "copy or export it again"
WITH_AFFINE = "save it with the right affine (nibabel.Nifti1Image(voxels, affine)), or convert its DICOM series again"
MALFORMED = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)
MALFORMED += (NotImplementedError, zlib.error, BytesLengthException, InvalidDicomError)  # what bad headers raise

META_DIMENSIONS = 10  # ITK has room for so many
META_SAME = {"Rotation": "TransformMatrix", "Orientation": "TransformMatrix"}
META_SAME |= {"Position": "Offset", "Origin": "Offset"}
META_NEEDED = ("NDims", "DimSize", "ElementSpacing", "TransformMatrix", "Offset")
META_NUMBERS = {"TransformMatrix": 2, "ElementNumberOfChannels": 0}  # how many: NDims to this power
META_NUMBERS |= dict.fromkeys(("DimSize", "ElementSpacing", "ElementSize", "Offset", "CenterOfRotation"), 1)
META_WORDS = {"BinaryData": ("True",), "CompressedData": ("False", "True"), "HeaderSize": ("0", "-1")}
META_WORDS |= {"DistanceUnits": ("mm",)}  # ITK takes all numbers for mm
NRRD_SPACES = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las")
META_LINE, NRRD_LINE = r"([^=:]+)[=:](.*)", r"#.*|[^:]*:=.*|([^:]{,99}): (.{,999})"  # a longer one crashes ITK
NIFTI_FLOATS = {16: "f4", 64: "f8"}  # by the code of its type
NIFTI = {"dim": (40, "8h"), "type": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f")}
NIFTI |= {"vox_offset": (108, "f"), "units": (123, "B"), "codes": (252, "2h"), "qform": (256, "6f")}
NIFTI |= {"sform": (280, "12f")}  # from which byte, and of what kind
NIFTI_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by the code of its units; most programs write 0, unknown


class Fault(ValueError):
    """What is wrong with a file and the way out; `named` says with which file."""

    def __init__(self, fault: str, cure: str = AGAIN):
        super().__init__(f"{fault}; {cure}")


@contextmanager
def named(path: Path, kind: str = "an image") -> Iterator[None]:
    """What is wrong with a file inside the block becomes a ValueError that names it."""
    try:
        yield
    except Fault as error:
        raise ValueError(f"{path}: {error}") from error
    except PermissionError:
        raise
    except MALFORMED as error:
        raise ValueError(f"{path}: cannot be read as {kind} ({type(error).__name__}: {error}); {AGAIN}") from error


def _fields(header: bytes, pattern: str, needed: Sequence[str]) -> dict[str, str]:
    """The lines of a header by their keys; Fault if one is malformed, told twice, or needed and not there."""
    fields: dict[str, str] = {}
    for line in filter(str.strip, header.decode("latin-1").split("\n")):
        match = re.fullmatch(pattern, line.strip())
        key = match and match[1] and META_SAME.get(match[1].strip(), match[1].replace(" ", ""))
        if match is None or key in fields:
            raise Fault(f"the line {line[:80]!r} of its header is malformed, or repeats another one")
        if key is not None:
            fields[key] = match[2].strip()
    for key in needed:
        if key.replace(" ", "") not in fields:
            raise Fault(f"its header has no line `{key}`", f"{AGAIN}, or add the line if you know what it must say")
    return fields


def meta_voxels(path: Path, start: bytes) -> tuple[Path, int, bool]:
    """Where an MHA or MHD has its voxels, from which byte on, and whether packed, if its header is in order."""
    end = re.search(rb"^ElementDataFile[ \t]*[=:][^\r\n]*\r?(\n|\Z)", start, re.MULTILINE)
    if end is None:
        raise Fault("cannot be read as an image: no line `ElementDataFile` ends its header")
    fields = _fields(start[: end.end()], META_LINE, META_NEEDED)
    n, file = int(fields["NDims"]), fields["ElementDataFile"]
    if not 1 <= n <= META_DIMENSIONS:
        raise Fault(f"its NDims is {n}")
    for key, power in META_NUMBERS.items():
        if key in fields and len([float(number) for number in fields[key].split()]) != n**power:
            raise Fault(f"its {key} does not hold {n**power} number(s)")
    if not all(size.isdecimal() and int(size) > 0 for size in fields["DimSize"].split()):
        raise Fault(f"its DimSize is {fields['DimSize']}")
    for key, allowed in META_WORDS.items():
        if fields.get(key, allowed[0]) not in allowed:
            raise Fault(f"its {key} is {fields[key]}, not {' or '.join(allowed)}")
    voxels, begin = (path, end.end()) if file == "LOCAL" else (path.parent / file, 0)
    if (path.suffix.lower() == ".mha") != (file == "LOCAL") or "%" in file or file.startswith("LIST"):
        raise Fault(f"its ElementDataFile is {file}: a .mha holds its voxels (LOCAL), a .mhd names their file")
    packed, size = fields.get("CompressedData") == "True", str(voxels.stat().st_size - begin)
    if packed and fields.get("CompressedDataSize", size if begin == 0 else "missing") != size:  # as ITK needs it
        raise Fault(f"its CompressedDataSize is not {size}, the bytes there are in {voxels.name}")
    return voxels, begin, packed


def nrrd_voxels(start: bytes) -> tuple[int, bool]:
    """From which byte on a NRRD has its voxels, and whether packed, if its header is in order."""
    end = re.search(rb"\r?\n\r?\n", start)
    if end is None or not start.startswith(b"NRRD"):
        raise Fault("does not begin with NRRD, or no empty line ends its header")
    lines = start[: end.start()].lower().partition(b"\n")[2]
    fields = _fields(lines, NRRD_LINE, ("encoding", "space", "space directions", "space origin"))
    if fields["space"] not in NRRD_SPACES:
        raise Fault(f"its space is {fields['space']}, not one of {', '.join(NRRD_SPACES)}", "export it again")
    if fields["spacedirections"].count("(") < 3:
        raise Fault(f"its space directions are {fields['spacedirections']}, not those of three axes")
    if units := set(re.findall('"([^"]*)"', fields.get("units", "") + fields.get("spaceunits", ""))) - {"mm", ""}:
        raise Fault(f"its units are {', '.join(units)}, not mm", "export it again in mm")
    if fields["encoding"] not in ("raw", "gzip", "gz"):
        raise Fault(f"its encoding is {fields['encoding']}, not raw or gzip")
    if elsewhere := {"datafile", "lineskip", "byteskip"} & set(fields):
        raise Fault(f"its header has the line `{elsewhere.pop()}`, so its voxels lie elsewhere")
    return end.end(), fields["encoding"] != "raw"


class Floats(NamedTuple):
    """Where one volume of floats lies in a file, in bytes when unpacked."""

    dtype: np.dtype
    begin: int
    size: int


def nifti_affines(start: bytes, channel: int) -> tuple[list[int], int, dict[str, np.ndarray], Floats | None]:
    """A NIfTI's size, its bytes when unpacked, and all that places its voxels: affines (see `geometry`) by name.

    And where the volume of a channel lies if it is of floats.
    """
    header = zlib.decompressobj(47).decompress(start, 1024) if start.startswith(b"\x1f\x8b") else start
    if header[344:347] != b"n+1":
        raise Fault("cannot be read as an image: it lacks the mark of NIfTI-1", f"{AGAIN}, in this format")
    order = "<" if header[:4] == struct.pack("<i", 348) else ">"
    fields = {key: np.array(struct.unpack_from(order + kind, header, at)) for key, (at, kind) in NIFTI.items()}
    spacing, (qcode, scode), unit, affines = fields["pixdim"][1:4], fields["codes"], fields["units"][0] % 8, {}
    if scode > 0:
        affines["sform"] = fields["sform"].reshape(3, 4)
        scales = np.linalg.norm(affines["sform"][:, :3], axis=0)
        affines["pixdim"] = affines["sform"] / [*scales, 1] * [*spacing, 1]
    if qcode > 0:
        handed = {-1: -1, 0: 1, 1: 1}.get(fields["pixdim"][0], math.nan)  # 0 stands for 1, as the standard has it
        b, c, d, *origin = fields["qform"]
        rotation = Rotation.from_quat([b, c, d, math.sqrt(max(0.0, 1 - b * b - c * c - d * d))]).as_matrix()
        affines["qform"] = np.c_[rotation * spacing * [1, 1, handed], origin]
    if not affines or unit not in NIFTI_MM or not (spacing.min() > 0 and np.isfinite(spacing).all()):
        fault = f"pixdim {spacing.tolist()}, unit {unit}, qform_code {qcode}, sform_code {scode}"
        raise Fault(f"does not say where its voxels lie ({fault})", WITH_AFFINE)
    mm = NIFTI_MM[unit] * np.array([[-1], [-1], [1]])  # NIfTI's x and y lead to the right and to the front
    size = fields["dim"][1 : fields["dim"][0] + 1].tolist()
    voxel, begin, floats = int(fields["bitpix"][0]) // 8, int(fields["vox_offset"][0]), None
    if kind := NIFTI_FLOATS.get(int(fields["type"][0])):
        volume = math.prod(size[:3]) * voxel
        floats = Floats(np.dtype(order + kind), begin + channel * volume, volume)
    affines = {name: np.vstack([affine * mm, [0, 0, 0, 1]]) for name, affine in affines.items()}
    return size, math.prod(size) * voxel + begin, affines, floats


def unpacked(file: BinaryIO) -> Iterator[bytes]:
    """A zlib stream or gzip members, from here on; zlib.error if they are cut or a checksum is wrong."""
    unpacker = zlib.decompressobj(47)  # 47: either kind
    while chunk := file.read(2**16):  # so no more than 72 MB at once
        yield unpacker.decompress(chunk)
        while unpacker.eof and unpacker.unused_data.startswith(b"\x1f\x8b"):
            left, unpacker = unpacker.unused_data, zlib.decompressobj(47)
            yield unpacker.decompress(left)
    if not unpacker.eof:
        raise zlib.error("it is cut short")


def count_bytes(chunks: Iterable[bytes], floats: Floats | None) -> tuple[int, int]:
    """How many bytes there are, and how many of the floats among them are NaN or infinite."""
    held = wrong = 0
    rest = b""
    for chunk in chunks:
        if floats:
            rest += chunk[max(0, floats.begin - held) : max(0, floats.begin + floats.size - held)]
            whole = len(rest) - len(rest) % floats.dtype.itemsize
            wrong += np.count_nonzero(~np.isfinite(np.frombuffer(rest[:whole], floats.dtype)))
            rest = rest[whole:]
        held += len(chunk)
    return held, wrong
