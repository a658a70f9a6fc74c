"""Running a 2.5D network fully convolutionally over a volume, slice by slice; or a 3D network, all in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mupkg.metrics import dice
from mupkg.models import MULTIPLE, VNET_MULTIPLE, Crop, SegmentationOutput, is_3d

Box = tuple[slice, slice, slice]  # voxels (z, y, x); rows and columns start at even ones

VOXELS_AT_ONCE = 2**16  # 4 slices of 128 x 128: a quarter of the memory of 16, and on a CPU no slower (caches)


def neighbouring_slices(
    volume: UInt8[np.ndarray, "z y x"], middle: Int[np.ndarray, " n"], channels: int
) -> Float[Tensor, "n c y x"]:
    """Each middle slice with its neighbours, in [0, 1]; beyond the ends the end slice is taken again."""
    offsets = np.arange(channels) - channels // 2
    rows = np.clip(middle[:, None] + offsets, 0, len(volume) - 1)
    return torch.from_numpy(volume[rows]).float().div_(255)


@torch.inference_mode()
def run_slices(
    network: nn.Module,
    volume: UInt8[np.ndarray, "z y x"],
    middle: Int[np.ndarray, " n"],
    channels: int,
    precision: Literal["no", "bf16"] = "no",
    window: Crop | None = None,
) -> SegmentationOutput:
    """Logits and embeddings of some slices of a volume, float32; padded to a multiple of 8 and cut back.

    A 3D network sees the whole volume, padded likewise to a multiple of 16, whichever slices are asked for.

    Args:
        window: rows and columns of which the network gives its output; None for all, which any network does.
    """
    rows, columns = window or (slice(0, size) for size in volume.shape[1:])
    device = next(network.parameters()).device
    if whole := is_3d(network):
        deep = np.pad(volume, [(0, -len(volume) % VNET_MULTIPLE), (0, 0), (0, 0)], "edge")  # as in its training
        images, multiple = torch.from_numpy(deep).float().div_(255)[None, None], VNET_MULTIPLE
    else:
        images, multiple = neighbouring_slices(volume, middle, channels), MULTIPLE
    images = F.pad(images.to(device), [end for size in images.shape[:1:-1] for end in (0, -size % multiple)])
    network.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        if whole or window is None:
            output = network(images)
        else:
            output = network(images, tuple(slice(w.start, w.stop + w.stop % 2) for w in window))
            rows, columns = (slice(0, w.stop - w.start) for w in window)
    if whole:
        output = [tensor[0, :, middle].movedim(1, 0) for tensor in output]
    return SegmentationOutput(*(tensor[..., rows, columns].float() for tensor in output))


def predict_volume(
    network: nn.Module, volume: UInt8[np.ndarray, "z y x"], **options: Any
) -> Float[np.ndarray, "z y x"]:
    """The foreground probability of every voxel of a prepared volume; no patch voting (Section III-A).

    Args:
        options: `channels`, `precision` and `box`, see `outputs`.
    """
    return np.concatenate([foreground(output) for output in outputs(network, volume, **options)])


def foreground(output: SegmentationOutput) -> Float[np.ndarray, "n y x"]:
    """The foreground probability of some slices."""
    return output.logits.softmax(dim=1)[:, 1].cpu().numpy()


def outputs(
    network: nn.Module,
    volume: UInt8[np.ndarray, "z y x"],
    *,
    channels: int = 3,
    precision: Literal["no", "bf16"] = "no",
    box: Box | None = None,
) -> Iterator[SegmentationOutput]:
    """What the network says of a volume, or of a box of it, some slices at a time.

    Args:
        network: returns a `SegmentationOutput`; with a `box` one of `mupkg.models`.
        volume: prepared, uint8.
        channels: neighbouring slices that go in: 3 in stage 2, 5 in stage 1; a 3D network does without.
        precision: "no" (float32), or "bf16" (autocast): half the time where the processor multiplies bf16 itself;
            probabilities near 0.5 shift by some hundredths, and so a DSC by up to some thousandths.
        box: the only voxels to look at; the network sees what lies around them all the same.
    """
    slices, *window = box or (slice(0, len(volume)),)
    at_once = len(volume) if is_3d(network) else max(1, VOXELS_AT_ONCE // (volume.shape[1] * volume.shape[2]))
    for start in range(slices.start, slices.stop, at_once):
        middle = np.arange(start, min(start + at_once, slices.stop))
        yield run_slices(network, volume, middle, channels, precision, tuple(window) or None)


def mean_dice(
    network: nn.Module,
    volumes: Sequence[UInt8[np.ndarray, "z y x"]],
    labels: Sequence[UInt8[np.ndarray, "z y x"]],
    *,
    channels: int,
) -> float:
    """Mean DSC over prepared volumes on the working grid: what training validates by.

    A volume without prostate, such as a region that missed it, is left out: calling all of it background would count
    as perfect.

    Raises:
        ValueError: if no volume holds prostate.
    """
    scores = [
        dice(predict_volume(network, np.asarray(volume), channels=channels) > 0.5, np.asarray(label))
        for volume, label in zip(volumes, labels, strict=True)
        if np.any(label)
    ]
    if not scores:
        raise ValueError(
            "there is no case to validate on: give the cohort a validation split, and see in regions.csv whether its "
            "regions hold any prostate"
        )
    return float(np.mean(scores))
