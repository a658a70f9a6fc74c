"""nnU-Net v2 (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z) on a study's regions, by its own commands.

It plans, trains and predicts; we write the regions as it wants them and measure its predictions as we measure ours.
With fewer epochs, a smaller batch or a narrower network than it plans, the outcome is "nnU-Net v2 2d, reduced".
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from mupkg import progress
from mupkg.data.cohort import SPLITS, Cohort
from mupkg.losses import SegmentationMetricLoss
from mupkg.models import SegmentationOutput
from mupkg.scans.files import write_image
from mupkg.scans.writing import FINGERPRINT, machine_lock, save_table, write_text
from mupkg.stages.evaluation import mask_and_row
from mupkg.stages.regions import Regions
from mupkg.stages.runs import (
    METRICS_CSV,
    NNUNET_RUNS,
    PREDICTIONS,
    RUN,
    parse_run_name,
    read_run,
    write_json,
    write_run,
)

VERSION = "2.6.0"  # a later one needs torchvision
TRAINERS = dict(zip(NNUNET_RUNS, ("nnUNetTrainerChosen", "nnUNetTrainerMetricHCP"), strict=True))  # by the run's name
DATASET, PLANS, REDUCED = "Dataset001_regions", "nnUNetPlans", "nnUNetPlansReduced"
EPOCHS, ITERATIONS, SEED = (f"MUPKG_NNUNET_{name}" for name in ("EPOCHS", "ITERATIONS", "SEED"))  # environment
MODEL, TEST = "nnunet", "test"  # nnU-Net's results in a run's folder, and its predictions in there
UNREADABLE = (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error)  # what NumPy says of a broken .npz
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# The branch, in nnU-Net's training


def embedding_layer(network: nn.Module) -> nn.Module:
    """The last decoder stage of nnU-Net's network, as many channels as its first stage has, on the image's own grid.

    Args:
        network: its PlainConvUNet or ResidualEncoderUNet, as it is, compiled, or wrapped for several GPUs.
    """
    for wrapper in ("module", "_orig_mod"):  # DistributedDataParallel's, torch.compile's
        network = getattr(network, wrapper, network)
    if not hasattr(network, "decoder"):
        raise ValueError(
            f"{type(network).__name__}: has no decoder; choose plans of PlainConvUNet or ResidualEncoderUNet"
        )
    return network.decoder.stages[-1]


class MetricBranch(nn.Module):
    """nnU-Net's loss + lambda * the metric losses (Eq. 4) of the embeddings that `layer` put out in this step.

    In validation it is nnU-Net's loss alone. The samplers draw by a generator of their own, so that nnU-Net's
    augmentation draws the same random numbers with and without the branch.
    """

    def __init__(self, loss: nn.Module, layer: nn.Module, metric_loss: SegmentationMetricLoss, seed: int | None):
        super().__init__()
        self.loss, self.metric_loss, self.seed = loss, metric_loss, seed
        self.generator: torch.Generator | None = None
        self.embeddings: Tensor | None = None
        layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.embeddings = output if layer.training else None

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """Logits (N, classes, *spatial) and labels (N, 1, *spatial); with deep supervision lists, finest first."""
        total, embeddings = self.loss(output, target), self.embeddings
        self.embeddings = None
        if embeddings is None:
            return total
        logits, labels = (x if isinstance(x, Tensor) else x[0] for x in (output, target))
        if self.generator is None and self.seed is not None:
            self.generator = torch.Generator(labels.device).manual_seed(self.seed)
        with torch.autocast(logits.device.type, enabled=False):
            seen = SegmentationOutput(logits.float(), embeddings.float())
            terms = self.metric_loss(seen, labels[:, 0].long(), self.generator)
        return total + self.metric_loss.weight * sum(terms.metric.values())


def require_nnunet() -> None:
    """ModuleNotFoundError with the way out if the version of nnU-Net that this module knows is not installed."""
    try:
        present = f"nnunetv2 {version('nnunetv2')} is"
    except PackageNotFoundError:
        present = "no nnunetv2 is"
    if present != f"nnunetv2 {VERSION} is":
        raise ModuleNotFoundError(
            f"nnU-Net {VERSION} is needed, and {present} installed for {sys.executable}; make an environment of its "
            'own, and there: pip install -c constraints.txt -e ".[nnunet]"'
        )


def install_trainers() -> Path:
    """Write a one-line module into nnU-Net's package, so that its own commands find our trainers.

    nnU-Net looks nowhere else. Returns the module's path; it may be deleted at any time.
    """
    require_nnunet()
    package = Path(importlib.util.find_spec("nnunetv2").origin).parent
    path = package / "training/nnUNetTrainer/variants/mupkg_trainers.py"
    write_text(path, f"from mupkg.nnunet.trainers import {', '.join(TRAINERS.values())}\n")
    return path


# Its data


def export(regions: Regions, cohort: Cohort, folder: Path) -> None:
    """Write a study's regions, of one replicate, in nnU-Net's raw layout, with our split as its fold 0; anew.

    `raw/` holds training and validation cases (imagesTr, labelsTr) and test cases (imagesTs, without labels).
    """
    raw, preprocessed = (folder / name / DATASET for name in ("raw", "preprocessed"))
    for place in (raw, preprocessed):
        shutil.rmtree(place.parent, ignore_errors=True)
    ids = {split: regions.ids(split) for split in SPLITS}
    learnt = ids["train"] + ids["validation"]
    for case_id in progress(learnt + ids["test"], desc="writing", unit="case"):
        images = "imagesTr" if case_id in learnt else "imagesTs"
        write_image(regions.image(case_id), raw / images / f"{case_id}_0000.nii.gz")
        if case_id in learnt:
            write_image(regions.image(case_id, "label"), raw / "labelsTr" / f"{case_id}.nii.gz")
    dataset = {
        "channel_names": {"0": cohort.preparation.modality},  # by which nnU-Net chooses how to normalise
        "labels": {"background": 0, "prostate": 1},
        "numTraining": len(learnt),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    write_json(raw / "dataset.json", dataset)
    splits = [{"train": ids["train"], "val": ids["validation"]}]
    write_text(preprocessed / "splits_final.json", json.dumps(splits, indent=1))


def reduce_plans(folder: Path, batch_size: int | None, width: int | None) -> dict[str, Any]:
    """Copy nnU-Net's plans under the name of `REDUCED`, with another batch size and width; its own where None.

    Args:
        width: channels of the first stage; all other stages follow in proportion.

    Returns:
        What nnU-Net planned and what is used, to be told with every result.
    """
    path = folder / "preprocessed" / DATASET / f"{PLANS}.json"
    plans = json.loads(path.read_bytes())
    chosen = plans["configurations"]["2d"]
    network = chosen["architecture"]["arch_kwargs"]
    own = {"batch_size": chosen["batch_size"], "features_per_stage": network["features_per_stage"]}
    chosen["batch_size"] = batch_size or own["batch_size"]
    first = own["features_per_stage"][0]
    network["features_per_stage"] = [n * (width or first) // first for n in own["features_per_stage"]]
    write_json(path.with_name(f"{REDUCED}.json"), plans | {"plans_name": REDUCED})
    used = {"batch_size": chosen["batch_size"], "features_per_stage": network["features_per_stage"]}
    return {"patch_size": chosen["patch_size"], "planned": own, "used": used}


# Its commands


def run(command: str, *arguments: str, folder: Path, results: Path, log: Path, **environment: Any) -> None:
    """One of nnU-Net's commands, as one would type it, with its output in `log`.

    Args:
        folder: of `export`. results: where it keeps what it has learnt. environment: further variables.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    require_nnunet()
    places = {f"nnUNet_{name}": folder.resolve() / name for name in ("raw", "preprocessed")}
    places["nnUNet_results"] = results.resolve()
    usual = {} if DEVICE == "cuda" else {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    variables = usual | os.environ | {name: str(value) for name, value in (places | environment).items()}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        program = str(Path(sys.executable).with_name(command))
        done = subprocess.run([program, *arguments], env=variables, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-12:])
        raise RuntimeError(f"{command} {' '.join(arguments)} failed; {log} ends with:\n{end}")


def prepare(regions: Regions, cohort: Cohort, folder: Path) -> None:
    """`export`, then nnU-Net's own planning and preprocessing of its 2d configuration; nothing if it is done already.

    Of several seeds that are started together one does this, and the others wait for it.

    Raises:
        RuntimeError: with the end of its output, if nnU-Net fails.
    """
    done, wanted = folder / FINGERPRINT, json.dumps({"regions": regions.fingerprint()}) + "\n"
    with machine_lock(f"nnU-Net's data in {folder.resolve()}", timeout_s=-1):
        if done.is_file() and done.read_text(encoding="utf-8") == wanted:
            return
        done.unlink(missing_ok=True)
        export(regions, cohort, folder)
        places = {"folder": folder, "results": folder / "results", "log": folder / "plan.log"}
        processes = ("-np", "1", "-npfp", "1")
        run("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", "2d", "--verify_dataset_integrity", *processes, **places)
        write_text(done, wanted)


def begin(run_folder: Path, parameters: Mapping[str, Any], **record: Any) -> None:
    """Write run.json before the training: what was asked for, and `data_fingerprint` among what else is told.

    Raises:
        ValueError: if a run of other settings or regions was begun in this folder; nnU-Net would go on from it.
    """
    if (run_folder / RUN).exists():
        before = read_run(run_folder / RUN)
        was = {**before["parameters"], "data_fingerprint": before.get("data_fingerprint")}
        now = json.loads(json.dumps({**parameters, "data_fingerprint": record["data_fingerprint"]}))
        if differ := [f"{k} {was.get(k)} and not {now.get(k)}" for k in was | now if was.get(k) != now.get(k)]:
            raise ValueError(f"{run_folder}: holds a run with {', '.join(differ)}; delete it, or choose another seed")
    write_run(run_folder, parameters, **record)


def train(run_folder: Path, folder: Path, *, epochs: int, iterations: int, seed: int) -> None:
    """Train fold 0 with the trainer of the run's name, by nnU-Net's own command.

    A training that broke off goes on from its last checkpoint (nnU-Net's `--c`), though not to the same bits.
    """
    variables = {EPOCHS: epochs, ITERATIONS: iterations, SEED: seed}
    if DEVICE == "cpu":  # so augmentation can be repeated, and takes no second core
        variables["nnUNet_n_proc_DA"] = 0
    _run_for("nnUNetv2_train", run_folder, folder, "1", "2d", "0", "--c", **variables)


def predict(run_folder: Path, folder: Path) -> None:
    """Predict the test cases with the last weights, by nnU-Net's own command (mirrored and averaged, as it does)."""
    images, predicted = (str(path) for path in (folder / "raw" / DATASET / "imagesTs", run_folder / MODEL / TEST))
    cases = ("-i", images, "-o", predicted, "-d", "1", "-c", "2d", "-f", "0")
    options = ("--save_probabilities", "-npp", "1", "-nps", "1", "--disable_progress_bar")
    _run_for("nnUNetv2_predict", run_folder, folder, *cases, *options)


def _run_for(command: str, run_folder: Path, folder: Path, *arguments: str, **environment: Any) -> None:
    """A command for a run: with the trainer of its name, on the reduced plans, into its folder."""
    chosen = ("-tr", TRAINERS[parse_run_name(run_folder)[0]], "-p", REDUCED, "-device", DEVICE)
    places = {"folder": folder, "results": run_folder / MODEL, "log": run_folder / "nnunet.log"}
    run(command, *arguments, *chosen, **places, **environment)


def evaluate(run_folder: Path, cohort: Cohort, regions: Regions) -> pd.DataFrame:
    """Measure nnU-Net's predictions of the test cases as `evaluate_run` measures ours; writes the same files.

    Raises:
        ValueError: naming the prediction that is missing or broken, before any table is written.
    """
    rows = []
    for case_id in progress(regions.ids("test"), desc="testing", unit="case"):
        path = run_folder / MODEL / TEST / f"{case_id}.npz"
        try:
            with np.load(path) as file:
                array = file["probabilities"][1].astype(np.float32)
        except UNREADABLE as error:
            raise ValueError(f"{path}: no prediction can be read ({error}); train and predict again") from error
        probability = sitk.GetImageFromArray(array)
        probability.CopyInformation(regions.image(case_id))
        mask, row = mask_and_row(cohort.case(case_id), regions, probability)
        write_image(mask, run_folder / PREDICTIONS / f"{case_id}.nii.gz")
        rows.append(row)
    return save_table(pd.DataFrame(rows), run_folder / METRICS_CSV, index=False)
