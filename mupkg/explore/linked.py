"""Image and feature space, linked both ways and alive in JupyterLab (notebook 08): embeddings and a distance map.

The scatters are jupyter-scatter's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mupkg import repository
from mupkg.explore.case import CaseViewer
from mupkg.explore.controls import HEADS, beside, button, dropdown, small, table, wrapped
from mupkg.explore.panels import DPI, SlicePanel
from mupkg.explore.predictions import CasePredictions, few_threads
from mupkg.explore.voxels import DrawnVoxels, save_voxels
from mupkg.report import embeddings
from mupkg.report.embeddings import MARGIN, Projection
from mupkg.report.figures import CHOSEN, HEAT, KIND_COLOURS, colour_bar, draw_points, key, mean, pc_names
from mupkg.stages.voxels import KINDS

DISTANCE_COLOURMAP = "cividis"
COLOURS = {  # that a scatter can show, and how: colour map, lowest and highest value; one map, one meaning
    "kind": None,
    "probability": (HEAT, 0, 1),
    "mm to contour": ("coolwarm", -10, 10),
    "error": ("plasma", 0, 1),
    "case": ("viridis", 0, 1),  # by its rank, the worst first
}
STEPS = 256  # of a colour map
SCATTER = ".square-scatter > div > div[id]:not(:fullscreen)"
SQUARE = f"<style>{SCATTER}, {SCATTER} > div[id] {{height: auto !important; aspect-ratio: 1; min-width: 0}}</style>"
MANY = 20_000  # points: beyond, they are drawn square and opaque, which is twice as soon


class Scatters:
    """A jupyter-scatter for each run, all of the same voxels: what is chosen in one is chosen in all.

    Args:
        colours: to choose from, of COLOURS.

    Attributes:
        chosen: called with rows that somebody chose in a scatter: by a lasso, or one by a click.
        hovered: called with the row under the mouse, or None.
    """

    def __init__(self, runs: int, colours: Sequence[str], projection: Projection = "PCA"):
        offered = [m for m in get_args(Projection) if m in ("PCA", "t-SNE", projection) or find_spec("umap")]
        self.colour = dropdown("colour", list(colours), "kind", 158)
        self.projection = dropdown("projection", offered, projection, 150)
        self.legend = ipywidgets.HTML(small(self._colours()[1]))
        self.titles = [ipywidgets.HTML() for _ in range(runs)]
        self.frames: list[pd.DataFrame] = []
        self.rows = np.empty(0, int)
        self.chosen: Callable[[np.ndarray], None] = self.select
        self.hovered: Callable[[int | None], None] = lambda row: None
        self.colour.observe(lambda _: self._recolour(), "value")

    def show(self, points: Sequence[np.ndarray], values: Sequence[pd.DataFrame], titles: Sequence[str]) -> None:
        """Show these places (n, 2) in each scatter, with values to colour them by."""
        frames = []
        for places, columns in zip(points, values, strict=True):
            low, high = places.min(axis=0), places.max(axis=0)
            x, y = (2 * (places - low) / np.maximum(high - low, 1e-12) - 1).T
            frames.append(pd.DataFrame({"x": x, "y": y, **_in_unit(columns)}))
        if len(frames[0]) != len(self.frames[0] if self.frames else []):
            self.select(self.rows[:0])
        self.frames = frames
        for words, title in zip(self.titles, titles, strict=True):
            words.value = SQUARE + small(title, f"{HEADS - 2}px")
        self._refresh()

    def select(self, rows: np.ndarray) -> None:
        """Show these rows as chosen."""
        self.rows = rows
        for scatter in self.__dict__.get("scatters", ()):
            if not np.array_equal(np.sort(_rows(scatter.widget.selection)), rows):
                scatter.widget.selection = rows

    def _shown(self, frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"x": frame["x"], "y": frame["y"], "value": frame[self.colour.value]})

    def _colours(self) -> tuple[list[str], str]:
        """The chosen colour's map, in steps of equal length from 0 to 1, and its legend."""
        by = self.colour.value
        if COLOURS[by] is None:
            steps = np.repeat(KIND_COLOURS, STEPS // len(KINDS))
            return list(steps), key(dict(zip(KINDS, KIND_COLOURS, strict=True)) | {"chosen": CHOSEN})
        colours, low, high = COLOURS[by]
        name = "case, from the worst to the best" if by == "case" else by
        legend = f"{colour_bar(colours, name, low, high)} &nbsp; {key({'chosen': CHOSEN})}"
        return [to_hex(c) for c in colormaps[colours](np.linspace(0, 1, STEPS))], legend

    def _recolour(self) -> None:
        self.legend.value = small(self._colours()[1])
        for scatter in self.__dict__.get("scatters", ()):
            scatter.color(map=self._colours()[0])
        self._refresh()

    def _refresh(self) -> None:
        for scatter, frame in zip(self.__dict__.get("scatters", ()), self.frames, strict=False):
            scatter.data(self._shown(frame), animate=len(frame) < MANY)
            self._mark(scatter)

    @staticmethod
    def _mark(scatter) -> None:
        """Chosen points and the one under the mouse, one colour for each of the map, else it is not taken."""
        scatter.widget.color_selected = scatter.widget.color_hover = [CHOSEN] * STEPS

    @cached_property
    def scatters(self) -> list:
        """The jupyter-scatters themselves."""
        from jscatter import Scatter

        look = {"height": 240, "width": "auto", "mouse_mode": "lasso", "x_scale": (-1.05, 1.05)}
        made = []
        for frame in self.frames:
            scatter = Scatter(data=self._shown(frame), x="x", y="y", y_scale=(-1.05, 1.05), **look)
            scatter.color(by="value", map=self._colours()[0], norm=(0, 1))
            scatter.opacity(unselected=1.0).axes(False).size(default=3).legend(False).tooltip(False)
            # "auto": the height follows the page, which it would not by itself
            options = {"performanceMode": len(frame) > MANY, "height": "auto"}
            scatter.options(regl_scatterplot_options=options)
            scatter.widget.toolbar_buttons = ["pan_zoom", "lasso", "full_screen", "reset"]
            scatter.widget.selection = self.rows
            self._mark(scatter)
            scatter.widget.observe(lambda change: self._told(_rows(change["new"])), "selection")
            scatter.widget.observe(lambda change: self.hovered(change["new"]), "hovering")
            made.append(scatter)
        return made

    def _told(self, rows: Int[np.ndarray, " r"]) -> None:
        if not np.array_equal(np.sort(rows), self.rows):  # else an echo of what was shown as chosen
            self.chosen(rows)

    @cached_property
    def plots(self) -> list[ipywidgets.Widget]:
        """For each run a title above its scatter, whose canvas is square."""
        plots = []
        for title, scatter in zip(self.titles, self.scatters, strict=True):
            plots.append(ipywidgets.VBox([title, scatter.widget.add_class("square-scatter")]))
        return plots


def _in_unit(values: pd.DataFrame) -> pd.DataFrame:
    """Values as numbers from 0 to 1: places on their colour map."""
    columns = {}
    for by in COLOURS.keys() & set(values):
        if COLOURS[by] is None:
            columns[by] = (values[by].map(KINDS.index) + 0.5) / len(KINDS)
        else:
            low, high = COLOURS[by][1:]
            columns[by] = ((values[by] - low) / (high - low)).clip(0, 1)
    return pd.DataFrame(columns)


def _rows(selection) -> Int[np.ndarray, " r"]:
    """A scatter's selection as row numbers; none is an empty one."""
    return np.empty(0, int) if selection is None else np.asarray(selection, int)


def lay_out(
    drawn: DrawnVoxels, method: Projection, seed: int, progress: Callable[[str], None] | None = None
) -> tuple[dict[str, Float[np.ndarray, "n 2"]], dict[str, list[str]]]:
    """Each run's voxels on a plane, and the names of its two axes."""
    points, axes = {}, {}
    with few_threads():
        for name, sample in drawn.samples.items():
            tell = None if progress is None else lambda part, name=name: progress(f"{method} of {name}: {part:.0%}")
            points[name] = embeddings.project(sample, method, seed, tell)
            axes[name] = [f"{method} 1", f"{method} 2"]
            if method == "PCA":
                axes[name] = pc_names(embeddings.principal_axes(sample))
    return points, axes


def axes_title(axes: Sequence[str]) -> str:
    """The axes in one line; of a projection whose distances mean little, that they do."""
    if not axes[0].startswith("PC "):
        return f"{axes[0][:-2]}: gaps, sizes mean nothing"
    across, up = (axis.replace(" of the variance", "") for axis in axes)
    return f"{across} →, {up} ↑"


class EmbeddingExplorer:
    """Voxels of a case in the image and in feature space, linked both ways, for several runs at once.

    The voxels are `DrawnVoxels`. A lasso in a scatter lights the voxels up in the slice; a click on a point goes to
    its slice; a click or a box in the slice lights the points up (a click: the nearest of the drawn voxels).

    Args:
        folder: where "save voxels" writes the chosen ones (all, if none is chosen), from the repository's root.
        scatters: to show the voxels in; new ones if None.
        threshold: where the probability is cut to begin with.

    Attributes:
        table: that of the drawn voxels.
        rows: the chosen voxels, as row numbers of the table.
        numbers: a row a run: silhouette, Fisher ratio, share of active triplets, mean distances; measured on the
            balanced voxels, the extra hard ones left out.
        went: called with the voxel (z, y, x) of a point that was clicked.
    """

    def __init__(
        self,
        case: CasePredictions,
        *,
        per_kind: int = 300,
        tau: float = 0.1,
        projection: Projection = "PCA",
        margin: float = MARGIN,
        seed: int = 0,
        folder: str | Path = "outputs/explore",
        scatters: Scatters | None = None,
        threshold: float = 0.5,
    ):
        self.case, self.seed, self.folder, self.names = case, seed, repository() / folder, list(case.heat)
        self.drawn = DrawnVoxels.of_case(case, per_kind, tau, seed)
        self.table, self.samples, self.index = self.drawn.table, self.drawn.samples, self.drawn.index
        self.numbers = self.drawn.numbers(margin, seed)
        self.rows, self.how = np.empty(0, int), "all"
        self.view, self.slice = CaseViewer(case, "slices", threshold), case.slice
        self.view.panel.chosen, self.words = self.choose_in_slice, self.view.panel.words
        own = [name for name in COLOURS if name != "case"]
        self.scatters = scatters or Scatters(len(self.names), own, projection)
        self.scatters.chosen, self.scatters.hovered = self._choose_points, self._hover
        self.went: Callable[[tuple[int, int, int]], None] = lambda voxel: None
        self.clear = button("clear", "choose no voxel", lambda: self.choose(self.rows[:0]))
        self.keep = button("save voxels", "the chosen ones (all, if none is chosen), as Parquet", self.save)
        self.status = ipywidgets.HTML()
        self._project()
        self._count()
        if scatters is None:
            self.scatters.projection.observe(lambda _: self.project_again(), "value")
        self.slice.observe(lambda _: self._count(), "value")

    def _project(self) -> None:
        def tell(text: str) -> None:
            self.status.value = small(text)

        self.points, self.axes = lay_out(self.drawn, self.scatters.projection.value, self.seed, tell)
        titles = [self.case.title(name, axes_title(self.axes[name])) for name in self.names]
        values = [self._values(name) for name in self.names]
        self.scatters.show([self.points[name] for name in self.names], values, titles)

    def project_again(self) -> None:
        """As the list of projections says now."""
        self._project()
        self._count()

    def _values(self, name: str) -> pd.DataFrame:
        own = {"probability": self.table[f"p {name}"], "error": self.table[f"error {name}"]}
        return self.table[["kind", "mm to contour"]].assign(**own)

    def _summary(self, name: str) -> str:
        silhouette, fisher, active = self.numbers.loc[name].iloc[:3]
        return f"silhouette {silhouette:.2f}, Fisher {fisher:.2f}, active {active:.0%}"

    # What is chosen

    def choose(self, rows: Int[np.ndarray, " r"], how: str = "by-code") -> None:
        """Light these voxels up in the slice and these points in every scatter; `how` names the saved file."""
        rows = np.unique(np.asarray(rows, int))
        if np.array_equal(rows, self.rows):
            return
        self.rows, self.how = rows, how if len(rows) else "all"
        self.view.light(self.index[rows])  # before the scatters, which keep the browser busy
        self._count()
        self.scatters.select(rows)

    def _choose_points(self, rows: Int[np.ndarray, " r"]) -> None:
        self.choose(rows, "lasso")
        if len(rows) == 1:
            voxel = tuple(int(i) for i in self.index[rows[0]])
            self.how, self.slice.value = "point", voxel[0]
            self.went(voxel)

    def choose_in_slice(self, voxels: Int[np.ndarray, "n 2"]) -> None:
        """Choose the drawn voxels among these rows and columns of the slice; of a single voxel, the nearest one."""
        z = self.slice.value
        here = np.flatnonzero(self.index[:, 0] == z)
        places = self.index[here, 1:]
        if len(voxels) == 1 and len(here):
            steps = (places - voxels[0]) * np.array(self.case.spacing_mm[1:])
            self.choose(here[[np.argmin((steps**2).sum(axis=1))]], "point")
            return
        low, high = voxels.min(axis=0), voxels.max(axis=0)
        self.choose(here[((places >= low) & (places <= high)).all(axis=1)], f"box-slice-{z}")

    def save(self) -> Path:
        """Write the chosen voxels (all, if none is chosen) as Parquet, see `voxels_table`; the file."""
        rows = self.rows if len(self.rows) else np.arange(len(self.table))
        table = self.drawn.rows(rows, self.scatters.projection.value, self.seed)
        path = save_voxels(table, self.folder, f"{self.how}-{len(rows)}")
        self.status.value = small(f"{len(rows)} voxels written to {path}")
        return path

    def _count(self) -> None:
        z = self.index[self.rows, 0]
        here = (z == self.slice.value).sum()
        self.status.value = small(f"{len(z)} voxels chosen in {len(np.unique(z))} slices, {here} in this one")

    def _hover(self, row: int | None) -> None:
        if row is not None and row < len(self.index):
            self.words.value = small(self.view.panel.told(*map(int, self.index[row])))

    # How it looks

    @property
    def figure(self) -> Figure:
        """The slice and the scatters in one picture, a row a run, chosen voxels ringed."""
        return self.figure_with()

    def figure_with(self, *panels: SlicePanel) -> Figure:
        """The same, with a column for each of further panels."""
        rows, columns = len(self.names), 2 + len(panels)
        figure = Figure(figsize=(4.2 * columns, 4.4 * rows), dpi=DPI, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for panel, column in zip((self.view.panel, *panels), (0, *range(2, columns)), strict=True):
            panel.paint_on(axes[:, column])
        for ax, name in zip(axes[:, 1], self.names, strict=True):
            draw_points(ax, self.points[name], self.samples[name].kind, self.axes[name])
            ring = {"s": 16, "facecolors": "none", "edgecolors": CHOSEN, "linewidths": 0.6}
            ax.scatter(*self.points[name][self.rows].T, label="chosen", **ring)
            ax.set_title(self.case.title(name, self._summary(name)), fontsize=9)
        axes[-1, 1].legend(fontsize=7, markerscale=2)
        return figure

    @property
    def controls(self) -> list[ipywidgets.Widget]:
        view, scatters = self.view, self.scatters
        return [self.slice, view.worst, view.threshold, scatters.colour, scatters.projection, self.clear, self.keep]

    @cached_property
    def measured(self) -> ipywidgets.HTML:
        """The numbers, a column a run."""
        rows = self.numbers.rename(index=self.case.letters, columns=lambda name: name.replace("mean d", "d")).T
        look = [
            {
                "selector": "th, td",
                "props": "padding: 0 0.7em 0 0; text-align: right; font-size: 12px; line-height: 16px",
            }
        ]
        table = rows.style.format("{:.2f}").set_table_styles(look).to_html()
        return ipywidgets.HTML(small(self.case.mark) + table)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        panel = self.view.panel
        pictures = table(*zip(panel.pictures, self.scatters.plots, strict=True))
        texts = panel.legend, self.scatters.legend, self.status, self.words, self.measured
        return ipywidgets.VBox([wrapped(*self.controls), beside(pictures, *texts)])


class DistanceMap:
    """How far every voxel of a slice is from one voxel in feature space, for several runs side by side.

    Squared Euclidean distances of embeddings, divided by each run's mean d(a, n) (prostate to background), because
    networks differ in scale: 1 is as far as background usually is. What is near glows over the anatomy.

    Args:
        voxel: (z, y, x) to measure from; the middle of the prostate if None.
        scale: each run's mean d(a, n), from an explorer's numbers say; measured here if None.
    """

    def __init__(
        self,
        case: CasePredictions,
        voxel: tuple[int, int, int] | None = None,
        *,
        scale: Mapping[str, float] | None = None,
    ):
        self.case, self.slice = case, case.slice
        self.scale = dict(DrawnVoxels.of_case(case).numbers()["mean d(a, n)"] if scale is None else scale)
        if voxel is None:
            voxel = case.widest, *np.argwhere(case.truth[case.widest]).mean(axis=0).round()
        else:
            self.slice.value = voxel[0]
        meaning = "distance", 1, 0
        self.panel = SlicePanel(
            case, colours=DISTANCE_COLOURMAP, meaning=meaning, chosen=self.choose_in_slice, told=self.describe
        )
        self.slice.observe(lambda _: self.draw(), "value")
        self.measure_from(voxel)

    @property
    def figure(self) -> Figure:
        return self.panel.figure

    def measure_from(self, voxel: Sequence[float]) -> None:
        """Measure from this voxel (z, y, x)."""
        self.voxel = tuple(int(i) for i in voxel)
        self.draw()

    def choose_in_slice(self, voxels: Int[np.ndarray, "n 2"]) -> None:
        """Measure from this voxel of the slice shown; of a box, from its middle."""
        self.measure_from((self.slice.value, *voxels.mean(axis=0).round()))

    def embedding(self, name: str) -> Float[np.ndarray, " e"]:
        """That of the voxel that is measured from."""
        z, *place = self.voxel
        return self.case.embedding(name, z)[tuple(place)].numpy()

    def distances(self) -> dict[str, Float[np.ndarray, "y x"]]:
        """For each run the scaled squared distance of every voxel of the slice to the chosen one."""
        distances = {}
        for name, scale in self.scale.items():
            here = self.case.embedding(name, self.slice.value).numpy()
            distances[name] = ((here - self.embedding(name)) ** 2).sum(axis=-1) / scale
        return distances

    def describe(self, z: int, y: int, x: int) -> str:
        """A voxel in five short lines, the last its distances."""
        letters, parts = self.case.letters, []
        for name, scale in self.scale.items():
            here = self.case.embedding(name, z)[y, x].numpy()
            parts.append(f"{letters[name]} {((here - self.embedding(name)) ** 2).sum() / scale:.2f}")
        return f"{self.case.describe(z, y, x)}\ndistance: {', '.join(parts)}"

    def draw(self) -> None:
        z, titles, distances = self.slice.value, [], self.distances()
        for name, distance in distances.items():
            inside, outside = distance[self.case.truth[z]], distance[~self.case.truth[z]]
            means = f"mean: prostate {mean(inside)}, rest {mean(outside)}"
            titles.append(self.case.title(name, means))
        near = [1 - distance.clip(0, 1) for distance in distances.values()]
        lit = np.array([self.voxel[1:]] if self.voxel[0] == z else [], int).reshape(-1, 2)
        self.panel.draw(near, titles, opacity=0.75, lit=lit)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        return ipywidgets.VBox([self.slice, self.panel.widget])
