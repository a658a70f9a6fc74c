"""Training: SGD with poly decay, validation DSC, best and last weights, checkpoint and resume (Section IV-B).

Under Accelerate's launchers each process has its own batches, batch norm and draws, and gradients are averaged. The
first process validates and writes; history.csv is about its batches.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from filelock import Timeout
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from mupkg import progress
from mupkg.data.patches import PatchSource
from mupkg.losses import SegmentationMetricLoss
from mupkg.models import SegmentationOutput, layout_of
from mupkg.scans.writing import machine_lock, save_table
from mupkg.stages.hardware import AUTOCAST, batches, join_processes, machine_name, on_gpu_if_it_fits
from mupkg.stages.runs import (
    BEST,
    CHECKPOINT,
    HISTORY,
    LAST,
    PLATEAU_DSC,
    RUN_FILES,
    load_tensors,
    load_weights,
    save_tensors,
)

LOGS_PER_VALIDATION = 10


def poly_learning_rate(initial: float, step: int, steps: int, power: float = 0.9) -> float:
    """The learning rate of step number `step` (from 0) of `steps`: initial * (1 - step / steps) ** power (R8)."""
    return initial * (1 - step / steps) ** power


def never_left_plateau(history: pd.DataFrame) -> bool:
    """Whether no validation DSC is above `PLATEAU_DSC`; METHOD.md, "The plateau", says what such a run is worth.

    Args:
        history: what `train` returns, or a run's history.csv.
    """
    return bool(history["validation_dsc"].max() <= PLATEAU_DSC)


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
    on_step: Callable[[nn.Module, int], None] | None = None,
) -> pd.DataFrame:
    """Train, or go on from the checkpoint in the folder; returns the history, a row every few steps.

    The folder then holds the weights with the best validation DSC (used at test, reading R15), the last weights,
    the checkpoint and history.csv; a fresh training first removes what an earlier one left. On a CPU with the same
    number of threads, a training that was interrupted ends with the same bits as one that was not.

    Args:
        network: trained in place, on a GPU if there is one; it maps images to a `SegmentationOutput`.
        validate: returns the mean DSC of a network on the validation cases; gets the plain network, in float32.
        metadata: what made these weights; stored with them. A checkpoint with other metadata is not resumed.
        seed: of the samplers' draws.
        precision: "no" (float32), "bf16" or "fp16" (autocast; fp16 on a GPU only), of the training steps alone.
        channels_last, compile: memory layout, torch.compile: speed, rounding, and so now and then a hard draw.
        workers: processes that cut batches ahead, if the cohort does not fit into a GPU's memory; same batches.
        choose_from: the share of the steps after which the best weights are looked for; METHOD.md says why.
        on_validation: called by the first process with network and step, before the first step of a fresh run and
            after each validation: to keep a film, say. on_step: likewise after every step.

    Raises:
        ValueError: a checkpoint of other settings, a folder in use, a bad number, or what this machine cannot do.
        FloatingPointError: if the loss or the validation DSC is no longer finite.
    """
    _check(steps, validate_every, choose_from)
    accelerator = join_processes(precision, compile)
    layout = layout_of(network) if channels_last else torch.contiguous_format
    network = network.to(accelerator.device, memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), learning_rate, momentum=momentum, weight_decay=weight_decay)
    rates = [poly_learning_rate(learning_rate, step, steps, power) for step in range(steps)]
    with _exclusive(Path(folder)) if accelerator.is_main_process else nullcontext():
        run = _Run(Path(folder), accelerator, network, optimizer, precision, dict(metadata), choose_from * steps)
        run.begin(steps)
        source = on_gpu_if_it_fits(source, accelerator)
        model = DistributedDataParallel(network) if accelerator.num_processes > 1 else network
        model = torch.compile(model) if compile else model
        with closing(batches(source, range(run.done, steps), workers, accelerator, layout)) as feed:
            _loop(run, model, loss, feed, rates, seed, validate, validate_every, on_validation, on_step)
        return run.finish()


def _check(steps: int, validate_every: int, choose_from: float) -> None:
    if min(steps, validate_every) < 1 or not 0 <= choose_from <= 1:
        bad = f"not {steps}, {validate_every} and {choose_from}"
        raise ValueError(f"steps and validate_every must be at least 1, choose_from a share of the steps, {bad}")


def _forward(model: nn.Module, images: Tensor, precision: str) -> SegmentationOutput:
    """The output in float32, whatever precision the network computes it in."""
    with torch.autocast(images.device.type, AUTOCAST[precision], enabled=precision != "no"):
        output = model(images)
    return SegmentationOutput(*(tensor.float() for tensor in output))


def _loop(
    run: _Run,
    model: nn.Module,
    loss: SegmentationMetricLoss,
    feed: Iterable[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    seed: int,
    validate: Callable[[nn.Module], float],
    validate_every: int,
    on_validation: Callable[[nn.Module, int], None] | None,
    on_step: Callable[[nn.Module, int], None] | None,
) -> None:
    """The steps that are left, one for each batch; `model` computes with the weights of `run.network`."""
    network, optimizer, scaler, steps = run.network, run.optimizer, run.scaler, len(rates)
    process, main = run.accelerator.process_index, run.accelerator.is_main_process
    log_every = max(1, validate_every // LOGS_PER_VALIDATION)
    if on_validation and main and not run.history:
        on_validation(network, 0)
    shown = {"initial": run.done, "total": steps, "desc": "training", "unit": "step", "disable": not main}
    bar = progress(range(run.done, steps), **shown)
    generator, window, began = torch.Generator(run.accelerator.device), [], time.perf_counter()
    for step, (images, labels) in zip(bar, feed, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        # A seed for every step and process: draws differ between processes, and a resumed run repeats them.
        generator.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0]))
        model.train()
        terms = loss(_forward(model, images, run.precision), labels, generator)
        optimizer.zero_grad()
        scaler.scale(terms.total).backward()  # the scaler is for fp16; otherwise it changes nothing
        scaler.step(optimizer)
        scaler.update()

        # Values stay on the device until a row is written, so that a GPU need not wait for the CPU.
        values = {"loss": terms.total, "cross_entropy": terms.cross_entropy}
        values |= {f"metric_{letter}": value for letter, value in terms.metric.items()}
        active_shares = getattr(loss, "active_shares", {})  # a loss of somebody's own may have none
        values |= {f"active_{letter}": share for letter, share in active_shares.items()}
        window.append({name: value.detach() for name, value in values.items()})
        done = step + 1
        if on_step and main:
            on_step(network, done)
        validating = done % validate_every == 0 or done == steps
        if not validating and done % log_every:
            continue
        row = {"step": done, "learning_rate": rates[step]}
        row |= {name: float(sum(step_values[name] for step_values in window)) / len(window) for name in window[0]}
        row["seconds"] = round((time.perf_counter() - began) / len(window), 5)  # per step
        run.history.append(row)
        run.check_finite("loss")
        if validating and main:
            row["validation_dsc"] = validate(network)
            run.check_finite("validation_dsc")
            bar.set_postfix(ce=f"{row['cross_entropy']:.3f}", dsc=f"{row['validation_dsc']:.3f}", refresh=False)
            if on_validation:
                on_validation(network, done)
            run.keep_if_best()
            run.checkpoint()
        window, began = [], time.perf_counter()


@dataclass
class _Run:
    """A training as its checkpoint keeps it, and the folder where it is kept."""

    folder: Path
    accelerator: Accelerator
    network: nn.Module
    optimizer: torch.optim.SGD
    precision: str
    metadata: dict[str, Any]
    choose_from: float  # the step
    history: list[dict[str, float]] = field(default_factory=list)

    @cached_property
    def scaler(self) -> GradScaler:
        return GradScaler(self.accelerator.device.type, enabled=self.precision == "fp16")

    @property
    def done(self) -> int:
        """The number of steps done."""
        return self.history[-1]["step"] if self.history else 0

    @property
    def scores(self) -> list[float]:
        """The validation DSCs of all weights that may be the best."""
        validated = [row for row in self.history if "validation_dsc" in row]
        return [row["validation_dsc"] for row in validated if row["step"] >= self.choose_from]

    def begin(self, steps: int) -> None:
        """Go on from the checkpoint, or start afresh if there is none."""
        checkpoint, made_on = self.folder / CHECKPOINT, []
        self.metadata = json.loads(json.dumps(self.metadata))  # as it comes back from a file: lists for tuples
        if self.accelerator.num_processes > 1:  # another number of processes would take other batches
            self.metadata["processes"] = self.accelerator.num_processes
        if checkpoint.exists():
            made_on = self._resume(checkpoint)
        elif self.accelerator.is_main_process:  # else old results would be taken for this run's
            for path in (self.folder / name for name in RUN_FILES):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        machine = machine_name(self.accelerator.device)
        if self.done < steps and made_on[-1:] != [machine]:
            if made_on:
                self.accelerator.print(
                    f"this training was begun on {made_on[-1]} and continues on {machine}. These round differently, "
                    "so the weights will not be the same to the bit as without the interruption."
                )
            made_on.append(machine)
        self.metadata["made_on"] = made_on

    def _resume(self, path: Path) -> list[str]:
        """Put the checkpoint's state back; returns the machines that it was made on."""
        tensors, stored = load_tensors(path)
        self.history, made_on = (stored.pop(name, []) for name in ("history", "made_on"))
        scale = stored.pop("scaler", None)
        if not self.history or (self.scaler.is_enabled() and scale is None):
            raise ValueError(f"{path}: is no whole checkpoint (it lacks its history or loss scale); delete it")
        if stored != self.metadata:
            changed = sorted(k for k in {*stored, *self.metadata} if stored.get(k) != self.metadata.get(k))
            raise ValueError(
                f"{path}: belongs to a run with other settings ({', '.join(changed)}); "
                "give this run another name or study, or delete the folder to start anew"
            )
        if self.scores and not (self.folder / BEST).exists():
            raise ValueError(
                f"{self.folder / BEST}: is missing beside its checkpoint; delete {CHECKPOINT} to train anew"
            )
        self.scaler.load_state_dict(scale or {})
        weights, momentum = (
            {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in ("network.", "momentum.")
        )
        load_weights(self.network, weights, path)
        state = {int(number): {"momentum_buffer": tensor} for number, tensor in momentum.items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        return made_on

    def check_finite(self, name: str) -> None:
        """FloatingPointError if the last row's loss or validation DSC is not finite."""
        if not math.isfinite(value := self.history[-1][name]):
            fault = f"the {name} is {value} at step {self.done}"
            raise FloatingPointError(f"{self.folder}: {fault}; lower the learning rate, or see to `validate`")

    def keep_if_best(self) -> None:
        """Keep these weights if no earlier validation DSC is as high."""
        dsc = self.history[-1]["validation_dsc"]
        if self.done >= self.choose_from and dsc > max(self.scores[:-1], default=-1.0):
            about = self.metadata | {"step": self.done, "validation_dsc": dsc}
            save_tensors(self.network.state_dict(), self.folder / BEST, about)

    def checkpoint(self) -> None:
        """Write everything that the next step depends on, as one whole file."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            if state.get("momentum_buffer") is not None:
                tensors[f"momentum.{number}"] = state["momentum_buffer"]
        scale = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        save_tensors(tensors, self.folder / CHECKPOINT, self.metadata | {"history": self.history} | scale)

    def finish(self) -> pd.DataFrame:
        """Write the last weights and the history; returns the history."""
        table = pd.DataFrame(self.history)
        if self.accelerator.is_main_process:
            save_tensors(self.network.state_dict(), self.folder / LAST, self.metadata | {"step": self.done})
            save_table(table, self.folder / HISTORY, index=False)
        self.accelerator.wait_for_everyone()
        return table


def _exclusive(folder: Path) -> AbstractContextManager:
    """A lock on the folder until the `with` ends; ValueError if another training on this machine holds it."""
    try:  # the workers of a training that was killed end within seconds
        return machine_lock(f"training in {folder.resolve()}", timeout_s=15).acquire()
    except Timeout:
        raise ValueError(
            f"{folder}: another process is training in it; wait for its end, or give this run another study or seed"
        ) from None
