"""The configurations of Table II, as a grammar: what a name switches on, and how it is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mupkg.losses import InfoNCELoss, SegmentationMetricLoss, VoxelMetricLoss
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
    "negative), C (contour-aware), R (random) + 'N' (near negatives, not in the paper) or not + 'P' (positive pairs) "
    "or not + '-Sep' or not; "
    "for example MetricUNet-HCP, MetricUNet-R-Sep, MetricUNet++-H"
)
_METRIC_NAME = re.compile(r"Metric(UNet(?:\+\+)?)-([HCR]{1,3})(N?)(P?)(-Sep)?")


@dataclass(frozen=True)
class Configuration:
    """One row of Table II, or a variant of one."""

    name: str
    backbone: Literal["UNet", "UNet++"]
    samplers: tuple[str, ...]  # letters, in the order H, C, R
    triplet: bool
    positive_pair: bool
    separate: bool  # "-Sep": the gradient is cut at the sampling layer
    near_negatives: bool = False  # "N": negatives near the contour only; not in the paper

    @classmethod
    def of_name(cls, name: str) -> Configuration:
        """See `configuration`."""
        if name in ("UNet", "UNet++"):
            return cls(name, name, (), triplet=False, positive_pair=False, separate=False)
        match = _METRIC_NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or len(set(match[2])) < len(match[2]):
            raise ValueError(f"unknown configuration {name!r}; valid names are {GRAMMAR}")
        backbone, drawn, near, pair, separate = match.groups()
        letters = tuple(letter for letter in "HCR" if letter in drawn)
        return cls(
            name=f"Metric{backbone}-{''.join(letters)}{near}{pair}{separate or ''}",
            backbone=backbone,
            samplers=letters,
            triplet=True,
            positive_pair=bool(pair),
            separate=bool(separate),
            near_negatives=bool(near),
        )


def configuration(name: str) -> Configuration:
    """The configuration of that name, letters in the order H, C, R.

    Raises:
        ValueError: for an unknown name; the message lists the grammar.
    """
    return Configuration.of_name(name)


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
    hinge: bool = True,
    control: Literal["voxels", "shuffled"] | None = None,
    infonce_temperature: float | None = None,
    dice: bool = False,
) -> tuple[SegmentationNetwork, SegmentationMetricLoss]:
    """The network and the loss of a configuration; the defaults are the paper's numbers.

    Args:
        configuration: one, or its name.
        anchors, pairs: k and m. threshold: tau. margin: sigma. weight: lambda.
        pair_weight, pair_distance: beta and epsilon, used by the P configurations only.
        hinge, control, dice: see `VoxelMetricLoss` and `SegmentationMetricLoss`; not in the paper, as is
        infonce_temperature: `InfoNCELoss` of this temperature in place of Eq. (2).

    Raises:
        ValueError: for an unknown name, for an option that makes no sense, and for a control that would do nothing.
    """
    if isinstance(configuration, str):
        configuration = Configuration.of_name(configuration)
    _refuse_idle_controls(configuration, control, infonce_temperature, hinge, normalize)
    sizes = {"in_channels": in_channels, "base_filters": base_filters, "embedding_dim": embedding_dim}
    for name, value in (sizes | {"num_classes": num_classes}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    backbone = UNet if configuration.backbone == "UNet" else UNetPlusPlus
    network = backbone(in_channels, base_filters, embedding_dim, num_classes, separate=configuration.separate)
    samplers = []
    for letter in configuration.samplers:
        options = {"threshold": threshold} if SAMPLERS[letter] is HardNegativeSampler else {}
        samplers.append(SAMPLERS[letter](anchors, pairs, near_negatives=configuration.near_negatives, **options))
    metric_loss = VoxelMetricLoss(
        margin, pair_weight if configuration.positive_pair else 0.0, pair_distance, normalize, hinge
    )
    if infonce_temperature is not None:
        metric_loss = InfoNCELoss(infonce_temperature)
    return network, SegmentationMetricLoss(samplers, metric_loss, weight, control=control, dice=dice)


def _refuse_idle_controls(
    configuration: Configuration,
    control: str | None,
    infonce_temperature: float | None,
    hinge: bool,
    normalize: bool,
) -> None:
    """A run must not be called after something that it does not do."""
    given = {
        f"control {control!r}": control is not None,
        "infonce_temperature": infonce_temperature is not None,
        "hinge False": not hinge,
        "normalize True": normalize,
        "the P in the name": configuration.positive_pair,
    }
    asked = [name for name, is_given in given.items() if is_given]
    if not configuration.samplers:
        idle, why = {*list(given)[:3]}, "it has no samplers"
    elif control == "voxels":
        idle, why = {*list(given)[1:]}, "control 'voxels' takes the place of the metric loss"
    elif infonce_temperature is not None:
        idle, why = {*list(given)[2:]}, "InfoNCE takes the place of Eq. (2)"
    else:
        return
    if named := [name for name in asked if name in idle]:
        raise ValueError(f"{configuration.name}: {', '.join(named)} would do nothing: {why}; leave it out")
    if control == "voxels" and configuration.separate:
        raise ValueError(f"{configuration.name}: with control 'voxels' only the head would learn; leave out -Sep")
