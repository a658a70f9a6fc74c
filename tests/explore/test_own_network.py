"""The recipe of notebook 08 for a network of one's own: MONAI's BasicUNet, trained a little, in the workbench."""

import torch
from monai.networks.nets import BasicUNet
from torch.nn import functional as F

from mupkg.data.patches import PatchSource
from mupkg.explore.predictions import Cases
from mupkg.explore.workbench import Workbench
from mupkg.losses import SegmentationMetricLoss, VoxelMetricLoss
from mupkg.models import EmbeddingTap
from mupkg.samplers import RandomSampler


def test_monais_basic_unet_is_trained_fifty_steps_and_explored(regions):
    torch.manual_seed(0)
    network = BasicUNet(spatial_dims=2, in_channels=3, out_channels=2, features=(8, 8, 16, 16, 16, 8), norm="batch")
    tapped = EmbeddingTap(network, layer="upcat_1")
    loss = SegmentationMetricLoss([RandomSampler(anchors=4)], VoxelMetricLoss())
    optimizer = torch.optim.Adam(tapped.parameters(), 0.02)
    patches = iter(PatchSource(*regions.volumes("train"), patch_size=(16, 16), batch_size=16))
    first = last = None
    for _ in range(50):
        images, labels = next(patches)
        terms = loss(tapped.train()(images), labels)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        first, last = first if first is not None else terms.total.item(), terms.total.item()
    assert last < 0.7 * first

    bench = Workbench(Cases(regions, {"BasicUNet": tapped.eval()}), regions.ids("test")[0], per_kind=20)
    assert bench.widget and bench.runs.names == ["BasicUNet"]
    assert len(bench.table["embedding BasicUNet"][0]) == 8  # the features of upcat_1
    heat, truth = bench.shown.heat["BasicUNet"], bench.shown.truth
    assert heat[truth].mean() > 3 * heat[~truth].mean()  # fifty steps teach little, but not nothing
    z = bench.shown.widest
    with torch.inference_mode():  # by hand: the middle of three slices
        images = torch.from_numpy(bench.shown.region[z - 1 : z + 2]).float()[None] / 255
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % 8, 0, -height % 8))
        embeddings = tapped(padded).embeddings[0, :, :height, :width].movedim(0, -1)
    torch.testing.assert_close(
        torch.from_numpy(bench.shown.embedding("BasicUNet", z)), embeddings, rtol=1e-3, atol=1e-4
    )
