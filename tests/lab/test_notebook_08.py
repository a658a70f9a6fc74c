"""Notebook 08 as somebody uses it: what is chosen in one view lights up in the others, voxel by voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lab import Lab, Notebook
from matplotlib.path import Path as Polygon

ROOT = Path(__file__).parents[2]
# code cells, the injected parameters counted
CASE, EMBEDDINGS, DISTANCE, SAMPLERS, FILM = 4, 7, 10, 12, 15
RUNS = ("UNet", "MetricUNet-HCP")


@pytest.fixture(scope="module")
def notebook(lab: Lab, tmp_path_factory: pytest.TempPathFactory):
    """The notebook with the shipped pair, run in JupyterLab."""
    pictures = str(tmp_path_factory.mktemp("pictures"))
    lab.outside.clear()
    with lab.open(ROOT / "notebooks/08_explore.ipynb", {"pictures_folder": pictures}) as notebook:
        notebook.run_all()
        yield notebook


def picture(notebook: Notebook, cell: int):
    """The picture of a cell's view: the slice in most of them."""
    return notebook.cell(cell).locator("img").first


def scatter(notebook: Notebook, number: int):
    return notebook.cell(EMBEDDINGS).locator("canvas").nth(number)


def places(notebook: Notebook, view: str, voxels, axes: int = 0) -> np.ndarray:
    """Where the middles of voxels (row, column) lie in a view's slice, as fractions of the picture."""
    code = f"{view}.panel.axes[{axes}].transData.transform({[[float(x), float(y)] for y, x in voxels]})"
    size = notebook.ask(f"{view}.panel.figure.bbox.size")
    place = np.array(notebook.ask(code)).reshape(-1, 2) / size
    return np.column_stack([place[:, 0], 1 - place[:, 1]])


def seen_lit(notebook: Notebook, cell: int, view: str, axes: int) -> set[tuple[int, int]]:
    """The voxels that are cyan on the screen, read off the pixels in the middle of every voxel."""
    height, width = notebook.ask(f"{view}.panel.shape")
    voxels = [(y, x) for y in range(height) for x in range(width)]
    pixels = notebook.pixels(picture(notebook, cell))
    at = (places(notebook, view, voxels, axes) * (pixels.shape[1], pixels.shape[0])).astype(int)
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]  # a contour may run through the very middle
    colours = np.stack([pixels[at[:, 1] + dy, at[:, 0] + dx] for dy, dx in around]).astype(int)
    cyan = (colours[..., 0] < 60) & (colours[..., 1] > 200) & (colours[..., 2] > 200)
    cyan = cyan.sum(axis=0) >= 3
    return {voxel for voxel, is_lit in zip(voxels, cyan, strict=True) if is_lit}


def lit_by_hand(notebook: Notebook, rows: list[int], z: int) -> set[tuple[int, int]]:
    """Row and column of the table's voxels that were chosen and lie in this slice."""
    table = notebook.ask("explorer.table[['z', 'y', 'x']].to_numpy()")
    return {tuple(table[row][1:]) for row in rows if table[row][0] == z}


def selected(notebook: Notebook) -> list[list[int]]:
    """The points that each scatter shows as chosen."""
    return [sorted(notebook.ask(f"explorer.scatters[{name!r}].widget.selection")) for name in RUNS]


def assert_lit(notebook: Notebook, rows: list[int], z: int) -> None:
    """The rows are chosen in the kernel and in both scatters, and exactly their voxels of this slice are cyan."""
    assert sorted(notebook.ask("explorer.rows")) == sorted(rows)
    assert selected(notebook) == [sorted(rows)] * 2
    expected = lit_by_hand(notebook, rows, z)
    for axes in range(2):
        notebook.wait_until(f"explorer.panel.lit.sum() == {len(expected)}")
        assert seen_lit(notebook, EMBEDDINGS, "explorer", axes) == expected


def set_slice(notebook: Notebook, cell: int, view: str, z: int) -> None:
    canvas = picture(notebook, cell)
    before = notebook.pixels(canvas)
    notebook.slider("slice", z, within=notebook.cell(cell))
    notebook.wait_for_change(canvas, before)
    assert notebook.ask(f"{view}.slice.value") == z


def test_all_of_it_runs_offline_and_without_an_error(notebook: Notebook, lab: Lab):
    assert lab.outside == []
    assert "not in JupyterLab" not in notebook.outputs_text()


def test_the_threshold_cuts_the_contour_anew_and_the_scores_follow(notebook: Notebook):
    shown = picture(notebook, CASE)
    before = notebook.pixels(shown)
    notebook.slider("threshold", 0.3, within=notebook.cell(CASE))
    notebook.wait_for_change(shown, before)
    by_hand = (
        "[2 * ((h > 0.3) & seen.truth).sum() / ((h > 0.3).sum() + seen.truth.sum()) for h in seen.heat.values()]"
    )
    assert notebook.ask("view.threshold.value") == pytest.approx(0.3)
    assert notebook.ask("view.scores['DSC'].to_numpy()") == pytest.approx(notebook.ask(by_hand))


def test_worst_slice_is_the_one_with_most_wrong_voxels(notebook: Notebook):
    shown = picture(notebook, CASE)
    before = notebook.pixels(shown)
    notebook.press("worst slice")
    notebook.wait_for_change(shown, before)
    wrong = "sum(((h > view.threshold.value) != seen.truth).sum(axis=(1, 2)) for h in seen.heat.values())"
    assert notebook.ask("view.slice.value") == np.argmax(notebook.ask(wrong))


def test_a_click_in_the_three_planes_moves_the_slice_and_the_other_run(notebook: Notebook):
    views = [notebook.cell(CASE).locator("canvas").nth(number) for number in range(2)]
    before = [notebook.pixels(view) for view in views]
    assert all(len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50 for pixels in before)
    was = notebook.ask("view.slice.value")
    notebook.click_at(views[0], 0.5, 0.35)  # in the coronal plane, the second of three
    notebook.wait_until(f"view.slice.value != {was}")
    for view, pixels in zip(views, before, strict=True):
        notebook.wait_for_change(view, pixels)


def test_a_lasso_lights_exactly_its_voxels_up_in_the_slice(notebook: Notebook):
    canvas = scatter(notebook, 0)
    polygon = np.array([(0.35, 0.35), (0.75, 0.35), (0.8, 0.95), (0.35, 0.95)])
    notebook.drag(canvas, *polygon)
    notebook.wait_until("len(explorer.rows) and explorer.scatters['UNet'].widget.selection is not None")
    # independently: the square of the data, as high as the canvas, lies in the middle of it
    box, data = canvas.bounding_box(), np.array(notebook.ask("explorer.points['UNet']"))
    low, high = data.min(axis=0), data.max(axis=0)
    screen = box["height"] * ((data - low) / (high - low) - 0.5) / 1.05 * (1, -1) + (
        box["width"] / 2,
        box["height"] / 2,
    )
    drawn = Polygon(np.array([*polygon, polygon[0]]) * (box["width"], box["height"]))
    inside = [set(np.flatnonzero(drawn.contains_points(screen, radius=r)).tolist()) for r in (-3, 3)]
    surely, perhaps = sorted(inside, key=len)
    rows = notebook.ask("explorer.rows")
    assert surely <= set(rows) <= perhaps and len(surely) > 50
    assert_lit(notebook, rows, notebook.ask("explorer.slice.value"))


def test_another_slice_lights_up_its_own_share(notebook: Notebook):
    z = notebook.ask("explorer.slice.value") + 2
    set_slice(notebook, EMBEDDINGS, "explorer", z)
    assert_lit(notebook, notebook.ask("explorer.rows"), z)


def test_a_box_in_the_slice_chooses_exactly_its_voxels_in_both_scatters(notebook: Notebook):
    z, plots = notebook.ask("explorer.slice.value"), [scatter(notebook, number) for number in range(2)]
    before = [notebook.pixels(plot) for plot in plots]
    (top, left), (bottom, right) = (15, 14), (30, 33)
    corners = places(notebook, "explorer", [(top, left), (bottom, right)], axes=1)
    notebook.drag(picture(notebook, EMBEDDINGS), *corners)
    table = notebook.ask("explorer.table[['z', 'y', 'x']].to_numpy()")
    rows = [n for n, (k, y, x) in enumerate(table) if k == z and top <= y <= bottom and left <= x <= right]
    assert len(rows) > 10
    notebook.wait_until(f"len(explorer.rows) == {len(rows)}")
    assert_lit(notebook, rows, z)
    for plot, pixels in zip(plots, before, strict=True):
        notebook.wait_for_change(plot, pixels)


def test_a_click_chooses_the_nearest_drawn_voxel(notebook: Notebook):
    z, voxel = notebook.ask("explorer.slice.value"), (20, 25)
    before = notebook.pixels(scatter(notebook, 0))
    notebook.click_at(picture(notebook, EMBEDDINGS), *places(notebook, "explorer", [voxel])[0])
    notebook.wait_until("len(explorer.rows) == 1")
    (row,) = notebook.ask("explorer.rows")
    table = np.array(notebook.ask("explorer.table[['z', 'y', 'x']].to_numpy()"))
    steps = np.hypot(*(table[:, 1:] - voxel).T)  # voxels are square here
    assert table[row, 0] == z and steps[row] == steps[table[:, 0] == z].min()
    assert_lit(notebook, [row], z)
    notebook.wait_for_change(scatter(notebook, 0), before)


def test_clear_puts_everything_out(notebook: Notebook):
    notebook.press("clear")
    notebook.wait_until("len(explorer.rows) == 0")
    assert_lit(notebook, [], notebook.ask("explorer.slice.value"))


def test_another_colour_and_another_run_keep_the_choice(notebook: Notebook):
    notebook.do("explorer.choose([3, 5, 8])")
    before = notebook.pixels(scatter(notebook, 1))
    notebook.cell(EMBEDDINGS).locator("select").first.select_option("error")
    notebook.wait_for_change(scatter(notebook, 1), before)
    assert notebook.ask("explorer.colour.value") == "error"
    assert selected(notebook) == [[3, 5, 8]] * 2


def test_another_projection_moves_the_points_and_a_lasso_still_finds_them(notebook: Notebook):
    plot, row = scatter(notebook, 0), notebook.cell(EMBEDDINGS)
    row.locator("select").first.select_option("kind")
    before = notebook.pixels(plot)
    row.locator("select").nth(1).select_option("t-SNE")
    notebook.wait_until("explorer.projection.value == 't-SNE'")
    notebook.wait_for_change(plot, before, timeout=60)
    notebook.drag(plot, (0.2, 0.02), (0.8, 0.02), (0.8, 0.98), (0.2, 0.98))  # around everything
    notebook.wait_until("len(explorer.rows) > 0.9 * len(explorer.table)")
    notebook.press("clear")
    notebook.wait_until("len(explorer.rows) == 0")


def test_a_click_in_the_distance_map_measures_from_there(notebook: Notebook):
    canvas = picture(notebook, DISTANCE)
    before = notebook.pixels(canvas)
    notebook.click_at(canvas, *places(notebook, "distance", [(8, 40)], axes=1)[0])
    after = notebook.wait_for_change(canvas, before)
    assert notebook.ask("distance.voxel") == [8, 40]
    assert seen_lit(notebook, DISTANCE, "distance", 0) == {(8, 40)}
    found = [np.array(d) for d in notebook.ask("list(distance.distances().values())")]
    assert all(d[8, 40] == 0 and (d >= 0).all() for d in found)
    # dark is near: the darkest and the lightest voxel of the map are so on the screen
    y, x = np.unravel_index(
        np.where(
            np.arange(found[0].size).reshape(found[0].shape) == 8 * found[0].shape[1] + 40, 9, found[0]
        ).argmin(),
        found[0].shape,
    )
    far = np.unravel_index(found[0].argmax(), found[0].shape)
    at = (places(notebook, "distance", [(y, x), far]) * (after.shape[1], after.shape[0])).astype(int)
    near_grey, far_grey = after[at[:, 1], at[:, 0]].sum(axis=1)
    assert near_grey + 100 < far_grey


def test_the_samplers_draw_anew_when_k_moves(notebook: Notebook):
    shown = picture(notebook, SAMPLERS)
    before = notebook.pixels(shown)
    notebook.slider("anchors k", 7, within=notebook.cell(SAMPLERS))
    notebook.wait_for_change(shown, before)
    counts = notebook.ask("work.tuples().groupby('sampler').size().to_dict()")
    assert counts["R"] == counts["C"] == 7 and counts.get("H", 7) == 7


def test_a_step_of_the_training_shows_the_films_patch(notebook: Notebook):
    shown = picture(notebook, SAMPLERS)
    before = notebook.pixels(shown)
    notebook.do("work.step.value = '0'")
    notebook.wait_for_change(shown, before)
    assert notebook.ask("work.slice.disabled") is True


def test_the_film_plays(notebook: Notebook):
    shown = picture(notebook, FILM)
    before = notebook.pixels(shown)
    notebook.do("film.frame.value = film.steps[0]")
    notebook.wait_for_change(shown, before)
    notebook.cell(FILM).locator(".jupyter-widget-play button, .widget-play button").first.click()
    notebook.wait_until("film.frame.value != film.steps[0]")


def test_itkwidgets_without_internet_is_one_line_and_nothing_hangs(notebook: Notebook):
    reason = notebook.ask("viewers.why_no_itkwidgets()")
    assert "is not installed" in reason or "does not answer" in reason
    assert notebook.ask("'itkwidgets' in __import__('sys').modules") is False
    assert notebook.ask("[type(part).__name__ for part in view.widget.children]")[1] == "Image"


def test_nothing_went_wrong_on_the_way(notebook: Notebook, lab: Lab):
    notebook.check()
    assert lab.outside == []
