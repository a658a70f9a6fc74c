"""A case and what its runs predict, slice by slice and in three planes."""

from __future__ import annotations

from functools import cached_property

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure

from mupkg.explore.controls import button, slider, wrapped
from mupkg.explore.panels import SlicePanel
from mupkg.explore.predictions import CasePredictions


class CaseViewer:
    """A volume with truth, prediction and foreground probability, for one run or several side by side.

    Slice, opacity and the threshold at which the probability is cut move together; DSC and HD95 follow. The strong
    line is the prediction at the threshold, the thin ones are at probabilities of 0.25 and 0.75.

    Args:
        viewer: "niivue" (three planes, WebGL), "slices" (pictures) or "itkwidgets" (asks the internet; if that
            cannot work a line says why, and the default viewer is there all the same).
    """

    def __init__(self, case: CasePredictions, viewer: str = "niivue", threshold: float = 0.5):
        if viewer not in ("niivue", "slices", "itkwidgets"):
            raise ValueError(f"viewer must be niivue, slices or itkwidgets, not {viewer!r}")
        self.case, self.viewer, self.slice = case, viewer, case.slice
        self.panel = SlicePanel(case)
        self.opacity = slider("opacity", 0.4, 0, 1, 0.05)
        self.threshold = slider("threshold", threshold, 0.02, 0.98, 0.02)
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
        self.slice.value = self.case.worst_slice(self.threshold.value)

    def light(self, voxels: Int[np.ndarray, "n 3"]) -> None:
        """Light up these voxels, (z, y, x), in the slices they lie in."""
        self.lit = voxels
        self.draw()

    def _cut(self) -> None:
        self.scores = self.case.scores(self.threshold.value)
        self.draw()

    def draw(self) -> None:
        z, threshold = self.slice.value, self.threshold.value
        self.panel.draw(
            [heat[z] for heat in self.case.heat.values()],
            [self.case.title(name, *_in_words(row)) for name, row in self.scores.iterrows()],
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

            self.volumes = NiivueViewer(self.case, moved=lambda z: setattr(self.slice, "value", z))
            parts.append(self.volumes.widget)
            self.draw()
        return ipywidgets.VBox(parts)


def _in_words(row: pd.Series) -> tuple[str, str]:
    """A run's scores in one line, and a note where the mask has islands: HD95 is then theirs as well."""
    count = int(row["islands"])
    note = f"with {count} island{'s' if count > 1 else ''}" if count else ""
    return f"DSC {row['DSC']:.3f}, HD95 {row['HD95']:.1f} mm", note
