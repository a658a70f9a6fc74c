"""A study's cases, and of one of them everything that is linked, on one screen (notebook 08)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure

from mupkg.explore.controls import TITLE_PX, beside, dropdown, small, table, wrapped
from mupkg.explore.linked import DISTANCE_COLOURMAP, DistanceMap, EmbeddingExplorer
from mupkg.explore.panels import DPI
from mupkg.explore.predictions import Cases
from mupkg.explore.voxels import NEAREST, DrawnVoxels, draw_patches, patch, patches_html
from mupkg.report.figures import colour_bar


class RunLists:
    """Two lists, A and B, from which two different runs are chosen; a single run needs no B."""

    def __init__(self, names: Sequence[str], changed: Callable[[], None]):
        width = min(330, 60 + 9 * max(map(len, names)))
        picked = dict(zip("AB", (names[0], names[-1])[: len(names)], strict=False))
        self.lists = [dropdown(letter, names, name, width) for letter, name in picked.items()]
        self._before, self._changed = self.names, changed
        for run_list in self.lists:
            run_list.observe(self._change, "value")

    @property
    def names(self) -> list[str]:
        return [run_list.value for run_list in self.lists]

    def _change(self, change: dict) -> None:
        for other in self.lists:
            if other is not change["owner"] and other.value == change["new"]:
                other.value = change["old"]  # they change places; that calls this again, with two different runs
                return
        if self.names != self._before:
            self._before = self.names
            self._changed()


class Neighbours:
    """The voxels nearest to the one that distances are measured from, in the full feature space, as small patches.

    Looked for among the drawn voxels of all cases that were opened in the workbench, for each run by itself.
    """

    def __init__(self, bench: Workbench):
        self.bench = bench
        self.words, self.chosen = [ipywidgets.HTML() for _ in bench.runs.lists], ipywidgets.HTML()

    def table(self, name: str) -> pd.DataFrame:
        """The nearest voxels of a run, the nearest first: the drawn table's columns, p, and the map's `distance`."""
        bench, distance = self.bench, self.bench.distance
        voxels = DrawnVoxels.joined([bench.drawn(case_id) for case_id in bench.opened])
        but = bench.shown.case_id, *distance.voxel
        nearest = voxels.nearest(name, distance.embedding(name), but)
        return nearest.assign(p=nearest[f"p {name}"], distance=nearest["distance"] / distance.scale[name])

    def _patches(self, name: str) -> list[tuple]:
        """The neighbours' pixels, and what stands below them."""
        patches = []
        for row in self.table(name).itertuples():
            case, place = self.bench.drawn(row.case).cases[row.case], (row.z, row.y, row.x)
            lines = [row.case, case.mark, row.kind, f"p {row.p:.2f}, d {row.distance:.2g}"]
            patches.append((patch(case, place), "\n".join(filter(None, lines))))
        return patches

    def _itself(self) -> tuple:
        """The same of the chosen voxel."""
        case, place = self.bench.shown, self.bench.distance.voxel
        said = ", ".join(f"{case.letters[name]} {heat[place]:.2f}" for name, heat in case.heat.items())
        return patch(case, place), f"{case.case_id}\n{case.mark or case.split}\n{case.kind_of(place)}\np: {said}"

    def refresh(self) -> None:
        """Look for them anew and show them."""
        bench = self.bench
        count = sum(len(bench.drawn(case_id).table) for case_id in bench.opened)
        self.chosen.value = small("neighbours of") + patches_html([self._itself()], 2)
        for words, name in zip(self.words, bench.runs.names, strict=True):
            head = bench.shown.title(name, f"nearest of {count} drawn voxels in {len(bench.opened)} open case(s)")
            words.value = small(head, f"{TITLE_PX - 2}px") + patches_html(self._patches(name), NEAREST // 2)

    @property
    def figure(self) -> Figure:
        """The chosen voxel and its neighbours, a row a run."""
        names, (pixels, text) = self.bench.runs.names, self._itself()
        figure = Figure(figsize=(1.25 * (NEAREST + 1), 2.1 * len(names)), dpi=DPI, layout="constrained")
        for line, name in zip(figure.subplots(len(names), NEAREST + 1, squeeze=False), names, strict=True):
            draw_patches(line, [(pixels, f"{name}\n{text}"), *self._patches(name)])
        return figure

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        self.refresh()
        return ipywidgets.VBox([self.chosen, *self.words])


class Workbench:
    """Case list, slices, feature space, distance map or neighbours, and numbers of two runs in one linked panel.

    A click in any picture chooses the nearest drawn voxel and measures the distances from the voxel clicked; a click
    on a point goes to its voxel. A box or a lasso chooses many.

    Args:
        study: a study folder, or `Cases` of your own.
        case_id: the case to begin with; the worst one if None.
        options: of `EmbeddingExplorer`.

    Attributes:
        cases: all cases of the study.
        shown, distance: the case shown and its distance map; others once another case or run is chosen.
        explorer: the linked views of the case shown.
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
        self.cases = Cases.of(study, configurations, seed)
        self.runs = RunLists(self.cases.names, lambda: self._show(self.shown.case_id))
        self.opened: list[str] = []
        self.neighbours = Neighbours(self)
        self.right = dropdown("show", ["distances", "neighbours"], "distances", 150)
        self.right.observe(lambda _: self._lay_out(), "value")
        self.case = ipywidgets.Dropdown(description="case", style={"description_width": "initial"})
        self.case.observe(lambda change: self._show(change["new"]), "value")
        self.shown = self.cases.open(case_id, self.runs.names)
        self.explorer = EmbeddingExplorer(self.shown, seed=seed, **options)
        self.explorer.went = self._go
        self._drawn = {(self.shown.case_id, *self.runs.names): self.explorer.drawn}
        self._link()
        self._list_cases()

    def _show(self, case_id: str) -> None:
        if self._listing:
            return
        try:
            case, drawn = self.cases.open(case_id, self.runs.names), self.drawn(case_id)
        except ValueError as error:  # where nobody reads a traceback
            self.explorer.say(str(error))
        else:
            self.shown = case
            self.explorer.open(case, drawn)
            self._link()
        self._list_cases()

    def _list_cases(self) -> None:
        self._listing = True  # new options choose the first one for a moment
        lines = self.cases.listed(self.runs.names)
        self.case.options, self.case.value = lines, self.shown.case_id
        self.case.layout.width = f"{75 + 7 * max(len(line) for line, _ in lines)}px"
        self._listing = False

    def _link(self) -> None:
        """Tie the views of the case shown together, and put them into their places."""
        explorer, case = self.explorer, self.shown
        self.opened += [] if case.case_id in self.opened else [case.case_id]
        self.distance = DistanceMap(case, scale=explorer.numbers["mean d(a, n)"])
        self.panels = explorer.view.panel, self.distance.panel
        for panel in self.panels:
            panel.chosen, panel.describe, panel.words = self._chosen, self.distance.describe, explorer.words
        if "widget" in self.__dict__:
            self._fill()

    def drawn(self, case_id: str) -> DrawnVoxels:
        """The voxels drawn from a case, as the two runs see them."""
        key = case_id, *self.runs.names
        if key not in self._drawn:
            case = self.cases.open(case_id, self.runs.names)
            self._drawn[key] = DrawnVoxels.of_case(case, **self.explorer.of_voxels)
        return self._drawn[key]

    def _chosen(self, voxels: Int[np.ndarray, "n 2"]) -> None:
        self.explorer.choose_in_slice(voxels)
        if len(voxels) == 1:
            self._go((self.explorer.slice.value, *voxels[0]))

    def _go(self, voxel: Sequence[int]) -> None:
        self.distance.measure_from(voxel)
        if self.right.value == "neighbours" or "widget" in self.neighbours.__dict__:
            self.neighbours.refresh()

    @property
    def figure(self) -> Figure:
        """Slices, feature space and distance map, a row a run."""
        return self.explorer.figure_with(self.distance.panel)

    # Alive: scatters stay in the page when the case changes, because the browser makes them slowly

    def _fill(self) -> None:
        explorer = self.explorer
        for places, panel in zip(self._places, self.panels, strict=True):
            for place, picture in zip(places, panel.pictures, strict=True):
                place.children = [picture]
        self._controls.children = [self.case, *self.runs.lists, *explorer.controls, self.right]
        texts = explorer.status, explorer.words, explorer.measured, self._near[-1]
        self._texts.children = [self.panels[0].legend, explorer.legend, self._distance_legend, *texts]
        self._lay_out()

    def _lay_out(self) -> None:
        """Neighbours take the place of slices and distance maps where they are asked for."""
        near = self.right.value == "neighbours"
        if near:
            self.neighbours.refresh()
        for place in (place for places in self._places for place in places):
            place.layout.display = "none" if near else "flex"
        for place in self._near:
            place.layout.display = "flex" if near else "none"

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        self._places = [[ipywidgets.VBox() for _ in self.runs.lists] for _ in self.panels]
        self._controls = wrapped()
        self._distance_legend = ipywidgets.HTML(small(colour_bar(DISTANCE_COLOURMAP, *self.distance.panel.meaning)))
        slices, distances = self._places
        grid = table(*zip(slices, self.explorer.plots, distances, strict=True))
        self._near = [ipywidgets.VBox([words]) for words in (*self.neighbours.words, self.neighbours.chosen)]
        for row, words in zip(grid.children, self._near[:-1], strict=True):
            words.layout.flex, words.layout.min_width = "2 1 0", "0"
            row.children = [*row.children, words]
        whole = beside(grid)
        self._texts = whole.children[1]
        self._fill()
        return ipywidgets.VBox([self._controls, whole])
