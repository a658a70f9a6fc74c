"""One scan with what is known about it, and the checks that it and its name must pass."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

Point = tuple[float, float, float]  # physical (x, y, z) in mm, as SimpleITK gives it

MIN_SLICES = 3
SAME_GRID = 0.1  # grids are the same if their corners agree to this share of a voxel
RIGHT_ANGLE = 1e-3  # the largest cosine between two axes, as NIfTI holds them; the least volume that three span
SPACING_MM = (0.01, 100.0)  # what a scan's voxels may measure
FARTHEST_MM = 1e6  # from the scanner's origin; beyond, rounding moves voxels
BODY_HU = -400.0  # above: inside the body
LOWEST_HU = -1150.0  # of air, with its noise; what is below is padding
PHANTOM = "phantom-"  # begins the names of made-up cases
PROSTATE_ML = (2.0, 500.0)  # what a prostate's contour may measure
MOST_VOXELS = 2**30  # what claims more is broken, or no scan of a pelvis
WHOLE_NUMBER = 1e-3  # how far label values may be off (files that store them with a slope)
MOST_LETTERS = 225  # of a case's name: names of files add some to it, and have 255 at most
_SAFE_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{,{MOST_LETTERS - 1}}}")
_NUMBER = re.compile(r"(\d{1,3}(?:[ .,'\u2019]\d{3})+|\d+)(?:[.,]0{1,2})?")  # as table programs write whole numbers


class CohortError(ValueError):
    """Everything that is wrong with a cohort, in one go; a line for each fault."""

    def __init__(self, faults: Iterable[str], advice: str = ""):
        self.faults = [line for fault in faults for line in str(fault).splitlines()]
        super().__init__("\n".join([*self.faults, *([advice] if advice else [])]))


@dataclass(frozen=True)
class Case:
    """One scan, its prostate label if known, and what else is known about it."""

    case_id: str
    image: sitk.Image
    label: sitk.Image | None = None
    modality: str = "CT"  # "CT" (Hounsfield units) or "MR"
    split: str | None = None  # "train", "validation" or "test"
    femoral_heads: tuple[Point, Point] | None = None  # left, right; phantoms know them


def one_volume(image: sitk.Image, channel: int | None, name: str | Path) -> sitk.Image:
    """The 3D volume that an image is, or of a 4D one the channel's; ValueError naming the image if there is none."""
    size = image.GetSize()
    if len(size) == 4 and (channel is not None or size[3] == 1):
        if not 0 <= (channel or 0) < size[3]:
            last = size[3] - 1
            raise ValueError(f"{name}: has {last + 1} channels, no channel {channel}; choose one from 0 to {last}")
        image = sitk.Extract(image, [*size[:3], 0], [0, 0, 0, channel or 0])
    kind = image.GetPixelIDTypeAsString()
    if image.GetDimension() != 3 or kind.startswith(("vector", "complex", "label")) or not all(image.GetSize()):
        raise ValueError(
            f"{name}: is {len(size)}D, {size}, of {kind}: no 3D volume of single values; of a 4D file choose a "
            "channel when the cohort is made (notebook 00), or save the volume alone"
        )
    return image


def grid_difference(image: sitk.Image, label: sitk.Image) -> str | None:
    """In what the label's grid differs from the image's, in words; None if they are the same."""
    if image.GetSize() != label.GetSize():
        return f"size {label.GetSize()} against {image.GetSize()}"
    last = [n - 1 for n in image.GetSize()]
    for corner in ([0, 0, 0], last, [last[0], 0, 0], [0, last[1], 0]):
        points = [np.array(i.TransformIndexToPhysicalPoint(corner)) for i in (image, label)]
        if not np.linalg.norm(points[0] - points[1]) < SAME_GRID * min(image.GetSpacing()):
            return f"voxel {tuple(corner)} lies at {points[1].round(2)} mm against {points[0].round(2)} mm"
    return None


def binary_label(label: sitk.Image, values: Sequence[int] | None) -> sitk.Image:
    """Foreground 1 where the label has one of `values` (None: it must hold 0 and 1, or 0 and one other value).

    Raises:
        ValueError: if without `values` more than one foreground value is found, or values are not whole numbers.
    """
    voxels = sitk.GetArrayFromImage(label)
    whole = np.round(voxels)
    if not np.abs(voxels - whole).max() <= WHOLE_NUMBER:  # so that NaN is found too
        raise ValueError("holds values that are not whole numbers; export a mask, not probabilities")
    present = np.unique(whole)
    if values is None and np.count_nonzero(present) > 1:
        shown = ", ".join(f"{v:g}" for v in present[:8]) + (", ..." if len(present) > 8 else "")
        raise ValueError(f"holds {len(present)} values ({shown}); choose which are prostate (label_values)")
    mask = whole != 0 if values is None else np.isin(whole, list(values))
    binary = sitk.GetImageFromArray(mask.astype(np.uint8))
    binary.CopyInformation(label)
    return binary


def not_in_hu(voxels: np.ndarray) -> str:
    """Why the values cannot be those of a body in HU, in words; empty if they can.

    Single voxels say nothing: padding, noise and the overshoot of a resampling may have any value. The rule looks at
    the bulk (at most a million voxels), without padding: values below all air, or a lowest value that is not air's.

    1. At least 1 % is air or fat, below -50. MR fails here, and so do normalised values, values scaled to 0..255, and
       raw values (air 24, water 1024 in 12 bits) that were never rescaled.
    2. At least 3 % is body, above -300. A scan whose intercept was taken off twice fails here.
    3. At most a tenth of the body is above 300, where bone, contrast medium and metal are, or at most five times as
       much as is fat (-200 to -30). Raw values that were padded with -1000 or resampled with overshoot fail here.

    Tried on a real CT of the pelvis (63 % of the voxels are body, 2 % of it above 300, 47 % of the rest fat), its
    crops of 100 mm, two CTs of the leg, and phantoms, also with metal and contrast medium; on raw values of these; on
    16 MR scans; and on normalised values.
    """
    values = voxels.ravel()[:: max(1, voxels.size // 10**6)].astype(np.float32)
    lowest = values.min()
    values = values[values > LOWEST_HU]
    values = values if LOWEST_HU < lowest < -800 else values[values != lowest]
    body = values[values > -300]
    if len(values) == 0 or len(body) < 0.03 * len(values):
        return "hardly any voxel is above -300, as a body is; was the intercept taken off twice?"
    if np.mean(values < -50) < 0.01:
        return "hardly any voxel is below -50, as air and fat are"
    bone, fat = np.mean(body > 300), np.mean((body > -200) & (body < -30))
    return f"{bone:.0%} of the body would be bone, and {fat:.0%} fat" if bone > max(0.1, 5 * fat) else ""


def checked_case(
    case_id: str,
    image: sitk.Image,
    label: sitk.Image | None,
    *,
    image_name: str,
    label_name: str = "",
    label_values: Sequence[int] | None = None,
    **fields: object,
) -> Case:
    """The case, if it can be worked with: a binary label on exactly the image's grid.

    Raises:
        ValueError: with one line for every fault, each naming the case, the file, what is wrong and what to do.
    """
    image = one_volume(image, None, f"case {case_id}: {image_name}")
    if label is not None:
        label = one_volume(label, None, f"case {case_id}: {label_name}")
    faults = []
    spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
    if not (SPACING_MM[0] <= spacing.min() and spacing.max() <= SPACING_MM[1] and np.abs(origin).max() < FARTHEST_MM):
        faults.append(
            f"{image_name}: has voxels of {tuple(spacing.tolist())} mm at {tuple(origin.tolist())} mm, which no scan "
            "has; export the scan again"
        )
    if image.GetSize()[2] < MIN_SLICES:
        faults.append(f"{image_name}: {image.GetSize()[2]} slice(s), at least {MIN_SLICES} are needed; leave it out")
    voxels = sitk.GetArrayFromImage(image)
    if not np.isfinite(voxels).all():
        faults.append(f"{image_name}: holds NaN or infinite values; export the scan again")
    elif voxels.min() == voxels.max():
        faults.append(f"{image_name}: is constant ({voxels.min():g} everywhere); export the scan again")
    elif fields.get("modality", "CT") == "CT" and (reason := not_in_hu(voxels)):
        faults.append(
            f"{image_name}: is no CT in HU ({reason}); apply its rescale intercept once, or undo the normalisation. "
            "An MR needs modality MR, and a run trained on MR"
        )
    axes = np.reshape(image.GetDirection(), (3, 3))
    if not np.abs(axes.T @ axes - np.eye(3)).max() <= RIGHT_ANGLE:  # so that NaN is found too
        faults.append(f"{image_name}: its axes are not at right angles (a tilted gantry?); resample it first")
    if label is not None:
        difference = grid_difference(image, label)
        if difference:
            faults.append(
                f"{label_name}: is not on its image's grid ({difference}); resample it onto {image_name} first"
            )
        try:
            label = binary_label(label, label_values)
            _check_foreground(label)
        except ValueError as error:
            faults.append(f"{label_name}: {error}")
    if faults:
        raise ValueError("\n".join(f"case {case_id}: {fault}" for fault in faults))
    if label is not None:
        label.CopyInformation(image)  # the same up to rounding; SimpleITK wants it to the last digit
    return Case(case_id, image, label, **fields)


def _check_foreground(label: sitk.Image) -> None:
    """ValueError if a binary label cannot be that of a prostate."""
    volume, whole, (least, most) = label_volume_ml(label), label_volume_ml(sitk.Equal(label, label)), PROSTATE_ML
    if not least <= volume <= most or volume == whole:
        raise ValueError(
            f"its foreground measures {volume:.3g} of the scan's {whole:.3g} ml, a prostate {least:g} to {most:g}; "
            "correct the contour, label_values or the spacing, or leave the case out"
        )


def label_volume_ml(label: sitk.Image) -> float:
    """The foreground's volume in millilitres."""
    return float(np.count_nonzero(sitk.GetArrayFromImage(label)) * np.prod(label.GetSpacing()) / 1000)


def spelt_alike(name: object) -> str:
    """A name without what does not count: blanks, capitals, and the form of letters."""
    text = unicodedata.normalize("NFKC", str(name))
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").casefold().split())


def essence(name: str) -> tuple[str, ...]:
    """The letters and numbers of a name, apart: the same for P1 and P-01."""
    return tuple(part.lstrip("0") for part in re.findall(r"\d+|[^\W\d_]+", name))


def patient_key(patient: object) -> str:
    """One spelling for all of a patient's ID: blanks, capitals, letters' forms, signs, leading zeros do not count.

    Nor does what a table program makes of a whole number: 12.0, 1,234.
    """
    text = spelt_alike(patient)
    if number := _NUMBER.fullmatch(text):
        text = re.sub(r"\D", "", number[1])
    return " ".join(part or "0" for part in essence(text)) or text


def phantom_name(seed: int) -> str:
    """The name of the made-up case of this seed."""
    return f"{PHANTOM}{seed:04d}"


def name_faults(case_ids: Iterable[object]) -> Iterator[str]:
    """The faults of names that are listed twice, or cannot name files."""
    for number, (case_id, times) in enumerate(Counter(case_ids).items(), start=1):
        if times > 1:
            yield f"case {case_id}: is listed {times} times; give every scan a name of its own"
        if not isinstance(case_id, str) or not _SAFE_ID.fullmatch(case_id):
            yield (
                f"case {case_id} (number {number}): the name must be letters, digits, '.', '_' or '-', a letter or "
                f"digit first, and no more than {MOST_LETTERS}; rename it"
            )
