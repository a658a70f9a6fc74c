"""A case as its runs see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from mupkg.metrics import segmentation_metrics
from mupkg.models import SegmentationNetwork, SegmentationOutput
from mupkg.report import results
from mupkg.stages.inference import load_network
from mupkg.stages.prediction import predict_volume
from mupkg.stages.regions import Regions
from mupkg.stages.runs import BEST


@dataclass(frozen=True)
class SeenCase:
    """One case of a study as its runs see it, on the region's working grid."""

    case_id: str
    region: UInt8[np.ndarray, "z y x"]
    truth: Bool[np.ndarray, "z y x"]
    spacing_mm: tuple[float, float, float]
    networks: Mapping[str, SegmentationNetwork]  # by configuration
    heat: Mapping[str, Float[np.ndarray, "z y x"]]  # foreground probabilities

    @classmethod
    def read(
        cls,
        study: str | Path,
        case_id: str | None = None,
        configurations: Sequence[str] | None = None,
        seed: int = 0,
    ) -> SeenCase:
        """A case (the first test case if none is named) and the runs of a study folder, `outputs/<study>` say.

        Raises:
            ValueError: naming what is missing: the runs, the case, or a file of a run.
        """
        runs = results.runs(study, configurations)
        runs = runs[runs["seed"] == seed].set_index("configuration")["folder"]
        missing = [name for name in configurations or () if name not in runs.index]
        if runs.empty or missing:
            what = ", ".join(missing) or "any configuration"
            raise ValueError(f"{study}: has no run of {what} with seed {seed}; train it or choose another seed")
        regions = Regions.read(Path(study) / "stage1")
        if not case_id and not regions.ids("test"):
            raise ValueError(f"{study}: has no test case; give case_id one of {', '.join(regions.table.index)}")
        case_id = case_id or regions.ids("test")[0]
        if case_id not in regions.table.index:
            raise ValueError(f"case {case_id!r} is not in {study}; there are {', '.join(regions.table.index)}")
        region, label = (np.array(regions.volume(case_id, kind)) for kind in ("image", "label"))
        networks = {name: _as_the_loss_sees_it(*load_network(folder / BEST)) for name, folder in runs.items()}
        heat = {name: predict_volume(network, region) for name, network in networks.items()}
        return cls(case_id, region, label == 1, regions.spacing_mm(case_id), networks, heat)

    @property
    def widest(self) -> int:
        """The slice with most prostate."""
        return int(np.argmax(self.truth.sum(axis=(1, 2))))

    def scores(self, threshold: float = 0.5) -> pd.DataFrame:
        """DSC and HD95 (mm) of each run cut at a threshold, on the region's working grid; a row a run."""
        rows = {
            name: segmentation_metrics(heat > threshold, self.truth, spacing_mm=self.spacing_mm)
            for name, heat in self.heat.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")[["DSC", "HD95"]]

    def worst_slice(self, threshold: float = 0.5) -> int:
        """The slice with the most wrongly labelled voxels, all runs counted."""
        wrong = sum(((heat > threshold) != self.truth).sum(axis=(1, 2)) for heat in self.heat.values())
        return int(np.argmax(wrong))

    def signed_distance_mm(self) -> Float[np.ndarray, "z y x"]:
        """Distance of every voxel's centre to the nearest voxel of the other label in mm; negative inside."""
        outside, inside = (
            ndimage.distance_transform_edt(m, sampling=self.spacing_mm) for m in (~self.truth, self.truth)
        )
        return (outside - inside).astype(np.float32)


class UnitLength(nn.Module):
    """A network whose embeddings are brought to unit length, as `normalize` does in the loss."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Float[Tensor, "n c h w"]) -> SegmentationOutput:
        output = self.network(images)
        return output._replace(embeddings=F.normalize(output.embeddings, dim=1))


def _as_the_loss_sees_it(network: SegmentationNetwork, about: Mapping) -> SegmentationNetwork:
    return UnitLength(network) if about.get("loss", {}).get("normalize") else network
