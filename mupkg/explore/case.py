"""A case and what its runs predict, slice by slice and in three planes."""

from __future__ import annotations

from functools import cached_property

import ipywidgets
from matplotlib.figure import Figure

from mupkg.explore.panels import SlicePanel, slider, wrapped
from mupkg.explore.seen import SeenCase


class CaseViewer:
    """A volume with truth, prediction and foreground probability, for one run or several side by side.

    Slice, opacity and the threshold at which the probability is cut move together; DSC and HD95 follow.

    Args:
        viewer: "niivue" (three planes, WebGL), "slices" (pictures) or "itkwidgets" (asks the internet; if that
            cannot work a line says why, and the default viewer is there all the same).
    """

    def __init__(self, seen: SeenCase, viewer: str = "niivue"):
        if viewer not in ("niivue", "slices", "itkwidgets"):
            raise ValueError(f"viewer must be niivue, slices or itkwidgets, not {viewer!r}")
        self.seen, self.viewer = seen, viewer
        self.panel = SlicePanel(list(seen.heat), seen.region.shape[1:], seen.spacing_mm)
        self.slice = slider("slice", seen.widest, 0, len(seen.region) - 1)
        self.opacity = slider("opacity", 0.4, 0, 1, 0.05)
        self.threshold = slider("threshold", 0.5, 0.02, 0.98, 0.02)
        self.worst = ipywidgets.Button(description="worst slice", tooltip="the one with most wrong voxels")
        self.worst.on_click(lambda _: self.jump_to_worst())
        self.volumes = None  # niivue's, once the widget is made
        self._cut()
        for control in (self.slice, self.opacity):
            control.observe(lambda _: self.draw(), "value")
        self.threshold.observe(lambda _: self._cut(), "value")

    @property
    def figure(self) -> Figure:
        return self.panel.figure

    def jump_to_worst(self) -> None:
        self.slice.value = self.seen.worst_slice(self.threshold.value)

    def _cut(self) -> None:
        self.scores = self.seen.scores(self.threshold.value)
        self.draw()

    def draw(self) -> None:
        z, heats = self.slice.value, self.seen.heat.values()
        self.panel.draw(
            self.seen.region[z],
            [heat[z] for heat in heats],
            opacity=self.opacity.value,
            truth=self.seen.truth[z],
            predictions=[heat[z] > self.threshold.value for heat in heats],
            titles=[f"{n}\nDSC {r.DSC:.3f}, HD95 {r.HD95:.1f} mm" for n, r in self.scores.iterrows()],
        )
        if self.volumes is not None:
            self.volumes.show(z, self.opacity.value, self.threshold.value)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        controls = wrapped(self.slice, self.opacity, self.threshold, self.worst)
        parts = [controls, self.panel.widget]
        if self.viewer != "slices":
            from mupkg.explore.volumes import NiivueViewer

            self.volumes = NiivueViewer(self.seen, moved=lambda z: setattr(self.slice, "value", z))
            parts.append(self.volumes.widget)
            self.draw()
        return ipywidgets.VBox(parts)
