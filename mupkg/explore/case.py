"""A case and what its runs predict, slice by slice and in three planes."""

from __future__ import annotations

from functools import cached_property

import ipywidgets
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from mupkg.explore.panels import SlicePanel, button, slider, wrapped
from mupkg.explore.seen import SeenCase


class CaseViewer:
    """A volume with truth, prediction and foreground probability, for one run or several side by side.

    Slice, opacity and the threshold at which the probability is cut move together; DSC and HD95 follow. The strong
    line is the prediction at the threshold, the thin ones are at probabilities of 0.25 and 0.75.

    Args:
        viewer: "niivue" (three planes, WebGL), "slices" (pictures) or "itkwidgets" (asks the internet; if that
            cannot work a line says why, and the default viewer is there all the same).
    """

    def __init__(self, seen: SeenCase, viewer: str = "niivue"):
        if viewer not in ("niivue", "slices", "itkwidgets"):
            raise ValueError(f"viewer must be niivue, slices or itkwidgets, not {viewer!r}")
        self.seen, self.viewer, self.slice = seen, viewer, seen.slice
        self.panel = SlicePanel(seen)
        self.opacity = slider("opacity", 0.4, 0, 1, 0.05)
        self.threshold = slider("threshold", 0.5, 0.02, 0.98, 0.02)
        self.worst = button("worst slice", "the one with most wrong voxels", self.jump_to_worst)
        self.lit = np.empty((0, 3), int)
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

    def light(self, voxels: Int[np.ndarray, "n 3"]) -> None:
        """Light up these voxels, (z, y, x), in the slices they lie in."""
        self.lit = voxels
        self.draw()

    def _cut(self) -> None:
        self.scores = self.seen.scores(self.threshold.value)
        self.draw()

    def draw(self) -> None:
        z, threshold = self.slice.value, self.threshold.value
        self.panel.draw(
            [heat[z] for heat in self.seen.heat.values()],
            [f"{name}\nDSC {row.DSC:.3f}, HD95 {row.HD95:.1f} mm" for name, row in self.scores.iterrows()],
            opacity=self.opacity.value,
            levels=(0.25, threshold, 0.75),
            lit=self.lit[self.lit[:, 0] == z, 1:],
        )
        if self.volumes is not None:
            self.volumes.show(z, self.opacity.value, threshold)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        parts = [wrapped(self.slice, self.worst, self.threshold, self.opacity), self.panel.widget]
        if self.viewer != "slices":
            from mupkg.explore.volumes import NiivueViewer

            self.volumes = NiivueViewer(self.seen, moved=lambda z: setattr(self.slice, "value", z))
            parts.append(self.volumes.widget)
            self.draw()
        return ipywidgets.VBox(parts)
