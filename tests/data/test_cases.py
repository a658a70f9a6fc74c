"""What a case must be: a finite 3D scan, and a binary label on its grid; every fault is named with the way out."""

import numpy as np
import pytest
import SimpleITK as sitk

from mupkg.data.cases import binary_label, checked_case, grid_difference

SHAPE = (6, 8, 10)


def scan(dtype=np.int16, shape=SHAPE) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-900, 900, shape).astype(dtype))
    image.SetSpacing((2.0, 2.0, 5.0))
    return image


def mask(value=1, dtype=np.uint8) -> sitk.Image:
    voxels = np.zeros(SHAPE, dtype)
    voxels[2:4, 3:6, 2:7] = value
    image = sitk.GetImageFromArray(voxels)
    image.CopyInformation(scan())
    return image


def painted(image: sitk.Image, value: float, dtype=None) -> sitk.Image:
    """The image with its first voxel changed."""
    voxels = sitk.GetArrayFromImage(image)
    voxels = voxels if dtype is None else voxels.astype(dtype)
    voxels[0, 0, 0] = value
    changed = sitk.GetImageFromArray(voxels)
    changed.CopyInformation(image)
    return changed


def check(image=None, label=None, **options):
    return checked_case(
        "P7", image or scan(), label or mask(), image_name="p7.nii.gz", label_name="p7_label.nii.gz", **options
    )


def sheared() -> sitk.Image:
    image = scan()
    image.SetDirection((1, 0.05, 0, 0, 1, 0, 0, 0, 1))
    return image


def test_a_good_case_passes_and_keeps_what_is_known():
    case = check(split="test", modality="CT")
    assert (case.case_id, case.split, case.modality) == ("P7", "test", "CT")
    assert sitk.GetArrayFromImage(case.label).sum() == 2 * 3 * 5


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (painted(scan(np.float32), np.nan), "holds NaN or infinite values; export"),
        (painted(scan(np.float64), -np.inf), "holds NaN or infinite values; export"),
        (sitk.Image(10, 8, 6, sitk.sitkInt16), "is constant (0 everywhere); export"),
        (scan(shape=(1, 8, 10)), "1 slice(s), at least 3 are needed; leave it out"),
        (sitk.Cast(scan() + 1024, sitk.sitkUInt16), "no CT in HU; apply its rescale intercept"),
        (sitk.Cast(scan(), sitk.sitkFloat32) / 1000, "are no HU; undo the normalisation"),
        (painted(sitk.Cast(scan(), sitk.sitkFloat32) / 500, 3000.0), "are no HU; undo the normalisation"),
        (sheared(), "not at right angles (a tilted gantry?); resample"),
        (sitk.JoinSeries([scan(), scan()]), "no 3D volume of single values; choose one"),
        (sitk.Compose(scan(), scan()), "no 3D volume of single values; choose one"),
        (scan()[:, :, 0], "no 3D volume of single values; choose one"),
    ],
)
def test_a_bad_scan_is_named_with_the_way_out(image, fault):
    with pytest.raises(ValueError, match=r"^case P7: p7\.nii\.gz: ") as error:
        checked_case("P7", image, None, image_name="p7.nii.gz")
    assert fault in str(error.value)


def test_an_mr_may_do_without_negative_values():
    assert check(sitk.Cast(scan() + 1024, sitk.sitkUInt16), modality="MR").modality == "MR"


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        (mask(0), "has no foreground; correct the contour"),
        (sitk.Add(sitk.Mask(mask(), mask(), 1), 1), "is foreground everywhere; correct the contour"),
        (painted(mask(), 7), "holds 3 values (0, 1, 7); choose which are prostate (label_values)"),
        (painted(mask(), 0.5, np.float32), "not whole numbers; export a mask"),
        (painted(mask(), np.nan, np.float32), "not whole numbers; export a mask"),
        (mask()[:, :, :5], "is not on its image's grid (size (10, 8, 5) against (10, 8, 6)); resample it"),
    ],
)
def test_a_bad_label_is_named_with_the_way_out(label, fault):
    with pytest.raises(ValueError, match=r"^case P7: p7_label\.nii\.gz: ") as error:
        check(label=label)
    assert fault in str(error.value)


@pytest.mark.parametrize("change", ["origin", "spacing", "direction"])
def test_a_label_that_lies_elsewhere_is_found(change):
    label = mask()
    if change == "origin":
        label.SetOrigin((0.0, 0.0, 1.0))
    elif change == "spacing":
        label.SetSpacing((2.0, 2.0, 5.1))
    else:
        label.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, -1))
    with pytest.raises(ValueError, match=r"not on its image's grid .* mm against .*; resample it onto"):
        check(label=label)


def test_rounding_of_a_header_is_no_other_grid_and_is_mended():
    label = mask()
    label.SetOrigin((1e-4, -1e-4, 0.0))
    label.SetSpacing((2.0, 2.00001, 5.0))
    assert grid_difference(scan(), label) is None
    assert check(label=label).label.GetOrigin() == scan().GetOrigin()


def test_all_faults_of_a_case_come_at_once():
    with pytest.raises(ValueError) as error:
        check(painted(scan(np.float32), np.nan), mask(0))
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and all(line.startswith("case P7: p7") for line in lines)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("value", [1, 2, 255])
def test_labels_of_any_type_and_value_become_zero_and_one(dtype, value):
    found = binary_label(mask(value, dtype), None)
    assert found.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(mask()))


def test_label_values_choose_what_is_prostate():
    zones = painted(painted(mask(2), 1), 1)
    voxels = sitk.GetArrayFromImage(zones)
    for values, wanted in (((1, 2), voxels > 0), ((2,), voxels == 2), ((1,), voxels == 1)):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(binary_label(zones, values)), wanted)
    with pytest.raises(ValueError, match=r"has no foreground of value \(4,\)"):
        check(label=zones, label_values=(4,))


def test_a_label_stored_with_a_slope_is_still_whole():
    label = sitk.Cast(mask(255), sitk.sitkFloat32) * 0.00392157
    np.testing.assert_array_equal(sitk.GetArrayFromImage(binary_label(label, None)), sitk.GetArrayFromImage(mask()))
