"""How well a network's embeddings tell prostate from background: projected and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8
from torch import nn

from mupkg.losses import MARGIN, squared_distance
from mupkg.stages.voxels import embed_voxels

if TYPE_CHECKING:  # slow to import
    from sklearn.decomposition import PCA

Projection = Literal["PCA", "t-SNE", "UMAP"]
TRIPLETS = 20_000
TSNE_STEPS = 750  # openTSNE's own: 250 with exaggeration, then 500
SILHOUETTE_VOXELS = 2000  # it needs all pairs of voxels


class EmbeddedVoxels(NamedTuple):
    """Some voxels of one region: where they lie, what they are, and their embeddings."""

    index: np.ndarray  # (n, 3): z, y, x in the region
    kind: np.ndarray  # (n,): number into KINDS
    embedding: Float[np.ndarray, "n e"]

    @property
    def is_prostate(self) -> np.ndarray:
        return self.kind < 2


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
    from sklearn.metrics import silhouette_score  # slow to import, and every notebook's kernel would

    some = SILHOUETTE_VOXELS if len(voxels.embedding) > SILHOUETTE_VOXELS else None
    silhouette = silhouette_score(voxels.embedding, voxels.is_prostate, sample_size=some, random_state=seed)
    return {"silhouette": float(silhouette), "Fisher ratio": between / scatter if scatter else float("nan")}


def triplets(voxels: EmbeddedVoxels, margin: float = MARGIN, seed: int = 0) -> dict[str, float]:
    """What random triplets of these voxels look like to the loss (Eq. 2): mean d(a, p), mean d(a, n), share active.

    Anchors and positives are any prostate voxels, negatives any others; d is the squared Euclidean distance, in the
    embeddings' own units. A triplet is active while d(a, p) - d(a, n) + margin > 0. NaN for a single class.
    """
    names = ("active triplets", "mean d(a, p)", "mean d(a, n)")
    inside, outside = (torch.from_numpy(voxels.embedding[rows]) for rows in (voxels.is_prostate, ~voxels.is_prostate))
    if not len(inside) or not len(outside):
        return dict.fromkeys(names, float("nan"))
    rng = np.random.default_rng(seed)
    anchors, positives = (inside[rng.integers(len(inside), size=TRIPLETS)] for _ in range(2))
    near = squared_distance(anchors, positives)
    far = squared_distance(anchors, outside[rng.integers(len(outside), size=TRIPLETS)])
    active = (near - far + margin > 0).float().mean()
    return dict(zip(names, (active.item(), near.mean().item(), far.mean().item()), strict=True))


def embed_all(
    networks: Mapping[str, nn.Module],
    region: UInt8[np.ndarray, "z y x"],
    index: Int[np.ndarray, "n 3"],
    kind: UInt8[np.ndarray, " n"],
) -> dict[str, EmbeddedVoxels]:
    """The same voxels of a region as each network embeds them."""
    return {name: EmbeddedVoxels(index, kind, embed_voxels(net, region, index)) for name, net in networks.items()}


def measure_all(samples: Mapping[str, EmbeddedVoxels], margin: float = MARGIN, seed: int = 0) -> pd.DataFrame:
    """`separation` and `triplets` of each network's voxels, a row a network."""
    rows = {name: separation(sample, seed) | triplets(sample, margin, seed=seed) for name, sample in samples.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def principal_axes(voxels: EmbeddedVoxels) -> PCA:
    """A PCA of the embeddings with two axes, both of which run from the background's mean towards the prostate's.

    The sign of a principal component is arbitrary. With this choice the prostate lies to the right and above in every
    picture, so that networks and steps of a training can be compared.
    """
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2).fit(voxels.embedding)
    if voxels.is_prostate.any() and not voxels.is_prostate.all():
        means = (voxels.embedding[rows].mean(axis=0) for rows in (voxels.is_prostate, ~voxels.is_prostate))
        pca.components_[pca.components_ @ np.subtract(*means) < 0] *= -1
    return pca


def project(
    voxels: EmbeddedVoxels, method: Projection = "PCA", seed: int = 0, progress: Callable[[float], None] | None = None
) -> Float[np.ndarray, "n 2"]:
    """Embeddings on a plane: the first two principal components, or a t-SNE (openTSNE) or UMAP of them.

    t-SNE and UMAP show who is whose neighbour; the gaps between groups and the groups' sizes mean nothing.

    Args:
        progress: called now and then with the share of t-SNE's steps that are done.

    Raises:
        ValueError: for another method. ModuleNotFoundError: for UMAP, if it is not installed, with the command.
    """
    if method not in get_args(Projection):
        raise ValueError(f"projection must be one of {', '.join(get_args(Projection))}, not {method!r}")
    embedding = voxels.embedding
    if method == "PCA" or len(embedding) < 4:  # too few to have neighbours
        return principal_axes(voxels).transform(embedding)
    if method == "t-SNE":
        from openTSNE import TSNE  # slow to import

        perplexity = min(30, (len(embedding) - 1) / 3)
        options = {"perplexity": perplexity, "initialization": "pca", "random_state": seed}
        if progress is not None:
            every, calls = 25, iter(range(1, 10**6))
            options |= {"callbacks": lambda *_: progress(min(1, next(calls) * every / TSNE_STEPS))}
            options |= {"callbacks_every_iters": every}
        return np.asarray(TSNE(**options).fit(embedding))
    try:
        from umap import UMAP
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('UMAP is not installed: pip install -c constraints.txt -e ".[umap]"') from error
    return UMAP(random_state=seed, n_jobs=1).fit_transform(embedding)
