"""Planning scans and their contours: DICOM structure sets (RTSTRUCT) read as masks, masks written as structure sets.

A contour is a closed polygon in the plane of one slice, its points in mm. A voxel belongs to a region of interest
(ROI) if its centre lies inside an odd number of the ROI's contours on its slice, or on one of them. This even-odd
rule covers holes, keyholes and islands alike. A contour that is stored twice counts once; contours that cross are
refused.
Attributes are those of DICOM PS3.3, C.8.8.5 (structure set) and C.8.8.6 (contours).
"""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import SimpleITK as sitk
from contourpy import contour_generator
from matplotlib.path import Path as Polygon
from pydicom import Dataset, FileMetaDataset, dcmread
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree

from mupkg import __version__
from mupkg.scans.cases import Case, CohortError, checked_case, essence, grid_difference, patient_key, spelt_alike
from mupkg.scans.files import access_named, files_below, read_series
from mupkg.scans.geometry import AGREE, HEADER, Series, dicom_header, series_geometry, series_image
from mupkg.scans.headers import MALFORMED, Fault, named
from mupkg.scans.writing import whole_file

NO_DEVICE = "Research software, no medical device: not for diagnosis or treatment planning."
RESEARCH = "Research, no medical device"  # where there is room for 64 characters
SCANS = ("CT", "MR")  # modalities that contours are drawn on
OFF_PLANE = 0.25  # of the slice distance; a contour farther from every slice was drawn on one that is not there
ONE_OUTLINE = 0.5  # of a voxel; two large contours that run closer for half their way are versions of one
PATIENT_AND_STUDY = {  # what a structure set repeats from its slices, and the most characters that DICOM allows
    **{"PatientName": 64, "PatientID": 64, "PatientBirthDate": 8, "PatientSex": 16, "ReferringPhysicianName": 64},
    **{"StudyInstanceUID": 64, "StudyDate": 8, "StudyTime": 16, "StudyID": 16, "AccessionNumber": 16},
}
VERSION = {"date": "StructureSetDate", "label": "StructureSetLabel", "approval": "ApprovalStatus"}
GREEN = [0, 255, 0]  # in which an ROI is shown
STUDY = "1.2.840.10008.3.1.2.3.1"  # SOP class of a detached study; retired, but the standard still asks for it here


class Key(NamedTuple):
    """What tells one series from another: its UID, and its coordinate system."""

    series: str
    frame: str  # of reference; "" if the series does not say


@dataclass
class Scan:
    """The files of one series, and what their headers say."""

    kind: str  # SOP class
    modality: str
    patient: str
    date: str
    files: list[Path] = field(default_factory=list)
    slices: int = 0


class Roi(NamedTuple):
    """One ROI of a structure set, and what it says about the series it was drawn on."""

    path: Path
    patient: str
    name: str
    frame: str
    series: set[str]  # UIDs
    kinds: set[str]  # SOP classes of its slices
    contours: list[Dataset]
    contour_count: int  # also where they were not kept
    owner: str  # the patient, however the ID is spelt
    uid: str  # of the structure set
    version: str  # of the structure set: its date, label and approval
    fault: str  # why nobody can tell which contours are its own

    def __str__(self) -> str:
        return f"{self.path}: patient {self.patient}, ROI {self.name!r}"

    def drawn_on(self, scans: dict[Key, Scan]) -> list[Key]:
        """The series it names; if that is not there, those of its patient, frame and kind: a copy has a new UID."""
        named = [key for key in scans if key.series in self.series]
        if named:
            return [key for key in named if key.frame == self.frame or "" in (key.frame, self.frame)]
        alike = [key for key in scans if key.frame == self.frame != "" and scans[key].modality in SCANS]
        alike = [key for key in alike if scans[key].kind in self.kinds or not self.kinds]
        return [key for key in alike if patient_key(scans[key].patient) == self.owner]


class Outline(NamedTuple):
    """A closed contour on its slice."""

    height: float  # mm along the slices' normal, where it was drawn
    xy: np.ndarray  # (n, 2), its points in voxels
    tolerance: np.ndarray  # (2,), in voxels, within which a voxel's centre lies on it
    xor: bool  # made to be combined with others, whether they cross or not


def pseudonym(patient: str) -> str:
    """Twelve hexadecimal digits for a patient's ID; the same for spellings that differ in zeros and signs alone.

    It keeps IDs out of sight, but whoever has a list of the IDs can find them again.
    """
    return hashlib.sha256("\0".join(essence(spelt_alike(patient))).encode()).hexdigest()[:12]


def list_dicom(folder: str | Path, *, hash_patients: bool = False, damaged: list[str] | None = None) -> pd.DataFrame:
    """What a folder and those below it hold: a row for each series and ROI, and for each series without an ROI.

    Columns: patient (ID), series (UID), modality, slices, roi, contours, and path (of the structure set, or of the
    series' folder where it has none). An ROI whose series is not there has 0 slices. No voxels are read.

    Args:
        hash_patients: give pseudonyms instead of IDs, and leave out series and path, which may tell who it is.
        damaged: takes what is wrong with files and folders that are damaged or may not be read.

    Raises:
        CohortError: naming all of these, where nothing takes them.
    """
    scans, paths, faults = _scans_below(Path(folder))
    rows, bare = [], dict(scans)
    for roi in (roi for rois in _structures(paths, faults) for roi in rois):
        for key in roi.drawn_on(scans) or [Key(min(roi.series, default=""), roi.frame)]:
            modality, slices = (scans[key].modality, scans[key].slices) if key in scans else ("", 0)
            named = roi.name or None
            rows.append((roi.patient, key.series, modality, slices, named, roi.contour_count, str(roi.path)))
            bare.pop(key, None)
    if damaged is not None:
        damaged += faults
    elif faults:
        raise CohortError(faults)
    for key, scan in bare.items():
        rows.append((scan.patient, key.series, scan.modality, scan.slices, None, 0, str(scan.files[0].parent)))
    columns = ["patient", "series", "modality", "slices", "roi", "contours", "path"]
    table = pd.DataFrame(sorted(rows, key=str), columns=columns)
    if hash_patients:
        table = table.drop(columns=["series", "path"]).assign(patient=table["patient"].map(pseudonym))
    return table


@contextmanager
def _kept(faults: list[str]) -> Iterator[None]:
    """What is wrong inside the block is added to the faults, so that all can be told in one go."""
    try:
        yield
    except ValueError as error:
        faults.append(str(error))


def _scans_below(folder: Path) -> tuple[dict[Key, Scan], list[Path], list[str]]:
    """All series below a folder, all structure sets, and what is wrong with files that cannot be told apart."""
    scans: dict[Key, Scan] = {}
    structures, faults = [], []
    for path in sorted(files_below(folder, faults)):
        with _kept(faults), access_named(path), named(path, "DICOM"):
            header = dicom_header(path)
            if header is not None and header.SOPClassUID == RTStructureSetStorage:
                structures.append(path)
            elif header is not None and "Rows" in header:
                tags = {name: str(header.get(name) or "").strip() for name in HEADER}
                key = Key(tags["SeriesInstanceUID"], tags["FrameOfReferenceUID"])
                date = tags["StudyDate"] + tags["StudyTime"]
                scan = scans.setdefault(key, Scan(tags["SOPClassUID"], tags["Modality"], tags["PatientID"], date))
                scan.files.append(path)
                scan.slices += int(header.get("NumberOfFrames") or 1)
    return scans, structures, faults


def _structures(paths: Iterable[Path], faults: list[str]) -> Iterator[list[Roi]]:
    """The ROIs of each structure set without their contours, which take much memory; damaged ones become faults."""
    for path in paths:
        with _kept(faults):
            yield [roi._replace(contours=[]) for roi in _rois(path)]


def _rois(path: Path) -> list[Roi]:
    """All ROIs of a structure set; ValueError naming the file if it is none, or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check its name")
    contours, series, kinds = defaultdict(list), defaultdict(set), defaultdict(set)
    with access_named(path), named(path, "a structure set"):
        header = dicom_header(path)
        if header is None or header.get("SOPClassUID") != RTStructureSetStorage:
            raise Fault("is not a DICOM structure set (RTSTRUCT)", "give the file that holds the contours")
        structures = dcmread(path, force=True)
        for item in structures.get("ROIContourSequence") or []:  # a template has none
            if item.get("ContourSequence"):
                contours[int(item.ReferencedROINumber)].append(item.ContourSequence)
        for frame in structures.get("ReferencedFrameOfReferenceSequence") or []:
            for study in frame.get("RTReferencedStudySequence") or []:
                for reference in study.get("RTReferencedSeriesSequence") or []:
                    series[frame.FrameOfReferenceUID].add(str(reference.SeriesInstanceUID))
                    images = reference.get("ContourImageSequence") or []
                    kinds[frame.FrameOfReferenceUID] |= {str(image.ReferencedSOPClassUID) for image in images}
        items = structures.StructureSetROISequence if contours else structures.get("StructureSetROISequence") or []
        numbers = Counter(int(item.ROINumber) for item in items)
        patient = str(structures.get("PatientID") or "").strip()
        version = ", ".join(f"{word} {structures.get(name) or 'unknown'}" for word, name in VERSION.items())
        structure_set = patient_key(patient), str(structures.get("SOPInstanceUID") or ""), version
        rois = []
        for item in items or [Dataset()]:  # so that an empty set is listed, too
            frame = str(item.get("ReferencedFrameOfReferenceUID") or structures.get("FrameOfReferenceUID") or "")
            number, name = int(item.get("ROINumber") or 0), str(item.get("ROIName") or "").strip()
            own = [contour for sequence in contours[number] for contour in sequence]
            fault = f"its number {number} is used twice, so nobody can tell which contours it has"
            fault *= numbers[number] > 1 or len(contours[number]) > 1
            of_roi = name, frame, series[frame], kinds[frame], own, len(own)
            rois.append(Roi(path, patient, *of_roi, *structure_set, fault))
    return rois


def _fitting(rois: Iterable[Roi], name: str) -> list[Roi]:
    """In each structure set the ROIs of this name; else those that differ in blanks or capitals, or fit a pattern."""
    hits: list[Roi] = []
    spelt, pattern = _spelt(name), _spelt(name).casefold().replace("[", "[[]")
    for alike in (
        lambda roi: roi.name == name,
        lambda roi: _spelt(roi.name) == spelt,
        lambda roi: fnmatchcase(_spelt(roi.name).casefold(), pattern),
    ):
        sets = {roi.path for roi in hits}
        hits += [roi for roi in rois if roi.path not in sets and alike(roi)]
    return hits


def _spelt(name: str) -> str:
    """A name whose letters are composed, and whose blanks of any kind are single ones."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def _one(rois: Sequence[Roi], names: Sequence[str], where: str) -> Roi:
    """The ROI that has the first name or pattern any has, with contours if it can be; ValueError if it is not one."""
    hits: list[Roi] = []
    contoured = [roi for roi in rois if roi.contour_count]
    for among in (contoured, rois):
        for name in names:
            hits = hits or _fitting(among, name)
    if len(hits) == 1 and hits[0].version.endswith("REJECTED"):
        others = [roi for name in names for roi in _fitting(contoured, name) if roi.path != hits[0].path]
        hits += {roi.path: roi for roi in others}.values()
        if not others:
            warnings.warn(f"{hits[0]}: is taken, though its structure set is REJECTED", stacklevel=3)
    wanted = " or ".join(map(repr, names))
    if not hits:
        listed = ", ".join(sorted({roi.name for roi in rois} - {""})) or "none"
        raise ValueError(f"{where}: has no ROIs {wanted}, but {listed}; name another, or mend it")
    sets = {roi.path: roi for roi in hits}
    if len(sets) > len({roi.uid or roi.path for roi in hits}):
        raise ValueError(f"{where}: has one structure set twice, {' and '.join(map(str, sets))}; keep one of them")
    if len(hits) > 1:
        several, cure = len(sets) > 1, "keep one structure set" if len(sets) > 1 else "name another, or mend it"
        listed = " and ".join(f"{roi.name!r} in {roi.path.name}" + f" ({roi.version})" * several for roi in hits)
        raise ValueError(f"{where}: has {len(hits)} ROIs {wanted}, but {listed}; {cure}")
    if hits[0].fault:
        raise ValueError(f"{hits[0]}: {hits[0].fault}; export it again")
    return hits[0]


def _series_of(roi: Roi, scans: dict[Key, Scan]) -> Key:
    """The series it was drawn on; ValueError if that is not there, or if it may be one of several."""
    keys, own = roi.drawn_on(scans), [key for key in scans if key.series in roi.series]
    uids = ", ".join(dict.fromkeys(key.series for key in keys or own))
    if len({key.series for key in keys}) > 1:
        raise ValueError(f"{roi}: may be of {len(keys)} series, {uids}; keep one of them in the folder")
    if len(keys) != 1 and own:
        frames = " and ".join(f"{scans[key].slices} slices in {key.frame or 'none'}" for key in own)
        fault = f"was drawn on series {uids} in frame of reference {roi.frame}, which has {frames}"
        raise ValueError(f"{roi}: {fault}; export both again from one system")
    if not keys:
        others = [
            key for key in scans if key.frame == roi.frame != "" and patient_key(scans[key].patient) != roi.owner
        ]
        held = ", ".join(key.series + " of another patient" * (key in others) for key in scans) or "none"
        named = f"{', '.join(sorted(roi.series)) or 'unknown'} of frame of reference {roi.frame or 'unknown'}"
        raise ValueError(f"{roi}: was drawn on series {named}, but here is {held}; choose the folder of that series")
    if keys[0].series not in roi.series:
        warnings.warn(f"{roi}: was drawn on a series that is not there; taken for {uids}, of its frame", stacklevel=3)
    if patient_key(scans[keys[0]].patient) != roi.owner:
        warnings.warn(f"{roi}: was drawn on series {uids}, which has another patient ID", stacklevel=3)
    if slices := sum(scans[key].slices for key in own if key not in keys):
        warnings.warn(
            f"{roi}: {slices} slices of series {uids} are in another frame of reference, left out", stacklevel=3
        )
    return keys[0]


def read_rtstruct(path: str | Path, series_folder: str | Path, roi: str, *, fill_gaps: bool = False) -> sitk.Image:
    """An ROI as a mask: uint8, 0 or 1, on the series' own grid, slices in the order SimpleITK reads them.

    What was taken for something else (a contour beside its slice, an unknown type) is warned of, and stands in the
    mask's metadata under "notes".

    Args:
        path: the structure set.
        series_folder: where its series lies; of several there, the one that the structure set refers to.
        roi: the ROI's name; case and blanks count only where nothing else tells two names apart.
        fill_gaps: interpolate shapes on slices that were left out between contoured ones.

    Raises:
        ValueError: naming file, patient, ROI and slice, if the structure set is of another series, or the ROI is not
            there, is there twice, has no contours, leaves slices out between them, or has some that are open, that
            cross, lack points, or lie outside the volume, on no slice, or beside one another on one slice.
    """
    scans, _, faults = _scans_below(Path(series_folder))
    if faults:
        raise CohortError(faults)
    organ = _one(_rois(Path(path)), [roi], str(path))
    return _mask(organ, series_geometry(series_folder, scans[_series_of(organ, scans)].files), fill_gaps)


def _points(contour: Dataset) -> tuple[np.ndarray, float]:
    """A contour's points (n, 3) in mm, moved by its offset; and how many it claims to have."""
    data, count = (contour.get_item(name) for name in ("ContourData", "NumberOfContourPoints"))
    text = b"" if data is None or data.value is None else data.value  # pydicom is slow, and reads no more than 64 kB
    try:
        points = np.array(text.strip(b" \0").split(b"\\") if text else [], float)
    except ValueError as error:
        raise Fault(f"has a contour of points that are no decimal numbers ({error})", "export it again") from error
    if not points.size or points.size % 3 or not np.isfinite(points).all():
        raise Fault("has a contour without x, y and z of every point", "export it again")
    points = points.reshape(-1, 3) + np.array(contour.get("ContourOffsetVector") or (0, 0, 0), float)
    return points, float(count.value) if count is not None and count.value else len(points)


def _outlines(roi: Roi, series: Series, faults: dict[str, set], notes: Counter[str]) -> dict[int, list[Outline]]:
    """The ROI's closed contours by slice; what is wrong with others becomes faults, by where they lie in mm."""
    heights = series.positions @ series.axes[:, 2]
    step, outlines, marks = np.diff(heights).min(), defaultdict(list), []
    for number, contour in enumerate(roi.contours, start=1):
        kind = str(contour.get("ContourGeometricType") or "")
        try:
            points, claimed = _points(contour)
        except MALFORMED as error:
            raise ValueError(f"{roi}: {error} (contour {number} of {roi.contour_count})") from error
        along = points @ series.axes[:, 2]
        z = int(np.abs(heights - along.mean()).argmin())
        xy = (points - series.positions[z]) @ series.axes[:, :2] / series.spacing
        off, steps = np.abs(along - heights[z]).max(), np.linalg.norm(np.diff(points, axis=0), axis=1)
        numbers = claimed == points.size and np.linalg.norm(points[0] - points[-1]) <= 2 * steps.max(initial=0)
        if kind == "POINT" or (not kind and len(points) == 1):
            marks.append(along[0])  # which is passed over beside contours
        elif kind not in ("", "INTERPOLATED_PLANAR") and not kind.startswith("CLOSED"):
            faults[f"is {kind}, so it encloses nothing; close it in the planning system"].add(along[0])
        elif claimed > len(points) and not numbers:  # which some programs count in place of points
            faults["has fewer points than it says; export it again"].add(along[0])
        elif off > OFF_PLANE * step:
            faults["lies on no slice; give the whole series that it was drawn on"].add(along[0])
        elif (xy < -1).any() or (xy > series.size).any():
            faults["leads out of its slice; give the series that it was drawn on, uncropped"].add(along[0])
        else:
            written = 0.01 if np.allclose(points, points.round(2), rtol=0, atol=1e-6) else 0.001  # mm, as precise
            outlines[z].append(Outline(along.mean(), xy, written / np.array(series.spacing), kind.endswith("XOR")))
            notes["moved onto their slices"] += off > AGREE * step
            notes["of no type or INTERPOLATED_PLANAR taken as closed"] += not kind.startswith("CLOSED")
            notes["whose number of points is wrong"] += claimed != len(points)
            notes["moved by their ContourOffsetVector"] += bool(np.any(contour.get("ContourOffsetVector") or 0))
    if roi.contours and len(marks) == len(roi.contours):
        faults["is a POINT, so it encloses nothing; draw the outline"] |= {*marks}
    return outlines


def _on_edge(outline: Outline, shape: tuple[int, int]) -> np.ndarray:
    """Which voxels' centres (rows, columns) a closed polygon leads through, within its tolerance."""
    edge, start, run = np.zeros(shape, bool), outline.xy, np.roll(outline.xy, -1, 0) - outline.xy
    for axis in (0, 1):  # where each of its lines crosses columns, then rows
        low = np.ceil(start[:, axis] + np.minimum(0, run[:, axis]) - outline.tolerance[axis])
        high = np.floor(start[:, axis] + np.maximum(0, run[:, axis]) + outline.tolerance[axis])
        n = np.maximum(high - low + 1, 0).astype(int)
        line = np.repeat(np.arange(len(n)), n)
        at = low[line] + np.arange(len(line)) - np.repeat(np.cumsum(n) - n, n)
        share = np.clip((at - start[line, axis]) / np.where(run[:, axis], run[:, axis], 1)[line], 0, 1)
        across = start[line, 1 - axis] + share * run[line, 1 - axis]
        hit = np.abs(across - across.round()) <= outline.tolerance[1 - axis]
        places = np.c_[at, across.round()][hit].astype(int)[:, :: 1 if axis else -1]  # row, column
        edge[tuple(places[((places >= 0) & (places < shape)).all(1)].T)] = True
    return edge


def _meeting(first: Outline, inner: np.ndarray, second: Outline, other: np.ndarray) -> str:
    """How two contours of a slice, and the voxels in them, meet: "same", "crossing", or "": nested, or apart."""
    if (first.xy.max(0) < second.xy.min(0)).any() or (second.xy.max(0) < first.xy.min(0)).any():
        return ""
    courses = []
    for xy in (first.xy, second.xy):
        closed = np.r_[xy, xy[:1]]
        length = np.r_[0, np.linalg.norm(np.diff(closed, axis=0), axis=1).cumsum()]
        at = np.linspace(0, length[-1], 2 + int(length[-1] / AGREE))
        courses.append(np.c_[[np.interp(at, length, closed[:, axis]) for axis in (0, 1)]].T)
    apart = [KDTree(a).query(b[::5])[0] for a, b in (courses, courses[::-1])]
    if max(far.max() for far in apart) <= AGREE:
        return "same"
    both, small, large = np.count_nonzero(inner & other), *sorted(map(np.count_nonzero, (inner, other)))
    versions = 2 * both > large and min(map(np.median, apart)) < ONE_OUTLINE  # of one outline, no organ and its hole
    return "crossing" if both and (both < small or versions) else ""


def _plane(outlines: list[Outline], shape: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Which voxels' centres lie inside an odd number of a slice's contours, or on one; and why that is in doubt."""
    plane, edges, before = np.zeros(shape, bool), np.zeros(shape, bool), []
    for outline in outlines:
        xy, run = outline.xy, np.roll(outline.xy, -1, 0) - outline.xy
        low, high = np.floor(xy.min(0)).clip(0), np.ceil(xy.max(0) + 1).clip(max=shape[::-1])
        columns, rows = np.mgrid[low[0] : high[0], low[1] : high[1]].reshape(2, -1).astype(int)
        inner, edge = np.zeros(shape, bool), _on_edge(outline, shape)
        inner[rows, columns] = Polygon(xy).contains_points(np.c_[columns, rows])
        inner &= ~edge
        area, length = abs(xy[:, 0] @ run[:, 1] - xy[:, 1] @ run[:, 0]) / 2, np.linalg.norm(run, axis=1).sum()
        if area > length and not inner.any():
            return plane, "runs round twice; export it again"
        met = {_meeting(outline, inner, *other) for other in before if not outline.xor}
        if "crossing" in met:
            return plane, "crosses another one, or nearly follows it; keep the right one in the planning system"
        if "same" not in met:
            plane, edges = plane ^ inner, edges | edge
            before.append((outline, inner))
    return plane | edges, ""


def _mask(roi: Roi, series: Series, fill_gaps: bool) -> sitk.Image:
    """The ROI's voxels on the grid that the series is read on; ValueError with all that is wrong with contours."""
    heights = series.positions @ series.axes[:, 2]
    mask, faults, notes = np.zeros((len(heights), *series.size[::-1]), bool), defaultdict(set), Counter()
    outlines, contoured = _outlines(roi, series, faults, notes), []
    step, levels = np.diff(heights).min(), [outline.height for drawn in outlines.values() for outline in drawn]
    for z, drawn in outlines.items():
        places = {outline.height for outline in drawn}
        mask[z], fault = _plane(drawn, mask.shape[1:])
        if max(places) - min(places) > AGREE * step:
            fault = "shares its slice with one at another height; give the series that it was drawn on"
        if fault:
            faults[fault] |= places
        if mask[z].any() or max(len(outline.xy) for outline in drawn) > 2:  # a single click contours no slice
            contoured.append(z)
    gaps = np.setdiff1d(np.arange(min(contoured, default=0), max(contoured, default=0)), contoured)
    if gaps.size and not fill_gaps and not faults:
        apart = np.median(np.diff(np.unique(np.round(levels, 2))))
        cure = "draw it" if apart < 1.5 * step else f"give the series that it was drawn on, {apart:.2f} mm a slice"
        faults[f"is missing between others; {cure}, or set fill_gaps"] |= {*heights[gaps]}
    elif gaps.size and not faults:
        if empty := _fill(mask, gaps, heights, series.spacing):
            faults["is missing, and those beside it do not overlap; draw it"] |= {*heights[empty]}
        notes[f"interpolated (fill_gaps) at {', '.join(f'{height:.2f}' for height in heights[gaps])} mm"] += len(gaps)
    if faults:
        at = {fault: ", ".join(dict.fromkeys(f"{z:.2f}" for z in sorted(places))) for fault, places in faults.items()}
        span = f"slices lie at {heights[0]:.2f} to {heights[-1]:.2f} mm"
        raise ValueError("\n".join(f"{roi}: the contour at {at[fault]} mm {fault} ({span})" for fault in faults))
    if not mask.any():
        what = "encloses the centre of no voxel" if roi.contours else "has no contours"
        raise ValueError(f"{roi}: {what}; draw it, or leave the scan out")
    image = series_image(series, mask.astype(np.uint8), label=True)
    if summary := "; ".join(f"{n} contour(s) {note}" for note, n in notes.items() if n):
        image.SetMetaData("notes", summary)
        warnings.warn(f"{roi}: {summary}", stacklevel=3)
    return image


def _fill(mask: np.ndarray, gaps: Iterable[int], heights: np.ndarray, spacing: Sequence[float]) -> list[int]:
    """Shapes on these slices, by the signed distances to those below and above; gives those that stay empty."""
    filled, empty = np.flatnonzero(mask.any((1, 2))), []
    for z in gaps:
        beside = [*filled[filled < z][-1:], *filled[filled > z][:1]]
        if len(beside) == 2:
            inside, outside = (
                distance_transform_edt(m, (1e9, *spacing[::-1])) for m in (mask[beside], ~mask[beside])
            )
            share = np.interp(heights[z], heights[beside], [0, 1])
            mask[z] = np.average(inside - outside, axis=0, weights=[1 - share, share]) > 0
            empty += [] if mask[z].any() else [z]
    return empty


def write_rtstruct(
    mask: sitk.Image, series_folder: str | Path, path: str | Path, *, name: str = "Prostate", description: str = ""
) -> None:
    """Write a mask as the one ROI of a structure set of its series: unapproved, and said to be research alone.

    Contours run half-way between foreground and background, so that `read_rtstruct` gives the same mask. (One with
    empty slices inside it refuses.)

    Args:
        mask: foreground is not 0; on the series' grid.
        series_folder: holds the slices of one series.
        description: which model made the mask, and what it was trained on.

    Raises:
        ValueError: if the mask is empty or not on the series' grid, or the series not `contourable`.
        OSError: if the file cannot be written; then nothing is.
    """
    series, images, contours = _series_for(mask, series_folder, path), [], []
    first = dcmread(series.files[0], stop_before_pixels=True, force=True)
    frame = first.FrameOfReferenceUID
    slices = zip(series.uids, series.frames, series.positions, _planes(mask, series), strict=True)
    for uid, number, position, plane in slices:
        enhanced = {"ReferencedFrameNumber": number + 1} if "NumberOfFrames" in first else {}
        images.append(_item(ReferencedSOPClassUID=first.SOPClassUID, ReferencedSOPInstanceUID=uid, **enhanced))
        for line in contour_generator(z=np.pad(plane, 1).astype(float)).lines(0.5):
            points = position + (line[:-1] - 1) * series.spacing @ series.axes[:, :2].T  # its last point is its first
            contour = _item(ContourImageSequence=images[-1:], ContourGeometricType="CLOSED_PLANAR")
            contour.NumberOfContourPoints = len(points)
            contour.ContourData = [f"{value:.3f}" for value in points.ravel()]
            contours.append(contour)
    drawn_on = _item(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=images)
    study = _item(ReferencedSOPClassUID=STUDY, ReferencedSOPInstanceUID=first.StudyInstanceUID)
    study.RTReferencedSeriesSequence = [drawn_on]
    roi = _item(ROINumber=1, ReferencedFrameOfReferenceUID=frame, ROIName=name, ROIGenerationAlgorithm="AUTOMATIC")
    drawn = _item(ROIDisplayColor=GREEN, ReferencedROINumber=1, ContourSequence=contours)
    seen = _item(ObservationNumber=1, ReferencedROINumber=1, RTROIInterpretedType="ORGAN", ROIInterpreter="")
    date, time = datetime.now().strftime("%Y%m%d %H%M%S").split()
    structures = _item(
        SpecificCharacterSet="ISO_IR 192",
        **{name: _cut(first.get(name), most) for name, most in PATIENT_AND_STUDY.items()},
        SOPClassUID=RTStructureSetStorage,
        **{"SOPInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(), "SeriesNumber": 1},
        **{"SeriesDescription": RESEARCH, "Modality": "RTSTRUCT", "OperatorsName": ""},
        **{"Manufacturer": "mupkg", "SoftwareVersions": __version__},
        **{"FrameOfReferenceUID": frame, "PositionReferenceIndicator": ""},
        **{"StructureSetLabel": "RESEARCH", "StructureSetDate": date, "StructureSetTime": time},
        StructureSetDescription=f"{NO_DEVICE} {description}".strip(),
        ReferencedFrameOfReferenceSequence=[_item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])],
        **{"StructureSetROISequence": [roi], "ROIContourSequence": [drawn], "RTROIObservationsSequence": [seen]},
        ApprovalStatus="UNAPPROVED",
    )
    structures.file_meta = FileMetaDataset()
    structures.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with whole_file(path) as temporary:
        structures.save_as(temporary, enforce_file_format=True)


def contourable(folder: str | Path) -> Series:
    """The series in a folder, if a structure set can refer to it; to be asked before a mask is made.

    Raises:
        ValueError: if the folder holds no series, or several, or its slices lack what contours refer to.
    """
    series = series_geometry(folder)
    header = dcmread(series.files[0], stop_before_pixels=True, force=True)
    lacking = [name for name in ("StudyInstanceUID", "FrameOfReferenceUID") if not header.get(name)]
    lacking += ["SOPInstanceUID of each slice"] * (len({*series.uids} - {""}) < len({*series.files}))
    if lacking:
        raise ValueError(
            f"{series.files[0]}: has no {' and no '.join(lacking)}, which contours need; export the series again "
            "with all fields, or write it as NIfTI (files.write_image(files.read_scan(folder), ...)) for a mask alone"
        )
    return series


def _series_for(mask: sitk.Image, folder: str | Path, path: str | Path) -> Series:
    """The series in a folder; ValueError if it cannot be contoured, or the mask is empty or not on its grid."""
    series = contourable(folder)
    grid = series_image(series, np.zeros((len(series.uids), *series.size[::-1]), np.uint8), label=True)
    if difference := grid_difference(grid, mask):
        raise ValueError(f"{path}: the mask is not on the grid of {folder} ({difference}); resample it first")
    if not sitk.GetArrayViewFromImage(mask).any():
        raise ValueError(f"{path}: not written, because the mask is empty; look at the scan and the run")
    return series


def _planes(mask: sitk.Image, series: Series) -> Iterator[np.ndarray]:
    """Where the mask is foreground in each slice of the series, bool (rows, columns).

    The mask's own slices lie elsewhere if those of the series lean or are unevenly spaced.
    """
    for position in series.positions:
        plane = sitk.Image([*series.size, 1], mask.GetPixelID())
        plane.SetOrigin(position.tolist())
        plane.SetSpacing((*series.spacing, 1.0))
        plane.SetDirection(series.axes.ravel().tolist())
        on_plane = sitk.Resample(mask, plane, sitk.Transform(), sitk.sitkNearestNeighbor)
        yield sitk.GetArrayFromImage(on_plane)[0] != 0


def _cut(value: object, most: int) -> str:
    """A text of no more characters; of a name that many in each of its groups (PS3.5, 6.2.1.2)."""
    return "=".join(group[:most] for group in str(value or "").split("="))


def _item(**values: object) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def contoured_cases(
    folder: str | Path, roi: str | Sequence[str], *, modality: str, hash_patients: bool, fill_gaps: bool
) -> list[tuple[str, Callable[[], Case], dict[str, object]]]:
    """Every series of a modality below a folder that an ROI was drawn on: its name, how to read it, what is known.

    See `data.build.sources_from_dicom_rt`.
    """
    folder, names = Path(folder), [roi] if isinstance(roi, str) else list(roi)
    scans, paths, faults = _scans_below(folder)
    rois_of, keys_by_patient, cases = defaultdict(list), defaultdict(list), []
    shown = (lambda patient: pseudonym(patient_key(patient))) if hash_patients else str
    for rois in _structures(paths, faults):
        rois = [organ._replace(patient=shown(organ.patient)) for organ in rois]
        keys_of = [organ.drawn_on(scans) for organ in rois]
        if not any(organ.contour_count for organ in rois):
            warnings.warn(f"{rois[0].path}: has no contours, so it is passed over", stacklevel=3)
            continue
        for organ, keys in zip(rois, keys_of, strict=True):
            for key in keys:
                rois_of[key].append(organ)
        if not any(keys_of):
            with _kept(faults):
                _series_of(rois[0], scans)
    for key, scan in sorted(scans.items(), key=lambda item: (item[1].patient, item[1].date, item[0])):
        keys_by_patient[pseudonym(scan.patient)].append(key)
    for name, keys in keys_by_patient.items():
        others = [key for key in keys if key in rois_of and scans[key].modality != modality]
        keys = [key for key in keys if scans[key].modality == modality]
        contoured = [key for key in keys if key in rois_of]
        if not keys:
            continue
        patient, place = scans[keys[0]].patient, scans[keys[0]].files[0].parent
        if not patient:
            faults.append(f"{place}: has no Patient ID (0010,0020); fill it in")
        elif not contoured:
            but = "".join(f", but one was drawn on {scans[key].modality} series {key.series}" for key in others)
            faults.append(f"{place}: patient {shown(patient)} has no RTSTRUCT{but}; add it, or take it away")
        for number, key in enumerate(contoured if patient else [], start=1):
            patient, files = shown(scans[key].patient), scans[key].files
            with _kept(faults):
                organ = _one(rois_of[key], names, f"{files[0].parent}: patient {patient}")
                _series_of(organ, {other: scans[other] for other in keys})
                case_id = name + (f"-{number}" if len(contoured) > 1 else "")
                cases.append(_contoured(case_id, files, organ._replace(patient=patient), modality, fill_gaps))
    if not (faults or cases):
        faults = [f"{folder}: holds no {modality} series; choose its folder, or set modality to what is there"]
    if faults:
        for _, read, _ in cases:
            with _kept(faults):
                read()
        raise CohortError(faults)
    return cases


def _contoured(
    case_id: str, files: list[Path], roi: Roi, modality: str, fill_gaps: bool
) -> tuple[str, Callable[[], Case], dict[str, object]]:
    folder, columns = files[0].parent, {"patient": roi.patient, "label": roi.name, "roi": roi.name}

    def read() -> Case:
        try:
            rois = [found._replace(patient=roi.patient) for found in _rois(roi.path)]  # before any warning names it
            label = _mask(_one(rois, [roi.name], str(roi.path)), series_geometry(folder, files), fill_gaps)
            image = read_series(folder, files)
        except ValueError as error:
            lines = str(error).splitlines()
            raise ValueError("\n".join(f"case {case_id}, patient {roi.patient}: {line}" for line in lines)) from error
        if label.HasMetaDataKey("notes"):
            columns["roi_notes"] = label.GetMetaData("notes")  # the table is written after its cases were read
        names = str(folder), str(roi.path)
        return checked_case(case_id, image, label, image_name=names[0], label_name=names[1], modality=modality)

    return case_id, read, columns
