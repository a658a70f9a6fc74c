"""The static figures: matplotlib in, PNG and SVG out.

All colours are chosen here. They are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import PIL.Image
import SimpleITK as sitk
from contourpy import contour_generator
from IPython.display import Image
from jaxtyping import Float, Int, UInt8
from matplotlib import color_sequences, colormaps, patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import ImageDraw, ImageFont

from mupkg.data.preprocessing import CT_WINDOW
from mupkg.metrics import with_unit
from mupkg.scans.cases import Point
from mupkg.scans.writing import whole_file
from mupkg.stages.voxels import KINDS

if TYPE_CHECKING:  # slow to import
    from sklearn.decomposition import PCA

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = map(to_hex, color_sequences["okabe_ito"])
LINES = (BLUE, ORANGE, BLACK, SKY, GREEN, VERMILLION, PURPLE)  # of curves; the first four suit the colour-blind
TRUTH, PREDICTION, CHOSEN = SKY, ORANGE, "#B21AFF"
BOTH = {"truth": TRUTH, "prediction": PREDICTION}
KIND_COLOURS = ("#121249", "#1C6E53", "#B83D00", "#B8B8B8")  # of KINDS: cold in the prostate, warm or grey outside
ROLES = {"anchor": ("x", YELLOW), "positive": (".", "white"), "negative": ("o", VERMILLION)}  # of a tuple's voxels
TEACHES = {"active": BLUE, "satisfied": "silver"}  # tuples
HEAT = "inferno"  # of probabilities
PLANES = {"axial": "RL", "coronal": "RL", "sagittal": "AP"}  # and which sides of the patient lie left and right
BAR_MM = 20
ON_IMAGES = {"color": "white", "path_effects": [patheffects.withStroke(linewidth=1.5, foreground="black")]}


def save(figure: Figure, path: str | Path) -> Image:
    """Write a figure as PNG and SVG beside each other, close it, and give the PNG, with its words, for display."""
    for suffix in (".svg", ".png"):
        with whole_file(Path(path).with_suffix(suffix)) as temporary, plt.rc_context({"svg.fonttype": "none"}):
            figure.savefig(temporary, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return Image(filename=str(Path(path).with_suffix(".png")), alt=alt_text(figure))


def alt_text(figure: Figure) -> str:
    """A figure in words: its title, and each panel's title, axis labels and legend."""
    parts = [figure.get_suptitle()]
    for ax in figure.axes:
        labels = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        shown = ", ".join(dict.fromkeys(ax.get_legend_handles_labels()[1]))
        words = (ax.get_title(), ax.get_title("left"), labels, shown)
        parts.append(": ".join(filter(None, words)))
    return "; ".join(part.replace(":\n", ": ").replace("\n", ", ") for part in dict.fromkeys(parts) if part)


def png(figure: Figure) -> bytes:
    """A figure as PNG, drawn once: `savefig` draws twice, to measure first."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return pixels_png(np.asarray(canvas.buffer_rgba())[..., :3])


def legend_html(colours: Mapping[str, str]) -> str:
    """Names, each with a dot in its colour, as HTML."""
    dots = (f'<span style="color: {c}">&#9679;</span>&nbsp;{name}' for name, c in colours.items())
    return " &nbsp; ".join(f'<span style="white-space: nowrap">{dot}</span>' for dot in dots)


def colour_bar(colours: str, name: str, low: float, high: float) -> str:
    """A colour map with what its ends stand for, as HTML."""
    stops = ", ".join(map(to_hex, colormaps[colours](np.linspace(0, 1, 9))))
    look = f"display: inline-block; width: 5em; height: 0.8em; background: linear-gradient(to right, {stops})"
    return f'<span style="white-space: nowrap">{name} {low:g} <span style="{look}"></span> {high:g}</span>'


# Slices


def draw_contour(
    ax: Axes,
    values: np.ndarray,
    colour: str,
    extent: Sequence[float] | None = None,
    level: float = 0.5,
    width: float = 1.4,
) -> QuadContourSet | None:
    """The outline of a mask, or the line where probabilities cross `level`, in an image's axes (rows downwards).

    Where nothing is crossed nothing is drawn.
    """
    rows, columns = values.shape
    extent = extent or (-0.5, columns - 0.5, rows - 0.5, -0.5)  # as imshow's own; contour's default is upside down
    if not values.min() < level < values.max():
        return None
    look = {"colors": colour, "linewidths": width}
    return ax.contour(values.astype(float), [level], extent=extent, origin="upper", **look)


def mark_plane(ax: Axes, plane: str, name: str, mm_per_unit: float = 1.0) -> None:
    """On a slice's axes: its name (which plane, which slice), the patient's sides, and a bar of 20 mm."""
    left, right = PLANES[plane]
    middle = {"ha": "center", "va": "center", "fontsize": 8, "transform": ax.transAxes, **ON_IMAGES}
    ax.text(0.035, 0.5, left, **middle)
    ax.text(0.965, 0.5, right, **middle)
    ax.text(0.02, 0.03, name, transform=ax.transAxes, fontsize=8, **ON_IMAGES)
    low, high = ax.get_xlim()
    end = low + 0.97 * (high - low)
    bar = ax.get_xaxis_transform()
    ax.plot([end - BAR_MM / mm_per_unit, end], [0.04, 0.04], color="white", linewidth=2, transform=bar)
    ax.text(end, 0.06, f"{BAR_MM} mm", transform=bar, fontsize=8, ha="right", **ON_IMAGES)


def draw_plane(
    ax: Axes,
    volume: np.ndarray,
    spacing_mm: Sequence[float],
    plane: str,
    index: int,
    masks: Mapping[str, np.ndarray] | None = None,
    window: tuple[float, float] | None = None,
    colours: str = "gray",
) -> None:
    """One slice of a volume (z, y, x; x to the patient's left, y to the back) at its true proportions.

    Front up and the patient's right on the left, or head up. Outlines by colour. The window is of values.
    """
    axis = list(PLANES).index(plane)
    # slices are stored from the feet upwards; coronal and sagittal views show the head on top
    cut = (lambda v: v.take(index, axis)) if plane == "axial" else (lambda v: v.take(index, axis)[::-1])
    lines = [(colour, 2.8, cut(mask), 0.5) for colour, mask in (masks or {}).items()]
    spacing_mm = [s for other, s in enumerate(spacing_mm) if other != axis]
    name, window = f"{plane}, slice {index}", window or (volume.min(), volume.max())
    draw_slice(ax, cut(volume), lines, spacing_mm, name=name, plane=plane, window=window, colours=colours)


def mix(
    grey: UInt8[np.ndarray, "y x"],
    heat: Float[np.ndarray, "y x"],
    colours: str = HEAT,
    opacity: float = 0.4,
    lit: Int[np.ndarray, "n 2"] | None = None,
) -> UInt8[np.ndarray, "y x 3"]:
    """Grey values with a heat in [0, 1] glowing over them, and voxels (rows, columns) lit up. No heat, no glow."""
    share = (opacity * (heat > 0.02))[..., None]
    mixed = (1 - share) * grey[..., None] / 255 + share * colormaps[colours](heat)[..., :3]
    if lit is not None:
        mixed[lit[:, 0], lit[:, 1]] = to_rgb(CHOSEN)
    return np.round(255 * mixed).astype(np.uint8)


def slice_png(
    pixels: UInt8[np.ndarray, "y x 3"],
    lines: Sequence[tuple[str, int, Float[np.ndarray, "y x"], float]],
    spacing_mm: Sequence[float],
    *,
    lit: Int[np.ndarray, "n 2"] | Sequence = (),
    least: int = 420,
) -> bytes:
    """An axial slice with contours, drawn by Pillow: as a picture on the screen must be, soon rather than small.

    Args:
        lines: of each contour the colour, width in pixels, values and the level that they cross.
        lit: rows and columns of voxels that lie over the contours, which would hide them.
        least: pixels of the width; a voxel is a whole number of pixels wide.
    """
    height, width = pixels.shape[:2]
    scale = np.array([1, spacing_mm[1] / spacing_mm[2]]) * -(-least // width)  # pixels a voxel, along x and y
    size = np.round(scale * (width, height)).astype(int)
    image = PIL.Image.fromarray(pixels).resize(tuple(size), PIL.Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for colour, wide, values, level in lines:
        for line in contour_generator(z=values).lines(level):
            pen.line(((line + 0.5) * scale).flatten().tolist(), fill=colour, width=wide, joint="curve")
    for row, column in lit:
        corner = np.array([column, row]) * scale
        pen.rectangle((*(corner + 1), *(corner + scale - 2)), fill=CHOSEN)
    (right, low), bar = size - 12, BAR_MM / spacing_mm[2] * scale[0]
    pen.line((right - bar, low, right, low), fill="white", width=4)
    outlined = {"fill": "white", "stroke_width": 2, "stroke_fill": "black", "font": ImageFont.load_default(19)}
    texts = ((right, low - 6), f"{BAR_MM} mm", "rb"), ((6, 8), "R", "lt"), ((right, 8), "L", "rt")
    for place, text, anchor in texts:
        pen.text(place, text, anchor=anchor, **outlined)
    return pixels_png(np.asarray(image))


def pixels_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Pixels as PNG, quick to make rather than small."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def draw_slice(
    ax: Axes,
    pixels: np.ndarray,
    lines: Sequence[tuple[str, float, np.ndarray, float]],
    spacing_mm: Sequence[float],
    *,
    name: str,
    title: str = "",
    plane: str = "axial",
    window: tuple[float, float] | None = None,
    colours: str = "gray",
) -> None:
    """A slice, grey or in colours, at its true proportions on axes in mm, with contours, a name and a title.

    Args:
        lines: of each contour the colour, twice the width in points, values and the level that they cross.
        spacing_mm: of rows and columns, perhaps behind that of the slices. window: of values, else 0 to 255.
        colours: of values.
    """
    height, width = np.multiply(pixels.shape[:2], spacing_mm[-2:])
    extent, (low, high) = (0, width, height, 0), window or (0, 255)
    ax.imshow(pixels, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")
    for colour, wide, values, level in lines:
        draw_contour(ax, values, colour, extent, level, wide / 2)
    mark_plane(ax, plane, name)
    ax.set_title(title, fontsize=9, y=1.0)  # a given y spares a search for it
    ax.set_axis_off()


def contour_legend(figure: Figure, names: Mapping[str, str]) -> None:
    """A legend below a figure: the contours' names and colours."""
    handles = [Line2D([], [], color=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), fontsize=9)


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
    figure, axes = plt.subplots(len(rows), 3, figsize=(10, 3.1 * len(rows)), squeeze=False, layout="constrained")
    outlined = False
    for line, (name, (image, label)) in zip(axes, rows.items(), strict=True):
        image = sitk.DICOMOrient(image, "LPS")
        volume = sitk.GetArrayFromImage(image)
        mask = np.zeros(volume.shape, bool)
        if label is not None:
            mask = sitk.GetArrayFromImage(sitk.DICOMOrient(label, "LPS")) > 0
        middle = np.argwhere(mask).mean(axis=0).round().astype(int) if mask.any() else np.array(volume.shape) // 2
        if through and name in through:
            middle = np.array(image.TransformPhysicalPointToIndex(through[name]))[::-1]
        shown = window or tuple(np.percentile(volume, [1, 99]))
        for ax, plane, index in zip(line, PLANES, middle, strict=True):
            draw_plane(ax, volume, image.GetSpacing()[::-1], plane, int(index), {colour: mask}, shown)
        unit = " HU" if shown == CT_WINDOW else ""
        line[0].set_title(f"{name}, grey from {shown[0]:.0f} to {shown[1]:.0f}{unit}", loc="left", fontsize=10)
        outlined |= mask.any()
    if outlined:
        contour_legend(figure, {"prediction" if colour == PREDICTION else "prostate": colour})
    return figure


def patches(images: np.ndarray, labels: np.ndarray) -> Figure:
    """The middle slices of the first patches of a batch, with their labels' outlines; of 3D blocks likewise."""
    if images.ndim == 5:
        images, labels = images[:, 0], labels[:, labels.shape[1] // 2]
    count = min(8, len(images))
    figure, axes = plt.subplots(1, count, figsize=(1.6 * count, 2.0), squeeze=False, layout="constrained")
    for ax, image, label in zip(axes[0], images, labels, strict=False):
        ax.imshow(image[image.shape[0] // 2], cmap="gray", vmin=0, vmax=1)
        draw_contour(ax, label, TRUTH)
        ax.set_axis_off()
    figure.suptitle("training patches, middle slices", fontsize=9)
    contour_legend(figure, {"prostate": TRUTH})
    return figure


# Tuples and embeddings


class TupleMarks:
    """The voxels of tuples on an image: crosses, dots and circles, and lines from each anchor to the other two."""

    def __init__(self, ax: Axes):
        self.lines, self.marks = {}, {}
        for role, (marker, colour) in ROLES.items():
            self.lines[role] = ax.add_collection(LineCollection([], colors=colour, linewidths=0.7, alpha=0.6))
            face = {"edgecolor": colour, "facecolor": "none"} if marker == "o" else {"color": colour}
            self.marks[role] = ax.scatter([], [], s=30, marker=marker, label=role, zorder=3, **face)

    def show(self, tuples: Sequence[Int[np.ndarray, " t"]], width: int) -> None:
        """Mark anchors, positives and negatives, given as flat indices into an image that is so many voxels wide."""
        places = [np.column_stack([indices % width, indices // width]) for indices in tuples]
        for role, place in zip(ROLES, places, strict=True):
            self.marks[role].set_offsets(place)
            self.lines[role].set_segments(np.stack([places[0], place], axis=1))


class TuplePlane:
    """Tuples by their distances d(a, p) and d(a, n); below the line d(a, n) = d(a, p) + margin they are active."""

    def __init__(self, ax: Axes, margin: float):
        self.ax, self.margin = ax, margin
        line = np.geomspace(1e-3, 1e5, 200) - 1e-3
        ax.plot(line, line + margin, color="black", linewidth=1)
        scale = {"linthresh": 0.01, "linscale": 0.3}  # logarithmic, but linear near 0, so that 0 is there
        ax.set_xscale("symlog", **scale)
        ax.set_yscale("symlog", **scale)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
        ax.set(xlabel="d(a, p)", ylabel="d(a, n)")
        ax.label_outer()
        self.dots = ax.scatter([], [], s=14)

    def show(self, to_positive: Float[np.ndarray, " t"], to_negative: Float[np.ndarray, " t"]) -> None:
        """Tuples with these distances: those that are active stand out."""
        hinge = np.maximum(to_positive - to_negative + self.margin, 0)
        self.dots.set_offsets(np.column_stack([to_positive, to_negative]))
        self.dots.set_color(np.where(hinge > 0, TEACHES["active"], TEACHES["satisfied"]))
        self.ax.set_title(f"mean hinge {format_mean(hinge)}, margin σ = {self.margin:g}", fontsize=9, y=1.0)


def format_mean(values: np.ndarray) -> str:
    """A mean in words that an empty set has too."""
    return f"{values.mean():.2f}" if len(values) else "none"


def draw_points(
    ax: Axes, points: Float[np.ndarray, "n 2"], kind: np.ndarray, names: Sequence[str], **look: Any
) -> None:
    """Voxels on a plane of the feature space, coloured by what they are; the prostate lies on top.

    Args:
        names: of the two axes. look: of matplotlib's `scatter`.
    """
    look = {"s": 5, "linewidths": 0} | look
    for number, (name, colour) in enumerate(zip(KINDS, KIND_COLOURS, strict=True)):
        some = points[kind == number]
        ax.scatter(*some.T, color=colour, label=name, zorder=3 - 0.1 * number, **look)
    ax.set(xticks=[], yticks=[], xlabel=names[0], ylabel=names[1])


def pc_names(pca: PCA) -> list[str]:
    """The principal components' names, with their shares of the variance."""
    return [f"PC {n} ({share:.0%} of the variance)" for n, share in enumerate(pca.explained_variance_ratio_, 1)]


# Curves and boxes


def convergence(history: pd.DataFrame, by: str = "step") -> Figure:
    """Fig. 7: cross-entropy on the training patches and DSC on the validation cases, as the training goes on.

    A line is the median over a configuration's trainings, its band runs from the lowest to the highest.

    Args:
        history: the rows of history.csv with `configuration` and `replicate`, see `trials.tables.histories`.
        by: "step", or "summed_rate" to compare trainings of different learning rates.
    """
    panels = {
        "cross_entropy": "cross-entropy (training patches)",
        "validation_dsc": "DSC (mean over validation cases)",
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        styles = cycle(plt.cycler(linestyle=["-", "--"]) * plt.cycler(color=LINES))
        for name, rows in history.dropna(subset=column).groupby("configuration", sort=False):
            values, style = rows.groupby(by)[column], next(styles)
            ax.fill_between(values.min().index, values.min(), values.max(), color=style["color"], alpha=0.15, lw=0)
            ax.plot(values.median(), label=f"{name}, n = {rows['replicate'].nunique()}", **style)
        ax.set(xlabel="SGD step" if by == "step" else by.replace("_", " "), ylabel=label)
    axes[0].set(yscale="log")
    axes[1].set(ylim=(0, 1))
    title = "n trainings: median, lowest to highest"
    axes[1].legend(fontsize=8, title=title, title_fontsize=8, alignment="left")
    return figure


def metric_boxes(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One panel a metric, one box a configuration, one line a case; values that are not finite are counted above."""
    size = (3.6 * len(tables), 3.8)
    figure, axes = plt.subplots(1, len(tables), figsize=size, squeeze=False, layout="constrained")
    for ax, (metric, table) in zip(axes[0], tables.items(), strict=True):
        finite = table.where(np.isfinite(table))
        places = np.arange(1, len(finite.columns) + 1)
        ax.plot(places, finite.T, color="gray", marker=".", markersize=4, linewidth=0.6, alpha=0.7)
        finite.plot.box(ax=ax, rot=30, showfliers=False, medianprops={"color": VERMILLION})
        lost = int(finite.isna().sum(axis=None))
        ax.set_title(f"n = {len(finite)} cases" + (f" ({lost} not finite)" if lost else ""), fontsize=10)
        ax.set_ylabel(with_unit(metric))
    return figure
