"""The networks: the paper's UNet (Table I), the light UNet of stage 1, UNet++, two of Table IV, and a tap for others.

Every network maps images (N, C, H, W), VNet blocks (N, 1, D, H, W), to a `SegmentationOutput`: the logits, and the
voxel embeddings that the metric losses learn from. The metric branch has no weights of its own; at test time it is
simply not used.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

POOLINGS = 3
MULTIPLE = 2**POOLINGS  # heights and widths must be multiples of this
VNET_MULTIPLE = 16  # VNet's four poolings: depths, heights and widths of its blocks
LAST_BLOCK_REACH = 2  # voxels that the last block's two 3 x 3 convolutions look beyond their own

Crop = tuple[slice, slice]  # rows and columns; starts and stops are even


class SegmentationOutput(NamedTuple):
    """What every network returns: logits (N, classes, *spatial) and embeddings (N, E, *spatial)."""

    logits: Float[Tensor, "n classes *spatial"]
    embeddings: Float[Tensor, "n e *spatial"]


def conv_bn_relu(channels_in: int, channels_out: int, kernel: int = 3) -> nn.Sequential:
    """One "conv+bn+r" row of Table I; the kernel is 3 x 3 with padding 1, or 1 x 1 in the head."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def double_conv(channels_in: int, channels_out: int) -> nn.Sequential:
    """The two conv rows of each block of Table I."""
    return nn.Sequential(conv_bn_relu(channels_in, channels_out), conv_bn_relu(channels_out, channels_out))


def merged(
    up: nn.Module, merge: nn.Module, below: Tensor, skips: Sequence[Tensor], window: Crop | None = None
) -> Tensor:
    """A decoder's block: `below` up-sampled, behind it the skips, and their convolutions.

    For a window, the convolutions see as far beyond it as they reach, and so give what they give for the whole.
    """
    if window is None:
        return merge(torch.cat([up(below), *skips], dim=1))
    rows, columns = (slice(max(0, w.start - LAST_BLOCK_REACH), w.stop + LAST_BLOCK_REACH) for w in window)
    below = below[..., rows.start // 2 : rows.stop // 2, columns.start // 2 : columns.stop // 2]
    wide = merged(up, merge, below, [skip[..., rows, columns] for skip in skips])
    inside = (slice(w.start - a.start, w.stop - a.start) for w, a in zip(window, (rows, columns), strict=True))
    return wide[(..., *inside)]


class SegmentationNetwork(nn.Module):
    """What the backbones share: encoder, head, and where the gradient is cut for a `-Sep` configuration.

    Subclasses build what leads from the encoder's blocks to the embeddings in `add_decoder`, and run it in `embed`.
    The last block and the head take nine tenths of the time; `window` runs these two for a part of the image alone.

    Args:
        in_channels: neighbouring slices that go in (3 in stage 2, 5 in stage 1).
        base_filters: channels of the first block; they grow by `growth` with every pooling.
        embedding_dim: channels of the last up-sampling block, that is of a voxel's embedding.
        num_classes: classes of the logits.
        growth: 2 as in Table I; 1 for the light network of stage 1 (reading R2).
        separate: cut the gradient between embeddings and head (`-Sep`).
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_filters: int = 32,
        embedding_dim: int = 256,
        num_classes: int = 2,
        *,
        growth: int = 2,
        separate: bool = False,
    ):
        super().__init__()
        # Table I prints sega as 3 x 3 x 256 but counts 66 K parameters: a 1 x 1 convolution (reading R4).
        self.head = nn.Sequential(
            conv_bn_relu(embedding_dim, embedding_dim, kernel=1), nn.Conv2d(embedding_dim, num_classes, 1)
        )
        widths = [base_filters * growth**level for level in range(POOLINGS + 1)]
        self.down = nn.ModuleList(double_conv(before, width) for before, width in pairwise([in_channels, *widths]))
        self.add_decoder(widths, embedding_dim)
        self.separate = separate

    def forward(self, images: Float[Tensor, "n c h w"], window: Crop | None = None) -> SegmentationOutput:
        """Logits and embeddings on the images' grid, or of a window of it. ValueError: H or W is no multiple of 8."""
        height, width = images.shape[-2:]
        if height % MULTIPLE or width % MULTIPLE:
            raise ValueError(f"images are {height} x {width}; three poolings need multiples of {MULTIPLE}: pad them")
        embeddings = self.embed(images, window)
        # "-Sep": cross-entropy teaches the head alone, the metric loss everything before it (Section IV-D).
        return SegmentationOutput(self.head(embeddings.detach() if self.separate else embeddings), embeddings)

    def encode(self, images: Float[Tensor, "n c h w"]) -> list[Tensor]:
        """The outputs of the encoder's blocks, from the finest grid to the coarsest."""
        features = [self.down[0](images)]
        for block in self.down[1:]:
            features.append(block(F.max_pool2d(features[-1], 2)))
        return features


class UNet(SegmentationNetwork):
    """The UNet of Table I; with the default arguments 3 279 842 parameters, the paper's 3.28 M."""

    def add_decoder(self, widths: list[int], embedding_dim: int) -> None:
        self.up, self.merge = _decoder(widths, embedding_dim)

    def embed(self, images: Float[Tensor, "n c h w"], window: Crop | None) -> Float[Tensor, "n e *window"]:
        """Voxel embeddings: the output of the last up-sampling block, after its last ReLU."""
        return _decoded(self.up, self.merge, self.encode(images), window)


def _decoder(widths: list[int], embedding_dim: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The UNet's three up-sampling blocks: transposed convolutions, and the convolutions that merge the skips."""
    # Channels from below, of the block itself, and of its skip. Only the last block widens, to E channels.
    below, level = [widths[3], widths[2], widths[1]], [widths[2], widths[1], embedding_dim]
    skips = [widths[2], widths[1], widths[0]]
    up = nn.ModuleList(nn.ConvTranspose2d(b, h, 2, stride=2) for b, h in zip(below, level, strict=True))
    return up, nn.ModuleList(double_conv(h + s, h) for h, s in zip(level, skips, strict=True))


def _decoded(
    ups: nn.ModuleList, merges: nn.ModuleList, encoded: Sequence[Tensor], window: Crop | None
) -> Float[Tensor, "n e *window"]:
    *skips, features = encoded
    for level, (up, merge) in enumerate(zip(ups, merges, strict=True), start=1):
        features = merged(up, merge, features, [skips[-level]], window if level == POOLINGS else None)
    return features


def light_unet(in_channels: int = 5, filters: int = 32) -> UNet:
    """Stage 1's light UNet: the same topology with `filters` channels at every level (reading R2), about 0.16 M."""
    return UNet(in_channels, filters, filters, growth=1)


class BoundaryFCN(UNet):
    """A UNet with a boundary task, after the abstract of [2] (Table IV): two decoders, joined before the head.

    The second decoder learns a map of the distance to the contour (`mupkg.losses.BoundaryTaskLoss`). The head reads
    the features of both decoders and the map, which is the last channel of the embeddings: 2 E + 1 channels. All
    of it is trained at once, so the second decoder learns from the cross-entropy, too.
    """

    def add_decoder(self, widths: list[int], embedding_dim: int) -> None:
        super().add_decoder(widths, embedding_dim)
        self.boundary_up, self.boundary_merge = _decoder(widths, embedding_dim)
        self.distance = nn.Conv2d(embedding_dim, 1, 1)
        self.head[0] = conv_bn_relu(2 * embedding_dim + 1, embedding_dim, kernel=1)

    def embed(self, images: Float[Tensor, "n c h w"], window: Crop | None) -> Float[Tensor, "n e *window"]:
        """The features of both decoders, and the map of the distance."""
        encoded = self.encode(images)
        features = _decoded(self.up, self.merge, encoded, window)
        boundary = _decoded(self.boundary_up, self.boundary_merge, encoded, window)
        return torch.cat([features, boundary, self.distance(boundary)], dim=1)


class UNetPlusPlus(SegmentationNetwork):
    """UNet++ with the UNet's blocks, widths and head; only the wiring differs: dense nested skips.

    Node (level, column) reads all earlier nodes of its level and, up-sampled, the node below it in the column
    before. The last node of level 0 gives the embeddings. No deep supervision.
    """

    def add_decoder(self, widths: list[int], embedding_dim: int) -> None:
        self.up, self.merge = nn.ModuleDict(), nn.ModuleDict()
        for column in range(1, POOLINGS + 1):
            for level in range(POOLINGS + 1 - column):
                out = embedding_dim if (level, column) == (0, POOLINGS) else widths[level]
                self.up[f"{level}_{column}"] = nn.ConvTranspose2d(widths[level + 1], out, 2, stride=2)
                self.merge[f"{level}_{column}"] = double_conv(out + column * widths[level], out)

    def embed(self, images: Float[Tensor, "n c h w"], window: Crop | None) -> Float[Tensor, "n e *window"]:
        """Voxel embeddings: the last node of the full-resolution level."""
        rows = [[features] for features in self.encode(images)]  # the nodes of each level, column by column
        for column in range(1, POOLINGS + 1):
            for level in range(POOLINGS + 1 - column):
                node = f"{level}_{column}"
                of = window if node == f"0_{POOLINGS}" else None
                below = rows[level + 1][column - 1]
                rows[level].append(merged(self.up[node], self.merge[node], below, rows[level], of))
        return rows[0][-1]


class EmbeddingTap(nn.Module):
    """Any segmentation network that returns logits, with its embeddings tapped at a named layer.

    So voxel metric learning fits MONAI's networks, segmentation_models_pytorch's or your own, unchanged.

    Args:
        network: maps images (N, C, *spatial) to logits (N, classes, *spatial), or to a list or tuple whose first
            entry, or a dict whose entry "out", holds them. With deep supervision the first head may not be the
            final one (in MONAI's UNet++ it is the shallowest): switch it off.
        layer: the layer's name, as `network.named_modules()` gives it; its output (N, E, *smaller) is brought
            to the logits' grid by linear interpolation. If the layer runs more than once in a forward pass, its
            last output counts.

    Raises:
        ValueError: at construction, if there is no such layer; at a call, if the network does not return logits,
            or the layer was not run or gives no feature map.
    """

    def __init__(self, network: nn.Module, layer: str):
        super().__init__()
        layers = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
        if layer not in layers:
            near = difflib.get_close_matches(layer, layers, n=5, cutoff=0)
            raise ValueError(f"{type(network).__name__} has no layer named {layer!r}; near are: {', '.join(near)}")
        self.network, self.layer = network, layer

    def forward(self, images: Float[Tensor, "n c *spatial"]) -> SegmentationOutput:
        tapped: list[Any] = []

        def tap(_layer: nn.Module, _inputs: tuple, output: Any) -> None:  # clones: a ReLU in place may come next
            tapped.append(output.clone() if isinstance(output, Tensor) else output)

        # Hooked for this pass alone: nothing stale is ever returned, no graph is kept, the network stays as it was.
        with self.network.get_submodule(self.layer).register_forward_hook(tap):
            logits = _logits(self.network(images), images.ndim)
        embeddings = tapped[-1] if tapped else None
        if not isinstance(embeddings, Tensor) or embeddings.ndim != logits.ndim:
            raise ValueError(f"layer {self.layer!r} gave no feature map (N, E, *spatial) in this pass; tap another")
        if embeddings.shape[2:] != logits.shape[2:]:
            mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[logits.ndim]
            embeddings = F.interpolate(embeddings, logits.shape[2:], mode=mode, align_corners=False)
        return SegmentationOutput(logits, embeddings)


def vnet(filters: int = 16) -> EmbeddingTap:
    """MONAI's VNet (3D, Table IV), tapped at its last up-sampling block: embeddings of 2 * `filters` channels.

    It takes blocks (N, 1, D, H, W) whose edges are multiples of `VNET_MULTIPLE`. MONAI's own has 16 filters in its
    first block. Its dropout is left out, as in the other networks, so that a resumed training repeats the same bits.
    """
    from monai.networks.nets import vnet as blocks  # slow to import

    f, act, dropout = filters, ("elu", {"inplace": True}), (None, 0.0)
    with torch.device("meta"):  # 45 million weights, all replaced by those of the width that is wanted
        network = blocks.VNet(3, 1, 2)
    parts = {
        "in_tr": blocks.InputTransition(3, 1, f, act),
        "down_tr32": blocks.DownTransition(3, f, 1, act),
        "down_tr64": blocks.DownTransition(3, 2 * f, 2, act),
        "down_tr128": blocks.DownTransition(3, 4 * f, 3, act),
        "down_tr256": blocks.DownTransition(3, 8 * f, 2, act),
        "up_tr256": blocks.UpTransition(3, 16 * f, 16 * f, 2, act, dropout),
        "up_tr128": blocks.UpTransition(3, 16 * f, 8 * f, 2, act, dropout),
        "up_tr64": blocks.UpTransition(3, 8 * f, 4 * f, 1, act, dropout),
        "up_tr32": blocks.UpTransition(3, 4 * f, 2 * f, 1, act, dropout),
        "out_tr": blocks.OutputTransition(3, 2 * f, 2, act),
    }
    for name, part in parts.items():
        setattr(network, name, part)
    return EmbeddingTap(network, "up_tr32")


class Backbone(NamedTuple):
    """A network that configurations name. To add one: an entry of BACKBONES, its test, METHOD.md."""

    network: Callable[..., nn.Module]  # of in_channels, base_filters, embedding_dim (and separate)
    multiple: int = MULTIPLE  # of which the edges of images (blocks) must be
    dimensions: int = 2
    metric: bool = False  # whether samplers may be put on it, as Metric<name>-...


BACKBONES: dict[str, Backbone] = {
    "UNet": Backbone(UNet, metric=True),
    "UNet++": Backbone(UNetPlusPlus, metric=True),
    "VNet": Backbone(lambda base_filters, **_: vnet(max(1, base_filters // 2)), VNET_MULTIPLE, dimensions=3),
    "BoundaryFCN": Backbone(BoundaryFCN),
}


def is_3d(network: nn.Module) -> bool:
    """Whether a network takes blocks (N, 1, D, H, W): whether it has weights of 3D convolutions."""
    return any(weight.ndim == 5 for weight in network.parameters())


def layout_of(network: nn.Module) -> torch.memory_format:
    """The memory layout with channels last for this network and its images."""
    return torch.channels_last_3d if is_3d(network) else torch.channels_last


def _logits(output: Any, ndim: int) -> Tensor:
    """The logits in what a network returned: the tensor itself, the first of a list, or a dict's "out"."""
    logits = output.get("out") if isinstance(output, Mapping) else output
    logits = logits[0] if isinstance(logits, list | tuple) and logits else logits
    if isinstance(logits, Tensor) and logits.ndim == ndim:
        return logits
    found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
    raise ValueError(
        f"the network returned {found}, not logits (N, classes, *spatial) of {ndim} axes, alone, first in a list "
        'or a dict\'s "out"; if it stacks the heads of a deep supervision (as DynUNet in training), switch that off'
    )
