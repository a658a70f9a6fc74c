"""DICOM series and structure sets made by pydicom alone: what the package reads and writes is judged against them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, RTStructureSetStorage

ROOT = "1.2.826.0.1.3680043.8.498."  # of pydicom's own UIDs

Contour = tuple[str | None, np.ndarray] | tuple[str | None, np.ndarray, dict[str, object]]
# its geometric type (None leaves it out), its points (n, 3) in mm, and further fields


def item(**values: object) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    image: sitk.Image,
    *,
    patient: str = "P1",
    series: str = f"{ROOT}1",
    frame: str = f"{ROOT}9",
    modality: str = "CT",
    **tags: object,
) -> list[Path]:
    """One file a slice of an int16 image, in the order of its slices; file names run against them."""
    axes, paths = np.reshape(image.GetDirection(), (3, 3)), []
    for z, voxels in enumerate(sitk.GetArrayFromImage(image)):
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        told = {
            "SOPClassUID": CTImageStorage if modality == "CT" else MRImageStorage,
            "SOPInstanceUID": f"{series}.{z + 1}",
            "PatientID": patient,
            "PatientName": "Doe^John",
            "PatientBirthDate": "19500102",
            "PatientSex": "M",
            "StudyInstanceUID": f"{ROOT}2",
            "StudyDate": "20200102",
            "StudyTime": "101112",
            "SeriesInstanceUID": series,
            "FrameOfReferenceUID": frame,
            "Modality": modality,
            "InstanceNumber": z + 1,
            "ImagePositionPatient": [f"{value:.9g}" for value in position],
            "ImageOrientationPatient": [f"{value:.9f}" for value in axes[:, :2].T.ravel()],
            "PixelSpacing": [f"{value:.9g}" for value in image.GetSpacing()[1::-1]],
            "SliceThickness": f"{image.GetSpacing()[2]:.9g}",
            "Rows": voxels.shape[0],
            "Columns": voxels.shape[1],
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
            "RescaleSlope": "1",
            "RescaleIntercept": "0",
            "PixelData": voxels.astype("<i2").tobytes(),
        }
        paths.append(save(item(**told | tags), folder / f"IM{999 - z}.dcm"))
    return paths


def closed(*polygons: np.ndarray) -> list[Contour]:
    return [("CLOSED_PLANAR", points) for points in polygons]


def write_structures(
    path: Path,
    rois: Mapping[str, Iterable[Contour]] | Iterable[tuple[str, Iterable[Contour]]],
    *,
    patient: str = "P1",
    series: str = f"{ROOT}1",
    frame: str = f"{ROOT}9",
    kind: str = CTImageStorage,
    numbers: Iterable[int] | None = None,
    decimals: int = 3,
    **tags: object,
) -> Path:
    """A structure set with just what readers need: ROIs by name, each with its contours; and further fields."""
    rois = list(rois.items() if isinstance(rois, Mapping) else rois)
    numbers = list(range(len(rois)) if numbers is None else numbers)
    image = item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=f"{series}.1")
    referred = item(SeriesInstanceUID=series, ContourImageSequence=[image])
    study = item(RTReferencedSeriesSequence=[referred])
    structures = item(
        SOPClassUID=RTStructureSetStorage,
        SOPInstanceUID=f"{series}.1000",
        PatientID=patient,
        SeriesInstanceUID=f"{series}.1000",
        Modality="RTSTRUCT",
        ReferencedFrameOfReferenceSequence=[item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])],
        StructureSetROISequence=[
            item(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=frame)
            for number, (name, _) in zip(numbers, rois, strict=True)
        ],
        ROIContourSequence=[
            item(
                ReferencedROINumber=number,
                ContourSequence=[
                    item(
                        **({} if kind is None else {"ContourGeometricType": kind}),
                        **{
                            "NumberOfContourPoints": len(points),
                            "ContourData": [f"{value:.{decimals}f}" for value in np.ravel(points)],
                        }
                        | (more[0] if more else {}),
                    )
                    for kind, points, *more in contours
                ],
            )
            for number, (_, contours) in zip(numbers, rois, strict=True)
        ],
        RTROIObservationsSequence=[],
    )
    for keyword, value in tags.items():
        setattr(structures, keyword, value) if value is not None else delattr(structures, keyword)
    return save(structures, path)
