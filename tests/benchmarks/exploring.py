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
from mupkg.explore import CaseViewer, EmbeddingExplorer, SeenCase

# a region as in METHOD.md: 128 slices of 128 x 128 voxels of 1 mm, a prostate of 80 ml
z, y, x = np.indices((128, 128, 128)) - 63.5
truth = np.sqrt(z**2 + y**2 + x**2) < 26.7
region = np.random.default_rng(0).integers(0, 256, truth.shape, dtype=np.uint8)
heat = {name: np.clip(truth * 0.8 + 0.1, 0, 1).astype(np.float32) for name in ("UNet", "MetricUNet-HCP")}
torch.manual_seed(0)
networks = {name: UNet(3, 4, 16).eval() for name in heat}
seen = SeenCase("made up", region, truth, (1.0, 1.0, 1.0), networks, heat)
"""
EXPLORER = "explorer = EmbeddingExplorer(seen, per_kind=11_000)\nexplorer.widget"
VIEWER = "view = CaseViewer(seen, 'slices')\nview.widget"

PARTS = ("server and browser", "page and kernel", "cells")  # of opening notebook 08

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


def exploring(repeats: int, quick: bool = False) -> list[dict]:
    """Seconds of a lasso among 50 000 voxels, a box in the slice, a slice slider; and of opening notebook 08."""
    from lab import Lab, find_chromium

    if not find_chromium():
        print("no Chromium: exploring is not measured")
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.ipynb"
        cells = [nbformat.v4.new_code_cell(cell) for cell in (CASE, EXPLORER, VIEWER)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        repeats = 3 if quick else repeats
        root = Path(folder) / "root"
        root.mkdir()
        started = time.perf_counter()
        with Lab(root) as lab:
            marks = [time.perf_counter()]
            with lab.open(ROOT / "notebooks/08_explore.ipynb", {"pictures_folder": str(root / "p")}) as notebook:
                marks.append(time.perf_counter())
                notebook.run_all()
                marks.append(time.perf_counter())
            with lab.open(path) as notebook:
                notebook.run_all()
                voxels = notebook.ask("len(explorer.table)")
                times = _times(notebook, repeats)
    rows = [_row(f"{what}, {voxels} voxels, 128-cube", values, bar) for what, values, bar in times]
    parts = ", ".join(f"{what} {took:.1f} s" for what, took in zip(PARTS, np.diff([started, *marks]), strict=True))
    last = _row("fresh JupyterLab, notebook 08 run to its end", [1e3 * (marks[-1] - started)], 15_000)
    return [*rows, last | {"note": parts}]


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
        ("lasso to lit voxels", lassos, 300),
        ("box in the slice to lit voxels", boxes, 300),
        ("slice slider, explorer", slides, 150),
        ("slice slider, case viewer", slices, 150),
    ]


def _row(what: str, milliseconds: list[float], bar: float) -> dict:
    middle = statistics.median(milliseconds)
    row = {"what": what, "peer": f"the bar, {bar:g} ms", "ours_ms": middle, "peer_ms": bar, "ratio": middle / bar}
    spread = sorted(milliseconds)
    return row | {"quartiles": f"{spread[0]:.0f} to {spread[-1]:.0f} ms (range)", "repeats": len(milliseconds)}
