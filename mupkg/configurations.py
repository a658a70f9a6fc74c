"""The configurations of Table II, as a grammar: what a name switches on, and how it is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from inspect import signature
from typing import Literal, get_args

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
from mupkg.samplers import ANCHORS, SAMPLERS, TAU, whole_number

Control = Literal["voxels", "balanced", "shuffled"]  # of what the metric loss does; METHOD.md, "Beyond the paper"
OWN_LOSSES = {  # of networks that learn by another one than the cross-entropy
    "VNet": lambda dice: SegmentationMetricLoss(dice_alone=True),
    "BoundaryFCN": lambda dice: BoundaryTaskLoss(weight=1.0, dice=dice),
}
OF_VOXELS = ("voxels", "balanced")  # the controls that put `DrawnCrossEntropy` in place of the metric loss

TABLE_II = (
    *("UNet", "UNet++", "MetricUNet-R-Sep", "MetricUNet-R", "MetricUNet-H", "MetricUNet++-H", "MetricUNet-C"),
    *("MetricUNet-HR", "MetricUNet-HC", "MetricUNet-HP", "MetricUNet-HRP", "MetricUNet-HCP"),
)
"""The twelve names, in the order of the paper's Table II."""


def grammar() -> str:
    """What a valid name looks like, in words."""
    plain = ", ".join(map(repr, BACKBONES))
    metric = " / ".join(repr(f"Metric{name}") for name, backbone in BACKBONES.items() if backbone.metric)
    letters = ", ".join(f"{letter} ({sampler.title})" for letter, sampler in SAMPLERS.items())
    return (
        f"{plain}, or {metric} + '-' + different letters of {letters} + 'N' (near negatives, not in the "
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
    *,
    anchors: int = ANCHORS,
    pairs: int = 1,
    threshold: float = TAU,
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
            and one that would do nothing.
    """
    chosen = configuration if isinstance(configuration, Configuration) else Configuration.of_name(configuration)
    sizes = {"in_channels": in_channels, "base_filters": base_filters, "embedding_dim": embedding_dim}
    sizes = {name: whole_number(name, value) for name, value in sizes.items()}
    # All samplers and Eq. (2) are built for every configuration, because they check the options.
    options = {"anchors": anchors, "pairs": pairs, "threshold": threshold, "near_negatives": chosen.near_negatives}
    samplers = {}
    for letter, sampler in SAMPLERS.items():
        own = options.keys() & signature(sampler).parameters.keys()
        samplers[letter] = sampler(**{name: options[name] for name in own})
    metric_loss = VoxelMetricLoss(margin, pair_weight, pair_distance, normalize, hinge)
    if not chosen.positive_pair:
        metric_loss.pair_weight = 0.0
    if infonce_temperature is not None:
        metric_loss = InfoNCELoss(infonce_temperature)
    _refuse_idle(chosen, control, infonce_temperature, hinge, normalize, dice, weight, pair_weight)
    if control in OF_VOXELS:
        metric_loss = DrawnCrossEntropy(balanced=control == "balanced")
    drawing = [samplers[letter] for letter in chosen.samplers]
    loss = SegmentationMetricLoss(drawing, metric_loss, weight, shuffled=control == "shuffled", dice=dice)
    loss = OWN_LOSSES[chosen.backbone](dice) if chosen.backbone in OWN_LOSSES else loss
    separate = {"separate": True} if chosen.separate else {}
    return BACKBONES[chosen.backbone].network(**sizes, **separate), loss


def _refuse_idle(
    chosen: Configuration,
    control: str | None,
    infonce: float | None,
    hinge: bool,
    normalize: bool,
    dice: bool,
    weight: float,
    pair_weight: float,
) -> None:
    """ValueError for what is asked for in vain, so that no run is named after what it does not do."""
    if control not in (None, *get_args(Control)):
        raise ValueError(f"control must be None or one of {', '.join(get_args(Control))}, not {control!r}")
    of_voxels = control in OF_VOXELS
    plain = "" if chosen.samplers else "it draws no voxels"
    replaced = "another loss takes the place of Eq. (2)" if of_voxels or infonce is not None else ""
    reasons = {
        "control": control is not None and plain,
        "infonce_temperature": infonce is not None and (plain or (of_voxels and replaced)),
        "hinge False": not hinge and (plain or replaced),
        "normalize True": normalize and replaced,
        "dice": dice and chosen.backbone == "VNet" and "the Dice loss is its only loss",
        "the P in the name": chosen.positive_pair and (replaced or (not pair_weight and "pair_weight is 0")),
    }
    if idle := [f"{what} would do nothing, because {why}" for what, why in reasons.items() if why]:
        raise ValueError(f"{chosen.name}: {'; '.join(idle)}; leave it out")
    if chosen.separate and (of_voxels or not weight):
        what = f"control {control!r}" if of_voxels else "a weight of 0"
        raise ValueError(f"{chosen.name}: with {what} only the head would learn; leave out -Sep")
