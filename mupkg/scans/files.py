"""Scans read and written: a file is read rightly or refused by name, and none is left half-written."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from mupkg.scans.cases import MOST_VOXELS, CohortError, one_volume
from mupkg.scans.geometry import RESAMPLE, check_affines, dicom_header, image_affine, series_geometry, series_image
from mupkg.scans.headers import AGAIN, Fault, count_bytes, meta_voxels, named, nifti_affines, nrrd_voxels, unpacked
from mupkg.scans.writing import whole_file

TWO_FILES = (".mhd", ".nhdr", ".hdr", ".img")  # a header and its voxels apart: never whole at one stroke
READERS = {".nii": "NiftiImageIO", ".nii.gz": "NiftiImageIO", ".nrrd": "NrrdImageIO"}
READERS |= {".mha": "MetaImageIO", ".mhd": "MetaImageIO"}  # these formats say where voxels lie
HEADER_BYTES = 2**20  # read of a file to see its header


def write_image(image: sitk.Image, path: str | Path, *, compress: bool = True) -> None:
    """Write a volume whole, in the format of the path's ending; one file, so not .mhd but .mha."""
    if Path(path).suffix in TWO_FILES:
        raise ValueError(f"{path}: would be two files; choose .mha, .nrrd or .nii.gz")
    with whole_file(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=compress)
            _checked(temporary)  # ITK says nothing when a full disk cuts a NIfTI file
        except RuntimeError as error:
            raise OSError(_reason(error)) from error
        except ValueError as error:
            raise OSError("not all of it was written, or not numbers alone") from error


def read_scan(path: str | Path, *, channel: int | None = None) -> sitk.Image:
    """A 3D scan: a NIfTI, MHA, MHD or NRRD file, an enhanced DICOM file, or a folder with one DICOM series.

    A series whose slices lean or are unevenly spaced is resampled (see `geometry.series_image`), with a warning.

    Args:
        channel: which volume of a 4D file to take (Decathlon's prostate: 0 is T2).

    Raises:
        ValueError: naming the file and the way out, if it cannot be read, is damaged, claims more than it holds, does
            not say unambiguously where its voxels lie, or is not a 3D scalar volume.
    """
    path = Path(path)
    with access_named(path):
        if not path.exists():
            raise ValueError(f"{path}: cannot be read as an image (there is no such file); check its name")
        try:
            if path.is_dir() or _start(path)[128:132] == b"DICM":
                image = read_series(path)
            else:
                image = _checked(path, channel or 0).Execute()
        except RuntimeError as error:
            cure = RESAMPLE if "orthonormal" in str(error) else AGAIN
            raise ValueError(f"{path}: cannot be read as an image ({_reason(error)}); {cure}") from error
    return one_volume(image, channel, path)


def _reason(error: RuntimeError) -> str:
    """ITK's last line that says something; its "Reason: No such file" is often of another file."""
    lines = [line for line in str(error).strip().splitlines() if line.strip() and not line.startswith("Reason:")]
    return lines[-1].strip() if lines else str(error)


def no_access(path: str | Path, error: OSError) -> str:
    """What to tell of a file or folder that may not be read."""
    return f"{path}: cannot be read ({error.strerror or error}); give yourself read permission"


@contextmanager
def access_named(path: Path) -> Iterator[None]:
    """A missing permission inside the block becomes a ValueError that names the file and says so."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(no_access(error.filename or path, error)) from error


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)


def _checked(path: Path, channel: int = 0) -> sitk.ImageFileReader:
    """A reader of one file whose header is in order, says where its voxels lie, and claims no more than there is.

    ITK checks none of it: it reads what is cut off as voxels of 0, as it does NaN in NIfTI (refused in the volume of
    the channel), and takes a guess for a missing spacing.
    """
    name, start, reader = path.name.lower(), _start(path), sitk.ImageFileReader()
    if name.removesuffix(".gz").endswith(TWO_FILES[1:]):
        raise ValueError(f"{path}: is one of two files, header and voxels apart; convert them to one .nii.gz or .mha")
    reader.SetFileName(str(path))
    reader.SetImageIO(next((io for ending, io in READERS.items() if name.endswith(ending)), ""))
    voxels, begin, packed, needed, affines, floats = path, 0, start.startswith(b"\x1f\x8b"), 0, {}, None
    with named(path), np.errstate(all="ignore"):
        if reader.GetImageIO() == "MetaImageIO":
            voxels, begin, packed = meta_voxels(path, start)
        elif reader.GetImageIO() == "NrrdImageIO":
            begin, packed = nrrd_voxels(start)
        elif reader.GetImageIO() == "NiftiImageIO":
            size, needed, affines, floats = nifti_affines(start, channel)
            check_affines([*size, 1, 1][:3], affines)  # ITK has no words for some faults
        else:
            raise Fault("its format does not say where voxels lie", "convert it to .nii.gz, .mha or .nrrd")
        reader.ReadImageInformation()
        size, spacing = reader.GetSize(), reader.GetSpacing()
        if not 0 < min(spacing[:3]) <= max(spacing[:3]) < math.inf:
            raise Fault(f"its spacing is {spacing} mm", "export it again with a positive one")
        check_affines([*size, 1, 1][:3], affines | {"reading by SimpleITK": image_affine(reader)})
    if not needed:
        pixel = sitk.Image([1] * len(size), reader.GetPixelID(), reader.GetNumberOfComponents())
        needed = math.prod(size) * pixel.GetNumberOfComponentsPerPixel() * pixel.GetSizeOfPixelComponent()
    with voxels.open("rb") as file, named(voxels):
        file.seek(begin)
        held, wrong = voxels.stat().st_size - begin, 0
        if packed or floats:
            held, wrong = count_bytes(unpacked(file) if packed else iter(partial(file.read, 2**20), b""), floats)
    if held < needed or math.prod(size) > MOST_VOXELS:
        claims = f"it claims {' x '.join(map(str, size))} voxels, {needed} bytes; {voxels.name} holds {held} bytes"
        raise ValueError(f"{path}: cannot be read as an image ({claims}); {AGAIN}")
    if wrong:
        raise ValueError(f"{path}: {wrong} voxel(s) in it are NaN or infinite; export the scan again")
    return reader


def read_series(path: Path, files: Iterable[Path] | None = None) -> sitk.Image:
    """The DICOM series in a folder or an enhanced file; GDCM unpacks voxels and applies each file's rescale.

    Args:
        files: those of the series, where the folder holds others too.
    """
    series, reader, voxels = series_geometry(path, files), sitk.ImageFileReader(), {}
    if math.prod(series.size) * len(series.files) > MOST_VOXELS:
        raise ValueError(f"{path}: claims more than {MOST_VOXELS} voxels; copy the series again")
    reader.SetImageIO("GDCMImageIO")
    for file in dict.fromkeys(series.files):
        reader.SetFileName(str(file))
        try:
            voxels[file] = sitk.GetArrayFromImage(reader.Execute()).reshape(-1, *series.size[::-1])
        except RuntimeError as error:
            cure = "copy it again, or export the series again, with its voxels"
            raise ValueError(f"{file}: cannot be read as an image ({_reason(error)}); {cure}") from error
    image = series_image(series, np.stack([voxels[at][k] for at, k in zip(series.files, series.frames, strict=True)]))
    image.SetMetaData("modality", str(dicom_header(series.files[0]).get("Modality") or ""))
    if image.HasMetaDataKey("resampled"):
        why = image.GetMetaData("resampled")
        warnings.warn(f"{path}: {why}; it was resampled onto a grid with right angles", stacklevel=3)
    return image


def files_below(folder: Path, faults: list[str]) -> Iterator[Path]:
    """Every file below a folder, through links too; what may not be read is added to the faults.

    Raises:
        CohortError: if there is no such folder.
    """
    with access_named(folder):
        if not folder.is_dir():
            raise CohortError([f"{folder}: there is no such folder; check its name"])
    walk = os.walk(folder, followlinks=True, onerror=lambda error: faults.append(no_access(error.filename, error)))
    for place, folders, names in walk:
        above = {os.path.realpath(path) for path in (Path(place), *Path(place).parents)}
        folders[:] = [name for name in folders if os.path.realpath(Path(place, name)) not in above]  # no circles
        yield from (Path(place, name) for name in names if not name.startswith("."))  # "._x": a Mac's leftovers
