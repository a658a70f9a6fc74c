"""What the interactive views are built of: a slice that can be clicked, sliders, pictures as PNG.

A view keeps its state in plain attributes and draws with matplotlib, so that the same picture is there without a
browser: `figures.save(view.figure, path)`. Its `widget`, made when it is first asked for, is what JupyterLab shows.
The widgets are libraries': ipywidgets for controls and pictures, ipyevents where a picture must report clicks. (An
ipympl canvas does that too, but took more than twice as long from a slider to the screen.)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import ipywidgets
import numpy as np
from IPython.display import display
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mupkg import in_lab
from mupkg.report.figures import PREDICTION, TRUTH, draw_contour

LIT = "cyan"
DPI = 80  # of pictures on the screen
CLICK = 4  # pixels that a hand may move in a click


class HasFigure(Protocol):
    @property
    def figure(self) -> Figure: ...


class View(HasFigure, Protocol):
    """Something to explore with."""

    @property
    def widget(self) -> ipywidgets.Widget: ...


def show(view: View) -> None:
    """Display a view's widget where it can be alive; elsewhere its picture, saved in the next cell, stands for it."""
    if in_lab():
        display(view.widget)
    else:
        print("not in JupyterLab: the picture below stands for the widget")


class SlicePanel:
    """One axial slice, once for each title: grey values, a heat over them, contours and lit voxels.

    Args:
        chosen: called with the voxels (n, 2) as rows and columns that a click or a box in the picture encloses.
    """

    def __init__(
        self,
        titles: Sequence[str],
        shape: tuple[int, int],
        spacing_mm: Sequence[float],
        *,
        colours: str = "inferno",
        chosen: Callable[[Int[np.ndarray, "n 2"]], None] | None = None,
    ):
        self.figure = Figure(figsize=(3.4 * len(titles), 3.9), dpi=DPI)
        self.shape, self.chosen, self._pressed = shape, chosen, None
        self.axes = self.figure.subplots(1, len(titles), squeeze=False)[0]
        self.figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.86, wspace=0.03)
        self._images, self.colours = [], colormaps[colours]
        for ax, title in zip(self.axes, titles, strict=True):
            empty = np.zeros((*shape, 3), np.uint8)
            self._images.append(ax.imshow(empty, aspect=spacing_mm[-2] / spacing_mm[-1]))
            ax.set_title(title, fontsize=10, y=1.0)  # a given y spares looking for one at every draw
            ax.set_axis_off()
        self._contours: list = []
        self.lit = np.zeros(shape, bool)

    def draw(
        self,
        grey: UInt8[np.ndarray, "y x"],
        heats: Sequence[Float[np.ndarray, "y x"]],
        *,
        opacity: float = 0.4,
        truth: Bool[np.ndarray, "y x"] | None = None,
        predictions: Sequence[Bool[np.ndarray, "y x"]] = (),
        lit: Int[np.ndarray, "n 2"] | None = None,
        titles: Sequence[str] | None = None,
        floor: float = 0.02,
    ) -> None:
        """Show a slice; heats in [0, 1], one for each title; where they do not exceed `floor`, grey shows."""
        for contour in self._contours:
            contour.remove()
        self._contours = []
        self.lit = np.zeros(self.shape, bool)
        if lit is not None and len(lit):
            self.lit[lit[:, 0], lit[:, 1]] = True
        base = grey[..., None].repeat(3, axis=-1) / 255
        for number, (ax, image) in enumerate(zip(self.axes, self._images, strict=True)):
            # mixed here: a single picture is drawn much sooner than three that shine through each other
            share = (opacity * (heats[number] > floor))[..., None]  # what is nearly 0 stays grey
            mixed = (1 - share) * base + share * self.colours(heats[number])[..., :3]
            mixed[self.lit] = to_rgb(LIT)
            image.set_data(np.round(255 * mixed).astype(np.uint8))
            masks = [(TRUTH, truth)] if truth is not None else []
            masks += [(PREDICTION, predictions[number])] if len(predictions) else []
            self._contours += [c for colour, mask in masks if (c := draw_contour(ax, mask, colour)) is not None]
            if titles is not None:
                ax.set_title(titles[number], fontsize=10, y=1.0)
        self.refresh()

    def refresh(self) -> None:
        """Bring what was drawn to the screen, if there is one."""
        if "widget" in self.__dict__:
            self.widget.value = png(self.figure)

    @cached_property
    def widget(self) -> ipywidgets.Image:
        shown = picture(self)
        if self.chosen is not None:
            from ipyevents import Event

            self._mouse = Event(
                source=shown, watched_events=["mousedown", "mouseup", "mouseleave"], prevent_default_action=True
            )
            self._mouse.on_dom_event(self.mouse)
        return shown

    def mouse(self, event: Mapping[str, Any]) -> None:
        """A mouse button goes down or up in the picture; places are parts of its width and height on the screen."""
        if event["type"] == "mouseleave":
            self._pressed = None
            return
        part = event["relativeX"] / event["boundingRectWidth"], 1 - event["relativeY"] / event["boundingRectHeight"]
        place = part * self.figure.bbox.size
        if event["type"] == "mousedown":
            self._pressed = next(((ax, place) for ax in self.axes if ax.bbox.contains(*place)), None)
        elif self._pressed is not None:
            ax, start = self._pressed
            self._pressed = None
            if np.abs(place - start).max() <= CLICK:
                place = start
            (x0, y0), (x1, y1) = ax.transData.inverted().transform([start, place])
            self.choose((y0, x0), (y1, x1))

    def choose(self, start: Sequence[float], end: Sequence[float]) -> None:
        """What a press at one place (row, column) and a release at another choose: a box, or a single voxel."""
        corners = np.clip(np.round([start, end]), 0, np.array(self.shape) - 1).astype(int)
        low, high = corners.min(axis=0), corners.max(axis=0) + 1
        self.chosen(np.argwhere(np.ones(high - low, bool)) + low)


def png(figure: Figure) -> bytes:
    """A figure as PNG, without touching its own canvas."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})  # soon rather than small
    return buffer.getvalue()


def slider(name: str, value: float, low: float, high: float, step: float | None = None):
    """A slider with the house's look: whole numbers without a step."""
    kind, more = (ipywidgets.IntSlider, {}) if step is None else (ipywidgets.FloatSlider, {"step": step})
    return kind(value=value, min=low, max=high, description=name, layout=ipywidgets.Layout(width="320px"), **more)


def picture(view: HasFigure) -> ipywidgets.Image:
    """A view's figure as a widget; give it a new `value` when the figure has changed."""
    width = int(view.figure.get_figwidth() * view.figure.dpi)
    layout = ipywidgets.Layout(width=f"{width}px", max_width="100%", height="auto", align_self="flex-start")
    return ipywidgets.Image(value=png(view.figure), format="png", layout=layout)


def wrapped(*controls: ipywidgets.Widget) -> ipywidgets.Widget:
    """Controls in a row that goes on in the next line where the page is narrow."""
    return ipywidgets.HBox(controls, layout=ipywidgets.Layout(flex_flow="row wrap"))


def mean(values: np.ndarray) -> str:
    """A mean in words that an empty set has too."""
    return f"{values.mean():.2f}" if len(values) else "none"
