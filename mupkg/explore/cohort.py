"""A whole cohort in one view: the voxels of all test cases in feature space, and as patches (notebook 08)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from mupkg.explore.controls import beside, dropdown, table, wrapped
from mupkg.explore.panels import DPI
from mupkg.explore.predictions import Cases
from mupkg.explore.scatters import ALL, COLOURS, NO_ROWS, VoxelExplorer
from mupkg.explore.voxels import DrawnVoxels, draw_patches, patch, patches_html
from mupkg.explore.workbench import RunLists
from mupkg.report.embeddings import Projection
from mupkg.report.figures import draw_points
from mupkg.stages.voxels import KINDS

PATCHES = 24  # shown of the chosen voxels


class CohortExplorer(VoxelExplorer):
    """The drawn voxels of all cases of a split, a scatter a run, in planes that are fitted on all of them.

    Choose points by a lasso, or by the lists: a case, a kind, a range of errors (of either run). Some of the chosen
    voxels, spread over their errors, are shown as patches.

    Args:
        study: a study folder, or `Cases` of your own.
        options: of `DrawnVoxels.of_case`: per_kind, tau.

    Attributes:
        table: a row a voxel, see `DrawnVoxels`.
        rows: the chosen ones, as row numbers.
    """

    def __init__(
        self,
        study: str | Path | Cases,
        *,
        configurations: Sequence[str] | None = None,
        seed: int = 0,
        split: str = "test",
        projection: Projection = "PCA",
        folder: str | Path = "outputs/explore",
        **options,
    ):
        self.cases = Cases.of(study, configurations, seed)
        self.split, self.options = split, {"seed": seed, **options}
        self.runs = RunLists(self.cases.names, self._open)
        super().__init__(len(self.runs.lists), list(COLOURS), projection=projection, seed=seed, folder=folder)
        self.patches = ipywidgets.HTML()
        self._open()
        self.case = dropdown("case", [ALL, *self.drawn.cases], ALL, 190)
        self.kind = dropdown("kind", [ALL, *KINDS], ALL, 180)
        self.error = ipywidgets.FloatRangeSlider(value=(0, 1), min=0, max=1, step=0.01, description="error")
        self.error.layout.width = "260px"
        for control in (self.case, self.kind, self.error):
            control.observe(lambda _: self._brush(), "value")

    def _open(self) -> None:
        names = self.runs.names
        drawn = DrawnVoxels.of_split(self.cases, names, self.split, **self.options)
        self.worst = drawn.table[[f"error {name}" for name in names]].max(axis=1).to_numpy()
        ranked = [case for case in self.cases.worst_first(names) if case in drawn.cases]
        self.rank = drawn.table["case"].map(ranked.index) / max(1, len(ranked) - 1)
        self.show(drawn)

    def title(self, name: str) -> str:
        return f"{'AB'[self.runs.names.index(name)]} · {name}\n{self.axes_title(name)}"

    def count(self) -> str:
        cases = self.table.iloc[self.rows]["case"].nunique()
        return f"{len(self.rows)} of {len(self.table)} voxels chosen, in {cases} of {len(self.drawn.cases)} cases"

    def describe(self, row: int) -> str:
        case, place = self.drawn.voxel(row)
        return f"{case.case_id}\n{case.describe(*place)}"

    def values(self, name: str) -> dict[str, pd.Series]:
        return super().values(name) | {"case": self.rank}

    def _brush(self) -> None:
        """Choose what all three lists say."""
        low, high = self.error.value
        fits = (self.worst >= low) & (self.worst <= high)
        parts = [] if (low, high) == (0, 1) else [f"error-{low:.2f}-{high:.2f}"]
        for column, control in (("case", self.case), ("kind", self.kind)):
            if control.value != ALL:
                fits &= (self.table[column] == control.value).to_numpy()
                parts.append(control.value)
        self.choose(np.flatnonzero(fits) if parts else NO_ROWS, "_".join(parts))

    def choose(self, rows: Int[np.ndarray, " r"], how: str = "by-code") -> None:
        """Show these rows as chosen in every scatter, and some of them as patches; `how` names the saved file."""
        super().choose(rows, how)
        self.patches.value = patches_html(self._some(PATCHES))

    def _some(self, count: int) -> list[tuple]:
        """Up to so many of the chosen voxels as patches with their words, from the smallest error to the largest."""
        order, shown = self.rows[np.argsort(self.worst[self.rows], kind="stable")], []
        for row in order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))] if len(order) else ():
            case, place = self.drawn.voxel(row)
            shown.append((patch(case, place), f"{case.case_id}\n{case.kind_of(place)}\nerror {self.worst[row]:.2f}"))
        return shown

    @property
    def figure(self) -> Figure:
        """Scatters by kind and by error, a row a run, and below them the patches of the chosen voxels."""
        names, some = self.runs.names, self._some(PATCHES // 2)
        figure = Figure(figsize=(11, 4.2 * len(names) + 1.6 * bool(some)), dpi=DPI, layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=[4.2 * len(names), 1.6]) if some else (figure, None)
        grid = upper.subplots(len(names), 2, squeeze=False)
        look = {"s": 3, "linewidths": 0, "alpha": min(1, (5000 / len(self.table)) ** 0.5)}
        colours, low, high = COLOURS["error"]
        for (left, right), name in zip(grid, names, strict=True):
            draw_points(left, self.points[name], self.drawn.samples[name].kind, self.axes[name], **look)
            error = self.table[f"error {name}"]
            right.scatter(*self.points[name].T, c=error, cmap=colours, vmin=low, vmax=high, **look)
            right.set(xticks=[], yticks=[], xlabel=self.axes[name][0], ylabel=self.axes[name][1])
            for ax, what in ((left, "kind"), (right, "error")):
                ax.set_title(f"{name}: {what}, {len(self.table)} voxels of {len(self.drawn.cases)} cases", fontsize=9)
            upper.colorbar(ScalarMappable(cmap=colours), ax=right, label="error")
        for handle in grid[0, 0].legend(fontsize=7, markerscale=3).legend_handles:
            handle.set_alpha(1)
        if some:
            draw_patches(lower.subplots(1, len(some), squeeze=False)[0], some)
        return figure

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        lists = [*self.runs.lists, self.colour, self.projection, self.case, self.kind, self.error]
        controls = wrapped(*lists, self.clear, self.keep)
        whole = beside(table(self.plots, below=340), self.legend, self.status, self.words)
        return ipywidgets.VBox([controls, whole, self.patches])
