"""A slice that shows what it is told, pixel by pixel, and boxes however they are drawn."""

import io

import numpy as np
import pytest
from IPython.display import Image as Shown
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from mupkg import in_lab
from mupkg.explore import panels
from mupkg.explore.panels import SlicePanel, show
from mupkg.explore.predictions import CasePredictions
from mupkg.report.figures import CHOSEN, TRUTH, colour_bar

SHAPE = (12, 20)
COLD = np.zeros(SHAPE, np.float32)


def grey_case(truth: np.ndarray | None = None, spacing_mm=(3.0, 1.0, 1.0), runs=("a",)) -> CasePredictions:
    """Two slices of one grey, without prostate if no truth is given."""
    region = np.full((2, *SHAPE), 90, np.uint8)
    truth = np.zeros((2, *SHAPE), bool) if truth is None else np.stack([truth, truth])
    return CasePredictions(
        "made up", region, truth, spacing_mm, {}, dict.fromkeys(runs, np.zeros((2, *SHAPE), np.float32))
    )


def pixels(panel: SlicePanel, number: int = 0) -> np.ndarray:
    """A picture as the screen shows it."""
    assert panel.pictures
    return np.asarray(Image.open(io.BytesIO(panel._images[number].value)).convert("RGB")).astype(int)


def middles(picture: np.ndarray) -> np.ndarray:
    """The pixels in the middle of every voxel."""
    at = [((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip(SHAPE, picture.shape, strict=False)]
    return picture[np.ix_(*at)]


def test_lit_voxels_have_their_colour_and_no_others_have():
    panel = SlicePanel(grey_case(runs=("a", "b")))
    lit = np.array([[6, 3], [5, 7], [3, 15]])
    panel.draw([COLD] * 2, ["a", "b"], lit=lit)
    for number in range(2):
        shown = (middles(pixels(panel, number)) == np.round(255 * np.array(to_rgb(CHOSEN)))).all(axis=2)
        assert np.argwhere(shown).tolist() == sorted(lit.tolist())
    panel.draw([COLD] * 2, ["a", "b"])
    inner = middles(pixels(panel))[2:-2]  # the letters and the bar lie at the border
    assert (inner == 90).all()


def test_heat_shows_where_it_is_warm_and_contours_where_they_belong():
    truth, heat = np.zeros(SHAPE, bool), COLD.copy()
    heat[4, 4], truth[2:9, 2:9] = 1.0, True
    panel = SlicePanel(grey_case(truth))
    panel.draw([heat], ["a"])
    picture = pixels(panel)
    warm, cold = middles(picture)[4, 4], middles(picture)[9, 15]
    assert (cold == 90).all() and np.abs(warm - 90).max() > 30
    y, x = np.nonzero(np.abs(picture - 255 * np.array(to_rgb(TRUTH))).max(axis=2) < 3)
    scale = picture.shape[1] / SHAPE[1]
    for found, voxel in ((y.min(), 2), (x.min(), 2), (y.max(), 9), (x.max(), 9)):
        assert abs(found / scale - voxel) < 3 / scale


def test_a_lit_voxel_is_seen_although_a_contour_runs_through_it():
    truth = np.zeros(SHAPE, bool)
    truth[5, 5] = True
    panel = SlicePanel(grey_case(truth))
    panel.draw([truth.astype(np.float32)], ["a"], levels=(0.25, 0.5, 0.75), lit=np.array([[5, 5]]))
    assert (middles(pixels(panel))[5, 5] == np.round(255 * np.array(to_rgb(CHOSEN)))).all()


def test_the_heat_is_cut_where_it_crosses_the_levels():
    heat = np.tile(np.linspace(0, 1, SHAPE[1], dtype=np.float32), (SHAPE[0], 1))
    panel = SlicePanel(grey_case())
    panel.draw([heat], ["a"], opacity=0.0, levels=(0.25, 0.5, 0.75))
    row = pixels(panel)[100] - 90  # below the letters
    at = np.flatnonzero(np.abs(row).max(axis=1)) / pixels(panel).shape[1] * SHAPE[1] - 0.5
    expected = np.array([0.25, 0.5, 0.75]) * (SHAPE[1] - 1)
    assert np.abs(at[:, None] - expected).min(axis=1).max() < 0.2
    assert (np.abs(at - expected[1]) < 1).sum() > (np.abs(at - expected[0]) < 1).sum()  # the middle one is strongest
    assert "p = 0.25, 0.5, 0.75" in panel.legend.value


def test_voxels_have_the_proportions_of_their_spacing():
    panel = SlicePanel(grey_case(spacing_mm=(3.0, 2.0, 1.0)))
    panel.draw([COLD], ["a"])
    height, width, _ = pixels(panel).shape
    assert height / width == pytest.approx(2 * SHAPE[0] / SHAPE[1])


@pytest.mark.parametrize(
    ("start", "end", "rows", "columns"),
    [
        ((2.2, 3.4), (5.1, 8.6), (2, 5), (3, 9)),
        ((5.1, 8.6), (2.2, 3.4), (2, 5), (3, 9)),
        ((4.0, 4.0), (4.3, 3.8), (4, 4), (4, 4)),
        ((-9, -9), (99, 99), (0, 11), (0, 19)),
        ((30, 25), (30, 25), (11, 11), (19, 19)),
    ],
)
def test_a_box_encloses_its_voxels_from_whichever_corner(start, end, rows, columns):
    chosen = []
    panel = SlicePanel(grey_case())
    panel.chosen = chosen.append
    panel.choose(start, end)
    assert chosen[0].tolist() == [[rows[0], columns[0]], [rows[1], columns[1]]]


def event(kind: str, y: float, x: float) -> dict:
    """A mouse event at a place in voxels, in a picture shown with 300 x 400 pixels."""
    place = {"relativeX": 300 * (x + 0.5) / SHAPE[1], "relativeY": 400 * (y + 0.5) / SHAPE[0]}
    return {"type": kind, **place, "boundingRectWidth": 300, "boundingRectHeight": 400}


def test_the_mouse_chooses_in_the_picture_at_whatever_size_it_is_shown():
    chosen = []
    panel = SlicePanel(grey_case())
    panel.chosen = chosen.append
    panel.mouse(event("mousedown", 5.2, 9.3))
    panel.mouse(event("mouseup", 1.8, 2.9))
    assert chosen[0].tolist() == [[2, 3], [5, 9]]
    panel.mouse(event("mousedown", 5, 9))
    panel.mouse(event("mouseup", 5, 9))
    assert chosen[1].tolist() == [[5, 9]] * 2
    panel.mouse(event("mousedown", 5, 9.4))
    panel.mouse(event("mouseup", 5, 9.6))  # a hand is never quite still: no box of two voxels
    assert chosen.pop().tolist() == [[5, 9]] * 2
    panel.mouse(event("mousedown", 5, 9))
    panel.mouse(event("mouseleave", 5, 9))
    panel.mouse(event("mouseup", 5, 9))  # without a press
    assert len(chosen) == 2


def test_the_mouse_is_told_of_the_voxel_under_it():
    told = []
    panel = SlicePanel(grey_case())
    panel.describe = lambda *place: told.append(place) or "this one"
    panel.hover(event("mousemove", 5.3, 18.8))
    panel.hover(event("mousemove", -0.6, 25))
    assert told == [(0, 5, 19), (0, 0, 19)] and "this one" in panel.words.value


def test_pictures_change_when_they_are_drawn_again():
    panel = SlicePanel(grey_case())
    panel.draw([COLD], ["before"])
    before = pixels(panel)
    panel.draw([COLD + 1], ["after"])
    assert not np.array_equal(pixels(panel), before) and "after" in panel._titles[0].value


def test_without_a_browser_the_same_slice_is_a_figure():
    truth = np.zeros(SHAPE, bool)
    truth[2:9, 2:9] = True
    panel = SlicePanel(grey_case(truth, runs=("a", "b")))
    panel.draw([COLD, COLD + 0.9], ["cold", "warm"], levels=(0.5,), lit=np.array([[5, 5]]))
    left, right, _ = panel.figure.axes
    np.testing.assert_array_equal(left.images[0].get_array()[5, 5], np.round(255 * np.array(to_rgb(CHOSEN))))
    assert [ax.get_title() for ax in (left, right)] == ["cold", "warm"]
    assert any("made up, axial, slice 0" in text.get_text() for text in left.texts)


def test_outside_jupyterlab_the_picture_stands_for_the_widget(monkeypatch, tmp_path):
    class Seen:
        figure = Figure()

        @property
        def widget(self):
            raise AssertionError("no widget is made where nobody can see it")

    displayed = []
    monkeypatch.setattr(panels, "display", displayed.append)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not in_lab()
    show(Seen(), tmp_path / "view")
    assert isinstance(displayed[0], Shown) and (tmp_path / "view.svg").exists()
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    assert in_lab()
    with pytest.raises(AssertionError, match="nobody can see"):
        show(Seen(), tmp_path / "view")


def test_a_colour_bar_has_its_ends():
    bar = colour_bar("coolwarm", "mm to contour", -10, 10)
    assert "mm to contour -10" in bar and bar.count("#") == 9 and "> 10<" in bar
