"""The README's pictures, anew: notebook 08's workbench at both sizes, and lessons 3 and 4 as a student meets them.

python tests/lab/pictures.py [folder]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lab import Lab, Notebook

ROOT = Path(__file__).parents[2]
SIZES = ((1400, 900), (1000, 800))
WORKBENCH = 3  # code cell, the injected parameters counted
LESSONS = {"3_triplets": "Loss A is the first term", "4_who_still_teaches": "A picture first"}  # and what is on top


def scroll_to(notebook: Notebook, text: str) -> None:
    """Bring the cell that holds this text to the top of the page."""
    notebook.page.locator(".jp-Cell").filter(has_text=text).last.evaluate("cell => cell.scrollIntoView()")
    notebook.page.wait_for_timeout(1000)


def workbench(notebook: Notebook, folder: Path) -> None:
    """A lasso in the first scatter, and what it lights up, at both sizes."""
    cell = notebook.cell(WORKBENCH)
    for width, height in SIZES:
        notebook.page.set_viewport_size({"width": width, "height": height})
        notebook.page.wait_for_timeout(2000)
        notebook.press("clear", within=cell)
        notebook.drag(
            cell.locator(".square-scatter canvas").first, (0.4, 0.05), (0.62, 0.05), (0.62, 0.95), (0.4, 0.95)
        )
        notebook.wait_until("len(bench.rows)")
        cell.locator(".jp-Cell-outputArea").evaluate("area => area.scrollIntoView()")
        notebook.page.mouse.move(5, 5)
        notebook.page.wait_for_timeout(2000)
        notebook.page.screenshot(path=folder / f"explore_{width}.png")


def lesson(notebook: Notebook, on_top: str, path: Path) -> None:
    """The blank lesson, run until its first check stops it."""
    notebook.page.set_viewport_size(dict(zip(("width", "height"), SIZES[0], strict=True)))
    notebook.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
    notebook.page.get_by_text("is not written yet").wait_for(timeout=180_000)
    scroll_to(notebook, on_top)
    notebook.page.screenshot(path=path)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as root, Lab(Path(root)) as lab:
        with lab.open(ROOT / "notebooks/08_explore.ipynb", {"pictures_folder": str(Path(root) / "made")}) as notebook:
            notebook.run_all()
            workbench(notebook, folder)
        for name, on_top in LESSONS.items():
            with lab.open(ROOT / f"notebooks/lessons/{name}.ipynb") as notebook:
                lesson(notebook, on_top, folder / f"lesson_{name[0]}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "notebooks/images"))
