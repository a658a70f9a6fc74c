"""Harder scans and contours: what changes, by how much, and what does not."""

from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from mupkg.stages.shifts import CONTRAST, NOISE_HU, redrawn, redrawn_all, shifted

TISSUES = [-1000.0, -100.0, 40.0, 60.0, 900.0]


@pytest.fixture
def scan() -> sitk.Image:
    image = sitk.GetImageFromArray(np.repeat(np.float32(TISSUES), 2000).reshape(10, 50, 20))
    image.SetSpacing((1.0, 2.0, 3.0))
    return image


def test_noise_has_its_deviation_and_its_own_seed(scan):
    noisy = [sitk.GetArrayFromImage(shifted(scan, "noise", seed)) for seed in (1, 1, 2)]
    added = noisy[0] - sitk.GetArrayFromImage(scan)
    assert added.std() == pytest.approx(NOISE_HU, rel=0.05) and abs(added.mean()) < 0.05 * NOISE_HU
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])


def test_noise_is_the_same_on_any_number_of_threads(scan):
    """Regression: a run that was tested on eight threads saw other scans than one that was tested on one."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        noisy = []
        for threads in (1, 3):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            noisy.append(sitk.GetArrayFromImage(shifted(scan, "noise", 7)))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    np.testing.assert_array_equal(*noisy)


def test_tissues_come_closer_and_air_stays_air(scan):
    air, fat, muscle, prostate, bone = np.unique(sitk.GetArrayFromImage(shifted(scan, "contrast", 1)))
    assert muscle == 40 and prostate - muscle == pytest.approx(20 * CONTRAST)
    assert muscle - fat == pytest.approx(140 * CONTRAST) and bone == pytest.approx(40 + 860 * CONTRAST)
    assert air < -800


def test_thick_slices_are_means_of_two_in_the_same_place(scan):
    thick = shifted(scan, "thick", 1)
    assert thick.GetSize() == (20, 50, 5) and thick.GetSpacing() == (1.0, 2.0, 6.0)
    before, after = sitk.GetArrayFromImage(scan), sitk.GetArrayFromImage(thick)
    np.testing.assert_allclose(after, (before[::2] + before[1::2]) / 2, atol=0.5)
    assert thick.GetOrigin()[2] == pytest.approx(1.5)  # between the first two


def ball(radius_mm: float, spacing: tuple[float, float, float]) -> np.ndarray:
    z, y, x = (np.arange(40) * s for s in spacing)
    middle = [20 * s for s in spacing]
    squares = (z[:, None, None] - middle[0]) ** 2 + (y[:, None] - middle[1]) ** 2 + (x - middle[2]) ** 2
    return (squares <= radius_mm**2).astype(np.uint8)


def test_a_contour_moves_as_far_as_it_is_told_and_both_ways():
    spacing = (1.5, 1.0, 1.0)
    label = ball(15, spacing)
    centre = np.array([20 * s for s in spacing])
    errors = []
    for seed in range(8):
        new = redrawn(label, spacing, 2.0, seed)
        edge = np.argwhere(
            new & ~(np.roll(new, 1, 2) & np.roll(new, -1, 2) & np.roll(new, 1, 1) & np.roll(new, -1, 1))
        )
        errors.append(np.linalg.norm(edge * spacing - centre, axis=1) - 15)
    errors = np.concatenate(errors)
    assert errors.std() == pytest.approx(2.0, rel=0.25) and abs(errors.mean()) < 1.0
    assert errors.min() < -2 and errors.max() > 2


def test_without_noise_or_prostate_the_label_is_the_same():
    label = ball(10, (1, 1, 1))
    assert redrawn(label, (1, 1, 1), 0.0, 3) is label
    empty = np.zeros_like(label)
    assert redrawn(empty, (1, 1, 1), 4.0, 3) is empty


def test_every_case_and_seed_has_an_error_of_its_own_that_comes_back():
    label = ball(12, (1, 1, 1))
    regions = SimpleNamespace(ids=lambda split: ["a", "b", "c"], spacing_mm=lambda case: (1.0, 1.0, 1.0))
    first, again, other = (redrawn_all(regions, [label, label], 2.0, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(first) == 2 and not np.array_equal(*first) and not np.array_equal(first[0], other[0])
