"""Training: SGD with poly decay, validation DSC, best and last weights, checkpoint and resume (Section IV-C)."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from filelock import Timeout
from torch import Tensor, nn
from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torch.utils.data import DataLoader, Dataset

from mupkg import progress
from mupkg.data.patches import PatchSource
from mupkg.data.writing import machine_lock, whole_file
from mupkg.losses import SegmentationMetricLoss
from mupkg.stages.runs import load_tensors, load_weights, save_tensors

BEST, LAST, CHECKPOINT, HISTORY = "weights.safetensors", "last.safetensors", "checkpoint.safetensors", "history.csv"
RESULTS = (BEST, LAST, HISTORY, "run.json", "metrics.csv", "regions.csv", "fingerprint.json")  # of either stage
LOGS_PER_VALIDATION = 10
MOST_OF_GPU = 0.5  # of its free memory, for the cohort; network, gradients and activations need the rest


def poly_learning_rate(initial: float, step: int, steps: int, power: float = 0.9) -> float:
    """The learning rate of step number `step` (from 0) of `steps`: initial * (1 - step / steps) ** power (R8)."""
    return initial * (1 - step / steps) ** power


def collapsed(history: pd.DataFrame) -> bool:
    """Whether a training has collapsed: even its best weights have a validation DSC of 0.

    They find no prostate in any validation case, most often because the network calls every voxel background. Such
    a run says nothing about its configuration, and its metrics must not enter a mean unmarked.

    Args:
        history: what `train` returns, or a run's history.csv.
    """
    return bool(history["validation_dsc"].max() == 0)


def train(
    network: nn.Module,
    loss: SegmentationMetricLoss,
    source: PatchSource,
    folder: str | Path,
    *,
    steps: int,
    validate: Callable[[nn.Module], float],
    validate_every: int,
    metadata: Mapping[str, Any],
    seed: int = 0,
    learning_rate: float = 0.01,
    power: float = 0.9,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    precision: str = "no",
    channels_last: bool = True,
    compile: bool = False,
    workers: int = 0,
    choose_from: float = 0.0,
    on_validation: Callable[[nn.Module, int], None] | None = None,
) -> pd.DataFrame:
    """Train, or go on where a broken-off training in the same folder stopped; the history, a row every few steps.

    The folder then holds the weights of the best validation DSC (used at test, reading R15) and the last ones,
    the checkpoint, and history.csv. On a CPU the result is the same to the bit after a break, with the same number
    of threads. A training that begins anew removes what an earlier one left there, results that follow from its
    weights too. Weights and checkpoint name the machines and thread counts that made them, `made_on`.

    Under one of Accelerate's launchers every process takes batches of its own, normalises (batch norm) and draws
    by itself, and gradients are averaged; the first process validates and writes, history.csv tells of its batches.

    Args:
        validate: mean DSC of a network on the validation cases; called every `validate_every` steps.
        metadata: what made these weights; stored with them. A checkpoint with other metadata is not resumed.
        seed: of the samplers' draws. precision: "no" (float32), "bf16" or "fp16" (autocast; a GPU only).
        channels_last, compile: memory layout, and torch.compile of the training's forward and backward pass. They
            change speed, and rounding, by which a hard sampler may come to draw another voxel. What is validated
            and stored is never the compiled network.
        workers: processes that cut batches ahead where the cohort does not lie in a GPU's memory, as it does if it
            fits; the batches and their order stay the same.
        choose_from: the share of the steps before which no weights are kept as best. At a high learning rate, weights
            on the way may look good on few validation cases by luck (not in the paper).
        on_validation: called by the first process with network and step before the first step of a fresh run and
            after every validation, and again after a break: to keep a film, say.

    Raises:
        ValueError: if the folder holds the checkpoint of a run with other settings, or another process trains in it;
            for "fp16" without a GPU, compile without a C++ compiler on a CPU, and processes that do not see each
            other.
        FloatingPointError: if the loss or the validation DSC is no longer finite.
    """
    if not 0 <= choose_from <= 1:
        raise ValueError(f"choose_from must be a share of the steps, from 0 to 1, not {choose_from}")
    if steps < 1 or validate_every < 1:
        raise ValueError(f"steps and validate_every must be at least 1, not {steps} and {validate_every}")
    folder = Path(folder)
    metadata = json.loads(json.dumps(dict(metadata)))  # as it comes back from a file: lists for tuples
    _check_speed(precision, compile)  # before the precision is fixed for this process
    accelerator = Accelerator(mixed_precision=precision)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:  # each would train alone, and all would write the same files
        raise ValueError(
            f"one of {launched} processes sees {accelerator.num_processes}; without GPUs, set the environment "
            "variable ACCELERATE_USE_CPU to true before launching"
        )
    if accelerator.num_processes > 1:  # another number would go on with other batches
        metadata["processes"] = accelerator.num_processes
        # Torch asks for SIGINT when the launcher dies, and in a process forked from a notebook's kernel that hangs.
        _prctl_pr_set_pdeathsig(signal.SIGKILL)  # Linux only; elsewhere it does nothing
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(_alone(folder))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        network = network.to(accelerator.device, memory_format=layout)
        optimizer = torch.optim.SGD(network.parameters(), learning_rate, momentum=momentum, weight_decay=weight_decay)
        generator = torch.Generator(accelerator.device)
        history, made_on = _resume(folder / CHECKPOINT, network, optimizer, metadata, accelerator.scaler)
        first = history[-1]["step"] if history else 0
        metadata["made_on"] = _with_this_machine(made_on, accelerator) if first < steps else made_on
        if accelerator.is_main_process and not history:
            _start_anew(folder)
        model, optimizer = accelerator.prepare(network, optimizer)
        if compile:
            model = torch.compile(model)  # a wrapper around the same weights; `network` keeps their plain names
        chosen = [r["validation_dsc"] for r in history if "validation_dsc" in r and r["step"] >= choose_from * steps]
        best = max(chosen, default=-1.0)
        if chosen and not (folder / BEST).exists():
            raise ValueError(f"{folder / BEST}: is missing beside its checkpoint; delete {CHECKPOINT} to train anew")
        log_every = max(1, validate_every // LOGS_PER_VALIDATION)
        source = _nearest(source, accelerator)
        window: dict[str, torch.Tensor | float] = {}
        counted, started = 0, time.perf_counter()

        shown = {"desc": "training", "unit": "step", "disable": not accelerator.is_main_process}
        bar = progress(range(first, steps), initial=first, total=steps, **shown)
        if on_validation and accelerator.is_main_process and not history:
            on_validation(network, 0)
        # Every process takes batches of its own.
        numbers = [step * accelerator.num_processes + accelerator.process_index for step in range(first, steps)]
        batches = stack.enter_context(closing(_batches(source, numbers, workers)))
        for step, (images, labels) in zip(bar, batches, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = poly_learning_rate(learning_rate, step, steps, power)
            images = images.to(accelerator.device, memory_format=layout, non_blocking=True)
            labels = labels.to(accelerator.device, non_blocking=True)
            model.train()
            # A seed for every step and process: draws differ between processes, and a resumed run repeats them.
            mixed = np.random.SeedSequence([seed, step, accelerator.process_index]).generate_state(1)
            generator.manual_seed(int(mixed[0]))
            terms = loss(model(images), labels, generator)
            optimizer.zero_grad()
            accelerator.backward(terms.total)
            optimizer.step()

            # Sums stay on the device between log rows, so that a GPU need not wait for us.
            values = {"loss": terms.total, "cross_entropy": terms.cross_entropy}
            values |= {f"metric_{letter}": value for letter, value in terms.metric.items()}
            for name, value in values.items():
                window[name] = window.get(name, 0.0) + value.detach()
            counted += 1

            done = step + 1
            validating = done % validate_every == 0 or done == steps
            if not validating and done % log_every:
                continue
            row = {"step": done, "learning_rate": group["lr"]}
            row |= {name: float(value) / counted for name, value in window.items()}
            row["seconds"] = round((time.perf_counter() - started) / counted, 5)  # per step
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"{folder}: the loss is {row['loss']} at step {done}; lower the learning rate"
                )
            history.append(row)
            if validating and accelerator.is_main_process:
                dsc = row["validation_dsc"] = validate(network)
                if not math.isfinite(dsc):
                    raise FloatingPointError(f"{folder}: the validation DSC is {dsc} at step {done}; see `validate`")
                bar.set_postfix(ce=f"{row['cross_entropy']:.3f}", dsc=f"{dsc:.3f}", refresh=False)
                if dsc > best and done >= choose_from * steps:
                    best, about = dsc, {**metadata, "step": done, "validation_dsc": dsc}
                    save_tensors(network.state_dict(), folder / BEST, about)
                if on_validation:
                    on_validation(network, done)
                about = {**metadata, "history": history}
                if accelerator.scaler is not None:  # of fp16: numbers that follow from all steps so far
                    about["scaler"] = accelerator.scaler.state_dict()
                _checkpoint(folder / CHECKPOINT, network, optimizer, about)
            window, counted, started = {}, 0, time.perf_counter()

        table = pd.DataFrame(history)
        if accelerator.is_main_process:
            save_tensors(network.state_dict(), folder / LAST, {**metadata, "step": steps})
            with whole_file(folder / HISTORY) as temporary:
                table.to_csv(temporary, index=False)
        accelerator.wait_for_everyone()
        return table


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder for this training alone."""
    lock = machine_lock(f"training in {folder.resolve()}", timeout_s=15)  # a killed one's workers end in seconds
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder}: another process is training in it; wait for its end, or give this run another study or seed"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _start_anew(folder: Path) -> None:
    """Remove what follows from the weights of an earlier training, else it would be taken for this one's."""
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    for name in ("film", "predictions"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def _with_this_machine(made_on: list[str], accelerator: Accelerator) -> list[str]:
    """The machines a training has run on so far and this one; says so if it is another one, as rounding differs."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    this = f"{name}, {torch.get_num_threads()} thread(s)"
    if made_on and made_on[-1] != this:
        accelerator.print(f"goes on on {this}, begun on {made_on[-1]}: not to the bits of an undisturbed training")
    return made_on if made_on[-1:] == [this] else [*made_on, this]


def _check_speed(precision: str, compile: bool) -> None:
    """What this machine cannot do is refused: Accelerate would pass fp16 over, and inductor fail at great length."""
    if torch.accelerator.is_available():
        return
    if precision == "fp16":
        raise ValueError('precision "fp16" needs a GPU, and there is none; choose "bf16" or "no"')
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if compile and not shutil.which(compiler):
        raise ValueError(
            f"compile needs a C++ compiler on a CPU, and there is no {compiler}; install one (its name may be given "
            "in the environment variable CXX), or set compile to False"
        )


class _Numbered(Dataset):
    """A source as a map from a batch's number to the batch."""

    def __init__(self, source: PatchSource):
        self.source = source

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.source.batch(number)


def _nearest(source: PatchSource, accelerator: Accelerator) -> PatchSource:
    """The source with its volumes in the GPU's memory if they fit, else as it is; says which."""
    if accelerator.device.type != "cuda":
        return source
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    fits = source.nbytes <= MOST_OF_GPU * free
    where = "lies in GPU memory" if fits else "is too large for GPU memory; patches are cut on the CPU, see `workers`"
    accelerator.print(f"the cohort ({source.nbytes / 1e9:.2f} GB) {where}")
    return source.to(accelerator.device) if fits else source


def _batches(source: PatchSource, numbers: Sequence[int], workers: int) -> Iterator[Sequence[Tensor]]:
    """The batches of these numbers in their order, cut here or ahead by `workers` processes; close it at the end.

    They lie on the GPU or where it can fetch them while the CPU goes on.
    """
    pin = torch.cuda.is_available()
    if not workers or source.resident:
        for number in numbers:
            batch = source.batch(number)
            yield [tensor.pin_memory() for tensor in batch] if pin and not source.resident else batch
        return
    # A batch follows from its number alone, so the workers' own seeds do not matter; a generator for them keeps
    # torch's from being drawn from.
    loader = DataLoader(
        _Numbered(source),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=pin,
    )
    batches = iter(loader)
    try:
        yield from batches
    finally:  # at once: a notebook keeps the traceback of an error, and that the loader with its processes
        batches._shutdown_workers()


def _checkpoint(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, metadata: Mapping[str, Any]
) -> None:
    """Everything the next step depends on: weights and momentum, in one whole file."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{number}"] = state["momentum_buffer"]
    save_tensors(tensors, path, metadata)


def _resume(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    metadata: Mapping[str, Any],
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[list[dict[str, float]], list[str]]:
    """Put a checkpoint's state back, if there is one: the history so far and the machines it was made on."""
    if not path.exists():
        return [], []
    tensors, stored = load_tensors(path)
    history, scale, made_on = (stored.pop(name, None) for name in ("history", "scaler", "made_on"))
    if not history:
        raise ValueError(f"{path}: is no checkpoint (it has no history); delete it to train anew")
    if stored != metadata:
        changed = sorted(k for k in {*stored, *metadata} if stored.get(k) != metadata.get(k))
        raise ValueError(
            f"{path}: belongs to a run with other settings ({', '.join(changed)}); "
            "give this run another name or study, or delete the folder to start anew"
        )
    if scaler is not None:
        if scale is None:
            raise ValueError(f"{path}: does not tell the loss scale of its fp16 training; delete it to train anew")
        scaler.load_state_dict(scale)
    weights = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
    load_weights(network, weights, path)
    state = optimizer.state_dict()
    momentum = {int(n.removeprefix("momentum.")): t for n, t in tensors.items() if n.startswith("momentum.")}
    state["state"] = {number: {"momentum_buffer": tensor} for number, tensor in momentum.items()}
    optimizer.load_state_dict(state)
    return history, made_on or []
