"""A study's cases, and one of them as its runs predict it."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import ArrayLike
from scipy import ndimage
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F

from mupkg.data.cohort import Cohort
from mupkg.data.preprocessing import array_spacing
from mupkg.explore.controls import slider
from mupkg.metrics import segmentation_metrics
from mupkg.models import EmbeddingTap
from mupkg.report import results
from mupkg.stages.inference import load_network
from mupkg.stages.regions import Regions
from mupkg.stages.runs import BEST, STAGE1
from mupkg.stages.voxels import ELSEWHERE, KINDS, embed_slice, embed_voxels, kinds, predict_and_embed

SLICES_KEPT = 16  # of embeddings that are not kept whole; a slice of 128 x 128 with 256 channels takes 17 MB
SMALL_WORK = 2e11  # voxels times weights: below, threads that wait for each other cost more than they bring
EMBEDDED_KEPT = 4  # predictions (a case and a run) whose embeddings are kept


@dataclass(frozen=True, eq=False)
class CasePredictions:
    """One case as some networks predict it, on the region's working grid (x to the patient's left, y to the back)."""

    case_id: str
    region: UInt8[np.ndarray, "z y x"]
    truth: Bool[np.ndarray, "z y x"]
    spacing_mm: tuple[float, float, float]
    networks: Mapping[str, nn.Module]  # by the name that is shown
    heat: Mapping[str, Float[np.ndarray, "z y x"]]  # foreground probabilities
    split: str = ""  # train, validation or test, if the case is of a study
    grid: sitk.Image | None = None  # that the region lies on; None: its first voxel lies at the origin
    kept: Mapping[str, Float[np.ndarray, "z y x e"] | None] = field(default_factory=dict)  # embeddings

    def tapped(self, layer: str) -> CasePredictions:
        """The same case, with another layer's output for embeddings ("merge.1", say); else ValueError."""
        networks = {name: EmbeddingTap(network, layer) for name, network in self.networks.items()}
        return replace(self, networks=networks, kept={})

    @cached_property
    def slice(self) -> ipywidgets.IntSlider:
        """The slice shown: one slider for all views of this case."""
        return slider("slice", self.widest, 0, len(self.region) - 1)

    @property
    def mark(self) -> str:
        """What must stand beside numbers of a case that the runs were trained on."""
        return "TRAINING case" if self.split == "train" else ""

    @property
    def letters(self) -> dict[str, str]:
        """A for the first run, B for the second: what stands where there is no room for names."""
        return dict(zip(self.heat, string.ascii_uppercase, strict=False))

    def title(self, name: str, numbers: str, note: str = "") -> str:
        """The three lines above a run's picture: its name, numbers, and what must be said of them."""
        return f"{self.letters[name]} · {name}\n{numbers}\n{', '.join(filter(None, [self.mark, note]))}"

    @cached_property
    def embedding(self) -> Callable[[str, int], Float[np.ndarray, "y x e"]]:
        """`embedding(name, z)`: the embeddings of a slice; where not all are kept, those of the last few slices."""

        def embedded(name: str, z: int) -> np.ndarray:
            stored = self.kept.get(name)
            return embed_slice(self.networks[name], self.region, z) if stored is None else stored[z]

        return lru_cache(SLICES_KEPT)(embedded)

    def embed(self, name: str, index: Int[np.ndarray, "n 3"]) -> Float[np.ndarray, "n e"]:
        """The embeddings of some voxels."""
        stored = self.kept.get(name)
        return embed_voxels(self.networks[name], self.region, index) if stored is None else stored[tuple(index.T)]

    @cached_property
    def kind(self) -> UInt8[np.ndarray, "z y x"]:
        """What every voxel is: its number in KINDS; in slices without prostate far background."""
        number = kinds(self.truth)
        number[number == ELSEWHERE] = KINDS.index("far background")
        return number

    @cached_property
    def distance_mm(self) -> Float[np.ndarray, "z y x"]:
        """Distance of every voxel's centre to the nearest voxel of the other label in mm; negative inside."""
        to_edge = partial(ndimage.distance_transform_edt, sampling=self.spacing_mm)
        return (to_edge(~self.truth) - to_edge(self.truth)).astype(np.float32)

    def world_mm(self, index: ArrayLike) -> Float[np.ndarray, "*n 3"]:
        """Where voxels (z, y, x) lie in the scan's own space: x, y, z in mm (to the left, to the back, upwards)."""
        steps = np.asarray(index)[..., ::-1] * self.spacing_mm[::-1]
        if self.grid is None:
            return steps
        return steps @ np.reshape(self.grid.GetDirection(), (3, 3)).T + self.grid.GetOrigin()

    @property
    def widest(self) -> int:
        """The slice with most prostate."""
        return int(np.argmax(self.truth.sum(axis=(1, 2))))

    def describe(self, z: int, y: int, x: int) -> str:
        """A voxel in four short lines: where it lies, what it is, and how probable the runs call prostate there."""
        across, back, up = self.world_mm((z, y, x))
        said = ", ".join(f"{self.letters[name]} {heat[z, y, x]:.2f}" for name, heat in self.heat.items())
        what = f"{KINDS[self.kind[z, y, x]]}, {self.distance_mm[z, y, x]:+.2f} mm"
        place = f"x {across:.2f}, y {back:.2f}, z {up:.2f} mm"
        mark = f", {self.mark}" if self.mark else ""
        return f"voxel (z, y, x) {z}, {y}, {x}{mark}\n{place}\n{what}\nprobability: {said}"

    def scores(self, threshold: float = 0.5) -> pd.DataFrame:
        """DSC, HD95 (mm) and islands (parts beside the largest) of each run's mask at a threshold, a row a run.

        On the region's working grid, with all islands: HD95 jumps where there is one.
        """
        measure = partial(segmentation_metrics, truth=self.truth, spacing_mm=self.spacing_mm)
        masks = {name: heat > threshold for name, heat in self.heat.items()}
        rows = {n: measure(mask) | {"islands": max(0, ndimage.label(mask)[1] - 1)} for n, mask in masks.items()}
        return pd.DataFrame.from_dict(rows, orient="index")[["DSC", "HD95", "islands"]]

    def worst_slice(self, threshold: float = 0.5) -> int:
        """The slice with the most wrongly labelled voxels, all runs counted."""
        wrong = sum(((heat > threshold) != self.truth).sum(axis=(1, 2)) for heat in self.heat.values())
        return int(np.argmax(wrong))


class Cases:
    """The cases of a study and the networks that predict them, each case predicted when it is opened.

    Args:
        volumes: a study's regions, or a whole cohort.
        networks: by the name that is shown; any that take three slices in [0, 1], see `EmbeddingTap`. Instead of a
            run's, the path of its weights, which are read once the run is shown.
        tested: DSC of tested cases, a row a case and a column a network.

    Attributes:
        table: a row a case: split, and the DSC of each network. Blank until the case is opened, if it was not tested.
    """

    def __init__(
        self,
        volumes: Regions | Cohort,
        networks: Mapping[str, nn.Module | Path],
        tested: pd.DataFrame | None = None,
    ):
        self.volumes, self.networks, self.names = volumes, dict(networks), list(networks)
        labelled = volumes.table[["split"]].dropna()  # a cohort's scan without a label is in no split
        self.table = labelled.join(pd.DataFrame(tested, columns=self.names, dtype=float))
        self.measured_here = self.table[self.names].isna()
        self._predicted: dict[tuple[str, str], tuple] = {}  # heat and embeddings of a case by a network

    @classmethod
    def read(cls, study: str | Path | Cases, configurations: Sequence[str] | None = None, seed: int = 0) -> Cases:
        """Those of a study folder, `outputs/<study>` say; `Cases` of your own stay as they are.

        ValueError naming what is missing: the runs, or a file of a run.
        """
        if isinstance(study, Cases):
            return study
        runs = results.finished_runs(study, configurations, seed)
        weights = {run.configuration: run.folder / BEST for run in runs.itertuples()}
        return cls(Regions.read(Path(study) / STAGE1), weights, results.per_case(results.case_metrics(runs), "DSC"))

    def network(self, name: str) -> nn.Module:
        """The network of this name, read if it was not yet."""
        if isinstance(path := self.networks[name], Path):
            self.networks[name] = _as_the_loss_sees_it(*load_network(path))
        return self.networks[name]

    def worst_first(self, names: Sequence[str]) -> list[str]:
        """Cases by the mean DSC of these networks, the worst first; then those that nobody has measured."""
        split = self.table["split"].map(["test", "validation", "train"].index)
        order = pd.DataFrame({"dsc": self.table[list(names)].mean(axis=1), "split": split})
        return list(order.sort_values(["dsc", "split"], kind="stable").index)

    def listed(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """A line for each case, and its name: split and DSC; "≈" before those measured here, on the working grid."""
        lines = []
        for case_id in self.worst_first(names):
            row, measured = self.table.loc[case_id], self.measured_here.loc[case_id]
            parts = [f"{n} {'≈ ' if measured[n] else ''}{row[n]:.3f}" for n in names if pd.notna(row[n])]
            split = "TRAINING case" if row["split"] == "train" else row["split"]
            lines.append((" · ".join([case_id, split, *parts]), case_id))
        return lines

    def open(self, case_id: str | None = None, names: Sequence[str] | None = None) -> CasePredictions:
        """A case, the worst one if none is named, as these networks predict it (all of them if None).

        ValueError if there is no such case with a label.
        """
        names = list(names or self.names)
        case_id = case_id or self.worst_first(names)[0]
        if case_id not in self.table.index:
            raise ValueError(f"case {case_id!r} is not in this study; there are {', '.join(self.table.index)}")
        if isinstance(self.volumes, Cohort):
            image, label = self.volumes.prepared(case_id)
        else:
            image, label = (self.volumes.image(case_id, part) for part in ("image", "label"))
        region, truth = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label) == 1
        networks = {name: self.network(name) for name in names}
        for name, network in networks.items():
            if (case_id, name) not in self._predicted:
                work = region.size * sum(weight.numel() for weight in network.parameters())
                with threadpool_limits(1 if work < SMALL_WORK else None):
                    self._predicted[case_id, name] = predict_and_embed(network, region)
        for key in list(self._predicted)[:-EMBEDDED_KEPT]:
            self._predicted[key] = self._predicted[key][0], None
        heat, embeddings = ({name: self._predicted[case_id, name][part] for name in names} for part in (0, 1))
        split, spacing = self.table.loc[case_id, "split"], array_spacing(image)
        case = CasePredictions(case_id, region, truth, spacing, networks, heat, split, image, embeddings)
        blank = [name for name in names if pd.isna(self.table.loc[case_id, name])]
        if blank:
            self.table.loc[case_id, blank] = case.scores()["DSC"][blank]
        return case


def _as_the_loss_sees_it(network: nn.Module, about: Mapping) -> nn.Module:
    """The network, its embeddings at unit length if the loss took them so (`normalize`)."""
    if about.get("loss", {}).get("normalize"):
        network.register_forward_hook(
            lambda _, images, output: output._replace(embeddings=F.normalize(output.embeddings, dim=1))
        )
    return network
