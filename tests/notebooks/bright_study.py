"""A study of phantoms whose prostate is bright: an oracle that sees brightness stands for the network.

The voxels are anisotropic, and every number is known beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk

from mupkg.data.cohort import Cohort
from mupkg.data.preprocessing import Preparation
from mupkg.scans.cases import Case
from mupkg.stages import evaluation
from mupkg.stages.regions import Regions
from mupkg.stages.runs import write_run

ROOT = Path(__file__).resolve().parents[2]
SHAPE, SPACING = (14, 30, 30), (4.0, 1.5, 2.5)  # (z, y, x)
WORKING = Preparation(spacing_mm=(5.0, 3.0, 3.0))
REGION_MM, BRIGHT = (70.0, 48.0, 60.0), 150
SPLITS = {"a": "train", "b": "train", "c": "validation", "d": "test", "e": "test", "f": "test"}
SAGITTAL = (0, 0, 1, 1, 0, 0, 0, 1, 0)


def bright_case(case_id: str) -> Case:
    """A box of flesh in air with a bright prostate, elsewhere and a little larger in every case."""
    number = ord(case_id) - ord("a")
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * SPACING
    middle = np.array(SHAPE) * SPACING / 2 + (number - 2, number % 3 - 1, 2 * (number % 2) + 3)
    inside = (((grid - middle) / (13 + number, 8, 14)) ** 2).sum(-1) < 1
    hu = np.random.default_rng(number).normal(0, 10, SHAPE) + 160 * inside
    hu[:, [0, 1, -2, -1]] = hu[:, :, [0, -1]] = -1000
    images = [sitk.GetImageFromArray(voxels) for voxels in (hu.astype(np.int16), inside.astype(np.uint8))]
    for image in images:
        image.SetSpacing(SPACING[::-1])
        image.SetDirection(SAGITTAL if case_id == "f" else (1, 0, 0, 0, 1, 0, 0, 0, 1))
    return Case(case_id, *images)


@dataclass
class Study:
    """A copy of it to look at and to spoil."""

    root: Path
    blank: str = ""  # the case in which the oracle sees nothing
    island: bool = False  # whether the oracle sees something far from the prostate, too
    said: list[sitk.Image] = field(default_factory=list)  # the oracle's probabilities
    loaded: list[str] = field(default_factory=list)  # names of the weights that were asked for
    between: Callable[[Study], None] = lambda study: None  # what happens between two trainings
    source: dict[str, str] = field(default_factory=dict)  # what is replaced in a notebook's cells

    @property
    def cohort(self) -> Cohort:
        return Cohort.read(self.root / "cohort")

    @property
    def regions(self) -> Regions:
        return Regions.read(self.root / "study" / "stage1")

    def test(self, run: str = "UNet-seed0") -> pd.DataFrame:
        """The oracle tested as a run."""
        folder = self.root / "study" / run
        if not (folder / "run.json").exists():
            write_run(folder, {}, data_fingerprint=self.regions.fingerprint())
        return evaluation.evaluate_run(folder, self.cohort, self.regions)

    def notebook(self, name: str, stop: str | None = None, **parameters: object) -> dict[str, Any]:
        """A notebook's cells run here, up to the first one that holds `stop`; the names they leave."""
        (path,) = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
        cells = ["".join(c["source"]) for c in json.loads(path.read_bytes())["cells"] if c["cell_type"] == "code"]
        parameters |= {"study": "study", "cohort": "cohort", "size": "smoke", "data_folder": str(self.root)}
        parameters["outputs_folder"] = str(self.root)
        injected = "\n".join(["# Parameters", *(f"{key} = {value!r}" for key, value in parameters.items())])
        cells.insert(1, injected)
        namespace = {"In": ["", *cells]}
        for cell in cells:
            if stop and stop in cell:
                break
            for old, new in self.source.items():
                cell = cell.replace(old, new)
            exec(cell, namespace)
        return namespace


STAGE_1 = ("02", "load_localizer(settings", {"patch_size": 8, "filters": 2, "coarse_mm": 8.0})
STAGE_2 = (
    "03",
    "evaluate_run(",
    {"patch_size": 8, "base_filters": 2, "embedding_dim": 4, "validate_every": 1, "configuration": "UNet"},
)


def two_runs(study: Study) -> None:
    """Trained for two steps each, tested by the oracle."""
    notebook, stop, parameters = STAGE_2
    for name in ("UNet", "MetricUNet-R"):
        study.notebook(notebook, stop, **parameters | {"configuration": name, "steps": 2, "batch_size": 2})
        study.test(f"{name}-seed0")
