"""Voxels drawn from one case or from many: as a table, in feature space, as small patches, and as a Parquet file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from threadpoolctl import threadpool_limits

from mupkg import progress
from mupkg.explore.predictions import CasePredictions, Cases
from mupkg.report import embeddings
from mupkg.report.embeddings import MARGIN, EmbeddedVoxels, Projection
from mupkg.report.figures import CHOSEN, TRUTH, pixels_png
from mupkg.samplers import TAU
from mupkg.scans.writing import whole_file
from mupkg.stages.voxels import KINDS, draw, sample_voxels

PATCH_MM = 32.0  # edge of a small patch
NEAREST = 10  # neighbours of a voxel that are shown, and kept of each saved one
PLACE = ["z", "y", "x"]


def draw_voxels(case: CasePredictions, per_kind: int = 300, tau: float = TAU, seed: int = 0) -> pd.DataFrame:
    """Up to `per_kind` voxels of every kind and as many hard ones, which a run gets wrong by more than tau.

    A row a voxel, the same for all runs: case, split, z, y, x, kind and its number in KINDS, "mm to contour"
    (negative inside), balanced (False for the hard ones), and "p <run>", "error <run>" and "embedding <run>" (e,).
    Sorted as `in_order`. ValueError for a case without prostate.
    """
    index, _ = sample_voxels(case.truth, per_kind, seed)
    if not len(index):
        raise ValueError(f"case {case.case_id}: its region holds no prostate; choose another case")
    hard = np.any([np.abs(heat - case.truth) > tau for heat in case.heat.values()], axis=0)
    hard[tuple(index.T)] = False  # those are drawn already
    more = draw(hard, per_kind, np.random.default_rng(seed))
    balanced = np.repeat([True, False], [len(index), len(more)])
    index = np.concatenate([index, more])
    at = tuple(index.T)
    number = case.kind[at]
    columns = {"case": case.case_id, "split": case.split, **dict(zip(PLACE, at, strict=True))}
    columns |= {"kind": np.array(KINDS)[number], "number": number}
    columns |= {"mm to contour": case.distance_mm[at], "balanced": balanced}
    for name, heat in case.heat.items():
        columns |= {f"p {name}": heat[at], f"error {name}": np.abs(heat[at] - case.truth[at])}
        columns[f"embedding {name}"] = list(case.embed(name, index))
    return in_order(pd.DataFrame(columns))


def in_order(*tables: pd.DataFrame) -> pd.DataFrame:
    """Drawn voxels, far background first and prostate last, which is the order they are painted in."""
    return pd.concat(tables).sort_values("number", ascending=False, kind="stable", ignore_index=True)


def draw_split(
    cases: Cases, names: Sequence[str] | None = None, split: str = "test", **options
) -> tuple[pd.DataFrame, dict[str, CasePredictions]]:
    """The drawn voxels of all cases of a split that hold prostate, and these cases, whose embeddings are let go.

    Args:
        names: of the networks; all of them if None. options: of `draw_voxels`.
    """
    tables, opened = [], {}
    for case_id in progress(cases.table.index[cases.table["split"] == split], desc=f"{split} cases", leave=False):
        case = cases.open(case_id, names)
        if case.truth.any():
            tables.append(draw_voxels(case, **options))
            opened[case_id] = replace(case, kept={})
    if not tables:
        raise ValueError(f"there is no {split} case with prostate in its region")
    return in_order(*tables), opened


def embedded(table: pd.DataFrame, name: str) -> EmbeddedVoxels:
    """Drawn voxels as a run embeds them."""
    return EmbeddedVoxels(
        table[PLACE].to_numpy(), table["number"].to_numpy(), np.stack(table[f"embedding {name}"].to_numpy())
    )


def measure(table: pd.DataFrame, names: Sequence[str], margin: float = MARGIN, seed: int = 0) -> pd.DataFrame:
    """Silhouette, Fisher ratio, share of active triplets, mean distances, a row a run; without the hard ones."""
    fair = table[table["balanced"]]
    with threadpool_limits(1):
        return embeddings.measure_all({name: embedded(fair, name) for name in names}, margin, seed)


def rows_to_keep(
    table: pd.DataFrame,
    chosen: Int[np.ndarray, " r"],
    cases: Mapping[str, CasePredictions],
    points: Mapping[str, Float[np.ndarray, "n 2"]],
    method: Projection,
) -> pd.DataFrame:
    """Some drawn voxels, whose points in each run's plane are given, as `voxels_table` describes them."""
    from sklearn.neighbors import NearestNeighbors  # slow to import

    some, parts, near = table.iloc[chosen], [], min(NEAREST, len(chosen) - 1)
    voxels = [(cases[case], tuple(place)) for case, *place in some[["case", *PLACE]].itertuples(index=False)]
    shared = some[["case", "split", *PLACE, "kind"]].assign(mm_to_contour=some["mm to contour"])
    shared[["x_mm", "y_mm", "z_mm"]] = np.array([case.world_mm(place) for case, place in voxels])
    shared["label"] = [int(case.truth[place]) for case, place in voxels]
    shared["thumbnail"] = [pixels_png(patch(case, place)) for case, place in voxels]
    for name in points:
        embedding = some[f"embedding {name}"]
        part = shared.assign(run=name, probability=some[f"p {name}"], embedding=embedding, projection=method)
        part[["projection_x", "projection_y"]] = points[name][chosen]
        if near:
            neighbours = NearestNeighbors(n_neighbors=near).fit(np.stack(embedding.to_numpy()))
            distances, rows = neighbours.kneighbors()
            rows = rows + len(parts) * len(chosen)  # of the whole table
            part["neighbors"] = [{"ids": i, "distances": d} for i, d in zip(rows, distances, strict=True)]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def voxels_table(
    study: str | Path | Cases,
    *,
    configurations: Sequence[str] | None = None,
    seed: int = 0,
    split: str = "test",
    projection: Projection = "PCA",
    **options,
) -> pd.DataFrame:
    """Voxels of all cases of a split as each run sees them, a row a voxel and run; options as in `draw_voxels`.

    Columns: case, split, z, y, x (voxels of the region), kind, mm_to_contour, x_mm, y_mm, z_mm (the scan's own
    space), label, thumbnail (PNG), run, probability, embedding, projection (how), projection_x, projection_y (fitted
    on all these voxels), neighbors (rows of the table with the ten nearest embeddings of the same run, and their
    Euclidean distances). `save_voxels` writes it.
    """
    cases = Cases.read(study, configurations, seed)
    table, opened = draw_split(cases, split=split, seed=seed, **options)
    points = {name: embeddings.project(embedded(table, name), projection, seed) for name in cases.names}
    return rows_to_keep(table, np.arange(len(table)), opened, points, projection)


def save_voxels(table: pd.DataFrame, folder: str | Path, chosen: str = "all") -> Path:
    """Write such a table as one Parquet file, named by its case or cases, by what was chosen, and by its runs."""
    cases = table["case"].unique()
    which = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
    parts = ["voxels", which, chosen, *table["run"].unique()]
    path = Path(folder) / (re.sub(r"[^\w.+-]+", "-", "_".join(parts)) + ".parquet")
    with whole_file(path) as temporary:
        table.to_parquet(temporary, index=False)
    return path


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
