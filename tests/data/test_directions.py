"""Scans in any direction come back to the voxel, or are refused by name."""

from __future__ import annotations

import re

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from spoiling import mask, scan, stored, turned

from mupkg.data.preprocessing import Preparation, prepare, to_scan_grid
from mupkg.scans.cases import checked_case
from mupkg.scans.files import read_scan

# No error: any direction


TURNS = {
    "flipped across": (-1, 0, 0, 0, 1, 0, 0, 0, 1),
    "upside down": (1, 0, 0, 0, 1, 0, 0, 0, -1),
    "flipped all ways": (-1, 0, 0, 0, -1, 0, 0, 0, -1),
    "sagittal": (0, 0, 1, 1, 0, 0, 0, 1, 0),
    "coronal": (1, 0, 0, 0, 0, 1, 0, -1, 0),
    "oblique": (0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1),
    "oblique and permuted": (0, 0.28, -0.96, 0, 0.96, 0.28, 1, 0, 0),
}


def assert_round_trip(case) -> None:
    """On a working grid of the scan's own voxels nothing may be lost, and nothing may move."""
    spacing = sitk.DICOMOrient(case.image, "LPS").GetSpacing()[::-1]
    prepared = prepare(case, Preparation(modality=case.modality, spacing_mm=spacing))
    back = to_scan_grid(sitk.Cast(prepared.label, sitk.sitkFloat32), case.image)
    found, truth = (sitk.GetArrayFromImage(image) for image in (back, case.label))
    if case.modality == "CT":
        np.testing.assert_array_equal(found, truth)
    else:  # what lies outside the body by Otsu's threshold may be cut off
        assert (found <= truth).all()
    assert back.GetDirection() == case.image.GetDirection() and back.GetOrigin() == case.image.GetOrigin()


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
@pytest.mark.parametrize("how", TURNS)
def test_flipped_permuted_and_oblique_scans_are_handled(how, ending, tmp_path):
    read = {
        name: read_scan(stored(turned(image, TURNS[how], (10.0, -20.0, 30.0)), tmp_path / f"{name}{ending}"))
        for name, image in (("scan", scan()), ("label", mask()))
    }
    assert_round_trip(checked_case("P7", read["scan"], read["label"], image_name="scan", label_name="label"))


TYPES = [sitk.sitkUInt8, sitk.sitkUInt16, sitk.sitkInt16, sitk.sitkInt32, sitk.sitkInt64, sitk.sitkFloat32]
USUAL_MM, ANY_MM = st.floats(0.02, 20), st.floats(-6, 4).map(lambda power: 10**power)
SIGNED_AXES = [axes for how, axes in TURNS.items() if "oblique" not in how]


@st.composite
def directions(draw) -> np.ndarray:
    """Any rotation of any storage order."""
    quaternion = np.array(draw(st.tuples(*[st.integers(-9, 9)] * 4).filter(any)), float)
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + 2 * w * cross + 2 * cross @ cross
    return rotation @ np.reshape(draw(st.sampled_from(SIGNED_AXES)), (3, 3))


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 9)),
    spacing=st.tuples(*[USUAL_MM] * 3) | st.tuples(*[USUAL_MM] * 3) | st.tuples(*[ANY_MM] * 3),
    origin=st.tuples(*[st.floats(-1e4, 1e4)] * 3) | st.tuples(*[st.floats(-1e7, 1e7)] * 3),
    direction=directions(),
    shear=st.sampled_from([0, 0, 0, 1e-5, 0.3]),
    kind=st.sampled_from(TYPES),
    data=st.data(),
)
def test_any_header_is_refused_by_name_or_comes_back_to_the_voxel(
    size, spacing, origin, direction, shear, kind, data
):
    first = np.array([data.draw(st.integers(0, n - 1)) for n in size[::-1]])
    last = [data.draw(st.integers(a, n - 1)) + 1 for a, n in zip(first, size[::-1], strict=True)]
    signed = kind not in (sitk.sitkUInt8, sitk.sitkUInt16)
    voxels = np.random.default_rng(0).integers(-100 if signed else 150, 250, size[::-1])
    voxels[-1, -1, -1] = -100 if signed else 0  # air, for Otsu's threshold of the MR
    inside = np.zeros(size[::-1], np.uint8)
    inside[tuple(map(slice, first, last))] = 1
    image, label = sitk.Cast(sitk.GetImageFromArray(voxels.astype(np.int16)), kind), sitk.GetImageFromArray(inside)
    direction[:, 1] += shear * direction[:, 0]
    image, label = (turned(volume, direction.ravel().tolist(), origin, spacing) for volume in (image, label))
    try:
        case = checked_case("P7", image, label, image_name="s", label_name="l", modality="CT" if signed else "MR")
        assert_round_trip(case)
    except ValueError as error:
        assert all(row.startswith("case P7: ") for row in str(error).splitlines())
        assert re.search(r"leave it out|export|resample|correct the contour|choose a coarser", str(error))
