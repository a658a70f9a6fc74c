"""Some voxels of a region, chosen by what they are, and the embeddings a network gives them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage
from torch import nn

from mupkg.models import is_3d
from mupkg.samplers import contour
from mupkg.stages.inference import CHANNELS
from mupkg.stages.prediction import foreground, outputs, run_slices

KINDS = ("prostate", "contour", "near background", "far background")
ELSEWHERE = 255  # in slices without prostate
NEAR_VOXELS = 4
EMBEDDINGS_KEPT = 2**30  # bytes; a region of 128^3 voxels with 256 channels has twice as many


def kinds(label: UInt8[np.ndarray, "z y x"] | Bool[np.ndarray, "z y x"]) -> UInt8[np.ndarray, "z y x"]:
    """What every voxel is: its number in KINDS, or ELSEWHERE in slices that hold no prostate.

    Contour voxels are those of `mupkg.samplers.contour` in each slice; near background lies within `NEAR_VOXELS`
    steps of the prostate in plane, which may go diagonally. (The samplers' near negatives, N, lie nearer.)
    """
    prostate = label == 1
    near = ndimage.binary_dilation(prostate, np.ones((1, 3, 3)), iterations=NEAR_VOXELS)
    kind = np.where(near, np.uint8(2), np.uint8(3))
    kind[prostate] = 0
    kind[contour(torch.from_numpy(prostate)).numpy()] = 1
    kind[~prostate.any(axis=(1, 2))] = ELSEWHERE
    return kind


def sample_voxels(
    label: UInt8[np.ndarray, "z y x"] | Bool[np.ndarray, "z y x"], per_kind: int, seed: int = 0
) -> tuple[Int[np.ndarray, "n 3"], UInt8[np.ndarray, " n"]]:
    """Up to `per_kind` voxels of each of KINDS from slices that hold prostate: indices (z, y, x) and kinds."""
    rng, of_kind = np.random.default_rng(seed), kinds(label)
    chosen = [draw(of_kind == number, per_kind, rng) for number in range(len(KINDS))]
    return np.concatenate(chosen), np.repeat(np.arange(len(KINDS), dtype=np.uint8), [len(c) for c in chosen])


def draw(mask: Bool[np.ndarray, "z y x"], count: int, rng: np.random.Generator) -> Int[np.ndarray, "n 3"]:
    """Up to `count` different voxels of a mask, in random order."""
    voxels = np.argwhere(mask)
    return voxels[rng.permutation(len(voxels))[:count]]


def embed_slice(network: nn.Module, region: UInt8[np.ndarray, "z y x"], z: int) -> Float[np.ndarray, "y x e"]:
    """The embeddings of every voxel of one slice of a prepared region, float32."""
    return _embed_slices(network, region, np.array([z]))[0]


def _embed_slices(
    network: nn.Module, region: UInt8[np.ndarray, "z y x"], slices: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n y x e"]:
    return run_slices(network, region, slices, CHANNELS).embeddings.movedim(1, -1).cpu().numpy()


def predict_and_embed(
    network: nn.Module, region: UInt8[np.ndarray, "z y x"]
) -> tuple[Float[np.ndarray, "z y x"], Float[np.ndarray, "z y x e"] | None]:
    """The foreground probability and the embedding of every voxel, in one pass.

    None stands for embeddings that take more than `EMBEDDINGS_KEPT` bytes: embed the voxels and slices you need.
    """
    heat, embeddings = [], []
    for output in outputs(network, region, channels=CHANNELS):
        heat.append(foreground(output))
        if 4 * region.size * output.embeddings.shape[1] <= EMBEDDINGS_KEPT:
            embeddings.append(output.embeddings.movedim(1, -1).cpu().numpy())
    return np.concatenate(heat), np.concatenate(embeddings) if embeddings else None


def embed_voxels(
    network: nn.Module, region: UInt8[np.ndarray, "z y x"], index: Int[np.ndarray, "n 3"]
) -> Float[np.ndarray, "n e"]:
    """The embeddings of some voxels of a prepared region, float32; only the slices that are needed are run."""
    if not len(index):
        raise ValueError("there are no voxels to embed; the label has no prostate")
    embedding, slices = None, np.unique(index[:, 0])
    for group in np.split(slices, 1 if is_3d(network) else len(slices)):  # a 3D network runs all slices anyway
        rows = np.flatnonzero(np.isin(index[:, 0], group))
        picked = _embed_slices(network, region, group)[np.searchsorted(group, index[rows, 0]), *index[rows, 1:].T]
        embedding = np.empty((len(index), picked.shape[1]), np.float32) if embedding is None else embedding
        embedding[rows] = picked
    return embedding
