"""How the suite's own work grows, beside networks: a cohort of 10 000, a long training resumed, 500 jobs on SLURM."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from growth import kept, write_table
from measuring import isolated, memory_mb, seconds

from mupkg.configurations import build, configuration
from mupkg.data.cohort import Cohort
from mupkg.data.patches import PatchSource
from mupkg.stages.runs import load_tensors, save_tensors
from mupkg.stages.training import CHECKPOINT, train

ROOT = Path(__file__).parents[2]
PREPARED_BYTES = 4096  # of a volume: the fingerprint's own cost a file, not the disk's


def cohort(folder: str, cases: int) -> dict:
    """Reading a cohort's table, and the fingerprint of its prepared volumes."""
    root = Path(folder)
    (root / "prepared").mkdir()
    for number, i in enumerate(write_table(root, cases)):
        for kind in ("image", "label"):
            (root / f"prepared/{i}_{kind}.mha").write_bytes(number.to_bytes(4) * (PREPARED_BYTES // 4))
    idle, found = memory_mb("VmRSS"), []
    reading = seconds(lambda: found.append(Cohort.read(folder)))
    return {"read the cohort's table": reading, "fingerprint": seconds(found[0].fingerprint), "idle_mb": idle}


def resuming(folder: str, rows: int) -> dict:
    """From a checkpoint with a history of so many rows to the end of the training, one step later."""
    torch.set_num_threads(1)
    images = [np.random.default_rng(0).integers(0, 255, (8, 32, 32), dtype=np.uint8)]
    source = PatchSource(images, [images[0] // 200], patch_size=(16, 16), batch_size=2)

    def go_on(steps: int) -> None:
        network, loss = build(configuration("MetricUNet-HCP"), base_filters=4, embedding_dim=8)
        train(network, loss, source, folder, steps=steps, validate=lambda n: 0.5, validate_every=1, metadata={})

    idle = memory_mb("VmRSS")
    go_on(1)  # and its one row stands for all the others
    tensors, metadata = load_tensors(Path(folder) / CHECKPOINT)
    metadata["history"] = [metadata["history"][0] | {"step": step} for step in range(1, rows + 1)]
    save_tensors(tensors, Path(folder) / CHECKPOINT, metadata)
    return {"resume a training": seconds(lambda: go_on(rows + 1)), "idle_mb": idle}


def slurm(folder: str, jobs: int) -> dict:
    """Snakemake's plan of a study of so many trainings under the SLURM profile."""
    study = Path(folder) / "study.yaml"
    told = f"configurations: [UNet]\nseeds: {list(range(jobs))}\ndata_folder: {folder}/data"
    study.write_text(f"study: many\ncohort: c\nsize: smoke\n{told}\noutputs_folder: {folder}/outputs\n")
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", "notebooks/studies/profiles/slurm"]
    command += ["--configfile", str(study), "--nolock", "--executor", "dryrun"]
    done: list = []
    took = seconds(lambda: done.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True)))
    told = done[0].stdout + done[0].stderr
    if told.count("rule stage2:") != jobs:
        raise RuntimeError(f"{jobs} trainings were not planned: {told[-500:]}")
    return {"dry run for SLURM": took}


def at_scale(repeats: int, quick: bool = False) -> list[dict]:
    """A row a series with its exponents, of the fastest of three runs; the table goes to at_scale.csv and .png."""
    work = {
        (cohort, "cases of the cohort"): (100, 1000, 10_000),
        (resuming, "rows of the history"): (100, 1000, 10_000),
        (slurm, "trainings of the study"): (100, 250, 500),
    }
    rows = []
    for (call, grows), sizes in work.items():
        for size in (3, 6) if quick else sizes:
            runs = []
            for _ in range(1 if quick else 3):
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(isolated(call, folder, size))
            added = max(
                run.pop("peak_mb") - run.pop("idle_mb", np.nan) for run in runs
            )  # NaN: Snakemake's is not seen
            for series in runs[0]:
                fastest = 1e3 * min(run[series] for run in runs)
                rows.append({"series": series, "grows": grows, "size": size, "ms": fastest, "mb": added})
    return kept(pd.DataFrame(rows), None if quick else "at_scale")
