"""How soon notebook 08's views answer, in a real JupyterLab in headless Chromium: from the hand to the pixels."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "lab"))

CASE = """
import numpy as np
import torch
from mupkg.models import UNet
from mupkg.explore import CasePredictions, CaseViewer, EmbeddingExplorer

# a region as in METHOD.md: 128 slices of 128 x 128 voxels of 1 mm, a prostate of 80 ml
z, y, x = np.indices((128, 128, 128)) - 63.5
truth = np.sqrt(z**2 + y**2 + x**2) < 26.7
region = np.random.default_rng(0).integers(0, 256, truth.shape, dtype=np.uint8)
heat = {name: np.clip(truth * 0.8 + 0.1, 0, 1).astype(np.float32) for name in ("UNet", "MetricUNet-HCP")}
torch.manual_seed(0)
networks = {name: UNet(3, 4, 16).eval() for name in heat}
case = CasePredictions("made up", region, truth, (1.0, 1.0, 1.0), networks, heat)
"""
EXPLORER = "explorer = EmbeddingExplorer(case, per_kind=11_000)\nexplorer.widget"
VIEWER = "view = CaseViewer(case, 'slices')\nview.widget"

COHORT = """
import ipywidgets
import pandas as pd
from mupkg.explore.scatters import VoxelExplorer

# 200 000 points, as of 170 test cases
points = np.random.default_rng(0).normal(size=(200_000, 2)).astype(np.float32)
columns = {"case": "made up", "number": np.repeat(np.arange(4, dtype=np.uint8)[::-1], 50_000)}
columns |= dict.fromkeys("zyx", 0)
for name, step in (("A", 1), ("B", -1)):
    columns |= {f"error {name}": np.abs(points[:, 0]), f"embedding {name}": list(points[:, ::step])}
many = VoxelExplorer(["kind", "error"], projection="PCA", seed=0, folder=".")
many.describe = str
many.show(pd.DataFrame(columns), "AB")
ipywidgets.VBox([many.pictures[0]], layout={"width": "560px"})
"""
PARTS = ("server and browser", "page and kernel", "workbench", "rest of the cells")  # of opening notebook 08
WORKBENCH = 3  # code cell, the injected parameters counted

# Milliseconds from an event to the first frame in which the picture is another one.
WATCH = """([picture, event]) => {
  window.took = null;
  window.addEventListener(event, () => {
    const start = performance.now(), before = picture.src;
    const wait = () => {
      if (picture.src !== before && picture.complete) window.took = performance.now() - start;
      else requestAnimationFrame(wait);
    };
    requestAnimationFrame(wait);
  }, {capture: true, once: true});
}"""

# Whether all scatters of the page are drawn: before, they ignore a lasso.
DRAWN = """() => [...document.querySelectorAll('.square-scatter *')].filter(e => e.api)
  .every(e => e.api.get('isPointsDrawn') && !e.api.get('isDrawing'))"""

# The same from a list's change to the first picture of a cell that is another one; the element itself may be new.
WATCH_PAGE = """cell => {
  window.took = null;
  const source = () => cell.querySelector('img')?.src, before = source();
  cell.querySelector('select').addEventListener('change', () => {
    const start = performance.now();
    const wait = () => {
      const image = cell.querySelector('img');
      if (image && image.src !== before && image.complete) window.took = performance.now() - start;
      else requestAnimationFrame(wait);
    };
    requestAnimationFrame(wait);
  }, {capture: true, once: true});
}"""


def exploring(repeats: int, quick: bool = False) -> list[dict]:
    """Times of a lasso among 50 000 voxels, a box, sliders, another case, 200 000 points, opening notebook 08."""
    from lab import Lab, find_chromium

    if not find_chromium():
        print("no Chromium: exploring is not measured")
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.ipynb"
        cells = [nbformat.v4.new_code_cell(cell) for cell in (CASE, EXPLORER, VIEWER, COHORT)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        repeats = 3 if quick else repeats
        root = Path(folder) / "root"
        root.mkdir()
        started = time.perf_counter()
        with Lab(root) as lab:
            marks = [time.perf_counter()]
            with lab.open(ROOT / "notebooks/08_explore.ipynb", {"pictures_folder": str(root / "p")}) as notebook:
                marks.append(time.perf_counter())
                _run_until_alive(notebook)
                marks.append(time.perf_counter())
                notebook.page.wait_for_function("() => window.finished", timeout=300_000)
                notebook.settle()
                marks.append(time.perf_counter())
                cases = _case_changes(notebook, repeats)
            with lab.open(path) as notebook:
                notebook.run_all()
                voxels = notebook.ask("len(explorer.table)")
                times = _times(notebook, repeats)
    rows = [_row(f"{what}, {voxels} voxels, 128-cube", values, bar) for what, values, bar in times]
    parts = ", ".join(f"{what} {took:.1f} s" for what, took in zip(PARTS, np.diff([started, *marks]), strict=True))
    rows.append(_row("another case in the workbench, both runs predicted before", cases, 500))
    opened = (("until the workbench is alive", 2, 10_000), ("run to its end", 3, 19_000))
    for what, mark, bar in opened:
        rows.append(_row(f"fresh JupyterLab, notebook 08 {what}", [1e3 * (marks[mark] - started)], bar))
    rows[-1]["note"] = parts
    return rows


def _run_until_alive(notebook) -> None:
    """Start all cells, and wait until the workbench shows its slices and its points."""
    notebook.page.evaluate(
        "() => { window.finished = false;"
        " jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.finished = true }) }"
    )
    cell = notebook.cell(WORKBENCH)
    cell.locator(".square-scatter").nth(1).locator("canvas").first.wait_for(timeout=300_000)
    notebook.page.wait_for_function(
        "cell => { const images = [...cell.querySelectorAll('img')];"
        " return images.length >= 4 && images.every(image => image.complete && image.naturalWidth > 1) }",
        arg=cell.element_handle(),
        timeout=300_000,
    )


def _case_changes(notebook, repeats: int) -> list[float]:
    """Milliseconds from a choice in the case list to the other case's slice."""
    cell, took = notebook.cell(WORKBENCH), []
    lines = notebook.ask("[text for text, _ in bench.case.options]")
    for number in (1, 0, *range(1, repeats + 1)):
        shown = cell.locator("img").first
        notebook.page.evaluate(WATCH_PAGE, cell.element_handle())
        cell.locator("select").first.select_option(index=number % 2)
        notebook.page.wait_for_function("() => window.took !== null", timeout=60_000)
        took.append(notebook.page.evaluate("() => window.took"))
        shown.wait_for()
        time.sleep(0.5)
    assert len(lines) > 1
    return took[2:]


def _times(notebook, repeats: int) -> list[tuple[str, list[float], float]]:
    panel, shown = (notebook.cell(number).locator("img").first for number in (1, 2))
    scatter = notebook.cell(1).locator("canvas").first

    def timed(element, event: str, act) -> float:
        element.scroll_into_view_if_needed()
        notebook.page.evaluate(WATCH, [element.element_handle(), event])
        act()
        notebook.page.wait_for_function("() => window.took !== null", timeout=30_000)
        time.sleep(0.3)
        return notebook.page.evaluate("() => window.took")

    lassos, boxes, slides, slices = [], [], [], []
    for number in range(repeats):
        edge = 0.30 + 0.02 * number
        lasso = [(edge, 0.1), (0.7, 0.1), (0.7, 0.9), (edge, 0.9)]
        lassos.append(timed(panel, "pointerup", lambda lasso=lasso: notebook.drag(scatter, *lasso)))
        box = [(0.1, 0.3 + 0.02 * number), (0.4, 0.8)]
        boxes.append(timed(panel, "pointerup", lambda box=box: notebook.drag(panel, *box)))
        for cell, element, kept in ((1, panel, slides), (2, shown, slices)):
            handle = notebook.cell(cell).locator(".noUi-handle").first
            handle.focus()
            press = lambda: notebook.page.keyboard.press("ArrowRight")  # noqa: E731
            kept.append(timed(element, "keydown", press))
    return [
        ("lasso to lit voxels", lassos, 250),
        ("box in the slice to lit voxels", boxes, 250),
        ("slice slider, explorer", slides, 100),
        ("slice slider, case viewer", slices, 100),
        ("lasso among 200000 points to the kernel", _lassos_of_many(notebook, repeats), 1000),
    ]


def _lassos_of_many(notebook, repeats: int) -> list[float]:
    """Milliseconds from letting go of a lasso until the kernel has the points in it."""
    scatter, took = notebook.cell(3).locator("canvas").first, []
    for number in range(repeats):
        edge = 0.30 + 0.02 * number
        notebook.bring(scatter)  # a scatter out of sight is not drawn
        notebook.page.wait_for_function(DRAWN, timeout=180_000)
        notebook.drag(scatter, (edge, 0.1), (0.7, 0.1), (0.7, 0.9), (edge, 0.9))
        start = time.perf_counter()
        notebook.wait_until(f"len(many.rows) > 1000 and len(many.rows) != {took[-1][1] if took else 0}")
        took.append((1e3 * (time.perf_counter() - start), notebook.ask("len(many.rows)")))
    return [milliseconds for milliseconds, _ in took]


def _row(what: str, milliseconds: list[float], bar: float) -> dict:
    middle = statistics.median(milliseconds)
    row = {"what": what, "peer": f"the bar, {bar:g} ms", "ours_ms": middle, "peer_ms": bar, "ratio": middle / bar}
    spread = sorted(milliseconds)
    return row | {"quartiles": f"{spread[0]:.0f} to {spread[-1]:.0f} ms (range)", "repeats": len(milliseconds)}
