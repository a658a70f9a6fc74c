"""Training patches: neighbouring slices in, the label of the middle slice out; or 3D blocks with all their labels."""

from __future__ import annotations

import copy
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
        images, labels: prepared volumes (z, y, x), uint8 (labels may be bool); memory-mapped arrays do.
        patch_size: height and width of a patch in voxels.
        channels: neighbouring slices that go in (odd): 3 in stage 2, 5 in stage 1.
        batch_size: patches in a batch.
        patches_per_image: patches an epoch takes from each volume (500 in the paper).
        seed: of all draws.
        depth: slices of a 3D block, for VNet; takes the place of `channels`. Images are then (N, 1, D, H, W) and
            labels (N, D, H, W).

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
        depth: int | None = None,
    ):
        if not images or len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels: one label for each, at least one")
        if channels % 2 == 0 and depth is None:
            raise ValueError(f"channels must be odd (a middle slice and its neighbours), not {channels}")
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            if image.shape != label.shape or image.ndim != 3:
                raise ValueError(f"volume {number}: image {image.shape} and label {label.shape} must be equal and 3D")
            if image.dtype != np.uint8:
                raise ValueError(f"volume {number}: is {image.dtype}; a prepared volume is uint8, 0 to 255")
            if label.dtype not in (np.uint8, np.bool_):  # 0.9 would become 0 and 257 become 1 without a word
                raise ValueError(
                    f"volume {number}: its label is {label.dtype}; make it uint8 or bool, 1 for prostate"
                )
        channels = depth or channels  # slices of a patch
        self.labelled = slice(0, channels) if depth else slice(channels // 2, channels // 2 + 1)
        smallest = (channels, *patch_size)
        self.images = [_pad(image, smallest) for image in images]
        self.labels = [_pad(label, smallest) for label in labels]
        self.patch_size, self.channels, self.batch_size = patch_size, channels, batch_size
        self.patches_per_image, self.seed, self.depth = patches_per_image, seed, depth
        self.epoch_length = patches_per_image * len(images)
        self._epoch: tuple[int, Int[np.ndarray, "p 4"]] | None = None
        self._there: _Resident | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all volumes."""
        return sum(volume.nbytes for volume in (*self.images, *self.labels))

    @property
    def resident(self) -> bool:
        """Whether the volumes lie in a device's memory, see `to`."""
        return self._there is not None

    def to(self, device: torch.device | str) -> PatchSource:
        """The same source, to the bit, with all its volumes in the memory of a device, which cuts the patches.

        On a GPU nothing is then copied to it in a step but the patches' positions, and nothing waits for it. Takes
        `nbytes` there; this source stays as it is.
        """
        moved = copy.copy(self)
        moved._there = _Resident(self, torch.device(device))
        return moved

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

    def batch(self, step: int) -> tuple[Float[Tensor, "n c *spatial"], Int[Tensor, "n *spatial"]]:
        """Batch number `step`, counted from 0: images float32 in [0, 1], labels int64."""
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, numbers = np.divmod(numbers, self.epoch_length)
        rows = [self.positions(epoch)[numbers[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
        images, labels = (self._there or self._cut)(np.concatenate(rows))
        images, labels = (images[:, None], labels) if self.depth else (images, labels[:, 0])
        # A tensor as divisor: by a Python number a GPU multiplies with its rounded reciprocal.
        return images.float().div_(torch.full((), 255.0, device=images.device)), labels.long()

    def _cut(self, rows: Int[np.ndarray, "n 4"]) -> tuple[UInt8[Tensor, "n c h w"], UInt8[Tensor, "n d h w"]]:
        height, width = self.patch_size
        images = np.empty((len(rows), self.channels, height, width), np.uint8)
        first, last = self.labelled.start, self.labelled.stop
        labels = np.empty((len(rows), last - first, height, width), np.uint8)
        for row, (volume, z, y, x) in enumerate(rows):
            plane = slice(y, y + height), slice(x, x + width)
            images[row] = self.images[volume][z : z + self.channels, *plane]
            labels[row] = self.labels[volume][z + first : z + last, *plane]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "n c *spatial"], Int[Tensor, "n *spatial"]]]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1


class _Resident:
    """All volumes of a source end to end in a device's memory; every voxel of a batch is gathered at one stroke."""

    def __init__(self, source: PatchSource, device: torch.device):
        shapes = np.array([volume.shape for volume in source.images], np.int64)
        sizes = shapes.prod(axis=1)
        self.first = np.cumsum(sizes) - sizes  # a volume's first voxel in the flat tensors
        self.steps = np.column_stack([shapes[:, 1] * shapes[:, 2], shapes[:, 2]])  # to the next slice, the next row
        self.images, self.labels = (_end_to_end(v, device) for v in (source.images, source.labels))
        self.labelled, sides = source.labelled, (source.channels, *source.patch_size)
        self.slices, self.rows, self.columns = (torch.arange(side, device=device) for side in sides)

    def __call__(self, rows: Int[np.ndarray, "n 4"]) -> tuple[UInt8[Tensor, "n c h w"], UInt8[Tensor, "n d h w"]]:
        volume, z, y, x = rows.T.astype(np.int64)
        to_slice, to_row = self.steps[volume].T
        corners = torch.from_numpy(np.stack([self.first[volume] + z * to_slice + y * to_row + x, to_slice, to_row]))
        corner, to_slice, to_row = corners.to(self.images.device, non_blocking=True)[:, :, None, None, None]
        voxels = corner + to_slice * self.slices[:, None, None] + to_row * self.rows[:, None] + self.columns
        return self.images.take(voxels), self.labels.take(voxels[:, self.labelled])


def _end_to_end(volumes: Sequence[Volume], device: torch.device) -> UInt8[Tensor, " voxels"]:
    flat = torch.empty(sum(volume.size for volume in volumes), dtype=torch.uint8, device=device)
    for part, volume in zip(flat.split([volume.size for volume in volumes]), volumes, strict=True):
        part.copy_(torch.from_numpy(np.array(volume)).flatten())
    return flat


def _pad(volume: Volume, smallest: tuple[int, int, int]) -> Volume:
    missing = np.maximum(0, np.array(smallest) - volume.shape)
    if not missing.any():
        return volume
    across, *in_plane = [(m // 2, m - m // 2) for m in missing]
    return np.pad(np.pad(volume, [across, (0, 0), (0, 0)], mode="edge"), [(0, 0), *in_plane])
