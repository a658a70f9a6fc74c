"""Planning scans and their contours: DICOM structure sets (RTSTRUCT) read as masks, masks written as structure sets.

A contour is a closed polygon in the plane of one slice, its points in mm. A voxel belongs to a region of interest
(ROI) if its centre lies inside an odd number of the ROI's contours on its slice. This even-odd rule covers holes,
keyholes and islands alike. Attributes are those of DICOM PS3.3, C.8.8.5 (structure set) and C.8.8.6 (contours).
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from mupkg.data.build import Source, files_below
from mupkg.data.cases import Case, checked_case, grid_difference
from mupkg.data.cohort import CohortError
from mupkg.data.files import read_series, readable
from mupkg.data.geometry import HEADER, Series, dicom_header, series_geometry, series_image
from mupkg.data.headers import Fault, named
from mupkg.data.writing import whole_file

NO_DEVICE = "Research software, no medical device: not for diagnosis or treatment planning."
RESEARCH = "Research, no medical device"  # where there is room for 64 characters
SCANS = ("CT", "MR")  # modalities that contours are drawn on
OFF_PLANE = 0.1  # of the slice distance; a contour farther from every slice was drawn on one that is not there
PATIENT_AND_STUDY = {  # what a structure set repeats from its slices, and the most characters DICOM allows
    **{"PatientName": 64, "PatientID": 64, "PatientBirthDate": 8, "PatientSex": 16, "ReferringPhysicianName": 64},
    **{"StudyInstanceUID": 64, "StudyDate": 8, "StudyTime": 16, "StudyID": 16, "AccessionNumber": 16},
}
STUDY = [  # what a structure set repeats from its slices
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
]
STUDY = "1.2.840.10008.3.1.2.3.1"  # SOP class of a detached study; retired, but the one that references name


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

    def __str__(self) -> str:
        return f"{self.path}: patient {self.patient}, ROI {self.name!r}"

    def drawn_on(self, found: dict[Key, Found]) -> list[Key]:
        """The series it names; if that is not there, those of its frame and kind, for a copy has a new UID."""
        same = [key for key in found if key.frame == self.frame != ""]
        named = [key for key in found if key.series in self.series and (key in same or "" in (key.frame, self.frame))]
        alike = [key for key in same if found[key].modality in SCANS]
        return named or [key for key in alike if found[key].kind in self.kinds or not self.kinds]


def list_dicom(folder: str | Path) -> pd.DataFrame:
    """What a folder and those below it hold: a row a series and ROI, or a series without any.

    Columns: patient (ID), series (UID), modality, slices, roi, contours, and path (of the structure set, or of the
    series' folder where it has none). An ROI whose series is not there has 0 slices. No voxels are read.

    Raises:
        ValueError: naming files and folders that are damaged or may not be read.
    """
    found, structures = _found(Path(folder))
    rows, bare = [], dict(found)
    for roi in (roi for path in structures for roi in _rois(path)):
        for key in roi.drawn_on(found) or [Key(min(roi.series, default=""), roi.frame)]:
            told = (found[key].modality, found[key].slices) if key in found else ("", 0)
            rows.append((roi.patient, key.series, *told, roi.name, len(roi.contours), str(roi.path)))
            bare.pop(key, None)
    for key, one in bare.items():
        rows.append((one.patient, key.series, one.modality, one.slices, None, 0, str(one.files[0].parent)))
    columns = ["patient", "series", "modality", "slices", "roi", "contours", "path"]
    return pd.DataFrame(sorted(rows, key=str), columns=columns)


def _found(folder: Path) -> tuple[dict[Key, Found], list[Path]]:
    """All series below a folder, and all structure sets."""
    with readable(folder):
        if not folder.is_dir():
            raise CohortError([f"{folder}: there is no such folder; check its name"])
    found: dict[Key, Found] = {}
    structures, faults = [], []
    for path in sorted(files_below(folder, faults)):
        try:
            with readable(path), named(path, "DICOM"):
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
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise CohortError(faults)
    return found, structures


def _rois(path: Path) -> list[Roi]:
    """All ROIs of a structure set; ValueError naming the file if it is none, or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check its name")
    contours, series, kinds, rois = defaultdict(list), defaultdict(set), defaultdict(set), []
    with readable(path), named(path, "a structure set"):
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
            rois.append(Roi(path, patient, *known, contours[int(item.ROINumber)]))
    return rois


def _one(rois: Sequence[Roi], names: Sequence[str], where: str) -> Roi:
    """The ROI that has the first name or pattern any has, with contours if it can be; ValueError if it is not one."""
    hits: list[Roi] = []
    for among in ([roi for roi in rois if roi.contours], rois):
        for name in names:
            exact = [roi for roi in among if roi.name == name]
            alike = [roi for roi in among if fnmatchcase(roi.name.casefold(), name.casefold())]
            hits = hits or exact or alike
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
        named = f"{', '.join(sorted(roi.series)) or 'unknown'} of frame of reference {roi.frame or 'unknown'}"
        raise ValueError(f"{roi}: was drawn on series {named}, but here is {there}; choose the folder of that series")
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
    found, _ = _found(Path(series_folder))
    one = _one(_rois(Path(path)), [roi], str(path))
    return _mask(one, series_geometry(series_folder, found[_series_of(one, found)].files))


def _mask(roi: Roi, series: Series) -> sitk.Image:
    """Voxel centres inside an odd number of the ROI's contours, on the grid that the series is read on."""
    heights = series.positions @ series.axes[:, 2]
    mask = np.zeros((len(heights), *series.size[::-1]), np.uint8)
    faults: dict[str, list[float]] = defaultdict(list)
    for contour in roi.contours:
        kind, numbers = str(contour.get("ContourGeometricType")), contour.get("ContourData") or []
        if kind == "POINT":
            continue  # a mark, which encloses nothing
        points = np.array(numbers, float)
        if not points.size or points.size % 3 or not np.isfinite(points).all():
            raise ValueError(f"{roi}: has a contour without x, y and z of every point; export it again")
        points = points.reshape(-1, 3)
        along = points @ series.axes[:, 2]
        z = int(np.abs(heights - along.mean()).argmin())
        xy = (points - series.positions[z]) @ series.axes[:, :2] / series.spacing
        if not kind.startswith("CLOSED"):
            faults[f"is {kind}, so it encloses nothing; close it in the planning system"].append(along[0])
        elif np.abs(along - heights[z]).max() > OFF_PLANE * np.diff(heights).min():
            faults["lies on no slice; give the whole series that it was drawn on"].append(along[0])
        elif (xy < -1).any() or (xy > series.size).any():
            faults["leads out of its slice; give the series that it was drawn on, uncropped"].append(along[0])
        else:
            low, high = np.maximum(np.floor(xy.min(0)), 0).astype(int), np.ceil(xy.max(0)).astype(int) + 1
            part = mask[z, low[1] : high[1], low[0] : high[0]]
            rows, columns = np.indices(part.shape)
            centres = np.c_[columns.ravel() + low[0], rows.ravel() + low[1]]
            part ^= Polygon(xy).contains_points(centres).reshape(part.shape)
    if not (faults or mask.any()):
        what = "encloses the centre of no voxel" if roi.contours else "has no contours"
        raise ValueError(f"{roi}: {what}; draw it, or leave the scan out")
    if faults:
        span = f"slices lie at {heights[0]:.2f} to {heights[-1]:.2f} mm"
        at = {fault: ", ".join(f"{height:.2f}" for height in sorted(set(places))) for fault, places in faults.items()}
        raise ValueError("\n".join(f"{roi}: the contour at {at[fault]} mm {fault} ({span})" for fault in faults))
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
    series = _series_for(mask, series_folder, path)
    first, images, contours = dcmread(series.files[0], stop_before_pixels=True, force=True), [], []
    if not first.get("FrameOfReferenceUID"):
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
    structures = _structure_set(first, images, contours, name, f"{NO_DEVICE} {description}".strip(), colour)
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
        series_instance_uid=generate_uid(),
        series_number=1,
        series_description=RESEARCH,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="mupkg",
        manufacturer_model_name="mupkg",
        software_versions=__version__,
        device_serial_number="none",
        content_description=RESEARCH,
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


def _structure_set(
    first: Dataset, images: list[Dataset], contours: list[Dataset], name: str, description: str, colour: Sequence[int]
) -> Dataset:
    """A structure set with one ROI, of the patient, the study and the series of the slice `first`."""
    date, time = datetime.now().strftime("%Y%m%d %H%M%S").split()
    frame = first.FrameOfReferenceUID
    series = _item(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=images)
    study = _item(ReferencedSOPClassUID=STUDY, ReferencedSOPInstanceUID=first.StudyInstanceUID)
    study.RTReferencedSeriesSequence = [series]
    roi = _item(ROINumber=1, ReferencedFrameOfReferenceUID=frame, ROIName=name, ROIGenerationAlgorithm="AUTOMATIC")
    drawn = _item(ROIDisplayColor=list(colour), ReferencedROINumber=1, ContourSequence=contours)
    seen = _item(ObservationNumber=1, ReferencedROINumber=1, RTROIInterpretedType="ORGAN", ROIInterpreter="")
    structures = _item(
        SpecificCharacterSet="ISO_IR 192",
        **{keyword: str(first.get(keyword) or "")[:most] for keyword, most in PATIENT_AND_STUDY.items()},
        SOPClassUID=RTStructureSetStorage,
        SOPInstanceUID=generate_uid(),
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=1,
        SeriesDescription=RESEARCH,
        Modality="RTSTRUCT",
        Manufacturer="mupkg",
        SoftwareVersions=__version__,
        OperatorsName="",
        FrameOfReferenceUID=frame,
        PositionReferenceIndicator="",
        StructureSetLabel="RESEARCH",
        StructureSetDescription=description,
        StructureSetDate=date,
        StructureSetTime=time,
        ReferencedFrameOfReferenceSequence=[_item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])],
        StructureSetROISequence=[roi],
        ROIContourSequence=[drawn],
        RTROIObservationsSequence=[seen],
        ApprovalStatus="UNAPPROVED",
    )
    structures.file_meta = FileMetaDataset()
    structures.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return structures


def sources_from_dicom_rt(
    folder: str | Path, roi: str | Sequence[str] = "Prostate", *, modality: str = "CT", hash_patients: bool = False
) -> list[Source]:
    """Every series of a modality below a folder that an ROI was drawn on, with that ROI as its label.

    Folders may be nested in any way. Nothing of a header enters the table but the patient's ID and the ROI's name.

    Args:
        roi: the ROI's name; or several names or patterns such as "prostate_*", of which the first that fits counts.
            As in TG-263, case does not matter.
        hash_patients: name patients and cases by a hash of the patient's ID. It keeps IDs out of sight, but whoever
            has a list of the IDs can find them again.

    Raises:
        CohortError: with every patient without contours, every series without exactly one such ROI, and every
            structure set whose series is not there.
    """
    folder, names = Path(folder), [roi] if isinstance(roi, str) else list(roi)
    found, structures = _found(folder)
    drawn, of_patient, faults, sources = defaultdict(list), defaultdict(list), [], []
    for path in structures:
        try:
            rois = [(one, one.drawn_on(found)) for one in _rois(path)]
            if rois and not any(keys for _, keys in rois):
                _series_of(rois[0][0], found)
        except ValueError as error:
            faults.append(str(error))
            continue
        for one, keys in rois:
            for key in keys:
                drawn[key].append(one._replace(contours=one.contours[:1]))  # all of them take much memory
    for key, scan in sorted(found.items(), key=lambda item: (item[1].date, item[0])):
        if scan.modality == modality:
            of_patient[scan.patient].append(key)
    for patient, keys in sorted(of_patient.items()):
        contoured = [key for key in keys if key in drawn]
        who = hashlib.sha256(patient.encode()).hexdigest()[:12] if hash_patients else patient
        if not (patient and contoured):
            what = (
                "has no RTSTRUCT; add it, or take it away" if patient else "has no Patient ID (0010,0020); fill it in"
            )
            faults.append(f"{found[keys[0]].files[0].parent}: patient {who} {what}")
            continue
        for number, key in enumerate(contoured, start=1):
            try:
                one = _one(drawn[key], names, f"{found[key].files[0].parent}: patient {who}")
                _series_of(one, {other: found[other] for other in keys})
            except ValueError as error:
                faults.append(str(error))
                continue
            case_id = _case_name(who) + (f"-{number}" if len(contoured) > 1 else "")
            sources.append(_source(case_id, found[key].files, one._replace(patient=who), modality))
    if not (faults or sources):
        faults = [f"{folder}: holds no {modality} series; choose its folder, or set modality to what is there"]
    if faults:
        raise CohortError(faults)
    return sources


def _case_name(patient: str) -> str:
    """A patient's ID as a name of files; marked where that changes it, so that no two become the same."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", patient).lstrip("._-")
    return name if name == patient else f"{name or 'patient'}-{hashlib.sha256(patient.encode()).hexdigest()[:6]}"


def _source(case_id: str, files: list[Path], roi: Roi, modality: str) -> Source:
    folder = files[0].parent

    def read() -> Case:
        try:
            image = read_series(folder, files)
            one = _one(_rois(roi.path), [roi.name], str(roi.path))
            label = _mask(one._replace(patient=roi.patient), series_geometry(folder, files))
        except ValueError as error:
            raise ValueError("\n".join(f"case {case_id}: {line}" for line in str(error).splitlines())) from error
        names = {"image_name": str(folder), "label_name": str(roi.path)}
        return checked_case(case_id, image, label, **names, modality=modality)

    return Source(case_id, read, {"patient": roi.patient, "label": roi.name, "roi": roi.name})
