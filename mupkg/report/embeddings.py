"""How well a network's embeddings tell prostate from background: voxels sampled, projected and measured."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from mupkg.models import SegmentationNetwork
from mupkg.stages.inference import CHANNELS
from mupkg.stages.slices import run_slices

KINDS = ("prostate", "contour", "near background", "far background")
NEAR_VOXELS = 4


class EmbeddedVoxels(NamedTuple):
    """Some voxels of one region: where they lie, what they are, and their embeddings."""

    index: np.ndarray  # (n, 3): z, y, x in the region
    kind: np.ndarray  # (n,): number into KINDS
    embedding: Float[np.ndarray, "n e"]

    @property
    def is_prostate(self) -> np.ndarray:
        return self.kind < 2


def sample_voxels(label: UInt8[np.ndarray, "z y x"], per_kind: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Up to `per_kind` voxels of each of KINDS from slices that hold prostate: indices (n, 3) and kinds (n,)."""
    rng = np.random.default_rng(seed)
    prostate = label == 1
    slices = prostate.any(axis=(1, 2))[:, None, None]
    contour = prostate & ~ndimage.binary_erosion(prostate, ndimage.generate_binary_structure(2, 1)[None])
    near = ndimage.binary_dilation(prostate, np.ones((1, 3, 3)), iterations=NEAR_VOXELS) & ~prostate
    masks = (prostate & ~contour, contour, near, slices & ~prostate & ~near)
    index, kind = [], []
    for number, mask in enumerate(masks):
        voxels = np.argwhere(mask)
        chosen = voxels[rng.permutation(len(voxels))[:per_kind]]
        index.append(chosen)
        kind.append(np.full(len(chosen), number))
    return np.concatenate(index), np.concatenate(kind)


def embed_voxels(
    network: SegmentationNetwork, region: UInt8[np.ndarray, "z y x"], index: np.ndarray, kind: np.ndarray
) -> EmbeddedVoxels:
    """The embeddings a network gives to voxels of a prepared region; only the slices that are needed are run."""
    embedding = None
    for z in np.unique(index[:, 0]):
        rows = np.flatnonzero(index[:, 0] == z)
        features = run_slices(network, region, np.array([z]), CHANNELS).embeddings[0]
        picked = features[:, index[rows, 1], index[rows, 2]].T.cpu().numpy()
        embedding = np.empty((len(index), picked.shape[1]), np.float32) if embedding is None else embedding
        embedding[rows] = picked
    return EmbeddedVoxels(index, kind, embedding)


def separation(voxels: EmbeddedVoxels, seed: int = 0) -> dict[str, float]:
    """Silhouette and Fisher ratio of prostate against background, in the full embedding space.

    Fisher ratio: squared distance of the two class means over the sum of the two classes' total variances.
    Both are free of the embeddings' overall scale, which differs between networks. NaN for a single class or fewer
    than three voxels.
    """
    inside, outside = voxels.embedding[voxels.is_prostate], voxels.embedding[~voxels.is_prostate]
    if not len(inside) or not len(outside) or len(voxels.embedding) < 3:
        return {"silhouette": float("nan"), "Fisher ratio": float("nan")}
    scatter = float(inside.var(axis=0).sum() + outside.var(axis=0).sum())
    between = float(((inside.mean(axis=0) - outside.mean(axis=0)) ** 2).sum())
    silhouette = (
        silhouette_score(voxels.embedding, voxels.is_prostate, sample_size=2000, random_state=seed)
        if (len(voxels.embedding) > 2000)
        else silhouette_score(voxels.embedding, voxels.is_prostate)
    )
    return {"silhouette": float(silhouette), "Fisher ratio": between / scatter if scatter else float("nan")}


def project(voxels: EmbeddedVoxels) -> Float[np.ndarray, "n 2"]:
    """The first two principal components of the embeddings."""
    return PCA(n_components=2).fit_transform(voxels.embedding)
