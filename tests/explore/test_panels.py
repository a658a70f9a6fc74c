"""A slice that shows what it is told, pixel by pixel, and boxes however they are drawn."""

import io

import numpy as np
import pytest
from PIL import Image

from mupkg import in_lab
from mupkg.explore.panels import SlicePanel, mean, png, show

SHAPE = (12, 20)


def pixels(panel: SlicePanel, axes: int, voxels: list[tuple[int, int]]) -> np.ndarray:
    picture = np.asarray(Image.open(io.BytesIO(png(panel.figure))).convert("RGB"))
    place = panel.axes[axes].transData.transform([(x, y) for y, x in voxels])
    return picture[(picture.shape[0] - place[:, 1]).astype(int), place[:, 0].astype(int)]


def test_lit_voxels_are_cyan_and_no_others():
    panel = SlicePanel(["a", "b"], SHAPE, (3.0, 1.0, 1.0))
    lit = np.array([[0, 0], [5, 7], [11, 19]])
    panel.draw(np.full(SHAPE, 90, np.uint8), [np.zeros(SHAPE)] * 2, lit=lit)
    every = [(y, x) for y in range(12) for x in range(20)]
    for axes in range(2):
        cyan = (pixels(panel, axes, every) == (0, 255, 255)).all(axis=1)
        assert [voxel for voxel, c in zip(every, cyan, strict=True) if c] == [tuple(v) for v in lit]
    panel.draw(np.full(SHAPE, 90, np.uint8), [np.zeros(SHAPE)] * 2)
    assert not panel.lit.any()
    assert (np.abs(pixels(panel, 0, every).astype(int) - 90) <= 1).all()


def test_heat_shows_where_it_is_warm_and_contours_where_they_belong():
    panel = SlicePanel(["a"], SHAPE, (3.0, 1.0, 1.0))
    heat, truth = np.zeros(SHAPE), np.zeros(SHAPE, bool)
    heat[4, 4], truth[2:9, 2:9] = 1.0, True
    panel.draw(np.full(SHAPE, 90, np.uint8), [heat], truth=truth, predictions=[np.zeros(SHAPE, bool)])
    warm, cold = pixels(panel, 0, [(4, 4), (10, 15)])
    assert np.abs(cold.astype(int) - 90).max() <= 1 < np.abs(warm.astype(int) - 90).max()
    picture = np.asarray(Image.open(io.BytesIO(png(panel.figure))).convert("RGB")).astype(int)
    red = (picture[..., 0] > 200) & (picture[..., 1:] < 60).all(axis=2)
    y, x = np.nonzero(red)
    (left, top), (right, bottom) = panel.axes[0].transData.transform([(1.5, 1.5), (8.5, 8.5)])
    height = picture.shape[0]
    assert abs(x.min() - left) < 3 and abs(x.max() - right) < 3
    assert abs(y.min() - (height - top)) < 3 and abs(y.max() - (height - bottom)) < 3
    panel.draw(np.full(SHAPE, 90, np.uint8), [heat])  # the contour does not stay behind
    picture = np.asarray(Image.open(io.BytesIO(png(panel.figure))).convert("RGB")).astype(int)
    assert not ((picture[..., 0] > 200) & (picture[..., 1:] < 60).all(axis=2)).any()


def test_voxels_have_the_proportions_of_their_spacing():
    panel = SlicePanel(["a"], SHAPE, (3.0, 2.0, 1.0))
    png(panel.figure)  # the proportions are set when it is drawn
    (x0, y0), (x1, y1) = panel.axes[0].transData.transform([(0, 0), (1, 1)])
    assert abs(y1 - y0) == pytest.approx(2 * abs(x1 - x0), rel=1e-3)


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
    panel = SlicePanel(["a"], SHAPE, (1.0, 1.0, 1.0), chosen=chosen.append)
    panel.choose(start, end)
    expected = [[y, x] for y in range(rows[0], rows[1] + 1) for x in range(columns[0], columns[1] + 1)]
    assert chosen[0].tolist() == expected


def test_the_mouse_chooses_in_the_picture_at_whatever_size_it_is_shown():
    chosen = []
    panel = SlicePanel(["a", "b"], SHAPE, (3.0, 1.0, 1.0), chosen=chosen.append)
    png(panel.figure)  # the proportions are set when it is drawn

    def event(kind: str, axes: int, y: float, x: float) -> dict:
        place = panel.axes[axes].transData.transform((x, y)) / panel.figure.bbox.size
        shown = {"boundingRectWidth": 300, "boundingRectHeight": 400}
        return {"type": kind, "relativeX": 300 * place[0], "relativeY": 400 * (1 - place[1]), **shown}

    panel.mouse(event("mousedown", 1, 5.2, 9.3))
    panel.mouse(event("mouseup", 1, 1.8, 2.9))
    assert chosen[0].tolist() == [[y, x] for y in range(2, 6) for x in range(3, 10)]
    panel.mouse(event("mousedown", 0, 5, 9))
    panel.mouse(event("mouseup", 0, 5, 9))
    assert chosen[1].tolist() == [[5, 9]]
    panel.mouse(event("mousedown", 0, 5, 9.4))
    panel.mouse(event("mouseup", 0, 5, 9.6))  # a hand is never quite still: no box of two voxels
    assert chosen.pop().tolist() == [[5, 9]]
    panel.mouse(event("mousedown", 0, 5, 9))
    panel.mouse({"type": "mouseleave"} | event("", 0, 5, 9) | {"type": "mouseleave"})
    panel.mouse(event("mouseup", 0, 5, 9))  # without a press
    panel.mouse(event("mousedown", 0, -4, 9))  # in the title
    panel.mouse(event("mouseup", 0, 5, 9))
    assert len(chosen) == 2


def test_a_picture_changes_when_it_is_drawn_again():
    panel = SlicePanel(["a"], SHAPE, (1.0, 1.0, 1.0))
    before = panel.widget.value
    panel.draw(np.full(SHAPE, 200, np.uint8), [np.zeros(SHAPE)])
    assert panel.widget.value != before and panel.widget.value == png(panel.figure)


def test_outside_jupyterlab_a_line_stands_for_the_widget(monkeypatch, capsys):
    class Untouchable:
        @property
        def widget(self):
            raise AssertionError("no widget is made where nobody can see it")

    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not in_lab()
    show(Untouchable())
    assert "the picture below stands for the widget" in capsys.readouterr().out
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    assert in_lab()
    with pytest.raises(AssertionError, match="nobody can see"):
        show(Untouchable())


def test_the_mean_of_nothing_is_said():
    assert mean(np.array([1.0, 2.0])) == "1.50" and mean(np.array([])) == "none"
