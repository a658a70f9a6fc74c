"""Where a training computes: its processes, its device, and the batches cut ahead of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

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
        ValueError: if a launcher started several processes that do not see each other, or the device cannot do what
            is asked of it.
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
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # acts on Linux only
    able = [name for name in AUTOCAST if name != "fp16" or accelerator.device.type != "cpu"]
    if precision not in able:
        where = accelerator.device.type
        raise ValueError(f"precision {precision!r} cannot be on a {where}; choose {' or '.join(able)}")
    if compile:
        _try_to_compile(accelerator.device)
    return accelerator


def _try_to_compile(device: torch.device) -> None:
    """ValueError if torch.compile fails on the smallest of functions; later it would fail at great length."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as error:
        raise ValueError(
            f"compile does not work here ({' '.join(str(error).splitlines()[:2])}); on a CPU it needs a C++ compiler "
            "(its name may be given in the environment variable CXX) and a Python environment whose path has no "
            "blank, quote or backslash; or set compile to False"
        ) from error


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
    source: PatchSource, steps: range, workers: int, accelerator: Accelerator, layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batch for each of these steps, on its device; to be closed at the end.

    `workers` processes cut them ahead, unless the source lies on the device.
    """
    device, processes, own = accelerator.device, accelerator.num_processes, accelerator.process_index
    numbers = range(steps.start * processes + own, steps.stop * processes, processes)
    cut_here = source.device.type == "cpu"
    workers, pin = workers if cut_here else 0, cut_here and device.type == "cuda"  # a GPU fetches what is pinned
    cut = map(source.batch, numbers)
    if workers:
        # A batch follows from its number alone, so the workers need no seeds; they are not to come from torch's own
        # generator. "Collating" a number is cutting its batch.
        options = {"batch_size": None, "collate_fn": source.batch, "generator": torch.Generator()}
        cut = iter(DataLoader(numbers, num_workers=workers, pin_memory=pin, **options))
    try:
        for batch in cut:
            images, labels = (tensor.pin_memory() for tensor in batch) if pin else batch
            images = images.to(device, memory_format=layout, non_blocking=True)
            yield images, labels.to(device, non_blocking=True)
    finally:
        if workers:  # at once: a notebook keeps an error's traceback, and with it the loader and its processes
            cut._shutdown_workers()
