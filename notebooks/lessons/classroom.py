"""What the lessons share: colours, small phantoms, and a short training."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from io import BytesIO

import nbformat
import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from IPython.display import Image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from nbclient import NotebookClient

from mupkg import repository
from mupkg.configurations import build
from mupkg.data import PatchSource, make_phantom
from mupkg.losses import SegmentationMetricLoss, gather_embeddings, squared_distance
from mupkg.models import SegmentationNetwork, SegmentationOutput
from mupkg.samplers import Sampler

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PROSTATE, BACKGROUND = BLUE, ORANGE  # of points and curves
OUTLINES = {"truth": SKY, "prediction": VERMILION}  # on grey
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=[BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY])
plt.rcParams["figure.constrained_layout.use"] = True

# Networks as small as these gain nothing from more threads, and so all computers get the same figures.
torch.set_num_threads(1)

SPACING_MM = (4.0, 2.5, 2.5)  # z, y, x
SIZE = (16, 40, 40)  # 64 x 100 x 100 mm: room for the whole prostate

Volumes = tuple[list[np.ndarray], list[np.ndarray]]


def phantoms(seeds: Iterable[int]) -> Volumes:
    """Images (uint8, -160 to 240 HU as 0 to 255) and labels (uint8) of these phantoms, each (16, 40, 40).

    They are cut out around the point 24 mm below the midpoint of the femoral heads; the label plays no part in it.
    """
    images, labels = [], []
    for seed in seeds:
        case = make_phantom(seed, spacing_mm=SPACING_MM, shape=(48, 64, 104))
        heads = np.mean(case.femoral_heads, axis=0)
        centre = np.array(case.image.TransformPhysicalPointToIndex(heads))[::-1] - [6, 0, 0]
        box = tuple(slice(c - n // 2, c + n // 2) for c, n in zip(centre, SIZE, strict=True))
        hu = sitk.GetArrayFromImage(case.image)[box]
        images.append(np.clip((hu + 160.0) * (255 / 400), 0, 255).astype(np.uint8))
        labels.append(sitk.GetArrayFromImage(case.label)[box])
    return images, labels


def narrow(name: str, seed: int = 0, **options: object) -> tuple[SegmentationNetwork, SegmentationMetricLoss]:
    """Network and loss of a configuration, with 8 filters and 16 embedding channels in place of 32 and 256."""
    torch.manual_seed(seed)
    return build(name, base_filters=8, embedding_dim=16, **options)


def train(
    network: SegmentationNetwork,
    loss: SegmentationMetricLoss,
    volumes: Volumes,
    *,
    steps: int = 150,
    rate: float = 0.1,
    seed: int = 0,
    measure: Callable[[SegmentationOutput, torch.Tensor], Mapping[str, float]] = lambda output, labels: {},
) -> pd.DataFrame:
    """Train with the paper's SGD and poly decay on patches of 32 x 32 x 3; the history, a row a step.

    Args:
        measure: what else to note in each row, from the step's output and labels.
    """
    source = PatchSource(*volumes, patch_size=(32, 32), batch_size=8, seed=seed)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    draws, rows = torch.Generator().manual_seed(seed), []
    network.to(memory_format=torch.channels_last).train()  # a fifth faster on a CPU
    for step in range(steps):
        images, labels = source.batch(step)
        output = network(images)
        terms = loss(output, labels, draws)
        with torch.no_grad():
            metric = sum(term.item() for term in terms.metric.values())
            row = {"step": step, "cross-entropy": terms.cross_entropy.item(), "metric": metric}
            rows.append(row | dict(measure(output, labels)))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    return pd.DataFrame(rows)


@torch.inference_mode()
def embed(network: SegmentationNetwork, image: np.ndarray) -> SegmentationOutput:
    """Logits and embeddings of all slices of an image (z, y, x); an end slice is its own neighbour."""
    padded = torch.from_numpy(np.pad(image, [(1, 1), (0, 0), (0, 0)], mode="edge")).float() / 255
    return network(padded.unfold(0, 3, 1).movedim(-1, 1))


def activity(*samplers: Sampler) -> Callable[[SegmentationOutput, torch.Tensor], dict[str, float]]:
    """For `measure`: of each sampler's triplets the share that is active (σ = 0.7), under the sampler's letter.

    Under "<letter> anchors" the share of the prostate that may become an anchor.
    """

    def measure(output: SegmentationOutput, labels: torch.Tensor) -> dict[str, float]:
        probability, row = output.logits.softmax(dim=1)[:, 1], {}
        for sampler in samplers:
            drawn = sampler(labels, probability, torch.Generator().manual_seed(0))
            a, p, n = (gather_embeddings(output.embeddings, voxels) for voxels in drawn)
            row[sampler.letter] = (squared_distance(a, p) - squared_distance(a, n) + 0.7 > 0).float().mean().item()
            anchors = sampler.candidates(labels, probability)[0]
            row[f"{sampler.letter} anchors"] = (anchors.sum() / (labels == 1).sum()).item()
        return row

    return measure


def eight_patients() -> tuple[np.ndarray, np.ndarray]:
    """DSC of eight simulated patients by methods A and B. Lesson 6 tells the truth of them after its guess."""
    rng = np.random.default_rng(3)
    a = rng.normal(0.86, 0.03, 8)
    b = a + rng.normal(0, 0.006, 8)
    a[5] -= 0.10
    return a, b


def show_slice(ax: Axes, image: np.ndarray, masks: Mapping[str, np.ndarray], title: str = "") -> None:
    """An axial slice in mm, with the outlines of "truth" and "prediction", if given."""
    height, width = np.multiply(image.shape, SPACING_MM[1:])
    extent = (0, width, height, 0)
    ax.imshow(np.asarray(image), cmap="gray", extent=extent)
    for name, mask in masks.items():
        ax.contour(np.asarray(mask), [0.5], colors=OUTLINES[name], linewidths=1.6, extent=extent, origin="upper")
        ax.plot([], color=OUTLINES[name], label=name)
    ax.set(title=title, xlabel="to the patient's left, mm", ylabel="to the back, mm")


@cache
def solved(lesson: str) -> nbformat.NotebookNode:
    """A solved lesson, run; this takes as long as the lesson computes, the first time."""
    path = repository() / f"notebooks/lessons/solutions/{lesson}.ipynb"
    return NotebookClient(nbformat.read(path, 4), kernel_name="python3", startup_timeout=300).execute(
        cwd=str(path.parent)
    )


def shown(lesson: str, text: str) -> list[nbformat.NotebookNode]:
    """What the code cell that holds this text puts out."""
    (cell,) = (cell for cell in solved(lesson).cells if cell.cell_type == "code" and text in cell.source)
    return cell.outputs


def picture(lesson: str, text: str) -> Image:
    """The figure of the code cell that holds this text."""
    (png,) = (output.data["image/png"] for output in shown(lesson, text) if "image/png" in output.get("data", {}))
    height, width = plt.imread(BytesIO(b64decode(png))).shape[:2]
    return Image(b64decode(png), width=min(900, 300 * width // height))  # leaves a slide room for what is printed


def printed(lesson: str, text: str, *starts: str) -> None:
    """Print what the code cell that holds this text prints: the lines that start so, or all but the guesses."""
    lines = "".join(output.get("text", "") for output in shown(lesson, text)).splitlines()
    kept = [line for line in lines if line.startswith(starts or "") and not line.startswith("your guess")]
    print("\n".join(line.partition(" (your guess")[0].partition("; your guess")[0] for line in kept))
