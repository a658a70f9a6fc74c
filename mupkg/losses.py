"""The voxel metric loss (Eq. 2, with hinges), the multi-task loss it is part of (Eq. 4), and controls.

Choosing voxels (samplers), gathering their embeddings, distance, loss and reduction are separate steps.
The embeddings of all tuples of a step are gathered once; distances are computed between the gathered rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mupkg.models import SegmentationOutput
from mupkg.samplers import Labels, Sampler, VoxelTuples, distance_to_contour, real_number, shuffle_roles, switch

IGNORED = -100  # the label of voxels that neither cross-entropy nor the samplers look at
MARGIN = 0.7  # sigma
Vectors = Float[Tensor, "t e"]  # gathered embeddings, a row a tuple
Valid = Bool[Tensor, " t"]  # the tuples that count
PerTuple = Float[Tensor, " t"]
Scalar = Float[Tensor, ""]


def gather_embeddings(embeddings: Float[Tensor, "n e *spatial"], voxels: Integer[Tensor, " t"]) -> Vectors:
    """The embeddings of the voxels with these flat indices into (N, *spatial), in float32."""
    # Not `embeddings[image, :, voxel]`: on a CPU with several threads its backward adds up voxels drawn twice in
    # any order, so that no run could be repeated.
    rows = embeddings.movedim(1, -1)
    if rows.is_contiguous():  # channels last in memory, as in training: no copy
        return rows.flatten(0, -2).index_select(0, voxels).float()
    # Channels first: `rows` would be a copy of all embeddings, so every number is fetched from its own place.
    channels, size = embeddings.shape[1], embeddings.shape[2:].numel()
    first = voxels.long() + voxels // size * ((channels - 1) * size)
    places = first[:, None] + torch.arange(channels, device=voxels.device) * size
    return embeddings.flatten().index_select(0, places.flatten()).view(places.shape).float()


def squared_distance(u: Vectors, v: Vectors) -> PerTuple:
    """Squared Euclidean distance over channels, row by row."""
    return (u - v).square().sum(dim=1)


class TupleLoss(nn.Module):
    """The mean of a loss over tuples (reading R7); subclasses implement `per_tuple`."""

    def forward(self, embeddings: Float[Tensor, "n e *spatial"], tuples: VoxelTuples) -> Scalar:
        """The loss of these tuples; without tuples a zero that still back-propagates."""
        valid = torch.ones_like(tuples.anchors, dtype=torch.bool)
        return self.of_vectors(*gather_embeddings(embeddings, torch.cat(tuples)).chunk(3), valid)

    def of_vectors(self, anchors: Vectors, positives: Vectors, negatives: Vectors, valid: Valid) -> Scalar:
        """The same loss from gathered embeddings; tuples that are not `valid` do not count."""
        losses = self.per_tuple(anchors, positives, negatives, valid)
        return losses.where(valid, 0.0).sum() / valid.sum().clamp(min=1)

    def per_tuple(self, anchors: Vectors, positives: Vectors, negatives: Vectors, valid: Valid) -> PerTuple:
        """The loss of each tuple, of the others too, which the mean leaves out."""
        raise NotImplementedError(f"{type(self).__name__} must implement per_tuple")


class VoxelMetricLoss(TupleLoss):
    """Triplet hinge, and for the P configurations a positive-pair hinge; the mean over all tuples.

    `max(0, d(a,p) - d(a,n) + margin) + pair_weight * max(0, d(a,p) - pair_distance)`, d the squared Euclidean
    distance. Eq. (2) prints neither the hinges nor the mean, and adds epsilon: see readings R6 and R7.

    Args:
        margin: sigma, in squared-distance units (0.7; 1.0 in the paper's Table III).
        pair_weight: beta; 0 leaves the pair term out, 0.1 in the P configurations.
        pair_distance: epsilon, the greatest squared distance wanted between positives.
        normalize: scale every embedding to unit length first (the paper does not).
        hinge: False for Eq. (2) as printed, without hinges and with epsilon added, but still the mean: a control.
    """

    def __init__(
        self,
        margin: float = MARGIN,
        pair_weight: float = 0.0,
        pair_distance: float = 0.01,
        normalize: bool = False,
        hinge: bool = True,
    ):
        super().__init__()
        self.margin, self.pair_weight = real_number("margin", margin), real_number("pair_weight", pair_weight)
        self.pair_distance = real_number("pair_distance", pair_distance)
        self.normalize, self.hinge = switch("normalize", normalize), switch("hinge", hinge)

    def _distances(self, anchors: Vectors, positives: Vectors, negatives: Vectors) -> tuple[PerTuple, PerTuple]:
        """d(a,p), and the triplet term d(a,p) - d(a,n) + margin before its hinge."""
        if self.normalize:
            anchors, positives, negatives = (F.normalize(x, dim=1) for x in (anchors, positives, negatives))
        to_positive = squared_distance(anchors, positives)
        return to_positive, to_positive - squared_distance(anchors, negatives) + self.margin

    @torch.no_grad()
    def active_share(self, anchors: Vectors, positives: Vectors, negatives: Vectors, valid: Valid) -> Scalar:
        """The share of the valid tuples whose triplet term is above zero, that of P apart; 0 without any."""
        active = self._distances(anchors, positives, negatives)[1] > 0
        return (active & valid).sum() / valid.sum().clamp(min=1)

    def per_tuple(self, anchors: Vectors, positives: Vectors, negatives: Vectors, valid: Valid) -> PerTuple:
        to_positive, losses = self._distances(anchors, positives, negatives)
        losses = F.relu(losses) if self.hinge else losses
        if self.pair_weight:
            pair = F.relu(to_positive - self.pair_distance) if self.hinge else to_positive + self.pair_distance
            losses = losses + self.pair_weight * pair
        return losses


class InfoNCELoss(TupleLoss):
    """A control in place of Eq. (2), not in the paper: InfoNCE over the drawn voxels.

    An anchor has to tell its own positive from all negatives that the sampler drew in the batch: cross-entropy of
    a softmax over cosine similarities / temperature. Memory grows with the square of the number of tuples.
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = real_number("the temperature of InfoNCE", temperature)
        if not self.temperature:
            raise ValueError("the temperature of InfoNCE must be above 0 (0.05 to 0.3 are usual)")

    def per_tuple(self, anchors: Vectors, positives: Vectors, negatives: Vectors, valid: Valid) -> PerTuple:
        anchors, positives, negatives = (F.normalize(x, dim=1) for x in (anchors, positives, negatives))
        to_positive = (anchors * positives).sum(dim=1, keepdim=True) / self.temperature
        to_negatives = (anchors @ negatives.T / self.temperature).masked_fill(~valid, -torch.inf)
        return torch.cat([to_positive, to_negatives], dim=1).logsumexp(dim=1) - to_positive[:, 0]


class DrawnCrossEntropy(TupleLoss):
    """A control, not in the paper: mean cross-entropy of the drawn voxels. Its vectors are their logits.

    Two of a tuple's three voxels are prostate. `balanced` weighs them as much together as the one of the background.
    """

    def __init__(self, balanced: bool = False):
        super().__init__()
        self.background = 2 if switch("balanced", balanced) else 1

    def per_tuple(self, anchors: Vectors, positives: Vectors, negatives: Vectors, valid: Valid) -> PerTuple:
        anchors, positives, negatives = (x.log_softmax(dim=1) for x in (anchors, positives, negatives))
        return -(anchors[:, 1] + positives[:, 1] + self.background * negatives[:, 0]) / (2 + self.background)


def voxel_cross_entropy(logits: Float[Tensor, "n classes *spatial"], labels: Integer[Tensor, "n *spatial"]) -> Scalar:
    """Mean cross-entropy over the voxels that are not IGNORED; 0 if all are.

    Raises:
        ValueError: on a CPU, for labels that are no class. To look for them, a GPU would wait in every step; there
            the kernel's own assertion, `t >= 0 && t < n_classes`, ends the training.
    """
    any_voxel, classes = (labels != IGNORED).any(), logits.shape[1]
    if torch.are_deterministic_algorithms_enabled():  # CUDA has no deterministic kernel for images, but one for lists
        logits, labels = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    try:
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    except IndexError:
        wrong = sorted({*labels.unique().tolist()} - {IGNORED, *range(classes)})
        cure = f"to ignore voxels, labels.long().masked_fill(labels == {wrong[-1]}, {IGNORED})"
        raise ValueError(f"labels must be 0 to {classes - 1} or {IGNORED}, but hold {wrong}; {cure}") from None
    return loss.where(any_voxel, 0.0)  # the mean of nothing is NaN


class LossTerms(NamedTuple):
    """Total, cross-entropy, and each sampler's metric loss (not yet weighted); all keep their graph."""

    total: Scalar
    cross_entropy: Scalar
    metric: dict[str, Scalar]


class SegmentationMetricLoss(nn.Module):
    """Cross-entropy over voxels + lambda * the sum of the samplers' metric losses (Eq. 4).

    Args:
        samplers: the configuration's samplers, each letter once; empty for a plain UNet.
        metric_loss: applied to each sampler's tuples; `VoxelMetricLoss()` if None.
        weight: lambda (0.01 in the paper).
        shuffled: deal the drawn voxels of an image to the three roles at random first: a control (not in the paper).
        dice: add the soft Dice loss of the foreground over the batch, as nnU-Net does in 2D (not in the paper).
        dice_alone: VNet's Dice loss, with squares in its denominator, in place of the cross-entropy.

    After a call, `active_shares` holds for each sampler's letter the share of its tuples whose triplet term
    was above zero (`VoxelMetricLoss.active_share`); it is empty without samplers and with another loss in place of
    Eq. (2).
    """

    def __init__(
        self,
        samplers: Sequence[Sampler] = (),
        metric_loss: TupleLoss | None = None,
        weight: float = 0.01,
        *,
        shuffled: bool = False,
        dice: bool = False,
        dice_alone: bool = False,
    ):
        super().__init__()
        self.samplers = tuple(samplers)
        letters = [sampler.letter for sampler in self.samplers]
        if len(set(letters)) < len(letters):  # the terms are told apart by letter
            raise ValueError(f"each sampler may be given once, not {', '.join(letters)}")
        self.metric_loss = metric_loss if metric_loss is not None else VoxelMetricLoss()
        self.weight, self.shuffled = real_number("weight", weight), switch("shuffled", shuffled)
        self.active_shares: dict[str, Scalar] = {}
        self.soft_dice, self.dice_alone = None, switch("dice_alone", dice_alone)
        if switch("dice", dice) or dice_alone:
            from monai.losses import DiceLoss  # slow to import

            options = {"include_background": False, "to_onehot_y": True, "batch": True}
            self.soft_dice = DiceLoss(**options, squared_pred=dice_alone)

    def forward(self, output: SegmentationOutput, labels: Labels, generator: Generator | None = None) -> LossTerms:
        """All terms for one batch; `generator` lives on the labels' device and drives every draw.

        Labels are 0 and 1, or IGNORED. ValueError if shapes do not fit, and as in `voxel_cross_entropy`.
        """
        self._check(output, labels)
        logits, targets = output.logits.float(), labels.long()
        cross_entropy = total = voxel_cross_entropy(logits, targets)
        if self.soft_dice is not None:
            counted = (targets != IGNORED)[:, None]
            soft_dice = self.soft_dice(logits.softmax(dim=1) * counted, targets[:, None] * counted)
            total = soft_dice if self.dice_alone else total + soft_dice
        if not self.samplers:
            return LossTerms(total, cross_entropy, {})
        probability = logits.detach().softmax(dim=1)[:, 1]
        draws = [sampler.draw(labels, probability, generator) for sampler in self.samplers]
        if self.shuffled:
            draws = [(shuffle_roles(tuples, len(labels), generator), valid) for tuples, valid in draws]
        voxels = [torch.cat(tuples) for tuples, _ in draws]
        vectors = output.logits if isinstance(self.metric_loss, DrawnCrossEntropy) else output.embeddings
        gathered = gather_embeddings(vectors, torch.cat(voxels)).split([len(indices) for indices in voxels])
        metric: dict[str, Scalar] = {}
        for sampler, (_, valid), rows in zip(self.samplers, draws, gathered, strict=True):
            tuples = *rows.chunk(3), valid
            metric[sampler.letter] = self.metric_loss.of_vectors(*tuples)
            if isinstance(self.metric_loss, VoxelMetricLoss):
                self.active_shares[sampler.letter] = self.metric_loss.active_share(*tuples)
        return LossTerms(total + self.weight * sum(metric.values()), cross_entropy, metric)

    def _check(self, output: SegmentationOutput, labels: Labels) -> None:
        """Only shapes and types are looked at, because the CPU knows these without waiting for a GPU."""
        if labels.is_floating_point():
            raise ValueError(f"labels must be whole numbers or boolean, not {labels.dtype}: labels.long()")
        logits, embeddings, grid = (tuple(tensor.shape) for tensor in (*output, labels))
        grids = [logits[:1] + logits[2:]] + ([embeddings[:1] + embeddings[2:]] if self.samplers else [])
        if logits[1] < 2 or any(other != grid for other in grids):  # embeddings would be of other voxels
            raise ValueError(
                f"logits {logits}, embeddings {embeddings} and labels {grid} do not fit: they must be (N, 2 or more "
                "classes, *spatial), (N, E, *spatial), and (N, *spatial) without a channel axis, on one grid; "
                "EmbeddingTap brings smaller embeddings to it"
            )


def contour_distance(labels: Labels, reach: int) -> tuple[Float[Tensor, "n *spatial"], Bool[Tensor, "n *spatial"]]:
    """The distance of each voxel to the nearest contour voxel, in voxels, at most `reach`; and where it is known.

    The contour is that of the samplers, in plane for labels (N, H, W). What lies beyond the patch is not seen: a
    distance counts as known only if it is no larger than the distance to the patch's border.
    """
    distance = distance_to_contour(labels, reach).clamp(max=reach)
    places = [torch.arange(length, device=labels.device) for length in labels.shape[1:]]
    to_ends = torch.meshgrid(*(torch.minimum(place, place.flip(0)) for place in places), indexing="ij")
    return distance, distance <= torch.stack(to_ends).amin(dim=0)


class BoundaryTaskLoss(SegmentationMetricLoss):
    """Cross-entropy, and the mean squared error of `BoundaryFCN`'s map: after the abstract of [2] (Table IV).

    The map is to be the distance to the contour over `REACH`, 1 where it is farther; unknown distances do not count.
    """

    REACH = 8  # voxels

    def forward(self, output: SegmentationOutput, labels: Labels, generator: Generator | None = None) -> LossTerms:
        """All terms for one batch; `metric` holds the error of the map as "distance"."""
        terms = super().forward(output, labels, generator)
        distance, is_known = contour_distance(labels, self.REACH)
        errors = (output.embeddings[:, -1].float() - distance / self.REACH).square().where(is_known, 0.0)
        error = errors.sum() / is_known.sum().clamp(min=1)
        return terms._replace(total=terms.total + self.weight * error, metric={"distance": error})
