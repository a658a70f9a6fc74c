"""What ITK trusts in a file's first bytes: headers of MHA, MHD, NRRD and NIfTI, checked before it sees them.

A wrong one can crash the process, or be read as voxels of 0 or of 1 mm.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

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
META_WORDS = {"BinaryData": ("True",), "CompressedData": ("False", "True"), "HeaderSize": ("0", "-1")}


def meta_voxels(path: Path, start: bytes) -> tuple[Path, int, bool]:
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


def nrrd_voxels(start: bytes) -> tuple[int, bool]:
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


def check_nifti(path: Path, header: bytes) -> None:
    second = header[4:7] == b"n+2"
    if not second and header[344:347] != b"n+1":
        raise ValueError(f"{path}: lacks the mark of NIfTI, so its orientation is unknown; export it again")
    order = "<" if header[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
    spacing = struct.unpack_from(f"{order}3{'d' if second else 'f'}", header, 112 if second else 80)
    if not all(0 < s < math.inf for s in spacing):  # ITK would take 1 mm
        raise ValueError(f"{path}: its spacing is {spacing} mm; export it again with a positive one")


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
