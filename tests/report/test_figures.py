"""Figures: outlines lie where the voxels lie, files come in pairs, awkward input is drawn too."""

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from matplotlib import pyplot as plt

from mupkg.report import figures


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def outline(ax) -> np.ndarray:
    return np.concatenate([path.vertices for collection in ax.collections for path in collection.get_paths()])


def test_an_outline_surrounds_its_voxels_and_is_not_upside_down():
    mask = np.zeros((9, 12), bool)
    mask[1:3, 7:11] = True
    _, ax = plt.subplots()
    ax.imshow(mask)
    figures.draw_contour(ax, mask, "red")
    points = outline(ax)
    assert points[:, 0].min() == pytest.approx(6.5) and points[:, 0].max() == pytest.approx(10.5)
    assert points[:, 1].min() == pytest.approx(0.5) and points[:, 1].max() == pytest.approx(2.5)


@pytest.mark.parametrize("plane", figures.PLANES)
def test_planes_are_drawn_in_mm_with_the_head_on_top(plane):
    volume = np.zeros((5, 6, 8), np.uint8)
    mask = np.zeros(volume.shape, bool)
    mask[0, 1, 2:6] = True  # feet end, front
    _, ax = plt.subplots()
    index = {"axial": 0, "coronal": 1, "sagittal": 3}[plane]
    figures.draw_plane(ax, volume, (3.0, 1.0, 2.0), plane, index, {"red": mask}, (0, 1))
    y = outline(ax)[:, 1]
    # axial: row 1 of 6, 1 mm each; coronal and sagittal: slice 0 is the lowest of 5, 3 mm each, cut by the border
    assert (y.min(), y.max()) == pytest.approx((1.0, 2.0) if plane == "axial" else (12.0, 13.5))
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_an_empty_mask_draws_nothing():
    _, ax = plt.subplots()
    figures.draw_contour(ax, np.zeros((4, 4), bool), "red")
    assert not ax.collections


def test_saving_leaves_a_png_and_an_svg_and_closes_the_figure(tmp_path):
    figure, _ = plt.subplots()
    shown = figures.save(figure, tmp_path / "deep" / "figure")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["figure.png", "figure.svg"]
    assert shown.data.startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)


def test_a_scan_without_label_and_one_with_an_empty_label_are_shown_through_their_middle():
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(4, 5, 6)))
    picture = figures.three_planes({"no label": (image, None), "empty": (image, sitk.Image(image.GetSize(), 1))})
    assert len(picture.axes) == 6


def test_values_that_are_not_finite_are_counted_in_the_boxes():
    table = pd.DataFrame({"UNet": [1.0, np.inf, 2.0], "MetricUNet-H": [np.nan, 1.0, 1.0]})
    picture = figures.metric_boxes({"ASD": table})
    assert "2 not finite" in picture.axes[0].get_title()
