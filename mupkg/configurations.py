"""The configurations of Table II, as a grammar: what a name switches on, and how it is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mupkg.losses import SegmentationMetricLoss, VoxelMetricLoss
from mupkg.models import SegmentationNetwork, UNet, UNetPlusPlus
from mupkg.samplers import SAMPLERS, HardNegativeSampler

TABLE_II = (
    "UNet",
    "UNet++",
    "MetricUNet-R-Sep",
    "MetricUNet-R",
    "MetricUNet-H",
    "MetricUNet++-H",
    "MetricUNet-C",
    "MetricUNet-HR",
    "MetricUNet-HC",
    "MetricUNet-HP",
    "MetricUNet-HRP",
    "MetricUNet-HCP",
)
"""The twelve names, in the order of the paper's Table III."""

GRAMMAR = (
    "'UNet', 'UNet++', or 'MetricUNet' / 'MetricUNet++' + '-' + one to three different letters of H (focal hard "
    "negative), C (contour-aware), R (random) + 'P' (positive pairs) or not + '-Sep' or not; "
    "for example MetricUNet-HCP, MetricUNet-R-Sep, MetricUNet++-H"
)
_METRIC_NAME = re.compile(r"Metric(UNet(?:\+\+)?)-([HCR]{1,3})(P?)(-Sep)?")


@dataclass(frozen=True)
class Configuration:
    """One row of Table II."""

    name: str
    backbone: Literal["UNet", "UNet++"]
    samplers: tuple[str, ...]  # letters, in the order H, C, R
    triplet: bool
    positive_pair: bool
    separate: bool  # "-Sep": the gradient is cut at the sampling layer


def configuration(name: str) -> Configuration:
    """The configuration of that name, letters in the order H, C, R.

    Raises:
        ValueError: for an unknown name; the message lists the grammar.
    """
    if name in ("UNet", "UNet++"):
        return Configuration(name, name, (), triplet=False, positive_pair=False, separate=False)
    match = _METRIC_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or len(set(match[2])) < len(match[2]):
        raise ValueError(f"unknown configuration {name!r}; valid names are {GRAMMAR}")
    backbone, drawn, pair, separate = match.groups()
    letters = tuple(letter for letter in "HCR" if letter in drawn)
    return Configuration(
        name=f"Metric{backbone}-{''.join(letters)}{pair}{separate or ''}",
        backbone=backbone,
        samplers=letters,
        triplet=True,
        positive_pair=bool(pair),
        separate=bool(separate),
    )


_by_name = configuration  # `build` has a parameter of that name


def build(
    configuration: Configuration | str,
    in_channels: int = 3,
    base_filters: int = 32,
    embedding_dim: int = 256,
    num_classes: int = 2,
    *,
    anchors: int = 20,
    pairs: int = 1,
    threshold: float = 0.1,
    margin: float = 0.7,
    weight: float = 0.01,
    pair_weight: float = 0.1,
    pair_distance: float = 0.01,
    normalize: bool = False,
) -> tuple[SegmentationNetwork, SegmentationMetricLoss]:
    """The network and the loss of a configuration; the defaults are the paper's numbers.

    Args:
        configuration: one, or its name.
        anchors, pairs: k and m. threshold: tau. margin: sigma. weight: lambda.
        pair_weight, pair_distance: beta and epsilon, used by the P configurations only.

    Raises:
        ValueError: for an unknown name, and for an option that makes no sense, naming it.
    """
    if isinstance(configuration, str):
        configuration = _by_name(configuration)
    sizes = {"in_channels": in_channels, "base_filters": base_filters, "embedding_dim": embedding_dim}
    for name, value in (sizes | {"num_classes": num_classes}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    backbone = UNet if configuration.backbone == "UNet" else UNetPlusPlus
    network = backbone(in_channels, base_filters, embedding_dim, num_classes, separate=configuration.separate)
    samplers = []
    for letter in configuration.samplers:
        options = {"threshold": threshold} if SAMPLERS[letter] is HardNegativeSampler else {}
        samplers.append(SAMPLERS[letter](anchors, pairs, **options))
    metric_loss = VoxelMetricLoss(
        margin, pair_weight if configuration.positive_pair else 0.0, pair_distance, normalize
    )
    return network, SegmentationMetricLoss(samplers, metric_loss, weight)
