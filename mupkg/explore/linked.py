"""Image and feature space of a case, linked both ways and alive in JupyterLab: embeddings and a distance map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import ipywidgets
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from mupkg.explore.case import CaseViewer
from mupkg.explore.controls import beside, small, table, wrapped
from mupkg.explore.panels import DPI, SlicePanel
from mupkg.explore.predictions import CasePredictions
from mupkg.explore.scatters import COLOURS, VoxelExplorer
from mupkg.explore.voxels import DrawnVoxels
from mupkg.report.embeddings import MARGIN, Projection
from mupkg.report.figures import CHOSEN, draw_points, mean

DISTANCE_COLOURMAP = "cividis"
CELLS = {"selector": "th, td", "props": "padding: 0 0.7em 0 0; text-align: right; font-size: 12px; line-height: 16px"}


class EmbeddingExplorer(VoxelExplorer):
    """Voxels of a case in the image and in feature space, linked both ways, for several runs at once.

    The voxels are `DrawnVoxels`. A lasso in a scatter lights the voxels up in the slice; a click on a point goes to
    its slice; a click or a box in the slice lights the points up (a click: the nearest of the drawn voxels).

    Args:
        folder: where "save voxels" writes, from the repository's root.

    Attributes:
        table, rows: the drawn voxels, and those that are chosen, as row numbers.
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
    ):
        own = [name for name in COLOURS if name != "case"]
        super().__init__(len(case.heat), own, projection=projection, seed=seed, folder=folder)
        self.of_voxels, self.margin = {"per_kind": per_kind, "tau": tau, "seed": seed}, margin
        self.went: Callable[[tuple[int, int, int]], None] = lambda voxel: None
        self.measured = ipywidgets.HTML()
        self.open(case, DrawnVoxels.of_case(case, **self.of_voxels))

    def open(self, case: CasePredictions, drawn: DrawnVoxels) -> None:
        """Show another case, or other runs; projection, colour and threshold stay."""
        threshold = {"threshold": self.view.threshold.value} if "view" in self.__dict__ else {}
        self.case, self.slice, self.names = case, case.slice, list(case.heat)
        self.view = CaseViewer(case, "slices", **threshold)
        self.view.panel.chosen, self.view.panel.words = self.choose_in_slice, self.words
        self.samples, self.index, self.numbers = drawn.samples, drawn.index, drawn.numbers(self.margin, self.seed)
        rows = self.numbers.rename(index=case.letters, columns=lambda name: name.replace("mean d", "d")).T
        self.measured.value = small(case.mark) + rows.style.format("{:.2f}").set_table_styles([CELLS]).to_html()
        self.show(drawn)
        self.slice.observe(lambda _: self.say(self.count()), "value")

    def title(self, name: str) -> str:
        return self.case.title(name, self.axes_title(name))

    def count(self) -> str:
        z = self.index[self.rows, 0]
        chosen = (z == self.slice.value).sum()
        return f"{len(z)} voxels chosen in {len(np.unique(z))} slices, {chosen} in this one"

    def describe(self, row: int) -> str:
        return self.view.panel.describe(*map(int, self.index[row]))

    # What is chosen

    def choose(self, rows: Int[np.ndarray, " r"], how: str = "by-code") -> None:
        """Light these voxels up in the slice and these points in every scatter; `how` names the saved file."""
        self.view.light(self.index[rows])  # before the scatters, which keep the browser busy
        super().choose(rows, how)

    def choose_points(self, rows: Int[np.ndarray, " r"]) -> None:
        self.choose(rows, "point" if len(rows) == 1 else "lasso")
        if len(rows) == 1:
            voxel = tuple(int(i) for i in self.index[rows[0]])
            self.slice.value = voxel[0]
            self.went(voxel)

    def choose_in_slice(self, voxels: Int[np.ndarray, "n 2"]) -> None:
        """Choose the drawn voxels among these rows and columns of the slice; of a single voxel, the nearest one."""
        z = self.slice.value
        rows = np.flatnonzero(self.index[:, 0] == z)
        places = self.index[rows, 1:]
        if len(voxels) == 1 and len(rows):
            steps = (places - voxels[0]) * np.array(self.case.spacing_mm[1:])
            self.choose(rows[[np.argmin((steps**2).sum(axis=1))]], "point")
            return
        low, high = voxels.min(axis=0), voxels.max(axis=0)
        self.choose(rows[((places >= low) & (places <= high)).all(axis=1)], f"box-slice-{z}")

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
            silhouette, fisher, active = self.numbers.loc[name].iloc[:3]
            summary = f"silhouette {silhouette:.2f}, Fisher {fisher:.2f}, active {active:.0%}"
            ax.set_title(self.case.title(name, summary), fontsize=9)
        axes[-1, 1].legend(fontsize=7, markerscale=2)
        return figure

    @property
    def controls(self) -> list[ipywidgets.Widget]:
        view = self.view
        return [self.slice, view.worst, view.threshold, self.colour, self.projection, self.clear, self.keep]

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        panel = self.view.panel
        pictures = table(*zip(panel.pictures, self.plots, strict=True))
        texts = panel.legend, self.legend, self.status, self.words, self.measured
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
            case, colours=DISTANCE_COLOURMAP, meaning=meaning, chosen=self.choose_in_slice, describe=self.describe
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

    def _to_it(self, name: str, embeddings: Float[np.ndarray, "*n e"]) -> Float[np.ndarray, "*n"]:
        return ((embeddings - self.embedding(name)) ** 2).sum(axis=-1) / self.scale[name]

    def distances(self) -> dict[str, Float[np.ndarray, "y x"]]:
        """For each run the scaled squared distance of every voxel of the slice to the chosen one."""
        z = self.slice.value
        return {name: self._to_it(name, self.case.embedding(name, z).numpy()) for name in self.scale}

    def describe(self, z: int, y: int, x: int) -> str:
        """A voxel in five short lines, the last its distances."""
        to_it = {name: self._to_it(name, self.case.embedding(name, z)[y, x].numpy()) for name in self.scale}
        said = ", ".join(f"{self.case.letters[name]} {distance:.2f}" for name, distance in to_it.items())
        return f"{self.case.describe(z, y, x)}\ndistance: {said}"

    def draw(self) -> None:
        z, titles, distances = self.slice.value, [], self.distances()
        for name, distance in distances.items():
            inside, outside = distance[self.case.truth[z]], distance[~self.case.truth[z]]
            titles.append(self.case.title(name, f"mean: prostate {mean(inside)}, rest {mean(outside)}"))
        near = [1 - distance.clip(0, 1) for distance in distances.values()]
        lit = np.array([self.voxel[1:]] if self.voxel[0] == z else [], int).reshape(-1, 2)
        self.panel.draw(near, titles, opacity=0.75, lit=lit)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        return ipywidgets.VBox([self.slice, self.panel.widget])
