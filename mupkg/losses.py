"""The voxel metric loss (Eq. 2, with hinges) and the multi-task loss it joins.

Choosing voxels (samplers), gathering their embeddings, distance, loss and reduction are separate steps.
The embeddings of all tuples of a step are gathered once; distances are computed between the gathered rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from mupkg.models import SegmentationOutput
from mupkg.samplers import Labels, Sampler, VoxelTuples, shuffle_roles

IGNORED = -100  # the label of voxels that nothing looks at, as in torch's cross-entropy


def gather_embeddings(
    embeddings: Float[Tensor, "n e *spatial"], voxels: Integer[Tensor, " t"]
) -> Float[Tensor, "t e"]:
    """The embeddings of the voxels with these flat indices into (N, *spatial), in float32."""
    # A view where the channels come last in memory, as in training. Not `embeddings[image, :, voxel]`: on a CPU
    # with several threads its backward adds up voxels drawn twice in any order, so that no run can be repeated.
    return embeddings.movedim(1, -1).flatten(0, -2).index_select(0, voxels).float()


def squared_distance(u: Float[Tensor, "t e"], v: Float[Tensor, "t e"]) -> Float[Tensor, " t"]:
    """Squared Euclidean distance over channels, row by row."""
    return (u - v).square().sum(dim=1)


def mean_of_valid(losses: Float[Tensor, " t"], valid: Bool[Tensor, " t"] | None) -> Float[Tensor, ""]:
    """The mean over the `valid` (by default all) tuples (R7); 0 without any."""
    if valid is None:
        return losses.sum() / max(len(losses), 1)
    return losses.where(valid, 0.0).sum() / valid.sum().clamp(min=1)


class TupleLoss(nn.Module):
    """A loss of drawn tuples; subclasses implement `of_vectors`."""

    def forward(self, embeddings: Float[Tensor, "n e *spatial"], tuples: VoxelTuples) -> Float[Tensor, ""]:
        """The loss of these tuples; without tuples a zero that still back-propagates."""
        return self.of_vectors(*gather_embeddings(embeddings, torch.cat(tuples)).chunk(3))

    def of_vectors(
        self,
        anchors: Float[Tensor, "t e"],
        positives: Float[Tensor, "t e"],
        negatives: Float[Tensor, "t e"],
        valid: Bool[Tensor, " t"] | None = None,
    ) -> Float[Tensor, ""]:
        """The same loss from gathered embeddings; tuples that are not `valid` do not count in the mean."""
        raise NotImplementedError(f"{type(self).__name__} must implement of_vectors(anchors, positives, negatives)")


class VoxelMetricLoss(TupleLoss):
    """Triplet hinge, and for the P configurations a positive-pair hinge; the mean over all tuples.

    `max(0, d(a,p) - d(a,n) + margin) + pair_weight * max(0, d(a,p) - pair_distance)`, d the squared Euclidean
    distance. Eq. (2) prints neither the hinges nor the mean, and adds epsilon: see readings R6 and R7.

    Args:
        margin: sigma, in squared-distance units (0.7; 1.0 in the paper's Table III).
        pair_weight: beta; 0 leaves the pair term out, 0.1 in the P configurations.
        pair_distance: epsilon, the greatest squared distance wanted between positives.
        normalize: bring every embedding to unit length first (an option; the paper takes them as they come).
        hinge: False for Eq. (2) as printed, without hinges and with epsilon added, but its mean: a control.
    """

    def __init__(
        self,
        margin: float = 0.7,
        pair_weight: float = 0.0,
        pair_distance: float = 0.01,
        normalize: bool = False,
        hinge: bool = True,
    ):
        super().__init__()
        for name, value in {"margin": margin, "pair_weight": pair_weight, "pair_distance": pair_distance}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
        self.margin, self.pair_weight, self.pair_distance = margin, pair_weight, pair_distance
        self.normalize, self.hinge = normalize, hinge

    def of_vectors(self, anchors, positives, negatives, valid=None):
        if self.normalize:
            anchors, positives, negatives = (F.normalize(x, dim=1) for x in (anchors, positives, negatives))
        to_positive = squared_distance(anchors, positives)
        losses = to_positive - squared_distance(anchors, negatives) + self.margin
        losses = F.relu(losses) if self.hinge else losses
        if self.pair_weight:
            pair = F.relu(to_positive - self.pair_distance) if self.hinge else to_positive + self.pair_distance
            losses = losses + self.pair_weight * pair
        return mean_of_valid(losses, valid)


class InfoNCELoss(TupleLoss):
    """InfoNCE over the drawn voxels, a control in place of Eq. (2) (not in the paper).

    Cross-entropy of telling an anchor's own positive from all negatives that the sampler drew in the batch, by
    cosine similarity / temperature. Memory grows with the square of the number of tuples.

    Args:
        temperature: above 0; 0.05 to 0.3 are usual.
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"the temperature must be a finite number above 0, not {temperature!r}")
        self.temperature = temperature

    def of_vectors(self, anchors, positives, negatives, valid=None):
        anchors, positives, negatives = (F.normalize(x, dim=1) for x in (anchors, positives, negatives))
        to_positive = (anchors * positives).sum(dim=1, keepdim=True) / self.temperature
        to_negatives = anchors @ negatives.T / self.temperature
        if valid is not None:
            to_negatives = to_negatives.masked_fill(~valid, -torch.inf)
        losses = torch.cat([to_positive, to_negatives], dim=1).logsumexp(dim=1) - to_positive[:, 0]
        return mean_of_valid(losses, valid)


def voxel_cross_entropy(
    logits: Float[Tensor, "n classes *spatial"], labels: Int[Tensor, "n *spatial"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over voxels; as a list of voxels where determinism is asked for.

    PyTorch has no deterministic CUDA kernel for cross-entropy over images, but one for lists.
    """
    if torch.are_deterministic_algorithms_enabled():
        return F.cross_entropy(logits.movedim(1, -1).flatten(0, -2), labels.flatten())
    return F.cross_entropy(logits, labels)


def drawn_cross_entropy(
    anchors: Float[Tensor, "t classes"],
    positives: Float[Tensor, "t classes"],
    negatives: Float[Tensor, "t classes"],
    valid: Bool[Tensor, " t"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the drawn voxels' own logits; two of a tuple's three are prostate, 1, one is not, 0."""
    labels = torch.zeros(3 * len(valid), dtype=torch.int64, device=valid.device)
    labels[: 2 * len(valid)] = 1
    losses = F.cross_entropy(torch.cat([anchors, positives, negatives]), labels, reduction="none")
    return mean_of_valid(losses, valid.repeat(3))


class LossTerms(NamedTuple):
    """Total, cross-entropy, and each sampler's metric loss (not yet weighted); all keep their graph."""

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    metric: dict[str, Float[Tensor, ""]]


class SegmentationMetricLoss(nn.Module):
    """Cross-entropy over voxels + lambda * the sum of the samplers' metric losses (Eq. 4).

    Args:
        samplers: the configuration's samplers, each letter once; empty for a plain UNet.
        metric_loss: applied to each sampler's tuples; `VoxelMetricLoss()` if None.
        weight: lambda (0.01 in the paper).
        control: not in the paper. "voxels": cross-entropy of just the drawn voxels in place of the metric loss;
            "shuffled": the metric loss with the roles of an image's drawn voxels permuted.
        dice: add a soft Dice loss of the foreground over the batch, as nnU-Net does in 2D (not in the paper).
    """

    def __init__(
        self,
        samplers: Sequence[Sampler] = (),
        metric_loss: TupleLoss | None = None,
        weight: float = 0.01,
        *,
        control: Literal["voxels", "shuffled"] | None = None,
        dice: bool = False,
    ):
        super().__init__()
        self.samplers = tuple(samplers)
        letters = [sampler.letter for sampler in self.samplers]
        if len(set(letters)) < len(letters):  # the terms are told apart by letter
            raise ValueError(f"every sampler may be there once, not {', '.join(letters)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number of at least 0, not {weight!r}")
        if control not in (None, "voxels", "shuffled"):
            raise ValueError(f'control must be None, "voxels" or "shuffled", not {control!r}')
        if control and not self.samplers:
            raise ValueError(f"control {control!r} does nothing without samplers; choose a MetricUNet")
        self.metric_loss = metric_loss if metric_loss is not None else VoxelMetricLoss()
        self.weight, self.control, self.soft_dice = weight, control, None
        if dice:
            from monai.losses import DiceLoss  # slow to import

            self.soft_dice = DiceLoss(include_background=False, to_onehot_y=True, batch=True)

    def forward(
        self,
        output: SegmentationOutput,
        labels: Labels,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """All terms for one batch; `generator` lives on the labels' device and drives every draw.

        Labels are 0 and 1; -100 marks voxels that neither cross-entropy nor the samplers look at.

        Raises:
            ValueError: if the shapes do not fit each other, with what to do.
        """
        self._check_shapes(output, labels)
        cross_entropy = total = voxel_cross_entropy(output.logits.float(), labels.long())
        if self.soft_dice is not None:
            total = total + self._dice_loss(output.logits.float(), labels.long())
        if not self.samplers:
            return LossTerms(total, cross_entropy, {})
        metric = self._metric_terms(output, labels, generator)
        return LossTerms(total + self.weight * sum(metric.values()), cross_entropy, metric)

    def _metric_terms(
        self, output: SegmentationOutput, labels: Labels, generator: torch.Generator | None
    ) -> dict[str, Float[Tensor, ""]]:
        probability = output.logits.detach().float().softmax(dim=1)[:, 1]
        draws = [sampler.draw(labels, probability, generator) for sampler in self.samplers]
        drawn, valid = [tuples for tuples, _ in draws], [mask for _, mask in draws]
        if self.control == "shuffled":
            drawn = [shuffle_roles(tuples, len(labels), generator) for tuples in drawn]
        learnt = output.logits if self.control == "voxels" else output.embeddings
        gathered = gather_embeddings(learnt, torch.cat([indices for tuples in drawn for indices in tuples]))
        parts = gathered.split([len(indices) for tuples in drawn for indices in tuples])
        loss = drawn_cross_entropy if self.control == "voxels" else self.metric_loss.of_vectors
        return {sampler.letter: loss(*parts[3 * i : 3 * i + 3], valid[i]) for i, sampler in enumerate(self.samplers)}

    def _dice_loss(
        self, logits: Float[Tensor, "n classes *spatial"], labels: Integer[Tensor, "n *spatial"]
    ) -> Float[Tensor, ""]:
        known = (labels != IGNORED)[:, None]
        return self.soft_dice(logits.softmax(dim=1) * known, labels[:, None] * known)

    def _check_shapes(self, output: SegmentationOutput, labels: Labels) -> None:
        """Shapes alone, which a GPU need not be waited for. Embeddings of another grid would be of other voxels."""
        logits, embeddings, grid = tuple(output.logits.shape), tuple(output.embeddings.shape), tuple(labels.shape)
        cure = None
        if grid[:1] + grid[2:] == logits[:1] + logits[2:] and grid[1:2] == (1,):
            cure = "squeeze the labels' channel axis, labels[:, 0]"
        elif grid != logits[:1] + logits[2:]:
            cure = "labels are (N, *spatial) on the grid of the logits (N, classes, *spatial)"
        elif logits[1] < 2:
            cure = "let the network give a logit for background and one for foreground"
        elif self.samplers and embeddings[:1] + embeddings[2:] != grid:
            cure = "embeddings are wanted on the labels' grid; EmbeddingTap brings smaller ones to it"
        if cure:
            raise ValueError(f"logits {logits}, embeddings {embeddings} and labels {grid} do not fit: {cure}")
