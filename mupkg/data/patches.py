"""Training patches: neighbouring slices in, the label of the middle slice out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Volume = UInt8[np.ndarray, "z y x"]


class PatchSource:
    """Endless batches of patches, every one drawn uniformly so that it lies inside its region (reading R9).

    In each epoch every volume gives `patches_per_image` fresh patches (reading R14), in shuffled order. What
    batch number i holds depends on the seed and i alone, so that a broken-off training goes on exactly.

    Args:
        images, labels: prepared volumes (z, y, x), uint8; memory-mapped arrays do.
        patch_size: height and width of a patch in voxels.
        channels: neighbouring slices that go in (odd): 3 in stage 2, 5 in stage 1.
        batch_size: patches in a batch.
        patches_per_image: patches an epoch takes from each volume (500 in the paper).
        seed: of all draws.

    A volume smaller than a patch is padded: air in plane, its end slices across.
    """

    def __init__(
        self,
        images: Sequence[Volume],
        labels: Sequence[Volume],
        *,
        patch_size: tuple[int, int] = (64, 64),
        channels: int = 3,
        batch_size: int = 30,
        patches_per_image: int = 500,
        seed: int = 0,
    ):
        if not images or len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels: one label for each, at least one")
        if channels % 2 == 0:
            raise ValueError(f"channels must be odd (a middle slice and its neighbours), not {channels}")
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            if image.shape != label.shape or image.ndim != 3:
                raise ValueError(f"volume {number}: image {image.shape} and label {label.shape} must be equal and 3D")
            if image.dtype != np.uint8:
                raise ValueError(f"volume {number}: is {image.dtype}; a prepared volume is uint8, 0 to 255")
        smallest = (channels, *patch_size)
        self.images = [_pad(image, smallest) for image in images]
        self.labels = [_pad(label, smallest) for label in labels]
        self.patch_size, self.channels, self.batch_size = patch_size, channels, batch_size
        self.patches_per_image, self.seed = patches_per_image, seed
        self.epoch_length = patches_per_image * len(images)
        self._epoch: tuple[int, Int[np.ndarray, "p 4"]] | None = None

    def positions(self, epoch: int) -> Int[np.ndarray, "p 4"]:
        """All patches of an epoch in their order: volume, first slice, first row, first column."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            volume = rng.permutation(np.repeat(np.arange(len(self.images)), self.patches_per_image))
            shapes = np.array([image.shape for image in self.images])
            free = shapes[volume] - np.array([self.channels, *self.patch_size]) + 1
            # Half of what was drawn: this alone grows with the cohort, by 8 KB a volume; volumes stay on disk.
            self._epoch = epoch, np.column_stack([volume, rng.integers(0, free)]).astype(np.int32)
        return self._epoch[1]

    def batch(self, step: int) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, "n h w"]]:
        """Batch number `step`, counted from 0: images float32 in [0, 1], labels int64."""
        height, width = self.patch_size
        images = np.empty((self.batch_size, self.channels, height, width), np.uint8)
        labels = np.empty((self.batch_size, height, width), np.uint8)
        for row in range(self.batch_size):
            epoch, number = divmod(step * self.batch_size + row, self.epoch_length)
            volume, z, y, x = self.positions(epoch)[number]
            plane = slice(y, y + height), slice(x, x + width)
            images[row] = self.images[volume][z : z + self.channels, *plane]
            labels[row] = self.labels[volume][z + self.channels // 2, *plane]
        return torch.from_numpy(images).float().div_(255), torch.from_numpy(labels).long()

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "n c h w"], Int[Tensor, "n h w"]]]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1


def _pad(volume: Volume, smallest: tuple[int, int, int]) -> Volume:
    missing = np.maximum(0, np.array(smallest) - volume.shape)
    if not missing.any():
        return volume
    across, *in_plane = [(m // 2, m - m // 2) for m in missing]
    return np.pad(np.pad(volume, [across, (0, 0), (0, 0)], mode="edge"), [(0, 0), *in_plane])
