"""What a hand does in a widget in the browser reaches the kernel, and what the kernel does is to be seen.

The widget libraries' own promises, on a small notebook: that our viewers can stand on them, offline.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from lab import Lab, Notebook
from matplotlib.path import Path as Polygon
from PIL import Image

SLIDER, SCATTER, VOLUME, PICTURE = range(4)
CELLS = (
    """
import io
import ipywidgets
import numpy as np
from PIL import Image

def grey_png(grey):
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60), grey, np.uint8)).save(file, "png")
    return file.getvalue()

slider = ipywidgets.IntSlider(10, 0, 255, description="grey")
image = ipywidgets.Image(value=grey_png(10), layout=ipywidgets.Layout(width="60px", height="40px"))
button = ipywidgets.Button(description="black")
slider.observe(lambda change: setattr(image, "value", grey_png(change["new"])), "value")
button.on_click(lambda _: setattr(slider, "value", 0))
ipywidgets.VBox([slider, button, image])
""",
    """
import jscatter
import pandas as pd

random = np.random.default_rng(0)
points = pd.DataFrame({"x": random.uniform(-2, 5, 1000), "y": random.uniform(10, 12, 1000)})
scatter = jscatter.Scatter(data=points, x="x", y="y", width=400, height=300, mouse_mode="lasso")
selections = []
scatter.widget.observe(lambda change: selections.append(change["new"]), "selection")
scatter.widget
""",
    """
import tempfile
from pathlib import Path
import SimpleITK as sitk
from ipyniivue import NiiVue, SliceType, Volume

z, y, x = np.mgrid[:32, :32, :32]
ct = sitk.GetImageFromArray((4 * x + 2 * y + z).astype(np.int16))
ct.SetSpacing((2.0, 2.0, 3.0))
ct.SetOrigin((-30.0, 10.0, 5.0))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "ct.nii.gz"
    sitk.WriteImage(ct, str(path))
    volume = Volume(data=path.read_bytes(), name=path.name, cal_min=0, cal_max=220)
view = NiiVue(height=400, slice_type=SliceType.AXIAL)
view.layout.width = "400px"
view.load_volumes([volume])
locations = []
view.on_location_change(locations.append)
view
""",
    """
from ipyevents import Event

plate = ipywidgets.Image(value=grey_png(90), layout=ipywidgets.Layout(width="300px", height="200px"))
events = []
mouse = Event(source=plate, watched_events=["mousedown", "mouseup"], prevent_default_action=True)
mouse.on_dom_event(events.append)
plate
""",
)


def notebook_of(path: Path, *cells: str) -> Path:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells]), path)
    return path


@pytest.fixture(scope="module")
def notebook(lab: Lab, tmp_path_factory: pytest.TempPathFactory):
    """The four widgets, run and shown."""
    with lab.open(notebook_of(tmp_path_factory.mktemp("notebook") / "widgets.ipynb", *CELLS)) as notebook:
        notebook.run_all()
        yield notebook


def test_a_slider_and_a_button_change_the_kernels_value_and_the_picture(notebook: Notebook):
    picture = notebook.cell(SLIDER).locator("img")
    before = notebook.pixels(picture)
    assert (before == 10).all()
    notebook.slider("grey", 200)
    after = notebook.wait_for_change(picture, before)
    assert notebook.ask("slider.value") == 200
    assert (after == 200).all()
    notebook.press("black")
    assert (notebook.wait_for_change(picture, after) == 0).all()
    assert notebook.ask("slider.value") == 0


def test_a_lasso_selects_the_points_inside_it(notebook: Notebook):
    canvas = notebook.cell(SCATTER).locator("canvas").first
    polygon = np.array([(0.3, 0.2), (0.6, 0.3), (0.7, 0.8), (0.5, 0.5), (0.3, 0.7)])
    notebook.drag(canvas, *polygon)
    # the square of the data, as high as the canvas, lies in the middle of it
    box, data = canvas.bounding_box(), np.array(notebook.ask("points.to_numpy()"))
    low, high = data.min(axis=0), data.max(axis=0)
    place = (data - low) / (high - low) - 0.5
    screen = box["height"] * place * (1, -1) + (box["width"] / 2, box["height"] / 2)
    drawn = Polygon(polygon * (box["width"], box["height"]), closed=False)
    surely, perhaps = (
        set(np.flatnonzero(drawn.contains_points(screen, radius=radius)).tolist()) for radius in _grow(drawn, 2)
    )
    selected = set(notebook.wait_until("scatter.selection().tolist()"))
    assert len(surely) > 60
    assert surely <= selected <= perhaps
    assert len(perhaps) < 1.2 * len(surely)
    assert notebook.ask("len(selections)") == 1


def _grow(polygon: Polygon, pixels: float) -> tuple[float, float]:
    """The radii by which matplotlib makes this polygon smaller and larger; their signs depend on its direction."""
    x, y = polygon.vertices.T
    sign = np.sign(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return -sign * pixels, sign * pixels


def test_a_selection_made_in_the_kernel_is_seen(notebook: Notebook):
    canvas = notebook.cell(SCATTER).locator("canvas").first
    before = notebook.pixels(canvas)
    notebook.do("scatter.selection([1, 2, 3])")
    notebook.wait_for_change(canvas, before)
    assert notebook.ask("scatter.selection()") == [1, 2, 3]


def index_of(notebook: Notebook, mm: list[float]) -> list[float]:
    """The (x, y, z) index in the image of a place in niivue's millimetres, whose x and y run the other way."""
    return notebook.ask(f"ct.TransformPhysicalPointToContinuousIndex(({-mm[0]}, {-mm[1]}, {mm[2]}))")


def in_the_image(x: float, y: float) -> list[float]:
    """The index of a place of the canvas, by hand: left on the left, so that x falls from left to right."""
    return [32 * (1 - x) - 0.5, 32 * y - 0.5]


def test_a_click_in_the_volume_moves_the_cross_hair_and_reaches_the_kernel(notebook: Notebook):
    canvas = notebook.cell(VOLUME).locator("canvas").first
    before = notebook.pixels(canvas)
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 50
    notebook.click_at(canvas, 0.3, 0.6)
    notebook.wait_for_change(canvas, before)
    location = notebook.wait_until("locations")[-1]
    index = index_of(notebook, location["mm"])
    assert index[:2] == pytest.approx(in_the_image(0.3, 0.6), abs=0.2)
    voxel = np.floor(np.array(index) + 0.5).astype(int).tolist()
    assert location["values"][0]["value"] == notebook.ask(f"ct.GetPixel({voxel})")


def test_a_press_and_a_release_in_a_picture_reach_the_kernel_with_their_places(notebook: Notebook):
    notebook.drag(notebook.cell(PICTURE).locator("img"), (0.3, 0.25), (0.6, 0.8))
    notebook.wait_until("len(events) == 2")
    places = "(e['type'], e['relativeX'] / e['boundingRectWidth'], e['relativeY'] / e['boundingRectHeight'])"
    (down, *pressed), (up, *released) = notebook.ask(f"[{places} for e in events]")
    assert (down, up) == ("mousedown", "mouseup")
    assert pressed == pytest.approx([0.3, 0.25], abs=0.01) and released == pytest.approx([0.6, 0.8], abs=0.01)


def test_a_screenshot_shows_all_cells(notebook: Notebook, tmp_path: Path):
    notebook.screenshot(tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.height > sum(notebook.cell(index).bounding_box()["height"] for index in range(len(CELLS)))


def test_nothing_was_asked_for_outside_and_it_would_have_been_seen(lab: Lab, notebook: Notebook):
    notebook.check()
    assert lab.outside == []
    reached = notebook.page.evaluate("() => fetch('https://cdn.example.org/widget.js').then(() => true, () => false)")
    assert not reached
    assert lab.outside == ["https://cdn.example.org/widget.js"]
    lab.outside.clear()


BROKEN_CELLS = (
    """
import anywidget
import traitlets

class WithoutModule(anywidget.AnyWidget):
    _model_module = traitlets.Unicode("nowhere").tag(sync=True)

WithoutModule()
""",
    """
class WithoutPicture(anywidget.AnyWidget):
    _esm = "export default {render() { throw new Error('no picture') }}"

WithoutPicture()
""",
    "1 / 0",
)


def test_a_failing_cell_and_widgets_that_cannot_be_shown_are_told(lab: Lab, tmp_path: Path):
    with lab.open(notebook_of(tmp_path / "broken.ipynb", *BROKEN_CELLS)) as notebook:
        with pytest.raises(AssertionError) as told:
            notebook.run_all()
        assert "ZeroDivisionError: division by zero" in str(told.value)
        assert "no picture" in str(told.value)
        assert re.search("widget not shown|Click to show javascript error", str(told.value))
