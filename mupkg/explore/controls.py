"""The views' small parts: sliders, lists, buttons, texts, and how they lie on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets

TITLE_PX = 50  # pixels that a title of three lines is high


def slider(name: str, value: float, low: float, high: float, step: float | None = None):
    """A slider with the house's look: whole numbers without a step."""
    kind, more = (ipywidgets.IntSlider, {}) if step is None else (ipywidgets.FloatSlider, {"step": step})
    return kind(value=value, min=low, max=high, description=name, **more, **control(200))


def control(width: int) -> dict[str, Any]:
    """How wide a control is, in pixels, its name included."""
    return {"style": {"description_width": "initial"}, "layout": ipywidgets.Layout(width=f"{width}px")}


def dropdown(name: str, options: Sequence[Any], value: Any, width: int) -> ipywidgets.Dropdown:
    """A list to choose from; each option is a value, or a pair of what is shown and the value."""
    return ipywidgets.Dropdown(options=options, value=value, description=name, **control(width))


def button(name: str, tip: str, pressed: Callable[[], Any]) -> ipywidgets.Button:
    """A button that calls `pressed`."""
    made = ipywidgets.Button(description=name, tooltip=tip, layout=ipywidgets.Layout(width="96px"))
    made.on_click(lambda _: pressed())
    return made


def small(text: str, height: str = "auto") -> str:
    """Small text in HTML, whose lines lie close to each other."""
    look = f"line-height: 16px; height: {height}; font-size: 12px; overflow-wrap: anywhere"
    return f"<div style='{look}'>{text.replace(chr(10), '<br>')}</div>"


def picture(value: bytes) -> ipywidgets.Image:
    """A PNG at its own size, smaller where the page is narrow."""
    layout = ipywidgets.Layout(max_width="100%", height="auto", align_self="flex-start")
    return ipywidgets.Image(value=value, layout=layout)


def wrapped(*parts: ipywidgets.Widget) -> ipywidgets.Widget:
    """Widgets in a row that goes on in the next line where the page is narrow."""
    return ipywidgets.HBox(parts, layout=ipywidgets.Layout(flex_flow="row wrap"))


def table(*rows: Sequence[ipywidgets.Widget], below: int = 0) -> ipywidgets.Widget:
    """Rows of pictures, all of one width, that fit the page and the window with so many pixels `below` them."""
    high = f"((100vh - {236 + below}px) / {len(rows)} - {TITLE_PX}px)"  # without Lab's bars and the controls
    for part in (part for row in rows for part in row):
        part.layout.flex, part.layout.min_width = "1 1 0", "0"
    layout = ipywidgets.Layout(min_width="0", max_width=f"calc({len(rows[0])} * {high})")
    return ipywidgets.VBox([ipywidgets.HBox(row) for row in rows], layout=layout)


def beside(pictures: ipywidgets.Widget, *texts: ipywidgets.Widget) -> ipywidgets.Widget:
    """Pictures, and texts in a column at their right."""
    pictures.layout.flex = "1 1 0"  # of the width: where pictures lie above each other it would take all their height
    column = ipywidgets.VBox(texts, layout=ipywidgets.Layout(flex="0 0 215px", padding="0 0 0 8px"))
    return ipywidgets.HBox([pictures, column])


class RunLists:
    """Two lists, A and B, from which two different runs are chosen; a single run needs no B."""

    def __init__(self, names: Sequence[str], changed: Callable[[], None]):
        width = min(330, 60 + 9 * max(map(len, names)))
        picked = dict(zip("AB", (names[0], names[-1])[: len(names)], strict=False))
        self.lists, self._changed = [dropdown(letter, names, name, width) for letter, name in picked.items()], changed
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
        self._changed()
