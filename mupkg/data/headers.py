"""Headers of NIfTI, MHA, MHD and NRRD, checked before ITK sees them.

A malformed header can crash ITK, and what is missing ITK replaces without a word: 1 mm, an origin of 0, no rotation.
"""

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
from scipy.spatial.transform import Rotation

AGAIN = "copy or export it again"
MOST_VOXELS = 2**30  # in one file; what claims more is broken, or no scan of a pelvis
MOST_PER_BYTE = 1100  # voxels a stored byte may stand for; deflate can pack no tighter
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, NotImplementedError)
MALFORMED += (struct.error, zlib.error)  # what reading a malformed header raises

META_DIMENSIONS = 10  # ITK has room for so many
META_LINE, NRRD_LINE = r"([^=:]+)[=:](.*)", r"#.*|[^:]*:=.*|([^:]{,99}): (.{,999})"  # a longer one crashes ITK
META_SAME = {
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "Position": "Offset",
    "Origin": "Offset",
}
META_NUMBERS = {"TransformMatrix": 2, "ElementNumberOfChannels": 0}  # how many: NDims to this power
META_NUMBERS |= dict.fromkeys(("DimSize", "ElementSpacing", "ElementSize", "Offset", "CenterOfRotation"), 1)
META_WORDS = {"BinaryData": ("True",), "CompressedData": ("False", "True"), "HeaderSize": ("0", "-1")}
META_WORDS |= {"DistanceUnits": ("mm",)}  # ITK takes all numbers for mm
NRRD_SPACES = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las")
NIFTI_1 = {"dim": (40, "8h"), "bitpix": (72, "h"), "pixdim": (76, "8f"), "vox_offset": (108, "f")}  # from which byte
NIFTI_1 |= {"units": (123, "B"), "codes": (252, "2h"), "qform": (256, "6f"), "sform": (280, "12f")}
NIFTI_2 = {"dim": (16, "8q"), "bitpix": (14, "h"), "pixdim": (104, "8d"), "vox_offset": (168, "q")}
NIFTI_2 |= {"units": (500, "i"), "codes": (344, "2i"), "qform": (352, "6d"), "sform": (400, "12d")}
NIFTI_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by the code of its units; most programs write 0, unknown


class Fault(ValueError):
    """What is wrong with a file and the way out; `named` says with which file."""

    def __init__(self, fault: str, cure: str = AGAIN):
        super().__init__(f"{fault}; {cure}")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What is wrong with a file inside the block becomes a ValueError that names it."""
    try:
        yield
    except Fault as error:
        raise ValueError(f"{path}: {error}") from error
    except MALFORMED as error:
        raise ValueError(f"{path}: cannot be read as an image ({error!r}); {AGAIN}") from error


def check_claim(size: Sequence[int], stored: int) -> None:
    """Fault if so many voxels cannot lie in so many bytes; before memory is asked for them."""
    if not 0 < math.prod(size) <= min(MOST_VOXELS, stored * MOST_PER_BYTE):
        raise Fault(f"claims {' x '.join(map(str, size))} voxels, which it cannot hold")


def _fields(header: bytes, pattern: str, needed: Sequence[str]) -> dict[str, str]:
    """The lines of a header by their keys; Fault if one is malformed, told twice, or needed and not there."""
    fields: dict[str, str] = {}
    for line in filter(str.strip, header.decode("latin-1").split("\n")):
        match = re.fullmatch(pattern, line.strip())
        key = match and match[1] and META_SAME.get(match[1].strip(), match[1].replace(" ", ""))
        if match is None or key in fields:
            raise Fault(f"the line {line[:80]!r} of its header is malformed, or says again what another line says")
        if key is not None:
            fields[key] = match[2].strip()
    for key in needed:
        if key.replace(" ", "") not in fields:
            raise Fault(f"its header has no line `{key}`", f"{AGAIN}, or add the line if you know what it must say")
    return fields


def meta_voxels(path: Path, start: bytes) -> tuple[Path, int, bool]:
    """Where an MHA or MHD has its voxels, from which byte on, and whether packed, if its header is in order."""
    end = re.search(rb"^ElementDataFile[ \t]*[=:][^\r\n]*\r?(\n|\Z)", start, re.MULTILINE)
    spacing = "ElementSize" if b"ElementSize" in start and b"ElementSpacing" not in start else "ElementSpacing"
    needed = ("ElementDataFile", "NDims", "DimSize", spacing, "TransformMatrix", "Offset")
    fields = _fields(start[: end.end()] if end else b"", META_LINE, needed)
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
    if (path.suffix.lower() == ".mha") != (file == "LOCAL") or file.startswith("LIST") or "%" in file:
        raise Fault(f"its ElementDataFile is {file}: a .mha holds its voxels (LOCAL), a .mhd names their file")
    voxels, begin = (path, end.end()) if file == "LOCAL" else (path.parent / file, 0)
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
    if units := set(re.findall('"([^"]*)"', fields.get("units", "") + fields.get("spaceunits", ""))) - {"mm", ""}:
        raise Fault(f"its units are {', '.join(units)}, not mm", "export it again in mm")
    if fields["encoding"] not in ("raw", "gzip", "gz"):
        raise Fault(f"its encoding is {fields['encoding']}, not raw or gzip")
    if elsewhere := {"datafile", "lineskip", "byteskip"} & set(fields):
        raise Fault(f"its header has the line `{elsewhere.pop()}`, so its voxels lie elsewhere")
    return end.end(), fields["encoding"] != "raw"


def nifti_affines(start: bytes) -> tuple[int, dict[str, np.ndarray]]:
    """How many bytes an unpacked NIfTI must have, and all that places its voxels: affines (see `geometry`) by name."""
    header = zlib.decompressobj(47).decompress(start, 1024) if start.startswith(b"\x1f\x8b") else start
    second = header[4:7] == b"n+2"
    if not second and header[344:347] != b"n+1":
        raise Fault("lacks the mark of NIfTI, so its orientation is unknown", "export it again")
    order = "<" if header[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
    layout = NIFTI_2 if second else NIFTI_1
    told = {key: np.array(struct.unpack_from(order + kind, header, at)) for key, (at, kind) in layout.items()}
    spacing, (qcode, scode), (unit,) = told["pixdim"][1:4], told["codes"], told["units"] % 8
    if not all(0 < mm < math.inf for mm in spacing):  # ITK would take 1 mm
        raise Fault(f"its spacing is {tuple(spacing.tolist())} mm", "export it again with a positive one")
    if unit not in NIFTI_MM:
        raise Fault(f"its units (code {unit}) are none that NIfTI knows")
    affines = {}
    if scode > 0:
        affines["sform"] = np.reshape(told["sform"], (3, 4))
        scales = np.linalg.norm(affines["sform"][:, :3], axis=0)
        affines["pixdim"] = affines["sform"] / [*scales, 1] * [*spacing, 1]
    if qcode > 0:
        handed = {-1: -1, 0: 1, 1: 1}[told["pixdim"][0]]  # 0 is read as 1, as the standard has it
        bcd = told["qform"][:3]
        rotation = Rotation.from_quat([*bcd, math.sqrt(max(0, 1 - bcd @ bcd))]).as_matrix()
        affines["qform"] = np.c_[rotation * spacing * [1, 1, handed], told["qform"][3:]]
    if not affines:
        raise Fault("does not say where its voxels lie (qform_code and sform_code are 0)", "write it with its affine")
    mm = NIFTI_MM[unit] * np.array([[-1], [-1], [1]])  # NIfTI's x and y lead to the right and to the front
    needed = math.prod(told["dim"][1 : told["dim"][0] + 1].tolist()) * told["bitpix"][0] // 8 + told["vox_offset"][0]
    return int(needed), {name: np.vstack([affine * mm, [0, 0, 0, 1]]) for name, affine in affines.items()}


def unpacked_size(file: BinaryIO) -> int:
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
