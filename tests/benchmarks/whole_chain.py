"""A whole CT scan through both stages at the paper's size, and against nnU-Net's 2D prediction.

How far stage 2 has to look depends on what it finds, so the weights find a prostate. Stage 1 has the weights of the
shipped localizer, widened by zeros to the paper's width. Stage 2's know a painted prostate by its grey. They take as
long as any others of their width.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from measuring import isolated, memory_mb, row

from mupkg.configurations import build, configuration
from mupkg.data.phantom import make_phantom
from mupkg.data.preprocessing import Preparation, array_spacing, resample
from mupkg.models import UNet, light_unet
from mupkg.scans.files import read_scan, write_image
from mupkg.stages import inference
from mupkg.stages.runs import load_tensors, save_tensors
from mupkg.stages.training import BEST

LOCALIZER = Path(__file__).parents[2] / "data" / "demo" / "UNet-seed0" / inference.LOCALIZER
PAINT_HU, THRESHOLD_HU = 75, 65  # of the prostate, and above what stage 2 calls prostate; stage 1 must know it still
ROUNDS = 3
PARTS = {  # of `Pipeline`, by the function that `mupkg.stages.inference` calls for it
    "check": "checked_case",
    "prepare": "prepare",
    "locate": "locate",
    "stage 2": "region_probability",
    "back to the scan's grid": "to_scan_grid",
}


def write_scans(folder: Path, quick: bool) -> None:
    """small.nii.gz, 256 x 256 x 100, and the same patient as large.nii.gz, 512 x 512 x 200 at half the spacing."""
    case = make_phantom(0, spacing_mm=(3.0, 1.8, 1.8), shape=(100, 256, 256))
    small = sitk.Mask(case.image, case.label, PAINT_HU, 1)
    write_image(small, folder / "small.nii.gz")
    if quick:
        return
    large = resample(small, (1.5, 0.9, 0.9))
    noise = np.random.default_rng(0).normal(0, 12, large.GetSize()[::-1])  # interpolation has calmed it
    noisy = sitk.GetImageFromArray((sitk.GetArrayFromImage(large) + noise).astype(np.int16))
    noisy.CopyInformation(large)
    write_image(noisy, folder / "large.nii.gz")


def write_run(folder: Path, quick: bool) -> None:
    """A run of the paper's size that finds the painted prostate."""
    torch.manual_seed(0)
    filters, embedding = (8, 16) if quick else (32, 256)
    network, _ = build(configuration("MetricUNet-HCP"), base_filters=filters, embedding_dim=embedding)
    find_by_grey(network)
    sizes = {"base_filters": filters, "embedding_dim": embedding}
    save_tensors(network.state_dict(), folder / BEST, {"configuration": "MetricUNet-HCP", **sizes})
    trained, stage1 = load_tensors(LOCALIZER)
    wide = light_unet(inference.COARSE_CHANNELS, filters).state_dict()
    for name, tensor in trained.items():
        wide[name] = widened(tensor, wide[name], stage1["filters"], filters)
    stage1 |= {"preparation": Preparation().model_dump(mode="json"), "filters": filters}
    save_tensors(wide, folder / inference.LOCALIZER, stage1)


@torch.no_grad()
def find_by_grey(network: UNet) -> None:
    """The middle slice's grey, calmed by means of 3 x 3, in the first channel of down 1, up 3 and the head."""
    channel = inference.CHANNELS // 2
    for block in (network.down[0], network.merge[-1], network.head[:1]):
        for convolution, _, _ in block:
            convolution.weight[0], convolution.bias[0] = 0, 0
            convolution.weight[0, channel] = 1 / convolution.weight[0, channel].numel()
            channel = 0
        channel = network.up[-1].out_channels if block is network.down[0] else 0  # where the skip lies in up 3
    low, high = Preparation().window_hu
    last = network.head[-1]
    last.weight[:], last.bias[:] = 0, 0
    last.weight[1, 0], last.bias[1] = 40, -40 * (THRESHOLD_HU - low) / (high - low)


def widened(tensor: torch.Tensor, like: torch.Tensor, narrow: int, wide: int) -> torch.Tensor:
    """A light UNet's tensor with more filters, which are zero: it computes the same."""
    places = [
        [i // narrow * wide + i % narrow if size % narrow == 0 else i for i in range(size)] for size in tensor.shape
    ]
    result = torch.zeros_like(like)
    result[np.ix_(*places)] = tensor
    return result


def ours(scan: str, run: str, threads: int, precision: str = "no") -> dict:
    """Seconds of every part of a scan's way from file to mask."""
    torch.set_num_threads(threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    idle, took = memory_mb("VmRSS"), {}

    def timed(part, call):
        def run_it(*arguments, **options):
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                took[part] = took.get(part, 0.0) + time.perf_counter() - started

        return run_it

    for part, name in PARTS.items():
        setattr(inference, name, timed(part, getattr(inference, name)))
    started = time.perf_counter()
    image = timed("read", read_scan)(scan)
    pipeline = timed("load", inference.Pipeline.load)(run)
    found = pipeline(image, precision=precision)
    return {
        "ms": 1e3 * (time.perf_counter() - started),
        "parts": took,
        "voxels": image.GetNumberOfPixels(),
        "region": found.probability.GetNumberOfPixels(),
        "looked_at": float(np.mean(sitk.GetArrayViewFromImage(found.probability) > 0)),
        "ml": found.volume_ml,
        "idle_mb": idle,
    }


def nnunet(scan: str, threads: int) -> dict:
    """nnU-Net's own prediction of a scan: a plain 2D configuration at the scan's spacing, untrained, no mirroring."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(threads)
    idle, started = memory_mb("VmRSS"), time.perf_counter()
    image = read_scan(scan)
    spacing = list(array_spacing(image))
    plans = PlansManager(nnunet_plans(spacing))
    chosen = plans.get_configuration("2d")
    network = get_network_from_plans(
        chosen.network_arch_class_name,
        chosen.network_arch_init_kwargs,
        chosen.network_arch_init_kwargs_req_import,
        1,
        2,
        deep_supervision=False,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False)
    labels = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "prostate": 1}, "file_ending": ".nii.gz"}
    predictor.manual_initialization(network, plans, chosen, [network.state_dict()], labels, "nnUNetTrainer", None)
    array = sitk.GetArrayFromImage(image)[None].astype(np.float32)
    predictor.predict_single_npy_array(array, {"spacing": spacing}, None, None, False)
    return {"ms": 1e3 * (time.perf_counter() - started), "voxels": image.GetNumberOfPixels(), "idle_mb": idle}


def nnunet_plans(spacing: list[float]) -> dict:
    """What nnU-Net v2 plans for CT slices of 256 x 256: seven stages of 32 to 512 features."""
    stages, convolution = 7, "torch.nn.modules.conv.Conv2d"
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    of_labels = resampling | {"is_seg": True, "order": 1}
    architecture = {
        "n_stages": stages,
        "features_per_stage": [32, 64, 128, 256, 512, 512, 512],
        "conv_op": convolution,
        "kernel_sizes": [[3, 3]] * stages,
        "strides": [[1, 1]] + [[2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    plan = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 12,
        "patch_size": [256, 256],
        "median_image_size_in_voxels": [256.0, 256.0],
        "spacing": spacing[1:],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": of_labels,
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
        "batch_dice": True,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": architecture,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    intensities = {"mean": 0.0, "std": 200.0, "percentile_00_5": -200.0, "percentile_99_5": 400.0}
    return {
        "dataset_name": "Dataset001_Phantom",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": [100, 256, 256],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d": plan},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }


def whole_chain(repeats: int, quick: bool = False) -> list[dict]:
    """Seconds and memory from a scan's file to its mask, in turns, each time in a process of its own."""
    threads, rows = torch.get_num_threads(), []
    with tempfile.TemporaryDirectory() as folder:
        write_scans(Path(folder), quick)
        write_run(Path(folder), quick)
        small, large = f"{folder}/small.nii.gz", f"{folder}/large.nii.gz"
        chains = {
            "256 x 256 x 100 CT": (small, folder, threads),
            "256 x 256 x 100 CT, stage 2 in bf16": (small, folder, threads, "bf16"),
        }
        if not quick:
            chains["512 x 512 x 200 CT"] = (large, folder, threads)
        peers, found = [], {size: [] for size in chains}
        for _ in range(1 if quick else min(repeats, ROUNDS)):
            peers.append(isolated(nnunet, small, threads))
            for size, told in chains.items():
                found[size].append(isolated(ours, *told))
    for size, times in found.items():
        chain = times[0]
        same = chain["voxels"] == peers[0]["voxels"]
        parts = {part: statistics.median(one["parts"][part] for one in times) for part in chain["parts"]}
        whole = "of the same scan" if same else "of the SMALLER scan; the ratio is that of the times per voxel"
        what = f"both stages on a {size}, region of {chain['region']:.1e} voxels"
        seconds = [[1e-3 * one["ms"] / one["voxels"] for one in side] for side in (times, peers)]
        rows.append(
            row(what, *seconds, f"nnU-Net 2D, {whole}")
            | {
                "ours_ms": statistics.median(one["ms"] for one in times),
                "peer_ms": statistics.median(one["ms"] for one in peers),
                "ours_mb": max(one["peak_mb"] for one in times),
                "peer_mb": max(one["peak_mb"] for one in peers),
                "note": f"{chain['ml']:.0f} ml, {chain['looked_at']:.0%} of the region looked at; "
                + ", ".join(f"{part} {took:.1f} s" for part, took in parts.items()),
            }
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(whole_chain(1, quick=True), indent=2))
