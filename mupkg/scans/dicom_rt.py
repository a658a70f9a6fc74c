"""Planning scans and their contours: DICOM structure sets (RTSTRUCT) read as masks, masks written as structure sets.

A contour is a closed polygon in the plane of one slice, its points in mm. A voxel belongs to a region of interest
(ROI) if its centre lies inside an odd number of the ROI's contours on its slice. This even-odd rule covers holes,
keyholes and islands alike. Attributes are those of DICOM PS3.3, C.8.8.5 (structure set) and C.8.8.6 (contours).
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
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

from mupkg import __version__
from mupkg.scans.cases import Case, CohortError, checked_case, essence, grid_difference, spelt_alike
from mupkg.scans.files import access_named, files_below, read_series
from mupkg.scans.geometry import HEADER, Series, dicom_header, series_geometry, series_image
from mupkg.scans.headers import Fault, named
from mupkg.scans.writing import whole_file

NO_DEVICE = "Research software, no medical device: not for diagnosis or treatment planning."
RESEARCH = "Research, no medical device"  # where there is room for 64 characters
SCANS = ("CT", "MR")  # modalities that contours are drawn on
OFF_PLANE = 0.1  # of the slice distance; a contour farther from every slice was drawn on one that is not there
PATIENT_AND_STUDY = {  # what a structure set repeats from its slices, and the most characters that DICOM allows
    **{"PatientName": 64, "PatientID": 64, "PatientBirthDate": 8, "PatientSex": 16, "ReferringPhysicianName": 64},
    **{"StudyInstanceUID": 64, "StudyDate": 8, "StudyTime": 16, "StudyID": 16, "AccessionNumber": 16},
}
STUDY = "1.2.840.10008.3.1.2.3.1"  # SOP class of a detached study; retired, but the standard still asks for it here


class Key(NamedTuple):
    """What tells one series from another: its UID, and its coordinate system."""

    series: str
    frame: str  # of reference; "" if the series does not say


@dataclass
class Found:
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
    drawn: int  # how many contours it has, also where they were not kept

    def __str__(self) -> str:
        return f"{self.path}: patient {self.patient}, ROI {self.name!r}"

    def drawn_on(self, found: dict[Key, Found]) -> list[Key]:
        """The series it names; if that is not there, those of its frame and kind, for a copy has a new UID."""
        same = [key for key in found if key.frame == self.frame != ""]
        named = [key for key in found if key.series in self.series and (key in same or "" in (key.frame, self.frame))]
        alike = [key for key in same if found[key].modality in SCANS]
        return named or [key for key in alike if found[key].kind in self.kinds or not self.kinds]


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
    found, paths, faults = _found(Path(folder))
    rows, bare = [], dict(found)
    for roi in (roi for rois in _structures(paths, faults) for roi in rois):
        for key in roi.drawn_on(found) or [Key(min(roi.series, default=""), roi.frame)]:
            told = (found[key].modality, found[key].slices) if key in found else ("", 0)
            rows.append((roi.patient, key.series, *told, roi.name, roi.drawn, str(roi.path)))
            bare.pop(key, None)
    if damaged is not None:
        damaged += faults
    elif faults:
        raise CohortError(faults)
    for key, one in bare.items():
        rows.append((one.patient, key.series, one.modality, one.slices, None, 0, str(one.files[0].parent)))
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


def _found(folder: Path) -> tuple[dict[Key, Found], list[Path], list[str]]:
    """All series below a folder, all structure sets, and what is wrong with files that cannot be told apart."""
    with access_named(folder):
        if not folder.is_dir():
            raise CohortError([f"{folder}: there is no such folder; check its name"])
    found: dict[Key, Found] = {}
    structures, faults = [], []
    for path in sorted(files_below(folder, faults)):
        with _kept(faults), access_named(path), named(path, "DICOM"):
            header = dicom_header(path)
            if header is not None and header.SOPClassUID == RTStructureSetStorage:
                structures.append(path)
            elif header is not None and "Rows" in header:
                told = {name: str(header.get(name) or "").strip() for name in HEADER}
                key = Key(told["SeriesInstanceUID"], told["FrameOfReferenceUID"])
                date = told["StudyDate"] + told["StudyTime"]
                one = found.setdefault(key, Found(told["SOPClassUID"], told["Modality"], told["PatientID"], date))
                one.files.append(path)
                one.slices += int(header.get("NumberOfFrames") or 1)
    return found, structures, faults


def _structures(paths: Iterable[Path], faults: list[str]) -> Iterator[list[Roi]]:
    """The ROIs of each structure set without their contours, which take much memory; damaged ones become faults."""
    for path in paths:
        with _kept(faults):
            yield [roi._replace(contours=[]) for roi in _rois(path)]


def _rois(path: Path) -> list[Roi]:
    """All ROIs of a structure set; ValueError naming the file if it is none, or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check its name")
    contours, series, kinds, rois = defaultdict(list), defaultdict(set), defaultdict(set), []
    with access_named(path), named(path, "a structure set"):
        header = dicom_header(path)
        if header is None or header.get("SOPClassUID") != RTStructureSetStorage:
            raise Fault("is not a DICOM structure set (RTSTRUCT)", "give the file that holds the contours")
        structures = dcmread(path, force=True)
        for item in structures.ROIContourSequence:
            contours[int(item.ReferencedROINumber)] += item.get("ContourSequence") or []
        for frame in structures.get("ReferencedFrameOfReferenceSequence") or []:
            for study in frame.get("RTReferencedStudySequence") or []:
                for one in study.get("RTReferencedSeriesSequence") or []:
                    series[frame.FrameOfReferenceUID].add(str(one.SeriesInstanceUID))
                    images = one.get("ContourImageSequence") or []
                    kinds[frame.FrameOfReferenceUID] |= {str(image.ReferencedSOPClassUID) for image in images}
        patient = str(structures.get("PatientID") or "").strip()
        for item in structures.StructureSetROISequence:
            frame = str(item.get("ReferencedFrameOfReferenceUID") or structures.get("FrameOfReferenceUID") or "")
            known = str(item.get("ROIName") or "").strip(), frame, series[frame], kinds[frame]
            drawn = contours[int(item.ROINumber)]
            rois.append(Roi(path, patient, *known, drawn, len(drawn)))
    return rois


def _one(rois: Sequence[Roi], names: Sequence[str], where: str) -> Roi:
    """The ROI that has the first name or pattern any has, with contours if it can be; ValueError if it is not one."""
    hits: list[Roi] = []
    for among in ([roi for roi in rois if roi.drawn], rois):
        for name in names:
            exact = [roi for roi in among if roi.name == name]
            hits = hits or exact or [roi for roi in among if fnmatchcase(roi.name.casefold(), name.casefold())]
    if len(hits) != 1:
        wanted, there = " or ".join(map(repr, names)), ", ".join(sorted({roi.name for roi in rois})) or "none"
        if hits:
            there = " and ".join(f"{roi.name!r} in {roi.path.name}" for roi in hits)
        raise ValueError(f"{where}: has {len(hits) or 'no'} ROIs {wanted}, but {there}; name another, or mend it")
    return hits[0]


def _series_of(roi: Roi, found: dict[Key, Found]) -> Key:
    """The series it was drawn on; ValueError if that is not there, or if it may be one of several."""
    keys = roi.drawn_on(found)
    there = ", ".join(key.series for key in keys or found) or "none"
    if not keys:
        told = f"{', '.join(sorted(roi.series)) or 'unknown'} of frame of reference {roi.frame or 'unknown'}"
        raise ValueError(f"{roi}: was drawn on series {told}, but here is {there}; choose the folder of that series")
    if len(keys) > 1:
        raise ValueError(f"{roi}: may be of {len(keys)} series, {there}; keep one of them in the folder")
    if keys[0].series not in roi.series:
        warnings.warn(
            f"{roi}: was drawn on a series that is not there; taken for {there}, of its frame", stacklevel=3
        )
    return keys[0]


def read_rtstruct(path: str | Path, series_folder: str | Path, roi: str) -> sitk.Image:
    """An ROI as a mask: uint8, 0 or 1, on the series' own grid, slices in the order SimpleITK reads them.

    Args:
        path: the structure set.
        series_folder: where its series lies; of several there, the one that the structure set refers to.
        roi: the ROI's name; case counts only where nothing else tells two names apart.

    Raises:
        ValueError: naming file, patient, ROI and slice, if the structure set is of another series, or the ROI is not
            there, is there twice, has no contours, or has some that are open, outside the volume or on no slice.
    """
    found, _, faults = _found(Path(series_folder))
    if faults:
        raise CohortError(faults)
    one = _one(_rois(Path(path)), [roi], str(path))
    return _mask(one, series_geometry(series_folder, found[_series_of(one, found)].files))


def _mask(roi: Roi, series: Series) -> sitk.Image:
    """Voxel centres inside an odd number of the ROI's contours, on the grid that the series is read on."""
    heights = series.positions @ series.axes[:, 2]
    mask, marks = np.zeros((len(heights), *series.size[::-1]), np.uint8), []
    faults: dict[str, set[float]] = defaultdict(set)
    for contour in roi.contours:
        kind, numbers = str(contour.get("ContourGeometricType")), contour.get("ContourData") or []
        points = np.array(numbers, float)
        if not points.size or points.size % 3 or not np.isfinite(points).all():
            raise ValueError(f"{roi}: has a contour without x, y and z of every point; export it again")
        points = points.reshape(-1, 3)
        along = points @ series.axes[:, 2]
        z = int(np.abs(heights - along.mean()).argmin())
        xy = (points - series.positions[z]) @ series.axes[:, :2] / series.spacing
        if kind == "POINT":
            marks.append(along[0])  # which is passed over beside contours
        elif not kind.startswith("CLOSED"):
            faults[f"is {kind}, so it encloses nothing; close it in the planning system"].add(along[0])
        elif np.abs(along - heights[z]).max() > OFF_PLANE * np.diff(heights).min():
            faults["lies on no slice; give the whole series that it was drawn on"].add(along[0])
        elif (xy < -1).any() or (xy > series.size).any():
            faults["leads out of its slice; give the series that it was drawn on, uncropped"].add(along[0])
        else:
            low, high = np.maximum(np.floor(xy.min(0)), 0).astype(int), np.ceil(xy.max(0)).astype(int) + 1
            part = mask[z, low[1] : high[1], low[0] : high[0]]
            rows, columns = np.indices(part.shape)
            centres = np.c_[columns.ravel() + low[0], rows.ravel() + low[1]]
            part ^= Polygon(xy).contains_points(centres).reshape(part.shape)
    if roi.contours and len(marks) == len(roi.contours):
        faults["is a POINT, so it encloses nothing; draw the outline"] |= {*marks}
    if faults:
        at = {fault: ", ".join(f"{height:.2f}" for height in sorted(places)) for fault, places in faults.items()}
        span = f"slices lie at {heights[0]:.2f} to {heights[-1]:.2f} mm"
        raise ValueError("\n".join(f"{roi}: the contour at {at[fault]} mm {fault} ({span})" for fault in faults))
    if not mask.any():
        what = "encloses the centre of no voxel" if roi.contours else "has no contours"
        raise ValueError(f"{roi}: {what}; draw it, or leave the scan out")
    return series_image(series, mask, label=True)


def write_rtstruct(
    mask: sitk.Image,
    series_folder: str | Path,
    path: str | Path,
    *,
    name: str = "Prostate",
    description: str = "",
    colour: tuple[int, int, int] = (0, 255, 0),
) -> None:
    """Write a mask as the one ROI of a structure set of its series: unapproved, and said to be research alone.

    Contours run half-way between foreground and background, so that `read_rtstruct` gives the same mask.

    Args:
        mask: foreground is not 0; on the series' grid.
        series_folder: holds the slices of one series.
        description: which model made the mask, and what it was trained on.
        colour: red, green and blue, 0 to 255.

    Raises:
        ValueError: if the folder holds no series, or several, or the mask is empty or not on its grid.
        OSError: if the file cannot be written; then nothing is.
    """
    series, images, contours = _series_for(mask, series_folder, path), [], []
    first = dcmread(series.files[0], stop_before_pixels=True, force=True)
    frame = first.get("FrameOfReferenceUID")
    if not frame:
        raise ValueError(f"{series.files[0]}: has no FrameOfReferenceUID, which contours need; export it again")
    for uid, number, position, plane in zip(
        series.uids, series.frames, series.positions, _planes(mask, series), strict=True
    ):
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
    drawn = _item(ROIDisplayColor=list(colour), ReferencedROINumber=1, ContourSequence=contours)
    seen = _item(ObservationNumber=1, ReferencedROINumber=1, RTROIInterpretedType="ORGAN", ROIInterpreter="")
    date, time = datetime.now().strftime("%Y%m%d %H%M%S").split()
    structures = _item(
        SpecificCharacterSet="ISO_IR 192",
        **{keyword: str(first.get(keyword) or "")[:most] for keyword, most in PATIENT_AND_STUDY.items()},
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


def write_dicom_seg(
    mask: sitk.Image,
    series_folder: str | Path,
    path: str | Path,
    *,
    name: str = "Prostate",
    description: str = "mupkg",
) -> None:
    """The same as DICOM SEG, which holds voxels instead of contours; by highdicom, the extra `dicomseg`."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    series = _series_for(mask, series_folder, path)
    slices = [dcmread(file, stop_before_pixels=True, force=True) for file in dict.fromkeys(series.files)]
    for keyword in PATIENT_AND_STUDY:
        for slice_ in slices:
            slice_.setdefault(keyword, "")
    model = AlgorithmIdentificationSequence(description[:64], codes.DCM.ArtificialIntelligence, __version__)
    organ = codes.SCT.Organ, codes.SCT.Prostate
    segmentation = Segmentation(
        source_images=slices,
        pixel_array=np.stack(list(_planes(mask, series))),
        segmentation_type="BINARY",
        segment_descriptions=[SegmentDescription(1, name, *organ, "AUTOMATIC", algorithm_identification=model)],
        **{"series_instance_uid": generate_uid(), "series_number": 1, "series_description": RESEARCH},
        **{"sop_instance_uid": generate_uid(), "instance_number": 1, "content_description": RESEARCH},
        **{"manufacturer": "mupkg", "manufacturer_model_name": "mupkg", "device_serial_number": "none"},
        software_versions=__version__,
    )
    with whole_file(path) as temporary:
        segmentation.save_as(temporary)


def _series_for(mask: sitk.Image, folder: str | Path, path: str | Path) -> Series:
    """The series in a folder; ValueError if it is not one, or the mask is empty or not on its grid."""
    series = series_geometry(folder)
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


def _item(**values: object) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def contoured_cases(
    folder: str | Path, roi: str | Sequence[str], *, modality: str, hash_patients: bool
) -> list[tuple[str, Callable[[], Case], dict[str, object]]]:
    """Every series of a modality below a folder that an ROI was drawn on: its name, how to read it, what is known.

    See `data.build.sources_from_dicom_rt`.
    """
    folder, names = Path(folder), [roi] if isinstance(roi, str) else list(roi)
    found, paths, faults = _found(folder)
    drawn, scans, cases = defaultdict(list), defaultdict(list), []
    told = pseudonym if hash_patients else str
    for rois in _structures(paths, faults):
        rois = [one._replace(patient=told(one.patient)) for one in rois]
        keys_of = [one.drawn_on(found) for one in rois]
        for one, keys in zip(rois, keys_of, strict=True):
            for key in keys:
                drawn[key].append(one)
        if rois and not any(keys_of):
            with _kept(faults):
                _series_of(rois[0], found)
    for key, scan in sorted(found.items(), key=lambda item: (item[1].patient, item[1].date, item[0])):
        if scan.modality == modality:
            scans[pseudonym(scan.patient)].append(key)
    for name, keys in scans.items():
        contoured = [key for key in keys if key in drawn]
        patient, place = found[keys[0]].patient, found[keys[0]].files[0].parent
        if not patient:
            faults.append(f"{place}: has no Patient ID (0010,0020); fill it in")
        elif not contoured:
            faults.append(f"{place}: patient {told(patient)} has no RTSTRUCT; add it, or take it away")
        for number, key in enumerate(contoured if patient else [], start=1):
            patient, files = told(found[key].patient), found[key].files
            with _kept(faults):
                one = _one(drawn[key], names, f"{files[0].parent}: patient {patient}")
                _series_of(one, {other: found[other] for other in keys})
                case_id = name + (f"-{number}" if len(contoured) > 1 else "")
                cases.append(_contoured(case_id, files, one._replace(patient=patient), modality))
    if not (faults or cases):
        faults = [f"{folder}: holds no {modality} series; choose its folder, or set modality to what is there"]
    if faults:
        for _, read, _ in cases:
            with _kept(faults):
                read()
        raise CohortError(faults)
    return cases


def _contoured(
    case_id: str, files: list[Path], roi: Roi, modality: str
) -> tuple[str, Callable[[], Case], dict[str, object]]:
    folder = files[0].parent

    def read() -> Case:
        try:
            one = _one(_rois(roi.path), [roi.name], str(roi.path))
            label = _mask(one._replace(patient=roi.patient), series_geometry(folder, files))
            image = read_series(folder, files)
        except ValueError as error:
            lines = str(error).splitlines()
            raise ValueError("\n".join(f"case {case_id}, patient {roi.patient}: {line}" for line in lines)) from error
        names = str(folder), str(roi.path)
        return checked_case(case_id, image, label, image_name=names[0], label_name=names[1], modality=modality)

    return case_id, read, {"patient": roi.patient, "label": roi.name, "roi": roi.name}
