"""As many points as a cohort of 170 test cases has are seen, not only sent."""

import sys
from pathlib import Path

import nbformat
from lab import Lab, wait_for

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from exploring import COHORT, DRAWN


def test_200_000_points_are_dark_on_white(lab: Lab, tmp_path: Path):
    """Regression: drawn in jupyter-scatter's performance mode, they were so pale that the scatter looked empty."""
    cells = [nbformat.v4.new_code_cell(code) for code in ("import numpy as np", COHORT)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "many.ipynb")
    with lab.open(tmp_path / "many.ipynb") as notebook:
        notebook.run_all()
        canvas = notebook.cell(1).locator("canvas").first
        notebook.bring(canvas)
        notebook.page.wait_for_function(DRAWN, timeout=60_000)
        wait_for(lambda: (notebook.pixels(canvas).max(axis=2) < 128).mean() > 0.05, "dark points", timeout=60)
