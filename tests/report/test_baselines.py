"""Two trivial answers, on regions made by hand."""

import numpy as np
import pytest
import SimpleITK as sitk

from mupkg.data.preprocessing import to_scan_grid
from mupkg.metrics import dice
from mupkg.report.baselines import THRESHOLDS, best_threshold, by_threshold, mean_shape, measure_baseline
from mupkg.stages.evaluation import mask_metrics

SHAPE = (8, 12, 12)


class ByHand:
    """Regions of training cases that lie in memory."""

    def __init__(self, images, labels):
        self.cases = images, labels

    def volumes(self, split):
        assert split == "train"
        return self.cases


def box(z, y, x, shape=SHAPE):
    voxels = np.zeros(shape, np.uint8)
    voxels[slice(*z), slice(*y), slice(*x)] = 1
    return voxels


def test_a_threshold_keeps_the_largest_component_on_its_side():
    region = np.full(SHAPE, 100, np.uint8)
    region[1:3, 1:4, 1:4], region[5:7, 8, 8], region[6:8, 1:3, 1:3] = 200, 210, 20
    above, below = by_threshold(region, 150, True), by_threshold(region, 50, False)
    np.testing.assert_array_equal(above, box((1, 3), (1, 4), (1, 4)))
    np.testing.assert_array_equal(below, box((6, 8), (1, 3), (1, 3)))
    assert above.dtype == below.dtype == bool
    assert not by_threshold(region, 250, True).any() and not by_threshold(region, 10, False).any()
    assert not by_threshold(np.full(SHAPE, 200, np.uint8), 200, True).any()


@pytest.mark.parametrize("above", [True, False])
def test_the_best_threshold_is_found(above):
    images, labels = [], []
    for low, high in ((90, 120), (70, 130)):
        label = box((2, 5), (3, 9), (4, 8))
        images.append(
            np.where(label, high, low).astype(np.uint8) if above else np.where(label, low, high).astype(np.uint8)
        )
        labels.append(label)
    rule = best_threshold(ByHand(images, labels))
    assert all((rule(image) == label).all() for image, label in zip(images, labels, strict=True))
    assert rule.keywords["above"] == above
    assert rule.keywords["value"] in THRESHOLDS and 90 <= rule.keywords["value"] <= 120


def test_the_best_threshold_is_best_on_the_mean_of_the_cases():
    label = box((2, 5), (3, 9), (4, 8))
    halves = label * (np.arange(12) < 6)  # half the label is bright in the second case
    images = [np.where(label, 200, 50).astype(np.uint8), np.where(halves, 200, 50).astype(np.uint8)]
    rule = best_threshold(ByHand(images, [label, label]))
    assert [dice(rule(image), label) for image in images] == pytest.approx([1, 2 / 3])


def test_the_mean_shape_is_the_majority_of_centred_labels():
    labels = [box((1, 4), (2, 7), (3, 6)), box((4, 7), (6, 11), (8, 11)), box((3, 4), (5, 6), (5, 6))]
    shape = mean_shape(ByHand([], labels))
    assert shape.shape == SHAPE and shape.dtype == bool
    assert shape.sum() == 3 * 5 * 3
    centre = np.argwhere(shape).mean(axis=0)
    assert (np.abs(centre - (np.array(SHAPE) - 1) / 2) <= 0.5).all()


def test_the_mean_shape_may_lie_where_prostates_lie():
    labels = [box((1, 4), (2, 7), (3, 6)), box((3, 6), (2, 7), (5, 8))]
    shape = mean_shape(ByHand([], labels), in_place=True)
    np.testing.assert_array_equal(shape, box((2, 5), (2, 7), (4, 7)))


def test_half_of_the_prostates_is_enough():
    labels = [box((3, 5), (5, 7), (4, 8)), box((3, 5), (5, 7), (5, 7))]
    assert mean_shape(ByHand([], labels)).sum() == 2 * 2 * 4


def test_a_region_that_missed_its_prostate_does_not_count():
    """Its centroid was NaN."""
    labels = [box((3, 5), (5, 7), (4, 8)), box((3, 5), (5, 7), (4, 8)), np.zeros(SHAPE, np.uint8)]
    assert mean_shape(ByHand([], [*labels, labels[2], labels[2]])).sum() == 2 * 2 * 4


def test_a_baseline_goes_the_way_of_a_network(cohort, regions):
    (case_id,) = cohort.ids("test")
    truth = regions.volume(case_id, "label")
    table = measure_baseline(lambda region: truth == 1, cohort, regions)
    assert table["case_id"].tolist() == [case_id]
    prepared = cohort.prepared(case_id).label
    best = mask_metrics(
        to_scan_grid(sitk.Cast(prepared, sitk.sitkFloat32), cohort.case(case_id).image), cohort.case(case_id)
    )
    assert table["DSC"][0] == pytest.approx(best["DSC"], abs=0.15) and table["PPV"][0] > 0.7
    nothing = measure_baseline(lambda region: np.zeros(region.shape, bool), cohort, regions)
    assert nothing["DSC"][0] == 0 and nothing["ASD"][0] == np.inf


def test_a_baseline_sees_the_regions_voxels(cohort, regions):
    seen = []
    measure_baseline(lambda region: seen.append(region) or region > 100, cohort, regions)
    np.testing.assert_array_equal(seen[0], regions.volume(cohort.ids("test")[0]))
