"""Notebook 08 as somebody uses it: what is chosen in one view lights up in the others, voxel by voxel."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lab import Lab, Notebook, wait_for
from matplotlib.colors import to_rgb
from matplotlib.path import Path as Polygon

from mupkg.report.figures import CHOSEN

ROOT = Path(__file__).parents[2]
# code cells, the injected parameters counted
WORKBENCH, CASE, EMBEDDINGS, DISTANCE, NEIGHBOURS, SAMPLERS, FILM, COHORT = 3, 5, 8, 11, 12, 13, 17, 18
RUNS = ("UNet", "MetricUNet-HCP")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def notebook(lab: Lab, pictures: Path):
    """The notebook with the shipped pair, run in JupyterLab."""
    lab.outside.clear()
    with lab.open(ROOT / "notebooks/08_explore.ipynb", {"pictures_folder": str(pictures)}) as notebook:
        notebook.run_all()
        yield notebook


def picture(notebook: Notebook, cell: int, number: int = 0):
    """A picture of a cell's view: the slice of the first run in most of them."""
    return notebook.cell(cell).locator("img").nth(number)


def scatter(notebook: Notebook, number: int, cell: int = EMBEDDINGS):
    """A scatter's points; further canvases lie over them, for texts and for what a tooltip would show."""
    return notebook.cell(cell).locator(".square-scatter").nth(number).locator("canvas").first


def in_browser(notebook: Notebook, what: str, cell: int = EMBEDDINGS) -> list:
    """A property of regl-scatterplot's, of each scatter of a cell, as the page has it by now."""
    plots = notebook.cell(cell).locator(".square-scatter")
    return plots.evaluate_all(
        "(plots, what) => plots.map(plot => [...plot.querySelectorAll('*')].find(e => e.api).api.get(what))", what
    )


def wait_for_scatters(notebook: Notebook, cell: int = EMBEDDINGS) -> None:
    """Until the points sent last are drawn: the browser ignores a lasso before, and drops what is sent."""
    wait_for(lambda: not any(in_browser(notebook, "isDrawing", cell)), "the points are drawn")


def places(notebook: Notebook, voxels) -> np.ndarray:
    """Where the middles of voxels (row, column) lie in a slice, as fractions (x, y) of its picture."""
    height, width = notebook.ask("case.region.shape[1:]")
    return (np.array(voxels, float)[:, ::-1] + 0.5) / (width, height)


def lit(notebook: Notebook, cell: int, number: int) -> set[tuple[int, int]]:
    """The voxels that are lit on the screen, read off the pixels around the middle of every voxel."""
    voxels = list(itertools.product(*(range(size) for size in notebook.ask("case.region.shape[1:]"))))
    pixels = notebook.pixels(picture(notebook, cell, number))
    at = (places(notebook, voxels) * (pixels.shape[1], pixels.shape[0])).astype(int)
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]  # a contour may run through the very middle
    colours = np.stack([pixels[at[:, 1] + dy, at[:, 0] + dx] for dy, dx in around]).astype(int)
    alike = (np.abs(colours - np.round(255 * np.array(to_rgb(CHOSEN)))) < 60).all(axis=2).any(axis=0)
    return {voxel for voxel, is_lit in zip(voxels, alike, strict=True) if is_lit}


def wait_for_selected(notebook: Notebook, rows: list[int]) -> None:
    """Until the kernel and both scatters, as they are in the page, have these rows chosen."""
    notebook.wait_until(f"explorer.rows.tolist() == {sorted(rows)}")
    expected = [sorted(rows)] * 2
    wait_for(lambda: [sorted(s) for s in in_browser(notebook, "selectedPoints")] == expected, "they are chosen")


def assert_lit(notebook: Notebook, rows: list[int], z: int) -> None:
    """The rows are chosen in the kernel and in both scatters, and exactly their voxels of this slice are lit."""
    wait_for_selected(notebook, rows)
    table = notebook.ask("explorer.table[['z', 'y', 'x']].to_numpy()")
    expected = {tuple(table[row][1:]) for row in rows if table[row][0] == z}
    notebook.wait_until(f"len(explorer.view.lit) == {len(expected)}")
    for number in range(2):
        assert lit(notebook, EMBEDDINGS, number) == expected


def test_all_of_it_runs_offline_and_without_an_error(lab: Lab, notebook: Notebook):
    assert lab.outside == []


def test_nothing_is_shown_twice(notebook: Notebook, pictures: Path):
    """Where widgets are alive no picture of them is drawn beside them, or written."""
    kinds = notebook.page.evaluate(
        "() => jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code')"
        ".map(cell => cell.model.outputs.toJSON().flatMap(output => Object.keys(output.data || {})))"
    )
    for cell in (WORKBENCH, CASE, EMBEDDINGS, DISTANCE, NEIGHBOURS, SAMPLERS, FILM, COHORT):
        assert "application/vnd.jupyter.widget-view+json" in kinds[cell] and "image/png" not in kinds[cell]
    assert [path.name for path in pictures.glob("*.png")] == ["explore_active.png"]


@pytest.mark.parametrize("cell", [WORKBENCH, CASE, EMBEDDINGS, DISTANCE, NEIGHBOURS, SAMPLERS, FILM, COHORT])
def test_every_picture_is_to_be_seen(notebook: Notebook, cell: int):
    """Regression: a box that takes no height of its own had hidden the slices of all views but two."""
    shown = notebook.cell(cell)
    points = [plot.locator("canvas").first for plot in shown.locator(".square-scatter").all()]
    pictures = shown.locator("img:visible").all() + points
    assert pictures
    for element in pictures:
        notebook.bring(element)


def test_a_click_in_the_workbench_chooses_a_voxel_and_measures_from_it(notebook: Notebook):
    z, voxel = notebook.ask("bench.shown.slice.value"), (20, 25)
    before = notebook.pixels(picture(notebook, WORKBENCH, 1))
    notebook.click_at(picture(notebook, WORKBENCH, 1), *places(notebook, [voxel])[0])  # in a distance map
    notebook.wait_for_change(picture(notebook, WORKBENCH, 1), before)
    assert notebook.ask("bench.distance.voxel") == [z, *voxel]
    (row,) = notebook.ask("bench.rows")
    table = np.array(notebook.ask("bench.table[['z', 'y', 'x']].to_numpy()"))
    steps = np.where(table[:, 0] == z, np.hypot(*(table[:, 1:] - voxel).T), np.inf)
    assert steps[row] == steps.min()
    assert lit(notebook, WORKBENCH, 1) == {voxel}
    assert lit(notebook, WORKBENCH, 0) == {tuple(table[row, 1:])}


def test_the_mouse_is_told_of_the_voxel_under_it(notebook: Notebook):
    shown = picture(notebook, WORKBENCH)
    shown.scroll_into_view_if_needed()
    notebook.page.mouse.move(*notebook._at(shown, places(notebook, [(30, 12)])[0]))
    z = notebook.ask("bench.shown.slice.value")
    words = notebook.cell(WORKBENCH).get_by_text(f"voxel (z, y, x) {z}, 30, 12")
    words.wait_for()
    lines = words.inner_text().splitlines()
    assert len(lines) == 5 and lines[1].endswith(" mm") and lines[2].endswith(" mm")
    assert lines[3].startswith("probability: A ") and lines[4].startswith("distance: A ")
    assert words.bounding_box()["x"] > max(box["x"] + box["width"] for box in boxes(notebook, "img", "canvas"))


def boxes(notebook: Notebook, *kinds: str) -> list[dict]:
    cell = notebook.cell(WORKBENCH)
    return [box for kind in kinds for element in cell.locator(kind).all() if (box := element.bounding_box())]


def points_on_screen(notebook: Notebook, explorer: str, number: int, canvas) -> np.ndarray:
    """Where a scatter's points lie on the page: the square of the data fills the square canvas."""
    box, data = canvas.bounding_box(), notebook.ask(f"{explorer}._data()[{number}][['x', 'y']].to_numpy()")
    middle = np.array([box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
    return middle + min(box["width"], box["height"]) / 2 / 1.05 * np.array(data) * (1, -1)


def lonely(points: np.ndarray, wanted: np.ndarray) -> int:
    """The row among those wanted whose point lies farthest from all others."""
    apart = [np.sort(np.hypot(*(points - points[row]).T))[1] if wanted[row] else -1 for row in range(len(points))]
    return int(np.argmax(apart))


def test_a_click_on_a_point_moves_all_views_to_its_slice_and_measures_from_it(notebook: Notebook):
    z, index = notebook.ask("bench.shown.slice.value"), np.array(notebook.ask("bench.index"))
    before, canvas = notebook.pixels(picture(notebook, WORKBENCH)), scatter(notebook, 0, WORKBENCH)
    notebook.bring(canvas)
    points = points_on_screen(notebook, "bench", 0, canvas)
    row = lonely(points, index[:, 0] != z)
    notebook.page.mouse.move(*points[row])
    voxel = ", ".join(map(str, index[row]))
    notebook.cell(WORKBENCH).get_by_text(f"voxel (z, y, x) {voxel}").wait_for()
    notebook.page.mouse.click(*points[row])
    notebook.wait_until(f"bench.rows.tolist() == [{row}]")
    notebook.wait_until(f"bench.distance.voxel == {tuple(index[row].tolist())}")
    assert notebook.ask("bench.shown.slice.value") == index[row, 0]
    notebook.wait_for_change(picture(notebook, WORKBENCH), before)
    assert lit(notebook, WORKBENCH, 0) == {tuple(index[row, 1:])} == lit(notebook, WORKBENCH, 1)


def test_chosen_points_have_the_colour_of_the_lit_voxels(notebook: Notebook):
    canvas = scatter(notebook, 0, WORKBENCH)
    chosen = np.round(255 * np.array(to_rgb(CHOSEN)))

    def violet() -> int:
        return int((np.abs(notebook.pixels(canvas) - chosen).max(axis=2) < 40).sum())

    notebook.press("clear", within=notebook.cell(WORKBENCH))
    notebook.wait_until("len(bench.rows) == 0")
    wait_for(lambda: violet() == 0, "nothing is violet")
    notebook.drag(canvas, (0.3, 0.05), (0.9, 0.05), (0.9, 0.9), (0.3, 0.9))
    wait_for(lambda: violet() > 100, "chosen points are violet")


def test_one_slice_slider_moves_all_views(notebook: Notebook):
    cells = (WORKBENCH, CASE, EMBEDDINGS, DISTANCE)
    before = [notebook.pixels(picture(notebook, cell)) for cell in cells]
    z = notebook.ask("case.slice.value") - 1
    notebook.slider("slice", z, within=notebook.cell(DISTANCE))
    for cell, pixels in zip(cells, before, strict=True):
        notebook.wait_for_change(picture(notebook, cell), pixels)
    assert notebook.ask("[v.slice.value for v in (view, explorer, distance, work)]") == [z] * 4


def test_the_threshold_cuts_the_contour_anew_and_the_scores_follow(notebook: Notebook):
    shown = picture(notebook, CASE)
    before = notebook.pixels(shown)
    notebook.slider("threshold", 0.3, within=notebook.cell(CASE))
    notebook.wait_for_change(shown, before)
    by_hand = (
        "[2 * ((h > 0.3) & case.truth).sum() / ((h > 0.3).sum() + case.truth.sum()) for h in case.heat.values()]"
    )
    assert notebook.ask("view.threshold.value") == pytest.approx(0.3)
    assert notebook.ask("view.scores['DSC'].to_numpy()") == pytest.approx(notebook.ask(by_hand))


def test_worst_slice_is_the_one_with_most_wrong_voxels(notebook: Notebook):
    notebook.press("worst slice", within=notebook.cell(CASE))
    wrong = "sum(((h > view.threshold.value) != case.truth).sum(axis=(1, 2)) for h in case.heat.values())"
    notebook.wait_until(f"view.slice.value == np.argmax({wrong})".replace("np.", "__import__('numpy')."))


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
    polygon = np.array([(0.35, 0.05), (0.75, 0.05), (0.8, 0.95), (0.35, 0.95)])
    notebook.press("clear", within=notebook.cell(EMBEDDINGS))
    notebook.wait_until("len(explorer.rows) == 0")
    notebook.drag(canvas, *polygon)
    notebook.wait_until("len(explorer.rows) and explorer.scatters[0].widget.selection is not None")
    # independently: the square of the data, as high as the canvas, lies in the middle of it
    box, data = canvas.bounding_box(), np.array(notebook.ask("explorer.points['UNet']"))
    low, high = data.min(axis=0), data.max(axis=0)
    place = ((data - low) / (high - low) - 0.5) / 1.05 * (1, -1)
    screen = box["height"] * place + (box["width"] / 2, box["height"] / 2)
    drawn = Polygon(np.array([*polygon, polygon[0]]) * (box["width"], box["height"]))
    inside = [set(np.flatnonzero(drawn.contains_points(screen, radius=r)).tolist()) for r in (-3, 3)]
    surely, perhaps = sorted(inside, key=len)
    rows = notebook.ask("explorer.rows")
    assert surely <= set(rows) <= perhaps and len(surely) > 50
    assert_lit(notebook, rows, notebook.ask("explorer.slice.value"))


def test_another_slice_lights_up_its_own_share(notebook: Notebook):
    z, shown = notebook.ask("case.widest"), picture(notebook, EMBEDDINGS)
    before = notebook.pixels(shown)
    notebook.slider("slice", z, within=notebook.cell(EMBEDDINGS))
    notebook.wait_for_change(shown, before)
    assert_lit(notebook, notebook.ask("explorer.rows"), z)


def test_a_box_in_the_slice_chooses_exactly_its_voxels_in_both_scatters(notebook: Notebook):
    z, plots = notebook.ask("explorer.slice.value"), [scatter(notebook, number) for number in range(2)]
    before = [notebook.pixels(plot) for plot in plots]
    (top, left), (bottom, right) = (15, 14), (30, 33)
    notebook.drag(picture(notebook, EMBEDDINGS, 1), *places(notebook, [(top, left), (bottom, right)]))
    table = notebook.ask("explorer.table[['z', 'y', 'x']].to_numpy()")
    rows = [n for n, (k, y, x) in enumerate(table) if k == z and top <= y <= bottom and left <= x <= right]
    assert len(rows) > 10
    notebook.wait_until(f"len(explorer.rows) == {len(rows)}")
    assert_lit(notebook, rows, z)
    for plot, pixels in zip(plots, before, strict=True):
        notebook.wait_for_change(plot, pixels)


def test_the_chosen_voxels_are_saved(notebook: Notebook, pictures: Path):
    notebook.press("save voxels", within=notebook.cell(EMBEDDINGS))
    notebook.cell(EMBEDDINGS).get_by_text("voxels written to").wait_for()
    z, count = notebook.ask("explorer.slice.value"), notebook.ask("len(explorer.rows)")
    name = f"voxels_{notebook.ask('case.case_id')}_box-slice-{z}-{count}_UNet_MetricUNet-HCP.parquet"
    saved = pd.read_parquet(pictures / name).query("run == 'UNet'")[["z", "y", "x"]].to_numpy().tolist()
    assert saved == notebook.ask("explorer.table.loc[explorer.rows, ['z', 'y', 'x']].to_numpy()")


def test_a_click_chooses_the_nearest_drawn_voxel(notebook: Notebook):
    z, voxel = notebook.ask("explorer.slice.value"), (20, 25)
    before = notebook.pixels(scatter(notebook, 0))
    notebook.click_at(picture(notebook, EMBEDDINGS), *places(notebook, [voxel])[0])
    notebook.wait_until("len(explorer.rows) == 1")
    (row,) = notebook.ask("explorer.rows")
    table = np.array(notebook.ask("explorer.table[['z', 'y', 'x']].to_numpy()"))
    steps = np.hypot(*(table[:, 1:] - voxel).T)  # voxels are square here
    assert table[row, 0] == z and steps[row] == steps[table[:, 0] == z].min()
    assert_lit(notebook, [row], z)
    notebook.wait_for_change(scatter(notebook, 0), before)


def test_clear_puts_everything_out(notebook: Notebook):
    notebook.press("clear", within=notebook.cell(EMBEDDINGS))
    notebook.wait_until("len(explorer.rows) == 0")
    assert_lit(notebook, [], notebook.ask("explorer.slice.value"))


def test_another_colour_brings_its_legend_and_keeps_the_choice(notebook: Notebook):
    notebook.do("explorer.choose([3, 5, 8])")
    cell, before = notebook.cell(EMBEDDINGS), notebook.pixels(scatter(notebook, 1))
    assert cell.get_by_text("far background").count() == 1
    wait_for_scatters(notebook)
    cell.locator("select").first.select_option("error")
    notebook.wait_for_change(scatter(notebook, 1), before)
    assert notebook.ask("explorer.colour.value") == "error"
    cell.get_by_text("error 0").wait_for()
    assert cell.get_by_text("far background").count() == 0
    wait_for_selected(notebook, [3, 5, 8])


def test_another_projection_moves_the_points_and_a_lasso_still_finds_them(notebook: Notebook):
    plot, row = scatter(notebook, 0), notebook.cell(EMBEDDINGS)
    row.locator("select").first.select_option("kind")
    notebook.wait_until("explorer.colour.value == 'kind'")
    wait_for_scatters(notebook)
    before = notebook.pixels(plot)
    row.locator("select").nth(1).select_option("t-SNE")
    notebook.wait_until("explorer.projection.value == 't-SNE'")
    notebook.wait_for_change(plot, before)
    row.get_by_text("t-SNE: gaps, sizes mean nothing").first.wait_for()
    wait_for_scatters(notebook)
    notebook.drag(plot, (0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98))  # around everything
    notebook.wait_until("len(explorer.rows) > 0.9 * len(explorer.table)")
    notebook.press("clear", within=row)
    notebook.wait_until("len(explorer.rows) == 0")


def test_a_click_in_the_distance_map_measures_from_there(notebook: Notebook):
    canvas, z = picture(notebook, DISTANCE, 1), notebook.ask("distance.slice.value")
    before = notebook.pixels(canvas)
    notebook.click_at(canvas, *places(notebook, [(8, 40)])[0])
    notebook.wait_until(f"distance.voxel == ({z}, 8, 40)")
    notebook.wait_for_change(canvas, before)
    assert lit(notebook, DISTANCE, 0) == {(8, 40)}
    found = [np.array(d) for d in notebook.ask("list(distance.distances().values())")]
    assert all(d[8, 40] == 0 and (d >= 0).all() for d in found)


def test_the_samplers_draw_anew_when_k_moves(notebook: Notebook):
    shown = picture(notebook, SAMPLERS)
    before = notebook.pixels(shown)
    notebook.slider("anchors k", 7, within=notebook.cell(SAMPLERS))
    notebook.wait_for_change(shown, before)
    counts = notebook.ask("work.tuples().groupby('sampler').size().to_dict()")
    assert counts["R"] == counts["C"] == 7 and counts.get("H", 7) == 7


def test_near_negatives_are_drawn_when_asked_for(notebook: Notebook):
    shown = picture(notebook, SAMPLERS)
    before, share = notebook.pixels(shown), "work.tuples(200)['active'].mean()"
    anywhere = notebook.ask(share)
    notebook.cell(SAMPLERS).locator("input[type=checkbox]").click()
    notebook.wait_for_change(shown, before)
    assert notebook.ask("work.near.value") is True and notebook.ask(share) > anywhere


def test_a_step_of_the_training_shows_the_films_patch(notebook: Notebook):
    shown = picture(notebook, SAMPLERS)
    before = notebook.pixels(shown)
    notebook.do("work.step.value = '0'")
    notebook.wait_for_change(shown, before)
    assert notebook.ask("work.top.disabled") is True


def test_the_film_plays(notebook: Notebook):
    shown = picture(notebook, FILM)
    before = notebook.pixels(shown)
    notebook.do("film.frame.value = film.steps[0]")
    notebook.wait_for_change(shown, before)
    notebook.cell(FILM).locator(".jupyter-widget-play button, .widget-play button").first.click()
    notebook.wait_until("film.frame.value != film.steps[0]")


def test_another_case_comes_into_the_workbench(notebook: Notebook):
    shown = picture(notebook, WORKBENCH)
    before, other = notebook.pixels(shown), notebook.ask("bench.case.options[1][0]")
    notebook.cell(WORKBENCH).locator("select").first.select_option(other)
    notebook.wait_until("bench.shown.case_id == bench.case.options[1][1]")
    notebook.settle()
    assert not np.array_equal(notebook.pixels(shown), before)


def test_another_run_comes_into_the_workbench_and_its_settings_stay(notebook: Notebook):
    cell = notebook.cell(WORKBENCH)
    notebook.slider("threshold", 0.3, within=cell)
    notebook.wait_until("abs(bench.view.threshold.value - 0.3) < 1e-6")
    cell.locator("select").nth(3).select_option("error")
    notebook.wait_until("bench.colour.value == 'error'")
    before = notebook.pixels(picture(notebook, WORKBENCH))
    cell.locator("select").nth(1).select_option("MetricUNet-HCP")
    notebook.wait_until("list(bench.shown.heat) == ['MetricUNet-HCP', 'UNet']")
    notebook.wait_for_change(picture(notebook, WORKBENCH), before)
    cell.get_by_text("A · MetricUNet-HCP").first.wait_for()
    assert notebook.ask("bench.view.threshold.value") == pytest.approx(0.3)
    assert notebook.ask("bench.colour.value") == "error"


def test_neighbours_are_shown_in_the_workbench_and_follow_a_click_on_a_point(notebook: Notebook):
    cell = notebook.cell(WORKBENCH)
    cell.locator("select").last.select_option("neighbours")
    notebook.wait_until("bench.right.value == 'neighbours'")
    patches = cell.locator("img[src^='data:image/png']:visible")
    wait_for(lambda: patches.count() == 21, "the chosen voxel and ten neighbours a run")
    first = patches.first.get_attribute("src")
    notebook.do("bench.scatters[0].widget.selection = __import__('numpy').array([3])")
    wait_for(lambda: patches.first.get_attribute("src") != first, "the neighbours follow")
    cell.locator("select").last.select_option("distances")
    wait_for(lambda: patches.count() == 0, "the slices are back")


def test_the_cohort_is_chosen_from_by_a_lasso_and_by_lists(notebook: Notebook):
    cell = notebook.cell(COHORT)
    notebook.do("cohort.error.value = 0, 1")
    notebook.wait_until("len(cohort.rows) == 0")
    notebook.drag(scatter(notebook, 0, COHORT), (0.3, 0.05), (0.9, 0.05), (0.9, 0.9), (0.3, 0.9))
    notebook.wait_until("len(cohort.rows) > 50")
    patches = cell.locator("img[src^='data:image/png']")
    wait_for(lambda: patches.count() == 24, "patches of the chosen voxels")
    cell.locator("select").nth(5).select_option("contour")
    notebook.wait_until("set(cohort.table.iloc[cohort.rows]['kind']) == {'contour'}")
    assert notebook.ask("sorted(cohort.scatters[1].widget.selection) == sorted(cohort.rows)")


def test_itkwidgets_without_internet_is_one_line_and_nothing_hangs(notebook: Notebook):
    reason = notebook.ask("__import__('mupkg.explore.volumes').explore.volumes.why_no_itkwidgets()")
    assert "is not installed" in reason or "does not answer" in reason
    assert notebook.ask("'itkwidgets' in __import__('sys').modules") is False


def test_nothing_went_wrong_on_the_way(notebook: Notebook, lab: Lab):
    notebook.check()
    assert lab.outside == []
