"""A case as its runs see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from mupkg.explore.panels import slider
from mupkg.metrics import segmentation_metrics
from mupkg.models import EmbeddingTap
from mupkg.report import results
from mupkg.stages.inference import load_network
from mupkg.stages.prediction import predict_volume
from mupkg.stages.regions import Regions
from mupkg.stages.runs import BEST
from mupkg.stages.voxels import ELSEWHERE, KINDS, embed_slice, kinds

SLICES_KEPT = 16  # of embeddings; a slice of 128 x 128 with 256 channels takes 17 MB


@dataclass(frozen=True, eq=False)
class SeenCase:
    """One case as some networks see it, on the region's working grid (x to the patient's left, y to the back)."""

    case_id: str
    region: UInt8[np.ndarray, "z y x"]
    truth: Bool[np.ndarray, "z y x"]
    spacing_mm: tuple[float, float, float]
    networks: Mapping[str, nn.Module]  # by the name that is shown
    heat: Mapping[str, Float[np.ndarray, "z y x"]]  # foreground probabilities

    @classmethod
    def predicted(
        cls,
        case_id: str,
        region: UInt8[np.ndarray, "z y x"],
        truth: Bool[np.ndarray, "z y x"],
        spacing_mm: tuple[float, float, float],
        networks: Mapping[str, nn.Module],
    ) -> SeenCase:
        """Any networks of your own that take three slices in [0, 1]; `EmbeddingTap` gives them embeddings."""
        heat = {name: predict_volume(network, region) for name, network in networks.items()}
        return cls(case_id, region, truth, spacing_mm, networks, heat)

    @classmethod
    def read(
        cls,
        study: str | Path,
        case_id: str | None = None,
        configurations: Sequence[str] | None = None,
        seed: int = 0,
    ) -> SeenCase:
        """A case (the first test case if none is named) and the runs of a study folder, `outputs/<study>` say.

        ValueError naming what is missing: the runs, the case, or a file of a run.
        """
        runs = results.finished_runs(study, configurations, seed).set_index("configuration")["folder"]
        regions = Regions.read(Path(study) / "stage1")
        case_id = case_id or [*regions.ids("test"), *regions.table.index][0]
        if case_id not in regions.table.index:
            raise ValueError(f"case {case_id!r} is not in {study}; there are {', '.join(regions.table.index)}")
        region, label = (np.array(regions.volume(case_id, kind)) for kind in ("image", "label"))
        networks = {name: _as_the_loss_sees_it(*load_network(folder / BEST)) for name, folder in runs.items()}
        return cls.predicted(case_id, region, label == 1, regions.spacing_mm(case_id), networks)

    def tapped(self, layer: str) -> SeenCase:
        """The same case, with another layer's output for embeddings ("merge.1", say); else ValueError."""
        return replace(self, networks={name: EmbeddingTap(net, layer) for name, net in self.networks.items()})

    @cached_property
    def slice(self) -> ipywidgets.IntSlider:
        """The slice shown: one slider for all views of this case."""
        return slider("slice", self.widest, 0, len(self.region) - 1)

    @cached_property
    def embedding(self) -> Callable[[str, int], Float[Tensor, "y x e"]]:
        """`embedding(name, z)`: the embeddings of a slice; the last few are kept."""
        return lru_cache(SLICES_KEPT)(
            lambda name, z: torch.from_numpy(embed_slice(self.networks[name], self.region, z))
        )

    @cached_property
    def kind(self) -> UInt8[np.ndarray, "z y x"]:
        """What every voxel is: its number in KINDS; in slices without prostate far background."""
        found = kinds(self.truth)
        found[found == ELSEWHERE] = KINDS.index("far background")
        return found

    @cached_property
    def distance_mm(self) -> Float[np.ndarray, "z y x"]:
        """Distance of every voxel's centre to the nearest voxel of the other label in mm; negative inside."""
        to_edge = partial(ndimage.distance_transform_edt, sampling=self.spacing_mm)
        return (to_edge(~self.truth) - to_edge(self.truth)).astype(np.float32)

    @property
    def widest(self) -> int:
        """The slice with most prostate."""
        return int(np.argmax(self.truth.sum(axis=(1, 2))))

    def describe(self, z: int, y: int, x: int) -> str:
        """A voxel in one line: where it lies, what it is, and what the networks say of it."""
        said = ", ".join(f"{name} {heat[z, y, x]:.2f}" for name, heat in self.heat.items())
        place = f"voxel (z, y, x) = ({z}, {y}, {x}), {self.distance_mm[z, y, x]:+.1f} mm"
        return f"{place}, {KINDS[self.kind[z, y, x]]}; p: {said}"

    def scores(self, threshold: float = 0.5) -> pd.DataFrame:
        """DSC and HD95 (mm) of each run cut at a threshold, on the region's working grid; a row a run."""
        measure = partial(segmentation_metrics, truth=self.truth, spacing_mm=self.spacing_mm)
        rows = {name: measure(heat > threshold) for name, heat in self.heat.items()}
        return pd.DataFrame.from_dict(rows, orient="index")[["DSC", "HD95"]]

    def worst_slice(self, threshold: float = 0.5) -> int:
        """The slice with the most wrongly labelled voxels, all runs counted."""
        wrong = sum(((heat > threshold) != self.truth).sum(axis=(1, 2)) for heat in self.heat.values())
        return int(np.argmax(wrong))


def _as_the_loss_sees_it(network: nn.Module, about: Mapping) -> nn.Module:
    """The network, its embeddings at unit length if the loss took them so (`normalize`)."""
    if about.get("loss", {}).get("normalize"):
        network.register_forward_hook(
            lambda _, images, output: output._replace(embeddings=F.normalize(output.embeddings, dim=1))
        )
    return network
