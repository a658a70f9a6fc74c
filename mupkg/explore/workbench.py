"""A study's cases, and of one of them everything that is linked, on one screen (notebook 08)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from mupkg.explore.controls import HEADS, beside, dropdown, small, table, wrapped
from mupkg.explore.linked import COLOURS, DISTANCE_COLOURMAP, DistanceMap, EmbeddingExplorer, Scatters
from mupkg.explore.panels import DPI
from mupkg.explore.predictions import Cases
from mupkg.explore.voxels import PLACE, DrawnVoxels, patch, patches_html, thumbnail
from mupkg.report.figures import colour_bar

NEIGHBOURS = 10


class RunLists:
    """Two lists, A and B, from which two different runs are chosen; a single run needs no B."""

    def __init__(self, names: Sequence[str], changed):
        width = min(330, 60 + 9 * max(map(len, names)))
        picked = dict(zip("AB", (names[0], names[-1])[: len(names)], strict=False))
        self.lists = [dropdown(letter, names, name, width) for letter, name in picked.items()]
        self._before, self._changed = self.names, changed
        for run_list in self.lists:
            run_list.observe(lambda change: self._change(change), "value")

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
        bench = self.bench
        distance, voxels = bench.distance, DrawnVoxels.joined([bench.drawn(case) for case in bench.opened])
        but = bench.shown.case_id, *distance.voxel
        nearest = voxels.nearest(name, distance.embedding(name), NEIGHBOURS, but)
        return nearest.assign(p=nearest[f"p {name}"], distance=nearest["distance"] / distance.scale[name])

    def refresh(self) -> None:
        """Look for them anew and show them."""
        bench = self.bench
        case, place = bench.shown, bench.distance.voxel
        count = sum(len(bench.drawn(case_id).table) for case_id in bench.opened)
        said = [f"{case.letters[name]} {case.heat[name][place]:.2f}" for name in bench.runs.names]
        text = f"{case.case_id}\n{case.mark or case.split}\n{case.kind_of(place)}\np: {', '.join(said)}"
        self.chosen.value = small("neighbours of") + patches_html([(thumbnail(case, place), text)], 2)
        for words, name in zip(self.words, bench.runs.names, strict=True):
            parts = []
            for row in self.table(name).itertuples():
                other = bench.drawn(row.case).cases[row.case]
                parts.append((thumbnail(other, (row.z, row.y, row.x)), self._text(row)))
            head = case.title(name, f"nearest of {count} drawn voxels in {len(bench.opened)} open case(s)")
            words.value = small(head, f"{HEADS - 2}px") + patches_html(parts, NEIGHBOURS // 2)

    def _itself(self, name: str):
        case, place = self.bench.shown, self.bench.distance.voxel
        row = {"case": case.case_id, "split": case.split, "kind": case.kind_of(place), "p": case.heat[name][place]}
        return pd.Series(row | dict(zip(PLACE, place, strict=True)) | {"distance": 0.0})

    @staticmethod
    def _text(row) -> str:
        training = "\nTRAINING case" if row.split == "train" else ""
        return f"{row.case}{training}\n{row.kind}\np {row.p:.2f}, d {row.distance:.3f}"

    @property
    def figure(self) -> Figure:
        """The chosen voxel and its neighbours, a row a run."""
        names, bench = self.bench.runs.names, self.bench
        figure = Figure(figsize=(1.25 * (NEIGHBOURS + 1), 2.1 * len(names)), dpi=DPI, layout="constrained")
        grid = figure.subplots(len(names), NEIGHBOURS + 1, squeeze=False)
        for line, name in zip(grid, names, strict=True):
            rows = [self._itself(name), *self.table(name).itertuples()]
            for number, (ax, row) in enumerate(zip(line, rows, strict=False)):
                ax.imshow(patch(bench.drawn(row.case).cases[row.case], (row.z, row.y, row.x)))
                ax.set_title(("chosen\n" if not number else "") + self._text(row), fontsize=6)
            line[0].set_ylabel(name, fontsize=8)
        for ax in grid.flat:
            ax.set(xticks=[], yticks=[])
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
        shown, explorer, distance: the case shown and its linked views; others once another case or run is chosen.
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
        self.cases = study if isinstance(study, Cases) else Cases.read(study, configurations, seed)
        self.seed, self.options, self._busy = seed, options, False
        self.runs = RunLists(self.cases.names, lambda: self._show(self.shown.case_id))
        colours = [name for name in COLOURS if name != "case"]
        self.scatters = Scatters(len(self.runs.lists), colours, options.get("projection", "PCA"))
        self.scatters.projection.observe(lambda _: self.explorer.project_again(), "value")
        self.opened: list[str] = []
        self._drawn: dict[tuple, DrawnVoxels] = {}
        self.neighbours = Neighbours(self)
        self.right = dropdown("show", ["distances", "neighbours"], "distances", 150)
        self.right.observe(lambda _: self._lay_out(), "value")
        self.case = ipywidgets.Dropdown(description="case", style={"description_width": "initial"})
        self.case.observe(lambda change: self._show(change["new"]), "value")
        self._open(case_id)
        self._list_cases()

    def _show(self, case_id: str) -> None:
        if self._busy:
            return
        try:
            self._open(case_id)
        except ValueError as error:  # where nobody reads a traceback
            self.explorer.status.value = small(str(error))
        self._list_cases()

    def _list_cases(self) -> None:
        self._busy = True  # new options choose the first one for a moment
        lines = self.cases.listed(self.runs.names)
        self.case.options, self.case.value = lines, self.shown.case_id
        self.case.layout.width = f"{75 + 7 * max(len(line) for line, _ in lines)}px"
        self._busy = False

    def _open(self, case_id: str | None) -> None:
        case = self.cases.open(case_id, self.runs.names)
        more = {"threshold": self.explorer.view.threshold.value} if "explorer" in self.__dict__ else {}
        explorer = EmbeddingExplorer(case, seed=self.seed, scatters=self.scatters, **self.options, **more)
        self.shown, self.explorer = case, explorer
        self._drawn[case.case_id, tuple(self.runs.names)] = explorer.drawn
        self.opened += [] if case.case_id in self.opened else [case.case_id]
        self.distance = DistanceMap(case, scale=explorer.numbers["mean d(a, n)"])
        self.panels = explorer.view.panel, self.distance.panel
        for panel in self.panels:
            panel.chosen, panel.told, panel.words = self._chosen, self.distance.describe, explorer.words
        explorer.went = self._go
        if "widget" in self.__dict__:
            self._fill()

    def drawn(self, case_id: str) -> DrawnVoxels:
        """The voxels drawn from a case that was opened, as the two runs see them."""
        key = case_id, tuple(self.runs.names)
        if key not in self._drawn:
            kept = {name: self.options[name] for name in ("per_kind", "tau") if name in self.options}
            case = self.cases.open(case_id, self.runs.names)
            self._drawn[key] = DrawnVoxels.of_case(case, seed=self.seed, **kept)
        return self._drawn[key]

    def _chosen(self, voxels) -> None:
        self.explorer.choose_in_slice(voxels)
        if len(voxels) == 1:
            self._go((self.explorer.slice.value, *voxels[0]))

    def _go(self, voxel: Sequence[int]) -> None:
        self.distance.measure_from(voxel)
        if self.right.value == "neighbours":
            self.neighbours.refresh()

    @property
    def figure(self) -> Figure:
        """Slices, feature space and distance map, a row a run."""
        return self.explorer.figure_with(self.distance.panel)

    # Alive: scatters stay in the page when the case changes, because the browser makes them slowly

    def _fill(self) -> None:
        """Put the views of the case shown into their places."""
        explorer = self.explorer
        for places, panel in zip(self._places, self.panels, strict=True):
            for place, picture in zip(places, panel.pictures, strict=True):
                place.children = [picture]
        self._controls.children = [self.case, *self.runs.lists, *explorer.controls, self.right]
        texts = explorer.status, explorer.words, explorer.measured, self.neighbours.chosen
        legends = self.panels[0].legend, self.scatters.legend, self._distance_legend
        self._texts.children = [*legends, *texts]
        self._lay_out()

    def _lay_out(self) -> None:
        """Neighbours take the place of slices and distance maps where they are asked for."""
        near = self.right.value == "neighbours"
        if near:
            self.neighbours.refresh()
        for place in (place for places in self._places for place in places):
            place.layout.display = "none" if near else "flex"
        for words in (*self.neighbours.words, self.neighbours.chosen):
            words.layout.display = "flex" if near else "none"

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        self._places = [[ipywidgets.VBox() for _ in self.runs.lists] for _ in self.panels]
        self._controls = wrapped()
        self._distance_legend = ipywidgets.HTML(small(colour_bar(DISTANCE_COLOURMAP, *self.distance.panel.meaning)))
        slices, distances = self._places
        grid = table(*zip(slices, self.scatters.plots, distances, strict=True))
        for row, words in zip(grid.children, self.neighbours.words, strict=True):
            words.layout = ipywidgets.Layout(flex="2 1 0", min_width="0")
            row.children = [*row.children, words]
        whole = beside(grid, ipywidgets.HTML())
        self._texts = whole.children[1]
        self._fill()
        return ipywidgets.VBox([self._controls, whole])
