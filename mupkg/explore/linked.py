"""Image and feature space, linked both ways and alive in JupyterLab (notebook 08): embeddings and a distance map.

`mupkg.explore.panels` says how views are built. The scatter is jupyter-scatter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from mupkg import repository
from mupkg.explore.case import CaseViewer
from mupkg.explore.panels import DPI, SlicePanel, beside, button, dropdown, small, table, wrapped
from mupkg.explore.seen import SeenCase
from mupkg.report import embeddings
from mupkg.report.embeddings import MARGIN, EmbeddedVoxels, Projection
from mupkg.report.figures import CHOSEN, KIND_COLOURS, colour_bar, draw_points, key, mean, pc_names
from mupkg.report.results import save_table
from mupkg.stages.voxels import KINDS, draw, sample_voxels

SCATTER_EDGE = 1.05  # a little room around points that lie from -1 to 1
SCATTER_HEIGHT, TOOLBAR = 240, 40  # pixels, of height and of width
NEAR = "cividis"
COLOURS = {  # that a scatter can show, and how: colour map, lowest and highest value
    "kind": None,
    "probability": ("plasma", 0, 1),
    "mm to contour": ("coolwarm", -10, 10),
    "error": ("plasma", 0, 1),
}


class EmbeddingExplorer:
    """Voxels of a case in the image and in feature space, linked both ways, for several runs at once.

    Up to `per_kind` voxels of every kind and as many hard ones (those that any run gets wrong by more than tau) are
    drawn once and shown in all runs. A lasso in a scatter lights the voxels up in the slice; a click or a box in
    the slice lights the points up (a click: the nearest of the drawn voxels).

    Args:
        folder: where "save voxels" writes `chosen_<case>.csv`, from the repository's root.

    Attributes:
        table: a row a voxel: z, y, x, kind, "mm to contour" (negative inside), and "p <run>" and "error <run>".
        rows: the chosen voxels, as row numbers of the table.
        numbers: a row a run: silhouette, Fisher ratio, share of active triplets, mean distances; measured on the
            balanced voxels, the extra hard ones left out.
    """

    def __init__(
        self,
        seen: SeenCase,
        *,
        per_kind: int = 300,
        tau: float = 0.1,
        projection: Projection = "PCA",
        margin: float = MARGIN,
        seed: int = 0,
        folder: str | Path = "outputs/explore",
    ):
        self.seen, self.seed, self.folder, self.names = seen, seed, repository() / folder, list(seen.networks)
        self.rows = np.empty(0, int)
        self._draw_voxels(per_kind, tau, margin)
        self.view, self.slice = CaseViewer(seen, "slices"), seen.slice
        self.view.panel.chosen = self.choose_in_slice
        self.colour = dropdown("colour", list(COLOURS), "kind", 170)
        there = [m for m in get_args(Projection) if m in ("PCA", "t-SNE", projection) or find_spec("umap")]
        self.projection = dropdown("projection", there, projection, 150)
        self.clear = button("clear", "choose no voxel", lambda: self.choose(self.rows[:0]))
        self.keep = button("save voxels", "the chosen ones, as CSV", self.save)
        self.found, self.legend = ipywidgets.HTML(), ipywidgets.HTML(small(self._colours()[1]))
        self.titles = {name: ipywidgets.HTML() for name in self.names}
        self._project()
        self._count()
        self.colour.observe(lambda _: self._recolour(), "value")
        self.projection.observe(lambda _: self._reproject(), "value")
        self.slice.observe(lambda _: self._count(), "value")

    def _draw_voxels(self, per_kind: int, tau: float, margin: float) -> None:
        seen = self.seen
        index, kind = sample_voxels(seen.truth, per_kind, self.seed)
        if not len(index):
            raise ValueError(f"case {seen.case_id}: its region holds no prostate; choose another case")
        balanced = len(index)
        hard = np.any([np.abs(heat - seen.truth) > tau for heat in seen.heat.values()], axis=0)
        hard[tuple(index.T)] = False  # those are there already
        index = np.concatenate([index, draw(hard, per_kind, np.random.default_rng(self.seed))])
        z, y, x = index.T
        self.index, kind = index, seen.kind[z, y, x]
        self.samples = embeddings.embed_all(seen.networks, seen.region, index, kind)
        self.table = pd.DataFrame({"z": z, "y": y, "x": x, "kind": np.array(KINDS)[kind]})
        self.table["mm to contour"] = seen.distance_mm[z, y, x]
        for name, heat in seen.heat.items():
            self.table[f"p {name}"] = heat[z, y, x]
            self.table[f"error {name}"] = np.abs(heat[z, y, x] - seen.truth[z, y, x])
        fair = {n: EmbeddedVoxels(*(part[:balanced] for part in sample)) for n, sample in self.samples.items()}
        self.numbers = embeddings.measure_all(fair, margin, self.seed)

    def _project(self) -> None:
        """Lay the voxels out on a plane for each network, and name its axes."""
        method, self.points, self.axes = self.projection.value, {}, {}
        for name, sample in self.samples.items():
            self.points[name] = embeddings.project(sample, method, self.seed)
            names = pc_names(embeddings.principal_axes(sample)) if method == "PCA" else [f"{method} 1", f"{method} 2"]
            across, up = (axis.replace(" of the variance", "") for axis in names)
            self.axes[name] = names
            self.titles[name].value = small(f"across {across}, up {up}\n{self._summary(name)}", "32px")

    def _summary(self, name: str) -> str:
        silhouette, fisher, active = self.numbers.loc[name].iloc[:3]
        return f"silhouette {silhouette:.2f}, Fisher {fisher:.2f}, active {active:.0%}"

    # What is chosen

    def choose(self, rows: Int[np.ndarray, " r"]) -> None:
        """Light these voxels up in the slice and these points in every scatter."""
        rows = np.unique(np.asarray(rows, int))
        if np.array_equal(rows, self.rows):
            return
        self.rows = rows
        self.view.light(self.index[rows])  # before the scatters, which keep the browser busy
        self._count()
        for scatter in self.__dict__.get("scatters", {}).values():
            if not np.array_equal(np.sort(_rows(scatter.widget.selection)), rows):
                scatter.widget.selection = rows

    def choose_in_slice(self, voxels: Int[np.ndarray, "n 2"]) -> None:
        """Choose the drawn voxels among these rows and columns of the slice; of a single voxel, the nearest one."""
        here = np.flatnonzero(self.index[:, 0] == self.slice.value)
        places = self.index[here, 1:]
        if len(voxels) == 1 and len(here):
            steps = (places - voxels[0]) * np.array(self.seen.spacing_mm[1:])
            self.choose(here[[np.argmin((steps**2).sum(axis=1))]])
            return
        low, high = voxels.min(axis=0), voxels.max(axis=0)
        self.choose(here[((places >= low) & (places <= high)).all(axis=1)])

    def save(self) -> Path:
        """Write the chosen rows of the table as CSV; the file."""
        path = self.folder / f"chosen_{self.seen.case_id}.csv"
        save_table(self.table.loc[self.rows], path, index=False)
        self.found.value = small(f"{len(self.rows)} voxels written to {path}")
        return path

    def _count(self) -> None:
        z = self.index[self.rows, 0]
        here = (z == self.slice.value).sum()
        self.found.value = small(f"{len(z)} voxels chosen in {len(np.unique(z))} slices, {here} of them in this one")

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
            ax.set_title(f"{name}: {self._summary(name)}", fontsize=9)
        axes[-1, 1].legend(fontsize=7, markerscale=2)
        return figure

    def _frame(self, name: str) -> pd.DataFrame:
        """What a scatter shows: coordinates from -1 to 1, and every value that points can be coloured by."""
        low, high = self.points[name].min(axis=0), self.points[name].max(axis=0)
        x, y = (2 * (self.points[name] - low) / np.maximum(high - low, 1e-12) - 1).T
        own = {"probability": self.table[f"p {name}"], "error": self.table[f"error {name}"]}
        place = self.table[["z", "y", "x"]].add_prefix("voxel ")
        return pd.DataFrame({"x": x, "y": y, **own, **self.table[["kind", "mm to contour"]], **place})

    def _colours(self) -> tuple[dict, str]:
        """The colour that is chosen as a scatter takes it, and its legend."""
        by = self.colour.value
        if COLOURS[by] is None:
            named = dict(zip(KINDS, KIND_COLOURS, strict=True))
            return {"by": by, "map": named}, key(named)
        colours, low, high = COLOURS[by]
        return {"by": by, "map": colours, "norm": (low, high)}, colour_bar(colours, by, low, high)

    def _recolour(self) -> None:
        look, legend = self._colours()
        self.legend.value = small(legend)
        for scatter in self.scatters.values():
            scatter.color(**look)

    def _reproject(self) -> None:
        before, self.found.value = self.found.value, f"{self.projection.value} of {len(self.table)} voxels ..."
        self._project()
        self.found.value = before
        for name, scatter in self.scatters.items():
            frame = self._frame(name)  # not `data`, which cannot keep colours by category
            edge = (-SCATTER_EDGE, SCATTER_EDGE)
            scatter.xy(frame["x"].to_numpy(), frame["y"].to_numpy(), x_scale=edge, y_scale=edge, animate=True)

    @cached_property
    def scatters(self) -> dict:
        """A jupyter-scatter for each run, by name."""
        from jscatter import Scatter

        look = {"height": SCATTER_HEIGHT, "width": "auto", "mouse_mode": "lasso"}
        look |= {"x_scale": (-SCATTER_EDGE, SCATTER_EDGE), "y_scale": (-SCATTER_EDGE, SCATTER_EDGE)}
        made = {}
        for name in self.names:
            scatter = Scatter(data=self._frame(name), x="x", y="y", **look)
            scatter.color(selected=CHOSEN, **self._colours()[0]).opacity(unselected=1.0)
            scatter.axes(False).size(default=3).legend(False)
            told = ["voxel z", "voxel y", "voxel x", "kind", "probability", "mm to contour"]
            scatter.tooltip(True, properties=told, histograms=False)
            scatter.options(regl_scatterplot_options={"performanceMode": True})  # square points, twice as soon
            scatter.widget.toolbar_buttons = ["pan_zoom", "lasso", "full_screen", "reset"]
            scatter.widget.observe(lambda change: self.choose(_rows(change["new"])), "selection")
            scatter.widget.selection = self.rows
            made[name] = scatter
        return made

    @property
    def controls(self) -> list[ipywidgets.Widget]:
        view = self.view
        return [self.slice, view.worst, view.threshold, self.colour, self.projection, self.clear, self.keep]

    @cached_property
    def plots(self) -> list[ipywidgets.Widget]:
        """For each run a title above its scatter."""
        return [ipywidgets.VBox([self.titles[name], scatter.widget]) for name, scatter in self.scatters.items()]

    @cached_property
    def measured(self) -> ipywidgets.HTML:
        """The numbers, a column a run."""
        cells = [{"selector": "th, td", "props": "padding: 0 0.8em 0 0; text-align: right"}]
        return ipywidgets.HTML(self.numbers.T.style.format("{:.3f}").set_table_styles(cells).to_html())

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        panel = self.view.panel
        pictures = table(*zip(panel.pictures, self.plots, strict=True), more=(0, TOOLBAR))
        texts = panel.legend, self.legend, self.found, panel.words, self.measured
        return ipywidgets.VBox([wrapped(*self.controls), beside(pictures, *texts)])


def _rows(selection) -> Int[np.ndarray, " r"]:
    """A scatter's selection as row numbers; none is an empty one."""
    return np.empty(0, int) if selection is None else np.asarray(selection, int)


class DistanceMap:
    """How far every voxel of a slice is from one voxel in feature space, for several runs side by side.

    Squared Euclidean distances of embeddings, divided by each run's mean d(a, n) (prostate to background), because
    networks differ in scale: 1 is as far as background usually is. What is near glows over the anatomy.

    Args:
        voxel: (z, y, x) to measure from; the middle of the prostate if None.
        scale: each run's mean d(a, n), from an explorer's numbers say; measured here if None.
    """

    def __init__(
        self, seen: SeenCase, voxel: tuple[int, int, int] | None = None, *, scale: Mapping[str, float] | None = None
    ):
        self.seen, self.slice = seen, seen.slice
        if scale is None:
            samples = embeddings.embed_all(seen.networks, seen.region, *sample_voxels(seen.truth, 300))
            scale = embeddings.measure_all(samples)["mean d(a, n)"]
        self.scale = dict(scale)
        if voxel is None:
            voxel = seen.widest, *np.argwhere(seen.truth[seen.widest]).mean(axis=0).round()
        else:
            self.slice.value = voxel[0]
        self.voxel = tuple(int(i) for i in voxel)
        meaning = "distance to the chosen voxel", 1, 0
        self.panel = SlicePanel(seen, colours=NEAR, meaning=meaning, chosen=self.choose_in_slice, told=self.tell)
        self.slice.observe(lambda _: self.draw(), "value")
        self.draw()

    @property
    def figure(self) -> Figure:
        return self.panel.figure

    def choose_in_slice(self, voxels: Int[np.ndarray, "n 2"]) -> None:
        """Measure from this voxel of the slice shown; of a box, from its middle."""
        self.voxel = self.slice.value, *(int(i) for i in voxels.mean(axis=0).round())
        self.draw()

    def distances(self) -> dict[str, Float[np.ndarray, "y x"]]:
        """For each run the scaled squared distance of every voxel of the slice to the chosen one."""
        (z, *place), found = self.voxel, {}
        for name, scale in self.scale.items():
            chosen = self.seen.embedding(name, z)[tuple(place)]
            squares = (self.seen.embedding(name, self.slice.value) - chosen).square().sum(dim=-1)
            found[name] = (squares / scale).numpy()
        return found

    def tell(self, z: int, y: int, x: int) -> str:
        """A voxel of the slice shown in one line, with its distances."""
        said = ", ".join(f"{name} {distance[y, x]:.2f}" for name, distance in self._shown.items())
        return f"{self.seen.describe(z, y, x)}; distance: {said}"

    def draw(self) -> None:
        z, self._shown, titles = self.slice.value, self.distances(), []
        for name, distance in self._shown.items():
            inside, outside = distance[self.seen.truth[z]], distance[~self.seen.truth[z]]
            titles.append(f"{name}, mean distance:\nprostate {mean(inside)}, background {mean(outside)}")
        near = [1 - distance.clip(0, 1) for distance in self._shown.values()]
        lit = np.array([self.voxel[1:]] if self.voxel[0] == z else [], int).reshape(-1, 2)
        self.panel.draw(near, titles, opacity=0.75, lit=lit)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        return ipywidgets.VBox([self.slice, self.panel.widget])
