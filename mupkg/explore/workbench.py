"""A study's cases, and of one of them everything that is linked, on one screen (notebook 08)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from mupkg.explore.linked import TOOLBAR, DistanceMap, EmbeddingExplorer
from mupkg.explore.panels import beside, dropdown, small, table, wrapped
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
        metrics = results.case_metrics(results.finished_runs(study, configurations, seed))
        self.scores = results.worst_first(metrics, Regions.read(Path(study) / "stage1"))
        texts = self.scores.map("{:.3f}".format).replace("nan", "not tested").agg(", ".join, axis=1)
        self._open(case_id or self.scores.index[0])
        listed = [(f"{case}: DSC {text}", case) for case, text in texts.items()]
        self.case = dropdown("case", listed, self.seen.case_id, 290)
        self.case.observe(self._change, "value")

    def _change(self, change: Mapping[str, str]) -> None:
        try:
            self._open(change["new"])
        except ValueError as error:  # where nobody reads a traceback
            self.explorer.found.value = small(str(error))

    def _open(self, case_id: str) -> None:
        study, configurations, seed = self.runs
        seen = SeenCase.read(study, case_id, configurations, seed)
        self.explorer = EmbeddingExplorer(seen, seed=seed, **self.options)
        self.seen, self.distance = seen, DistanceMap(seen, scale=self.explorer.numbers["mean d(a, n)"])
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
        return self.explorer.figure_with(self.distance.panel)

    def _parts(self) -> list[ipywidgets.Widget]:
        explorer, (slices, distances) = self.explorer, self.panels
        rows = zip(slices.pictures, explorer.plots, distances.pictures, strict=True)
        texts = slices.legend, explorer.legend, distances.legend, explorer.found, slices.words, explorer.measured
        pictures = beside(table(*rows, more=(0, TOOLBAR, 0)), *texts)
        return [wrapped(self.case, *explorer.controls), pictures]

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        return ipywidgets.VBox(self._parts())
