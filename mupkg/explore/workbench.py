"""A study's cases, and of one of them everything that is linked, on one screen (notebook 08)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from mupkg.explore.linked import TOOLBAR, DistanceMap, EmbeddingExplorer
from mupkg.explore.panels import DPI, beside, control, table, wrapped
from mupkg.explore.seen import SeenCase
from mupkg.report import results
from mupkg.stages.regions import Regions


class Workbench:
    """Case list, slices, feature space, distance map and numbers in one linked panel.

    A click in any picture chooses the nearest drawn voxel and measures the distances from the voxel clicked. A box
    or a lasso chooses many.

    Args:
        options: of `EmbeddingExplorer`.

    Attributes:
        seen, explorer, distance: the case shown and its linked views; others once another case is chosen.
    """

    def __init__(
        self,
        study: str | Path,
        case_id: str | None = None,
        configurations: Sequence[str] | None = None,
        seed: int = 0,
        **options: Any,
    ):
        self.runs, self.options = (study, configurations, seed), options
        metrics = results.case_metrics(results.runs(study, configurations, seed))
        self.scores = results.worst_first(metrics, Regions.read(Path(study) / "stage1"))
        listed = []
        for case, *row in self.scores.itertuples():
            known = ", ".join(f"{dsc:.3f}" for dsc in row if not pd.isna(dsc))
            listed.append((f"{case}: DSC {known}" if known else f"{case}: not tested", case))
        self._open(case_id or self.scores.index[0])
        start = {"options": listed, "value": self.seen.case_id}
        self.case = ipywidgets.Dropdown(description="case", **start, **control(290))
        self.case.observe(lambda change: self._open(change["new"]), "value")

    def _open(self, case_id: str) -> None:
        study, configurations, seed = self.runs
        self.seen = SeenCase.read(study, case_id, configurations, seed)
        self.explorer = EmbeddingExplorer(self.seen, seed=seed, **self.options)
        scale = self.explorer.numbers["mean d(a, n)"]
        self.distance = DistanceMap(self.seen, scale=scale)
        self.panels = self.explorer.view.panel, self.distance.panel
        for panel in self.panels:
            panel.chosen, panel.told, panel.words = self._chosen, self.distance.tell, self.panels[0].words
        if "widget" in self.__dict__:
            self.widget.children = self._parts()

    def _chosen(self, voxels) -> None:
        self.explorer.choose_in_slice(voxels)
        if len(voxels) == 1:
            self.distance.choose_in_slice(voxels)

    @property
    def figure(self) -> Figure:
        """Slices, feature space and distance map, a row a run."""
        names = self.explorer.names
        figure = Figure(figsize=(12, 4.2 * len(names)), dpi=DPI, layout="constrained")
        axes = figure.subplots(len(names), 3, squeeze=False)
        self.explorer.paint_on(axes[:, :2])
        self.distance.panel.paint_on(axes[:, 2])
        return figure

    def _parts(self) -> list[ipywidgets.Widget]:
        explorer, (slices, distances) = self.explorer, self.panels
        rows = zip(slices.pictures, explorer.plots, distances.pictures, strict=True)
        texts = slices.legend, explorer.legend, distances.legend, explorer.found, slices.words, explorer.measured
        pictures = beside(table(*rows, more=(0, TOOLBAR, 0)), *texts)
        return [wrapped(self.case, *explorer.controls), pictures]

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        return ipywidgets.VBox(self._parts())
