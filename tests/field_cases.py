"""Inputs from the field: structure sets, DICOM, tables, study files, `segment`, notebooks.

Each case is one function: it builds an input of synthetic voxels in `folder`, gives it to the product by a public
door, and returns "ok...", "refused: <message>", "WRONG: <why>" or "TRACEBACK: <what>". Its decorator names the public
report it follows, and what may come back ("ok", "refused" or "either").

    PYTHONPATH=. python tests/field_cases.py [name ...]     prints holds / FAILS a case, and 'N of M hold'

Truth is the closed form a label was drawn from (an ellipsoid), never what the product says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    MRImageStorage,
)

ROOT = "1.2.826.0.1.3680043.9.777"
RTSS = "1.2.840.10008.5.1.4.1.1.481.3"
CASES = {}


def case(report, want="either"):
    def register(f):
        CASES[f.__name__] = (report, want, f)
        return f

    return register


# ------------------------------------------------------------------ a pelvis in HU, by formulas
SIZE, SPACING, ORIGIN = (128, 96, 26), (2.5, 2.5, 4.0), (-160.0, -120.0, -300.0)
PROSTATE = np.array([[5.3, 12.1, -250.7], [24.3, 18.4, 19.9]])  # centre and radii, mm
BLADDER = np.array([[0.0, -8.0, -222.0], [30.0, 22.0, 14.0]])


def grid(size=SIZE, spacing=SPACING, origin=ORIGIN, direction=np.eye(3)):
    i = sitk.Image(list(size), sitk.sitkInt16)
    i.SetSpacing(spacing)
    i.SetOrigin(origin)
    i.SetDirection(np.ravel(direction).tolist())
    return i


def points(image):
    """Physical points of all voxels (z, y, x, 3)."""
    n = image.GetSize()
    k = np.stack(np.meshgrid(*[np.arange(m) for m in n], indexing="ij"), -1).astype(float)
    d = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return (k @ d.T + image.GetOrigin()).transpose(2, 1, 0, 3)


def inside(image, solid):
    return (((points(image) - solid[0]) / solid[1]) ** 2).sum(-1) < 1


def like(array, image):
    out = sitk.GetImageFromArray(array)
    out.CopyInformation(image)
    return out


def pelvis(image=None, seed=0):
    """A CT in HU on this grid (fat, muscle, bones, prostate), int16, and the prostate's label."""
    image = grid() if image is None else image
    p = points(image)
    v = np.full(p.shape[:3], -1000, np.float32)
    ex = (p[..., 0] / 145) ** 2 + (p[..., 1] / 95) ** 2
    inner = (p[..., 0] / 125) ** 2 + (p[..., 1] / 78) ** 2
    v[ex < 1], v[inner < 1] = -100, 50
    for side in (-1, 1):
        v[(((p - [side * 85, 5, -240]) / 24) ** 2).sum(-1) < 1] = 300
    v[(abs(p[..., 0]) < 25) & (p[..., 1] > 45) & (p[..., 1] < 65)] = 250
    lab = inside(image, PROSTATE)
    v[lab] = 60
    v[ex < 1] += np.random.default_rng(seed).normal(0, 8, int((ex < 1).sum()))
    return like(np.round(v).astype(np.int16), image), like(lab.astype(np.uint8), image)


def dice(a, b):
    a, b = (np.asarray(sitk.GetArrayViewFromImage(i)) != 0 for i in (a, b))
    if a.shape != b.shape:
        return -1.0
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


# ------------------------------------------------------------------ DICOM
def item(**values):
    d = Dataset()
    for k, v in values.items():
        setattr(d, k, v)
    return d


def save(ds, path, syntax=ExplicitVRLittleEndian, raw=False):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.save_as(path, enforce_file_format=True)
    return path


def series(
    folder,
    image,
    *,
    patient="P1",
    uid=f"{ROOT}.1",
    frame=f"{ROOT}.9",
    study=f"{ROOT}.2",
    modality="CT",
    syntax=ExplicitVRLittleEndian,
    only=None,
    per_slice=None,
    prefix="IM",
    **tags,
):
    """One file a slice of an int16 image in HU. `tags`: more fields (None leaves one out); `per_slice(k)` likewise."""
    axes, made = np.reshape(image.GetDirection(), (3, 3)), []
    for k, plane in enumerate(sitk.GetArrayFromImage(image)):
        if only is not None and k not in only:
            continue
        told = dict(
            SOPClassUID=CTImageStorage if modality == "CT" else MRImageStorage,
            SOPInstanceUID=f"{uid}.{k + 1}",
            PatientID=patient,
            PatientName="Synth^Etic",
            PatientBirthDate="19500101",
            PatientSex="M",
            StudyInstanceUID=study,
            StudyDate="20200101",
            StudyTime="101010",
            SeriesInstanceUID=uid,
            FrameOfReferenceUID=frame,
            Modality=modality,
            InstanceNumber=k + 1,
            ImagePositionPatient=[f"{v:.9g}" for v in image.TransformIndexToPhysicalPoint((0, 0, k))],
            ImageOrientationPatient=[f"{v:.9f}" for v in axes[:, :2].T.ravel()],
            PixelSpacing=[f"{v:.9g}" for v in image.GetSpacing()[1::-1]],
            SliceThickness=f"{image.GetSpacing()[2]:.9g}",
            Rows=plane.shape[0],
            Columns=plane.shape[1],
            SamplesPerPixel=1,
            PhotometricInterpretation="MONOCHROME2",
            BitsAllocated=16,
            BitsStored=16,
            HighBit=15,
            PixelRepresentation=1,
            RescaleSlope="1",
            RescaleIntercept="-1024" if modality == "CT" else "0",
        )
        shift = 1024 if modality == "CT" else 0
        order = ">i2" if syntax == ExplicitVRBigEndian else "<i2"
        told["PixelData"] = (plane.astype(np.int32) + shift).astype(order).tobytes()
        told |= tags | (per_slice(k) if per_slice else {})
        ds = item(**{a: b for a, b in told.items() if b is not None})
        ds["PixelData"].VR = "OW"
        made.append(save(ds, Path(folder) / f"{prefix}{k + 1:04d}.dcm", syntax))
    return made


def ellipse(image, solid, k, n=180, phase=0.0):
    """The outline (n, 3) in which slice k of an image cuts an ellipsoid with equal or unequal radii, in mm; or None.

    Found by marching along rays in the plane, so that it holds for oblique planes, too.
    """
    axes = np.reshape(image.GetDirection(), (3, 3))
    origin = np.array(image.TransformContinuousIndexToPhysicalPoint((0.0, 0.0, float(k))))
    u, v = axes[:, 0], axes[:, 1]
    w = 1 / solid[1]
    # |((o + a u + b v) - c) * w|^2 = 1 : a quadratic form in (a, b)
    m = np.array([[(u * w) @ (u * w), (u * w) @ (v * w)], [(u * w) @ (v * w), (v * w) @ (v * w)]])
    o = (origin - solid[0]) * w
    lin = np.array([(u * w) @ o, (v * w) @ o])
    mid = -np.linalg.solve(m, lin)
    rest = 1 - (o @ o - mid @ m @ mid)
    if rest <= 0:
        return None
    t = phase + np.linspace(0, 2 * np.pi, n, endpoint=False)
    ring = np.linalg.solve(np.linalg.cholesky(m).T, np.stack([np.cos(t), np.sin(t)]) * np.sqrt(rest)).T + mid
    return origin + ring[:, :1] * u + ring[:, 1:] * v


def outlines(image, solid, **kw):
    """Slice number -> its outline."""
    found = {k: ellipse(image, solid, k, **kw) for k in range(image.GetSize()[2])}
    return {k: o for k, o in found.items() if o is not None}


def closed(rings, kind="CLOSED_PLANAR"):
    return [(kind, r) for r in (rings.values() if isinstance(rings, dict) else rings)]


def contour(kind, ring, fmt="{:.3f}", **more):
    c = item(NumberOfContourPoints=len(ring), ContourData=[fmt.format(v) for v in np.ravel(ring)], **more)
    if kind is not None:
        c.ContourGeometricType = kind
    return c


def structures(
    rois,
    *,
    patient="P1",
    uid=f"{ROOT}.1",
    frame=f"{ROOT}.9",
    sop=f"{ROOT}.1000",
    own=f"{ROOT}.1001",
    kind=CTImageStorage,
    numbers=None,
    fmt="{:.3f}",
    roi_frame=None,
    label="RS",
    **tags,
):
    """A structure set; rois: (name, contours)."""
    rois = list(rois.items() if isinstance(rois, dict) else rois)
    numbers = list(range(1, len(rois) + 1)) if numbers is None else numbers
    ds = item(
        SOPClassUID=RTSS,
        SOPInstanceUID=sop,
        Modality="RTSTRUCT",
        PatientID=patient,
        PatientName="Synth^Etic",
        StudyInstanceUID=f"{ROOT}.2",
        SeriesInstanceUID=own,
        FrameOfReferenceUID=frame,
        StructureSetLabel=label,
        StructureSetDate="20200102",
        StructureSetTime="111111",
    )
    refs = [item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=f"{uid}.{k + 1}") for k in range(3)]
    ds.ReferencedFrameOfReferenceSequence = Sequence(
        [
            item(
                FrameOfReferenceUID=frame,
                RTReferencedStudySequence=Sequence(
                    [
                        item(
                            ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
                            ReferencedSOPInstanceUID=f"{ROOT}.2",
                            RTReferencedSeriesSequence=Sequence(
                                [item(SeriesInstanceUID=uid, ContourImageSequence=Sequence(refs))]
                            ),
                        )
                    ]
                ),
            )
        ]
    )
    ds.StructureSetROISequence = Sequence(
        [
            item(
                ROINumber=n,
                ReferencedFrameOfReferenceUID=roi_frame or frame,
                ROIName=name,
                ROIGenerationAlgorithm="MANUAL",
            )
            for n, (name, _) in zip(numbers, rois)
        ]
    )
    ds.ROIContourSequence = Sequence(
        [
            item(
                ReferencedROINumber=n,
                ROIDisplayColor=["255", "0", "0"],
                ContourSequence=Sequence([c if isinstance(c, Dataset) else contour(*c, fmt=fmt) for c in cs]),
            )
            for n, (_, cs) in zip(numbers, rois)
        ]
    )
    ds.RTROIObservationsSequence = Sequence(
        [
            item(ObservationNumber=n, ReferencedROINumber=n, RTROIInterpretedType="ORGAN", ROIInterpreter="")
            for n in numbers
        ]
    )
    for k, v in tags.items():
        setattr(ds, k, v)
    return ds


# ------------------------------------------------------------------ verdicts
def short(error, most=420):
    text = " | ".join(str(error).strip().splitlines())
    return text if len(text) <= most else text[:most] + "..."


def attempt(f):
    """What f gives, and what it says if it fails: (value, verdict or None, warnings)."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            return f(), None, [str(w.message) for w in seen if "mupkg" in str(w.filename) or "ROI" in str(w.message)]
        except ValueError as error:
            tb = traceback.extract_tb(error.__traceback__)[-1]
            kind = "refused" if "mupkg" in tb.filename else f"TRACEBACK (ValueError from {Path(tb.filename).name})"
            return None, f"{kind}: {short(error)}", []
        except OSError as error:
            return None, f"refused (OSError): {short(error)}", []
        except Exception as error:
            tb = traceback.extract_tb(error.__traceback__)[-1]
            return (
                None,
                f"TRACEBACK: {type(error).__name__}: {short(error)} at {Path(tb.filename).name}:{tb.lineno}",
                [],
            )


def judged(f, truth, least=0.985):
    """ok if the mask that f gives is the truth."""
    mask, verdict, told = attempt(f)
    if verdict:
        return verdict
    mask = getattr(mask, "label", mask)
    d = dice(mask, truth)
    ml = [sitk.GetArrayViewFromImage(i).astype(bool).sum() * np.prod(i.GetSpacing()) / 1000 for i in (mask, truth)]
    note = f" (warned: {short(told[0], 160)})" if told else ""
    return (
        f"ok: DSC {d:.3f}" if d >= least else f"WRONG: DSC {d:.3f}, {ml[0]:.1f} ml for {ml[1]:.1f} ml, silent"
    ) + note


def rt(folder, ds, image=None, *, roi="Prostate", truth=None, least=0.985, syntax=ExplicitVRLittleEndian, **kw):
    """Series and structure set into folder, read by read_rtstruct."""
    from mupkg.data.dicom_rt import read_rtstruct

    img, lab = pelvis(image)
    series(folder / "CT", img, **kw)
    save(ds, folder / "RS.dcm", syntax)
    return judged(
        lambda: read_rtstruct(folder / "RS.dcm", folder / "CT", roi), lab if truth is None else truth, least
    )


def cohort_of(folder, roi="Prostate", **kw):
    """All sources of a folder of patients, read."""
    from mupkg.data.dicom_rt import sources_from_dicom_rt

    return [(s, s.read()) for s in sources_from_dicom_rt(folder, roi, **kw)]


# ================================================================== structure sets
@case("livingag/pyTG43#5, pyplati/platipy#244", "ok")
def RT00_plain_and_hole(folder):
    """The baseline: an ellipsoid; and one with a hole, as two nested contours."""
    img, lab = pelvis()
    hole = np.array([[5.3, 12.1, -250.7], [10.1, 8.3, 9.9]])
    first = rt(folder / "a", structures({"Prostate": closed(outlines(img, PROSTATE))}))
    both = [c for s in (PROSTATE, hole) for c in closed(outlines(img, s))]
    truth = like((inside(img, PROSTATE) & ~inside(img, hole)).astype(np.uint8), img)
    second = rt(folder / "b", structures({"Prostate": both}), truth=truth)
    return first if not first.startswith("ok") else second


@case("pyplati/platipy#244 (XOR of closed contours)")
def RT01_contour_stored_twice(folder):
    """Three slices have their outline stored twice (copied by the planning system's merge of two versions)."""
    img, _ = pelvis()
    rings = outlines(img, PROSTATE)
    twice = [rings[k] for k in sorted(rings)[3:6]]
    return rt(folder, structures({"Prostate": closed(rings) + closed(twice)}))


@case("cerr/CERR wiki, Deriving New Structure: 'Filling Slice-gaps'")
def RT03_drawn_on_every_second_slice(folder):
    """The physician drew every second slice; the planning system interpolates, its export does not."""
    img, _ = pelvis()
    rings = outlines(img, PROSTATE)
    return rt(folder, structures({"Prostate": closed({k: r for k, r in rings.items() if k % 2})}))


@case("qurit/rt-utils#66, #137 (two ROIs of one number)")
def RT06_two_rois_with_one_number(folder):
    """A ROI was added by a script that counts ROIs: its number is that of another one. Both have contours of their own."""
    img, _ = pelvis()
    rois = [
        ("Rectum", closed(outlines(img, np.array([[0, 45, -250.0], [14, 12, 30]])))),
        ("Bladder", closed(outlines(img, BLADDER))),
        ("Prostate", closed(outlines(img, PROSTATE))),
    ]
    return rt(folder, structures(rois, numbers=[1, 3, 3]))


@case("qurit/rt-utils#113 (no ROIContourSequence)")
def RT09_empty_structure_set_beside_a_good_one(folder):
    """A template without any contour, exported along: no ROIContourSequence, nothing else wrong."""
    img, lab = pelvis()
    series(folder / "CT", img)
    save(structures({"Prostate": closed(outlines(img, PROSTATE))}), folder / "RS.dcm")
    ds = structures([("PTV", [])], sop=f"{ROOT}.1005", own=f"{ROOT}.1006")
    del ds.ROIContourSequence
    save(ds, folder / "template.dcm")
    return judged(lambda: cohort_of(folder)[0][1].label, lab)


@case("qurit/rt-utils#29 (FrameOfReferenceUID of structure set and CT differ)")
def RT10_frame_differs_series_named(folder):
    """The structure set names the right series; its frame of reference is another UID."""
    img, _ = pelvis()
    return rt(folder, structures({"Prostate": closed(outlines(img, PROSTATE))}, frame=f"{ROOT}.99"))


@case("Sikerdebaard/dcmrtstruct2nii#2 (OsiriX: INTERPOLATED_PLANAR)")
def RT17_interpolated_planar(folder):
    """OsiriX draws some slices and marks those between as INTERPOLATED_PLANAR."""
    img, _ = pelvis()
    rings = outlines(img, PROSTATE)
    cs = [("INTERPOLATED_PLANAR" if k % 3 else "CLOSED_PLANAR", r) for k, r in rings.items()]
    return rt(folder, structures({"Prostate": cs}))


@case("e0404/matRad#910 (contours close to the slice)")
def RT19_half_a_millimetre_off_the_slice(folder):
    """All contours lie 0.5 mm above their 4 mm slices (the system's own z grid)."""
    img, _ = pelvis()
    return rt(folder, structures({"Prostate": closed([r + [0, 0, 0.5] for r in outlines(img, PROSTATE).values()])}))


def _positions():
    x, y, z = np.eye(3)
    return {
        "HFP": (-x, -y),
        "FFS": (-x, y),
        "FFP": (x, -y),
        "HFDR": (y, -x),
        "HFDL": (-y, x),
        "FFDR": (y, x),
        "FFDL": (-y, -x),
    }


@case("pydicom/pydicom#757, fo-dicom/fo-dicom#597 (Contour Data over 64 kB, stored as UN)", "ok")
def RT30_more_than_64_kb_a_contour(folder):
    img, _ = pelvis()
    return rt(folder, structures({"Prostate": closed(outlines(img, PROSTATE, n=4000))}, fmt="{:.9f}"))


@case("fo-dicom/fo-dicom#597 (only the lower two bytes of the length written)", "refused")
def RT31_length_of_contour_data_wrapped(folder):
    img, _ = pelvis()
    rings = outlines(img, PROSTATE, n=4000)
    path = save(structures({"Prostate": closed(rings)}, fmt="{:.9f}"), folder / "RS.dcm")
    raw = bytearray(path.read_bytes())
    at = raw.find(b"\x06\x30\x50\x00UN\0\0")
    while at >= 0:
        length = int.from_bytes(raw[at + 8 : at + 12], "little")
        raw[at : at + 12] = b"\x06\x30\x50\x00DS" + (length % 65536).to_bytes(2, "little")
        at = raw.find(b"\x06\x30\x50\x00UN\0\0", at)
    path.write_bytes(raw)
    from mupkg.data.dicom_rt import read_rtstruct

    series(folder / "CT", img)
    return judged(lambda: read_rtstruct(path, folder / "CT", "Prostate"), pelvis()[1])


@case(
    "Contour Data with decimal commas (a script on a German machine; cf. GSTT-CSC/TotalSegmentator-AIDE#11)",
    "refused",
)
def RT33_decimal_commas(folder):
    img, _ = pelvis()
    path = save(structures({"Prostate": closed(outlines(img, PROSTATE))}), folder / "RS.dcm")
    raw = path.read_bytes()
    at = raw.find(b"ISO")  # nothing: only points hold such numbers
    path.write_bytes(re.sub(rb"(-?\d+)\.(\d{3})(?=\\)", rb"\1,\2", raw))
    from mupkg.data.dicom_rt import read_rtstruct

    series(folder / "CT", img)
    return judged(lambda: read_rtstruct(path, folder / "CT", "Prostate"), pelvis()[1])


@case("the same; the older, rejected one happens to have the very spelling that was asked for", "refused")
def RT41b_two_structure_sets_spelt_differently(folder):
    """Draft of January, rejected: 'Prostate'. Approved in March: 'PROSTATE'. TG-263 says case does not matter."""
    img, lab = pelvis()
    series(folder / "CT", img)
    rings = outlines(img, PROSTATE)
    save(
        structures(
            {"Prostate": closed({k: rings[k] for k in list(rings)[:5]})},
            label="draft",
            StructureSetDate="20200110",
            ApprovalStatus="REJECTED",
        ),
        folder / "RS_v1.dcm",
    )
    save(
        structures(
            {"PROSTATE": closed(rings)},
            sop=f"{ROOT}.1009",
            own=f"{ROOT}.1010",
            label="final",
            StructureSetDate="20200310",
            ApprovalStatus="APPROVED",
        ),
        folder / "RS_v2.dcm",
    )
    return judged(lambda: cohort_of(folder)[0][1].label, lab)


@case("dgobbi/vtk-dicom#95 (the same files twice, here in a backup folder)")
def RT43_patient_copied_into_a_backup_folder(folder):
    img, lab = pelvis()
    series(folder / "P1" / "CT", img)
    save(structures({"Prostate": closed(outlines(img, PROSTATE))}), folder / "P1" / "RS.dcm")
    shutil.copytree(folder / "P1", folder / "backup" / "P1")
    return judged(lambda: cohort_of(folder)[0][1].label, lab)


@case("frame of reference missing in some slices (anonymiser that ran twice; cf. SlicerRt/SlicerRT#1)")
def RT47_some_slices_without_frame_of_reference(folder):
    img, _ = pelvis()
    return rt(
        folder,
        structures({"Prostate": closed(outlines(img, PROSTATE))}),
        per_slice=lambda k: {"FrameOfReferenceUID": None} if k > 20 else {},
    )


@case(
    "KeremTurgutlu/dicom-contour#6 (voxel centres): outlines through the centres of boundary voxels, as rt-utils writes them"
)
def RT48_outline_through_voxel_centres(folder):
    """A block of 20 x 16 voxels on 9 slices, outlined through the centres of its outermost voxels, either way round.

    By area 19 x 15 voxels; a reader that always takes the edge finds 20 x 16, one that never does 18 x 14."""
    from mupkg.data.dicom_rt import read_rtstruct

    img, _ = pelvis()
    counts = {}
    for turn in (1, -1):
        cs = []
        for k in range(8, 17):
            corner = [(50, 40), (69, 40), (69, 55), (50, 55)][::turn]
            cs.append(np.array([img.TransformIndexToPhysicalPoint((i, j, k)) for i, j in corner]))
        place = folder / str(turn)
        series(place / "CT", img)
        save(structures({"Prostate": closed(cs)}), place / "RS.dcm")
        mask, verdict, _ = attempt(lambda: read_rtstruct(place / "RS.dcm", place / "CT", "Prostate"))
        if verdict:
            return verdict
        counts[turn] = int(sitk.GetArrayViewFromImage(mask).sum()) // 9
    good = all(19 * 15 <= n <= 20 * 16 for n in counts.values()) and counts[1] == counts[-1]
    return f"{'ok' if good else 'WRONG'}: voxels a slice {counts} (area {19 * 15}, all with edges {20 * 16})"


@case("TG-263 names with brackets (fnmatch takes them for sets)")
def RT54_brackets_in_a_name(folder):
    img, _ = pelvis()
    return rt(folder, structures([("ctv [prostate]", closed(outlines(img, PROSTATE)))]), roi="CTV [Prostate]")


@case("names with two blanks or a no-break space (copied from a planning system)")
def RT55_blanks_in_a_name(folder):
    img, _ = pelvis()
    return rt(
        folder,
        structures([("Prostate\u00a0 neu", closed(outlines(img, PROSTATE)))], SpecificCharacterSet="ISO_IR 192"),
        roi="Prostate neu",
    )


# ------------------------------------------------------------------ writing structure sets
def written(folder, **tags):
    """write_rtstruct for a series with these fields, read back by pydicom alone: volume by the shoelace formula."""
    from mupkg.data.dicom_rt import write_rtstruct

    img, lab = pelvis()
    series(folder / "CT", img, **tags)
    _, verdict, _ = attempt(lambda: write_rtstruct(lab, folder / "CT", folder / "out.dcm", description="a run"))
    if verdict:
        return verdict, None
    ds = pydicom.dcmread(folder / "out.dcm")
    ml = 0.0
    for c in ds.ROIContourSequence[0].ContourSequence:
        x, y, _ = np.reshape(np.array(c.ContourData, float), (-1, 3)).T
        ml += abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 * SPACING[2] / 1000
    truth = sitk.GetArrayViewFromImage(lab).sum() * np.prod(SPACING) / 1000
    return (
        f"ok: {ml:.1f} of {truth:.1f} ml" if abs(ml - truth) < 0.05 * truth else f"WRONG: {ml:.1f} of {truth:.1f} ml"
    ), ds


@case("SlicerRt/SlicerRT#1 (series without patient and study fields)")
def RW01_series_without_study(folder):
    """A series from a research script: no StudyInstanceUID, no StudyDate."""
    return written(folder, StudyInstanceUID=None, StudyDate=None, StudyTime=None, PatientName=None)[0]


# ================================================================== files, tables
def pair(folder, image, label, *, name="a", image_end="_image.nii.gz", label_end="_label.nii.gz"):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for v, end in ((image, image_end), (label, label_end)):
        if v is not None:
            sitk.WriteImage(v, str(folder / f"{name}{end}"))


def by_pattern(folder, image="{case}_image.nii.gz", label="{case}_label.nii.gz", **kw):
    from mupkg.data.build import sources_from_pattern

    return sources_from_pattern(folder, image, label, modality="CT", **kw)


def segmentation_nrrd(path, mask, image, *, lead="", crop=False, layers=1, line=None):
    """A .seg.nrrd by hand, as 3D Slicer leaves it."""
    a, o = mask, np.array(image.GetOrigin())
    if crop:
        at = np.argwhere(mask)
        lo, hi = at.min(0), at.max(0) + 1
        a = mask[lo[0] : hi[0], lo[1] : hi[1], lo[2] : hi[2]]
        o = o + lo[::-1] * image.GetSpacing()
    dims = " ".join(map(str, a.shape[::-1]))
    s = image.GetSpacing()
    vectors = f"({s[0]},0,0) (0,{s[1]},0) (0,0,{s[2]})"
    if layers > 1:
        dims, vectors = f"{layers} {dims}", f"none {vectors}"
        a = np.repeat(a[..., None], layers, -1)
    text = [
        "NRRD0004",
        "# Complete NRRD file format specification at:",
        "# http://teem.sourceforge.net/nrrd/format.html",
        "type: unsigned char",
        f"dimension: {3 + (layers > 1)}",
        "space: left-posterior-superior",
        f"sizes: {dims}",
        f"space directions: {vectors}",
        "kinds: " + "list " * (layers > 1) + "domain domain domain",
        "endian: little",
        "encoding: raw",
        f"space origin: ({o[0]},{o[1]},{o[2]})",
        "measurement frame: (1,0,0) (0,1,0) (0,0,1)" if False else "Segment0_Color:=0.5 0.68 0.5",
        "Segment0_ID:=Segment_1",
        "Segment0_LabelValue:=1",
        "Segment0_Name:=Prostate",
        "Segment0_Tags:=DicomEncoded:^|" + "Segmentation.Status:inprogress|" * 4,
        "Segmentation_ConversionParameters:="
        + "Collapse labelmaps|1|Merge the labelmaps into as few shared labelmaps as possible 1 = created labelmaps will be shared if possible without overwriting each other.&"
        * 12,
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|Closed surface|",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
    ]
    Path(path).write_bytes(("\n".join(text) + "\n\n").encode() + np.ascontiguousarray(a.astype(np.uint8)).tobytes())


@case("InsightSoftwareConsortium/ITK#6683 (reading NIfTI turns NaN and inf into 0)", "refused")
def F07_nan_voxels(folder):
    img, lab = pelvis()
    a = sitk.GetArrayFromImage(img).astype(np.float32)
    z, y, x = np.indices(a.shape)
    out = ((x - 64) / 60) ** 2 + ((y - 48) / 45) ** 2 > 1
    a[out] = np.nan  # outside the field of view
    pair(folder, like(a, img), lab)
    read, verdict, _ = attempt(lambda: by_pattern(folder)[0].read())
    if verdict:
        return verdict
    got = np.unique(sitk.GetArrayFromImage(read.image)[out])
    return f"WRONG: {out.mean():.0%} of the voxels are NaN in the file; read as {got[:3]} HU, silent"


@case("a name of 240 characters (TCIA: UIDs in the names of files)")
def F11_very_long_names(folder):
    from mupkg.data.build import write_cohort
    from mupkg.data.preprocessing import Preparation

    for n in range(3):
        img, lab = pelvis(seed=n)
        pair(
            folder / "in",
            img,
            lab,
            name="1.3.6.1.4.1.14519.5.2.1." + "7" * 212 + str(n),
            image_end=".nii.gz",
            label_end="_l.nii.gz",
        )
    _, verdict, _ = attempt(
        lambda: write_cohort(
            folder / "out",
            by_pattern(folder / "in", "{case}.nii.gz", "{case}_l.nii.gz"),
            Preparation(spacing_mm=(8, 5, 5)),
            split_seed=0,
        )
    )
    left = [p.name for p in (folder / "out").rglob("*")] if (folder / "out").exists() else []
    return (verdict or "ok") + (f"; left behind: {left}" if verdict and left else "")


def table(folder, raw, names="abcd"):
    for n, name in enumerate(names):
        img, lab = pelvis(grid((64, 48, 20), (5, 5, 5), (-160, -120, -300)), seed=n)
        pair(folder, img, lab, name=name)
    (Path(folder) / "cohort.csv").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    from mupkg.data.build import sources_from_table, write_cohort
    from mupkg.data.preprocessing import Preparation

    return attempt(
        lambda: write_cohort(
            Path(folder) / "out",
            sources_from_table(folder, modality="CT"),
            Preparation(spacing_mm=(8, 5, 5)),
            split_seed=0,
        )
    )


def lines(
    patients, splits=("train", "validation", "test", "test"), sep=",", head="case_id,image,label,split,patient"
):
    body = [f"{c},{c}_image.nii.gz,{c}_label.nii.gz,{s},{p}" for c, s, p in zip("abcd", splits, patients)]
    return "\n".join([head, *body]).replace(",", sep) + "\n"


# ================================================================== notebooks, study files
def notebook(name, out, **parameters):
    """A notebook by papermill's own command, from another folder, with -y where values are no plain words."""
    import yaml

    suite = Path(__import__("mupkg").__file__).parent.parent
    args = [
        sys.executable,
        "-m",
        "papermill",
        str(suite / "notebooks" / name),
        str(out),
        "--no-progress-bar",
        "-k",
        "python3",
    ]
    raw = parameters.pop("_raw", [])
    if parameters:
        args += ["-y", yaml.safe_dump(parameters)]
    done = subprocess.run(
        args + raw, capture_output=True, text=True, cwd=Path(out).parent, env=os.environ | {"PYTHONPATH": str(suite)}
    )
    return done.returncode, done.stdout + done.stderr


def last_line(text):
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    hits = [l for l in text.splitlines() if re.search(r"Error\b.*:|parameter |unknown parameter", l)]
    return short(" ".join(hits[-3:]) or text[-300:])


def told_by_notebook(code, text):
    if code == 0:
        return "ok"
    return ("refused: " if re.search(r"(ValueError|CohortError|parameter)", text) else "TRACEBACK: ") + last_line(
        text
    )


@case("papermill -p cohort 007: made a number (snakemake/snakemake#2431, #3650 are the same there)", "refused")
def N02_papermill_p_leading_zeros(folder):
    code, text = notebook(
        "00_prepare_cohort.ipynb", folder / "o.ipynb", _raw=["-p", "cohort", "007", "-p", "data_folder", str(folder)]
    )
    made = [p.name for p in folder.iterdir() if p.is_dir()]
    return told_by_notebook(code, text) if code else f"WRONG: made cohort {made}"


def study(folder, text):
    from mupkg.trials.protocol import Study

    (folder / "study.yaml").write_text(text, encoding="utf-8")
    return attempt(lambda: Study.read(folder / "study.yaml"))


TRIAL = """
study: trials
cohort: c
size: smoke
prepare: {replicates: 2, phantoms: 8, test_phantoms: 2}
trial:
  name: t
  replicates: 2
  arms:
    UNet: {configuration: UNet}
    HCP: {configuration: MetricUNet-HCP}
  contrasts: [[HCP, UNet]]
"""


@case("yaml/pyyaml#165, #41; snowflakedb/ArcticTraining#85 (a key told twice: the last one wins)", "refused")
def Y01_section_told_twice(folder):
    """stage2 is told twice in a long study file: its first options vanish."""
    s, verdict, _ = study(
        folder,
        "study: s\ncohort: c\nsize: quick\nconfigurations: [UNet]\nstage2: {steps: 300, learning_rate: 0.05}\nprepare: {phantoms: 12}\nstage2: {film: true}\n",
    )
    return verdict or f"WRONG: stage2 is {s.stage2}, the first is gone without a word"


# ================================================================== explorer
def demo(folder):
    suite = Path(__import__("mupkg").__file__).parent.parent
    shutil.copytree(suite / "data" / "demo", folder / "demo")
    return folder / "demo"


# ================================================================== segment
RUN = "data/demo/MetricUNet-HCP-seed0"
_PHANTOM = {}


def phantom(seed=5007):
    if seed not in _PHANTOM:
        from mupkg.data.phantom import make_phantom

        _PHANTOM[seed] = make_phantom(seed, spacing_mm=(4.0, 2.5, 2.5))
    return _PHANTOM[seed]


def segmented(image, truth, least=0.8):
    from mupkg.stages import segment

    suite = Path(__import__("mupkg").__file__).parent.parent
    return judged(lambda: segment(image, suite / RUN), truth, least)


def turned(order):
    """The same voxels stored in another order of axes."""
    c = phantom()
    return segmented(sitk.DICOMOrient(c.image, order), sitk.DICOMOrient(c.label, order))


def rotated(degrees, axis=(1, 0, 0), about=None):
    """The patient lies turned on the table: the anatomy is turned within the scan; the label with it."""
    c = phantom()
    centre = c.image.TransformContinuousIndexToPhysicalPoint([n / 2 for n in c.image.GetSize()])
    t = sitk.VersorTransform()
    t.SetRotation(axis, np.deg2rad(degrees))
    t.SetCenter(centre)
    return (
        sitk.Resample(c.image, c.image, t, sitk.sitkLinear, -1000),
        sitk.Resample(c.label, c.label, t, sitk.sitkNearestNeighbor, 0),
    )


@case("SlicerRt/SlicerRT#1, by notebook 09: a series without StudyInstanceUID", "either")
def S09_notebook_09_without_study(folder):
    c = phantom()
    series(folder / "CT f\u00fcr uns", sitk.Cast(c.image, sitk.sitkInt16), StudyInstanceUID=None)
    code, text = notebook(
        "09_segment_a_patient.ipynb",
        folder / "o.ipynb",
        run=RUN,
        scan=str(folder / "CT f\u00fcr uns"),
        output=str(folder / "out"),
    )
    left = sorted(p.name for p in (folder / "out").iterdir()) if (folder / "out").exists() else []
    return told_by_notebook(code, text) + f"; written: {left}"


# ------------------------------------------------------------------ privacy, locks, folders
@case(
    "KitwareMedical/dicom-anonymizer#41, Slicer/Slicer#8798 (names in folders), hash_patients with source dicom_rt",
    "ok",
)
def N05_hash_patients_of_a_named_folder(folder):
    """The archive calls folders by patient: 'SURNAME^GIVEN_19500101'. hash_patients must keep that out of the cohort."""
    img, _ = pelvis()
    for n in range(3):
        place, who = folder / "archive" / f"SURNAME^GIVEN_1950010{n}", {"patient": f"MRN-{n}", "uid": f"{ROOT}.{n}.7"}
        series(place / "CT", img + n, **who)
        ds = structures(
            {"Prostate": closed(outlines(img, PROSTATE))}, sop=f"{ROOT}.{n}.8", own=f"{ROOT}.{n}.9", **who
        )
        save(ds, place / "RS.dcm", ExplicitVRLittleEndian)
    code, text = notebook(
        "00_prepare_cohort.ipynb",
        folder / "o.ipynb",
        cohort="one",
        source="dicom_rt",
        source_folder=str(folder / "archive"),
        hash_patients=True,
        data_folder=str(folder / "data"),
        size="smoke",
    )
    if code:
        return told_by_notebook(code, text)
    leaks = sorted(
        {
            p.relative_to(folder / "data").as_posix()
            for p in (folder / "data").rglob("*")
            if "SURNAME" in p.name or (p.suffix in (".csv", ".json") and re.search(b"SURNAME|MRN-", p.read_bytes()))
        }
    )
    return f"WRONG: hash_patients, but the name is in {leaks[:3]}" if leaks else "ok"


# ------------------------------------------------------------------ trials by snakemake
def told_to_notebook_10(folder, *options, files=(TRIAL,)):
    """Which study notebook 10 would analyse, by a protocol that is written, and which the runs belong to, unrun."""
    suite = Path(__import__("mupkg").__file__).parent.parent
    paths = []
    for n, text in enumerate(files):
        paths.append(folder / f"{n}.yaml")
        paths[-1].write_text(text + f"outputs_folder: {folder / 'outputs'}\n" * (n == 0))

    def snakemake(*more):
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "1",
            "--nolock",
            "-s",
            str(suite / "Snakefile"),
            *more,
        ]
        command += ["--configfile", *map(str, paths), *options]
        environment = os.environ | {"PYTHONPATH": str(suite), "XDG_CACHE_HOME": str(folder)}
        return subprocess.run(command, capture_output=True, text=True, cwd=suite, env=environment)

    done = snakemake("-n", "-p")
    out = done.stdout + done.stderr
    if done.returncode:
        return (
            None,
            None,
            "refused: "
            + short(" ".join(l for l in out.splitlines() if "rror" in l or "parameter" in l) or out[-400:]),
        )
    ten = json.loads(re.search(r"10_does_it_help\.ipynb [^{{}}]*? '(\{.*?\})' --threads", out)[1])
    three = json.loads(re.search(r"03_stage2_training\.ipynb [^{{}}]*? '(\{.*?\})' --threads", out)[1])
    snakemake(ten["protocol"])  # its rule writes the protocol as it was overridden; nothing is trained for it
    return ten, three, out


def same_study(folder, *options, files=(TRIAL,)):
    from mupkg.trials.protocol import TrialSettings

    ten, three, out = told_to_notebook_10(folder, *options, files=files)
    if ten is None:
        return out
    s, verdict, _ = attempt(
        lambda: (
            lambda t: (t.study_path.name, t.cohort_path.name, t.study.size, t.study.trial.margin, len(t.study.runs))
        )(TrialSettings(**ten))
    )
    if verdict:
        return "WRONG (only after all trainings): notebook 10 will say " + verdict
    runs = len(set(re.findall(r"(\S+)/03_stage2_training.ipynb", out)))
    mine = (three["study"], three["cohort"], three["size"])
    return "ok" if s[:3] == mine else f"WRONG: trained {mine}, but notebook 10 will read {s[:3]}"


@case(
    "NCATSTranslator/Babel#893 (--config overrides reach the rules, not what reads the file itself): --config study=",
    "either",
)
def W01_config_study_for_a_trial(folder):
    return same_study(folder, "--config", "study=second")


# ================================================================== DICOM series
def series_is(folder, img, tol=1):
    from mupkg.data.files import read_scan

    scan, verdict, told = attempt(lambda: read_scan(folder))
    if verdict:
        return verdict
    if scan.GetSize() != img.GetSize():
        return f"WRONG: size {scan.GetSize()}"
    off = np.abs(sitk.GetArrayFromImage(scan).astype(float) - sitk.GetArrayFromImage(img))
    place = max(
        np.linalg.norm(np.subtract(scan.TransformIndexToPhysicalPoint(c), img.TransformIndexToPhysicalPoint(c)))
        for c in ((0, 0, 0), (127, 95, 25))
    )
    good = off.max() <= tol and place < 0.3
    return (
        "ok"
        if good
        else f"WRONG: {np.mean(off > tol):.1%} of the voxels differ, up to {off.max():.0f}; {place:.1f} mm off, silent"
    )


@case("dgobbi/vtk-dicom#134 (high bit 15 of 12 stored bits)", "either")
def D03_high_bit_15_of_12(folder):
    img, _ = pelvis()
    for p in series(folder, img, BitsStored=12, HighBit=15, PixelRepresentation=0):
        ds = pydicom.dcmread(p)
        ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") << 4).astype("<u2").tobytes()
        ds.save_as(p)
    return series_is(folder, img)


@case(
    "nteract/papermill#511, snakemake/snakemake#3689 (Address already in use: two kernels chose one port)", "either"
)
def N09_kernel_that_lost_its_port(folder):
    """Seen for real in a smoke trial with --cores 2. Here the first kernel of a notebook does not answer, the next would."""
    import nbclient.client
    import nbformat

    from mupkg import batch

    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("print(x)"),
        ]
    )
    nb.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nb, folder / "n.ipynb")
    whole, times = nbclient.client.NotebookClient.start_new_kernel_client, []

    def once(self, **kw):
        times.append(1)
        if len(times) == 1:
            raise RuntimeError("Kernel didn't respond in 60 seconds")
        return whole(self, **kw)

    nbclient.client.NotebookClient.start_new_kernel_client = once
    try:
        batch.run_notebook(folder / "n.ipynb", folder / "out.ipynb", {"x": 2})
    except RuntimeError as error:
        said = str(error)
        left = sorted(q.name for q in folder.iterdir())
        return (
            f"refused: {said}"
            if "n.ipynb" in said
            else f"TRACEBACK: no notebook named, no advice: {said!r}; left {left}"
        )
    finally:
        nbclient.client.NotebookClient.start_new_kernel_client = whole
    return "ok: tried again" if len(times) > 1 else "WRONG: the case did not reach the kernel's start"


def main(names):
    chosen = {n: c for n, c in CASES.items() if not names or any(re.match(x, n) for x in names)}
    bad = []
    for name, (report, want, f) in chosen.items():
        with tempfile.TemporaryDirectory(prefix=f"{name[:24]}_") as place:
            home = os.getcwd()
            try:
                got = f(Path(place))
            except Exception as error:
                tb = traceback.extract_tb(error.__traceback__)[-1]
                got = f"TRACEBACK (outside): {type(error).__name__}: {short(error)} at {Path(tb.filename).name}:{tb.lineno}"
            os.chdir(home)
        holds = (got.startswith("ok") and want in ("ok", "either")) or (
            got.startswith("refused") and want in ("refused", "either")
        )
        bad += [] if holds else [name]
        print(f"{'holds' if holds else 'FAILS'} {name} [{report}]\n      {got} (want {want})", flush=True)
    print("fails:", bad)
    print(f"{len(chosen) - len(bad)} of {len(chosen)} hold")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
