"""Where voxels lie: all that places a voxel must be in the file, agree, and make one grid with right angles.

Points are (x, y, z) in mm in the patient's frame (to the left, the back and the head), as in DICOM and SimpleITK.
An affine is the 4 x 4 matrix that takes a voxel's index (i, j, k, 1) to the point of its centre.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from pydicom import Dataset, dcmread
from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import MediaStorageDirectoryStorage
from scipy.ndimage import affine_transform

from mupkg.scans.cases import RIGHT_ANGLE
from mupkg.scans.headers import MALFORMED, WITH_AFFINE, Fault, named

AGREE = 0.1  # of a voxel: what is no farther apart lies at the same place
WIDE_GAP = 1.5  # of the slices' thickness or usual distance: where slices are farther apart, some are missing
SAME_PLACE = 0.5  # of the mean slice distance: closer slices show the same place twice
MOST_LEAN = 1.5  # from the first to the last slice, against the way along their normal (48 degrees)
MOST_PER_BYTE = 1100  # voxels a stored byte may stand for; no codec packs tighter
FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")  # of DICOM's tags: 2, or 8 where the part on the file itself is missing
LAST_GROUP = 0x0028  # of a header: the image's description; frames, contours and voxels come after it
HEADER = [  # what it takes to tell files apart
    *("SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "PatientID", "StudyDate", "StudyTime"),
    *("Rows", "NumberOfFrames"),
]
NO_SCAN = ("RT", "SEG", "SR", "REG", "PR", "KO")  # begin the modalities of what may lie beside a scan
FIELDS = {"size": "Rows or Columns", "spacing": "PixelSpacing", "directions": "ImageOrientationPatient"}
EXPORT = "export the series again from the archive, with all fields kept"
RESAMPLE = (
    "resample it first (a NIfTI with nibabel.processing.resample_to_output, another file with SimpleITK.Resample; a "
    "label from the nearest voxel), or read its DICOM series"
)


def image_affine(image: sitk.Image | sitk.ImageFileReader) -> np.ndarray:
    """The affine (4, 4) of an image's first three dimensions."""
    affine, n = np.eye(4), image.GetDimension()
    axes, k = np.reshape(image.GetDirection(), (n, n)) * image.GetSpacing(), min(3, n)
    affine[:k, :k], affine[:k, 3] = axes[:k, :k], image.GetOrigin()[:k]
    return affine


def check_affines(size: Sequence[int], affines: dict[str, np.ndarray]) -> None:
    """Fault if what places the voxels of a volume of this size (x, y, z) differs, or has no right angles.

    Args:
        affines: all that places them, by the names under which a person knows them.
    """
    name, first = next(iter(affines.items()))
    spacing = np.linalg.norm(first[:3, :3], axis=0)
    axes = first[:3, :3] / spacing
    if not (np.isfinite([*axes, first[:3, 3]]).all() and abs(np.linalg.det(axes)) > RIGHT_ANGLE):
        raise Fault(f"its axes are {axes.tolist()}, its origin is {first[:3, 3].tolist()}, which no scan has")
    corners = np.array([*itertools.product(*[(0, n - 1) for n in size], [1])]).T

    def apart(affine: np.ndarray) -> float:
        """How far from the first affine another one puts a corner, in voxels."""
        return np.abs(np.linalg.solve(first[:3, :3], (first[:3] - affine[:3]) @ corners)).max()

    left, _, right = np.linalg.svd(axes)  # whose product are the nearest axes with right angles
    if apart(np.c_[left @ right * spacing, first[:3, 3]]) > AGREE:
        raise Fault("its axes are not at right angles (a tilted gantry?)", RESAMPLE)
    for other, affine in affines.items():
        if not (voxels := apart(affine)) <= AGREE:
            raise Fault(f"its {name} and its {other} place a voxel {voxels:.1f} voxels apart", WITH_AFFINE)


class Series(NamedTuple):
    """A DICOM series: n parallel slices of one size, in order along their normal; they may lean, or be uneven."""

    files: list[Path]  # of each slice
    frames: list[int]  # the slice's number in its file, from 0; only enhanced files hold several
    uids: list[str]  # SOPInstanceUID of each slice's file
    positions: np.ndarray  # (n, 3), the centre of each slice's first voxel
    axes: np.ndarray  # (3, 3), unit columns: along a row (from column to column), along a column, the normal
    spacing: tuple[float, float]  # mm from column to column, and from row to row
    size: tuple[int, int]  # columns, rows

    @property
    def distances(self) -> np.ndarray:
        """Millimetres of each slice from the first one along the normal (n,)."""
        return (self.positions - self.positions[0]) @ self.axes[:, 2]


def series_geometry(folder: str | Path, files: Iterable[Path] | None = None) -> Series:
    """Where the slices of the one DICOM series in a folder (or in an enhanced file) lie, from their headers alone.

    Objects of radiotherapy, segmentations and reports beside it are passed over.

    Args:
        files: those of the series, where the folder holds others too.

    Raises:
        ValueError: naming the folder or file, if there is no series or several, if a slice lacks what places it, is
            of another size or orientation, shifted aside or at the place of another one, or if slices are missing.
    """
    folder, series, slices = Path(folder), defaultdict(list), []
    for path in files or (sorted(folder.iterdir()) if folder.is_dir() else [folder]):
        with named(path):
            if path.is_file() and path.name[0] != "." and (header := _header(path)) is not None:
                series[str(header.get("SeriesInstanceUID"))].append((path, header))
    if len(series) != 1:
        listed = [f"{uid} ({len(files)} file(s): {files[0][0].name}, ...)" for uid, files in series.items()]
        listed = f"holds {len(series)} DICOM series: {', '.join(listed)}" if series else "holds no DICOM series"
        raise ValueError(f"{folder}: {listed}; give a folder with exactly one image series")
    ((_, headers),) = series.items()
    frames = {str(header.get("FrameOfReferenceUID") or "") for _, header in headers} - {""}
    if len(frames) > 1:
        names = f"{len(frames)} frames of reference ({min(frames)} and others)"
        warnings.warn(f"{folder}: its slices name {names}; they are taken for one, so look at the scan", stacklevel=3)
    for path, header in headers:
        with named(path):
            slices += _slices(path, header)
    with named(folder):
        return _in_order(slices)


class _Start(FileIO):
    """A file of which little is read, whatever lengths are claimed by a damaged header, or by what is none."""

    left = 2**20  # bytes; values that nobody asks for are not read

    def read(self, size: int = -1) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise Fault("is cut short or damaged, or its header is deflated")
        return super().read(size)


def dicom_header(path: Path) -> Dataset | None:
    """What a DICOM file says about itself, read no further than its frames, contours or voxels.

    None if the file is no DICOM, or a DICOMDIR (a list of files).
    """
    with _Start(path) as file:
        start = file.read(134)
        preamble = start[128:132] == b"DICM"
        if (start[132:] if preamble else start[:2]) not in FIRST_GROUPS:
            return None
        file.seek(0)
        tags = [Tag(name) for name in HEADER]
        try:
            header = read_partial(file, lambda tag, *_: tag.group > LAST_GROUP, force=True, specific_tags=tags)
        except MALFORMED:
            if preamble:
                raise
            return None
    directory = header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
    return None if directory or not (preamble or "SOPClassUID" in header) else header


def _header(path: Path) -> Dataset | None:
    """The header of a scan's file; None if the file is no DICOM, or something that may lie beside a scan."""
    header = dicom_header(path)
    if header is None and path.suffix.lower() == ".dcm":
        raise Fault("is no DICOM", "copy it again, or remove it from the folder")
    if header is None or str(header.get("Modality")).startswith(NO_SCAN):
        return None
    content = BytesIO(path.read_bytes())  # gives no more than it has, whatever length a field claims
    header = dcmread(content, stop_before_pixels=True, force=True)
    remove = "copy it again, or remove it from the folder if it is no part of the scan"
    if header.get("PhotometricInterpretation") != "MONOCHROME2":  # ITK would turn MONOCHROME1 round
        raise Fault("is cut short, or is no MONOCHROME2 image", remove)
    high, stored = header.get("HighBit"), header.get("BitsStored")
    if isinstance(high, int) and isinstance(stored, int) and high >= stored:  # GDCM would take the lower bits
        fault = f"its HighBit is {high}, so that its values do not lie in the lower {stored} bits (BitsStored)"
        raise Fault(fault, f"export it again with HighBit {stored - 1}")
    claimed = header.Rows * header.Columns * int(header.get("NumberOfFrames") or 1)
    if not 0 < claimed <= path.stat().st_size * MOST_PER_BYTE:
        raise Fault(f"claims {claimed} voxels, which it cannot hold", remove)
    return header


def _told(places: Sequence[Dataset], field: str, n: int, default: float | None = None) -> np.ndarray:
    """The n numbers that the first of these places has in a field; Fault if none has and there is no default."""
    value = next((place[field].value for place in places if place.get(field) not in (None, "")), default)
    if value is None or not np.isfinite(numbers := np.array(value, float).reshape(n)).all():
        raise Fault(f"its {field} is {'missing' if value is None else value}", EXPORT)
    return numbers


def _slices(path: Path, header: Dataset) -> Iterator[dict[str, Any]]:
    """The slices in one file: its frames if it is enhanced, for each of which groups of fields say where it lies."""
    n, size, rescales = int(header.get("NumberOfFrames") or 1), (header.Columns, header.Rows), set()
    of_frames, shared = (header.get(f"{of}FunctionalGroupsSequence") or [] for of in ("PerFrame", "Shared"))
    for frame in range(n):
        groups = [*of_frames[frame : frame + 1], *shared]
        places = [place for group in groups for field in group if field.VR == "SQ" for place in field.value[:1]]
        places += [header] if n == 1 else []
        position, spacing = _told(places, "ImagePositionPatient", 3), _told(places, "PixelSpacing", 2)[::-1]
        directions = _told(places, "ImageOrientationPatient", 6).reshape(2, 3)
        if not np.abs(directions @ directions.T - np.eye(2)).max() <= RIGHT_ANGLE or spacing.min() <= 0:
            raise Fault(f"its rows and columns lie along {directions.tolist()}, {spacing.tolist()} mm apart", EXPORT)
        no_intercept = None if header.get("Modality") == "CT" else 0.0  # a CT needs one to be in HU
        intercept = _told(places, "RescaleIntercept", 1, no_intercept).item()
        rescales.add((_told(places, "RescaleSlope", 1, 1.0).item(), intercept))
        if len(rescales) > 1 or (0.0, intercept) in rescales or "ModalityLUTSequence" in header:
            raise Fault(
                "its RescaleSlope is 0 or differs between its frames, or it has a ModalityLUTSequence",
                "export it again as single-frame DICOM with a RescaleSlope in every slice",
            )
        yield {
            "name": path.name if n == 1 else f"frame {frame + 1} of {path.name}",
            "file": path,
            "frame": frame,
            "uid": str(header.get("SOPInstanceUID", "")),
            "size": size,
            "spacing": spacing,
            "thickness": _told(places, "SliceThickness", 1, 0.0).item(),
            "directions": directions,
            "corners": position + [[0, 0], [size[0] - 1, 0], [0, size[1] - 1]] * spacing @ directions,
        }


def _in_order(slices: list[dict[str, Any]]) -> Series:
    """The slices along their normal; Fault naming the one that does not fit with the others."""
    if len(slices) == 1:
        raise Fault("is one slice of a DICOM series", "give the folder of the series, or leave it out")
    normal = np.cross(*np.median([row["directions"] for row in slices], axis=0))
    slices = sorted(slices, key=lambda row: row["corners"][0] @ normal)
    corners = np.array([row["corners"] for row in slices])  # of each slice: the first voxel and the ends of its edges
    distances = (corners[:, 0] - corners[0, 0]) @ normal
    # One affine must place all: corner = first corner + i * across + j * down + distance * step.
    places = np.array([[[1, 0, 0, far], [1, 1, 0, far], [1, 0, 1, far]] for far in distances])
    affine = np.linalg.lstsq(places.reshape(-1, 4), corners.reshape(-1, 3))[0]
    apart = np.linalg.norm(places @ affine - corners, axis=2).max(1) / min(row["spacing"].min() for row in slices)
    ((size, _),) = Counter(row["size"] for row in slices).most_common(1)
    odd = next((row for row in slices if row["size"] != size), slices[apart.argmax()])
    if odd["size"] != size or not apart.max() <= AGREE:
        usual = {key: np.median([row[key] for row in slices], axis=0) for key in FIELDS}
        differ = [FIELDS[key] for key in FIELDS if not np.allclose(odd[key], usual[key])] or ["ImagePositionPatient"]
        raise Fault(
            f"{odd['name']} does not fit with the other slices by its {', '.join(differ)}",
            "give a folder with the parallel slices of one scan alone, without localizers",
        )
    if np.linalg.norm(corners[-1, 0] - corners[0, 0]) > MOST_LEAN * distances[-1]:
        raise Fault("its slices lie beside one another", "give a folder with a stack of slices")
    gaps = np.diff(distances)
    if gaps.min() <= SAME_PLACE * gaps.mean():
        near = slices[gaps.argmin() : gaps.argmin() + 2]
        first, second = (row["file" if near[0]["name"] == near[1]["name"] else "name"] for row in near)
        fault = f"{first} and {second} are only {gaps.min():.2f} mm apart: slices copied twice, or two acquisitions"
        raise Fault(fault, "keep one copy or acquisition in the folder")
    if gaps.max() > WIDE_GAP * max(np.median(gaps), *(row["thickness"] for row in slices)):
        first, second = (slices[gaps.argmax() + k]["name"] for k in (0, 1))
        fault = f"its slices are not evenly spaced: between {first} and {second} some may be missing"
        raise Fault(fault, "copy the series again, or give a folder with slices of one distance alone")
    across, down = slices[0]["directions"] / np.linalg.norm(slices[0]["directions"], axis=1)[:, None]
    axes, spacing = np.c_[across, down, np.cross(across, down)], tuple(slices[0]["spacing"].tolist())
    return Series(*[[row[k] for row in slices] for k in ("file", "frame", "uid")], corners[:, 0], axes, spacing, size)


def series_image(series: Series, voxels: np.ndarray, *, label: bool = False) -> sitk.Image:
    """A volume of a series' voxels (n, rows, columns), or of a label drawn on its slices.

    Slices that lean or are unevenly spaced are resampled onto the grid with right angles that holds them all:
    linearly to float32, a label from the nearest voxel. The image's metadata then say why, under "resampled".
    """
    distances, n, order, why = series.distances, len(voxels), 0 if label else 1, []
    even, origin = np.linspace(0, distances[-1], n), series.positions[0]
    if np.abs(distances - even).max() > AGREE * even[1]:
        gaps = np.diff(distances)
        why.append(f"its slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart")
        even = np.linspace(0, distances[-1], n := 1 + round(distances[-1] / gaps.min()))
        from scipy.interpolate import interp1d  # a third of a second that hardly any scan needs

        between = interp1d(distances, voxels, "nearest" if label else "linear", axis=0)
        voxels = between(even).astype(voxels.dtype if label else np.float32)
    step = (series.positions[-1] - origin) / (n - 1)
    spacing, aside = np.linalg.norm(step), step @ series.axes[:, :2] / series.spacing  # voxels from slice to slice
    if np.abs(aside * (n - 1)).max() > AGREE:
        spacing = even[1]
        angle = np.degrees(np.arccos(spacing / np.linalg.norm(step)))
        why.append(f"its slices lean by {angle:.1f} degrees (a tilted gantry)")
        low, high = np.floor(np.minimum(0, aside * (n - 1))), np.ceil(np.maximum(0, aside * (n - 1)))
        shear, shape = np.eye(3), (n, *(series.size + high - low)[::-1].astype(int))
        shear[1:, 0] = -aside[::-1]
        voxels = voxels if label else voxels.astype(np.float32)
        voxels = affine_transform(voxels, shear, [0, *low[::-1]], shape, order=order, cval=voxels.min())
        origin = origin + series.axes[:, :2] @ (low * series.spacing)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((*series.spacing, float(spacing)))
    image.SetOrigin(origin.tolist())
    image.SetDirection(series.axes.ravel().tolist())
    if why:
        image.SetMetaData("resampled", " and ".join(why))
    return image
