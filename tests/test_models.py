"""The networks: Table I's counts, UNet++'s wiring, where `-Sep` cuts the gradient, and the tap."""

import copy
from itertools import pairwise

import pytest
import torch
from monai.networks.nets import BasicUNet, BasicUNetPlusPlus, DynUNet, SegResNet, VNet
from monai.networks.nets import UNet as MonaiUNet
from safetensors.torch import load_file, save_file
from torch import nn

from mupkg.losses import VoxelMetricLoss
from mupkg.models import (
    BoundaryFCN,
    EmbeddingTap,
    SegmentationNetwork,
    UNet,
    UNetPlusPlus,
    is_3d,
    layout_of,
    light_unet,
    vnet,
)
from mupkg.samplers import VoxelTuples

# The "#" column of Table I, in thousands, row by row (the paper cuts off or rounds: within one thousand).
TABLE_I = [0.9, 9, 18, 37, 74, 147, 295, 590, 131, 295, 147, 32, 73, 37, 66, 664, 590, 66, 0.5]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def convs(channels: list[int], kernel: int = 3) -> int:
    """Parameters of a chain of conv + batch norm, counted by hand: weights, biases, scales and shifts."""
    return sum(a * b * kernel**2 + b + 2 * b for a, b in pairwise(channels))


def test_unet_has_the_papers_number_of_parameters():
    assert parameters(UNet()) == 3_279_842


def test_unet_blocks_have_the_channels_of_table_i():
    net = UNet()
    assert [parameters(block) for block in net.down] == [
        convs([3, 32, 32]),
        convs([32, 64, 64]),
        convs([64, 128, 128]),
        convs([128, 256, 256]),
    ]
    assert [parameters(up) for up in net.up] == [256 * 128 * 4 + 128, 128 * 64 * 4 + 64, 64 * 256 * 4 + 256]
    assert [parameters(merge) for merge in net.merge] == [
        convs([256, 128, 128]),
        convs([128, 64, 64]),
        convs([288, 256, 256]),
    ]
    assert parameters(net.head) == convs([256, 256], kernel=1) + 256 * 2 + 2


def test_unet_layers_have_the_counts_printed_in_table_i():
    net = UNet()
    down, up = [*net.down], [m for pair in zip(net.up, net.merge, strict=True) for m in pair]
    layers = [m for block in [*down, *up, net.head] for m in block.modules() if isinstance(m, _CONVS)]
    assert [parameters(layer) / 1000 for layer in layers] == pytest.approx(TABLE_I, abs=1)


_CONVS = (nn.Conv2d, nn.ConvTranspose2d)


def test_light_unet_has_32_filters_at_every_level():
    net = light_unet()
    assert parameters(net) == 163_810
    widths = {m.out_channels for m in net.modules() if isinstance(m, _CONVS)}
    assert widths == {32, 2}
    assert net(torch.rand(2, 5, 16, 16)).logits.shape == (2, 2, 16, 16)


@pytest.mark.parametrize("backbone", [UNet, UNetPlusPlus])
@pytest.mark.parametrize("size", [(8, 8), (16, 40)])
def test_logits_and_embeddings_lie_on_the_images_grid(backbone, size):
    net = backbone(in_channels=5, base_filters=2, embedding_dim=7, num_classes=3)
    logits, embeddings = net(torch.rand(2, 5, *size))
    assert logits.shape == (2, 3, *size)
    assert embeddings.shape == (2, 7, *size)


def test_embeddings_are_the_last_blocks_output_after_its_relu_and_feed_the_head():
    net = UNet(base_filters=2, embedding_dim=7)  # in training: the batch norm gives values of both signs to the ReLU
    seen = {}
    net.merge[-1].register_forward_hook(lambda _m, _i, output: seen.update(last=output))
    output = net(torch.randn(2, 3, 16, 16))
    assert output.embeddings is seen["last"]
    assert output.embeddings.min() == 0
    assert torch.equal(net.head(output.embeddings), output.logits)


@pytest.mark.parametrize("backbone", [UNet, UNetPlusPlus])
@pytest.mark.parametrize("size", [(12, 16), (16, 20), (4, 8)])
def test_sizes_that_are_no_multiples_of_8_are_refused(backbone, size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*multiples of 8"):
        backbone(base_filters=2, embedding_dim=4)(torch.rand(1, 3, *size))


def test_channels_last_reaches_the_embeddings():
    """So that picking voxels' embeddings in the loss needs no copy of them all."""
    for net in UNet(base_filters=4, embedding_dim=8), UNetPlusPlus(base_filters=4, embedding_dim=8):
        images = torch.rand(2, 3, 16, 16).to(memory_format=torch.channels_last)
        embeddings = net.to(memory_format=torch.channels_last)(images).embeddings
        assert embeddings.is_contiguous(memory_format=torch.channels_last)


# --- UNet++ ---


@pytest.mark.parametrize(("filters", "dim"), [(32, 256), (4, 6)])
def test_unetplusplus_has_as_many_parameters_as_its_wiring_says(filters, dim):
    widths = [filters, 2 * filters, 4 * filters, 8 * filters]
    expected = convs([3, widths[0], widths[0]]) + sum(convs([above, here, here]) for above, here in pairwise(widths))
    nodes = [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (0, 3)]  # (level, column): the triangle above the diagonal
    for level, column in nodes:
        out = dim if (level, column) == (0, 3) else widths[level]
        expected += widths[level + 1] * out * 4 + out  # from the node below, up-sampled
        expected += convs([out + column * widths[level], out, out])  # beside all earlier nodes of the level
    expected += convs([dim, dim], kernel=1) + dim * 2 + 2
    assert parameters(UNetPlusPlus(3, filters, dim)) == expected


def test_every_node_of_unetplusplus_reads_all_earlier_ones_of_its_level_and_the_one_below():
    net = UNetPlusPlus(base_filters=2, embedding_dim=5).eval()
    inputs, outputs = {}, {}
    for level, block in enumerate(net.down):
        block.register_forward_hook(lambda _m, _i, out, key=(level, 0): outputs.update({key: out}))
    for name, merge in net.merge.items():
        key = tuple(map(int, name.split("_")))
        merge.register_forward_pre_hook(lambda _m, i, key=key: inputs.update({key: i[0]}))
        merge.register_forward_hook(lambda _m, _i, out, key=key: outputs.update({key: out}))
    with torch.no_grad():
        embeddings = net(torch.randn(1, 3, 16, 16)).embeddings
        for level, column in inputs:
            below = net.up[f"{level}_{column}"](outputs[level + 1, column - 1])
            earlier = [outputs[level, c] for c in range(column)]
            assert torch.equal(inputs[level, column], torch.cat([below, *earlier], dim=1))
    assert len(inputs) == 6
    assert embeddings is outputs[0, 3]


def test_both_backbones_have_the_same_head_and_encoder():
    for part in ("head", "down"):
        shapes = [[p.shape for p in getattr(net, part).parameters()] for net in (UNet(), UNetPlusPlus())]
        assert shapes[0] == shapes[1]


# --- -Sep ---


def with_gradient(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


def names(net: SegmentationNetwork) -> tuple[set[str], set[str]]:
    """Parameters before the sampling layer, and of the head."""
    everything = {name for name, _ in net.named_parameters()}
    head = {name for name in everything if name.startswith("head.")}
    return everything - head, head


def cross_entropy(net: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (2, 16, 16))
    return nn.functional.cross_entropy(net(torch.randn(2, 3, 16, 16)).logits, labels)


def metric_loss(net: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    tuples = VoxelTuples(*torch.randint(0, 512, (3, 50)))
    return VoxelMetricLoss(margin=100.0)(net(torch.randn(2, 3, 16, 16)).embeddings, tuples)


# A bias before a batch norm has no gradient by nature: the norm takes it out again (up to rounding).
def is_idle_bias(name: str) -> bool:
    return name.endswith(".0.bias")


@pytest.mark.parametrize("backbone", [UNet, UNetPlusPlus])
def test_sep_cross_entropy_teaches_the_head_alone(backbone):
    net = backbone(base_filters=2, embedding_dim=4, separate=True)
    cross_entropy(net).backward()
    before, head = names(net)
    assert all(p.grad is None for name, p in net.named_parameters() if name in before)
    assert {n for n in head if not is_idle_bias(n)} <= with_gradient(net)


@pytest.mark.parametrize("separate", [True, False])
def test_the_metric_loss_teaches_everything_but_the_head(separate):
    net = UNet(base_filters=2, embedding_dim=4, separate=separate)
    metric_loss(net).backward()
    before, head = names(net)
    assert all(p.grad is None for name, p in net.named_parameters() if name in head)
    assert {n for n in before if not is_idle_bias(n)} <= with_gradient(net)


@pytest.mark.parametrize("backbone", [UNet, UNetPlusPlus])
def test_without_sep_cross_entropy_teaches_everything(backbone):
    net = backbone(base_filters=2, embedding_dim=4)
    cross_entropy(net).backward()
    assert {n for n, _ in net.named_parameters() if not is_idle_bias(n)} <= with_gradient(net)


def test_sep_changes_no_value():
    torch.manual_seed(0)
    net = UNet(base_filters=2, embedding_dim=4)
    separate = UNet(base_filters=2, embedding_dim=4, separate=True)
    separate.load_state_dict(net.state_dict())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(net(images).logits, separate(images).logits)


# --- EmbeddingTap ---

SIX = (4, 4, 4, 4, 4, 4)
MONAI_NETWORKS = {
    "UNet 2D": (MonaiUNet(2, 3, 2, (4, 8), (2,)), "model.1", (2, 3, 16, 16), 12),
    "UNet 3D": (MonaiUNet(3, 1, 2, (4, 8), (2,)), "model.0", (2, 1, 8, 8, 12), 4),
    "BasicUNet 2D": (BasicUNet(2, 3, 2, features=SIX), "upcat_1", (1, 3, 32, 32), 4),
    "BasicUNet 3D, a third level": (BasicUNet(3, 1, 2, features=SIX), "upcat_3.convs", (1, 1, 32, 32, 32), 4),
    "BasicUNet++ (a list)": (BasicUNetPlusPlus(2, 3, 2, features=SIX), "upcat_0_4", (1, 3, 32, 32), 4),
    "SegResNet 3D": (SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)), "up_layers.0", (1, 1, 8, 8, 8), 8),
}


@pytest.mark.parametrize("case", MONAI_NETWORKS)
def test_tap_gives_a_monai_networks_logits_and_a_layers_embeddings_on_their_grid(case):
    network, layer, shape, channels = MONAI_NETWORKS[case]
    network.eval()
    images = torch.rand(shape)
    bare = network(images)
    output = EmbeddingTap(network, layer)(images)
    assert torch.equal(output.logits, bare[0] if isinstance(bare, list) else bare)
    assert output.embeddings.shape == (shape[0], channels, *shape[2:])
    output.embeddings.sum().backward()  # the gradient reaches the network through the tap
    assert any(p.grad is not None and p.grad.any() for p in network.get_submodule(layer).parameters())


class Small(nn.Module):
    """Features, at half the size if told, and logits wrapped as told."""

    def __init__(self, wrap=lambda logits: logits, stride: int = 1):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1, stride=stride)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.to_logits = nn.Sequential(nn.Upsample(scale_factor=stride), nn.Conv2d(4, 2, 1))
        self.unused = nn.Conv2d(4, 4, 1)
        self.wrap = wrap

    def forward(self, images):
        return self.wrap(self.to_logits(self.relu(self.norm(self.features(images)))))


WRAPS = {
    "tensor": lambda logits: logits,
    "list": lambda logits: [logits, logits[..., ::2, ::2]],
    "tuple": lambda logits: (logits, "more"),
    "dict": lambda logits: {"aux": logits[:, :1], "out": logits},
}


@pytest.mark.parametrize("kind", WRAPS)
def test_tap_finds_the_logits_in_what_a_network_returns(kind):
    network, images = Small(WRAPS[kind]).eval(), torch.rand(2, 3, 8, 8)
    expected = network.to_logits(network.relu(network.norm(network.features(images))))
    assert torch.equal(EmbeddingTap(network, "relu")(images).logits, expected)


def test_a_dict_without_out_is_refused():
    tap = EmbeddingTap(Small(lambda logits: {"logits": logits, "loss": 0}), "relu")
    with pytest.raises(ValueError, match=r'returned dict, not logits .* a dict.s "out"'):
        tap(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("dims", [2, 3])
def test_stacked_heads_of_deep_supervision_are_told_from_a_wrong_layer(dims):
    """Regression: DynUNet stacks them in an extra axis while it trains, and the layer was blamed."""
    options = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3, "filters": [4] * 4}
    network = DynUNet(dims, 3, 2, **options, deep_supervision=True, deep_supr_num=2)
    tap, images = EmbeddingTap(network, "upsamples.2"), torch.rand(2, 3, *(16,) * dims)
    stacked = (2, 3, 2, *(16,) * dims)
    with pytest.raises(ValueError, match=r"deep supervision.*switch that off") as error:
        tap(images)
    assert f"the network returned a tensor {stacked}, not logits (N, classes, *spatial)" in str(error.value)
    assert "layer" not in str(error.value)
    assert tap.eval()(images).embeddings.shape == (2, 4, *(16,) * dims)  # then there is one head
    cured = DynUNet(dims, 3, 2, **options)  # what the message advises
    assert EmbeddingTap(cured, "upsamples.2")(images).logits.shape == (2, 2, *(16,) * dims)


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda logits: [[logits]], "list"),
        (lambda logits: [], "list"),
        (lambda logits: None, "NoneType"),
        (lambda logits: {"out": {"logits": logits}}, "dict"),
        (lambda logits: logits.mean(dim=(2, 3)), "a tensor (2, 2)"),
        (lambda logits: torch.stack([logits, logits], dim=1), "a tensor (2, 2, 2, 8, 8)"),
    ],
)
def test_what_is_no_logits_is_told_from_a_wrong_layer(wrap, found):
    with pytest.raises(ValueError, match="not logits") as error:
        EmbeddingTap(Small(wrap), "relu")(torch.rand(2, 3, 8, 8))
    assert f"the network returned {found}, not logits (N, classes, *spatial) of 4 axes" in str(error.value)


@pytest.mark.parametrize("dims", [2, 3])
def test_smaller_features_are_interpolated_linearly_between_voxel_centres(dims):
    pool, step = (nn.AvgPool2d, nn.AvgPool3d)[dims - 2], (1,) * (dims - 1) + (2,)
    network = nn.Sequential(pool(step), nn.Upsample(scale_factor=step))
    images = torch.tensor([1.0, 1, 5, 5]).view(1, 1, *(1,) * (dims - 1), 4)
    logits, embeddings = EmbeddingTap(network, "0")(images)  # the layer gives 1, 5
    assert logits.flatten().tolist() == [1, 1, 5, 5]
    assert embeddings.flatten().tolist() == [1, 2, 4, 5]


def test_a_relu_in_place_after_the_layer_does_not_change_what_was_tapped():
    network, images = Small(), torch.randn(2, 3, 8, 8)
    assert EmbeddingTap(network, "norm")(images).embeddings.min() < 0
    assert EmbeddingTap(network, "relu")(images).embeddings.min() == 0


@pytest.mark.parametrize(
    ("wrong", "near"), [("to_logit.1", "to_logits.1"), ("feature", "features"), ("1", "to_logits.1"), ("", "unused")]
)
def test_a_layer_that_is_not_there_is_refused_with_the_names_near_it(wrong, near):
    with pytest.raises(ValueError, match=f"Small has no layer named '{wrong}'.*{near}"):
        EmbeddingTap(Small(), wrong)


def test_a_layer_that_was_not_run_is_refused_even_if_it_ran_before():
    network, images = Small(), torch.rand(2, 3, 8, 8)
    tap = EmbeddingTap(network, "unused")
    network.unused(torch.rand(2, 4, 8, 8))  # outside the tap: must not be returned as this pass's features
    with pytest.raises(ValueError, match="'unused' gave no feature map"):
        tap(images)


def test_a_layer_whose_output_is_no_feature_map_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Unflatten(1, (2, 8, 8)))
    with pytest.raises(ValueError, match="'1' gave no feature map"):
        EmbeddingTap(network, "1")(torch.rand(2, 3, 8, 8))


def test_tap_leaves_no_hook_and_no_graph_behind():
    network = Small()
    tap = EmbeddingTap(network, "relu")
    tap(torch.rand(2, 3, 8, 8))
    assert not network.relu._forward_hooks
    assert not any(isinstance(value, torch.Tensor) for value in vars(tap).values())


def test_a_deep_copy_taps_its_own_network():
    tap = EmbeddingTap(Small(), "features").eval()
    images = torch.rand(1, 3, 8, 8)
    before = tap(images).embeddings
    twin = copy.deepcopy(tap)
    nn.init.zeros_(twin.network.features.weight)
    nn.init.zeros_(twin.network.features.bias)
    assert not twin(images).embeddings.any()
    assert torch.equal(tap(images).embeddings, before)


def test_tap_adds_no_weights_and_goes_through_safetensors(tmp_path):
    tap, other = EmbeddingTap(Small(), "relu").eval(), EmbeddingTap(Small(), "relu").eval()
    assert tap.state_dict().keys() == {f"network.{name}" for name in tap.network.state_dict()}
    save_file(tap.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(tap(images).embeddings, other(images).embeddings)


def test_two_taps_on_one_network_do_not_disturb_each_other():
    network, images = Small().eval(), torch.rand(1, 3, 8, 8)
    first, second = EmbeddingTap(network, "features"), EmbeddingTap(network, "norm")
    expected = first(images).embeddings
    second(images)
    assert torch.equal(first(images).embeddings, expected)
    assert not torch.equal(second(images).embeddings, expected)


# --- Table IV's ---


def test_vnet_is_monais_without_dropout_at_any_width():
    with torch.device("meta"):
        ours, theirs = vnet(16).network, VNet(3, 1, 2)
    shapes = [{name: weight.shape for name, weight in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert not [m for m in ours.modules() if isinstance(m, nn.Dropout3d) and m.p]
    narrow = vnet(2).train()
    assert {weight.device.type for weight in narrow.state_dict().values()} == {"cpu"}
    assert narrow.network.in_tr.conv_block.conv.out_channels == 2
    blocks = torch.rand(2, 1, 16, 32, 16)
    output, again = narrow(blocks), narrow(blocks)
    assert output.logits.shape == (2, 2, 16, 32, 16) and output.embeddings.shape == (2, 4, 16, 32, 16)
    assert torch.equal(output.logits, again.logits)  # nothing is drawn, so a resumed training repeats it


def test_only_networks_of_3d_convolutions_are_3d():
    assert is_3d(vnet(1)) and is_3d(EmbeddingTap(MonaiUNet(3, 1, 2, (4, 8), (2,)), "model.0"))
    assert not any(is_3d(net) for net in (UNet(3, 2, 4), BoundaryFCN(3, 2, 4), MonaiUNet(2, 3, 2, (4, 8), (2,))))
    assert layout_of(vnet(1)) == torch.channels_last_3d and layout_of(light_unet()) == torch.channels_last


@pytest.mark.slow
def test_boundary_fcn_has_two_decoders_joined_before_the_head():
    network = BoundaryFCN(3, 2, 4).eval()
    images = torch.rand(2, 3, 16, 24)
    logits, embeddings = network(images)
    assert logits.shape == (2, 2, 16, 24) and embeddings.shape == (2, 9, 16, 24)
    torch.testing.assert_close(embeddings[:, 8:], network.distance(embeddings[:, 4:8]))
    torch.testing.assert_close(logits, network.head(embeddings))
    # Each decoder is the UNet's: with its own weights zeroed, its features alone change.
    plain = UNet(3, 2, 4).eval()
    plain.load_state_dict(network.state_dict() | plain.head.state_dict(prefix="head."), strict=False)
    torch.testing.assert_close(plain(images).embeddings, embeddings[:, :4])
    nn.init.zeros_(network.boundary_merge[-1][1][0].weight)
    changed = network(images).embeddings
    assert torch.equal(changed[:, :4], embeddings[:, :4]) and not torch.equal(changed[:, 4:8], embeddings[:, 4:8])
