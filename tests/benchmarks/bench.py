"""Ours against what a user would take instead, side by side in one run: `make bench`.

Every comparison is interleaved (ours, peer, ours, peer, ...), because a machine's speed drifts; the ratio is the
median of the pairs' ratios and the spread their quartiles. Each table is kept under results/ with device and date.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from mupkg.configurations import build, configuration
from mupkg.data.patches import PatchSource
from mupkg.losses import SegmentationMetricLoss, VoxelMetricLoss
from mupkg.metrics import segmentation_metrics
from mupkg.models import SegmentationOutput
from mupkg.samplers import RandomSampler
from mupkg.stages.training import train

RESULTS = Path(__file__).parent / "results"


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(name: str, ours: Callable[[], object], peer: Callable[[], object], repeats: int, peer_name: str) -> dict:
    """Interleaved timings of two calls after one warm-up each."""
    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "what": name,
        "peer": peer_name,
        "ours_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "peer_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "quartiles": f"{low:.3f} to {high:.3f}",
        "repeats": repeats,
    }


def labelled_patches(batch: int, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and a disc of prostate in each."""
    y, x = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    disc = ((y - edge / 2) ** 2 + (x - edge / 2) ** 2 < (edge / 4) ** 2).long()
    return torch.rand(batch, 3, edge, edge), disc.expand(batch, edge, edge).contiguous()


def metric_branch(repeats: int) -> list[dict]:
    """A full-width training step of HC and HCP against the plain UNet; aim 2 %, bar 5 % more on a CPU."""
    images, labels = labelled_patches(4, 64)
    images = images.to(memory_format=torch.channels_last)

    def step(name: str) -> Callable[[], None]:
        network, loss = build(configuration(name))
        network = network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(0)

        def run() -> None:
            optimizer.zero_grad()
            loss(network(images), labels, generator).total.backward()
            optimizer.step()

        return run

    plain = step("UNet")
    return [
        compare(f"step of {n}, batch 4, full width", step(n), plain, repeats, "UNet's step")
        for n in ("MetricUNet-HC", "MetricUNet-HCP")
    ]


def against_all_pairs(repeats: int) -> list[dict]:
    """The metric loss against pytorch-metric-learning's, which computes an N x N matrix over the voxels it gets."""
    from pytorch_metric_learning.losses import TripletMarginLoss

    peer, rows = TripletMarginLoss(margin=0.7), []
    for edge in (8, 16, 24, 32, 64):
        _, labels = labelled_patches(1, edge)
        embeddings = torch.rand(1, 256, edge, edge, requires_grad=True)
        ours = SegmentationMetricLoss([RandomSampler()], VoxelMetricLoss())
        output = SegmentationOutput(torch.zeros(1, 2, edge, edge), embeddings)
        voxels = embeddings.flatten(2)[0].T

        def theirs(voxels: torch.Tensor = voxels, labels: torch.Tensor = labels) -> None:
            peer(voxels, labels.flatten()).backward(retain_graph=True)

        def own(
            loss: torch.nn.Module = ours, output: SegmentationOutput = output, labels: torch.Tensor = labels
        ) -> None:
            loss(output, labels).total.backward(retain_graph=True)

        triplets = int(labels.sum()) ** 2 * int((labels == 0).sum())
        if triplets * 8 * 3 > 5e8:  # their index tensors alone
            rows.append(
                {
                    "what": f"metric loss on one {edge} x {edge} patch",
                    "peer": "pytorch-metric-learning",
                    "ours_ms": 1e3 * min(seconds(own) for _ in range(repeats)),
                    "peer_ms": float("nan"),
                    "ratio": float("nan"),
                    "quartiles": f"not run: {triplets:.1e} triplets",
                    "repeats": repeats,
                }
            )
            continue
        rows.append(
            compare(f"metric loss on one {edge} x {edge} patch", own, theirs, repeats, "pytorch-metric-learning")
        )
    return rows


def patches(repeats: int) -> list[dict]:
    """Batches of 30 patches of 64 x 64 x 3 with labels from eight 128-cubes, one thread."""
    import torchio
    from monai.transforms import RandSpatialCropSamplesd

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        images, labels = [], []
        for number in range(8):
            for kind, kept in (("image", images), ("label", labels)):
                path = Path(folder) / f"{number}_{kind}.npy"
                np.save(path, rng.integers(0, 255 if kind == "image" else 2, (128, 128, 128), dtype=np.uint8))
                kept.append(np.load(path, mmap_mode="r"))
        source, step = PatchSource(images, labels), iter(range(10**9))
        subjects = [
            torchio.Subject(
                image=torchio.ScalarImage(tensor=torch.from_numpy(i.astype(np.float32))[None]),
                label=torchio.LabelMap(tensor=torch.from_numpy(np.array(t))[None]),
            )
            for i, t in zip(images, labels, strict=True)
        ]
        queue = torchio.Queue(
            torchio.SubjectsDataset(subjects), 240, 30, torchio.data.UniformSampler((3, 64, 64)), num_workers=0
        )
        loader = torchio.SubjectsLoader(queue, batch_size=30, num_workers=0)
        batches = iter(loader)
        crops = RandSpatialCropSamplesd(["image", "label"], (3, 64, 64), num_samples=30, random_size=False)
        tensors = [
            {"image": torch.from_numpy(i.astype(np.float32))[None], "label": torch.from_numpy(np.array(t))[None]}
            for i, t in zip(images, labels, strict=True)
        ]
        turn = iter(range(10**9))

        def ours() -> None:
            for _ in range(8):
                source.batch(next(step))

        def queued() -> None:
            nonlocal batches
            for _ in range(8):
                try:
                    next(batches)
                except StopIteration:
                    batches = iter(loader)
                    next(batches)

        def cropped() -> None:
            for _ in range(8):
                drawn = crops(tensors[next(turn) % 8])
                torch.stack([d["image"] for d in drawn]), torch.stack([d["label"] for d in drawn])

        return [
            compare("8 batches of 30 patches", ours, queued, repeats, "TorchIO Queue"),
            compare("8 batches of 30 patches", ours, cropped, repeats, "MONAI RandSpatialCropSamples"),
        ]


def metrics(repeats: int) -> list[dict]:
    """All seven metrics of a 40 ml prostate in a 128-cube of 1 mm, against peers' surface distances alone."""
    import surface_distance
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    grid = np.indices((128, 128, 128)) - 63.5
    radius = (
        np.sqrt((grid**2).sum(axis=0))
        + 2 * ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(128, 128, 128)), 4) * 30
    )
    truth, prediction = radius < 21.2, np.roll(radius, (2, 1, 0), (0, 1, 2)) < 21.6
    one_hot = [torch.from_numpy(np.stack([~m, m]))[None].float() for m in (prediction, truth)]

    def ours() -> None:
        segmentation_metrics(prediction, truth, spacing_mm=(1, 1, 1))

    def monai() -> None:
        compute_average_surface_distance(*one_hot, symmetric=True, spacing=1.0)
        compute_hausdorff_distance(*one_hot, percentile=95, spacing=1.0)

    def deepmind() -> None:
        found = surface_distance.compute_surface_distances(truth, prediction, (1, 1, 1))
        surface_distance.compute_average_surface_distance(found)
        surface_distance.compute_robust_hausdorff(found, 95)

    name = "seven metrics, 128-cube"
    return [
        compare(name, ours, monai, repeats, "MONAI, ASD + HD95"),
        compare(name, ours, deepmind, repeats, "surface-distance, ASD + HD95"),
    ]


def training_loop(repeats: int) -> list[dict]:
    """`train` against the bare forward + backward + SGD on the same batches; bar 3 % more on a CPU."""
    rng = np.random.default_rng(0)
    volumes = [rng.integers(0, 255, (32, 128, 128), dtype=np.uint8) for _ in range(4)]
    labels = [(v > 200).astype(np.uint8) for v in volumes]
    source = PatchSource(volumes, labels, batch_size=8)
    steps = 20

    def bare() -> None:
        network, loss = build(configuration("MetricUNet-HCP"), base_filters=16, embedding_dim=64)
        network = network.to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        batches = [source.batch(step) for step in range(steps)]
        bare.seconds = seconds(lambda: [_step(network, loss, optimizer, *batch) for batch in batches])

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            network, loss = build(configuration("MetricUNet-HCP"), base_filters=16, embedding_dim=64)
            history = train(
                network, loss, source, folder, steps=steps, validate=lambda n: 0.0, validate_every=steps, metadata={}
            )
        ours.seconds = float((history["seconds"] * history["step"].diff().fillna(history["step"].iloc[0])).sum())

    ratios, times = [], []
    for _ in range(repeats):
        ours(), bare()
        ratios.append(ours.seconds / bare.seconds)
        times.append((ours.seconds, bare.seconds))
    low, _, high = statistics.quantiles(ratios, n=4)
    return [
        {
            "what": f"{steps} training steps, width 16",
            "peer": "bare loop",
            "ours_ms": 1e3 * statistics.median(a for a, _ in times),
            "peer_ms": 1e3 * statistics.median(b for _, b in times),
            "ratio": statistics.median(ratios),
            "quartiles": f"{low:.3f} to {high:.3f}",
            "repeats": repeats,
        }
    ]


def _step(network, loss, optimizer, images, labels) -> None:
    optimizer.zero_grad()
    loss(network(images.to(memory_format=torch.channels_last)), labels).total.backward()
    optimizer.step()


BENCHMARKS = {f.__name__: f for f in (metric_branch, against_all_pairs, patches, metrics, training_loop)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.names:
        rows += [{"benchmark": name, **row} for row in BENCHMARKS[name](arguments.repeats)]
        print(pd.DataFrame(rows).tail(4).round(3).to_string(index=False), flush=True)
    device = f"cpu-{platform.machine()}-{arguments.threads}thread"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{device}-{date.today():%Y-%m-%d}.csv"
    pd.DataFrame(rows).round(4).to_csv(path, index=False)
    print(f"\nkept in tests/benchmarks/results/{path.name}; ratio below 1: ours is faster")


if __name__ == "__main__":
    main()
