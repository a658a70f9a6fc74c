"""Voxels are sampled by what they are, embedded where they lie, and measured free of scale."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from mupkg.models import SegmentationOutput, UNet
from mupkg.report.embeddings import KINDS, EmbeddedVoxels, embed_voxels, project, sample_voxels, separation
from mupkg.stages.slices import run_slices

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


def voxels_of(inside, outside):
    embedding = np.concatenate([inside, outside]).astype(np.float32)
    kind = np.repeat([0, 3], [len(inside), len(outside)])
    return EmbeddedVoxels(np.zeros((len(kind), 3), int), kind, embedding)


def clouds(distance, n=200, dimensions=5, seed=0):
    rng = np.random.default_rng(seed)
    shift = np.eye(dimensions)[0] * distance
    return voxels_of(rng.normal(size=(n, dimensions)) + shift, rng.normal(size=(n, dimensions)))


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


def test_a_sample_is_of_the_size_asked_for_and_the_seeds():
    index, kind = sample_voxels(LABEL, 30, seed=1)
    assert np.bincount(kind).tolist() == [30] * 4
    np.testing.assert_array_equal(index, sample_voxels(LABEL, 30, seed=1)[0])
    assert (index != sample_voxels(LABEL, 30, seed=2)[0]).any()


def test_an_embedding_is_that_of_its_own_voxel():
    region = np.random.default_rng(0).integers(0, 256, LABEL.shape).astype(np.uint8)
    index, kind = sample_voxels(LABEL, 25)
    shuffled = np.random.default_rng(1).permutation(len(index))
    voxels = embed_voxels(Places(), region, index[shuffled], kind[shuffled])
    z, y, x = voxels.index.T
    np.testing.assert_allclose(voxels.embedding, np.column_stack([region[z, y, x], y, x]), atol=1e-3)
    np.testing.assert_array_equal(voxels.is_prostate, LABEL[z, y, x] == 1)


def test_only_slices_that_are_needed_are_run():
    network, ran = Places(), []
    network.register_forward_hook(lambda module, inputs, output: ran.append(len(inputs[0])))
    index = np.array([[2, 5, 5], [2, 6, 6], [4, 1, 1]])
    embed_voxels(network, LABEL, index, np.zeros(3, int))
    assert ran == [1, 1]


def test_the_networks_own_embeddings_are_taken():
    torch.manual_seed(0)
    network = UNet(3, 2, 6)
    index, kind = sample_voxels(LABEL, 3)
    voxels = embed_voxels(network, LABEL * 200, index, kind)
    whole = run_slices(network, LABEL * 200, np.arange(5), 3).embeddings.numpy()
    z, y, x = index.T
    np.testing.assert_allclose(voxels.embedding, whole[z, :, y, x], atol=1e-5)


def test_the_fisher_ratio_by_hand():
    voxels = voxels_of([[1.0, 0.0], [3.0, 0.0]], [[0.0, 4.0], [0.0, 6.0]])
    # means (2, 0) and (0, 5); total variances 1 and 1
    assert separation(voxels)["Fisher ratio"] == pytest.approx(29 / 2)


def test_the_silhouette_by_hand():
    voxels = voxels_of([[0.0], [1.0]], [[10.0], [11.0]])
    outer, inner = 1 - 1 / 10.5, 1 - 1 / 9.5
    assert separation(voxels)["silhouette"] == pytest.approx((outer + inner) / 2)


def test_what_lies_further_apart_is_more_separate():
    near, far = separation(clouds(0.5)), separation(clouds(5.0))
    assert all(near[name] < far[name] for name in near)
    assert abs(separation(clouds(0.0))["silhouette"]) < 0.05


def test_separation_is_free_of_scale():
    voxels = clouds(2.0)
    scaled = voxels._replace(embedding=1000 * voxels.embedding)
    assert separation(scaled) == pytest.approx(separation(voxels), rel=1e-4)


def test_many_voxels_are_measured_on_a_sample_of_the_seeds():
    voxels = clouds(3.0, n=1500)
    assert separation(voxels, seed=1) == separation(voxels, seed=1)
    assert separation(voxels)["silhouette"] == pytest.approx(separation(clouds(3.0))["silhouette"], abs=0.05)


@pytest.mark.parametrize(("inside", "outside"), [(5, 0), (0, 5), (1, 1)])
def test_one_class_alone_has_no_separation(inside, outside):
    rng = np.random.default_rng(0)
    found = separation(voxels_of(rng.normal(size=(inside, 3)), rng.normal(size=(outside, 3))))
    assert set(found) == {"silhouette", "Fisher ratio"} and np.isnan(list(found.values())).all()


def test_the_projection_keeps_the_greatest_spread():
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(300, 6)) * [0.1, 9, 0.1, 0.1, 3, 0.1]
    points = project(EmbeddedVoxels(np.zeros((300, 3), int), np.zeros(300, int), embedding))
    assert points.shape == (300, 2)
    for column, axis in ((0, 1), (1, 4)):
        assert abs(np.corrcoef(points[:, column], embedding[:, axis])[0, 1]) > 0.99
