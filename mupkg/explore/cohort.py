"""A whole cohort in one view: the voxels of all test cases in feature space, and as patches (notebook 08)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import ipywidgets
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from mupkg import repository
from mupkg.explore.controls import beside, button, dropdown, small, table, wrapped
from mupkg.explore.linked import COLOURS, Scatters, axes_title, lay_out
from mupkg.explore.panels import DPI
from mupkg.explore.predictions import Cases
from mupkg.explore.voxels import PLACE, DrawnVoxels, patch, patches_html, save_voxels, thumbnail
from mupkg.explore.workbench import RunLists
from mupkg.report.embeddings import Projection
from mupkg.report.figures import KIND_COLOURS
from mupkg.stages.voxels import KINDS

PATCHES = 24  # shown of the chosen voxels
ALL = "all"


class CohortExplorer:
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
        self.cases = study if isinstance(study, Cases) else Cases.read(study, configurations, seed)
        self.seed, self.split, self.options, self.folder = seed, split, options, repository() / folder
        self.runs = RunLists(self.cases.names, self._open)
        self.scatters = Scatters(len(self.runs.lists), list(COLOURS), projection)
        self.scatters.chosen, self.scatters.hovered = self.choose, self._hover
        self.scatters.projection.observe(lambda _: self._project(), "value")
        self.status, self.words, self.patches = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.rows, self.how = np.empty(0, int), ALL
        self._open()
        self.case = dropdown("case", [ALL, *self.drawn.cases], ALL, 190)
        self.kind = dropdown("kind", [ALL, *KINDS], ALL, 180)
        self.error = ipywidgets.FloatRangeSlider(value=(0, 1), min=0, max=1, step=0.01, description="error")
        self.error.layout.width = "260px"
        self.clear = button("clear", "choose no voxel", lambda: self.choose(self.rows[:0]))
        self.keep = button("save voxels", "the chosen ones (all, if none is chosen), as Parquet", self.save)
        for control in (self.case, self.kind, self.error):
            control.observe(lambda _: self._brush(), "value")

    def _open(self) -> None:
        names = self.runs.names
        self.drawn = DrawnVoxels.of_split(self.cases, names, self.split, seed=self.seed, **self.options)
        self.table = self.drawn.table
        self.worst = self.table[[f"error {name}" for name in names]].max(axis=1).to_numpy()
        ranked = [case for case in self.cases.worst_first(names) if case in self.drawn.cases]
        self.rank = self.table["case"].map(ranked.index) / max(1, len(ranked) - 1)
        self._project()
        self.choose(self.rows[:0])

    def _project(self) -> None:
        def tell(text: str) -> None:
            self.status.value = small(text)

        self.points, self.axes = lay_out(self.drawn, self.scatters.projection.value, self.seed, tell)
        values = []
        for name in self.runs.names:
            own = {"probability": self.table[f"p {name}"], "error": self.table[f"error {name}"], "case": self.rank}
            values.append(self.table[["kind", "mm to contour"]].assign(**own))
        titles = [f"{'AB'[n]} · {name}\n{axes_title(self.axes[name])}" for n, name in enumerate(self.runs.names)]
        self.scatters.show([self.points[name] for name in self.runs.names], values, titles)

    def _brush(self) -> None:
        """Choose what all three lists say."""
        low, high = self.error.value
        fits = (self.worst >= low) & (self.worst <= high)
        parts = [] if (low, high) == (0, 1) else [f"error-{low:.2f}-{high:.2f}"]
        for column, control in (("case", self.case), ("kind", self.kind)):
            if control.value != ALL:
                fits &= (self.table[column] == control.value).to_numpy()
                parts.append(control.value)
        self.choose(np.flatnonzero(fits) if parts else self.rows[:0], "_".join(parts))

    def choose(self, rows: np.ndarray, how: str = "lasso") -> None:
        """Show these rows as chosen in all scatters, and some of them as patches."""
        self.rows, self.how = np.unique(np.asarray(rows, int)), how if len(rows) else ALL
        self.scatters.select(self.rows)
        count = self.table.iloc[self.rows]["case"].nunique()
        self.status.value = small(
            f"{len(self.rows)} of {len(self.table)} voxels chosen, in {count} of {len(self.drawn.cases)} cases"
        )
        parts = [(thumbnail(self.drawn.cases[row.case], self._place(row)), self._text(row)) for row in self.some()]
        self.patches.value = patches_html(parts)

    def some(self) -> list:
        """Up to `PATCHES` of the chosen rows, from the smallest error to the largest."""
        order = self.rows[np.argsort(self.worst[self.rows], kind="stable")]
        if len(order):
            order = order[np.unique(np.linspace(0, len(order) - 1, PATCHES).round().astype(int))]
        return list(self.table.iloc[order].assign(row=order).itertuples())

    @staticmethod
    def _place(row) -> tuple[int, int, int]:
        return row.z, row.y, row.x

    def _text(self, row) -> str:
        return f"{row.case}\n{row.kind}\nerror {self.worst[row.row]:.2f}"

    def _hover(self, row: int | None) -> None:
        if row is not None and row < len(self.table):
            case, *place = self.table.loc[row, ["case", *PLACE]]
            self.words.value = small(f"{case}\n{self.drawn.cases[case].describe(*map(int, place))}")

    def save(self) -> Path:
        """Write the chosen voxels (all, if none is chosen) as Parquet, see `voxels_table`; the file."""
        rows = self.rows if len(self.rows) else np.arange(len(self.table))
        table = self.drawn.rows(rows, self.scatters.projection.value, self.seed)
        path = save_voxels(table, self.folder, f"{self.how}-{len(rows)}")
        self.status.value = small(f"{len(rows)} voxels written to {path}")
        return path

    @property
    def figure(self) -> Figure:
        """Scatters by kind and by error, a row a run, and below them the patches of the chosen voxels."""
        names, some = self.runs.names, self.some()[::2]
        figure = Figure(figsize=(11, 4.2 * len(names) + 1.6 * bool(some)), dpi=DPI, layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=[4.2 * len(names), 1.6]) if some else (figure, None)
        grid = upper.subplots(len(names), 2, squeeze=False)
        look = {"s": 3, "linewidths": 0, "alpha": min(1, (5000 / len(self.table)) ** 0.5)}
        kind = self.table["kind"].map(KINDS.index)
        colours, low, high = COLOURS["error"]
        for line, name in zip(grid, names, strict=True):
            places = self.points[name].T
            line[0].scatter(*places, c=np.array(KIND_COLOURS)[kind], **look)
            line[1].scatter(*places, c=self.table[f"error {name}"], cmap=colours, vmin=low, vmax=high, **look)
            for ax, what in zip(line, ("kind", "error"), strict=True):
                ax.set(xticks=[], yticks=[], xlabel=self.axes[name][0], ylabel=self.axes[name][1])
                ax.set_title(f"{name}: {what}, {len(self.table)} voxels of {len(self.drawn.cases)} cases", fontsize=9)
            upper.colorbar(ScalarMappable(cmap=colours), ax=line[1], label="error")
        for label, colour in zip(KINDS, KIND_COLOURS, strict=True):
            grid[0, 0].scatter([], [], color=colour, label=label)
        grid[0, 0].legend(fontsize=7)
        if some:
            for ax, row in zip(lower.subplots(1, len(some), squeeze=False)[0], some, strict=True):
                ax.imshow(patch(self.drawn.cases[row.case], self._place(row)))
                ax.set_title(self._text(row), fontsize=6)
                ax.set_axis_off()
        return figure

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        lists = [*self.runs.lists, self.scatters.colour, self.scatters.projection]
        controls = wrapped(*lists, self.case, self.kind, self.error, self.clear, self.keep)
        whole = beside(table(self.scatters.plots, below=340), self.scatters.legend, self.status, self.words)
        return ipywidgets.VBox([controls, whole, self.patches])
