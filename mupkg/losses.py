"""The voxel metric loss (Eq. 2, with hinges) and the multi-task loss it joins.

Choosing voxels (samplers), gathering their embeddings, distance, loss and reduction are separate steps.
The embeddings of all tuples of a step are gathered once; distances are computed between the gathered rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from mupkg.models import SegmentationOutput
from mupkg.samplers import Labels, Sampler, VoxelTuples


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


class VoxelMetricLoss(nn.Module):
    """Triplet hinge, and for the P configurations a positive-pair hinge; the mean over all tuples.

    `max(0, d(a,p) - d(a,n) + margin) + pair_weight * max(0, d(a,p) - pair_distance)`, d the squared Euclidean
    distance. Eq. (2) prints neither the hinges nor the mean, and adds epsilon: see readings R6 and R7.

    Args:
        margin: sigma, in squared-distance units (0.7; 1.0 in the paper's Table III).
        pair_weight: beta; 0 leaves the pair term out, 0.1 in the P configurations.
        pair_distance: epsilon, the greatest squared distance wanted between positives.
        normalize: bring every embedding to unit length first (an option; the paper takes them as they come).
    """

    def __init__(
        self,
        margin: float = 0.7,
        pair_weight: float = 0.0,
        pair_distance: float = 0.01,
        normalize: bool = False,
    ):
        super().__init__()
        for name, value in {"margin": margin, "pair_weight": pair_weight, "pair_distance": pair_distance}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
        self.margin, self.pair_weight, self.pair_distance = margin, pair_weight, pair_distance
        self.normalize = normalize

    def forward(self, embeddings: Float[Tensor, "n e *spatial"], tuples: VoxelTuples) -> Float[Tensor, ""]:
        """The loss of these tuples; without tuples a zero that still back-propagates."""
        anchors, positives, negatives = gather_embeddings(embeddings, torch.cat(tuples)).chunk(3)
        return self.of_vectors(anchors, positives, negatives)

    def of_vectors(
        self,
        anchors: Float[Tensor, "t e"],
        positives: Float[Tensor, "t e"],
        negatives: Float[Tensor, "t e"],
        valid: Bool[Tensor, " t"] | None = None,
    ) -> Float[Tensor, ""]:
        """The same loss from gathered embeddings; tuples that are not `valid` do not count in the mean."""
        if self.normalize:
            anchors, positives, negatives = (F.normalize(x, dim=1) for x in (anchors, positives, negatives))
        to_positive = squared_distance(anchors, positives)
        losses = F.relu(to_positive - squared_distance(anchors, negatives) + self.margin)
        if self.pair_weight:
            losses = losses + self.pair_weight * F.relu(to_positive - self.pair_distance)
        if valid is None:
            return losses.sum() / max(len(losses), 1)
        return losses.where(valid, 0.0).sum() / valid.sum().clamp(min=1)


def voxel_cross_entropy(
    logits: Float[Tensor, "n classes *spatial"], labels: Int[Tensor, "n *spatial"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over voxels; as a list of voxels where determinism is asked for.

    PyTorch has no deterministic CUDA kernel for cross-entropy over images, but one for lists.
    """
    if torch.are_deterministic_algorithms_enabled():
        return F.cross_entropy(logits.movedim(1, -1).flatten(0, -2), labels.flatten())
    return F.cross_entropy(logits, labels)


class LossTerms(NamedTuple):
    """Total, cross-entropy, and each sampler's metric loss (not yet weighted); all keep their graph."""

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    metric: dict[str, Float[Tensor, ""]]


class SegmentationMetricLoss(nn.Module):
    """Cross-entropy over voxels + lambda * the sum of the samplers' metric losses (Eq. 4).

    Args:
        samplers: the configuration's samplers, each letter once; empty for a plain UNet.
        metric_loss: applied to each sampler's tuples.
        weight: lambda (0.01 in the paper).
    """

    def __init__(
        self, samplers: Sequence[Sampler] = (), metric_loss: VoxelMetricLoss | None = None, weight: float = 0.01
    ):
        super().__init__()
        self.samplers = tuple(samplers)
        letters = [sampler.letter for sampler in self.samplers]
        if len(set(letters)) < len(letters):  # the terms are told apart by letter
            raise ValueError(f"every sampler may be there once, not {', '.join(letters)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number of at least 0, not {weight!r}")
        self.metric_loss = metric_loss if metric_loss is not None else VoxelMetricLoss()
        self.weight = weight

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
        cross_entropy = voxel_cross_entropy(output.logits.float(), labels.long())
        if not self.samplers:
            return LossTerms(cross_entropy, cross_entropy, {})
        probability = output.logits.detach().float().softmax(dim=1)[:, 1]
        draws = [sampler.draw(labels, probability, generator) for sampler in self.samplers]
        gathered = gather_embeddings(
            output.embeddings, torch.cat([indices for tuples, _ in draws for indices in tuples])
        )
        parts = iter(gathered.split([len(indices) for tuples, _ in draws for indices in tuples]))
        metric = {
            sampler.letter: self.metric_loss.of_vectors(next(parts), next(parts), next(parts), valid)
            for sampler, (_, valid) in zip(self.samplers, draws, strict=True)
        }
        return LossTerms(cross_entropy + self.weight * sum(metric.values()), cross_entropy, metric)

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
