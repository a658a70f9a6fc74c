"""Figures: outlines lie where the voxels lie, files come in pairs, awkward input is drawn too."""

import itertools

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb

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
    figure, ax = plt.subplots()
    ax.set_title("searched for")
    shown = figures.save(figure, tmp_path / "deep" / "figure")
    svg = (tmp_path / "deep" / "figure.svg").read_text(encoding="utf-8")
    assert ">searched for</text>" in svg  # text, not outlines of letters
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


def test_a_figure_says_in_words_what_it_shows(tmp_path):
    figure, (left, right) = plt.subplots(1, 2)
    figure.suptitle("case 7")
    left.set(title="UNet\nDSC 0.9", xlabel="step", ylabel="loss")
    left.plot([0, 1], label="training")
    right.set_title("on the left", loc="left")
    shown = figures.save(figure, tmp_path / "figure")
    assert shown.alt == "case 7; UNet, DSC 0.9: loss against step: training; on the left"
    assert shown._repr_mimebundle_()[1]["image/png"]["alt"] == shown.alt


def contrast(first: str, second: str) -> float:
    """Distance in CIELAB (Euclidean, D65) of two colours to whom they are most alike: to people with all receptors,
    or without those for red, green or blue."""
    # Machado, Oliveira and Fernandes 2009: protanopia, deuteranopia, tritanopia at full severity, on linear RGB
    kinds = (
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
        np.eye(3),
    )
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(colour: str, kind: list) -> np.ndarray:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        xyz = to_xyz @ np.clip(np.array(kind) @ linear, 0, 1) / [0.9505, 1, 1.089]
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    return min(float(np.linalg.norm(lab(first, kind) - lab(second, kind))) for kind in kinds)


@pytest.mark.parametrize(
    "together",
    [
        (figures.TRUTH, figures.PREDICTION, figures.CHOSEN, *figures.KIND_COLOURS),  # all that notebook 08 shows
        [figures.TRUTH, *(colour for _, colour in figures.ROLES.values()), *map(to_hex, figures.TEACHES.values())],
        figures.LINES[:4],
    ],
    ids=["views", "tuples", "lines"],
)
def test_colours_that_stand_together_differ_for_colour_blind_readers(together):
    assert contrast("red", "lime") < contrast("red", "blue")  # the measure sees what it should
    for first, second in itertools.combinations(together, 2):
        assert contrast(first, second) > 20, (first, second)


@pytest.mark.parametrize(("plane", "sides"), [("axial", "RL"), ("coronal", "RL"), ("sagittal", "AP")])
def test_a_plane_is_named_and_has_the_patients_sides_and_a_bar_of_20_mm(plane, sides):
    _, ax = plt.subplots()
    volume = np.zeros((20, 30, 40), np.uint8)
    figures.draw_plane(ax, volume, (3.0, 2.0, 1.5), plane, 5)
    texts = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert f"{plane}, slice 5" in texts and "20 mm" in texts
    assert texts[sides[0]] < 0.5 < texts[sides[1]]
    (bar,) = ax.lines
    assert np.ptp(bar.get_xdata()) == pytest.approx(20)  # these axes are in mm


def test_the_patients_left_is_on_the_right():
    """A scan in LPS whose brightest voxel lies to the patient's left, and the same scan mirrored."""
    voxels = np.zeros((3, 5, 8), np.int16)
    voxels[1, 2, 6] = 100
    image = sitk.GetImageFromArray(voxels)
    for scan in (image, sitk.Flip(image, (True, False, False))):  # flipped in memory, at the same place
        axial = figures.three_planes({"scan": (scan, None)}, (0, 100), through={"scan": (6, 2, 1)}).axes[0]
        assert np.argwhere(axial.images[0].get_array() == 100).tolist() == [[2, 6]]


def test_heat_glows_where_there_is_any_and_chosen_voxels_are_lit():
    grey = np.full((2, 3), 100, np.uint8)
    heat = np.array([[0, 0.01, 0.5], [1, 0, 0]], np.float32)
    mixed = figures.mix(grey, heat, opacity=0.5, lit=np.array([[1, 2]]))
    assert (mixed[0, :2] == 100).all()
    for place in ((0, 2), (1, 0)):
        expected = 0.5 * 100 + 0.5 * 255 * np.array(colormaps[figures.HEAT](heat[place]))[:3]
        np.testing.assert_allclose(mixed[place], expected, atol=1)
    assert (mixed[1, 2] == np.round(255 * np.array(to_rgb(figures.CHOSEN)))).all()


def test_tuples_are_active_below_the_margins_line():
    _, ax = plt.subplots()
    plane = figures.TuplePlane(ax, margin=0.5)
    plane.show(np.array([0.0, 0.0, 2.0]), np.array([0.4, 0.6, 3.0]))
    active, satisfied = map(to_hex, figures.TEACHES.values())
    assert [to_hex(colour) for colour in plane.dots.get_facecolors()] == [active, satisfied, satisfied]
    assert "mean hinge 0.03" in ax.get_title()
    (line,) = ax.lines
    x, y = line.get_data()
    np.testing.assert_allclose(y, x + 0.5)
    plane.show(np.empty(0), np.empty(0))
    assert "mean hinge none" in ax.get_title()


def test_a_line_joins_the_values_of_a_case_and_stops_where_it_has_none():
    table = pd.DataFrame({"UNet": [1.0, np.inf], "MetricUNet-H": [2.0, 1.5]})
    ax = figures.metric_boxes({"HD95": table}).axes[0]
    lines = [line.get_ydata() for line in ax.lines[:2]]
    np.testing.assert_array_equal(lines, [[1.0, 2.0], [np.nan, 1.5]])
    assert ax.get_title() == "n = 2 cases (1 not finite)" and ax.get_ylabel() == "HD95 (mm)"


# Convergence


def test_convergence_is_the_median_and_the_range_over_replicates_with_their_number():
    one = pd.DataFrame({"step": [1, 2, 4], "cross_entropy": [0.8, 0.4, 0.2], "validation_dsc": [np.nan, 0.2, 0.6]})
    runs = [one.assign(replicate=r, validation_dsc=one["validation_dsc"] + r / 10) for r in (0, 1, 4)]
    arms = [pd.concat(runs).assign(configuration="A"), one.assign(configuration="B", replicate=0)]
    left, right = figures.convergence(pd.concat(arms).assign(summed_rate=0.1), "step").axes
    assert left.lines[0].get_xdata().tolist() == [1, 2, 4] and right.lines[0].get_xdata().tolist() == [2, 4]
    assert left.lines[0].get_ydata().tolist() == pytest.approx([0.8, 0.4, 0.2])
    assert right.lines[0].get_ydata().tolist() == pytest.approx([0.3, 0.7])  # the median, not the mean
    band = right.collections[0].get_paths()[0].vertices
    assert sorted({(x, round(y, 9)) for x, y in band}) == [(2, 0.2), (2, 0.6), (4, 0.6), (4, 1.0)]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["A, n = 3", "B, n = 1"]


def test_convergence_shows_more_configurations_than_there_are_colours():
    arms = [pd.DataFrame({"step": [1, 2], "cross_entropy": 0.1, "validation_dsc": 0.5}) for _ in range(20)]
    arms = pd.concat([arm.assign(configuration=f"arm {i}", replicate=0) for i, arm in enumerate(arms)])
    assert len(figures.convergence(arms).axes[1].lines) == 20
