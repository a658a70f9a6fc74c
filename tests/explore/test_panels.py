"""A slice that shows what it is told, pixel by pixel, and boxes however they are drawn."""

import io
from dataclasses import replace

import numpy as np
import pytest
from a_case import SPACING, TRUTH, Places
from IPython.display import Image as Shown
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from mupkg import in_lab
from mupkg.explore import panels
from mupkg.explore.panels import CaseViewer, DistanceMap, SlicePanel, show
from mupkg.explore.predictions import CasePredictions
from mupkg.explore.workbench import EmbeddingExplorer
from mupkg.report import figures
from mupkg.report.figures import CHOSEN, colour_bar, png

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
    y, x = np.nonzero(np.abs(picture - 255 * np.array(to_rgb(figures.TRUTH))).max(axis=2) < 3)
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


@pytest.mark.slow
def test_the_viewer_draws_anew_and_jumps(seen):
    view = CaseViewer(seen, "slices")
    assert view.slice.value in range(1, 5)
    first = png(view.figure)
    view.threshold.value = 0.3
    assert view.scores["DSC"].iloc[1] == pytest.approx(seen.scores(0.3)["DSC"].iloc[1])
    second = png(view.figure)
    assert first != second and "DSC 1.000" in view.titles[0]
    view.threshold.value = 0.5
    view.worst.click()
    assert view.slice.value == 3 and png(view.figure) != second
    assert view.widget
    before = view._images[0].value
    view.opacity.value = 0.9
    assert view._images[0].value != before


def test_one_slider_moves_all_views_of_a_case(seen):
    view, explorer, distance = CaseViewer(seen, "slices"), EmbeddingExplorer(seen, per_kind=10), DistanceMap(seen)
    views = view, explorer.view, distance
    assert view.slice is explorer.slice is distance.slice
    for panel in views:
        assert panel.pictures
    before = [panel._images[0].value for panel in views]
    explorer.slice.value = 3
    assert all(panel._images[0].value != was for panel, was in zip(views, before, strict=True))


def test_a_mask_with_islands_says_so_and_a_training_case_is_marked_beside_every_number(seen):
    heat = {name: heat.copy() for name, heat in seen.heat.items()}
    heat["UNet"][5, 22, 28] = 1.0
    heat["MetricUNet-H"][:] = 0.9 * TRUTH
    case = replace(seen, heat=heat, split="train")
    view, explorer, distance = CaseViewer(case, "slices"), EmbeddingExplorer(case, per_kind=5), DistanceMap(case)
    assert case.scores()["islands"].tolist() == [1, 0]
    assert "with 1 island" in view.titles[0] and "island" not in view.titles[1]
    titles = [*view.titles, *distance.titles, *(t.value for t in explorer.titles)]
    assert len(titles) == 6 and all("TRAINING case" in title for title in titles)
    assert "TRAINING case" in explorer.measured.value
    assert "TRAINING" not in "".join(CaseViewer(seen, "slices").titles)


def test_an_unknown_viewer_is_refused(seen):
    with pytest.raises(ValueError, match="niivue, slices or itkwidgets, not 'vtk'"):
        CaseViewer(seen, "vtk")


def test_the_distance_map_is_the_squared_distance_over_the_runs_own_scale(seen):
    view = DistanceMap(seen)
    view.slice.value = 2
    view.measure_from((2, 5, 7))
    rows, columns = np.indices(TRUTH.shape[1:])
    squared = (rows - 5) ** 2 + (columns - 7) ** 2
    for name, factor in (("UNet", 1), ("MetricUNet-H", 9)):
        np.testing.assert_allclose(view.distances()[name] * view.scale[name], factor * squared, rtol=1e-4)
    np.testing.assert_allclose(*view.distances().values(), rtol=1e-4)  # free of scale
    assert view.lit.tolist() == [[5, 7]]
    view.choose((9.0, 3.0), (9.0, 3.0))
    assert view.voxel == (2, 9, 3) and all(d[9, 3] == 0 for d in view.distances().values())
    # what is near glows: all at the voxel, nothing as far away as background usually is
    near, far = view.heats[0], view.distances()["UNet"] >= 1
    assert near[9, 3] == 1 and (near[far] == 0).all() and (near >= 0).all()
    assert view.describe(2, 9, 3).splitlines()[4] == "distance: A 0.00, B 0.00"


def test_distances_are_those_of_the_slice_shown(seen):
    class Slices(Places):
        def forward(self, images):
            output = super().forward(images)
            grey = images[:, 1:2, :1, :1]  # a corner of the middle slice
            return output._replace(embeddings=output.embeddings * grey)

    seen = CasePredictions("made up", seen.region, TRUTH, SPACING, {"UNet": Slices()}, {"UNet": seen.heat["UNet"]})
    view, at = DistanceMap(seen), np.array([5, 7])
    view.measure_from((2, 5, 7))
    chosen = seen.region[2, 0, 0] / 255 * at  # the voxel's embedding stays, whichever slice is shown
    for z in (2, 4, 2):
        view.slice.value = z
        expected = ((seen.region[z, 0, 0] / 255 * np.array([12, 7]) - chosen) ** 2).sum() / view.scale["UNet"]
        assert view.distances()["UNet"][12, 7] == pytest.approx(expected, rel=1e-3)
        assert view.lit.tolist() == ([[5, 7]] if z == 2 else [])


def test_edges_are_not_lost_by_a_box_that_leaves_the_picture(seen):
    explorer = EmbeddingExplorer(seen, per_kind=2000)
    explorer.slice.value = 2
    explorer.view.choose((-8, -5), (90, 90))
    assert len(explorer.rows) == (explorer.index[:, 0] == 2).sum()
    assert len(explorer.view.lit) == len(explorer.rows)
