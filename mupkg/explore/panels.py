"""Slices that can be clicked: a case and what its runs predict, and how far its voxels are from one of them.

JupyterLab shows a view's `widget`, made when it is first asked for; its `figure` is the same without a browser.
Pillow draws the slices that follow a slider, because matplotlib would take several times as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from IPython.display import display
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from mupkg import in_lab
from mupkg.explore.controls import TITLE_PX, button, slider, small, table, wrapped
from mupkg.explore.predictions import CasePredictions
from mupkg.explore.voxels import draw_voxels, measure
from mupkg.report import figures
from mupkg.report.figures import HEAT, PREDICTION, TRUTH, format_mean

DPI = 80  # of pictures on the screen
CLICK = 0.015  # part of a picture that a hand may move in a click
NONE = np.empty((0, 2), int)  # no voxels


def show(view: Any, path: str | Path) -> None:
    """Display a view: in JupyterLab its `widget`, elsewhere its `figure`, saved under `path`."""
    display(view.widget if in_lab() else figures.save(view.figure, path))


class SlicePanel:
    """The slice that a case's slider shows, once for each network: grey values, heat, contours and lit voxels.

    Attributes:
        slice, controls: the case's slider, and what stands beside it above the pictures.
        legend, words: what the colours mean, and some lines on the voxel under the mouse.
    """

    colours = HEAT
    meaning = "probability", 0, 1  # what the heat is, its lowest and its highest value
    controls: Sequence[ipywidgets.Widget] = ()

    def __init__(self, case: CasePredictions):
        self.legend, self.words, self._pressed = ipywidgets.HTML(), ipywidgets.HTML("&nbsp;"), None
        self.open(case)

    def open(self, case: CasePredictions) -> None:
        """Show another case, of as many runs."""
        self.case, self.slice, self.shape, self.lit = case, case.slice, case.region.shape[1:], NONE

    def chosen(self, corners: Int[np.ndarray, "2 2"]) -> None:
        """Somebody drew a box: the first and the last row and column in it, which are one voxel's for a click."""

    def describe(self, z: int, y: int, x: int) -> str:
        """A voxel in a few short lines."""
        return self.case.describe(z, y, x)

    def draw(
        self,
        heats: Sequence[Float[np.ndarray, "y x"]],
        titles: Sequence[str],
        *,
        opacity: float = 0.4,
        levels: Sequence[float] = (),
        lit: Int[np.ndarray, "n 2"] = NONE,
    ) -> None:
        """Show the slice, with a heat in [0, 1] and a title for each network.

        Args:
            levels: of the heat's contours; the second one is drawn strongest. lit: rows and columns of lit voxels.
        """
        self.heats, self.titles, self.lit = heats, titles, lit
        case, z = self.case, self.slice.value
        truth = TRUTH, 3, case.truth[z].astype(np.float32), 0.5
        self.layers = []  # what `figures.slice_png` takes
        for heat in heats:
            cuts = [(PREDICTION, wide, heat, level) for wide, level in zip((1, 3, 1), levels, strict=False)]
            pixels = figures.mix(case.region[z], heat, self.colours, opacity, lit)
            self.layers.append((pixels, [truth, *cuts], case.spacing_mm))
        named = ", ".join(f"{level:g}" for level in sorted(set(levels)))
        self.contours = {"truth": TRUTH} | ({f"p = {named}": PREDICTION} if named else {})
        if "pictures" in self.__dict__:
            self._refresh()

    # As a picture

    @property
    def figure(self) -> Figure:
        """The slices side by side."""
        figure = Figure(figsize=(4.4 * len(self.heats), 4.6), layout="constrained")
        self.paint_on(figure.subplots(1, len(self.heats), squeeze=False)[0])
        figures.contour_legend(figure, self.contours)
        return figure

    def paint_on(self, axes: Sequence[Axes]) -> None:
        """The slices on axes of a figure, with a colour bar."""
        name = f"{self.case.case_id}, axial, slice {self.slice.value}"
        for ax, layer, title in zip(axes, self.layers, self.titles, strict=True):
            figures.draw_slice(ax, *layer, name=name, title=title)
        label, *ends = self.meaning
        bar = axes[0].figure.colorbar(ScalarMappable(cmap=self.colours), ax=list(axes), label=label, shrink=0.4)
        bar.set_ticks([0, 1], labels=[f"{value:g}" for value in ends])

    # Alive

    @cached_property
    def pictures(self) -> list[ipywidgets.Widget]:
        """For each network a title above its slice."""
        from ipyevents import Event

        self._images = [
            ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", margin="0")) for _ in self.heats
        ]
        self._titles, self._events = [ipywidgets.HTML() for _ in self.heats], []
        for image in self._images:
            press = Event(source=image, watched_events=["mousedown", "mouseup", "mouseleave"])
            press.prevent_default_action = True
            press.on_dom_event(self.mouse)
            move = Event(source=image, watched_events=["mousemove"], wait=100, throttle_or_debounce="throttle")
            move.on_dom_event(self.hover)
            self._events += [press, move]
        self._refresh()
        return [ipywidgets.VBox(pair) for pair in zip(self._titles, self._images, strict=True)]

    def _refresh(self) -> None:
        for image, words, layer, title in zip(self._images, self._titles, self.layers, self.titles, strict=True):
            image.value, words.value = figures.slice_png(*layer, lit=self.lit), small(title, f"{TITLE_PX - 2}px")
        bar = figures.colour_bar(self.colours, *self.meaning)
        self.legend.value = small(f"{figures.legend_html(self.contours)} &nbsp; {bar}")

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        return ipywidgets.VBox([wrapped(self.slice, *self.controls), table(self.pictures), self.legend, self.words])

    def _voxel(self, event: Mapping[str, Any]) -> np.ndarray:
        """Row and column, with fractions, of the place where an event happened."""
        part = event["relativeY"] / event["boundingRectHeight"], event["relativeX"] / event["boundingRectWidth"]
        return np.array(part) * self.shape - 0.5

    def _whole(self, places: Any) -> Int[np.ndarray, "..."]:
        return np.clip(np.round(places), 0, np.array(self.shape) - 1).astype(int)

    def hover(self, event: Mapping[str, Any]) -> None:
        """The mouse moves over a picture."""
        self.words.value = small(self.describe(self.slice.value, *map(int, self._whole(self._voxel(event)))))

    def mouse(self, event: Mapping[str, Any]) -> None:
        """A mouse button goes down or up in a picture, or the mouse leaves it."""
        start, self._pressed = self._pressed, None
        if event["type"] == "mousedown":
            self._pressed = self._voxel(event)
        elif event["type"] == "mouseup" and start is not None:
            end = self._voxel(event)
            self.choose(start, start if (np.abs(end - start) <= CLICK * np.array(self.shape)).all() else end)

    def choose(self, start: Sequence[float], end: Sequence[float]) -> None:
        """What a press at one place (row, column) and a release at another choose: a box, or a single voxel."""
        self.chosen(np.sort(self._whole([start, end]), axis=0))


class CaseViewer(SlicePanel):
    """A volume with truth, prediction and foreground probability, for one run or several side by side.

    Slice, opacity and the threshold at which the probability is cut move together; DSC and HD95 follow. The strong
    line is the prediction at the threshold, the thin ones are at probabilities of 0.25 and 0.75.

    Args:
        viewer: "niivue" (three planes, WebGL), "slices" (pictures) or "itkwidgets" (asks the internet; if that
            cannot work a line says why, and the default viewer is there all the same).
    """

    def __init__(self, case: CasePredictions, viewer: str = "niivue"):
        if viewer not in ("niivue", "slices", "itkwidgets"):
            raise ValueError(f"viewer must be niivue, slices or itkwidgets, not {viewer!r}")
        self.viewer, self.volumes = viewer, None  # niivue's, once the widget is made
        self.opacity = slider("opacity", 0.4, 0, 1, 0.05)
        self.threshold = slider("threshold", 0.5, 0.02, 0.98, 0.02)
        self.worst = button("worst slice", "the one with most wrong voxels", self.jump_to_worst)
        self.controls = self.worst, self.threshold, self.opacity
        super().__init__(case)
        self.opacity.observe(self.show_slice, "value")
        self.threshold.observe(lambda _: self._cut(), "value")

    def open(self, case: CasePredictions) -> None:
        super().open(case)
        self.voxels = np.empty((0, 3), int)
        self._cut()
        self.slice.observe(self.show_slice, "value")

    def jump_to_worst(self) -> None:
        self.slice.value = self.case.worst_slice(self.threshold.value)

    def light(self, voxels: Int[np.ndarray, "n 3"]) -> None:
        """Light up these voxels, (z, y, x), in the slices they lie in."""
        self.voxels = voxels
        self.show_slice()

    def _cut(self) -> None:
        self.scores = self.case.scores(self.threshold.value)
        self.show_slice()

    def show_slice(self, _change: dict | None = None) -> None:
        """Draw the slice as the controls say, which it observes."""
        z, threshold = self.slice.value, self.threshold.value
        self.draw(
            [heat[z] for heat in self.case.heat.values()],
            [self.case.title(name, *_in_words(row)) for name, row in self.scores.iterrows()],
            opacity=self.opacity.value,
            levels=(0.25, threshold, 0.75),
            lit=self.voxels[self.voxels[:, 0] == z, 1:],
        )
        if self.volumes is not None:
            self.volumes.show(z, self.opacity.value, threshold)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        parts = list(super().widget.children)
        if self.viewer != "slices":
            from mupkg.explore.volumes import NiivueViewer

            self.volumes = NiivueViewer(self.case)
            parts.append(self.volumes.widget)
            self.show_slice()
        return ipywidgets.VBox(parts)


def _in_words(row: pd.Series) -> tuple[str, str]:
    """A run's scores in one line, and a note where the mask has islands: HD95 is then theirs as well."""
    count = int(row["islands"])
    note = f"with {count} island{'s' if count > 1 else ''}" if count else ""
    return f"DSC {row['DSC']:.3f}, HD95 {row['HD95']:.1f} mm", note


class DistanceMap(SlicePanel):
    """How far every voxel of a slice is from one voxel in feature space, for several runs side by side.

    Squared Euclidean distances of embeddings, divided by each run's mean d(a, n) (prostate to background), because
    networks differ in scale: 1 is as far as background usually is. What is near glows over the anatomy. A click
    measures from another voxel.

    Args:
        scale: each run's mean d(a, n), from an explorer's numbers say; measured here if None.

    Attributes:
        voxel: (z, y, x) that is measured from; the middle of the prostate to begin with.
    """

    colours = "cividis"
    meaning = "distance", 1, 0

    def __init__(self, case: CasePredictions, scale: Mapping[str, float] | None = None):
        self.scale = measure(draw_voxels(case), case.heat)["mean d(a, n)"] if scale is None else scale
        super().__init__(case)

    def open(self, case: CasePredictions, scale: Mapping[str, float] | None = None) -> None:
        super().open(case)
        self.scale = dict(self.scale if scale is None else scale)
        self.slice.observe(self.show_slice, "value")
        self.measure_from((case.widest, *np.argwhere(case.truth[case.widest]).mean(axis=0).round()))

    def measure_from(self, voxel: Sequence[float]) -> None:
        """Measure from this voxel (z, y, x)."""
        self.voxel = tuple(int(i) for i in voxel)
        self.show_slice()

    def chosen(self, corners: Int[np.ndarray, "2 2"]) -> None:
        self.measure_from((self.slice.value, *corners.mean(axis=0).round()))

    def embedding(self, name: str) -> Float[np.ndarray, " e"]:
        """That of the voxel that is measured from."""
        z, *place = self.voxel
        return self.case.embedding(name, z)[tuple(place)]

    def to_it(self, name: str, embeddings: Float[np.ndarray, "*n e"]) -> Float[np.ndarray, "*n"]:
        return ((embeddings - self.embedding(name)) ** 2).sum(axis=-1) / self.scale[name]

    def distances(self) -> dict[str, Float[np.ndarray, "y x"]]:
        """For each run the scaled squared distance of every voxel of the slice to the chosen one."""
        return {name: self.to_it(name, self.case.embedding(name, self.slice.value)) for name in self.scale}

    def describe(self, z: int, y: int, x: int) -> str:
        """A voxel in five short lines, the last its distances."""
        to_it = {name: self.to_it(name, self.case.embedding(name, z)[y, x]) for name in self.scale}
        said = ", ".join(f"{self.case.letters[name]} {distance:.2f}" for name, distance in to_it.items())
        return f"{self.case.describe(z, y, x)}\ndistance: {said}"

    def show_slice(self, _change: dict | None = None) -> None:
        """Draw the distances in the slice that the slider says, which it observes."""
        z, titles, distances = self.slice.value, [], self.distances()
        for name, distance in distances.items():
            inside, outside = distance[self.case.truth[z]], distance[~self.case.truth[z]]
            titles.append(self.case.title(name, f"mean: prostate {format_mean(inside)}, rest {format_mean(outside)}"))
        near = [1 - distance.clip(0, 1) for distance in distances.values()]
        lit = np.array([self.voxel[1:]] if self.voxel[0] == z else [], int).reshape(-1, 2)
        self.draw(near, titles, opacity=0.75, lit=lit)
