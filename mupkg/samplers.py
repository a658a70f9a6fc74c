"""Which voxels form the tuples: random (R), focal hard negative (H) and contour-aware (C) sampling.

Section III-B.2 and Fig. 5 of the paper. Only indices are chosen here; no gradient flows. Labels may be 2D or
3D, (N, H, W) or (N, D, H, W), integers or boolean. Foreground is 1, background 0; any other value is never drawn.

A draw is made for all images at once and has a fixed size, so that a GPU never waits for the CPU: images that
lack candidates are marked, not skipped in a loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

Labels = Integer[Tensor, "n *spatial"] | Bool[Tensor, "n *spatial"]


class VoxelTuples(NamedTuple):
    """Flat indices into `labels.flatten()`; entry t of the three is tuple t, all in the same image."""

    anchors: Int[Tensor, " t"]
    positives: Int[Tensor, " t"]
    negatives: Int[Tensor, " t"]


def contour(labels: Labels) -> Bool[Tensor, "n *spatial"]:
    """Foreground voxels with a background neighbour along an axis (4 neighbours in 2D, 6 in 3D).

    The patch's own border is a cut through the organ, not a contour, and does not count.
    """
    foreground, background = labels == 1, labels == 0
    beside_background = torch.zeros_like(foreground)
    for axis in range(1, labels.ndim):
        length = labels.shape[axis] - 1
        here, there = foreground.narrow(axis, 0, length), foreground.narrow(axis, 1, length)
        beside_background.narrow(axis, 0, length).logical_or_(here & background.narrow(axis, 1, length))
        beside_background.narrow(axis, 1, length).logical_or_(there & background.narrow(axis, 0, length))
    return beside_background


def near_contour(labels: Labels) -> Bool[Tensor, "n *spatial"]:
    """Voxels within 2 voxels (Euclidean, centre to centre) of a contour voxel, on both sides; for N, near negatives.

    Not in the paper. Of 2D labels the distance is in plane.
    """
    edge = contour(labels)
    near, block = edge.clone(), edge  # offsets within 2 voxels: two steps along one axis, or the block of 3 x 3 (x 3)
    for axis in range(1, labels.ndim):
        near |= _beside(edge, axis, 2)
        block = _beside(block, axis, 1)
    return near | block


def _beside(mask: Bool[Tensor, "n *spatial"], axis: int, steps: int) -> Bool[Tensor, "n *spatial"]:
    """`mask`, and the voxels that are `steps` voxels from it along an axis."""
    found, length = mask.clone(), max(0, mask.shape[axis] - steps)
    if length:
        found.narrow(axis, 0, length).logical_or_(mask.narrow(axis, steps, length))
        found.narrow(axis, steps, length).logical_or_(mask.narrow(axis, 0, length))
    return found


def draw_with_replacement(
    candidates: Bool[Tensor, "n voxels"], count: int, generator: torch.Generator | None
) -> Int[Tensor, "n count"]:
    """`count` independent uniform draws among each row's candidates; a row without any gives index 0."""
    ranks = candidates.cumsum(dim=1, dtype=torch.int32)  # a candidate's rank among its row's, from 1
    total = ranks[:, -1:]
    # 48 random bits in whole numbers: float32 has 24, too few to reach every voxel of a large scan.
    high, low = torch.randint(2**24, (2, len(candidates), count), generator=generator, device=candidates.device)
    chosen = (high * 2**24 + low) % total.clamp(min=1) + 1
    return torch.searchsorted(ranks, chosen.minimum(total).int())


def draw_without_replacement(
    candidates: Bool[Tensor, "n voxels"], count: int, generator: torch.Generator | None
) -> Int[Tensor, "n count"]:
    """`count` distinct uniform draws; in rows with fewer candidates, draws with replacement (reading R5)."""
    repeated = draw_with_replacement(candidates, count, generator)
    # float32 keys are multiples of 2^-24: in a large scan many are equal, and topk chooses unfairly among these.
    precise = torch.float64 if candidates.shape[1] > 2**22 else torch.float32
    keys = torch.rand(candidates.shape, generator=generator, device=candidates.device, dtype=precise)
    keys = keys.masked_fill_(~candidates, -1.0)
    distinct = keys.topk(min(count, keys.shape[1]), dim=1).indices
    enough = candidates.sum(dim=1, keepdim=True) >= count
    if distinct.shape[1] < count:  # fewer voxels than anchors: no row can have enough
        return repeated
    return torch.where(enough, distinct, repeated)


class Sampler:
    """k anchors an image, m positives and m negatives an anchor, paired one to one: k * m tuples an image.

    Args:
        anchors: k, anchors per image (20 in the paper).
        pairs: m, positives and negatives per anchor (1 in the paper; reading R13).
        near_negatives: N, negatives within 2 voxels of the contour only (not in the paper).
    """

    letter: str

    def __init__(self, anchors: int = 20, pairs: int = 1, *, near_negatives: bool = False):
        for name, value in {"anchors": anchors, "pairs": pairs}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.anchors, self.pairs, self.near_negatives = anchors, pairs, near_negatives

    def candidates(
        self, labels: Labels, foreground_probability: Float[Tensor, "n *spatial"] | None
    ) -> tuple[Bool[Tensor, "n *spatial"], Bool[Tensor, "n *spatial"], Bool[Tensor, "n *spatial"]]:
        """The voxels that may be anchor, positive and negative; `draw` narrows the last for near negatives."""
        raise NotImplementedError(f"{type(self).__name__} must implement candidates(labels, probability)")

    @torch.no_grad()
    def draw(
        self,
        labels: Labels,
        foreground_probability: Float[Tensor, "n *spatial"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[VoxelTuples, Bool[Tensor, " t"]]:
        """Exactly N * k * m tuples, and which of them are valid. Never waits for the device.

        Raises:
            ValueError: for labels without a batch axis, or probabilities of another shape.
        """
        if labels.ndim < 3:  # rows would be taken for images
            raise ValueError(f"labels must be (N, *spatial), not {tuple(labels.shape)}; of one image, labels[None]")
        if foreground_probability is not None and foreground_probability.shape != labels.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)} but the probabilities {tuple(foreground_probability.shape)}"
            )
        anchor, positive, negative = self.candidates(labels, foreground_probability)
        if self.near_negatives:
            negative = negative & near_contour(labels)
        sets = [mask.flatten(1) for mask in (anchor, positive, negative)]
        valid = torch.stack([mask.any(dim=1) for mask in sets]).all(dim=0)
        count = self.anchors * self.pairs
        anchors = draw_without_replacement(sets[0], self.anchors, generator)
        chosen = [
            anchors.repeat_interleave(self.pairs, dim=1),
            draw_with_replacement(sets[1], count, generator),
            draw_with_replacement(sets[2], count, generator),
        ]
        first_voxel = torch.arange(len(labels), device=labels.device)[:, None] * sets[0].shape[1]
        tuples = VoxelTuples(*((indices + first_voxel).flatten() for indices in chosen))
        return tuples, valid.repeat_interleave(count)

    def __call__(
        self,
        labels: Labels,
        foreground_probability: Float[Tensor, "n *spatial"] | None = None,
        generator: torch.Generator | None = None,
    ) -> VoxelTuples:
        """The valid tuples alone, T <= N * k * m; an image that lacks a candidate set contributes none.

        Args:
            labels: 1 for prostate, 0 for background.
            foreground_probability: what the head says; only `HardNegativeSampler` looks at it.
            generator: on the labels' device; the global one if None.
        """
        tuples, valid = self.draw(labels, foreground_probability, generator)
        return VoxelTuples(*(indices[valid] for indices in tuples))


def shuffle_roles(tuples: VoxelTuples, images: int, generator: torch.Generator | None = None) -> VoxelTuples:
    """The drawn voxels of each image, dealt to the three roles at random: a control (not in the paper).

    Args:
        tuples: as `Sampler.draw` gives them, the same number for each of the `images`.
    """
    drawn = torch.stack(tuples).unflatten(1, (images, -1)).transpose(0, 1).flatten(1)  # a row an image
    order = torch.rand(drawn.shape, generator=generator, device=drawn.device).argsort(dim=1)
    return VoxelTuples(*drawn.gather(1, order).unflatten(1, (3, -1)).transpose(0, 1).flatten(1))


class RandomSampler(Sampler):
    """R: anchors and positives anywhere in the foreground, negatives anywhere in the background."""

    letter = "R"

    def candidates(self, labels, foreground_probability=None):
        foreground = labels == 1
        return foreground, foreground, labels == 0


class HardNegativeSampler(Sampler):
    """H: anchors where the head errs by more than tau, abs(p - y) > tau (Eq. 1), in the foreground.

    Args:
        threshold: tau (0.1 in the paper), in [0, 1).
    """

    letter = "H"

    def __init__(self, anchors: int = 20, pairs: int = 1, threshold: float = 0.1, *, near_negatives: bool = False):
        super().__init__(anchors, pairs, near_negatives=near_negatives)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, not {threshold!r}")
        self.threshold = threshold

    def candidates(self, labels, foreground_probability=None):
        if foreground_probability is None:
            raise ValueError("focal hard negative sampling needs foreground_probability (N, *spatial)")
        foreground = labels == 1
        hard = (foreground_probability.detach() - 1).abs() > self.threshold  # y is 1 in the foreground
        return foreground & hard, foreground, labels == 0


class ContourSampler(Sampler):
    """C: anchors and positives on the organ's contour, negatives anywhere in the background."""

    letter = "C"

    def candidates(self, labels, foreground_probability=None):
        edge = contour(labels)
        return edge, edge, labels == 0


SAMPLERS: dict[str, type[Sampler]] = {s.letter: s for s in (HardNegativeSampler, ContourSampler, RandomSampler)}
