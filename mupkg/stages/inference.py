"""From a region to a mask on the scan's own grid: a new scan through both stages of a trained run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
import torch
from torch import nn

from mupkg.configurations import build, configuration
from mupkg.data.preprocessing import (
    Grid,
    Preparation,
    array_spacing,
    crop_region,
    largest_component,
    prepare,
    to_scan_grid,
)
from mupkg.models import UNet, is_3d, layout_of, light_unet
from mupkg.scans.cases import Point, checked_case, label_volume_ml, one_volume
from mupkg.scans.writing import whole_file
from mupkg.stages.localization import COARSE_CHANNELS, Location, locate
from mupkg.stages.prediction import Box, predict_volume
from mupkg.stages.runs import BEST, load_tensors, load_weights, require

CHANNELS = 3  # neighbouring slices into stage 2
STEP_MM = 4.0  # how far stage 2 looks beyond the coarse mask: one stage-1 voxel; doubles each time
LOCALIZER = "localizer.safetensors"  # stage 1's weights, copied into every run


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A run's network with its weights, on the GPU if there is one, and what its file says about them."""
    tensors, metadata = load_tensors(path)
    require(metadata, ("configuration", "base_filters", "embedding_dim"), path)
    sizes = {name: metadata[name] for name in ("base_filters", "embedding_dim")}
    network, _ = build(configuration(metadata["configuration"]), CHANNELS, **sizes)
    return _with_weights(network, tensors, path), metadata


def load_localizer(path: Path) -> tuple[UNet, dict[str, Any]]:
    """Stage 1's light UNet with its weights, and what its file says about them."""
    tensors, metadata = load_tensors(path)
    require(metadata, ("filters", "preparation", "coarse_mm", "region_mm"), path)
    return _with_weights(light_unet(COARSE_CHANNELS, metadata["filters"]), tensors, path), metadata


def _with_weights(network: Any, tensors: Mapping[str, torch.Tensor], path: Path) -> Any:
    load_weights(network, tensors, path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device, memory_format=layout_of(network)).eval()


def region_probability(
    network: nn.Module,
    region: sitk.Image,
    precision: Literal["no", "bf16"] = "no",
    start: tuple[Point, Point] | None = None,
) -> sitk.Image:
    """The foreground probability on a prepared region's grid.

    Args:
        start: corners of a box (mm). The network then begins there, and goes outward until the foreground touches
            nothing that was not looked at, where 0 stands for the probability. If there is no foreground, the whole
            region is looked at. A 3D network always looks at all of it.
    """
    voxels = sitk.GetArrayFromImage(region)
    array, shape = np.zeros(voxels.shape, np.float32), voxels.shape
    step = np.maximum(2, np.round(STEP_MM / np.array(array_spacing(region)))).astype(int)
    wanted = _box(np.zeros(3), shape, shape)
    if start is not None and not is_3d(network):
        low, high = (np.array(region.TransformPhysicalPointToContinuousIndex(c)[::-1]) + 0.5 for c in start)
        wanted = _box(low - step, high + step, shape)
    box = tuple(slice(edge.stop, edge.stop) for edge in wanted)  # what was looked at: nothing yet
    while box != wanted:
        for axis in (2, 1, 0):  # each way, what lies beyond the box
            own, wide = box[axis], wanted[axis]
            for beyond in (slice(wide.start, own.start), slice(own.stop, wide.stop)):
                part = (*box[:axis], beyond, *box[axis + 1 :])
                if array[part].size:
                    array[part] = predict_volume(network, voxels, channels=CHANNELS, precision=precision, box=part)
            box = (*box[:axis], wide, *box[axis + 1 :])
        seen = array[box] > 0.5
        touched = np.array([[seen.take(end, axis).any() for axis in range(3)] for end in (0, -1)])
        low, high = np.array([[edge.start, edge.stop] for edge in box]).T + [[-1], [1]] * touched * step
        wanted, step = _box(low, high, shape) if seen.any() else _box(np.zeros(3), shape, shape), 2 * step
    probability = sitk.GetImageFromArray(array)
    probability.CopyInformation(region)
    return probability


def _box(low: np.ndarray, high: Sequence[float], shape: tuple[int, ...]) -> Box:
    """From low to high, widened to even voxels and cut to the shape; all of the shape if nothing is left."""
    ends = zip(2 * np.floor(low / 2), 2 * np.ceil(np.divide(high, 2)), shape, strict=True)
    box = tuple(slice(int(max(0, a)), int(min(b, size))) for a, b, size in ends)
    return box if all(edge.start < edge.stop for edge in box) else tuple(slice(0, size) for size in shape)


def keep_largest(probability: sitk.Image) -> sitk.Image:
    """The probability with every foreground component but the largest set to 0 (reading R10)."""
    mask = probability > 0.5
    dropped = sitk.Subtract(mask, largest_component(mask))
    return sitk.Mask(probability, dropped, outsideValue=0.0, maskingValue=1)


def copy_localizer(stage1_folder: Path, run_folder: Path) -> None:
    """Put stage 1's weights into a run's folder, so that the run can be used alone."""
    with whole_file(run_folder / LOCALIZER) as temporary:
        shutil.copyfile(stage1_folder / BEST, temporary)


@dataclass(frozen=True)
class Segmentation:
    """What both stages say about one scan."""

    mask: sitk.Image  # uint8 0/1 on the scan's own grid
    probability: sitk.Image  # of foreground, on the region's grid, in all components; 0 where not looked at
    location: Location

    @property
    def volume_ml(self) -> float:
        return label_volume_ml(self.mask)


@dataclass(frozen=True)
class Pipeline:
    """Both stages of a trained run, ready for new scans; nothing but the run's folder is needed."""

    localizer: UNet
    network: nn.Module
    preparation: Preparation
    coarse_mm: float
    region_mm: tuple[float, float, float]

    @classmethod
    def load(cls, run_folder: str | Path) -> Pipeline:
        """ValueError naming the file if a part of the run is missing or broken."""
        localizer, stage1 = load_localizer(Path(run_folder) / LOCALIZER)
        network, _ = load_network(Path(run_folder) / BEST)
        try:
            preparation = Preparation.model_validate(stage1["preparation"])
            grid = Grid.model_validate({name: stage1[name] for name in Grid.model_fields})
        except ValueError as error:
            raise ValueError(f"{Path(run_folder) / LOCALIZER}: is broken ({error}); copy the file again") from error
        return cls(localizer, network, preparation, grid.coarse_mm, grid.region_mm)

    def __call__(
        self,
        image: sitk.Image,
        *,
        name: str = "scan",
        everywhere: bool = False,
        precision: Literal["no", "bf16"] = "no",
    ) -> Segmentation:
        """Both stages on a scan (HU for CT); ValueError naming the scan if it is unfit or the prostate not found.

        Args:
            everywhere: look at the whole region, for a probability map without gaps.
            precision: of stage 2, see `prediction.outputs`.
        """
        if not isinstance(image, sitk.Image):
            kind = type(image).__name__
            raise TypeError(f"{name}: must be a SimpleITK image, not {kind}; read it with mupkg.data.files.read_scan")
        if self.preparation.channel is not None:
            image = one_volume(image, self.preparation.channel, name)
        case = checked_case(name, image, None, image_name="image", modality=self.preparation.modality)
        prepared = prepare(case, self.preparation).image
        location = locate(case, prepared, self.localizer, coarse_mm=self.coarse_mm)
        region = crop_region(prepared, location.centre, self.region_mm)
        probability = region_probability(self.network, region, precision, None if everywhere else location.coarse_box)
        return Segmentation(to_scan_grid(keep_largest(probability), case.image), probability, location)


def segment(image: sitk.Image, run_folder: str | Path, *, precision: Literal["no", "bf16"] = "no") -> sitk.Image:
    """The prostate mask of a new scan, on the scan's own grid: both stages of a trained run.

    Args:
        image: a CT in HU or an MR volume, as the run was trained on; of a 4D one the channel that the run knows.
        run_folder: outputs/<study>/<configuration>-seed<k>, or a copy of it anywhere.
        precision: of stage 2; "bf16" halves the time on a processor that multiplies bf16, see `prediction.outputs`.

    Raises:
        ValueError: if a part of the run is missing or broken, or the prostate cannot be located.
        TypeError: if the image is none, a file's name say.
    """
    return Pipeline.load(run_folder)(image, precision=precision).mask
