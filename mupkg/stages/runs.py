"""A run's folder: everything needed to trust, repeat and use a training, also alone on another machine."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mupkg.models import MULTIPLE
from mupkg.scans.writing import FINGERPRINT, whole_file, write_text

# Files and folders of a run, in either stage
BEST, LAST, CHECKPOINT = "weights.safetensors", "last.safetensors", "checkpoint.safetensors"
HISTORY, RUN, METRICS_CSV, REGIONS, CARD = "history.csv", "run.json", "metrics.csv", "regions.csv", "card.md"
FILM, PREDICTIONS = "film", "predictions"
NnunetRun = Literal["nnUNet", "nnUNet-HCP"]  # runs of nnU-Net (notebook 11): metrics, but no weights of ours
NNUNET_RUNS = get_args(NnunetRun)
Shift = Literal["noise", "contrast", "thick"]  # test scans made harder, see mupkg.stages.shifts


PLATEAU_DSC = 0.75  # a training with a better validation has left the plateau
STAGE1 = "stage1"  # the folder of a study's first stage


def run_name(arm: str, seed: int) -> str:
    """The folder of a run in its study: of an arm, that is a configuration or what a trial calls it, and a seed."""
    return f"{arm}-seed{seed}"


def parse_run_name(folder: Path) -> tuple[str, int]:
    """Arm and seed of a run's folder; ValueError if it is not named like one."""
    if not (match := re.fullmatch(r"(.+)-seed(\d+)", folder.name, re.ASCII)):
        raise ValueError(f"{folder}: is not named <configuration>-seed<number>; rename or move it")
    return match[1], int(match[2])


def metrics_name(shift: Shift | None = None) -> str:
    """The file with a run's metrics on the test scans, or on the same scans shifted."""
    return METRICS_CSV if shift is None else f"metrics_{shift}.csv"


METRICS_LAST = "metrics_last.csv"  # of the last weights
SHIFT_FILES = tuple(map(metrics_name, get_args(Shift)))
RUN_FILES = (BEST, LAST, HISTORY, RUN, REGIONS, CARD, FINGERPRINT, FILM, PREDICTIONS)  # of a run
RUN_FILES += (METRICS_CSV, METRICS_LAST, *SHIFT_FILES)

MOST_CHANNELS = 4096  # of any layer; a file that says more would take all memory before its weights are looked at
MAX_CHANNELS = {"base_filters": MOST_CHANNELS // MULTIPLE, "embedding_dim": MOST_CHANNELS, "filters": MOST_CHANNELS}
OWN_FILE = "copy this run's own file there, see to its permissions, or train the run again (notebooks 02 and 03)"
PACKAGES = ("mupkg", "torch", "SimpleITK", "numpy", "monai", "accelerate")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able metadata as one safetensors file, whole."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(flat, temporary, metadata={"mupkg": json.dumps(metadata)})
        except SafetensorError as error:
            raise OSError(str(error)) from error  # as other writers say it


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file that `save_tensors` wrote.

    Raises:
        ValueError: naming the file, if it is not there, may not be read, is cut short, or is not such a file (a
            pickle, say).
    """
    try:
        with Path(path).open("rb"):  # safetensors would say that a file it may not read is not there
            pass
        with safe_open(path, framework="pt") as file:
            metadata = dict(json.loads((file.metadata() or {})["mupkg"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read as a file of this suite ({error!r}); {OWN_FILE}") from error
    return tensors, metadata


def require(metadata: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """ValueError naming the file if its metadata lacks something (it is of the other stage, say), or cannot be."""
    faults = [f"lacks {name}" for name in names if name not in metadata]
    for name, most in MAX_CHANNELS.items():
        if name in metadata and not (isinstance(metadata[name], int) and 0 < metadata[name] <= most):
            faults.append(f"says {name} {metadata[name]!r}")
    if faults:
        raise ValueError(f"{path}: holds weights of another network (it {', '.join(faults)}); {OWN_FILE}")


def load_weights(network: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a network; ValueError naming the file if they belong to another one or are not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():  # every mask would be empty, without a word
            raise ValueError(f"{path}: its {name} is not finite (NaN or infinity); {OWN_FILE}")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])  # it lists every layer
        raise ValueError(f"{path}: holds weights of another network ({reason}); {OWN_FILE}") from error


def processor_name() -> str:
    """The processor as Linux names it, else what Python knows of it: rounding depends on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Versions, commit, device and thread count of this process, and the time."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:
        commit = ""
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,  # an installed package outside its repository has none
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def read_run(path: str | Path, *needed: str, cure: str = "run its notebook again") -> dict[str, Any]:
    """What a run.json tells, `parameters` and more.

    Args:
        cure: what to do where it cannot be read; a run's notebook is 02 (stage 1), 03, or 11 (nnU-Net).

    Raises:
        ValueError: naming the file if it is missing, broken, no record, or does not tell what is needed.
    """
    try:
        record = dict(json.loads(Path(path).read_bytes()))
        values = {name: record[name] for name in needed}
        return record | values | {"parameters": dict(record.get("parameters", {}))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: does not tell how the run was made ({error!r}); {cure}") from error


def write_run(folder: Path, parameters: Mapping[str, Any], **measured: Any) -> dict[str, Any]:
    """Write run.json: the parameters, what was measured (data fingerprint, timings), and the provenance."""
    content = {"parameters": dict(parameters), **measured, **provenance()}
    write_json(folder / RUN, content)
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")
