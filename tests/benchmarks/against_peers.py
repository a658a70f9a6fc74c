"""Patches and metrics against what a user would take instead."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from measuring import compare, isolated, memory_mb, seconds
from scipy import ndimage

from mupkg.data.patches import PatchSource
from mupkg.metrics import segmentation_metrics


def patches(repeats: int, quick: bool = False) -> list[dict]:
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


def prostates() -> tuple[np.ndarray, np.ndarray]:
    """Two ragged balls of 40 ml in a 128-cube of 1 mm, 2 mm apart: prediction and truth."""
    grid = np.indices((128, 128, 128)) - 63.5
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(128, 128, 128)), 4)
    radius = np.sqrt((grid**2).sum(axis=0)) + 60 * noise
    return np.roll(radius, (2, 1, 0), (0, 1, 2)) < 21.6, radius < 21.2


def metrics(repeats: int, quick: bool = False) -> list[dict]:
    """All seven metrics of a 40 ml prostate in a 128-cube of 1 mm, against peers' distances alone; bar 1/5."""
    import surface_distance
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    prediction, truth = prostates()
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
    scan = isolated(metrics_of_a_scan)
    return [
        compare(name, ours, monai, repeats, "MONAI, ASD + HD95"),
        compare(name, ours, deepmind, repeats, "surface-distance, ASD + HD95"),
        {
            "what": "seven metrics, 512 x 512 x 300 scan, uint8",
            "peer": "bar: 1 s, 1 GB",
            "ours_ms": scan["ms"],
            "ours_mb": scan["peak_mb"],
            "note": f"the process's peak; idle with both masks it takes {scan['idle_mb']:.0f} MB",
        },
    ]


def metrics_of_a_scan() -> dict[str, float]:
    """All seven metrics of the same prostates in whole scans."""
    masks = np.zeros((2, 300, 512, 512), np.uint8)
    masks[:, 86:214, 192:320, 192:320] = prostates()
    idle = memory_mb("VmRSS")
    segmentation_metrics(*masks[:, 80:90], spacing_mm=(1, 1, 1))
    return {"ms": 1e3 * seconds(lambda: segmentation_metrics(*masks, spacing_mm=(1, 1, 1))), "idle_mb": idle}
