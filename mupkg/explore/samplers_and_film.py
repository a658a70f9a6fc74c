"""The method at work, alive in JupyterLab (notebook 08): samplers on a patch, and a training as a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mupkg.explore.controls import dropdown, picture, slider, wrapped
from mupkg.explore.panels import DPI
from mupkg.explore.predictions import CasePredictions
from mupkg.losses import gather_embeddings, squared_distance
from mupkg.report import figures, results
from mupkg.report.embeddings import MARGIN, EmbeddedVoxels, principal_axes, separation
from mupkg.samplers import ANCHORS, TAU, ContourSampler, HardNegativeSampler, RandomSampler
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


class Patch(NamedTuple):
    """A patch of a slice as a network sees it."""

    grey: UInt8[np.ndarray, "h w"]
    truth: Bool[np.ndarray, "h w"]
    heat: Float[np.ndarray, "h w"]  # foreground probability
    embedding: Float[np.ndarray, "h w e"]
    name: str  # of the case and the slice
    spacing_mm: tuple[float, float, float]


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
        anchors: int = ANCHORS,
        pairs: int = 1,
        tau: float = TAU,
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
        self._of_run()
        self.run.observe(lambda _: self._of_run(), "value")
        of_region = [self.slice, self.top, self.left]
        self.where = [self.run, self.step, *of_region]
        self.what = [self.anchors, self.pairs, self.tau, self.draw_number, self.near]
        for control in (self.run, self.step, *self.what):
            control.observe(lambda _: self.draw(), "value")
        for control in of_region:  # a film has its own slice and patch
            control.observe(lambda _: self.draw() if self.step.value == TRAINED else None, "value")

    def _of_run(self) -> None:
        """Offer the steps at which the run was filmed; a run that was filmed at the same ones keeps the step."""
        film = self.films.get(self.run.value)
        steps = (*map(str, film.frames.steps if film else []), TRAINED)
        if steps != tuple(self.step.options):
            self.step.options, self.step.value = steps, TRAINED

    @property
    def patch(self) -> Patch:
        """The one shown."""
        return self.patch_at(self.step.value)

    def patch_at(self, step: str) -> Patch:
        """The patch as the run's network sees it at a step, a filmed one or TRAINED."""
        if step != TRAINED:
            film = self.films[self.run.value]
            number, window = film.frames.steps.index(int(step)), film.frames.patch
            slices = film.grey, film.truth, film.frames.probability[number]
            embedding, spacing_mm = film.frames.patch_embeddings[number], film.spacing_mm
            name = f"{film.frames.case_id}, slice {film.frames.z}"
        else:
            z, case, run = self.slice.value, self.case, self.run.value
            place = self.top.value, self.left.value
            window = tuple(slice(start, start + size) for start, size in zip(place, self.extent, strict=True))
            slices = case.region[z], case.truth[z], case.heat[run][z]
            embedding, spacing_mm = case.embedding(run, z)[window], case.spacing_mm
            name = ", ".join(filter(None, [case.case_id, case.mark, f"slice {z}"]))
        return Patch(*(part[window] for part in slices), embedding, name, spacing_mm)

    def tuples(self, anchors: int | None = None, near: bool | None = None, step: str | None = None) -> pd.DataFrame:
        """All tuples drawn, as the controls or the arguments say: sampler, flat indices, d(a, p), d(a, n), active."""
        patch = self.patch_at(step or self.step.value)
        label, probability = (torch.from_numpy(np.ascontiguousarray(a))[None] for a in (patch.truth, patch.heat))
        embedding = torch.from_numpy(patch.embedding).movedim(-1, 0)[None]
        sizes = anchors or self.anchors.value, self.pairs.value
        near = {"near_negatives": self.near.value if near is None else near}
        hard, parts = HardNegativeSampler(*sizes, self.tau.value, **near), []
        for number, sampler in enumerate((RandomSampler(*sizes, **near), hard, ContourSampler(*sizes, **near))):
            generator = torch.Generator().manual_seed(3 * self.draw_number.value + number)
            drawn = sampler(label, probability, generator)
            anchor, positive, negative = (gather_embeddings(embedding, indices) for indices in drawn)
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
            drawn = [self.tuples(anchors, near, step) for near in (False, True)]
            shares = [tuples.groupby("sampler")["active"].mean() for tuples in drawn]
            rows[step] = pd.concat([shares[0], shares[1].add_suffix("N")])
        columns = [*"RHC", "RN", "HN", "CN"]
        return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).rename_axis("step")

    @property
    def figure(self) -> Figure:
        """The patch with each sampler's tuples, and below it their distances."""
        drawn, patch = self.tuples(), self.patch
        figure = Figure(figsize=(10.2, 7.4), dpi=DPI)
        # where `layout="constrained"` would put them, in half the time
        place = {"left": 0.07, "right": 0.99, "top": 0.96, "bottom": 0.1, "wspace": 0.05, "hspace": 0.1}
        reach = 1.2 * max(2 * self.margin, *drawn[["d(a, p)", "d(a, n)"]].max().fillna(0))
        for letter, (top, bottom) in zip(
            "RHC", figure.subplots(2, 3, sharey="row", gridspec_kw=place).T, strict=True
        ):
            rows = drawn[drawn["sampler"] == letter]
            top.imshow(figures.mix(patch.grey, patch.heat, opacity=0.25))
            top.autoscale(False)
            marks = figures.TupleMarks(top)
            marks.show([rows[role].to_numpy() for role in ("anchors", "positives", "negatives")], patch.grey.shape[1])
            figures.draw_contour(top, patch.truth, figures.TRUTH)
            figures.mark_plane(top, "axial", patch.name, patch.spacing_mm[2])
            top.set_aspect(patch.spacing_mm[1] / patch.spacing_mm[2])
            top.set_axis_off()
            name = letter + ("N" if self.near.value else "")
            top.set_title(f"{name}: {len(rows)} tuples, {int(rows['active'].sum())} still teach", fontsize=10)
            plane = figures.TuplePlane(bottom, self.margin)
            plane.show(*rows[["d(a, p)", "d(a, n)"]].to_numpy().T)
            bottom.set(xlim=(0, reach), ylim=(0, reach))
        dots = {"marker": "o", "linestyle": "", "markersize": 4}
        handles = [Line2D([], [], color=figures.TRUTH, label="prostate"), *marks.marks.values()]
        handles += [Line2D([], [], color=colour, label=name, **dots) for name, colour in figures.TEACHES.items()]
        figure.legend(handles=handles, ncols=6, fontsize=8, loc="lower center", facecolor="gray")
        return figure

    def draw(self) -> None:
        """Show what the controls say; a film has its own slice and patch."""
        for control in (self.top, self.left):
            control.disabled = self.step.value != TRAINED
        if "widget" in self.__dict__:
            self.widget.children[-1].value = figures.png(self.figure)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        return ipywidgets.VBox([wrapped(*self.where), wrapped(*self.what), picture(figures.png(self.figure))])


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
            self.axes[name] = figures.pc_names(pca)
            self.numbers[name] = [separation(frame, seed) for frame in frames]
        self.frame = ipywidgets.SelectionSlider(options=self.steps, value=self.steps[-1], description="step")

    def _strip(self, rows: Sequence[Sequence[tuple[str, int]]]) -> Figure:
        """Rows of frames, each a run at a step: the slice with its heat above, the feature space below."""
        figure = Figure(figsize=(3.6 * len(rows[0]), 7.2 * len(rows) + 0.7), dpi=DPI, layout="constrained")
        axes = figure.subplots(2 * len(rows), len(rows[0]), squeeze=False)
        shown = zip(chain(*rows), axes[::2].flat, axes[1::2].flat, strict=True)
        for (name, step), top, bottom in shown:
            frames, grey, truth, spacing_mm = self.films[name]
            points, number = self.points[name], frames.steps.index(step)
            pixels = figures.mix(grey, frames.probability[number], opacity=0.6)
            title = f"{name}, step {step}\n{frames.case_id}, slice {frames.z}"
            figures.draw_slice(top, pixels, [(figures.TRUTH, 2.8, truth, 0.5)], spacing_mm, name="axial", title=title)
            bottom.scatter(*points.reshape(-1, 2).T, s=0)  # all frames' points, so that the axes stand still
            figures.draw_points(bottom, points[number], frames.kind, self.axes[name])
            numbers = ", ".join(f"{k} {v:.2f}" for k, v in self.numbers[name][number].items())
            bottom.set_title(f"n = {len(frames.kind)}, {numbers}", fontsize=9)
        handles = [*axes[1, 0].get_legend_handles_labels()[0], Line2D([], [], color=figures.TRUTH, label="truth")]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, markerscale=3)
        look = {"location": "bottom", "shrink": 0.3, "aspect": 30, "ticks": [0, 1], "label": "foreground probability"}
        figure.colorbar(ScalarMappable(cmap=figures.HEAT), ax=list(axes.flat), **look)
        return figure

    @property
    def figure(self) -> Figure:
        """The first frame, one between and the last side by side, a row a run."""
        steps = [self.steps[i] for i in np.unique(np.linspace(0, len(self.steps) - 1, 3).astype(int))]
        return self._strip([[(name, step) for step in steps] for name in self.films])

    def png(self) -> bytes:
        """The frame that the slider shows, a column a run."""
        return figures.png(self._strip([[(name, self.frame.value) for name in self.films]]))

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        shown, last = picture(self.png()), len(self.steps) - 1
        play = ipywidgets.Play(min=0, max=last, value=last, interval=600)
        ipywidgets.link((play, "value"), (self.frame, "index"))
        self.frame.observe(lambda _: setattr(shown, "value", self.png()), "value")
        return ipywidgets.VBox([wrapped(play, self.frame), shown])
