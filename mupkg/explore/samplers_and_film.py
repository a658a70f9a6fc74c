"""The method at work, alive in JupyterLab (notebook 08): samplers on a patch, and a training as a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from mupkg.explore.linked import MARGIN
from mupkg.explore.panels import DPI, mean, picture, png, slider, wrapped
from mupkg.explore.seen import SeenCase
from mupkg.losses import gather_embeddings, squared_distance
from mupkg.report import results
from mupkg.report.embeddings import EmbeddedVoxels, separation
from mupkg.report.figures import KIND_COLOURS, TRUTH, draw_contour
from mupkg.samplers import ContourSampler, HardNegativeSampler, RandomSampler, Sampler
from mupkg.stages.film import FOLDER as FILM
from mupkg.stages.film import Frames, read_film
from mupkg.stages.regions import Regions
from mupkg.stages.voxels import embed_slice


@dataclass(frozen=True)
class SeenFilm:
    """A run's film and, of its case, the slice it shows."""

    frames: Frames
    grey: UInt8[np.ndarray, "y x"]
    truth: Bool[np.ndarray, "y x"]

    @property
    def patch(self) -> tuple[slice, slice]:
        """Where the film's patch lies in the slice."""
        extent = self.frames.patch_embeddings.shape[1:3]
        return tuple(slice(start, start + size) for start, size in zip(self.frames.corner, extent, strict=True))


def read_films(study: str | Path, configurations: Sequence[str] | None = None, seed: int = 0) -> dict[str, SeenFilm]:
    """The films of a study's runs by configuration; runs trained without one are left out."""
    runs, regions, films = results.runs(study, configurations), Regions.read(Path(study) / "stage1"), {}
    for row in runs[runs["seed"] == seed].itertuples():
        if (row.folder / FILM).is_dir():
            frames = read_film(row.folder)
            grey, label = (np.array(regions.volume(frames.case_id, kind)[frames.z]) for kind in ("image", "label"))
            if grey.shape != frames.probability.shape[1:]:
                raise ValueError(f"{row.folder / FILM}: is of another stage 1; train the run again for a new film")
            films[row.configuration] = SeenFilm(frames, grey, label == 1)
    return films


class SamplersAtWork:
    """What R, H and C draw on a patch, and which of their tuples still teach.

    Above, the patch with anchors, positives and negatives; below, each tuple's d(a, p) and d(a, n). The hinge is
    zero above the line d(a, n) = d(a, p) + margin: tuples below it are active, the others teach nothing any more.

    The patch is one of the film's, at any step that was filmed, or any patch of the case as the trained network
    sees it (step "trained").
    """

    ROLES = (("x", "cyan", "anchor"), (".", "orange", "positive"), ("o", "white", "negative"))

    def __init__(
        self,
        seen: SeenCase,
        films: Mapping[str, SeenFilm] | None = None,
        *,
        patch: int = 32,
        anchors: int = 20,
        pairs: int = 1,
        tau: float = 0.1,
        margin: float = MARGIN,
    ):
        self.seen, self.films, self.margin = seen, dict(films or {}), margin
        self.extent = np.minimum(patch, seen.region.shape[1:])
        names = list(seen.networks)
        self.run = ipywidgets.Dropdown(options=names, value=names[-1], description="run")
        self.step = ipywidgets.SelectionSlider(options=["trained"], description="step")
        free = np.array(seen.region.shape[1:]) - self.extent
        middle = np.clip(np.argwhere(seen.truth[seen.widest]).mean(axis=0) - self.extent // 2, 0, free).astype(int)
        self.slice = slider("slice", seen.widest, 0, len(seen.region) - 1)
        self.top, self.left = (
            slider(n, int(v), 0, int(f)) for n, v, f in zip(("top", "left"), middle, free, strict=True)
        )
        self.anchors = slider("anchors k", anchors, 1, 200)
        self.pairs = slider("pairs m", pairs, 1, 10)
        self.tau = slider("τ of H", tau, 0, 0.95, 0.05)
        self.draw_number = slider("draw", 0, 0, 99)
        self._embedded = None
        self._lay_out()
        self._of_run()
        self.run.observe(lambda _: self._of_run(), "value")
        for control in (self.step, self.slice, self.top, self.left):
            control.observe(lambda _: self._of_patch(), "value")
        for control in (self.anchors, self.pairs, self.tau, self.draw_number):
            control.observe(lambda _: self.draw(), "value")

    def _lay_out(self) -> None:
        self.figure = Figure(figsize=(10.2, 7.0), dpi=DPI)
        axes = self.figure.subplots(2, 3)
        self.figure.subplots_adjust(left=0.06, right=0.99, bottom=0.07, top=0.95, wspace=0.15, hspace=0.16)
        self._patches, self._planes = [], []
        for top, bottom in axes.T:
            grey = top.imshow(np.zeros(self.extent), cmap="gray", vmin=0, vmax=255)
            heat = top.imshow(np.zeros(self.extent), cmap="inferno", vmin=0, vmax=1, alpha=0.25)
            marks = [
                top.scatter([], [], s=30, marker=m, c=c if m != "o" else "none", edgecolors=c if m == "o" else None)
                for m, c, _ in self.ROLES
            ]
            top.set_axis_off()
            tuples = bottom.scatter([], [], s=14)
            line = bottom.axline((0, self.margin), slope=1, color="black", linewidth=1)
            bottom.set(xlabel="d(a, p)")
            self._patches.append((top, grey, heat, marks))
            self._planes.append((bottom, tuples, line))
        axes[0, 2].legend(axes[0, 2].collections, [role for *_, role in self.ROLES], fontsize=7, loc="lower right")
        self._planes[0][0].set_ylabel("d(a, n)")
        self._contours: list = []

    def _of_run(self) -> None:
        film = self.films.get(self.run.value)
        steps = film.frames.steps if film else []
        options = [*map(str, steps), "trained"]
        if tuple(options) != tuple(self.step.options):
            self.step.options, self.step.value = options, "trained"
        self._of_patch()

    def _of_patch(self) -> None:
        for control in (self.slice, self.top, self.left):
            control.disabled = self.step.value != "trained"
        self._look_up(self.step.value)
        self.draw()

    def _look_up(self, step: str) -> None:
        """A patch as the network sees it at a step: grey values, label and probability, and its embeddings."""
        if step != "trained":
            film = self.films[self.run.value]
            number, window = film.frames.steps.index(int(step)), film.patch
            grey, truth, heat = film.grey, film.truth, film.frames.probability[number]
            embedding = film.frames.patch_embeddings[number]
        else:
            z, seen = self.slice.value, self.seen
            place = self.top.value, self.left.value
            window = tuple(slice(start, start + size) for start, size in zip(place, self.extent, strict=True))
            grey, truth, heat = seen.region[z], seen.truth[z], seen.heat[self.run.value][z]
            if self._embedded is None or self._embedded[0] != (self.run.value, z):
                self._embedded = (self.run.value, z), embed_slice(seen.networks[self.run.value], seen.region, z)
            embedding = self._embedded[1][window]
        self.patch = grey[window], truth[window], heat[window]
        self.embedding = torch.from_numpy(np.ascontiguousarray(embedding)).movedim(-1, 0)[None]

    def samplers(self, anchors: int | None = None) -> list[Sampler]:
        sizes = anchors or self.anchors.value, self.pairs.value
        return [RandomSampler(*sizes), HardNegativeSampler(*sizes, self.tau.value), ContourSampler(*sizes)]

    def tuples(self, anchors: int | None = None) -> pd.DataFrame:
        """All tuples drawn, k as the slider says or as given.

        Columns: the sampler's letter, flat indices into the patch, d(a, p), d(a, n), active.
        """
        _, truth, heat = self.patch
        label, probability = (torch.from_numpy(np.ascontiguousarray(a))[None] for a in (truth, heat))
        parts = []
        for sampler in self.samplers(anchors):
            generator = torch.Generator().manual_seed(self.draw_number.value)
            drawn = sampler(label, probability, generator)
            anchor, positive, negative = (gather_embeddings(self.embedding, indices) for indices in drawn)
            near, far = squared_distance(anchor, positive), squared_distance(anchor, negative)
            columns = dict(zip(drawn._fields, (indices.numpy() for indices in drawn), strict=True))
            columns |= {"d(a, p)": near.numpy(), "d(a, n)": far.numpy()}
            columns["active"] = (near - far + self.margin > 0).numpy()
            parts.append(pd.DataFrame({"sampler": sampler.letter, **columns}))
        return pd.concat(parts, ignore_index=True)

    def active_by_step(self) -> pd.DataFrame:
        """Share of active tuples by sampler at every filmed step of this run, of 200 anchors on the film's patch.

        Without a film, on the patch shown. NaN where a sampler found no candidates.
        """
        rows = {}
        for step in self.step.options[:-1] or ("trained",):
            self._look_up(step)
            rows[step] = self.tuples(200).groupby("sampler")["active"].mean()
        self._look_up(self.step.value)
        return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list("RHC")).rename_axis("step")

    def draw(self) -> None:
        for contour in self._contours:
            contour.remove()
        self._contours = []
        drawn, (grey, truth, heat) = self.tuples(), self.patch
        reach = max(1.5 * self.margin, *(float(drawn[d].max()) for d in ("d(a, p)", "d(a, n)"))) if len(drawn) else 1
        for letter, patch, plane in zip("RHC", self._patches, self._planes, strict=True):
            top, background, glow, marks = patch
            mine = drawn[drawn["sampler"] == letter]
            height, width = grey.shape
            for image, values in ((background, grey), (glow, heat)):
                image.set_data(values)
                image.set_extent((-0.5, width - 0.5, height - 0.5, -0.5))
            if (contour := draw_contour(top, truth, TRUTH)) is not None:
                self._contours.append(contour)
            for mark, role in zip(marks, ("anchors", "positives", "negatives"), strict=True):
                row, column = np.unravel_index(mine[role].to_numpy(), grey.shape)
                mark.set_offsets(np.column_stack([column, row]))
            top.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            top.set_title(f"{letter}: {len(mine)} tuples, {int(mine['active'].sum())} still teach", fontsize=10)
            ax, dots, _ = plane
            dots.set_offsets(mine[["d(a, p)", "d(a, n)"]].to_numpy())
            dots.set_color(np.where(mine["active"], "crimson", "lightgray"))
            hinge = (mine["d(a, p)"] - mine["d(a, n)"] + self.margin).clip(lower=0)
            ax.set(xlim=(0, 1.05 * reach), ylim=(0, 1.05 * reach))
            ax.set_title(f"mean hinge {mean(hinge.to_numpy())}, margin σ = {self.margin:g}", fontsize=9)
        if "_picture" in self.__dict__:
            self._picture.value = png(self.figure)

    @cached_property
    def _picture(self) -> ipywidgets.Image:
        return picture(self)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        where = wrapped(self.run, self.step, self.slice, self.top, self.left)
        what = wrapped(self.anchors, self.pairs, self.tau, self.draw_number)
        return ipywidgets.VBox([where, what, self._picture])


class FilmPlayer:
    """A training as a film: the foreground probability of one slice, and where some voxels lie in feature space.

    Principal components are those of each run's last frame, so that points move in a plane that stands still.
    """

    def __init__(self, films: Mapping[str, SeenFilm], *, seed: int = 0):
        if not films:
            raise ValueError("no run has a film; set film to True in notebook 03 (delete runs trained without)")
        from sklearn.decomposition import PCA  # slow to import

        self.films = dict(films)
        self.steps = sorted(set.intersection(*(set(film.frames.steps) for film in films.values())))
        self.points, self.numbers = {}, {}
        for name, film in self.films.items():
            embeddings, kind, index = film.frames.embeddings, film.frames.kind, film.frames.index
            axes = PCA(n_components=2).fit(embeddings[-1])
            self.points[name] = [axes.transform(frame) for frame in embeddings]
            self.numbers[name] = [separation(EmbeddedVoxels(index, kind, frame), seed) for frame in embeddings]
        self.frame = ipywidgets.SelectionSlider(options=self.steps, value=self.steps[-1], description="step")
        self.frame.observe(lambda _: self.draw(), "value")
        self._lay_out()
        self.draw()

    def _lay_out(self) -> None:
        self.figure = Figure(figsize=(3.8 * len(self.films), 7.0), dpi=DPI, layout="constrained")
        axes = self.figure.subplots(2, len(self.films), squeeze=False).T
        self._drawn = {name: self._stage(name, *pair) for name, pair in zip(self.films, axes, strict=True)}

    def _stage(self, name: str, top: Axes, bottom: Axes) -> tuple:
        """What one run's frames are shown on: a slice above, a scatter below."""
        film, points = self.films[name], self.points[name]
        top.imshow(film.grey, cmap="gray", vmin=0, vmax=255)
        heat = top.imshow(film.frames.probability[-1], cmap="inferno", vmin=0, vmax=1, alpha=0.6)
        draw_contour(top, film.truth, TRUTH)
        top.set_axis_off()
        dots = bottom.scatter(*points[-1].T, s=5, c=np.array(KIND_COLOURS)[film.frames.kind], linewidths=0)
        every = np.concatenate(points)
        low, high = every.min(axis=0), every.max(axis=0)
        edge = 0.05 * (high - low) + 1e-6
        bottom.set(xlim=(low[0] - edge[0], high[0] + edge[0]), ylim=(low[1] - edge[1], high[1] + edge[1]))
        bottom.set(xticks=[], yticks=[], xlabel="PC 1 and 2 of the last frame")
        return top, heat, bottom, dots

    def _show(self, name: str, step: int, top: Axes, heat: AxesImage, bottom: Axes, dots: PathCollection) -> None:
        number = self.films[name].frames.steps.index(step)
        heat.set_data(self.films[name].frames.probability[number])
        dots.set_offsets(self.points[name][number])
        top.set_title(f"{name}, step {step}", fontsize=10)
        text = ", ".join(f"{key} {value:.2f}" for key, value in self.numbers[name][number].items())
        bottom.set_title(text, fontsize=9)

    def draw(self) -> None:
        for name, stage in self._drawn.items():
            self._show(name, self.frame.value, *stage)
        if "_picture" in self.__dict__:
            self._picture.value = png(self.figure)

    def strip(self, frames: int = 3) -> Figure:
        """Some frames from the first to the last side by side, two rows a run."""
        steps = [self.steps[i] for i in np.unique(np.linspace(0, len(self.steps) - 1, frames).astype(int))]
        figure = Figure(figsize=(3.2 * len(steps), 5.8 * len(self.films)), dpi=DPI, layout="constrained")
        axes = figure.subplots(2 * len(self.films), len(steps), squeeze=False)
        for row, name in enumerate(self.films):
            for column, step in enumerate(steps):
                pair = axes[2 * row, column], axes[2 * row + 1, column]
                self._show(name, step, *self._stage(name, *pair))
        return figure

    @cached_property
    def _picture(self) -> ipywidgets.Image:
        return picture(self)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        last = len(self.steps) - 1
        play = ipywidgets.Play(min=0, max=last, value=last, interval=600)
        ipywidgets.link((play, "value"), (self.frame, "index"))
        return ipywidgets.VBox([wrapped(play, self.frame), self._picture])
