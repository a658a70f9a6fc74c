"""A study's cases, and of one of them everything that is linked, on one screen (notebook 08)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mupkg.explore.controls import TITLE_PX, RunLists, beside, dropdown, small, table, wrapped
from mupkg.explore.panels import DPI, CaseViewer, DistanceMap
from mupkg.explore.predictions import CasePredictions, Cases
from mupkg.explore.scatters import COLOURS, VoxelExplorer
from mupkg.explore.voxels import NEAREST, PLACE, draw_patches, draw_voxels, in_order, measure, patch, patches_html
from mupkg.report.embeddings import MARGIN, Projection
from mupkg.report.figures import CHOSEN, colour_bar
from mupkg.stages.voxels import KINDS

CELLS = {"selector": "th, td", "props": "padding: 0 0.7em 0 0; text-align: right; font-size: 12px; line-height: 16px"}


class EmbeddingExplorer(VoxelExplorer):
    """Voxels of a case in the image and in feature space, linked both ways, for several runs at once.

    The voxels are those of `draw_voxels`. A lasso in a scatter lights the voxels up in the slice; a click on a point
    goes to its slice; a click or a box in the slice lights the points up (a click: the nearest of the drawn voxels).

    Args:
        folder: where "save voxels" writes, from the repository's root. options: of `draw_voxels`: per_kind, tau.

    Attributes:
        shown, view: the case, and its slices.
        table, rows: the drawn voxels, and those that are chosen, as row numbers.
        numbers: a row a run: silhouette, Fisher ratio, share of active triplets, mean distances; measured on the
            balanced voxels, the extra hard ones left out.
    """

    def __init__(
        self,
        case: CasePredictions,
        *,
        projection: Projection = "PCA",
        margin: float = MARGIN,
        seed: int = 0,
        folder: str | Path = "outputs/explore",
        **options: Any,
    ):
        own = [name for name in COLOURS if name != "case"]
        super().__init__(own, projection=projection, seed=seed, folder=folder)
        self.options, self.margin = {"seed": seed, **options}, margin
        self.measured, self.view = ipywidgets.HTML(), CaseViewer(case, "slices")
        self.view.chosen, self.view.words = self.choose_in_slice, self.words
        self.columns = [self.view, self]  # what has a picture for each run, from left to right
        self.texts = [self.view.legend, self.legend, self.status, self.words, self.measured]
        self.open(case, draw_voxels(case, **self.options))

    def open(self, case: CasePredictions, drawn: pd.DataFrame) -> None:
        """Show another case, or other runs; projection, colour and threshold stay."""
        self.shown, self.slice = case, case.slice
        self.opened[case.case_id] = replace(case, kept={})
        if case is not self.view.case:  # which the view was made with
            self.view.open(case)
        self.numbers = measure(drawn, case.heat, self.margin, self.seed)
        rows = self.numbers.rename(index=case.letters, columns=lambda name: name.replace("mean d", "d")).T
        self.measured.value = small(case.mark) + rows.style.format("{:.2f}").set_table_styles([CELLS]).to_html()
        self.show(drawn, case.heat)
        self.slice.observe(lambda _: self.say(self.count()), "value")

    def title(self, name: str) -> str:
        return self.shown.title(name, self.axes_title(name))

    def count(self) -> str:
        z = self.index[self.rows, 0]
        chosen = (z == self.slice.value).sum()
        return f"{len(z)} voxels chosen in {len(np.unique(z))} slices, {chosen} in this one"

    def describe(self, row: int) -> str:
        return self.view.describe(*map(int, self.index[row]))

    # What is chosen

    def choose(self, rows: Int[np.ndarray, " r"], how: str = "by-code") -> None:
        """Light these voxels up in the slice and these points in every scatter; `how` names the saved file."""
        if len(rows) or len(self.view.voxels):
            self.view.light(self.index[rows])  # before the scatters, which keep the browser busy
        super().choose(rows, how)

    def choose_points(self, rows: Int[np.ndarray, " r"]) -> None:
        self.choose(rows, "point" if len(rows) == 1 else "lasso")
        if len(rows) == 1:
            self.go(self.index[rows[0]].tolist())

    def choose_in_slice(self, corners: Int[np.ndarray, "2 2"]) -> None:
        """Choose the drawn voxels between these rows and columns of the slice; of a single voxel, the nearest one."""
        z, (low, high) = self.slice.value, corners
        rows = np.flatnonzero(self.index[:, 0] == z)
        places = self.index[rows, 1:]
        if (low < high).any():
            self.choose(rows[((places >= low) & (places <= high)).all(axis=1)], f"box-slice-{z}")
            return
        steps = (places - low) * np.array(self.shown.spacing_mm[1:])
        self.choose(rows[(steps**2).sum(axis=1).argsort(kind="stable")[:1]], "point")
        self.go((z, *low))

    def go(self, voxel: Sequence[int]) -> None:
        """All views go to a voxel (z, y, x)."""
        self.slice.value = voxel[0]

    # How it looks

    @property
    def figure(self) -> Figure:
        """The pictures, a row a run, without a browser."""
        rows, columns = len(self.names), self.columns
        figure = Figure(figsize=(4.8 * len(columns), 4.4 * rows), dpi=DPI, layout="constrained")
        for column, axes in zip(columns, figure.subplots(rows, len(columns), squeeze=False).T, strict=True):
            column.paint_on(axes)
        return figure

    def paint_on(self, axes: Sequence[Axes], by: str = "kind") -> None:
        """The same, with numbers in the titles, and chosen voxels ringed."""
        super().paint_on(axes, by)
        ring = {"s": 16, "facecolors": "none", "edgecolors": CHOSEN, "linewidths": 0.6}
        for ax, name in zip(axes, self.names, strict=True):
            silhouette, fisher, active = self.numbers.loc[name].iloc[:3]
            summary = f"silhouette {silhouette:.2f}, Fisher {fisher:.2f}, active {active:.0%}"
            ax.set_title(self.shown.title(name, summary), fontsize=9)
            ax.scatter(*self.points[name][self.rows].T, label="chosen", **ring)
        axes[-1].legend(fontsize=7)

    @property
    def controls(self) -> list[ipywidgets.Widget]:
        view = self.view
        return [self.slice, view.worst, view.threshold, self.colour, self.projection, self.clear, self.keep]

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        self.grid = table(*zip(*(column.pictures for column in self.columns), strict=True))
        return ipywidgets.VBox([wrapped(*self.controls), beside(self.grid, *self.texts)])


class Neighbours:
    """The voxels nearest to the one that distances are measured from, in the full feature space, as small patches.

    Looked for among the drawn voxels of all cases that were opened in the workbench, for each run by itself.
    """

    def __init__(self, bench: Workbench):
        self.bench = bench
        self.words, self.chosen = [ipywidgets.HTML() for _ in bench.runs.lists], ipywidgets.HTML()

    def _drawn(self) -> pd.DataFrame:
        return in_order(*map(self.bench.drawn, self.bench.opened))

    def table(self, name: str) -> pd.DataFrame:
        """The nearest voxels of a run, the nearest first: the drawn table's columns, p, and the map's `distance`."""
        bench, drawn = self.bench, self._drawn()
        itself = (drawn[["case", *PLACE]] == [bench.shown.case_id, *bench.distance.voxel]).all(axis=1)
        others = drawn[~itself]
        to_it = bench.distance.to_it(name, np.stack(others[f"embedding {name}"].to_numpy()))
        return others.assign(p=others[f"p {name}"], distance=to_it).nsmallest(NEAREST, "distance")

    def _patches(self, name: str) -> list[tuple]:
        """The neighbours' pixels, and what stands below them."""
        patches = []
        for row in self.table(name).itertuples():
            case = self.bench.opened[row.case]
            lines = [row.case, case.mark, row.kind, f"p {row.p:.2f}, d {row.distance:.2g}".replace(" 0.", " .")]
            patches.append((patch(case, (row.z, row.y, row.x)), "\n".join(filter(None, lines))))
        return patches

    def _itself(self) -> tuple:
        """The same of the chosen voxel."""
        case, place = self.bench.shown, self.bench.distance.voxel
        said = ", ".join(f"{case.letters[name]} {heat[place]:.2f}" for name, heat in case.heat.items())
        return patch(case, place), f"{case.case_id}\n{case.mark or case.split}\n{KINDS[case.kind[place]]}\np: {said}"

    def refresh(self) -> None:
        """Look for them anew and show them."""
        self.chosen.value = small("neighbours of") + patches_html([self._itself()], 2)
        among = f"nearest of {len(self._drawn())} drawn voxels in {len(self.bench.opened)} open case(s)"
        for words, name in zip(self.words, self.bench.names, strict=True):
            head = small(self.bench.shown.title(name, among), f"{TITLE_PX - 2}px")
            words.value = head + patches_html(self._patches(name), NEAREST // 2)

    @property
    def figure(self) -> Figure:
        """The chosen voxel and its neighbours, a row a run."""
        names, (pixels, text) = self.bench.names, self._itself()
        figure = Figure(figsize=(1.25 * (NEAREST + 1), 2.1 * len(names)), dpi=DPI, layout="constrained")
        for line, name in zip(figure.subplots(len(names), NEAREST + 1, squeeze=False), names, strict=True):
            draw_patches(line, [(pixels, f"{name}\n{text}"), *self._patches(name)])
        return figure

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        self.refresh()
        return ipywidgets.VBox([self.chosen, *self.words])


class Workbench(EmbeddingExplorer):
    """Case list, slices, feature space, distance map or neighbours, and numbers of two runs in one linked panel.

    A click in any picture chooses the nearest drawn voxel and measures the distances from the voxel clicked; a click
    on a point goes to its voxel. A box or a lasso chooses many.

    Args:
        study: a study folder, or `Cases` of your own.
        case_id: the case to begin with; the worst one if None.
        options: of `EmbeddingExplorer`.

    Attributes:
        cases: all cases of the study.
        opened: those that were shown, by name.
        shown, view, distance: the case shown, its slices and its distance map.
        neighbours: the voxels nearest to the chosen one.
    """

    def __init__(
        self,
        study: str | Path | Cases,
        case_id: str | None = None,
        configurations: Sequence[str] | None = None,
        seed: int = 0,
        **options: Any,
    ):
        self.cases = Cases.read(study, configurations, seed)
        self.runs = RunLists(self.cases.names, lambda: self._show(self.shown.case_id))
        super().__init__(self.cases.open(case_id, self.runs.names), seed=seed, **options)
        self._drawn = {(self.shown.case_id, *self.names): self.table}
        self.distance = DistanceMap(self.shown, self.numbers["mean d(a, n)"])
        self.distance.chosen, self.distance.words = self.choose_in_slice, self.words
        self.view.describe = self.distance.describe
        self.neighbours = Neighbours(self)
        self._near = [ipywidgets.VBox([words]) for words in (*self.neighbours.words, self.neighbours.chosen)]
        self.columns.append(self.distance)
        bar = ipywidgets.HTML(small(colour_bar(self.distance.colours, *self.distance.meaning)))
        self.texts = [*self.texts[:2], bar, *self.texts[2:], self._near[-1]]
        self.right = dropdown("show", ["distances", "neighbours"], "distances", 150)
        self.right.observe(lambda _: self._lay_out(), "value")
        self.case = ipywidgets.Dropdown(description="case", style={"description_width": "initial"})
        self.case.observe(lambda change: self._show(change["new"]), "value")
        self._list_cases()

    def _show(self, case_id: str) -> None:
        if self._listing:
            return
        try:
            case, drawn = self.cases.open(case_id, self.runs.names), self.drawn(case_id)
        except ValueError as error:  # where nobody reads a traceback
            self.say(str(error))
        else:
            self.open(case, drawn)
            self.distance.open(case, self.numbers["mean d(a, n)"])
            if "widget" in self.__dict__:
                self.widget.children[0].children = self.controls
                self._lay_out()
        self._list_cases()

    def _list_cases(self) -> None:
        self._listing = True  # new options choose the first one for a moment
        lines = self.cases.listed(self.runs.names)
        self.case.options, self.case.value = lines, self.shown.case_id
        self.case.layout.width = f"{75 + 7 * max(len(line) for line, _ in lines)}px"
        self._listing = False

    def drawn(self, case_id: str) -> pd.DataFrame:
        """The voxels drawn from a case, as the two runs see them."""
        key = case_id, *self.runs.names
        if key not in self._drawn:
            self._drawn[key] = draw_voxels(self.cases.open(case_id, self.runs.names), **self.options)
        return self._drawn[key]

    def go(self, voxel: Sequence[int]) -> None:
        super().go(voxel)
        self.distance.measure_from(voxel)
        if self.right.value == "neighbours" or "widget" in self.neighbours.__dict__:
            self.neighbours.refresh()

    @property
    def controls(self) -> list[ipywidgets.Widget]:
        return [self.case, *self.runs.lists, *super().controls, self.right]

    def _lay_out(self) -> None:
        """Neighbours take the place of slices and distance maps where they are asked for."""
        near = self.right.value == "neighbours"
        if near:
            self.neighbours.refresh()
        for place in (*self.view.pictures, *self.distance.pictures):
            place.layout.display = "none" if near else "flex"
        for place in self._near:
            place.layout.display = "flex" if near else "none"

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        whole = super().widget
        for row, words in zip(self.grid.children, self._near[:-1], strict=True):
            words.layout.flex, words.layout.min_width = "2 1 0", "0"
            row.children = [*row.children, words]
        self._lay_out()
        return whole
