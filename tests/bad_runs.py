"""The corpus of runs, regions and prepared cohorts with pieces missing, broken, or of something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from spoiling import AGAIN, Bad, Call

from mupkg.configurations import build, configuration
from mupkg.data.cohort import Cohort
from mupkg.data.patches import PatchSource
from mupkg.report.results import case_metrics, finished_runs
from mupkg.stages.inference import LOCALIZER, Pipeline
from mupkg.stages.regions import Regions
from mupkg.stages.runs import load_tensors, save_tensors
from mupkg.stages.training import BEST, CHECKPOINT, train

# Runs with pieces missing, broken, or of something else


def bad_run(id: str, spoil: Callable[[Path], Call], named: str, cure: str) -> Bad:
    """A study of one trained run and its stage 1, laid out as always; `spoil(study)` gives back the call."""

    def make(folder: Path) -> Call:
        return spoil(folder / "study")

    return Bad(id, make, named, cure)


def on_loading(spoil: Callable[[Path], object], name: str = BEST) -> Callable[[Path], Call]:
    """The file of a run spoiled; then the run is loaded for a new scan."""

    def spoiled(study: Path) -> Call:
        spoil(study / "run-seed0" / name)
        return lambda: Pipeline.load(study / "run-seed0")

    return spoiled


def on_resuming(spoil: Callable[[Path], object], *, name: str = "MetricUNet-HCP", filters: int = 2, **other):
    """A file of a run spoiled, or another network or other settings; then the training goes on."""

    def spoiled(study: Path) -> Call:
        run = study / "run-seed0"
        spoil(run)
        metadata = {"configuration": "MetricUNet-HCP", "base_filters": 2, "embedding_dim": 4} | other
        network, loss = build(configuration(name), base_filters=filters, embedding_dim=4)
        volume = np.zeros((3, 16, 16), np.uint8)
        source = PatchSource([volume], [volume], patch_size=(16, 16), batch_size=1)
        options = {"steps": 12, "validate_every": 6, "validate": lambda net: 0.0, "metadata": metadata}
        return lambda: train(network, loss, source, run, **options)

    return spoiled


def changed(**other) -> Callable[[Path], None]:
    """The file's metadata changed."""

    def spoil(path: Path) -> None:
        tensors, metadata = load_tensors(path)
        save_tensors(tensors, path, metadata | other)

    return spoil


def foreign(metadata: dict[str, str] | None) -> Callable[[Path], None]:
    return lambda path: save_file({"layer.weight": torch.zeros(3)}, path, metadata)


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def nothing(path: Path) -> None:
    pass


def on_regions(spoil: Callable[[Path], object], name: str) -> Callable[[Path], Call]:
    """A file of stage 1 spoiled; then notebook 03 reads what it needs of it."""

    def spoiled(study: Path) -> Call:
        (path,) = (study / "stage1").glob(name)
        spoil(path)

        def read() -> None:
            regions = Regions.read(study / "stage1")
            assert [regions.volumes(split) for split in ("train", "validation", "test")]

        return read

    return spoiled


def on_evaluating(spoil: Callable[[Path], object]) -> Callable[[Path], Call]:
    """A study of two tested runs spoiled; then notebook 04 gathers their numbers."""

    def spoiled(study: Path) -> Call:
        for name in ("run-seed0", "other-seed0"):
            (study / name).mkdir(exist_ok=True)
            pd.DataFrame({"case_id": ["a", "b"], "DSC": [0.5, 0.6]}).to_csv(study / name / "metrics.csv", index=False)
            (study / name / "run.json").write_text(json.dumps({"data_fingerprint": "1234"}))
        spoil(study)
        return lambda: case_metrics(finished_runs(study))

    return spoiled


def on_prepared(spoil: Callable[[Path], object], name: str) -> Callable[[Path], Call]:
    """A file of the prepared cohort spoiled; then stage 1 reads it."""

    def spoiled(study: Path) -> Call:
        folder = study.parent / "phantoms"
        (path,) = folder.glob(name)
        spoil(path)
        cohort = Cohort.read(folder)
        return lambda: [cohort.preparation, cohort.prepared("phantom-0000")]

    return spoiled


def write(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


TRAIN, COPY, NOTEBOOK_2 = "train", "copy", "run notebook 02"
RUNS = [
    bad_run("no weights", on_loading(Path.unlink), BEST, TRAIN),
    bad_run("no localizer", on_loading(Path.unlink, LOCALIZER), LOCALIZER, TRAIN),
    bad_run("weights cut short", on_loading(shorter), BEST, COPY),
    bad_run("localizer cut short", on_loading(shorter, LOCALIZER), LOCALIZER, COPY),
    bad_run("empty weights", on_loading(write("")), BEST, COPY),
    bad_run("a pickle for weights", on_loading(lambda p: torch.save({"w": torch.zeros(3)}, p)), BEST, COPY),
    bad_run("safetensors of another program", on_loading(foreign(None)), BEST, TRAIN),
    bad_run("safetensors with its own metadata", on_loading(foreign({"format": "pt"})), BEST, TRAIN),
    bad_run("metadata that is no JSON", on_loading(foreign({"mupkg": "{"})), BEST, TRAIN),
    bad_run("metadata that is a list", on_loading(foreign({"mupkg": "[1]"})), BEST, TRAIN),
    bad_run("weights of the other stage", on_loading(lambda p: shutil.copy(p.parent / LOCALIZER, p)), BEST, COPY),
    bad_run("weights of another backbone", on_loading(changed(configuration="UNet++")), BEST, COPY),
    bad_run("weights of another width", on_loading(changed(base_filters=3)), BEST, COPY),
    bad_run("a network of 10^9 channels", on_loading(changed(base_filters=10**9)), BEST, COPY),
    bad_run("a network of half a channel", on_loading(changed(embedding_dim=0.5)), BEST, COPY),
    bad_run("a localizer of 10^9 channels", on_loading(changed(filters=10**9), LOCALIZER), LOCALIZER, COPY),
    bad_run("an unknown preparation", on_loading(changed(preparation={"a": 1}), LOCALIZER), LOCALIZER, COPY),
    bad_run("checkpoint of another network", on_resuming(nothing, name="UNet++"), CHECKPOINT, TRAIN),
    bad_run("checkpoint of another width", on_resuming(nothing, filters=3), CHECKPOINT, TRAIN),
    bad_run("checkpoint of other settings", on_resuming(nothing, seed=1), CHECKPOINT, "give this run another name"),
    bad_run("checkpoint cut short", on_resuming(lambda run: shorter(run / CHECKPOINT)), CHECKPOINT, TRAIN),
    bad_run(
        "a pickle for a checkpoint",
        on_resuming(lambda run: torch.save({"w": torch.zeros(3)}, run / CHECKPOINT)),
        CHECKPOINT,
        TRAIN,
    ),
    bad_run("checkpoint without weights", on_resuming(lambda run: (run / BEST).unlink()), BEST, "delete"),
    bad_run("no regions", on_regions(Path.unlink, "regions.csv"), "regions.csv", NOTEBOOK_2),
    bad_run("empty regions", on_regions(write(""), "regions.csv"), "regions.csv", NOTEBOOK_2),
    bad_run("regions without centres", on_regions(write("case_id,split\n"), "regions.csv"), "centre_x", NOTEBOOK_2),
    bad_run("a region missing", on_regions(Path.unlink, "*/*0_image.npy"), "_image.npy", NOTEBOOK_2),
    bad_run("a region cut short", on_regions(shorter, "*/*0_label.npy"), "_label.npy", NOTEBOOK_2),
    bad_run(
        "a pickle for a region",
        on_regions(lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "*/*0_image.npy"),
        "_image.npy",
        NOTEBOOK_2,
    ),
    bad_run(
        "regions without their geometry",
        on_regions(write("case_id,split,centre_x,centre_y,centre_z\n"), "regions.csv"),
        "origin, spacing, direction",
        NOTEBOOK_2,
    ),
    bad_run(
        "empty metrics",
        on_evaluating(lambda study: (study / "run-seed0" / "metrics.csv").write_text("")),
        "run-seed0",
        "notebook 03",
    ),
    bad_run(
        "a case measured twice",
        on_evaluating(lambda study: (study / "run-seed0" / "metrics.csv").write_text("case_id,DSC\na,1\na,1\n")),
        "run-seed0",
        "notebook 03",
    ),
    bad_run(
        "a run's record cut short",
        on_evaluating(lambda study: shorter(study / "run-seed0" / "run.json")),
        "run.json",
        "run its notebook again",
    ),
    bad_run(
        "a run renamed",
        on_evaluating(lambda study: (study / "run-seed0").rename(study / "run-seed0 copy")),
        "run-seed0 copy",
        "rename",
    ),
    bad_run("no finished run", lambda study: lambda: finished_runs(study), "study", "train it with notebook 03"),
    bad_run("no preparation", on_prepared(Path.unlink, "preparation.json"), "preparation.json", "run notebook 00"),
    bad_run(
        "a broken preparation", on_prepared(write("{}}"), "preparation.json"), "preparation.json", "run notebook"
    ),
    bad_run(
        "a prepared scan missing", on_prepared(Path.unlink, "*/*0_image.mha"), "0_image.mha", "run notebook 00 again"
    ),
    bad_run("a prepared label missing", on_prepared(Path.unlink, "*/*0_label.mha"), "0_label.mha", "run notebook 00"),
    bad_run("a prepared label cut", on_prepared(shorter, "*/*0_label.mha"), "0_label.mha", AGAIN),
]
