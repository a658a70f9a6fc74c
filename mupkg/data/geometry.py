"""Where voxels lie: all that places a voxel must be in the file, agree, and make one grid with right angles.

Points are (x, y, z) in mm in the patient's frame (to the left, the back and the head), as in DICOM and SimpleITK.
An affine is the 4 x 4 matrix that takes a voxel's index (i, j, k, 1) to the point of its centre.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from pydicom import Dataset, dcmread
from scipy.interpolate import interp1d

from mupkg.data.headers import Fault, check_claim, named

AGREE = 0.1  # of a voxel: what is no farther apart lies at the same place
WIDE_GAP = 1.5  # of the usual slice distance: where slices are farther apart, some are missing
SAME_PLACE = 0.25  # of the mean slice distance: closer slices show the same place twice
RIGHT_ANGLE = 1e-3  # the largest cosine between rows and columns; the least volume that three axes span
NO_SCAN = ("RT", "SEG", "SR", "REG", "PR", "KO")  # begin the modalities of what may lie beside a scan
EXPORT = "export the series again from the archive, unchanged"
RESAMPLE = (
    "resample it first (a NIfTI with nibabel.processing.resample_to_output, a label with order=0), or give the folder "
    "of its DICOM series"
)
DECIDE = "find out which is right, and save it again with that one alone (nibabel.Nifti1Image(voxels, affine))"


def image_affine(image: sitk.Image | sitk.ImageFileReader) -> np.ndarray:
    """The affine (4, 4) of an image's first three dimensions."""
    affine, n = np.eye(4), image.GetDimension()
    axes, k = np.reshape(image.GetDirection(), (n, n)) * image.GetSpacing(), min(3, n)
    affine[:k, :k], affine[:k, 3] = axes[:k, :k], image.GetOrigin()[:k]
    return affine


def corners_apart(first: np.ndarray, other: np.ndarray, size: Sequence[int]) -> float:
    """How far apart two affines put a corner voxel of a volume (x, y, z), in voxels of the first one, at most."""
    corners = np.array([*itertools.product(*[(0, n - 1) for n in size], [1])]).T
    return np.abs(np.linalg.solve(first[:3, :3], ((first - other) @ corners)[:3])).max()


def check_affines(size: Sequence[int], affines: dict[str, np.ndarray]) -> None:
    """Fault if what places the voxels of a volume of this size (x, y, z) differs, or has no right angles.

    Args:
        affines: all that places them, by the names under which a person knows them.
    """
    (name, first), *others = affines.items()
    spacing = np.linalg.norm(first[:3, :3], axis=0)
    axes = first[:3, :3] / spacing
    if not (np.isfinite([first[:3], axes[:, [0, 1, 2, 2]]]).all() and abs(np.linalg.det(axes)) > RIGHT_ANGLE):
        raise Fault(f"its axes are {axes.tolist()} and its origin is {first[:3, 3].tolist()}, which no scan has")
    left, _, right = np.linalg.svd(axes)
    straight = np.vstack([np.c_[left @ right * spacing, first[:3, 3]], first[3]])
    if corners_apart(straight, first, size) > AGREE:
        raise Fault("its axes are not at right angles (a tilted gantry?)", RESAMPLE)
    for other, affine in others:
        if not (apart := corners_apart(first, affine, size)) <= AGREE:
            raise Fault(f"its {name} and its {other} place a voxel {apart:.1f} voxels apart", DECIDE)


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


def series_geometry(folder: str | Path) -> Series:
    """Where the slices of the one DICOM series in a folder (or in an enhanced file) lie, from their headers alone.

    Objects of radiotherapy, segmentations and reports beside it are passed over.

    Raises:
        ValueError: naming the folder or file, if there is no series or several, if a slice lacks what places it, is of
            another size or orientation, is shifted aside or at the place of another one, or if slices are missing.
    """
    folder, series = Path(folder), defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        with named(path):
            if path.is_file() and (header := _header(path)) is not None:
                series[str(header.get("SeriesInstanceUID"))].append((path, header))
    if len(series) != 1:
        found = [f"{uid} ({len(files)} file(s): {files[0][0].name}, ...)" for uid, files in series.items()]
        found = f"holds {len(series)} DICOM series: {', '.join(found)}" if series else "holds no DICOM series"
        raise ValueError(f"{folder}: {found}; give a folder with exactly one image series")
    slices = []
    for path, header in next(iter(series.values())):
        with named(path):
            slices += _slices(path, header)
    with named(folder):
        return _in_order(slices)


def _header(path: Path) -> Dataset | None:
    """The header of a scan's file; None if the file is no DICOM, or something that may lie beside a scan."""
    with path.open("rb") as file:
        start = file.read(132)
    if start[128:] != b"DICM" and start[:2] not in (b"\2\0", b"\10\0"):  # as a file without preamble begins
        return None
    header = dcmread(path, stop_before_pixels=True, force=True)
    if str(header.get("Modality")).startswith(NO_SCAN) or "DirectoryRecordSequence" in header:
        return None
    if "Rows" not in header or "Columns" not in header or header.get("SamplesPerPixel", 1) != 1:
        raise Fault("is cut short, or holds no scan", "copy it again, or remove it from the folder")
    check_claim([header.Columns, header.Rows, int(header.get("NumberOfFrames") or 1)], path.stat().st_size)
    return header


def _told(places: Sequence[Dataset], field: str, n: int, default: float | None = None) -> np.ndarray:
    """The n numbers that the first of these places has in a field; Fault if none has and there is no default."""
    value = next((place[field].value for place in places if place.get(field) not in (None, "")), default)
    if value is None or not np.isfinite(numbers := np.array(value, float).reshape(n)).all():
        raise Fault(f"its {field} is {value}, so nobody knows where it lies or what its values mean", EXPORT)
    return numbers


class _Slice(NamedTuple):
    name: str
    file: Path
    frame: int
    uid: str
    size: tuple[int, int]  # columns, rows
    spacing: np.ndarray  # (2,), mm from column to column and from row to row
    directions: np.ndarray  # (2, 3), along a row and along a column
    corners: np.ndarray  # (3, 3): the first voxel's centre, the first row's last, the first column's last


def _slices(path: Path, header: Dataset) -> Iterator[_Slice]:
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
        slope = _told(places, "RescaleSlope", 1, 1.0).item()
        # the stored values of a CT are no HU without it
        intercept = _told(places, "RescaleIntercept", 1, None if header.get("Modality") == "CT" else 0.0).item()
        rescales.add((slope, intercept))
        if slope == 0 or len(rescales) > 1 or "ModalityLUTSequence" in header:
            raise Fault("its voxels are rescaled as SimpleITK does not do it", EXPORT)
        corners = position + np.array([[0, 0], [size[0] - 1, 0], [0, size[1] - 1]]) * spacing @ directions
        name = path.name if n == 1 else f"frame {frame + 1} of {path.name}"
        yield _Slice(name, path, frame, str(header.get("SOPInstanceUID", "")), size, spacing, directions, corners)


def _in_order(slices: list[_Slice]) -> Series:
    """The slices along their normal; Fault naming the one that does not fit with the others."""
    if len(slices) == 1:
        raise Fault("is one slice of a DICOM series", "give the folder of the series, or leave it out")
    normal = np.cross(*np.median([one.directions for one in slices], axis=0))
    slices = sorted(slices, key=lambda one: one.corners[0] @ normal)
    corners, gaps = np.array([one.corners for one in slices]), np.diff([one.corners[0] @ normal for one in slices])
    # One affine must hold for all: corner = first corner + i * across + j * down + distance * step.
    places = np.array(
        [[[1, 0, 0, far], [1, 1, 0, far], [1, 0, 1, far]] for far in (corners[:, 0] - corners[0, 0]) @ normal]
    )
    affine = np.linalg.lstsq(np.reshape(places, (-1, 4)), corners.reshape(-1, 3))[0]
    apart = np.linalg.norm(places @ affine - corners, axis=2).max(1) / slices[0].spacing.min()
    ((size, _),) = Counter(one.size for one in slices).most_common(1)
    odd = next((k for k, one in enumerate(slices) if one.size != size), apart.argmax())
    if slices[odd].size != size or not apart[odd] <= AGREE:
        raise Fault(
            f"{slices[odd].name} does not fit with the other slices: it has {slices[odd].size} voxels of "
            f"{slices[odd].spacing.tolist()} mm along {slices[odd].directions.tolist()}, and lies {apart[odd]:.1f} voxels "
            "from where the others would have it",
            "remove it from the folder if it is of another scan (a localizer, say)",
        )
    if gaps.min() <= SAME_PLACE * gaps.mean():
        first, second = (slices[gaps.argmin() + k].name for k in (0, 1))
        fault = f"{first} and {second} lie at the same place (slices copied twice, or two acquisitions)"
        raise Fault(fault, "keep one of them in the folder")
    if gaps.max() > WIDE_GAP * np.median(gaps):
        first, second = (slices[gaps.argmax() + k].name for k in (0, 1))
        fault = f"its slices are not evenly spaced: between {first} and {second} some may be missing"
        raise Fault(fault, "copy the series again")
    directions = slices[0].directions / np.linalg.norm(slices[0].directions, axis=1, keepdims=True)
    axes, columns = np.stack([*directions, np.cross(*directions)], axis=1), [*zip(*slices, strict=True)]
    files, frames, uids = (list(column) for column in columns[1:4])
    return Series(files, frames, uids, corners[:, 0], axes, tuple(slices[0].spacing.tolist()), size)


def series_image(series: Series, voxels: np.ndarray, *, label: bool = False) -> sitk.Image:
    """A volume of a series' voxels (n, rows, columns), or of a label drawn on its slices.

    Slices that lean or are unevenly spaced are resampled onto the grid with right angles that holds them all: linearly
    to float32, a label from the nearest voxel. The key "resampled" of the image's metadata then says why.
    """
    distances, n, why = series.distances, len(voxels), []
    even = np.linspace(0, distances[-1], n)
    if np.abs(distances - even).max() > AGREE * even[1]:
        gaps = np.diff(distances)
        why.append(f"its slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart")
        even = np.linspace(0, distances[-1], n := 1 + round(distances[-1] / np.median(gaps)))
        between = interp1d(distances, voxels, "nearest" if label else "linear", axis=0)
        voxels = between(even).astype(voxels.dtype if label else np.float32)
    image = sitk.GetImageFromArray(voxels)
    step = (series.positions[-1] - series.positions[0]) / (n - 1)
    image.SetSpacing((*series.spacing, float(np.linalg.norm(step))))
    image.SetOrigin(series.positions[0].tolist())
    image.SetDirection(series.axes.ravel().tolist())
    aside = step @ series.axes[:, :2] * (n - 1) / series.spacing  # of the last slice from the first, in voxels
    if np.abs(aside).max() > AGREE:
        angle = np.degrees(np.arccos(step @ series.axes[:, 2] / np.linalg.norm(step)))
        why.append(f"its slices lean by {angle:.1f} degrees (a tilted gantry)")
        low, high = np.floor(np.minimum(0, aside)), np.ceil(np.maximum(0, aside))
        image.SetDirection(np.c_[series.axes[:, :2], step / np.linalg.norm(step)].ravel().tolist())
        image = sitk.Resample(
            image,
            [*(series.size + high - low).astype(int).tolist(), n],
            sitk.Transform(),
            sitk.sitkNearestNeighbor if label else sitk.sitkLinear,
            (series.positions[0] + series.axes[:, :2] @ (low * series.spacing)).tolist(),
            (*series.spacing, float(step @ series.axes[:, 2])),
            series.axes.ravel().tolist(),
            float(voxels.min()),
            image.GetPixelID() if label else sitk.sitkFloat32,
        )
    if why:
        image.SetMetaData("resampled", " and ".join(why))
    return image
