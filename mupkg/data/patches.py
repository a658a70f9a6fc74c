"""Training patches: neighbouring slices in, the label of the middle slice out; or 3D blocks with all their labels."""

from __future__ import annotations

import copy
import warnings
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
            # Anything else would be cast without a word: 0.9 would become 0, and 257 become 1.
            typed = image.dtype == np.uint8 and label.dtype in (np.uint8, np.bool_)
            if not typed or image.ndim != 3 or image.shape != label.shape:
                raise ValueError(
                    f"volume {number}: image {image.dtype} {image.shape}, label {label.dtype} {label.shape}; they "
                    "must be 3D and of one shape, the image uint8 (prepared), the label uint8 or bool, 1 for prostate"
                )
        self.channels = depth or channels  # slices of a patch
        self.labelled = slice(None) if depth else channels // 2  # of these
        smallest = (self.channels, *patch_size)
        self.images = [_padded(image, smallest) for image in images]
        self.labels = [_padded(label, smallest) for label in labels]
        self.patch_size, self.batch_size, self.depth = patch_size, batch_size, depth
        self.patches_per_image, self.seed = patches_per_image, seed
        self.epoch_length = patches_per_image * len(images)
        self._epoch: tuple[int, Int[np.ndarray, "p 4"]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all volumes."""
        return sum(volume.nbytes for volume in (*self.images, *self.labels))

    @property
    def device(self) -> torch.device:
        """Where the volumes lie and patches are cut."""
        return self.images[0].device

    def to(self, device: torch.device | str) -> PatchSource:
        """The same source, to the bit, with all its volumes in the memory of a device, which cuts the patches.

        No voxel is then copied to a GPU in a step, and nothing waits for it. Takes `nbytes` there; this source stays
        as it is.
        """
        moved = copy.copy(self)
        moved.images, moved.labels = ([v.to(device) for v in volumes] for volumes in (self.images, self.labels))
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
        patches = [self._cut(*row) for row in np.concatenate(rows).tolist()]
        images, labels = map(torch.stack, zip(*patches, strict=True))
        images = images[:, None] if self.depth else images
        # A tensor as divisor: by a Python number a GPU multiplies with its rounded reciprocal.
        return images.float().div_(torch.full((), 255.0, device=images.device)), labels.long()

    def _cut(self, volume: int, z: int, y: int, x: int) -> tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "*spatial"]]:
        height, width = self.patch_size
        place = slice(z, z + self.channels), slice(y, y + height), slice(x, x + width)
        return self.images[volume][place], self.labels[volume][place][self.labelled]

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "n c *spatial"], Int[Tensor, "n *spatial"]]]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1


def _padded(volume: Volume, smallest: tuple[int, int, int]) -> UInt8[Tensor, "z y x"]:
    """The volume as a tensor, read in place if it is large enough: a memory-mapped one stays on disk."""
    missing = np.maximum(0, np.array(smallest) - volume.shape)
    if missing.any():
        across, *in_plane = [(m // 2, m - m // 2) for m in missing]
        volume = np.pad(np.pad(volume, [across, (0, 0), (0, 0)], mode="edge"), [(0, 0), *in_plane])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anybody write
        return torch.from_numpy(np.ascontiguousarray(volume).view(np.uint8))  # also of a volume that was flipped
