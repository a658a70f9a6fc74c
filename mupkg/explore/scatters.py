"""Drawn voxels as linked scatters, alive in JupyterLab: what is chosen in one run's is chosen in all.

The scatters are jupyter-scatter's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from mupkg import in_lab, repository
from mupkg.explore import voxels
from mupkg.explore.controls import TITLE_PX, RunLists, beside, button, dropdown, small, table, wrapped
from mupkg.explore.panels import DPI
from mupkg.explore.predictions import Cases
from mupkg.report import embeddings
from mupkg.report.embeddings import Projection
from mupkg.report.figures import CHOSEN, HEAT, KIND_COLOURS, colour_bar, legend_html, pc_names
from mupkg.stages.voxels import KINDS

if TYPE_CHECKING:  # slow to import
    from jscatter import Scatter

STEPS = 256  # of a colour map
# What a scatter can show, and how: column of the drawn voxels, colour map, lowest and highest value
COLOURS = {
    "kind": ("number", ListedColormap(np.repeat(KIND_COLOURS, STEPS // len(KINDS))), -0.5, len(KINDS) - 0.5),
    "probability": ("p {}", HEAT, 0, 1),
    "mm to contour": ("mm to contour", "coolwarm", -10, 10),
    "error": ("error {}", "plasma", 0, 1),
    "case": ("rank", "viridis", 0, 1),  # the worst first
}
SCATTER = ".square-scatter > div > div[id]:not(:fullscreen)"
SQUARE = f"<style>{SCATTER}, {SCATTER} > div[id] {{height: auto !important; aspect-ratio: 1; min-width: 0}}</style>"
ALL = "all"
NO_ROWS = np.empty(0, int)
PATCHES = 24  # of the chosen voxels that are shown


@cache
def lengthen_patience() -> None:
    """In the browser, let widgets take two minutes to start: after two seconds anywidget gives them up for good.

    Whatever the kernel sends to a scatter that was late is then dropped: a busy machine would never show what is
    chosen. This widget is so small that it is there before the others, and it is never displayed.
    """
    from anywidget import AnyWidget

    script = """
        const timeout = AbortSignal.timeout.bind(AbortSignal);
        AbortSignal.timeout = milliseconds => timeout(milliseconds === 2000 ? 120_000 : milliseconds);
        export default {};
    """
    AnyWidget(_esm=script)


class VoxelExplorer:
    """Drawn voxels in a scatter for each run, to be coloured, laid out, chosen and saved.

    Args:
        colours: to choose from, of COLOURS.
        folder: where "save voxels" writes the chosen ones (all, if none is chosen), from the repository's root.

    Attributes:
        table, names, opened: the voxels, see `draw_voxels`, the runs, and the cases by name.
        rows: the chosen ones, as row numbers of the table.
        points, axes: where they lie in each run's plane (n, 2), and the names of its two axes.
    """

    def __init__(self, colours: Sequence[str], *, projection: Projection, seed: int, folder: str | Path) -> None:
        if in_lab():
            lengthen_patience()
        offered = [m for m in get_args(Projection) if m in ("PCA", "t-SNE", projection) or find_spec("umap")]
        self.seed, self.folder, self.opened = seed, repository() / folder, {}
        self.colour = dropdown("colour", list(colours), "kind", 158)
        self.projection = dropdown("projection", offered, projection, 150)
        self.clear = button("clear", "choose no voxel", lambda: self.choose(NO_ROWS))
        self.keep = button("save voxels", "the chosen ones (all, if none is chosen), as Parquet", self.save)
        self.legend, self.status, self.words = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.colour.observe(lambda _: self._refresh(), "value")
        self.projection.observe(lambda _: self._project(), "value")

    def title(self, name: str) -> str:
        """The lines above a run's scatter."""
        return f"{'AB'[self.names.index(name)]} · {name}\n{self.axes_title(name)}"

    def count(self) -> str:
        """How many voxels are chosen."""
        cases = self.table.iloc[self.rows]["case"].nunique()
        return f"{len(self.rows)} of {len(self.table)} voxels chosen, in {cases} of {len(self.opened)} cases"

    def describe(self, row: int) -> str:
        """The voxel of a row, in a few lines."""
        case_id = self.table["case"].iloc[row]
        return f"{case_id}\n{self.opened[case_id].describe(*self.index[row])}"

    # What is shown

    def say(self, text: str) -> None:
        """Show a line on the state of things."""
        self.status.value = small(text)

    def show(self, table: pd.DataFrame, names: Sequence[str]) -> None:
        """Show these voxels, of which none is chosen, as these runs see them; always as many runs."""
        self.table, self.names, self.index = table, list(names), table[voxels.PLACE].to_numpy()
        self.choose(NO_ROWS)
        self._project()

    def _project(self) -> None:
        """Lay the voxels out as the list of projections says."""
        method, self.points, self.axes = self.projection.value, {}, {}
        for name in self.names:

            def tell(part: float, name: str = name) -> None:
                self.say(f"{method} of {name}: {part:.0%}")

            sample = voxels.embedded(self.table, name)
            with threadpool_limits(1):
                self.points[name] = embeddings.project(sample, method, self.seed, tell)
                principal = pc_names(embeddings.principal_axes(sample)) if method == "PCA" else None
            self.axes[name] = principal or [f"{method} 1", f"{method} 2"]
        self._refresh()
        self.say(self.count())

    def axes_title(self, name: str) -> str:
        """A run's axes in one line; of a projection whose distances mean little, that they do."""
        axes = self.axes[name]
        if not axes[0].startswith("PC "):
            return f"{axes[0][:-2]}: gaps, sizes mean nothing"
        across, up = (axis.replace(" of the variance", "") for axis in axes)
        return f"{across} →, {up} ↑"

    def _refresh(self) -> None:
        by = self.colour.value
        _, colours, *ends = COLOURS[by]
        if by == "kind":
            legend = legend_html(dict(zip(KINDS, KIND_COLOURS, strict=True)))
        else:
            legend = colour_bar(colours, "case, from the worst to the best" if by == "case" else by, *ends)
        self.legend.value = small(f"{legend} &nbsp; {legend_html({'chosen': CHOSEN})}")
        for name, words in zip(self.names, self.titles, strict=True):
            words.value = SQUARE + small(self.title(name), f"{TITLE_PX - 2}px")
        for scatter, data in zip(self.__dict__.get("scatters", ()), self._data(), strict=False):
            self._update(scatter, data)

    def _update(self, scatter: Scatter, data: pd.DataFrame) -> None:
        _, colours, *ends = COLOURS[self.colour.value]
        # not animated: while points are on their way, the browser ignores a lasso and the next points
        scatter.color(map=colours, norm=Normalize(*ends, clip=True)).data(data)
        # chosen points and the one under the mouse: one colour for each of the map, else it is not taken
        scatter.widget.color_selected = scatter.widget.color_hover = [CHOSEN] * STEPS

    def _data(self) -> list[pd.DataFrame]:
        """What each scatter shows: x and y from -1 to 1, and the values that give a colour."""
        column, shown = COLOURS[self.colour.value][0], []
        for name, points in self.points.items():
            low, high = points.min(axis=0), points.max(axis=0)
            places = pd.DataFrame(2 * (points - low) / np.maximum(high - low, 1e-12) - 1, columns=["x", "y"])
            shown.append(places.assign(value=self.table[column.format(name)]))
        return shown

    def paint_on(self, axes: Sequence[Axes], by: str = "kind") -> None:
        """The points on axes of a figure, one for each run, coloured by one of COLOURS."""
        column, colours, low, high = COLOURS[by]
        look = {"s": 5, "linewidths": 0, "alpha": min(1, (5000 / len(self.table)) ** 0.5)}
        for ax, name in zip(axes, self.names, strict=True):
            values = self.table[column.format(name)]
            dots = ax.scatter(*self.points[name].T, c=values, cmap=colours, vmin=low, vmax=high, **look)
            ax.set(xticks=[], yticks=[], xlabel=self.axes[name][0], ylabel=self.axes[name][1])
        bar = axes[0].figure.colorbar(dots, ax=list(axes), label="" if by == "kind" else by, shrink=0.4)
        bar.solids.set_alpha(1)
        if by == "kind":
            bar.set_ticks(range(len(KINDS)), labels=KINDS)

    # What is chosen

    def choose(self, rows: Int[np.ndarray, " r"], how: str = "by-code") -> None:
        """Show these rows as chosen in every scatter; `how` names the saved file."""
        self.rows, self.how = np.unique(np.asarray(rows, int)), how if len(rows) else ALL
        for scatter in self.__dict__.get("scatters", ()):
            if not np.array_equal(_rows(scatter), self.rows):
                scatter.widget.selection = self.rows
        self.say(self.count())

    def choose_points(self, rows: Int[np.ndarray, " r"]) -> None:
        """Somebody chose these in a scatter: by a lasso, or one by a click."""
        self.choose(rows, "lasso")

    def save(self) -> Path:
        """Write the chosen voxels (all, if none is chosen) as Parquet, see `voxels_table`; the file."""
        rows = self.rows if len(self.rows) else np.arange(len(self.table))
        kept = voxels.rows_to_keep(self.table, rows, self.opened, self.points, self.projection.value)
        path = voxels.save_voxels(kept, self.folder, f"{self.how}-{len(rows)}")
        self.say(f"{len(rows)} voxels written to {path}")
        return path

    # Alive

    @cached_property
    def scatters(self) -> list[Scatter]:
        """The jupyter-scatters themselves."""
        from jscatter import Scatter

        look = {"y_scale": (-1.05, 1.05), "height": 240, "width": "auto", "mouse_mode": "lasso"}
        made = []
        for data in self._data():
            scatter = Scatter(data=data, x="x", y="y", color_by="value", x_scale=(-1.05, 1.05), **look)
            scatter.opacity(unselected=1.0).size(default=3).axes(False).legend(False).tooltip(False)
            # "auto": the height follows the page, which it would not by itself
            # no performanceMode: it saves half of the time, and draws so palely that 200 000 points are hardly seen
            scatter.options(regl_scatterplot_options={"height": "auto"})
            scatter.widget.toolbar_buttons = ["pan_zoom", "lasso", "full_screen", "reset"]
            scatter.widget.selection = self.rows
            self._update(scatter, data)
            scatter.widget.observe(lambda _, scatter=scatter: self._selected(_rows(scatter)), "selection")
            scatter.widget.observe(lambda change: self._hovered(change["new"]), "hovering")
            made.append(scatter)
        return made

    def _selected(self, rows: Int[np.ndarray, " r"]) -> None:
        if not np.array_equal(rows, self.rows):  # else an echo of what was shown as chosen
            self.choose_points(rows)

    def _hovered(self, row: int | None) -> None:
        if row is not None and row < len(self.table):
            self.words.value = small(self.describe(row))

    @cached_property
    def titles(self) -> list[ipywidgets.HTML]:
        return [ipywidgets.HTML() for _ in self.names]

    @cached_property
    def pictures(self) -> list[ipywidgets.Widget]:
        """For each run a title above its scatter, whose canvas is square."""
        canvases = [scatter.widget.add_class("square-scatter") for scatter in self.scatters]
        return [ipywidgets.VBox(pair) for pair in zip(self.titles, canvases, strict=True)]


class CohortExplorer(VoxelExplorer):
    """The drawn voxels of all cases of a split, a scatter a run, in planes that are fitted on all of them.

    Choose points by a lasso, or by the lists: a case, a kind, a range of errors (of either run). Some of the chosen
    voxels, spread over their errors, are shown as patches.

    Args:
        study: a study folder, or `Cases` of your own.
        options: of `draw_voxels`: per_kind, tau.

    Attributes:
        table: a row a voxel, see `draw_voxels`, and `worst`, the larger error of the two runs.
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
        super().__init__(list(COLOURS), projection=projection, seed=seed, folder=folder)
        self.cases = Cases.read(study, configurations, seed)
        self.split, self.options = split, {"seed": seed, **options}
        self.runs, self.patches = RunLists(self.cases.names, self._open), ipywidgets.HTML()
        self._open()
        self.case = dropdown("case", [ALL, *self.opened], ALL, 190)
        self.kind = dropdown("kind", [ALL, *KINDS], ALL, 180)
        self.error = ipywidgets.FloatRangeSlider(value=(0, 1), min=0, max=1, step=0.01, description="error")
        self.error.layout.width = "260px"
        for control in (self.case, self.kind, self.error):
            control.observe(lambda _: self._brush(), "value")

    def _open(self) -> None:
        names = self.runs.names
        drawn, self.opened = voxels.draw_split(self.cases, names, self.split, **self.options)
        ranked = [case for case in self.cases.worst_first(names) if case in self.opened]
        rank = drawn["case"].map(ranked.index) / max(1, len(ranked) - 1)
        self.show(drawn.assign(worst=drawn[[f"error {name}" for name in names]].max(axis=1), rank=rank), names)

    def _brush(self) -> None:
        """Choose what all three lists say."""
        low, high = self.error.value
        fits = self.table["worst"].between(low, high)
        parts = [] if (low, high) == (0, 1) else [f"error-{low:.2f}-{high:.2f}"]
        for column, control in (("case", self.case), ("kind", self.kind)):
            if control.value != ALL:
                fits &= self.table[column] == control.value
                parts.append(control.value)
        self.choose(np.flatnonzero(fits) if parts else NO_ROWS, "_".join(parts))

    def choose(self, rows: Int[np.ndarray, " r"], how: str = "by-code") -> None:
        """Show these rows as chosen in every scatter, and some of them as patches; `how` names the saved file."""
        super().choose(rows, how)
        self.patches.value = voxels.patches_html(self._some(PATCHES))

    def _some(self, count: int) -> list[tuple]:
        """Up to so many of the chosen voxels as patches with their words, from the smallest error to the largest."""
        chosen = self.table.iloc[self.rows].sort_values("worst", kind="stable")
        spread = np.unique(np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int))
        return [
            (
                voxels.patch(self.opened[row.case], (row.z, row.y, row.x)),
                f"{row.case}\n{row.kind}\nerror {row.worst:.2f}",
            )
            for row in chosen.iloc[spread].itertuples()
        ]

    @property
    def figure(self) -> Figure:
        """Scatters by kind and by error, a row a run, and below them the patches of the chosen voxels."""
        rows, some = len(self.names), self._some(PATCHES // 2)
        low = 1.6 if some else 0.01  # inches
        figure = Figure(figsize=(11, 4.2 * rows + low), dpi=DPI, layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=[4.2 * rows, low])
        for by, axes in zip(("kind", "error"), upper.subplots(rows, 2, squeeze=False).T, strict=True):
            self.paint_on(axes, by)
            for ax, name in zip(axes, self.names, strict=True):
                ax.set_title(f"{name}: {by}, {len(self.table)} voxels of {len(self.opened)} cases", fontsize=9)
        voxels.draw_patches(lower.subplots(1, PATCHES // 2), some)
        return figure

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        lists = [*self.runs.lists, self.colour, self.projection, self.case, self.kind, self.error]
        controls = wrapped(*lists, self.clear, self.keep)
        whole = beside(table(self.pictures, below=340), self.legend, self.status, self.words)
        return ipywidgets.VBox([controls, whole, self.patches])


def _rows(scatter: Scatter) -> Int[np.ndarray, " r"]:
    """A scatter's selection as row numbers in order; none is an empty one."""
    selection = scatter.widget.selection
    return NO_ROWS if selection is None else np.sort(np.asarray(selection, int))
