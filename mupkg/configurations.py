"""The configurations of Table II, as a grammar: what a name switches on, and how it is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, get_args

from torch import nn

from mupkg.losses import (
    MARGIN,
    BoundaryTaskLoss,
    DrawnCrossEntropy,
    InfoNCELoss,
    SegmentationMetricLoss,
    VoxelMetricLoss,
)
from mupkg.models import BACKBONES
from mupkg.samplers import SAMPLERS, Sampler, whole_number

Control = Literal["voxels", "balanced", "shuffled"]  # of what the metric loss does; METHOD.md, "Beyond the paper"
OF_VOXELS = ("voxels", "balanced")  # the controls that put `DrawnCrossEntropy` in place of the metric loss

TABLE_II = (
    *("UNet", "UNet++", "MetricUNet-R-Sep", "MetricUNet-R", "MetricUNet-H", "MetricUNet++-H", "MetricUNet-C"),
    *("MetricUNet-HR", "MetricUNet-HC", "MetricUNet-HP", "MetricUNet-HRP", "MetricUNet-HCP"),
)
"""The twelve names, in the order of the paper's Table II."""


def grammar() -> str:
    """What a valid name looks like, in words."""
    plain = [repr(name) + (f" ({backbone.about})" if backbone.about else "") for name, backbone in BACKBONES.items()]
    metric = " / ".join(repr(f"Metric{name}") for name, backbone in BACKBONES.items() if backbone.metric)
    letters = ", ".join(f"{letter} ({sampler.title})" for letter, sampler in SAMPLERS.items())
    return (
        f"{', '.join(plain)}, or {metric} + '-' + different letters of {letters} + 'N' (near negatives, not in the "
        "paper) or not + 'P' (positive pairs) or not + '-Sep' or not; for example MetricUNet-HCP, MetricUNet-R-Sep, "
        "MetricUNet++-H"
    )


@dataclass(frozen=True)
class Configuration:
    """One row of Table II, a variant of one, or one of Table IV."""

    name: str
    backbone: str  # of BACKBONES
    samplers: tuple[str, ...]  # letters, in the order of SAMPLERS
    triplet: bool
    positive_pair: bool
    separate: bool  # "-Sep": the gradient is cut at the sampling layer
    near_negatives: bool = False  # "N": negatives near the contour only; not in the paper

    @classmethod
    def of_name(cls, name: str) -> Configuration:
        """The configuration of that name, letters in the order of SAMPLERS.

        Raises:
            ValueError: for an unknown name; the message lists the grammar.
        """
        if isinstance(name, str) and name in BACKBONES:
            return cls(name, name, (), triplet=False, positive_pair=False, separate=False)
        backbones = "|".join(re.escape(name) for name, backbone in BACKBONES.items() if backbone.metric)
        pattern = rf"Metric({backbones})-([{''.join(SAMPLERS)}]+)(N?)(P?)(-Sep)?"
        match = re.fullmatch(pattern, name) if isinstance(name, str) else None
        if match is None or len(set(match[2])) < len(match[2]):
            raise ValueError(f"unknown configuration {name!r}; valid names are {grammar()}")
        backbone, drawn, near, pair, separate = match.groups(default="")
        letters = tuple(letter for letter in SAMPLERS if letter in drawn)
        name = f"Metric{backbone}-{''.join(letters)}{near}{pair}{separate}"
        return cls(name, backbone, letters, True, bool(pair), bool(separate), bool(near))


configuration = Configuration.of_name  # the public name


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
    margin: float = MARGIN,
    weight: float = 0.01,
    pair_weight: float = 0.1,
    pair_distance: float = 0.01,
    normalize: bool = False,
    hinge: bool = True,
    control: Control | None = None,
    infonce_temperature: float | None = None,
    dice: bool = False,
) -> tuple[nn.Module, SegmentationMetricLoss]:
    """The network and the loss of a configuration; the defaults are the paper's numbers.

    VNet takes one channel, has half of `base_filters` in its first block (16, as MONAI's, at the paper's size) and
    embeddings of `base_filters` channels, and learns from the Dice loss alone.

    Args:
        configuration: one, or its name.
        anchors, pairs: k and m. threshold: tau. margin: sigma. weight: lambda.
        pair_weight, pair_distance: beta and epsilon, used by the P configurations only.
        hinge, dice: as in `VoxelMetricLoss` and `SegmentationMetricLoss`. Not in the paper, like the next two.
        control: "shuffled" roles, or `DrawnCrossEntropy` in place of the metric loss: "voxels", or "balanced".
        infonce_temperature: `InfoNCELoss` of this temperature in place of the metric loss.

    Raises:
        ValueError: for an unknown name, an option that makes no sense, whether or not this configuration uses it,
            and a control that would do nothing.
    """
    if not isinstance(configuration, Configuration):
        configuration = Configuration.of_name(configuration)
    sizes = {"in_channels": in_channels, "base_filters": base_filters, "embedding_dim": embedding_dim}
    sizes = {name: whole_number(name, value) for name, value in (sizes | {"num_classes": num_classes}).items()}
    # All samplers and losses are built for every configuration, because they check the options.
    options = {"anchors": anchors, "pairs": pairs, "threshold": threshold}
    samplers = _samplers(options | {"near_negatives": configuration.near_negatives})
    metric_loss = VoxelMetricLoss(margin, pair_weight, pair_distance, normalize, hinge)
    if not configuration.positive_pair:
        metric_loss.pair_weight = 0.0
    if infonce_temperature is not None:
        metric_loss = InfoNCELoss(infonce_temperature)
    _refuse_idle(configuration, control, infonce_temperature, hinge, normalize, weight, pair_weight)
    if control in OF_VOXELS:
        metric_loss = DrawnCrossEntropy(balanced=control == "balanced")
    chosen = [samplers[letter] for letter in configuration.samplers]
    loss = SegmentationMetricLoss(chosen, metric_loss, weight, shuffled=control == "shuffled", dice=dice)
    sizes |= {"separate": True} if configuration.separate else {}
    return BACKBONES[configuration.backbone].network(**sizes), _own_loss(configuration.backbone, dice) or loss


def _samplers(options: Mapping[str, Any]) -> dict[str, Sampler]:
    """Every sampler with those of the options that it has."""
    own = {letter: options.keys() & signature(sampler).parameters.keys() for letter, sampler in SAMPLERS.items()}
    return {letter: SAMPLERS[letter](**{name: options[name] for name in names}) for letter, names in own.items()}


def _own_loss(backbone: str, dice: bool) -> SegmentationMetricLoss | None:
    """The loss of a backbone that has one of its own."""
    if backbone == "VNet":
        if dice:
            raise ValueError("VNet: dice would do nothing, because the Dice loss is its only loss; leave it out")
        return SegmentationMetricLoss(dice_alone=True)
    return BoundaryTaskLoss(weight=1.0, dice=dice) if backbone == "BoundaryFCN" else None


def _refuse_idle(
    chosen: Configuration,
    control: str | None,
    infonce: float | None,
    hinge: bool,
    normalize: bool,
    weight: float,
    pair_weight: float,
) -> None:
    """ValueError for a control that does nothing, so that no run is named after what it does not do."""
    if control not in (None, *get_args(Control)):
        raise ValueError(f"control must be None or one of {', '.join(get_args(Control))}, not {control!r}")
    of_voxels = control in OF_VOXELS
    plain, replaced = not chosen.samplers, of_voxels or infonce is not None
    idle = {
        "control": plain and control is not None,
        "infonce_temperature": infonce is not None and (plain or of_voxels),
        "hinge False": not hinge and (plain or replaced),
        "normalize True": normalize and replaced,
        "the P in the name": chosen.positive_pair and replaced,
    }
    if any(idle.values()):
        names = ", ".join(name for name, is_idle in idle.items() if is_idle)
        why = "it draws no voxels" if plain else "another loss takes the place of Eq. (2)"
        raise ValueError(f"{chosen.name}: {names} would do nothing, because {why}; leave it out")
    if of_voxels and chosen.separate:
        raise ValueError(f"{chosen.name}: with control {control!r} only the head would learn; leave out -Sep")
    if chosen.separate and not weight:
        raise ValueError(f"{chosen.name}: with a weight of 0 only the head would learn; leave out -Sep")
    if chosen.positive_pair and not pair_weight:
        raise ValueError(f"{chosen.name}: with a pair_weight of 0 the P would do nothing; leave it out")
