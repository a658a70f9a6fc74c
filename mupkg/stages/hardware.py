"""Where a training computes: its processes, its device, and the batches cut ahead of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from mupkg.data.patches import PatchSource
from mupkg.stages.runs import processor_name

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what each precision multiplies in
MOST_OF_GPU = 0.5  # of its free memory, for the cohort; network, gradients and activations need the rest


def join_processes(precision: str, compile: bool) -> Accelerator:
    """This process's device and its place among those of a launcher; from now on it ends when the launcher ends.

    Raises:
        ValueError: if a launcher started several processes that do not see each other, and as in `check_speed`.
    """
    accelerator = Accelerator()  # without a precision: it would hold for the whole kernel, and patch the network
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:  # each would train by itself, and all would write the same files
        raise ValueError(
            f"one of {launched} processes sees {accelerator.num_processes}; without GPUs, set the environment "
            "variable ACCELERATE_USE_CPU to true before launching"
        )
    if launched > 1:
        # Torch asks for SIGINT when the launcher dies, and a process forked from a notebook's kernel hangs on that.
        call_private(torch.multiprocessing, "_prctl_pr_set_pdeathsig", signal.SIGKILL)  # acts on Linux only
    check_speed(accelerator.device, precision, compile)
    return accelerator


def call_private(owner: Any, name: str, *arguments: Any) -> None:
    """Call a private function of PyTorch's; does nothing in a version that lacks it."""
    getattr(owner, name, lambda *_: None)(*arguments)


def check_speed(device: torch.device, precision: str, compile: bool) -> None:
    """ValueError for an unknown precision, and for what PyTorch would refuse late and at great length."""
    if precision not in AUTOCAST:
        raise ValueError(f'precision must be "no", "bf16" or "fp16", not {precision!r}')
    if precision == "fp16" and device.type == "cpu":
        raise ValueError('precision "fp16" needs a GPU, and there is none; choose "bf16" or "no"')
    if compile and device.type == "cpu":
        _check_compiler()


def _check_compiler() -> None:
    """ValueError if torch.compile could not build for this processor."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if not shutil.which(compiler):
        raise ValueError(
            f"compile needs a C++ compiler on a CPU, and there is no {compiler}; install one (its name may be given "
            "in the environment variable CXX), or set compile to False"
        )
    # PyTorch hands these folders to the linker unquoted, and splits its command as a shell does.
    for folder in (str(Path(torch.__file__).parent / "lib"), sysconfig.get_config_var("LIBDIR") or ""):
        if sys.platform != "win32" and re.search(r"[\s'\"\\]", folder):
            raise ValueError(
                f"compile cannot link on a CPU with {folder}, a folder whose path holds a blank, a quote or a "
                "backslash; move the Python environment to a path without, or set compile to False"
            )


def machine_name(device: torch.device) -> str:
    """The GPU or processor, and the number of threads: rounding depends on both."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def on_gpu_if_it_fits(source: PatchSource, accelerator: Accelerator) -> PatchSource:
    """The source with its volumes in the GPU's memory if they fit, else as it is; says which."""
    if accelerator.device.type != "cuda":
        return source
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    fits = source.nbytes <= MOST_OF_GPU * free
    where = "lies in GPU memory" if fits else "is too large for GPU memory; patches are cut on the CPU, see `workers`"
    accelerator.print(f"the cohort ({source.nbytes / 1e9:.2f} GB) {where}")
    return source.to(accelerator.device) if fits else source


def batches(
    source: PatchSource, numbers: range, workers: int, device: torch.device, layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches with these numbers, in their order, on the device; to be closed at the end.

    `workers` processes cut them ahead, unless the source lies on the device.
    """
    cut_here = source.device.type == "cpu"
    pin = device.type == "cuda" and cut_here  # then a GPU fetches them while the CPU goes on
    if workers and cut_here:
        # A batch follows from its number alone, so the workers need no seeds; they are not to come from torch's own
        # generator. "Collating" a number is cutting its batch.
        options = {"batch_size": None, "collate_fn": source.batch, "generator": torch.Generator()}
        cut = iter(DataLoader(numbers, num_workers=workers, pin_memory=pin, **options))
    else:
        cut = map(source.batch, numbers)
    try:
        for batch in cut:
            images, labels = (tensor.pin_memory() for tensor in batch) if pin else batch
            images = images.to(device, memory_format=layout, non_blocking=True)
            yield images, labels.to(device, non_blocking=True)
    finally:  # at once: a notebook keeps an error's traceback, and with it the loader and its processes
        call_private(cut, "_shutdown_workers")
