"""What a case must be: a finite 3D scan, and a binary label on its grid; every fault is named with the way out."""

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from mupkg.data.phantom import make_phantom
from mupkg.scans.cases import binary_label, checked_case, grid_difference, not_in_hu
from mupkg.stages.landmarks import femoral_heads

SHAPE = (6, 8, 10)


def scan(dtype=np.int16, shape=SHAPE) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-900, 900, shape).astype(dtype))
    image.SetSpacing((4.0, 4.0, 5.0))
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
        (
            sitk.Cast(scan() + 1024, sitk.sitkUInt16),
            "no CT in HU (hardly any voxel is below -50, as air and fat are)",
        ),
        (sheared(), "not at right angles (a tilted gantry?); resample"),
        (sitk.JoinSeries([scan(), scan()]), "no 3D volume of single values; of a 4D file choose"),
        (sitk.Compose(scan(), scan()), "no 3D volume of single values; of a 4D file choose"),
        (scan()[:, :, 0], "no 3D volume of single values; of a 4D file choose"),
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
        (mask(0), "its foreground measures 0 of the scan's 38.4 ml, a prostate 2 to 500; correct the contour"),
        (
            sitk.Add(sitk.Mask(mask(), mask(), 1), 1),
            "its foreground measures 38.4 of the scan's 38.4 ml, a prostate 2 to 500; correct",
        ),
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
        label.SetSpacing((4.0, 4.0, 5.1))
    else:
        label.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, -1))
    with pytest.raises(ValueError, match=r"not on its image's grid .* mm against .*; resample it onto"):
        check(label=label)


def test_rounding_of_a_header_is_no_other_grid_and_is_mended():
    label = mask()
    label.SetOrigin((1e-4, -1e-4, 0.0))
    label.SetSpacing((4.0, 4.00001, 5.0))
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
    with pytest.raises(ValueError, match=r"its foreground measures 0 of the scan's 38.4 ml"):
        check(label=zones, label_values=(4,))


def test_a_label_stored_with_a_slope_is_still_whole():
    label = sitk.Cast(mask(255), sitk.sitkFloat32) * 0.00392157
    np.testing.assert_array_equal(sitk.GetArrayFromImage(binary_label(label, None)), sitk.GetArrayFromImage(mask()))


def cubed(side: int, spacing_mm: float) -> tuple[sitk.Image, sitk.Image]:
    """A scan, and a cube of this many voxels in it."""
    shape = (side + 2,) * 3
    label = np.zeros(shape, np.uint8)
    label[1:-1, 1:-1, 1:-1] = 1
    images = scan(shape=shape), sitk.GetImageFromArray(label)
    for image in images:
        image.SetSpacing((spacing_mm,) * 3)
    return images


@pytest.mark.parametrize(
    ("side", "spacing_mm", "ml"), [(10, 1.2, 1.73), (5, 2.5, 1.95), (20, 4.0, 512.0), (4, 20, 512.0)]
)
def test_a_label_of_no_prostates_volume_is_refused(side, spacing_mm, ml):
    """A label turned inside out, of another organ, or of a wrong spacing."""
    image, label = cubed(side, spacing_mm)
    with pytest.raises(
        ValueError,
        match=rf"p7_label.*: its foreground measures {ml:g} of the scan's .* ml, a prostate 2 to 500; correct",
    ):
        check(image, label)
    assert check(*cubed(round((30_000 / spacing_mm**3) ** (1 / 3)), spacing_mm)).label is not None


# HU


def pelvis(seed: int = 0) -> np.ndarray:
    return sitk.GetArrayFromImage(make_phantom(seed, spacing_mm=(5.0, 4.0, 4.0)).image).astype(np.int32)


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return pelvis()


def ringed(voxels: np.ndarray, padding: int) -> np.ndarray:
    """Padded outside the circle that a scanner reconstructs."""
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in voxels.shape), indexing="ij")
    return np.where(x**2 + y**2 > 1, padding, voxels)


def middle(voxels: np.ndarray, share: float) -> np.ndarray:
    return voxels[tuple(slice(int(n * (1 - share) / 2), int(n * (1 + share) / 2)) for n in voxels.shape)]


def with_metal(voxels: np.ndarray) -> np.ndarray:
    voxels = voxels.copy()
    z, y, x = (n // 2 for n in voxels.shape)
    voxels[z - 6 : z + 6, y - 4 : y + 4, x - 4 : x + 4] = 3071
    voxels[z - 6 : z + 6, y - 4 : y + 4, x + 4 : x + 20] = -900  # the streak beside it
    return voxels


IN_HU = {
    "as it is": lambda hu: hu,
    "with metal": with_metal,
    "contrast medium": lambda hu: np.where((hu > -5) & (hu < 25), 330, hu),  # all that is like water
    "without air around": lambda hu: middle(hu, 0.5),
    "clipped to the window": lambda hu: np.clip(hu, -160, 240),
    "clipped below": lambda hu: np.clip(hu, -1024, 3071),
    "with noise": lambda hu: hu + np.random.default_rng(0).normal(0, 40, hu.shape),
    "resampled with overshoot": lambda hu: ndimage.zoom(middle(hu, 0.8).astype(np.float32), 1.4, order=3),
    **{f"padded with {p}": lambda hu, p=p: ringed(hu, p) for p in (-1024, -2000, -3024, -32768, 0, -1)},
}
NOT_IN_HU = {
    "raw": lambda hu: hu + 1024,
    "raw, one negative voxel": lambda hu: np.where(np.arange(hu.size).reshape(hu.shape) == 99, -1000, hu + 1024),
    "raw with noise below 0": lambda hu: hu + 1000 + np.random.default_rng(0).normal(0, 12, hu.shape),
    "raw, resampled with overshoot": lambda hu: ndimage.zoom(middle(hu, 0.8).astype(np.float32) + 1024, 1.5, order=3),
    "raw without air around": lambda hu: middle(hu, 0.5) + 1024,
    "intercept taken off twice": lambda hu: hu - 1024,
    "intercept taken off twice, clipped": lambda hu: np.maximum(hu - 1024, -1024),
    "z-scores": lambda hu: (hu - hu.mean()) / hu.std(),
    "z-scores, one wild voxel": lambda hu: np.where(hu == hu.max(), 3000, (hu - hu.mean()) / hu.std()),
    "thousandths": lambda hu: hu / 1000,
    "0 to 255": lambda hu: np.clip((hu + 160) * 0.6375, 0, 255),
    "0 to 255, padded with -1": lambda hu: ringed(np.clip((hu + 160) * 0.6375, 0, 255), -1),
    "wrapped to unsigned": lambda hu: hu.astype(np.int16).astype(np.uint16),
    "padding alone": lambda hu: np.where(np.arange(hu.size).reshape(hu.shape) == 99, 40, -2000),
    **{
        f"raw, padded with {p}": lambda hu, p=p: ringed(hu + 1024, p) for p in (-1000, -1024, -2000, -32768, -1, -200)
    },
}


@pytest.mark.parametrize("how", IN_HU)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_ct_in_hu_is_known_by_its_bulk(hu, how, seed):
    assert not not_in_hu(IN_HU[how](hu if seed == 0 else pelvis(seed)))


@pytest.mark.parametrize("how", NOT_IN_HU)
def test_values_that_are_no_hu_are_refused_everywhere_by_one_rule(hu, how):
    """One voxel below 0 used to be enough, so that raw values were segmented at several times their volume."""
    voxels = NOT_IN_HU[how](hu)
    reason = not_in_hu(voxels)
    assert reason
    image = sitk.GetImageFromArray(voxels.astype(np.float32))
    with pytest.raises(
        ValueError, match=r"case P7: p7: is no CT in HU .*; apply its rescale intercept once"
    ) as error:
        checked_case("P7", image, None, image_name="p7")
    assert reason in str(error.value)
    image.SetSpacing((4.0, 4.0, 5.0))
    assert femoral_heads(image).reason == f"not a CT in HU: {reason}"


CTS = ["ct_totalsegmentator/ts_example_image.nii.gz"]
CTS += [f"rt_sts/{patient}/CT/nifti/image/image.nii.gz" for patient in ("STS_001", "STS_002")]
MRS = ["mr_ucla/UCLA0001_image.nii.gz", "rt_sts/STS_001/MR_T1/nifti/image/image.nii.gz"]
MRS += [f"promise12_128/Case{number}_image.nii.gz" for number in ("01", "11", "40")]


@pytest.mark.parametrize("name", [*CTS, *MRS])
def test_real_cts_are_in_hu_and_real_mrs_are_not(real_scan, name):
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(real_scan(name)))[::2, ::2, ::2].astype(np.float32)
    assert bool(not_in_hu(voxels)) == (name in MRS)
    if name in CTS:
        assert not not_in_hu(ringed(voxels, -3024)) and not not_in_hu(with_metal(voxels))
        assert all(not_in_hu(spoil(voxels.astype(np.int32))) for spoil in NOT_IN_HU.values())
