"""Drawn voxels as linked scatters, alive in JupyterLab: what is chosen in one run's is chosen in all.

The scatters are jupyter-scatter's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.colors import ListedColormap, Normalize

from mupkg import in_lab, repository
from mupkg.explore.controls import TITLE_PX, button, dropdown, small
from mupkg.explore.predictions import few_threads
from mupkg.explore.voxels import DrawnVoxels, save_voxels
from mupkg.report import embeddings
from mupkg.report.embeddings import Projection
from mupkg.report.figures import CHOSEN, HEAT, KIND_COLOURS, colour_bar, key, pc_names
from mupkg.stages.voxels import KINDS

if TYPE_CHECKING:  # slow to import
    from jscatter import Scatter

STEPS = 256  # of a colour map
COLOURS = {  # what a scatter can show, and how: colour map, lowest and highest value; one map, one meaning
    "kind": (ListedColormap(np.repeat(KIND_COLOURS, STEPS // len(KINDS))), 0, len(KINDS)),
    "probability": (HEAT, 0, 1),
    "mm to contour": ("coolwarm", -10, 10),
    "error": ("plasma", 0, 1),
    "case": ("viridis", 0, 1),  # by its rank, the worst first
}
SCATTER = ".square-scatter > div > div[id]:not(:fullscreen)"
SQUARE = f"<style>{SCATTER}, {SCATTER} > div[id] {{height: auto !important; aspect-ratio: 1; min-width: 0}}</style>"
ALL = "all"
NO_ROWS = np.empty(0, int)


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


class VoxelExplorer(ABC):
    """Drawn voxels in a scatter for each run, to be coloured, laid out, chosen and saved.

    Args:
        runs: how many.
        colours: to choose from, of COLOURS.
        folder: where "save voxels" writes the chosen ones (all, if none is chosen), from the repository's root.

    Attributes:
        drawn, table: the voxels, see `DrawnVoxels`.
        rows: the chosen ones, as row numbers of the table.
        points, axes: where they lie in each run's plane (n, 2), and the names of its two axes.
        frames: what each scatter shows: x and y from -1 to 1, and the values that give a colour.
    """

    def __init__(
        self, runs: int, colours: Sequence[str], *, projection: Projection, seed: int, folder: str | Path
    ) -> None:
        if in_lab():
            lengthen_patience()
        offered = [m for m in get_args(Projection) if m in ("PCA", "t-SNE", projection) or find_spec("umap")]
        self.seed, self.folder = seed, repository() / folder
        self.colour = dropdown("colour", list(colours), "kind", 158)
        self.projection = dropdown("projection", offered, projection, 150)
        self.clear = button("clear", "choose no voxel", lambda: self.choose(NO_ROWS))
        self.keep = button("save voxels", "the chosen ones (all, if none is chosen), as Parquet", self.save)
        self.legend, self.status, self.words = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.titles = [ipywidgets.HTML() for _ in range(runs)]
        self.colour.observe(lambda _: self._refresh(), "value")
        self.projection.observe(lambda _: self._project(), "value")

    # What a view of one case or of many says

    @abstractmethod
    def title(self, name: str) -> str:
        """The lines above a run's scatter."""

    @abstractmethod
    def count(self) -> str:
        """How many voxels are chosen."""

    @abstractmethod
    def describe(self, row: int) -> str:
        """The voxel of a row, in a few lines."""

    def values(self, name: str) -> Mapping[str, pd.Series]:
        """What the voxels can be coloured by, as a run sees them."""
        table = self.table
        kind, distance = table["kind"].map(KINDS.index) + 0.5, table["mm to contour"]
        own = {"probability": table[f"p {name}"], "error": table[f"error {name}"]}
        return {"kind": kind, "mm to contour": distance, **own}

    # What is shown

    def say(self, text: str) -> None:
        """Show a line on the state of things."""
        self.status.value = small(text)

    def show(self, drawn: DrawnVoxels) -> None:
        """Show these voxels, of which none is chosen."""
        self.drawn, self.table = drawn, drawn.table
        self.choose(NO_ROWS)
        self._project()

    def _project(self) -> None:
        """Lay the voxels out as the list of projections says."""
        method, self.points, self.axes, self.frames = self.projection.value, {}, {}, []
        for name, sample in self.drawn.samples.items():

            def tell(part: float, name: str = name) -> None:
                self.say(f"{method} of {name}: {part:.0%}")

            with few_threads():
                points = self.points[name] = embeddings.project(sample, method, self.seed, tell)
                pca = embeddings.principal_axes(sample) if method == "PCA" else None
            self.axes[name] = pc_names(pca) if pca else [f"{method} 1", f"{method} 2"]
            low, high = points.min(axis=0), points.max(axis=0)
            x, y = (2 * (points - low) / np.maximum(high - low, 1e-12) - 1).T
            self.frames.append(pd.DataFrame({"x": x, "y": y, **self.values(name)}))
        for words, name in zip(self.titles, self.points, strict=True):
            words.value = SQUARE + small(self.title(name), f"{TITLE_PX - 2}px")
        self._refresh()
        self.say(self.count())

    def axes_title(self, name: str) -> str:
        """A run's axes in one line; of a projection whose distances mean little, that they do."""
        axes = self.axes[name]
        if not axes[0].startswith("PC "):
            return f"{axes[0][:-2]}: gaps, sizes mean nothing"
        across, up = (axis.replace(" of the variance", "") for axis in axes)
        return f"{across} →, {up} ↑"

    def _look(self) -> dict[str, Any]:
        colours, low, high = COLOURS[self.colour.value]
        return {"map": colours, "norm": Normalize(low, high, clip=True)}

    def _shown(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame[["x", "y"]].assign(value=frame[self.colour.value])

    def _refresh(self) -> None:
        by, (colours, low, high) = self.colour.value, COLOURS[self.colour.value]
        if by == "kind":
            legend = key(dict(zip(KINDS, KIND_COLOURS, strict=True)))
        else:
            name = "case, from the worst to the best" if by == "case" else by
            legend = colour_bar(colours, name, low, high)
        self.legend.value = small(f"{legend} &nbsp; {key({'chosen': CHOSEN})}")
        for scatter, frame in zip(self.__dict__.get("scatters", ()), self.frames, strict=False):
            # not animated: while points are on their way, the browser ignores a lasso and the next points
            scatter.color(**self._look()).data(self._shown(frame))
            self._mark(scatter)

    @staticmethod
    def _mark(scatter: Scatter) -> None:
        """Chosen points and the one under the mouse: one colour for each of the map, else it is not taken."""
        scatter.widget.color_selected = scatter.widget.color_hover = [CHOSEN] * STEPS

    # What is chosen

    def choose(self, rows: Int[np.ndarray, " r"], how: str = "by-code") -> None:
        """Show these rows as chosen in every scatter; `how` names the saved file."""
        self.rows, self.how = np.unique(np.asarray(rows, int)), how if len(rows) else ALL
        for scatter in self.__dict__.get("scatters", ()):
            if not np.array_equal(_rows(scatter.widget.selection), self.rows):
                scatter.widget.selection = self.rows
        self.say(self.count())

    def choose_points(self, rows: Int[np.ndarray, " r"]) -> None:
        """Somebody chose these in a scatter: by a lasso, or one by a click."""
        self.choose(rows, "lasso")

    def save(self) -> Path:
        """Write the chosen voxels (all, if none is chosen) as Parquet, see `voxels_table`; the file."""
        rows = self.rows if len(self.rows) else np.arange(len(self.table))
        table = self.drawn.rows(rows, self.projection.value, self.seed)
        path = save_voxels(table, self.folder, f"{self.how}-{len(rows)}")
        self.say(f"{len(rows)} voxels written to {path}")
        return path

    # Alive

    @cached_property
    def scatters(self) -> list[Scatter]:
        """The jupyter-scatters themselves."""
        from jscatter import Scatter

        look = {"height": 240, "width": "auto", "mouse_mode": "lasso", "x_scale": (-1.05, 1.05)}
        made = []
        for frame in self.frames:
            scatter = Scatter(data=self._shown(frame), x="x", y="y", y_scale=(-1.05, 1.05), **look)
            scatter.color(by="value", **self._look())
            scatter.opacity(unselected=1.0).axes(False).size(default=3).legend(False).tooltip(False)
            # "auto": the height follows the page, which it would not by itself
            # no performanceMode: it saves half of the time, and draws so palely that 200 000 points are hardly seen
            scatter.options(regl_scatterplot_options={"height": "auto"})
            scatter.widget.toolbar_buttons = ["pan_zoom", "lasso", "full_screen", "reset"]
            scatter.widget.selection = self.rows
            self._mark(scatter)
            scatter.widget.observe(lambda change: self._selected(_rows(change["new"])), "selection")
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
    def plots(self) -> list[ipywidgets.Widget]:
        """For each run a title above its scatter, whose canvas is square."""
        canvases = [scatter.widget.add_class("square-scatter") for scatter in self.scatters]
        return [ipywidgets.VBox(pair) for pair in zip(self.titles, canvases, strict=True)]


def _rows(selection: Any) -> Int[np.ndarray, " r"]:
    """A scatter's selection as row numbers in order; none is an empty one."""
    return NO_ROWS if selection is None else np.sort(np.asarray(selection, int))
