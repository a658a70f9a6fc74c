"""Voxels drawn from one case or from many: as a table, in feature space, as small patches, and as a Parquet file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from mupkg import progress
from mupkg.explore.predictions import CasePredictions, Cases, few_threads
from mupkg.report import embeddings
from mupkg.report.embeddings import MARGIN, EmbeddedVoxels, Projection
from mupkg.report.figures import CHOSEN, TRUTH, pixels_png
from mupkg.scans.writing import whole_file
from mupkg.stages.voxels import KINDS, draw, sample_voxels

PATCH_MM = 32.0  # edge of a small patch
NEAREST = 10  # neighbours of a voxel that are shown, and kept of each saved one
PLACE = ["z", "y", "x"]


@dataclass(frozen=True, eq=False)
class DrawnVoxels:
    """Up to `per_kind` voxels of every kind and as many hard ones, of one case or several, the same for all runs.

    Attributes:
        table: a row a voxel: case, split, z, y, x, kind, "mm to contour" (negative inside), and "p <run>" and
            "error <run>". Far background comes first and prostate last, which is the order they are painted in.
        samples: their embeddings by run.
        balanced: False for the hard ones, which a run gets wrong by more than tau.
        cases: the cases they were drawn from.
    """

    table: pd.DataFrame
    samples: dict[str, EmbeddedVoxels]
    balanced: Bool[np.ndarray, " n"]
    cases: dict[str, CasePredictions]

    @classmethod
    def of_case(cls, case: CasePredictions, per_kind: int = 300, tau: float = 0.1, seed: int = 0) -> DrawnVoxels:
        """ValueError for a case without prostate."""
        index, kind = sample_voxels(case.truth, per_kind, seed)
        if not len(index):
            raise ValueError(f"case {case.case_id}: its region holds no prostate; choose another case")
        hard = np.any([np.abs(heat - case.truth) > tau for heat in case.heat.values()], axis=0)
        hard[tuple(index.T)] = False  # those are drawn already
        more = draw(hard, per_kind, np.random.default_rng(seed))
        balanced = np.repeat([True, False], [len(index), len(more)])
        index, kind = np.concatenate([index, more]), np.concatenate([kind, case.kind[tuple(more.T)]])
        order = np.argsort(-kind.astype(int), kind="stable")
        index, kind, balanced = index[order], kind[order], balanced[order]
        at = tuple(index.T)
        columns = {"case": case.case_id, "split": case.split} | dict(zip(PLACE, at, strict=True))
        columns |= {"kind": np.array(KINDS)[kind], "mm to contour": case.distance_mm[at]}
        for name, heat in case.heat.items():
            columns |= {f"p {name}": heat[at], f"error {name}": np.abs(heat[at] - case.truth[at])}
        samples = {name: EmbeddedVoxels(index, kind, case.embed(name, index)) for name in case.heat}
        return cls(pd.DataFrame(columns), samples, balanced, {case.case_id: replace(case, kept={})})

    @classmethod
    def joined(cls, parts: Sequence[DrawnVoxels]) -> DrawnVoxels:
        """Those of several cases, in the same order of kinds."""
        table = pd.concat([part.table for part in parts], ignore_index=True)
        order = np.argsort(-table["kind"].map(KINDS.index).to_numpy(), kind="stable")
        columns = {name: zip(*(part.samples[name] for part in parts), strict=True) for name in parts[0].samples}
        samples = {n: EmbeddedVoxels(*(np.concatenate(c)[order] for c in triple)) for n, triple in columns.items()}
        balanced = np.concatenate([part.balanced for part in parts])[order]
        cases = {name: case for part in parts for name, case in part.cases.items()}
        return cls(table.iloc[order].reset_index(drop=True), samples, balanced, cases)

    @classmethod
    def of_split(
        cls, cases: Cases, names: Sequence[str] | None = None, split: str = "test", **options
    ) -> DrawnVoxels:
        """Those of all cases of a split that hold prostate; options as in `of_case`."""
        parts = []
        for case_id in progress(cases.table.index[cases.table["split"] == split], desc=f"{split} cases", leave=False):
            case = cases.open(case_id, names)
            if case.truth.any():
                parts.append(cls.of_case(case, **options))
        if not parts:
            raise ValueError(f"there is no {split} case with prostate in its region")
        return cls.joined(parts)

    @cached_property
    def index(self) -> np.ndarray:
        """(n, 3): z, y, x of the voxels."""
        return self.table[PLACE].to_numpy()

    def voxel(self, row: int) -> tuple[CasePredictions, tuple[int, int, int]]:
        """The case of a row, and the place (z, y, x) in it."""
        return self.cases[self.table["case"].iloc[row]], tuple(self.index[row].tolist())

    def numbers(self, margin: float = MARGIN, seed: int = 0) -> pd.DataFrame:
        """Silhouette, Fisher ratio, share of active triplets, mean distances, a row a run; without the hard ones."""
        fair = {n: EmbeddedVoxels(*(part[self.balanced] for part in sample)) for n, sample in self.samples.items()}
        with few_threads():
            return embeddings.measure_all(fair, margin, seed)

    def nearest(self, name: str, embedding: Float[np.ndarray, " e"], but: tuple | None = None) -> pd.DataFrame:
        """The `NEAREST` voxels to an embedding in the run's full feature space, with their squared `distance`.

        Args:
            but: case, z, y, x of a voxel to leave out: the one whose neighbours are asked for.
        """
        squares = ((self.samples[name].embedding - embedding) ** 2).sum(axis=1)
        if but is not None:
            squares[(self.table[["case", *PLACE]] == list(but)).all(axis=1).to_numpy()] = np.inf
        rows = np.argsort(squares, kind="stable")[: min(NEAREST, int(np.isfinite(squares).sum()))]
        return self.table.iloc[rows].assign(distance=squares[rows])

    def rows(self, chosen: np.ndarray | None = None, method: Projection = "PCA", seed: int = 0) -> pd.DataFrame:
        """The voxels as a table to keep, a row a voxel and run: what `voxels_table` describes."""
        chosen = np.arange(len(self.table)) if chosen is None else np.asarray(chosen)
        from sklearn.neighbors import NearestNeighbors  # slow to import

        table, parts, near = self.table.iloc[chosen], [], min(NEAREST, len(chosen) - 1)
        voxels = [self.voxel(row) for row in chosen]
        shared = table[["case", "split", *PLACE, "kind"]].assign(mm_to_contour=table["mm to contour"])
        shared[["x_mm", "y_mm", "z_mm"]] = np.array([case.world_mm(place) for case, place in voxels])
        shared["label"] = [int(case.truth[place]) for case, place in voxels]
        shared["thumbnail"] = [pixels_png(patch(case, place)) for case, place in voxels]
        for name, sample in self.samples.items():
            embedding = sample.embedding[chosen]
            part = shared.assign(run=name, probability=table[f"p {name}"], embedding=list(embedding))
            part["projection"] = method
            part[["projection_x", "projection_y"]] = embeddings.project(sample, method, seed)[chosen]
            if near:
                distances, rows = NearestNeighbors(n_neighbors=near).fit(embedding).kneighbors()
                rows = rows + len(parts) * len(chosen)  # of the whole table
                part["neighbors"] = [{"ids": i, "distances": d} for i, d in zip(rows, distances, strict=True)]
            parts.append(part)
        return pd.concat(parts, ignore_index=True)


def patch(case: CasePredictions, place: Sequence[int]) -> UInt8[np.ndarray, "h w 3"]:
    """The slice around a voxel (z, y, x), which is lit in the middle; the true contour is tinted.

    Black beyond the region.
    """
    z, *middle = place
    reach = [max(3, round(PATCH_MM / 2 / mm)) for mm in case.spacing_mm[1:]]
    window = tuple(slice(m, m + 2 * r + 1) for m, r in zip(middle, reach, strict=True))
    grey, kind = (np.pad(a[z], [(r, r) for r in reach])[window] for a in (case.region, case.kind + 1))
    pixels = np.repeat(grey[..., None], 3, axis=2) / 255
    edge = kind == KINDS.index("contour") + 1
    pixels[edge] = 0.4 * pixels[edge] + 0.6 * np.array(to_rgb(TRUTH))
    pixels[reach[0], reach[1]] = to_rgb(CHOSEN)
    return np.round(255 * pixels).astype(np.uint8)


def draw_patches(axes: Sequence[Axes], patches: Sequence[tuple[UInt8[np.ndarray, "h w 3"], str]]) -> None:
    """Patches with a few lines above each, on axes of a figure; axes that are left over stay empty."""
    for ax, (pixels, text) in zip(axes, patches, strict=False):
        ax.imshow(pixels)
        ax.set_title(text, fontsize=6)
    for ax in axes:
        ax.set_axis_off()


def patches_html(patches: Sequence[tuple[UInt8[np.ndarray, "h w 3"], str]], columns: int | None = None) -> str:
    """The same with the lines below, as HTML; in so many columns, or as many as there is room for."""
    look = "width: min(100%, 8.5vh); image-rendering: pixelated; display: block"
    words = "font-size: 9px; line-height: 11px; word-break: break-all"
    cells = (
        f"<div><img style='{look}' src='data:image/png;base64,{base64.b64encode(pixels_png(pixels)).decode()}'>"
        f"<div style='{words}'>{text.replace(chr(10), '<br>')}</div></div>"
        for pixels, text in patches
    )
    repeat = f"{columns}, minmax(0, 1fr)" if columns else "auto-fill, minmax(92px, 1fr)"
    return f"<div style='display: grid; grid-template-columns: repeat({repeat}); gap: 3px'>{''.join(cells)}</div>"


def voxels_table(
    study: str | Path | Cases,
    *,
    configurations: Sequence[str] | None = None,
    seed: int = 0,
    split: str = "test",
    per_kind: int = 300,
    tau: float = 0.1,
    projection: Projection = "PCA",
) -> pd.DataFrame:
    """Voxels of all cases of a split as each run sees them, a row a voxel and run.

    Columns: case, split, z, y, x (voxels of the region), kind, mm_to_contour, x_mm, y_mm, z_mm (the scan's own
    space), label, thumbnail (PNG), run, probability, embedding, projection (how), projection_x, projection_y (fitted
    on all these voxels), neighbors (rows of the table with the ten nearest embeddings of the same run, and their
    Euclidean distances). `save_voxels` writes it.
    """
    cases = Cases.of(study, configurations, seed)
    drawn = DrawnVoxels.of_split(cases, split=split, per_kind=per_kind, tau=tau, seed=seed)
    return drawn.rows(method=projection, seed=seed)


def save_voxels(table: pd.DataFrame, folder: str | Path, chosen: str = "all") -> Path:
    """Write such a table as one Parquet file, named by its case or cases, by what was chosen, and by its runs."""
    cases = table["case"].unique()
    which = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
    parts = ["voxels", which, chosen, *table["run"].unique()]
    path = Path(folder) / (re.sub(r"[^\w.+-]+", "-", "_".join(parts)) + ".parquet")
    with whole_file(path) as temporary:
        table.to_parquet(temporary, index=False)
    return path
