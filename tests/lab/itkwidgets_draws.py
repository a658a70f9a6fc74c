"""itkwidgets draws in notebook 08, its files served from npm copies: `make test-itkwidgets`, not part of `make test`.

What this proves: our side and the viewer. Whether the hosts answer, and with the same files, it cannot know.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import npm_copies
import numpy as np
import pytest
from lab import Lab, Notebook, wait_for
from PIL import Image

from mupkg.explore.volumes import ITK_FILES

ROOT = Path(__file__).parents[2]
CASE = 5  # code cell, the injected parameters counted
# The viewer works without these: other plugins of ImJoy's, and its logo.
NEEDLESS = re.compile(r"https://imjoy(-team\.github)?\.io/(jupyter-engine-manager|imjoy-core-plugins|static/img)/")
# In the kernel the guard gets its answers from the same copies.
ANSWERS = f"""
import sys, urllib.request
sys.path.append({str(Path(__file__).parent)!r})
import npm_copies
urllib.request.urlopen = lambda url, timeout: npm_copies.copy_of(url).open("rb")
"""


def label_of(pixels: np.ndarray) -> np.ndarray:
    """Where the label is drawn: in red, over a grey slice."""
    red, green, blue = np.moveaxis(pixels.astype(int), 2, 0)
    return red - np.maximum(green, blue) > 30


def assert_volume_and_label(picture: Callable[[], np.ndarray], share: float) -> None:
    """A slice of the volume is drawn, in a while, and over it the label, which is a known share of the slice."""
    pixels = wait_for(lambda: [p for p in [picture()] if label_of(p).mean() > 0.002], "a label is drawn", 90)[0]
    label, background = label_of(pixels), np.median(pixels.reshape(-1, 3), axis=0)
    volume = (np.abs(pixels - background).max(axis=2) > 12) & ~label
    assert volume.mean() > 0.02  # the scale, the axes and the menu together are a tenth of a per cent
    # in perspective, and some of the slice is as grey as the background
    assert label.sum() / (label | volume).sum() == pytest.approx(share, rel=0.5)


@pytest.fixture(scope="module")
def notebook(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """The notebook in JupyterLab, all cells run."""
    npm_copies.fetch()
    lab.serve(npm_copies.copy_of)
    parameters = {"viewer": "itkwidgets", "pictures_folder": str(tmp_path_factory.mktemp("pictures"))}
    with lab.open(ROOT / "notebooks/08_explore.ipynb", parameters) as notebook:
        notebook.do(ANSWERS)
        notebook.page.evaluate("() => void jupyterapp.commands.execute('notebook:run-all-cells')")
        frame = notebook.cell(CASE).locator("iframe")
        frame.wait_for(timeout=120_000)
        frame.scroll_into_view_if_needed()  # a browser draws nothing that is out of sight, and all cells wait for it
        notebook.settle(timeout=300)
        notebook.check()
        yield notebook


def test_volume_and_label_are_drawn_and_the_output_keeps_a_picture(notebook: Notebook):
    frame, share = notebook.cell(CASE).locator("iframe"), notebook.ask("seen.truth[seen.slice.value].mean()")

    def kept() -> np.ndarray:
        notebook.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
        cells = [cell for cell in json.loads(notebook.path.read_text())["cells"] if cell["cell_type"] == "code"]
        pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", json.dumps(cells[CASE]["outputs"]))
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[-1]))).convert("RGB"))

    assert_volume_and_label(lambda: notebook.pixels(frame), share)
    assert_volume_and_label(kept, share)


def test_the_cells_after_it_run(notebook: Notebook):
    counts = notebook.page.evaluate(
        "() => jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code')"
        ".map(cell => cell.model.executionCount)"
    )
    assert all(counts[CASE:]) and notebook.ask("len(cuts)") == 10


def test_the_guard_asks_every_host_that_the_viewer_asks(lab: Lab, notebook: Notebook):
    assert [url for url in lab.outside if not npm_copies.copy_of(url) and not NEEDLESS.match(url)] == []
    hosts = {urlsplit(url).hostname for url in lab.outside if npm_copies.copy_of(url)}
    assert hosts == {urlsplit(file).hostname for file in ITK_FILES}
