"""The static figures: matplotlib in, PNG and SVG out. Red is the truth and green the prediction, as in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from IPython.display import Image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mupkg.data.cases import Point
from mupkg.data.writing import whole_file
from mupkg.report.embeddings import EmbeddedVoxels, project
from mupkg.samplers import VoxelTuples
from mupkg.stages.voxels import KINDS

TRUTH, PREDICTION = "red", "lime"
KIND_COLOURS = ("crimson", "orange", "steelblue", "lightgray")  # of KINDS
PLANES = ("axial", "coronal", "sagittal")
CT_WINDOW = (-160, 240)


def save(figure: Figure, path: str | Path) -> Image:
    """Write a figure as PNG and SVG beside each other, close it, and give the PNG for display."""
    for suffix in (".svg", ".png"):
        with whole_file(Path(path).with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return Image(filename=str(Path(path).with_suffix(".png")))


def draw_contour(
    ax: Axes, mask: np.ndarray, colour: str, extent: Sequence[float] | None = None
) -> QuadContourSet | None:
    """The outline of a mask, in an image's axes (rows downwards); nothing for an empty one."""
    height, width = mask.shape
    extent = extent or (-0.5, width - 0.5, height - 0.5, -0.5)  # as imshow's own; contour's default is upside down
    if not mask.any():
        return None
    return ax.contour(mask.astype(float), [0.5], colors=colour, linewidths=1.2, extent=extent, origin="upper")


def draw_plane(
    ax: Axes,
    volume: np.ndarray,
    spacing_mm: Sequence[float],
    plane: str,
    index: int,
    masks: Mapping[str, np.ndarray] | None = None,
    window: tuple[float, float] | None = None,
) -> None:
    """One slice of a volume (z, y, x) at its true proportions, feet down and front up, with outlines by colour."""
    axis = PLANES.index(plane)
    height, width = (n * s for i, (n, s) in enumerate(zip(volume.shape, spacing_mm, strict=True)) if i != axis)
    extent = (0, width, height, 0)
    # slices are stored from the feet upwards; coronal and sagittal views show the head on top
    cut = (lambda v: v.take(index, axis)) if plane == "axial" else (lambda v: v.take(index, axis)[::-1])
    low, high = window or (volume.min(), volume.max())
    ax.imshow(cut(volume), cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="nearest")
    for colour, mask in (masks or {}).items():
        draw_contour(ax, cut(mask), colour, extent)
    ax.set_axis_off()


def three_planes(
    rows: Mapping[str, tuple[sitk.Image, sitk.Image | None]],
    window: tuple[float, float] | None = None,
    colour: str = TRUTH,
    through: Mapping[str, Point] | None = None,
) -> Figure:
    """Axial, coronal and sagittal slices of each scan, a row a scan: through its label's middle, or its own.

    Args:
        rows: name -> (image, label or None). window: grey values shown; None: the scan's 1st to 99th percentile.
        through: name -> physical point (x, y, z) in mm that the slices of a scan without label go through.
    """
    figure, axes = plt.subplots(len(rows), 3, figsize=(10, 3.1 * len(rows)), squeeze=False)
    for line, (name, (image, label)) in zip(axes, rows.items(), strict=True):
        image = sitk.DICOMOrient(image, "LPS")
        volume = sitk.GetArrayFromImage(image)
        mask = None if label is None else sitk.GetArrayFromImage(sitk.DICOMOrient(label, "LPS")) > 0
        seen = mask is not None and mask.any()
        middle = np.argwhere(mask).mean(axis=0).round().astype(int) if seen else np.array(volume.shape) // 2
        if through and name in through:
            middle = np.array(image.TransformPhysicalPointToIndex(through[name]))[::-1]
        shown = window or tuple(np.percentile(volume, [1, 99]))
        for ax, plane, index in zip(line, PLANES, middle, strict=True):
            masks = {colour: mask} if seen else {}
            draw_plane(ax, volume, image.GetSpacing()[::-1], plane, int(index), masks, shown)
        line[0].set_title(name, loc="left", fontsize=10)
    figure.tight_layout()
    return figure


def histograms(values: Mapping[str, Mapping[str, np.ndarray]], xlabel: str) -> Figure:
    """One panel a scan, one curve a tissue."""
    figure, axes = plt.subplots(1, len(values), figsize=(4 * len(values), 3), squeeze=False, sharey=True)
    for ax, (name, tissues) in zip(axes[0], values.items(), strict=True):
        for tissue, sample in tissues.items():
            ax.hist(sample, bins=80, histtype="step", density=True, label=tissue)
        ax.set(title=name, xlabel=xlabel)
        ax.legend(fontsize=8)
    figure.tight_layout()
    return figure


def patches(images: np.ndarray, labels: np.ndarray, count: int = 8) -> Figure:
    """The middle slices of the first patches of a batch, with their labels' outlines."""
    figure, axes = plt.subplots(1, count, figsize=(1.6 * count, 1.8))
    for ax, image, label in zip(axes, images, labels, strict=False):
        ax.imshow(image[image.shape[0] // 2], cmap="gray", vmin=0, vmax=1)
        draw_contour(ax, label, TRUTH)
        ax.set_axis_off()
    return figure


def convergence(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Fig. 7: cross-entropy on the training patches and DSC on the validation cases, against SGD steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    for name, history in histories.items():
        left.plot(history["step"], history["cross_entropy"], label=name)
        measured = history.dropna(subset="validation_dsc")
        right.plot(measured["step"], measured["validation_dsc"], marker="o", markersize=3, label=name)
    left.set(xlabel="SGD step", ylabel="cross-entropy (training patches)", yscale="log")
    right.set(xlabel="SGD step", ylabel="DSC (validation cases)", ylim=(0, 1))
    right.legend(fontsize=8)
    figure.tight_layout()
    return figure


def heatmap_and_contours(
    region: np.ndarray,
    truth: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    index: int,
    spacing_mm: Sequence[float],
) -> Figure:
    """Fig. 1: for each network the foreground probability of one slice, and below it the two contours."""
    size = (3.2 * len(probabilities), 5.8)
    figure, axes = plt.subplots(2, len(probabilities), figsize=size, squeeze=False, layout="constrained")
    extent = (0, region.shape[2] * spacing_mm[2], region.shape[1] * spacing_mm[1], 0)
    for (top, bottom), (name, probability) in zip(axes.T, probabilities.items(), strict=True):
        heat = top.imshow(probability[index], cmap="inferno", vmin=0, vmax=1, extent=extent)
        top.set(title=name, xticks=[], yticks=[])
        masks = {TRUTH: truth, PREDICTION: probability > 0.5}
        draw_plane(bottom, region, spacing_mm, "axial", index, masks, (0, 255))
    figure.colorbar(heat, ax=axes, label="foreground probability", shrink=0.6)
    return figure


def contours_side_by_side(
    cases: Mapping[str, tuple[np.ndarray, np.ndarray, Sequence[float]]],
    predictions: Mapping[str, Mapping[str, np.ndarray]],
    scores: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Fig. 8: red truth and green prediction on each case's middle slice; a row a case, a column a configuration.

    Args:
        cases: name -> (region, truth, spacing_mm). predictions, scores: configuration -> case name -> mask, DSC.
    """
    figure, axes = plt.subplots(
        len(cases), len(predictions), figsize=(3 * len(predictions), 3 * len(cases)), squeeze=False
    )
    for row, (name, (region, truth, spacing_mm)) in zip(axes, cases.items(), strict=True):
        index = int(np.argmax(truth.sum(axis=(1, 2))))
        for ax, (configuration, masks) in zip(row, predictions.items(), strict=True):
            outlines = {TRUTH: truth, PREDICTION: masks[name]}
            draw_plane(ax, region, spacing_mm, "axial", index, outlines, (0, 255))
            ax.set_title(f"{configuration}\n{name}, DSC {scores[configuration][name]:.3f}", fontsize=9)
    lines = [Line2D([], [], color=TRUTH, label="truth"), Line2D([], [], color=PREDICTION, label="prediction")]
    figure.legend(handles=lines, loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.02))
    figure.tight_layout()
    return figure


def samplers_at_work(
    image: np.ndarray, label: np.ndarray, probability: np.ndarray, tuples: Mapping[str, VoxelTuples]
) -> Figure:
    """Fig. 5: what each sampler draws on one patch; anchors (cross), positives (dot), negatives (circle)."""
    figure, axes = plt.subplots(1, len(tuples) + 1, figsize=(3.4 * (len(tuples) + 1), 3.8))
    axes[0].imshow(probability, cmap="inferno", vmin=0, vmax=1)
    axes[0].set_title("foreground probability", fontsize=9)
    draw_contour(axes[0], label, TRUTH)
    for ax, (name, drawn) in zip(axes[1:], tuples.items(), strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        draw_contour(ax, label, TRUTH)
        styles = (("x", "cyan", "anchor"), (".", "orange", "positive"), ("o", "white", "negative"))
        for indices, (marker, colour, role) in zip(drawn, styles, strict=True):
            y, x = np.unravel_index(indices.numpy(), label.shape)
            face = "none" if marker == "o" else colour
            edge = {} if marker == "x" else {"edgecolors": colour}
            ax.scatter(
                x,
                y,
                marker=marker,
                c=None if face == "none" else colour,
                s=28,
                label=role,
                **(edge | ({"facecolors": "none"} if face == "none" else {})),
            )
        ax.set_title(f"{name}: {len(drawn.anchors)} tuples", fontsize=9)
    axes[-1].legend(fontsize=7, loc="lower right")
    for ax in axes:
        ax.set_axis_off()
    figure.tight_layout()
    return figure


def embedding_scatter(voxels: Mapping[str, EmbeddedVoxels], numbers: Mapping[str, Mapping[str, float]]) -> Figure:
    """Voxel embeddings of each network on its first two principal components, coloured by what the voxel is."""
    figure, axes = plt.subplots(1, len(voxels), figsize=(4.6 * len(voxels), 4.2), squeeze=False)
    for ax, (name, sample) in zip(axes[0], voxels.items(), strict=True):
        points = project(sample.embedding)
        for number in reversed(range(len(KINDS))):
            chosen = points[sample.kind == number]
            ax.scatter(*chosen.T, s=5, c=KIND_COLOURS[number], label=KINDS[number], linewidths=0)
        text = ", ".join(f"{key} {value:.2f}" for key, value in numbers[name].items())
        ax.set(title=f"{name}\n{text}", xticks=[], yticks=[], xlabel="PC 1", ylabel="PC 2")
    axes[0][-1].legend(fontsize=8, markerscale=2)
    figure.tight_layout()
    return figure


def metric_boxes(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One panel a metric, one box a configuration, one dot a case; values that are not finite are counted below."""
    figure, axes = plt.subplots(1, len(tables), figsize=(3.6 * len(tables), 3.6), squeeze=False)
    for ax, (metric, table) in zip(axes[0], tables.items(), strict=True):
        finite = [table[name][np.isfinite(table[name])].to_numpy() for name in table]
        ax.boxplot(finite, tick_labels=list(table), showfliers=False)
        for position, values in enumerate(finite, start=1):
            ax.plot(np.full(len(values), position), values, "k.", alpha=0.5, markersize=4)
        lost = int(table.size - sum(map(len, finite)))
        ax.set_title(metric + (f" ({lost} not finite)" if lost else ""), fontsize=10)
        ax.tick_params("x", rotation=30)
    figure.tight_layout()
    return figure
