"""Which voxels form the tuples: random (R), focal hard negative (H) and contour-aware (C) sampling.

Section III-B.2 and Fig. 5 of the paper. Only indices are chosen here; no gradient flows. Labels are 2D or 3D,
integers or boolean. Foreground is 1, background 0; any other value is never drawn. A draw covers all images at
once and has a fixed size, so that a GPU never waits for the CPU: images that lack candidates are marked.
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Generator, Tensor
from torch.nn import functional as F

ANCHORS, TAU = 20, 0.1  # the paper's k and the threshold of Eq. (1)
Labels = Integer[Tensor, "n *spatial"] | Bool[Tensor, "n *spatial"]
Mask = Bool[Tensor, "n *spatial"]
Probability = Float[Tensor, "n *spatial"]
Candidates = Bool[Tensor, "n voxels"]


def whole_number(name: str, value: object) -> int:
    """An option of at least 1, of any integer type (NumPy's too) but bool; else a ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return operator.index(value)


def real_number(name: str, value: object, below: float = float("inf")) -> float:
    """An option of 0 or more and below a bound, a number but no bool; else a ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < below:
        raise ValueError(f"{name} must be a number of at least 0 and below {below:g}, not {value!r}")
    return float(value)


def switch(name: str, value: object) -> bool:
    """An option that is True or False; else a ValueError ("no" would pass for True)."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")
    return value


class VoxelTuples(NamedTuple):
    """Flat indices into `labels.flatten()`; entry t of the three is tuple t, all in the same image."""

    anchors: Int[Tensor, " t"]
    positives: Int[Tensor, " t"]
    negatives: Int[Tensor, " t"]


def contour(labels: Labels) -> Mask:
    """Foreground voxels with a background neighbour along an axis (4 neighbours in 2D, 6 in 3D).

    The patch's own border is a cut through the organ, not a contour, and does not count.
    """
    foreground, background = labels == 1, labels == 0
    beside = torch.zeros_like(foreground)
    for axis in range(1, labels.ndim):
        length = max(labels.shape[axis] - 1, 0)
        beside.narrow(axis, 0, length).logical_or_(background.narrow(axis, 1, length))
        beside.narrow(axis, 1, length).logical_or_(background.narrow(axis, 0, length))
    return beside & foreground


def distance_to_contour(labels: Labels, reach: int) -> Float[Tensor, "n *spatial"]:
    """Each voxel's distance to the nearest contour voxel, in voxels; where it is above `reach`, a number above it."""
    squared = torch.full(labels.shape, torch.inf, device=labels.device).masked_fill(contour(labels), 0.0)
    steps = torch.arange(-reach, reach + 1, device=labels.device).square()
    for axis in range(1, labels.ndim):  # squares add up: the least is found along one axis after the other
        windows = F.pad(squared.movedim(axis, -1), (reach, reach), value=torch.inf).unfold(-1, 2 * reach + 1, 1)
        squared = (windows + steps).amin(dim=-1).movedim(-1, axis)
    return squared.sqrt()


def draw_with_replacement(candidates: Candidates, count: int, generator: Generator | None) -> Int[Tensor, "n count"]:
    """`count` independent uniform draws among each row's candidates; a row without any gives index 0."""
    ranks = candidates.cumsum(dim=1, dtype=torch.int32)  # a candidate's rank among its row's, from 1
    total = ranks[:, -1:]
    # 48 random bits in whole numbers: float32 has 24, too few to reach every voxel of a large scan.
    high, low = torch.randint(2**24, (2, len(candidates), count), generator=generator, device=candidates.device)
    chosen = (high * 2**24 + low) % total.clamp(min=1) + 1
    return torch.searchsorted(ranks, chosen.minimum(total).int())


def draw_without_replacement(
    candidates: Candidates, count: int, generator: Generator | None
) -> Int[Tensor, "n count"]:
    """`count` distinct uniform draws; in rows with fewer candidates, draws with replacement (reading R5)."""
    repeated = draw_with_replacement(candidates, count, generator)
    # float32 keys are multiples of 2^-24: in a large scan many are equal, and topk chooses unfairly among these.
    precise = torch.float64 if candidates.shape[1] > 2**22 else torch.float32
    keys = torch.rand(candidates.shape, generator=generator, device=candidates.device, dtype=precise)
    keys = keys.masked_fill_(~candidates, -1.0)
    distinct = keys.topk(min(count, keys.shape[1]), dim=1).indices
    if distinct.shape[1] < count:  # fewer voxels than draws: no row can have enough
        return repeated
    return torch.where(candidates.sum(dim=1, keepdim=True) >= count, distinct, repeated)


class Sampler:
    """k anchors per image, m positives and m negatives per anchor, paired one to one: k * m tuples per image.

    Args:
        anchors: k, anchors per image (20 in the paper).
        pairs: m, positives and negatives per anchor (1 in the paper; reading R13).
        near_negatives: N, negatives no farther than 2 voxels from the contour (not in the paper).
    """

    letter: str  # its name in a configuration's; N and P are taken
    title: str

    def __init__(self, anchors: int = ANCHORS, pairs: int = 1, *, near_negatives: bool = False):
        self.anchors, self.pairs = whole_number("anchors", anchors), whole_number("pairs", pairs)
        self.near_negatives = switch("near_negatives", near_negatives)

    def candidates(self, labels: Labels, foreground_probability: Probability | None) -> tuple[Mask, Mask, Mask]:
        """The voxels that may be anchor, positive and negative; `draw` then narrows the last for N."""
        raise NotImplementedError(f"{type(self).__name__} must implement candidates(labels, probability)")

    @torch.no_grad()
    def draw(
        self, labels: Labels, foreground_probability: Probability | None = None, generator: Generator | None = None
    ) -> tuple[VoxelTuples, Bool[Tensor, " t"]]:
        """Exactly N * k * m tuples, and which of them are valid. Never waits for the device.

        ValueError for labels without a batch axis, or probabilities of another shape.
        """
        if labels.ndim < 3:  # rows would be taken for images
            raise ValueError(f"labels must be (N, *spatial), not {tuple(labels.shape)}; of one image, labels[None]")
        if foreground_probability is not None and foreground_probability.shape != labels.shape:
            shapes = tuple(labels.shape), tuple(foreground_probability.shape)
            raise ValueError("labels are {} but the probabilities {}".format(*shapes))
        anchor, positive, negative = self.candidates(labels, foreground_probability)
        if self.near_negatives:
            negative = negative & (distance_to_contour(labels, 2) <= 2)
        sets = [mask.flatten(1) for mask in (anchor, positive, negative)]
        valid = torch.stack([mask.any(dim=1) for mask in sets]).all(dim=0)
        anchors = draw_without_replacement(sets[0], self.anchors, generator).repeat_interleave(self.pairs, dim=1)
        others = [draw_with_replacement(mask, anchors.shape[1], generator) for mask in sets[1:]]
        first_voxel = torch.arange(len(labels), device=labels.device)[:, None] * sets[0].shape[1]
        tuples = VoxelTuples(*((indices + first_voxel).flatten() for indices in (anchors, *others)))
        return tuples, valid.repeat_interleave(anchors.shape[1])

    def __call__(
        self, labels: Labels, foreground_probability: Probability | None = None, generator: Generator | None = None
    ) -> VoxelTuples:
        """The valid tuples alone, T <= N * k * m; an image that lacks a candidate set contributes none.

        Args:
            labels: 1 for prostate, 0 for background.
            foreground_probability: the head's; only `HardNegativeSampler` looks at it.
            generator: on the labels' device; the global one if None.
        """
        tuples, valid = self.draw(labels, foreground_probability, generator)
        return VoxelTuples(*(indices[valid] for indices in tuples))


def shuffle_roles(tuples: VoxelTuples, images: int, generator: Generator | None = None) -> VoxelTuples:
    """A control, not in the paper: deals each image's voxels, drawn by `Sampler.draw`, to the roles at random."""
    drawn = torch.stack(tuples).unflatten(1, (images, -1)).transpose(0, 1).flatten(1)  # one row per image
    order = torch.rand(drawn.shape, generator=generator, device=drawn.device).argsort(dim=1)
    return VoxelTuples(*drawn.gather(1, order).unflatten(1, (3, -1)).transpose(0, 1).flatten(1))


class RandomSampler(Sampler):
    """R: anchors and positives anywhere in the foreground, negatives anywhere in the background."""

    letter, title = "R", "random"

    def candidates(self, labels: Labels, foreground_probability: Probability | None) -> tuple[Mask, Mask, Mask]:
        foreground = labels == 1
        return foreground, foreground, labels == 0


class HardNegativeSampler(Sampler):
    """H: anchors in the foreground where the head errs by more than tau, abs(p - y) > tau (Eq. 1).

    The paper's "negative" means wrongly predicted: these anchors are prostate. Negatives are drawn as R draws them.

    Args:
        threshold: tau (0.1 in the paper), in [0, 1).
    """

    letter, title = "H", "focal hard negative"

    def __init__(
        self, anchors: int = ANCHORS, pairs: int = 1, threshold: float = TAU, *, near_negatives: bool = False
    ):
        super().__init__(anchors, pairs, near_negatives=near_negatives)
        self.threshold = real_number("threshold", threshold, below=1)

    def candidates(self, labels: Labels, foreground_probability: Probability | None) -> tuple[Mask, Mask, Mask]:
        if foreground_probability is None:
            raise ValueError("focal hard negative sampling needs foreground_probability (N, *spatial)")
        foreground = labels == 1
        hard = (foreground_probability - 1).abs() > self.threshold  # y is 1 in the foreground
        return foreground & hard, foreground, labels == 0


class ContourSampler(Sampler):
    """C: anchors and positives on the organ's contour, negatives anywhere in the background."""

    letter, title = "C", "contour-aware"

    def candidates(self, labels: Labels, foreground_probability: Probability | None) -> tuple[Mask, Mask, Mask]:
        edge = contour(labels)
        return edge, edge, labels == 0


SAMPLERS: dict[str, type[Sampler]] = {s.letter: s for s in (HardNegativeSampler, ContourSampler, RandomSampler)}
"""By letter, in the order that they have in a configuration's name. To add one: its class, its test, METHOD.md."""
