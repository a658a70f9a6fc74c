"""The method at work, alive in JupyterLab (notebook 08): samplers on a patch, and a training as a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mupkg.explore.controls import dropdown, picture, slider, wrapped
from mupkg.explore.panels import DPI
from mupkg.explore.predictions import CasePredictions
from mupkg.losses import gather_embeddings, squared_distance
from mupkg.report import results
from mupkg.report.embeddings import MARGIN, EmbeddedVoxels, principal_axes, separation
from mupkg.report.figures import (
    FIXED,
    HEAT,
    TEACHES,
    TRUTH,
    TupleMarks,
    TuplePlane,
    draw_contour,
    draw_points,
    draw_slice,
    mark_plane,
    mix,
    pc_names,
    png,
)
from mupkg.samplers import ContourSampler, HardNegativeSampler, RandomSampler
from mupkg.stages.film import Frames, read_film
from mupkg.stages.regions import Regions
from mupkg.stages.runs import FILM, STAGE1

TRAINED = "trained"  # the step of a network as it is, not of its film


class CaseFilm(NamedTuple):
    """A run's film and, of its case, the slice it shows."""

    frames: Frames
    grey: UInt8[np.ndarray, "y x"]
    truth: Bool[np.ndarray, "y x"]
    spacing_mm: tuple[float, float, float]


def read_films(study: str | Path, configurations: Sequence[str] | None = None, seed: int = 0) -> dict[str, CaseFilm]:
    """The films of a study's runs by configuration; runs trained without one are left out."""
    regions, films = Regions.read(Path(study) / STAGE1), {}
    for row in results.finished_runs(study, configurations, seed).itertuples():
        if (row.folder / FILM).is_dir():
            frames = read_film(row.folder)
            grey, label = (np.array(regions.volume(frames.case_id, kind)[frames.z]) for kind in ("image", "label"))
            if grey.shape != frames.probability.shape[1:]:
                raise ValueError(f"{row.folder / FILM}: is of another stage 1; train the run again for a new film")
            films[row.configuration] = CaseFilm(frames, grey, label == 1, regions.spacing_mm(frames.case_id))
    return films


class SamplersAtWork:
    """What R, H and C draw on a patch, and which of their tuples the triplet term still moves.

    Above, the patch with each anchor joined to its positive and its negative; below, each tuple's d(a, p) and
    d(a, n). The hinge is zero above the line d(a, n) = d(a, p) + margin: tuples below it are active; the others teach
    nothing more by it (P's own term apart). With near negatives (N), negatives are drawn within 2 voxels of the
    contour only. The patch is the film's, at any step that was filmed, or any patch as the trained network sees it
    (step "trained").
    """

    def __init__(
        self,
        case: CasePredictions,
        films: Mapping[str, CaseFilm] | None = None,
        *,
        patch: int = 32,
        anchors: int = 20,
        pairs: int = 1,
        tau: float = 0.1,
        margin: float = MARGIN,
    ):
        self.case, self.films, self.margin, self.slice = case, dict(films or {}), margin, case.slice
        self.extent = np.minimum(patch, case.region.shape[1:])
        names = list(case.networks)
        self.run = dropdown("run", names, names[-1], 200)
        self.step = ipywidgets.SelectionSlider(options=[TRAINED], description="step")
        free = np.array(case.region.shape[1:]) - self.extent
        middle = np.clip(np.argwhere(case.truth[case.widest]).mean(axis=0) - self.extent // 2, 0, free).astype(int)
        self.top, self.left = (
            slider(n, int(v), 0, int(f)) for n, v, f in zip(("top", "left"), middle, free, strict=True)
        )
        self.anchors = slider("anchors k", anchors, 1, 200)
        self.pairs = slider("pairs m", pairs, 1, 10)
        self.tau = slider("τ of H", tau, 0, 0.95, 0.05)
        self.near = ipywidgets.Checkbox(description="near negatives (N)", indent=False)
        self.draw_number = slider("draw", 0, 0, 99)
        self._lay_out()
        self._of_run()
        self.run.observe(lambda _: self._of_run(), "value")
        self.step.observe(lambda _: self._of_patch(), "value")
        for control in (self.slice, self.top, self.left):  # a film has its own slice and patch
            control.observe(lambda _: self._of_patch() if self.step.value == TRAINED else None, "value")
        for control in (self.anchors, self.pairs, self.tau, self.near, self.draw_number):
            control.observe(lambda _: self.draw(), "value")

    def _lay_out(self) -> None:
        self.figure = Figure(figsize=(10.2, 7.4), dpi=DPI, layout=FIXED)
        axes = self.figure.subplots(2, 3, sharey="row")
        self.figure.subplots_adjust(left=0.06, right=0.99, bottom=0.11, top=0.95, wspace=0.15, hspace=0.14)
        self._patches, self._planes, self._contours = [], [], []
        for top, bottom in axes.T:
            image = top.imshow(np.zeros((*self.extent, 3), np.uint8))
            top.set_axis_off()
            self._patches.append((top, image, TupleMarks(top)))
            self._planes.append(TuplePlane(bottom, self.margin))
        marks, dots = self._patches[-1][-1].marks.values(), {"marker": "o", "linestyle": "", "markersize": 4}
        handles = [Line2D([], [], color=TRUTH, label="prostate"), *marks]
        handles += [Line2D([], [], color=colour, label=name, **dots) for name, colour in TEACHES.items()]
        self.figure.legend(handles=handles, ncols=6, fontsize=8, loc="lower center", facecolor="gainsboro")

    def _of_run(self) -> None:
        film = self.films.get(self.run.value)
        options = [*map(str, film.frames.steps if film else []), TRAINED]
        if tuple(options) != tuple(self.step.options):
            self.step.options, self.step.value = options, TRAINED
        self._of_patch()

    def _of_patch(self) -> None:
        for control in (self.top, self.left):
            control.disabled = self.step.value != TRAINED
        self._look_up(self.step.value)
        self.draw()

    def _look_up(self, step: str) -> None:
        """A patch as the network sees it at a step: grey values, label and probability, and its embeddings."""
        if step != TRAINED:
            film = self.films[self.run.value]
            number, window = film.frames.steps.index(int(step)), film.frames.patch
            grey, truth, heat = film.grey, film.truth, film.frames.probability[number]
            embedding = torch.from_numpy(film.frames.patch_embeddings[number])
            self.place = film.frames.case_id, film.frames.z, film.spacing_mm
        else:
            z, case, name = self.slice.value, self.case, self.run.value
            place = self.top.value, self.left.value
            window = tuple(slice(start, start + size) for start, size in zip(place, self.extent, strict=True))
            grey, truth, heat = case.region[z], case.truth[z], case.heat[name][z]
            embedding = case.embedding(name, z)[window]
            self.place = case.case_id, z, case.spacing_mm
        self.patch = grey[window], truth[window], heat[window]
        self.embedding = embedding.movedim(-1, 0)[None]

    def tuples(self, anchors: int | None = None, near: bool | None = None) -> pd.DataFrame:
        """All tuples drawn, as the controls or the arguments say: sampler, flat indices, d(a, p), d(a, n), active."""
        _, truth, heat = self.patch
        label, probability = (torch.from_numpy(np.ascontiguousarray(a))[None] for a in (truth, heat))
        sizes = anchors or self.anchors.value, self.pairs.value
        near = {"near_negatives": self.near.value if near is None else near}
        hard, parts = HardNegativeSampler(*sizes, self.tau.value, **near), []
        for number, sampler in enumerate((RandomSampler(*sizes, **near), hard, ContourSampler(*sizes, **near))):
            generator = torch.Generator().manual_seed(3 * self.draw_number.value + number)
            drawn = sampler(label, probability, generator)
            anchor, positive, negative = (gather_embeddings(self.embedding, indices) for indices in drawn)
            to_positive, to_negative = squared_distance(anchor, positive), squared_distance(anchor, negative)
            columns = dict(zip(drawn._fields, (indices.numpy() for indices in drawn), strict=True))
            columns |= {"d(a, p)": to_positive.numpy(), "d(a, n)": to_negative.numpy()}
            columns["active"] = (to_positive - to_negative + self.margin > 0).numpy()
            parts.append(pd.DataFrame({"sampler": sampler.letter, **columns}))
        return pd.concat(parts, ignore_index=True)

    def active_by_step(self, anchors: int = 200) -> pd.DataFrame:
        """Share of active tuples at every filmed step of this run, of so many anchors on the film's patch.

        RN, HN and CN have near negatives. Without a film, on the patch shown. NaN where there are no candidates.
        """
        rows = {}
        for step in self.step.options[:-1] or (TRAINED,):
            self._look_up(step)
            shares = [self.tuples(anchors, near).groupby("sampler")["active"].mean() for near in (False, True)]
            rows[step] = pd.concat([shares[0], shares[1].add_suffix("N")])
        self._look_up(self.step.value)
        columns = [*"RHC", "RN", "HN", "CN"]
        return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).rename_axis("step")

    def draw(self) -> None:
        for contour in self._contours:
            contour.remove()
        self._contours = []
        drawn, (grey, truth, heat), (case_id, z, spacing_mm) = self.tuples(), self.patch, self.place
        pixels = mix(grey, heat, opacity=0.25)
        reach = 1.2 * max(2 * self.margin, *drawn[["d(a, p)", "d(a, n)"]].max().fillna(0))
        for letter, patch, plane in zip("RHC", self._patches, self._planes, strict=True):
            top, image, marks = patch
            rows = drawn[drawn["sampler"] == letter]
            image.set_data(pixels)
            left, right, low, high = -0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5
            image.set_extent((left, right, low, high))
            top.set(xlim=(left, right), ylim=(low, high))
            for mark in (*top.texts, *top.lines):  # of the patch before
                mark.remove()
            mark_plane(top, "axial", f"{case_id}, slice {z}", spacing_mm[2])
            top.set_aspect(spacing_mm[1] / spacing_mm[2])
            if (contour := draw_contour(top, truth, TRUTH)) is not None:
                self._contours.append(contour)
            marks.show([rows[role].to_numpy() for role in ("anchors", "positives", "negatives")], grey.shape[1])
            name = letter + ("N" if self.near.value else "")
            top.set_title(f"{name}: {len(rows)} tuples, {int(rows['active'].sum())} still teach", fontsize=10, y=1.0)
            plane.show(*rows[["d(a, p)", "d(a, n)"]].to_numpy().T)
            plane.ax.set(xlim=(0, reach), ylim=(0, reach))
        if "widget" in self.__dict__:
            self.widget.children[-1].value = png(self.figure)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        where = wrapped(self.run, self.step, self.slice, self.top, self.left)
        what = wrapped(self.anchors, self.pairs, self.tau, self.draw_number, self.near)
        return ipywidgets.VBox([where, what, picture(png(self.figure))])


class FilmPlayer:
    """A training as a film: the foreground probability of one slice, and where some voxels lie in feature space.

    Principal components are those of each run's last frame, so that points move in a plane that stands still.
    """

    def __init__(self, films: Mapping[str, CaseFilm], *, seed: int = 0):
        if not films:
            raise ValueError("no run has a film; set film to True in notebook 03 (delete runs trained without)")
        self.films = dict(films)
        self.steps = sorted(set.intersection(*(set(film.frames.steps) for film in films.values())))
        self.points, self.axes, self.numbers = {}, {}, {}
        for name, film in self.films.items():
            frames = [EmbeddedVoxels(film.frames.index, film.frames.kind, e) for e in film.frames.embeddings]
            pca = principal_axes(frames[-1])
            self.points[name] = np.stack([pca.transform(frame.embedding) for frame in frames])
            self.axes[name] = pc_names(pca)
            self.numbers[name] = [separation(frame, seed) for frame in frames]
        self.frame = ipywidgets.SelectionSlider(options=self.steps, value=self.steps[-1], description="step")

    def _draw(self, name: str, step: int, top: Axes, bottom: Axes) -> None:
        """One frame of a run: the slice with its heat above, the feature space below."""
        frames, grey, truth, spacing_mm = self.films[name]
        points, number = self.points[name], frames.steps.index(step)
        pixels, title = mix(grey, frames.probability[number], opacity=0.6), f"{name}, step {step}"
        title += f"\n{frames.case_id}, slice {frames.z}"
        draw_slice(top, pixels, [(TRUTH, 2.8, truth, 0.5)], spacing_mm, name="axial", title=title)
        draw_points(bottom, points[number], frames.kind, self.axes[name])
        low, high = points.min(axis=(0, 1)), points.max(axis=(0, 1))
        across, up = zip(low - 0.05 * (high - low), high + 0.05 * (high - low), strict=True)
        bottom.set(xlim=across, ylim=up)
        numbers = ", ".join(f"{k} {v:.2f}" for k, v in self.numbers[name][number].items())
        bottom.set_title(f"n = {len(frames.kind)}, {numbers}", fontsize=9, y=1.0)

    def _strip(self, rows: Sequence[Sequence[tuple[str, int]]]) -> Figure:
        """Rows of frames, each a run at a step."""
        wide, high = 3.6 * len(rows[0]), 7.2 * len(rows) + 0.7
        figure = Figure(figsize=(wide, high), dpi=DPI, layout=FIXED)
        axes = figure.subplots(2 * len(rows), len(rows[0]), squeeze=False)
        figure.subplots_adjust(0.3 / wide, 1.2 / high, 1 - 0.1 / wide, 1 - 0.5 / high, wspace=0.12, hspace=0.3)
        for number, row in enumerate(rows):
            for frame, top, bottom in zip(row, axes[2 * number], axes[2 * number + 1], strict=True):
                self._draw(*frame, top, bottom)
        handles = [*axes[1, 0].get_legend_handles_labels()[0], Line2D([], [], color=TRUTH, label="truth")]
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, markerscale=3)
        bar = figure.add_axes((0.5 - 0.8 / wide, 0.7 / high, 1.6 / wide, 0.1 / high))
        figure.colorbar(ScalarMappable(cmap=HEAT), cax=bar, orientation="horizontal", ticks=[0, 1])
        bar.set_title("foreground probability", fontsize=8, y=1.0)
        bar.tick_params(labelsize=7, pad=1)
        return figure

    @property
    def figure(self) -> Figure:
        """The first frame, one between and the last side by side, a row a run."""
        steps = [self.steps[i] for i in np.unique(np.linspace(0, len(self.steps) - 1, 3).astype(int))]
        return self._strip([[(name, step) for step in steps] for name in self.films])

    def png(self) -> bytes:
        """The frame that the slider shows, a column a run."""
        return png(self._strip([[(name, self.frame.value) for name in self.films]]))

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        shown, last = picture(self.png()), len(self.steps) - 1
        play = ipywidgets.Play(min=0, max=last, value=last, interval=600)
        ipywidgets.link((play, "value"), (self.frame, "index"))
        self.frame.observe(lambda _: setattr(shown, "value", self.png()), "value")
        return ipywidgets.VBox([wrapped(play, self.frame), shown])
