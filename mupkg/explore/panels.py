"""What the interactive views show: a slice that can be clicked, and small patches around some voxels.

JupyterLab shows a view's `widget`, made when it is first asked for; its `figure` is the same without a browser.
Pillow draws the slices that follow a slider, because matplotlib would take several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
from IPython.display import display
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from mupkg import in_lab
from mupkg.explore.controls import TITLE_PX, small, table
from mupkg.explore.predictions import CasePredictions
from mupkg.report import figures
from mupkg.report.figures import HEAT, PREDICTION, TRUTH

DPI = 80  # of pictures on the screen
CLICK = 0.015  # part of a picture that a hand may move in a click
NONE = np.empty((0, 2), int)  # no voxels


def show(view: Any, path: str | Path) -> None:
    """Display a view: in JupyterLab its `widget`, elsewhere its `figure`, saved under `path`."""
    display(view.widget if in_lab() else figures.save(view.figure, path))


class SlicePanel:
    """The slice that a case's slider shows, once for each network: grey values, heat, contours and lit voxels.

    Args:
        colours: of the heat. meaning: what the heat is, its lowest and its highest value.
        chosen: called with the voxels (n, 2), as rows and columns, that a click or a box in a picture encloses.
        describe: called with z, row and column of the voxel under the mouse; gives the lines beside the pictures.
    """

    def __init__(
        self,
        case: CasePredictions,
        *,
        colours: str = HEAT,
        meaning: tuple[str, float, float] = ("probability", 0, 1),
        chosen: Callable[[Int[np.ndarray, "n 2"]], None] | None = None,
        describe: Callable[[int, int, int], str] | None = None,
    ):
        self.case, self.colours, self.meaning = case, colours, meaning
        self.chosen, self.describe, self._pressed = chosen, describe or case.describe, None
        self.shape, self.lit = case.region.shape[1:], NONE
        self.legend, self.words = ipywidgets.HTML(), ipywidgets.HTML("&nbsp;")

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
        self.heats, self.titles, self.opacity, self.levels, self.lit = heats, titles, opacity, levels, lit
        if "pictures" in self.__dict__:
            self._refresh()

    def _layers(self) -> list[tuple]:
        """Each network's slice: its pixels, its contours and the spacing, as `figures.slice_png` takes them."""
        case, z = self.case, self.case.slice.value
        truth = TRUTH, 3, case.truth[z].astype(np.float32), 0.5
        layers = []
        for heat in self.heats:
            cuts = [(PREDICTION, wide, heat, level) for wide, level in zip((1, 3, 1), self.levels, strict=False)]
            pixels = figures.mix(case.region[z], heat, self.colours, self.opacity, self.lit)
            layers.append((pixels, [truth, *cuts], case.spacing_mm))
        return layers

    @property
    def contours(self) -> dict[str, str]:
        """The contours' names and colours."""
        cuts = ", ".join(f"{level:g}" for level in sorted(set(self.levels)))
        return {"truth": TRUTH} | ({f"p = {cuts}": PREDICTION} if cuts else {})

    # As a picture

    @property
    def figure(self) -> Figure:
        """The slices side by side, with a colour bar."""
        figure = Figure(figsize=(4.4 * len(self.heats), 4.6), layout="constrained")
        axes = figure.subplots(1, len(self.heats), squeeze=False)[0]
        self.paint_on(axes)
        name, *ends = self.meaning
        bar = figure.colorbar(ScalarMappable(cmap=self.colours), ax=list(axes), label=name, shrink=0.8)
        bar.set_ticks([0, 1], labels=[f"{value:g}" for value in ends])
        figures.contour_legend(figure, self.contours)
        return figure

    def paint_on(self, axes: Sequence[Axes]) -> None:
        """The slices on axes of a figure."""
        name = f"{self.case.case_id}, axial, slice {self.case.slice.value}"
        for ax, layer, title in zip(axes, self._layers(), self.titles, strict=True):
            figures.draw_slice(ax, *layer, name=name, title=title)

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
        for image, words, layer, title in zip(self._images, self._titles, self._layers(), self.titles, strict=True):
            image.value, words.value = figures.slice_png(*layer, lit=self.lit), small(title, f"{TITLE_PX - 2}px")
        bar = figures.colour_bar(self.colours, *self.meaning)
        self.legend.value = small(f"{figures.key(self.contours)} &nbsp; {bar}")

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        """The pictures, what their colours mean, and some lines on the voxel under the mouse."""
        return ipywidgets.VBox([table(self.pictures), self.legend, self.words])

    def _voxel(self, event: Mapping[str, Any]) -> np.ndarray:
        """Row and column, with fractions, of the place where an event happened."""
        part = event["relativeY"] / event["boundingRectHeight"], event["relativeX"] / event["boundingRectWidth"]
        return np.array(part) * self.shape - 0.5

    def _whole(self, places: Any) -> Int[np.ndarray, "..."]:
        return np.clip(np.round(places), 0, np.array(self.shape) - 1).astype(int)

    def hover(self, event: Mapping[str, Any]) -> None:
        """The mouse moves over a picture."""
        self.words.value = small(self.describe(self.case.slice.value, *map(int, self._whole(self._voxel(event)))))

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
        corners = self._whole([start, end])
        low, high = corners.min(axis=0), corners.max(axis=0) + 1
        if self.chosen is not None:
            self.chosen(np.argwhere(np.ones(high - low, bool)) + low)
