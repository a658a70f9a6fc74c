"""A film of a training: what some voxels of one validation case look like to the network as it learns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import nn

from mupkg.stages.inference import CHANNELS
from mupkg.stages.prediction import run_slices
from mupkg.stages.regions import Regions
from mupkg.stages.runs import FILM, load_tensors, save_tensors
from mupkg.stages.voxels import embed_voxels, sample_voxels

EARLY = (5, 10, 20, 40, 80)  # steps to be filmed beside the validations: most tuples stop teaching between them


class Film:
    """Keeps a frame whenever `record` is called: the same voxels of the same case every time.

    A frame holds the embeddings of some voxels of every kind, and of the slice with most prostate the foreground
    probability and the embeddings of a patch around the prostate, where the samplers can be watched at work.

    Args:
        folder: the run's; frames go to film/<step>.safetensors in it.
        region, label: of one validation case that has a prostate, prepared.
        per_kind: voxels of each of `KINDS`. patch: edge of the patch in voxels.
    """

    def __init__(
        self,
        folder: str | Path,
        case_id: str,
        region: UInt8[np.ndarray, "z y x"],
        label: UInt8[np.ndarray, "z y x"],
        *,
        per_kind: int = 100,
        patch: int = 32,
    ):
        self.folder, self.case_id, self.region = Path(folder) / FILM, case_id, region
        self.index, self.kind = sample_voxels(label, per_kind)
        self.z = int(np.argmax((label == 1).sum(axis=(1, 2))))
        middle = np.argwhere(label[self.z] == 1).mean(axis=0).round().astype(int)
        self.extent = np.minimum(patch, label.shape[1:])
        self.corner = np.clip(middle - self.extent // 2, 0, label.shape[1:] - self.extent)

    @classmethod
    def of_validation(cls, folder: str | Path, regions: Regions) -> Film:
        """A film of a study's first validation case that has a prostate; ValueError if there is none."""
        for case_id in regions.ids("validation"):
            region, label = (np.array(regions.volume(case_id, kind)) for kind in ("image", "label"))
            if (label == 1).any():
                return cls(folder, case_id, region, label)
        raise ValueError("there is no validation case with a prostate to film; add one, or leave film False")

    def watch(self, network: nn.Module, step: int) -> None:
        """Record this step if it is one of `EARLY`: for a training that calls after every step."""
        if step in EARLY:
            self.record(network, step)

    def record(self, network: nn.Module, step: int) -> None:
        """Write the frame of this step; nothing of the training changes. Step 0 begins a new film."""
        if step == 0:
            for old in self.folder.glob("*.safetensors"):
                old.unlink()
        output = run_slices(network, self.region, np.array([self.z]), CHANNELS)
        (top, left), (height, width) = self.corner, self.extent
        patch = output.embeddings[0, :, top : top + height, left : left + width]
        tensors = {
            "index": torch.from_numpy(self.index.astype(np.int16)),
            "kind": torch.from_numpy(self.kind),
            "embeddings": torch.from_numpy(embed_voxels(network, self.region, self.index)).half(),
            "patch_embeddings": patch.movedim(0, -1).half(),
            "probability": (output.logits.softmax(dim=1)[0, 1] * 255).round().byte(),
        }
        about = {"case_id": self.case_id, "slice": self.z, "corner": [int(top), int(left)], "step": step}
        save_tensors(tensors, self.folder / f"{step:06d}.safetensors", about)


@dataclass(frozen=True)
class Frames:
    """A film as it was kept: f frames of n voxels, and of one slice and a patch of it."""

    case_id: str
    z: int  # the slice
    corner: tuple[int, int]  # of the patch in the slice: row, column
    steps: list[int]
    index: Int[np.ndarray, "n 3"]
    kind: UInt8[np.ndarray, " n"]
    embeddings: Float[np.ndarray, "f n e"]
    patch_embeddings: Float[np.ndarray, "f h w e"]
    probability: Float[np.ndarray, "f y x"]  # in [0, 1]

    @property
    def patch(self) -> tuple[slice, slice]:
        """Where the patch lies in the slice."""
        extent = self.patch_embeddings.shape[1:3]
        return tuple(slice(start, start + size) for start, size in zip(self.corner, extent, strict=True))


def read_film(run_folder: str | Path) -> Frames:
    """The frames of a run in their order.

    Raises:
        ValueError: naming the folder or file, if there is no film or its frames do not belong together.
    """
    folder = Path(run_folder) / FILM  # frames are named by their step
    paths = sorted((p for p in folder.glob("*.safetensors") if p.stem.isdecimal()), key=lambda path: int(path.stem))
    if not paths:
        raise ValueError(f"{folder}: holds no film; set film to True in notebook 03 (delete a run trained without)")
    frames, about = zip(*map(load_tensors, paths), strict=True)
    for path, tensors, facts in zip(paths, frames, about, strict=True):
        same = all(torch.equal(tensors[name], frames[0][name]) for name in ("index", "kind"))
        if not same or any(facts[name] != about[0][name] for name in ("case_id", "slice", "corner")):
            raise ValueError(f"{path}: is of another film than {paths[0].name}; delete {folder} and train again")
    stacked = {
        name: np.stack([frame[name].numpy() for frame in frames]).astype(np.float32)
        for name in ("embeddings", "patch_embeddings", "probability")
    }
    stacked["probability"] /= 255
    place = about[0]["case_id"], about[0]["slice"], tuple(about[0]["corner"])
    index, kind = (frames[0][name].numpy() for name in ("index", "kind"))
    return Frames(*place, [frame["step"] for frame in about], index, kind, **stacked)
