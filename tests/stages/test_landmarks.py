"""Femoral heads: on phantoms with known centres, on things that are no hips, and on real scans where given."""

import numpy as np
import pytest
import SimpleITK as sitk
from unusual import unusual_phantom

from mupkg.data.phantom import make_phantom
from mupkg.stages.landmarks import FemoralHeads, femoral_heads

COARSE = (4.0, 2.5, 2.5)


def errors_mm(heads: FemoralHeads, truth) -> list[float]:
    assert heads.left is not None, heads.reason
    return [float(np.linalg.norm(np.subtract(found, true))) for found, true in zip(heads[:2], truth, strict=True)]


def is_doubt(heads: FemoralHeads) -> bool:
    return heads.left is None and heads.right is None and heads.confidence == 0 and len(heads.reason) > 5


def moved(image: sitk.Image, points, turn_deg: float, shift_mm=(0.0, 0.0, 0.0), noise_hu: float = 0.0):
    """The scan turned about its long axis and shifted, padded with air; and where the points went."""
    motion = sitk.Euler3DTransform()
    motion.SetCenter(image.TransformContinuousIndexToPhysicalPoint([n / 2 for n in image.GetSize()]))
    motion.SetRotation(0, 0, np.deg2rad(turn_deg))
    motion.SetTranslation(shift_mm)
    room = sitk.ConstantPad(image, [25, 25, 0], [25, 25, 0], -1000)
    out = sitk.Cast(sitk.Resample(image, room, motion, sitk.sitkLinear, -1000), sitk.sitkFloat32)
    if noise_hu:
        out = sitk.AdditiveGaussianNoise(out, noise_hu, 0.0, 1)
    return out, [motion.GetInverse().TransformPoint(p) for p in points]


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(3, spacing_mm=COARSE)


@pytest.mark.parametrize(("seed", "turn_deg"), [(5, -15.0), (11, 0.0), (21, 15.0), (5, 15.0), (21, -15.0)])
def test_phantoms_with_a_bright_bladder(seed, turn_deg):
    case = unusual_phantom(seed, COARSE, contrast=True, rotation_deg=(3.0, 0.0, turn_deg))
    heads = femoral_heads(case.image)
    assert max(errors_mm(heads, case.femoral_heads)) < 5
    assert 0 < heads.confidence <= 1 and heads.left[0] > heads.right[0]


@pytest.mark.parametrize(
    "turn_deg, shift_mm, noise_hu", [(12, (40, -30, 0), 0), (-12, (-50, 20, 0), 40), (0, (0, 0, 0), 40)]
)
def test_moved_and_noisy_phantom(phantom, turn_deg, shift_mm, noise_hu):
    image, truth = moved(phantom.image, phantom.femoral_heads, turn_deg, shift_mm, noise_hu)
    assert max(errors_mm(femoral_heads(image), truth)) < 5


def test_finer_phantom():
    case = make_phantom(2, spacing_mm=(2.5, 1.5, 1.5))
    assert max(errors_mm(femoral_heads(case.image), case.femoral_heads)) < 5


def reorient(image: sitk.Image, how: str) -> sitk.Image:
    if how == "flipped":
        return sitk.Flip(image, [True, False, True])
    return sitk.PermuteAxes(image, [2, 0, 1])


@pytest.mark.parametrize("how", ["flipped", "permuted"])
def test_direction_changes_nothing(phantom, how):
    expected = femoral_heads(phantom.image)
    assert max(errors_mm(femoral_heads(reorient(phantom.image, how)), expected[:2])) < 1


def test_ruined_hip_gives_none_or_the_truth(phantom):
    """One hip drowned in a metal artefact: no answer, or a right one."""
    hu = sitk.GetArrayFromImage(phantom.image)
    centre = np.array(phantom.image.TransformPhysicalPointToContinuousIndex(phantom.femoral_heads[0]))[::-1]
    offset = (np.indices(hu.shape).T - centre) * COARSE
    near = (np.linalg.norm(offset, axis=-1) < 50).T
    hu[near] = np.random.default_rng(0).normal(0, 900, near.sum()).clip(-1024, 3071)
    image = sitk.GetImageFromArray(hu)
    image.CopyInformation(phantom.image)
    heads = femoral_heads(image)
    assert is_doubt(heads) or max(errors_mm(heads, phantom.femoral_heads)) < 10


def test_abdomen_above_the_hips(phantom):
    top = phantom.image.TransformPhysicalPointToIndex(phantom.femoral_heads[0])[2] + 8
    assert is_doubt(femoral_heads(phantom.image[:, :, top:]))


def test_mr_like(phantom):
    shifted = sitk.Clamp(sitk.Cast(phantom.image, sitk.sitkFloat32) + 1024, lowerBound=0)
    heads = femoral_heads(shifted)
    assert is_doubt(heads) and "CT" in heads.reason


def head_and_neck() -> np.ndarray:
    """A skull of 75 mm radius, jaw, vertebrae, and shoulders with round humeral heads; HU on 3 mm voxels."""
    z, y, x = np.indices((100, 90, 130)) * 3.0
    x, y = x - 195, y - 135
    hu = np.full(x.shape, -1000.0)
    skull = np.sqrt(x**2 + y**2 + (z - 200) ** 2)
    hu[(skull < 86) | ((np.hypot(x, y - 15) < 60) & (z < 200))] = 40
    hu[(x / 200) ** 2 + ((y - 15) / 80) ** 2 + ((z + 20) / 110) ** 2 < 1] = 45
    hu[(skull > 68) & (skull < 78)] = 900
    hu[skull < 68] = 35
    jaw = np.sqrt(x**2 + (y + 45) ** 2 + (1.5 * (z - 120)) ** 2)
    hu[(jaw > 42) & (jaw < 55) & (y < -30)] = 800
    for side in (-150, 150):
        humerus = np.sqrt((x - side) ** 2 + (y - 15) ** 2 + (z - 25) ** 2)
        hu[humerus < 26], hu[humerus < 23] = 700, 220
    hu[(np.hypot(x, y - 30) < 18) & (z % 18 < 13) & (z < 170)] = 350
    return hu + np.random.default_rng(0).normal(0, 15, hu.shape)


@pytest.mark.parametrize(
    "hu",
    [
        pytest.param(head_and_neck, id="head and neck"),
        pytest.param(lambda: np.full((50, 50, 50), -1000.0), id="air"),
        pytest.param(lambda: np.full((1, 50, 50), -1000.0), id="one slice"),
        pytest.param(lambda: np.full((50, 50, 50), np.nan), id="not a number"),
        pytest.param(lambda: np.random.default_rng(0).normal(0, 400, (50, 60, 60)), id="noise"),
        pytest.param(lambda: np.zeros((50, 50)), id="two-dimensional"),
    ],
)
def test_no_hips_gives_none_and_a_reason(hu):
    image = sitk.GetImageFromArray(hu().astype(np.float32))
    image.SetSpacing((3.0,) * image.GetDimension())
    assert is_doubt(femoral_heads(image))


@pytest.fixture(scope="module")
def real_ct(real_scan):
    """The real CT and the deepest point of each femur's label, left first."""
    names = (f"ct_totalsegmentator/ts_example_{name}.nii.gz" for name in ("image", "femoral_label"))
    image, label = (sitk.ReadImage(real_scan(name)) for name in names)
    label = label > 0
    femora = sitk.RelabelComponent(sitk.ConnectedComponent(label))
    points = []
    for femur in (1, 2):
        depth = sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(femora == femur, True, False, True))
        index = np.unravel_index(depth.argmax(), depth.shape)[::-1]
        points.append(label.TransformIndexToPhysicalPoint([int(i) for i in index]))
    return image, sorted(points, reverse=True)


@pytest.mark.parametrize("turn_deg", [-15, 0, 15])
@pytest.mark.parametrize(
    "shift_mm, noise_hu", [((0, 0, 0), 0), ((0, 0, 0), 40), ((50, 30, 0), 40), ((-60, -30, 0), 0)]
)
def test_real_ct(real_ct, turn_deg, shift_mm, noise_hu):
    image, truth = moved(*real_ct, turn_deg, shift_mm, noise_hu)
    assert max(errors_mm(femoral_heads(image), truth)) < 10


@pytest.mark.parametrize("how", ["flipped", "permuted"])
def test_real_ct_reoriented(real_ct, how):
    assert max(errors_mm(femoral_heads(reorient(real_ct[0], how)), real_ct[1])) < 10


def test_real_ct_cut_above_the_heads(real_ct):
    assert is_doubt(femoral_heads(real_ct[0][:, :, 20:]))


def test_real_mr(real_scan):
    assert is_doubt(femoral_heads(sitk.ReadImage(real_scan("mr_ucla/UCLA0001_image.nii.gz"))))
