"""The workbench of one, two, three and eight runs: nothing is cut, hidden, or lies over something else.

MUPKG_PICTURES names a folder for pictures of each, to look at.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from lab import Lab, Notebook, wait_for

DEMO = Path(__file__).parents[2] / "data/demo"
NAMES = ("UNet", "MetricUNet-R", "MetricUNet-H", "MetricUNet-C", "MetricUNet-HR", "MetricUNet-HC", "MetricUNet-HRP")
CODE = """
from mupkg import explore
bench = explore.Workbench({study!r}, {case!r}, folder={study!r})
explore.show(bench, "workbench")
"""
# Every line of text and every picture that can be seen in a cell's output: what is wrong with where it lies
FAULTS = """area => {
  const panel = area.closest('.jp-WindowedPanel-outer').getBoundingClientRect(), faults = [], items = [];
  const seen = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true});
  const add = (what, box, element) => box.width > 1 && box.height > 1 && items.push({what, box, element});
  const walker = document.createTreeWalker(area, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), parent = walker.currentNode.parentElement;
    if (!text || !seen(parent) || ['STYLE', 'SCRIPT', 'OPTION'].includes(parent.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    for (const box of range.getClientRects()) add(text, box, parent);
  }
  for (const e of area.querySelectorAll('img, canvas, select'))
    if (seen(e)) add(e.tagName, e.getBoundingClientRect(), e);
  for (const {what, box, element} of items) {
    if (box.left < panel.left || box.right > panel.right || box.top < panel.top - 1 || box.bottom > panel.bottom)
      faults.push(`${what}: outside the page, ${Math.round(box.right)}, ${Math.round(box.bottom)}`);
    for (let e = element.parentElement; e !== area.parentElement; e = e.parentElement) {
      const b = e.getBoundingClientRect(), hides = getComputedStyle(e).overflow !== 'visible';
      const across = box.left < b.left - 1 || box.right > b.right + 1;
      if (hides && (across || box.top < b.top - 2 || box.bottom > b.bottom + 2))
        faults.push(`${what}: cut by ${e.className || e.tagName}`);
    }
    if (element.tagName === 'SELECT') {
      const pen = document.createElement('canvas').getContext('2d');
      pen.font = getComputedStyle(element).font;
      const text = element.selectedOptions[0]?.text ?? '';
      if (pen.measureText(text).width > element.clientWidth - 26) faults.push(`${text}: cut in its list`);
    }
  }
  for (let i = 0; i < items.length; i++) for (let j = 0; j < i; j++) {
    const a = items[i], b = items[j];
    if (a.element.contains(b.element) || b.element.contains(a.element)) continue;
    if (a.what === 'CANVAS' && b.what === 'CANVAS' && Math.abs(a.box.x - b.box.x) < 5) continue; // points and labels
    const wide = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
    const high = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
    if (wide > 2 && high > 4) faults.push(`${a.what} lies over ${b.what}`);
  }
  return faults;
}"""


def study_of(folder: Path, runs: int) -> Path:
    """The shipped pair's runs under other names, so many of them; its validation case counts as one of training."""
    shutil.copytree(DEMO / "stage1", folder / "stage1")
    table = folder / "stage1/regions.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("validation", "train"), encoding="utf-8")
    for number, name in enumerate([*NAMES, "MetricUNet-HCP"] if runs == 8 else NAMES[:runs]):
        shutil.copytree(DEMO / ("MetricUNet-HCP-seed0" if number else "UNet-seed0"), folder / f"{name}-seed0")
    return folder


def output(notebook: Notebook, width: int, height: int):
    """The cell's output at the top of a page of this size."""
    notebook.page.set_viewport_size({"width": width, "height": height})
    area = notebook.cell(0).locator(".jp-Cell-outputArea")
    area.evaluate("area => area.scrollIntoView()")
    return area


@pytest.fixture(scope="module", params=[1, 2, 3, 8])
def notebook(request, lab: Lab, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("runs")
    study = study_of(folder / "study", request.param)
    case = "phantom-0008"  # of the training set, which must be marked beside its numbers
    cells = [
        nbformat.v4.new_code_cell(CODE.format(study=str(study), case=case)),
        nbformat.v4.new_markdown_cell("end"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "bench.ipynb")
    with lab.open(folder / "bench.ipynb") as notebook:
        notebook.run_all()
        notebook.runs = request.param
        yield notebook


@pytest.mark.parametrize("size", [(1400, 900), (1000, 800)], ids=str)
@pytest.mark.parametrize("show", ["distances", "neighbours"])
def test_nothing_is_cut_or_hidden(notebook: Notebook, size: tuple[int, int], show: str):
    notebook.do(f"bench.right.value = {show!r}; bench._hovered(5)")
    area, rows = output(notebook, *size), min(2, notebook.runs)
    number = area.locator("img:visible").count
    wait_for(lambda: number() == (2 * rows if show == "distances" else 10 * rows + 1), "the pictures are there")
    faults = ["the page follows"]

    def fits() -> bool:
        output(notebook, *size)
        notebook.page.wait_for_timeout(500)
        faults[:] = area.evaluate(FAULTS)
        return not faults

    try:
        wait_for(fits, "everything fits", timeout=60)
    except TimeoutError:
        raise AssertionError("\n".join(faults)) from None
    finally:
        if folder := os.environ.get("MUPKG_PICTURES"):
            notebook.page.screenshot(path=Path(folder) / f"runs_{notebook.runs}_{size[0]}_{show}.png")
    assert "TRAINING case" in area.inner_text() and "distance: A" in area.inner_text()
