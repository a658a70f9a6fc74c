"""A case and its embeddings to explore, alive in JupyterLab (notebook 08): viewer, embeddings, distance map.

`mupkg.explore.panels` says how views are built. The scatter is jupyter-scatter's, volumes are ipyniivue's
(`mupkg.explore.volumes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import ipywidgets
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from mupkg.explore.panels import DPI, LIT, SlicePanel, mean, slider, wrapped
from mupkg.explore.seen import SeenCase
from mupkg.losses import VoxelMetricLoss, squared_distance
from mupkg.report.embeddings import EmbeddedVoxels, Projection, project, separation, triplets
from mupkg.report.figures import KIND_COLOURS, PREDICTION, TRUTH, draw_contour
from mupkg.stages.voxels import ELSEWHERE, KINDS, draw, embed_slice, embed_voxels, kinds, sample_voxels

MARGIN = VoxelMetricLoss().margin
SCATTER_EDGE = 1.05  # a little room around points that lie from -1 to 1


class EmbeddingExplorer:
    """Voxels of a case in the image and in feature space, linked both ways, for several runs at once.

    Up to `per_kind` voxels of every kind and as many hard ones (those that any run gets wrong by more than tau) are
    drawn once and shown in all runs. A lasso in a scatter lights the voxels up in the slice; a click or a box in
    the slice lights the points up (a click: the nearest of the drawn voxels).

    Attributes:
        table: a row a voxel: z, y, x, kind, "mm to contour" (negative inside), and for each run its probability
            "p <run>" and error "error <run>".
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
    ):
        self.seen, self.seed, self.names = seen, seed, list(seen.networks)
        index, kind = sample_voxels(seen.truth, per_kind, seed)
        if not len(index):
            raise ValueError(f"case {seen.case_id}: its region holds no prostate; choose another case")
        balanced = len(index)
        index, kind = self._add_hard_ones(index, kind, per_kind, tau)
        self.index = index
        self.samples = {
            name: EmbeddedVoxels(index, kind, embed_voxels(network, seen.region, index))
            for name, network in seen.networks.items()
        }
        z, y, x = index.T
        self.table = pd.DataFrame({"z": z, "y": y, "x": x, "kind": np.array(KINDS)[kind]})
        self.table["mm to contour"] = seen.signed_distance_mm()[z, y, x]
        for name, heat in seen.heat.items():
            self.table[f"p {name}"] = heat[z, y, x]
            self.table[f"error {name}"] = np.abs(heat[z, y, x] - seen.truth[z, y, x])
        fair = {n: EmbeddedVoxels(*(part[:balanced] for part in sample)) for n, sample in self.samples.items()}
        self.numbers = pd.DataFrame.from_dict(
            {n: separation(s, seed) | triplets(s, margin, seed=seed) for n, s in fair.items()}, orient="index"
        )
        self.rows = np.empty(0, int)
        self.panel = SlicePanel(self.names, seen.region.shape[1:], seen.spacing_mm, chosen=self.choose_in_slice)
        self.slice = slider("slice", seen.widest, 0, len(seen.region) - 1)
        self.slice.observe(lambda _: self.draw(), "value")
        colours = ["kind", "probability", "mm to contour", "error"]
        self.colour = ipywidgets.Dropdown(options=colours, description="colour")
        self.projection = ipywidgets.Dropdown(
            options=["PCA", "t-SNE", "UMAP"], value=projection, description="projection"
        )
        self.clear = ipywidgets.Button(description="clear")
        self.clear.on_click(lambda _: self.choose(self.rows[:0]))
        self.found = ipywidgets.HTML()
        self._project()
        self.colour.observe(lambda _: self._recolour(), "value")
        self.projection.observe(self._reproject, "value")
        self.draw()

    def _add_hard_ones(self, index, kind, count: int, tau: float):
        """Up to `count` more voxels, not drawn yet, that a run gets wrong by more than tau, in whichever slice."""
        seen, of_kind = self.seen, kinds(self.seen.truth)
        hard = np.any([np.abs(heat - seen.truth) > tau for heat in seen.heat.values()], axis=0)
        hard[tuple(index.T)] = False
        of_kind[of_kind == ELSEWHERE] = KINDS.index("far background")
        more = draw(hard, count, np.random.default_rng(self.seed))
        return np.concatenate([index, more]), np.concatenate([kind, of_kind[tuple(more.T)]])

    def _project(self) -> None:
        self.points = {n: project(s.embedding, self.projection.value, self.seed) for n, s in self.samples.items()}

    # What is chosen

    def choose(self, rows: Int[np.ndarray, " r"]) -> None:
        """Light these voxels up in the slice and these points in every scatter."""
        rows = np.unique(np.asarray(rows, int))
        if np.array_equal(rows, self.rows):
            return
        self.rows = rows
        self.draw()  # before the scatters, which keep the browser busy
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
        (top, left), (bottom, right) = voxels.min(axis=0), voxels.max(axis=0)
        row, column = places.T
        self.choose(here[(row >= top) & (row <= bottom) & (column >= left) & (column <= right)])

    @property
    def lit(self) -> Int[np.ndarray, "n 2"]:
        """Rows and columns of the chosen voxels that lie in the slice shown."""
        chosen = self.index[self.rows]
        return chosen[chosen[:, 0] == self.slice.value, 1:]

    def draw(self) -> None:
        z, lit = self.slice.value, self.lit
        self.panel.draw(
            self.seen.region[z],
            [heat[z] for heat in self.seen.heat.values()],
            truth=self.seen.truth[z],
            predictions=[heat[z] > 0.5 for heat in self.seen.heat.values()],
            lit=lit,
        )
        slices = len(np.unique(self.index[self.rows, 0]))
        self.found.value = f"{len(self.rows)} voxels chosen in {slices} slices, {len(lit)} of them in this one"

    # How it looks

    @property
    def figure(self) -> Figure:
        """The slice and the scatters in one picture, chosen voxels ringed."""
        figure = Figure(figsize=(4.2 * len(self.names), 7.6), dpi=DPI, layout="constrained")
        axes = figure.subplots(2, len(self.names), squeeze=False)
        z = self.slice.value
        for (top, bottom), name in zip(axes.T, self.names, strict=True):
            top.imshow(self.seen.region[z], cmap="gray", vmin=0, vmax=255, aspect=self._aspect)
            draw_contour(top, self.seen.truth[z], TRUTH)
            draw_contour(top, self.seen.heat[name][z] > 0.5, PREDICTION)
            top.plot(*self.lit[:, ::-1].T, "s", color=LIT, markersize=3)
            top.set_title(f"{name}, slice {z}", fontsize=10)
            top.set_axis_off()
            points, kind = self.points[name], self.samples[name].kind
            for number in reversed(range(len(KINDS))):
                some = points[kind == number]
                bottom.scatter(*some.T, s=5, c=KIND_COLOURS[number], label=KINDS[number], linewidths=0)
            ringed = points[self.rows]
            bottom.scatter(*ringed.T, s=16, facecolors="none", edgecolors="darkcyan", linewidths=0.6, label="chosen")
            row = self.numbers.loc[name]
            text = f"silhouette {row['silhouette']:.2f}, Fisher {row['Fisher ratio']:.2f}, "
            text += f"active {row['active triplets']:.1%}"
            bottom.set(xticks=[], yticks=[], xlabel=self.projection.value)
            bottom.set_title(text, fontsize=9)
        axes[1, -1].legend(fontsize=7, markerscale=2)
        return figure

    @property
    def _aspect(self) -> float:
        return self.seen.spacing_mm[1] / self.seen.spacing_mm[2]

    def _frame(self, name: str) -> pd.DataFrame:
        """What a scatter shows: coordinates from -1 to 1, and every value that points can be coloured by."""
        low, high = self.points[name].min(axis=0), self.points[name].max(axis=0)
        x, y = (2 * (self.points[name] - low) / np.maximum(high - low, 1e-12) - 1).T
        own = {"probability": self.table[f"p {name}"], "error": self.table[f"error {name}"]}
        return pd.DataFrame({"x": x, "y": y, **own, **self.table[["kind", "mm to contour"]]})

    def _colours(self) -> dict:
        chosen = self.colour.value
        if chosen == "kind":
            return {"by": chosen, "map": dict(zip(KINDS, KIND_COLOURS, strict=True))}
        if chosen == "mm to contour":
            return {"by": chosen, "map": "coolwarm", "norm": (-10, 10)}
        return {"by": chosen, "map": "plasma", "norm": (0, 1)}

    def _recolour(self) -> None:
        for scatter in self.scatters.values():
            scatter.color(**self._colours())

    def _reproject(self, change: Mapping[str, str]) -> None:
        before, self.found.value = self.found.value, f"{change['new']} of {len(self.table)} voxels ..."
        try:
            self._project()
        except ModuleNotFoundError as error:  # where nobody reads a traceback
            self.projection.unobserve(self._reproject, "value")  # the old one need not be computed again
            self.projection.value, self.found.value = change["old"], str(error)
            self.projection.observe(self._reproject, "value")
            return
        self.found.value = before
        for name, scatter in self.scatters.items():
            frame = self._frame(name)  # not `data`, which cannot keep colours by category
            edge = (-SCATTER_EDGE, SCATTER_EDGE)
            scatter.xy(frame["x"].to_numpy(), frame["y"].to_numpy(), x_scale=edge, y_scale=edge, animate=True)

    @cached_property
    def scatters(self) -> dict:
        """A jupyter-scatter for each run, by name."""
        from jscatter import Scatter

        look = {"height": 300, "width": "auto", "mouse_mode": "lasso"}
        look |= {"x_scale": (-SCATTER_EDGE, SCATTER_EDGE), "y_scale": (-SCATTER_EDGE, SCATTER_EDGE)}
        made = {}
        for name in self.names:
            scatter = Scatter(data=self._frame(name), x="x", y="y", **look)
            scatter.color(selected="black", **self._colours()).opacity(unselected=1.0)
            scatter.axes(False).size(default=3).legend(False)
            scatter.options(regl_scatterplot_options={"performanceMode": True})  # square points, twice as soon
            scatter.widget.observe(lambda change: self.choose(_rows(change["new"])), "selection")
            scatter.widget.selection = self.rows
            made[name] = scatter
        return made

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        share = ipywidgets.Layout(width=f"{100 // len(self.names)}%", min_width="280px")
        plots = [
            ipywidgets.VBox([ipywidgets.HTML(f"<b>{name}</b>"), scatter.widget], layout=share)
            for name, scatter in self.scatters.items()
        ]
        controls = wrapped(self.slice, self.colour, self.projection, self.clear)
        legend = " ".join(
            f'<span style="color:{c}">&#9679;</span> {k}' for k, c in zip(KINDS, KIND_COLOURS, strict=True)
        )
        cells = [{"selector": "th, td", "props": "padding: 0 0.8em; text-align: right"}]
        numbers = self.numbers.style.format("{:.3f}").set_table_styles(cells).to_html()
        below = ipywidgets.HTML(legend + numbers)
        return ipywidgets.VBox([controls, self.panel.widget, self.found, ipywidgets.HBox(plots), below])


def _rows(selection) -> Int[np.ndarray, " r"]:
    """A scatter's selection as row numbers; none is an empty one."""
    return np.empty(0, int) if selection is None else np.asarray(selection, int)


class DistanceMap:
    """How far every voxel of a slice is from one voxel in feature space, for several runs side by side.

    Squared Euclidean distances of embeddings, divided by each run's mean d(a, n) (prostate to background), because
    networks differ in scale: 1 is as far as background usually is. Dark is near.

    Args:
        voxel: (z, y, x) to measure from; the middle of the prostate if None.
        scale: each run's mean d(a, n), from an explorer's numbers say; measured here if None.
    """

    def __init__(
        self,
        seen: SeenCase,
        voxel: tuple[int, int, int] | None = None,
        *,
        scale: Mapping[str, float] | None = None,
        seed: int = 0,
    ):
        self.seen, self._slices = seen, {}
        if scale is None:
            index, kind = sample_voxels(seen.truth, 300, seed)
            embedded = {name: embed_voxels(network, seen.region, index) for name, network in seen.networks.items()}
            scale = {n: triplets(EmbeddedVoxels(index, kind, e))["mean d(a, n)"] for n, e in embedded.items()}
        self.scale = dict(scale)
        z = seen.widest if voxel is None else voxel[0]
        middle = np.argwhere(seen.truth[z]).mean(axis=0).round().astype(int) if voxel is None else voxel[1:]
        self.voxel = tuple(int(i) for i in middle)
        names = list(seen.networks)
        self.panel = SlicePanel(
            names, seen.region.shape[1:], seen.spacing_mm, colours="magma", chosen=self.choose_in_slice
        )
        self.slice = slider("slice", z, 0, len(seen.region) - 1)
        self.slice.observe(lambda _: self.draw(), "value")
        self.draw()

    @property
    def figure(self) -> Figure:
        return self.panel.figure

    def choose_in_slice(self, voxels: Int[np.ndarray, "n 2"]) -> None:
        """Measure from this voxel; of a box, from its middle."""
        self.voxel = tuple(int(i) for i in voxels.mean(axis=0).round())
        self.draw()

    def distances(self) -> dict[str, Float[np.ndarray, "y x"]]:
        """For each run the scaled squared distance of every voxel of the slice to the chosen one."""
        return {name: self._distance(name) for name in self.seen.networks}

    def _distance(self, name: str) -> Float[np.ndarray, "y x"]:
        z = self.slice.value
        if (name, z) not in self._slices:
            self._slices = {key: kept for key, kept in self._slices.items() if key[1] == z}  # one slice at a time
            self._slices[name, z] = torch.from_numpy(embed_slice(self.seen.networks[name], self.seen.region, z))
        embedding = self._slices[name, z]
        every = embedding.flatten(0, 1)
        flat = squared_distance(every, embedding[self.voxel].expand_as(every))
        return (flat / self.scale[name]).reshape(embedding.shape[:2]).numpy()

    def draw(self) -> None:
        z, found = self.slice.value, self.distances()
        titles = []
        for name, distance in found.items():
            inside, outside = distance[self.seen.truth[z]], distance[~self.seen.truth[z]]
            titles.append(f"{name}\nmean d: prostate {mean(inside)}, background {mean(outside)}")
        heats = [distance.clip(0, 1) for distance in found.values()]
        voxel = np.array([self.voxel])
        self.panel.draw(
            self.seen.region[z], heats, opacity=1.0, truth=self.seen.truth[z], lit=voxel, titles=titles, floor=-1.0
        )

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        return ipywidgets.VBox([self.slice, self.panel.widget])
