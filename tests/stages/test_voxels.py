"""Voxels are sampled by what they are and embedded where they lie."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from mupkg.models import SegmentationOutput, UNet, vnet
from mupkg.stages.prediction import run_slices
from mupkg.stages.voxels import KINDS, embed_slice, embed_voxels, sample_voxels

LABEL = np.zeros((5, 32, 40), np.uint8)
LABEL[1:4, 10:20, 12:24] = 1


class Places(nn.Module):
    """Embeddings that say what the middle slice holds, its row and its column."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        middle = images[:, images.shape[1] // 2]
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in middle.shape[1:]), indexing="ij")
        places = [middle * 255, rows.expand_as(middle), columns.expand_as(middle)]
        return SegmentationOutput(torch.stack(places[:2], 1), torch.stack(places, 1).float())


def test_voxels_of_every_kind_are_what_they_are_called():
    index, kind = sample_voxels(LABEL, 10_000)
    z, y, x = index.T
    inside = LABEL[z, y, x] == 1
    # the distance in plane to the other side, in steps that may go diagonally
    steps = np.stack([ndimage.distance_transform_cdt(LABEL[s] == 0, "chessboard") for s in range(5)])[z, y, x]
    edge = (y == 10) | (y == 19) | (x == 12) | (x == 23)
    names = np.array(KINDS)[kind]
    assert set(names) == set(KINDS)
    np.testing.assert_array_equal(names == "prostate", inside & ~edge)
    np.testing.assert_array_equal(names == "contour", inside & edge)
    np.testing.assert_array_equal(names == "near background", ~inside & (steps <= 4))
    np.testing.assert_array_equal(names == "far background", ~inside & (steps > 4))
    assert len(index) == 3 * 32 * 40 == len(np.unique(index, axis=0))  # slices without prostate are left out
    assert set(z) == {1, 2, 3}


def test_the_regions_border_is_no_contour():
    cut = np.zeros_like(LABEL)
    cut[:, :, 30:] = 1  # the organ goes on beyond the region
    index, kind = sample_voxels(cut, 10_000)
    assert (index[kind == KINDS.index("contour"), 2] == 30).all()


def test_a_sample_is_of_the_size_asked_for_and_the_seeds():
    index, kind = sample_voxels(LABEL, 30, seed=1)
    assert np.bincount(kind).tolist() == [30] * 4
    np.testing.assert_array_equal(index, sample_voxels(LABEL, 30, seed=1)[0])
    assert (index != sample_voxels(LABEL, 30, seed=2)[0]).any()


def test_an_embedding_is_that_of_its_own_voxel():
    region = np.random.default_rng(0).integers(0, 256, LABEL.shape).astype(np.uint8)
    index, _ = sample_voxels(LABEL, 25)
    shuffled = np.random.default_rng(1).permutation(len(index))
    z, y, x = index[shuffled].T
    embedding = embed_voxels(Places(), region, index[shuffled])
    np.testing.assert_allclose(embedding, np.column_stack([region[z, y, x], y, x]), atol=1e-3)
    whole = embed_slice(Places(), region, 2)
    assert whole.shape == (32, 40, 3)
    np.testing.assert_array_equal(whole[5, 7], [region[2, 5, 7], 5, 7])


def test_only_slices_that_are_needed_are_run():
    network, ran = Places(), []
    network.register_forward_hook(lambda module, inputs, output: ran.append(len(inputs[0])))
    index = np.array([[2, 5, 5], [2, 6, 6], [4, 1, 1]])
    embed_voxels(network, LABEL, index)
    assert ran == [1, 1]


def test_the_networks_own_embeddings_are_taken():
    torch.manual_seed(0)
    network = UNet(3, 2, 6)
    index, _ = sample_voxels(LABEL, 3)
    embedding = embed_voxels(network, LABEL * 200, index)
    whole = run_slices(network, LABEL * 200, np.arange(5), 3).embeddings.numpy()
    z, y, x = index.T
    np.testing.assert_allclose(embedding, whole[z, :, y, x], atol=1e-5)


@pytest.mark.parametrize("empty", [np.zeros_like(LABEL), LABEL[:0]])
def test_a_label_without_prostate_has_no_voxels_to_embed(empty):
    index, kind = sample_voxels(empty, 5)
    assert len(index) == len(kind) == 0
    with pytest.raises(ValueError, match="no voxels to embed"):
        embed_voxels(Places(), LABEL, index)


def test_a_3d_networks_voxels_are_those_of_its_slices_and_it_is_run_once():
    network, runs = vnet(1), []
    network.register_forward_hook(lambda *_: runs.append(0))
    index = np.array([[3, 4, 5], [0, 1, 2], [3, 0, 39], [1, 31, 0]])
    found = embed_voxels(network, LABEL * 200, index)
    assert len(runs) == 1
    wanted = [embed_slice(network, LABEL * 200, z)[y, x] for z, y, x in index]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
