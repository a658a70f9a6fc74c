"""A volume is run slice by slice with its neighbours, the ends replicated, and padded without a trace."""

import numpy as np
import pytest
import torch
from torch import nn

from mupkg.models import BoundaryFCN, SegmentationOutput, UNet, UNetPlusPlus, light_unet, vnet
from mupkg.stages import prediction
from mupkg.stages.prediction import mean_dice, neighbouring_slices, predict_volume, run_slices


def volume(shape=(7, 13, 18)):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


class Watching(nn.Module):
    """Logits are the middle slice against its neighbours' mean; what went in is kept."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        middle = images[:, images.shape[1] // 2]
        return SegmentationOutput(torch.stack([images.mean(dim=1), self.weight * middle], dim=1), images)


@pytest.mark.parametrize("channels", [3, 5])
def test_end_slices_are_taken_again(channels):
    scan = volume()
    images = neighbouring_slices(scan, np.array([0, 3, 6]), channels)
    assert images.dtype == torch.float32 and images.max() <= 1
    rows = {3: [[0, 0, 1], [2, 3, 4], [5, 6, 6]], 5: [[0, 0, 0, 1, 2], [1, 2, 3, 4, 5], [4, 5, 6, 6, 6]]}[channels]
    np.testing.assert_array_equal((images.numpy() * 255).round(), scan[rows])


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 8, 24), (7, 13, 18), (3, 1, 9)])
@pytest.mark.parametrize("channels", [3, 5])
def test_a_volume_is_what_a_plain_loop_over_its_slices_gives(shape, channels):
    torch.manual_seed(0)
    network = UNet(channels, 2, 4).eval()
    scan, expected = volume(shape), np.empty(shape, np.float32)
    height, width = (n + -n % 8 for n in shape[1:])
    for z in range(shape[0]):
        patch = torch.zeros(1, channels, height, width)
        for channel in range(channels):
            neighbour = min(max(z + channel - channels // 2, 0), shape[0] - 1)
            patch[0, channel, : shape[1], : shape[2]] = torch.from_numpy(scan[neighbour] / 255)
        with torch.no_grad():
            logits = network(patch).logits[0, :, : shape[1], : shape[2]]
        expected[z] = logits.softmax(0)[1].numpy()
    np.testing.assert_allclose(predict_volume(network, scan, channels=channels), expected, atol=1e-5)


def test_bf16_changes_rounding_alone():
    torch.manual_seed(0)
    network = UNet(3, 4, 8).eval()
    plain, rounded = (predict_volume(network, volume(), precision=precision) for precision in ("no", "bf16"))
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - plain).max() < 0.05


def test_padding_is_air_to_a_multiple_of_eight_and_is_cut_off_again():
    network = Watching()
    output = run_slices(network, volume(), np.array([2, 5]), 3)
    (seen,) = network.seen
    assert seen.shape == (2, 3, 16, 24)
    assert not seen[..., 13:, :].any() and not seen[..., 18:].any() and seen[..., :13, :18].any()
    assert output.logits.shape == (2, 2, 13, 18) and output.embeddings.shape == (2, 3, 13, 18)


BOXES = [
    (slice(0, 7), slice(0, 51), slice(0, 64)),
    (slice(2, 5), slice(8, 30), slice(20, 44)),
    (slice(6, 7), slice(0, 2), slice(62, 64)),
    (slice(0, 3), slice(40, 51), slice(0, 7)),
]


@pytest.mark.parametrize("backbone", [UNet, UNetPlusPlus, BoundaryFCN])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_box_holds_what_the_whole_volume_holds_there(backbone, precision):
    """At the region's border and inside, where zeros stand for no neighbour: the network must see beyond the box."""
    torch.manual_seed(0)
    network, scan = backbone(3, 4, 16), volume((7, 51, 64))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that zero is not what padding looks like to the next layer
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(20):  # running means and variances
            network.train()(torch.rand(4, 3, 16, 16))
        network.head[-1].weight *= 5
    whole = predict_volume(network, scan, precision=precision)
    assert whole.std() > 0.01
    for box in BOXES:
        part = predict_volume(network, scan, precision=precision, box=box)
        np.testing.assert_allclose(part, whole[box], rtol=0, atol=1e-5 if precision == "no" else 0.02)


def test_memory_is_bounded_and_does_not_change_the_answer(monkeypatch):
    network, scan = Watching(), volume()
    whole = predict_volume(network, scan)
    assert [len(images) for images in network.seen] == [7]
    monkeypatch.setattr(prediction, "VOXELS_AT_ONCE", 3 * 13 * 18)
    network.seen.clear()
    np.testing.assert_allclose(predict_volume(network, scan), whole, atol=1e-6)
    assert [len(images) for images in network.seen] == [3, 3, 1]


def test_slices_larger_than_the_bound_are_run_one_by_one(monkeypatch):
    monkeypatch.setattr(prediction, "VOXELS_AT_ONCE", 10)
    network = Watching()
    assert predict_volume(network, volume()).shape == (7, 13, 18)
    assert len(network.seen) == 7


def test_a_network_is_run_in_evaluation_mode_without_gradients():
    network = light_unet(5, 2).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    probability = predict_volume(network, volume(), channels=5)
    assert not network.training and ((probability > 0) & (probability < 1)).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_read_only_memory_map_will_do(tmp_path):
    np.save(tmp_path / "scan.npy", volume())
    mapped = np.load(tmp_path / "scan.npy", mmap_mode="r")
    np.testing.assert_array_equal(predict_volume(Watching(), mapped), predict_volume(Watching(), volume()))


def test_mean_dice_is_over_cases():
    scans = [volume(), volume()[::-1].copy()]
    masks = [predict_volume(Watching(), scan) > 0.5 for scan in scans]
    half = masks[1] & (np.arange(18) < 9)
    expected = (1 + 2 * half.sum() / (half.sum() + masks[1].sum())) / 2
    assert mean_dice(Watching(), scans, [masks[0], half], channels=3) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no case to validate on"):
        mean_dice(Watching(), [], [], channels=3)


def test_a_region_that_missed_the_prostate_is_no_perfect_validation():
    """Regression: all background gave DSC 1 there, so that the first weights looked best and the plateau left."""
    scans, nowhere = [volume(), volume()[::-1].copy()], np.zeros(volume().shape, np.uint8)
    mask = predict_volume(Watching(), scans[0]) > 0.5
    half = mask & (np.arange(18) < 9)
    alone = mean_dice(Watching(), scans[:1], [half], channels=3)
    assert mean_dice(Watching(), scans, [half, nowhere], channels=3) == alone < 1
    with pytest.raises(ValueError, match=r"see in regions\.csv whether its regions hold any prostate"):
        mean_dice(Watching(), scans, [nowhere, nowhere], channels=3)


@pytest.mark.parametrize("shape", [(7, 13, 18), (16, 32, 16), (1, 20, 9)])
def test_a_3d_network_sees_the_whole_volume_padded_to_multiples_of_sixteen(shape):
    network, scan = vnet(1).train(), volume(shape)
    network(torch.rand(2, 1, 16, 32, 16))  # running means and variances
    padded = np.zeros([n + -n % 16 for n in shape], np.float32)  # in plane; across, the last slice goes on
    padded[:, : shape[1], : shape[2]] = scan[np.minimum(np.arange(len(padded)), shape[0] - 1)] / np.float32(255)
    with torch.no_grad():
        logits, embeddings = (t[0] for t in network.eval()(torch.from_numpy(padded)[None, None]))
    expected = logits.softmax(dim=0)[1][tuple(map(slice, shape))]
    assert expected.std() > 0
    np.testing.assert_allclose(predict_volume(network, scan), expected, atol=1e-6)
    box = (slice(0, 1), slice(2, 7), slice(4, 9))
    np.testing.assert_allclose(predict_volume(network, scan, box=box), expected[box], atol=1e-6)
    middle = np.array([len(scan) - 1, 0])
    found = run_slices(network, scan, middle, 3)
    np.testing.assert_allclose(
        found.embeddings, embeddings[:, middle, : shape[1], : shape[2]].movedim(1, 0), atol=1e-6
    )
