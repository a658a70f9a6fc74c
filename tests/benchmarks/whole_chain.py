"""A whole CT scan through both stages at the paper's size, and against nnU-Net's 2D prediction.

The weights are untrained, which takes exactly as long; the location then comes from a meaningless coarse mask and the
femoral heads of a phantom.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from measuring import isolated, memory_mb

from mupkg.configurations import build, configuration
from mupkg.data.files import read_scan, write_image
from mupkg.data.phantom import make_phantom
from mupkg.data.preprocessing import Preparation, array_spacing, resample
from mupkg.models import light_unet
from mupkg.stages import inference
from mupkg.stages.runs import save_tensors
from mupkg.stages.training import BEST

PARTS = {  # of `Pipeline`, by the function that `mupkg.stages.inference` calls for it
    "check": "checked_case",
    "prepare": "prepare",
    "locate": "locate",
    "stage 2": "region_probability",
    "back to the scan's grid": "to_scan_grid",
}


def write_scans(folder: Path, quick: bool) -> None:
    """small.nii.gz, 256 x 256 x 100, and the same patient as large.nii.gz, 512 x 512 x 200 at half the spacing."""
    small = make_phantom(0, spacing_mm=(3.0, 1.8, 1.8), shape=(100, 256, 256)).image
    write_image(small, folder / "small.nii.gz")
    if quick:
        return
    large = resample(small, (1.5, 0.9, 0.9))
    noise = np.random.default_rng(0).normal(0, 12, large.GetSize()[::-1])  # interpolation has calmed it
    noisy = sitk.GetImageFromArray((sitk.GetArrayFromImage(large) + noise).astype(np.int16))
    noisy.CopyInformation(large)
    write_image(noisy, folder / "large.nii.gz")


def write_run(folder: Path, quick: bool) -> None:
    """An untrained run of the paper's size."""
    torch.manual_seed(0)
    filters, embedding = (4, 8) if quick else (32, 256)
    network, _ = build(configuration("MetricUNet-HCP"), base_filters=filters, embedding_dim=embedding)
    sizes = {"base_filters": filters, "embedding_dim": embedding}
    save_tensors(network.state_dict(), folder / BEST, {"configuration": "MetricUNet-HCP", **sizes})
    stage1 = {"preparation": Preparation().model_dump(mode="json"), "coarse_mm": 4.0, "region_mm": (128.0,) * 3}
    localizer = light_unet(inference.COARSE_CHANNELS, filters)
    save_tensors(localizer.state_dict(), folder / inference.LOCALIZER, {"filters": filters, **stage1})


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
    """Seconds and memory from a scan's file to its mask, once each, in processes of their own."""
    threads, rows = torch.get_num_threads(), []
    with tempfile.TemporaryDirectory() as folder:
        write_scans(Path(folder), quick)
        write_run(Path(folder), quick)
        small = f"{folder}/small.nii.gz"
        peer = isolated(nnunet, small, threads)
        found = {
            "256 x 256 x 100 CT": isolated(ours, small, folder, threads),
            "256 x 256 x 100 CT, stage 2 in bf16": isolated(ours, small, folder, threads, "bf16"),
        }
        if not quick:
            found["512 x 512 x 200 CT"] = isolated(ours, f"{folder}/large.nii.gz", folder, threads)
    for size, chain in found.items():
        same = chain["voxels"] == peer["voxels"]
        per_voxel = chain["ms"] / chain["voxels"] * peer["voxels"] / peer["ms"]
        parts = ", ".join(f"{part} {took:.1f} s" for part, took in chain["parts"].items())
        whole = "of the same scan" if same else "of the SMALLER scan; the ratio is that of the times per voxel"
        rows.append(
            {
                "what": f"both stages on a {size}, region of {chain['region']:.1e} voxels",
                "peer": f"nnU-Net 2D, {whole}",
                "ours_ms": chain["ms"],
                "peer_ms": peer["ms"],
                "ratio": per_voxel,
                "ours_mb": chain["peak_mb"],
                "peer_mb": peer["peak_mb"],
                "note": parts,
            }
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(whole_chain(1, quick=True), indent=2))
