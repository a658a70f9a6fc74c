"""Embeddings are measured free of scale, by hand-made cases, and projected."""

import numpy as np
import pytest
import torch

from mupkg.models import UNet
from mupkg.report.embeddings import (
    EmbeddedVoxels,
    embed_all,
    measure_all,
    principal_axes,
    project,
    separation,
    triplets,
)
from mupkg.stages.voxels import embed_voxels


def voxels_of(inside, outside):
    embedding = np.concatenate([inside, outside]).astype(np.float32)
    kind = np.repeat([0, 3], [len(inside), len(outside)])
    return EmbeddedVoxels(np.zeros((len(kind), 3), int), kind, embedding)


def clouds(distance, n=200, dimensions=5, seed=0):
    rng = np.random.default_rng(seed)
    shift = np.eye(dimensions)[0] * distance
    return voxels_of(rng.normal(size=(n, dimensions)) + shift, rng.normal(size=(n, dimensions)))


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
    points = project(voxels_of(embedding[:150], embedding[150:]))
    assert points.shape == (300, 2)
    for column, axis in ((0, 1), (1, 4)):
        assert abs(np.corrcoef(points[:, column], embedding[:, axis])[0, 1]) > 0.99


@pytest.mark.parametrize("sign", [1, -1])
def test_the_prostate_lies_to_the_right_and_above_whatever_the_signs(sign):
    voxels = clouds(3.0)
    mirrored = voxels._replace(embedding=sign * voxels.embedding)
    points = project(mirrored)
    assert (points[voxels.is_prostate].mean(axis=0) >= points[~voxels.is_prostate].mean(axis=0)).all()
    np.testing.assert_allclose(points, project(voxels), atol=1e-4)  # a mirrored space looks the same


def test_principal_axes_are_orthonormal_and_tell_their_share_of_the_variance():
    voxels = clouds(4.0)
    pca = principal_axes(voxels)
    np.testing.assert_allclose(pca.components_ @ pca.components_.T, np.eye(2), atol=1e-5)
    spread = np.linalg.svd(voxels.embedding - voxels.embedding.mean(axis=0), compute_uv=False) ** 2
    np.testing.assert_allclose(pca.explained_variance_ratio_, spread[:2] / spread.sum(), rtol=1e-4)


def test_one_class_alone_has_axes_all_the_same():
    rng = np.random.default_rng(0)
    assert project(voxels_of(rng.normal(size=(20, 4)), np.zeros((0, 4)))).shape == (20, 2)


def test_several_networks_are_measured_on_the_same_voxels():
    torch.manual_seed(0)
    networks = {"a": UNet(3, 2, 6).eval(), "b": UNet(3, 2, 4).eval()}
    region = np.random.default_rng(0).integers(0, 256, (4, 16, 16)).astype(np.uint8)
    index, kind = np.argwhere(np.ones((4, 4, 4)))[::2], np.repeat(np.uint8([0, 3]), 16)
    samples = embed_all(networks, region, index, kind)
    for name, sample in samples.items():
        np.testing.assert_array_equal(sample.embedding, embed_voxels(networks[name], region, index))
    numbers = measure_all(samples, margin=0.3, seed=1)
    assert numbers.index.tolist() == ["a", "b"]
    expected = separation(samples["b"], 1) | triplets(samples["b"], 0.3, seed=1)
    assert numbers.loc["b"].to_dict() == expected


@pytest.mark.parametrize("method", ["t-SNE", "UMAP"])
def test_neighbours_stay_neighbours(method):
    if method == "UMAP":
        pytest.importorskip("umap", reason="UMAP is an optional extra")
    voxels = clouds(20.0, n=60)
    points = project(voxels, method)
    assert points.shape == (120, 2) and np.isfinite(points).all()
    nearest = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(120)
    assert (voxels.is_prostate[nearest.argmin(axis=1)] == voxels.is_prostate).all()
    np.testing.assert_array_equal(points, project(voxels, method))


def test_another_projection_is_refused_by_name():
    with pytest.raises(ValueError, match=r"one of PCA, t-SNE, UMAP, not 'LDA'"):
        project(clouds(1.0), "LDA")


def test_triplets_by_hand():
    # two places inside, one outside: d(a, p) is 0 or 4 with equal chance, d(a, n) 1 or 9, margin 0.7
    found = triplets(voxels_of([[0.0], [2.0]], [[-1.0]]), margin=0.7)
    assert found["mean d(a, p)"] == pytest.approx(2.0, abs=0.1)
    assert found["mean d(a, n)"] == pytest.approx(5.0, abs=0.15)
    # active only: anchor at 0 (d(a, n) = 1) with the positive at 2 (d(a, p) = 4)
    assert found["active triplets"] == pytest.approx(0.25, abs=0.02)
    assert triplets(voxels_of([[0.0], [2.0]], [[-1.0]]), margin=1.1)["active triplets"] == pytest.approx(
        0.5, abs=0.02
    )


def test_triplets_need_both_classes():
    assert all(np.isnan(value) for value in triplets(voxels_of(np.zeros((3, 2)), np.zeros((0, 2)))).values())
