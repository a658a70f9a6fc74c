"""Known ways in which a number can be wrong while everything runs; each check is shown to notice its trap.

A study of phantoms with anisotropic voxels, whose prostate is bright: an oracle that sees brightness stands for the
network, so every number is known beforehand. A check passes on the code as it is, and fails with the trap built in.
"""

from __future__ import annotations

import builtins
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist

import mupkg.data
from mupkg.configurations import build, configuration
from mupkg.data.build import Source, write_cohort
from mupkg.data.cases import Case
from mupkg.data.cohort import Cohort
from mupkg.data.patches import PatchSource
from mupkg.data.preprocessing import Preparation, centroid, resample
from mupkg.metrics import segmentation_metrics
from mupkg.models import light_unet
from mupkg.report import figures, results, statistics
from mupkg.stages import inference, localization, prediction, training
from mupkg.stages import regions as regions_module
from mupkg.stages.localization import COARSE_CHANNELS, Location
from mupkg.stages.regions import Regions
from mupkg.stages.runs import load_tensors, save_tensors, write_run
from mupkg.stages.training import BEST

ROOT = Path(__file__).resolve().parents[1]
SHAPE, SPACING = (14, 30, 30), (4.0, 1.5, 2.5)  # (z, y, x)
WORKING = Preparation(spacing_mm=(5.0, 3.0, 3.0))
REGION_MM, BRIGHT = (70.0, 48.0, 60.0), 150
SPLITS = {"a": "train", "b": "train", "c": "validation", "d": "test", "e": "test", "f": "test"}
SAGITTAL = (0, 0, 1, 1, 0, 0, 0, 1, 0)


def bright_case(case_id: str) -> Case:
    """A box of flesh in air with a bright prostate, elsewhere and a little larger in every case."""
    number = ord(case_id) - ord("a")
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * SPACING
    middle = np.array(SHAPE) * SPACING / 2 + (number - 2, number % 3 - 1, 2 * (number % 2) + 3)
    inside = (((grid - middle) / (13 + number, 8, 14)) ** 2).sum(-1) < 1
    hu = np.random.default_rng(number).normal(0, 10, SHAPE) + 160 * inside
    hu[:, [0, 1, -2, -1]] = hu[:, :, [0, -1]] = -1000
    images = [sitk.GetImageFromArray(voxels) for voxels in (hu.astype(np.int16), inside.astype(np.uint8))]
    for image in images:
        image.SetSpacing(SPACING[::-1])
        image.SetDirection(SAGITTAL if case_id == "f" else (1, 0, 0, 0, 1, 0, 0, 0, 1))
    return Case(case_id, *images)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The cohort, and stage 1 of a study that found every prostate."""
    folder = tmp_path_factory.mktemp("built")
    sources = [Source(i, lambda i=i: bright_case(i), {"split": split}) for i, split in SPLITS.items()]
    cohort = write_cohort(folder / "cohort", sources, WORKING, split_seed=0)
    stage1 = folder / "study" / "stage1"
    save_tensors(light_unet(COARSE_CHANNELS, 2).state_dict(), stage1 / BEST, {"filters": 2})
    write_run(stage1, {"region_mm": REGION_MM})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions_module, "locate", lambda case, *_, **__: Location(centroid(case.label), None, None, ""))
        regions_module.write_regions(cohort, None, stage1, coarse_mm=8.0, region_mm=REGION_MM)
    return folder


@dataclass
class Study:
    """A copy of it to look at and to spoil."""

    root: Path
    blank: str = ""  # the case in which the oracle sees nothing
    island: bool = False  # whether the oracle sees something far from the prostate, too
    said: list[sitk.Image] = field(default_factory=list)  # the oracle's probabilities
    loaded: list[str] = field(default_factory=list)  # names of the weights that were asked for
    between: Callable[[Study], None] = lambda study: None  # what happens between two trainings
    source: dict[str, str] = field(default_factory=dict)  # what is replaced in a notebook's cells

    @property
    def cohort(self) -> Cohort:
        return Cohort.read(self.root / "cohort", check_voxels=False)

    @property
    def regions(self) -> Regions:
        return Regions.read(self.root / "study" / "stage1")

    def test(self, run: str = "UNet-seed0") -> pd.DataFrame:
        """The oracle tested as a run."""
        folder = self.root / "study" / run
        if not (folder / "run.json").exists():
            write_run(folder, {}, data_fingerprint=self.regions.fingerprint())
        return inference.evaluate_run(folder, self.cohort, self.regions)

    def notebook(self, name: str, stop: str | None = None, **parameters: object) -> dict[str, Any]:
        """A notebook's cells run here, up to the first one that holds `stop`; the names they leave."""
        (path,) = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
        cells = ["".join(c["source"]) for c in json.loads(path.read_bytes())["cells"] if c["cell_type"] == "code"]
        parameters |= {"study": "study", "cohort": "cohort", "size": "smoke", "data_folder": str(self.root)}
        parameters["outputs_folder"] = str(self.root)
        injected = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        cells.insert(1, injected)
        namespace = {"In": ["", *cells]}
        for cell in cells:
            if stop and stop in cell:
                break
            for old, new in self.source.items():
                cell = cell.replace(old, new)
            exec(cell, namespace)
        return namespace


@pytest.fixture
def study(built, tmp_path, monkeypatch) -> Study:
    shutil.copytree(built, tmp_path / "copy")
    study = Study(tmp_path / "copy")
    left = []

    def oracle(network: object, region: sitk.Image) -> sitk.Image:
        left[:] = left or study.regions.ids("test")
        seen = sitk.Cast(region > BRIGHT, sitk.sitkFloat32)
        if study.island:
            seen[17:19, 7:9, 6:8] = 1  # the region is centred on the prostate, which ends before x = 16
        study.said.append(seen * 0 if left.pop(0) == study.blank else seen)
        return study.said[-1]

    monkeypatch.setattr(inference, "load_network", lambda path: (study.loaded.append(Path(path).name), {}))
    monkeypatch.setattr(inference, "region_probability", oracle)
    monkeypatch.setattr(figures, "save", lambda figure, *_, **__: plt.close(figure))
    plt.switch_backend("Agg")
    return study


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def by_hand(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """DSC and HD from first principles: a loop over no library of ours."""
    if not prediction.any():
        return {"DSC": 0.0, "HD": np.inf}
    points = [
        np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing for mask in (prediction.astype(bool), truth > 0)
    ]
    distances = cdist(*points)
    dsc = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
    return {"DSC": dsc, "HD": max(distances.min(0).max(), distances.min(1).max())}


# The checks


def check_rows(study: Study) -> None:
    """Every test case has a row, measured on its scan's own grid, in mm, against its own label."""
    table = study.test().set_index("case_id")
    assert list(table.index) == [case_id for case_id, split in SPLITS.items() if split == "test"]
    for case_id, row in table.iterrows():
        truth = read(study.root / "cohort" / "labels" / f"{case_id}.nii.gz")
        prediction = read(study.root / "study" / "UNet-seed0" / "predictions" / f"{case_id}.nii.gz")
        assert {name: row[name] for name in ("DSC", "HD")} == pytest.approx(by_hand(prediction, truth, SPACING))


def check_oracle(study: Study) -> None:
    """Who sees the prostate scores high, however the scan is stored: nothing is shifted, mirrored or mixed up."""
    assert study.test()["DSC"].min() > 0.85


def check_failure_counts(study: Study) -> None:
    """A case without any prediction is in the mean, as DSC 0 and an infinite distance."""
    study.blank = "e"
    table = study.test()
    others = table.loc[table["case_id"] != "e", "DSC"]
    mean = results.summary(results.case_metrics(results.runs(study.root / "study")), ["DSC", "ASD"]).loc["UNet"]
    assert mean["DSC", "mean"] == pytest.approx(others.sum() / 3)
    assert mean["DSC", "n"] == mean["ASD", "n"] == 3
    assert np.isinf(mean["ASD", "mean"])


def check_patches(study: Study) -> None:
    """The label of a patch is that of its image's middle slice: bright where it is 1."""
    source = PatchSource(*study.regions.volumes("train"), patch_size=(16, 16), batch_size=40)
    images, labels = source.batch(0)
    bright = images[:, 1] * 255 > BRIGHT
    assert labels.any()
    assert 2 * (bright & (labels > 0)).sum() / (bright.sum() + labels.sum()) > 0.85


def check_best_weights(study: Study) -> None:
    """What is tested are the weights of the best validation, not the last ones (reading R15)."""
    study.test()
    assert study.loaded == ["weights.safetensors"]


def check_best_localizer(study: Study, monkeypatch) -> None:
    """Regions are cut with the weights of stage 1's best validation, and every run gets these."""
    located_with, best = [], object()
    write_regions = regions_module.write_regions
    with monkeypatch.context() as patch:
        patch.setattr(inference, "load_localizer", lambda path: (study.loaded.append(Path(path).name) or best, {}))
        patch.setattr(regions_module, "write_regions", lambda cohort, network, *_, **__: located_with.append(network))
        notebook, _, parameters = STAGE_1
        study.notebook(notebook, "report = regions.table", steps=2, batch_size=2, **parameters)
    assert regions_module.write_regions is write_regions
    assert study.loaded == ["weights.safetensors"] and located_with == [best]
    stage1 = study.root / "study" / "stage1"
    (stage1 / "last.safetensors").write_bytes(b"other weights")
    inference.copy_localizer(stage1, study.root / "study" / "UNet-seed0")
    copied = study.root / "study" / "UNet-seed0" / "localizer.safetensors"
    assert copied.read_bytes() == (stage1 / "weights.safetensors").read_bytes()


def check_headline(study: Study) -> None:
    """Notebook 04's table is of the largest component, its second one of all that the network says."""
    study.island = True
    rows = study.test().set_index("case_id")
    truths = {case_id: read(study.root / "cohort" / "labels" / f"{case_id}.nii.gz") for case_id in rows.index}
    folder, kept, everything = study.root / "study" / "UNet-seed0", [], []
    for (case_id, truth), said in zip(truths.items(), study.said, strict=True):
        largest = read(folder / "predictions" / f"{case_id}.nii.gz")
        whole = sitk.GetArrayFromImage(true_to_scan_grid(said, study.cohort.case(case_id).image))
        kept.append(by_hand(largest, truth, SPACING)["DSC"])
        everything.append(by_hand(whole, truth, SPACING)["DSC"])
    assert np.mean(kept) > np.mean(everything) + 0.01
    study.notebook("04", "baselines.mean_shape(regions)")
    for name, column, expected in (("table", "DSC", kept), ("table_all_components", "DSC_all", everything)):
        table = pd.read_csv(study.root / "study" / "report" / f"{name}.csv", header=[0, 1], index_col=0)
        assert table.loc["UNet", (column, "mean")] == pytest.approx(np.mean(expected))
        assert table.loc["UNet", (column, "median")] == pytest.approx(np.median(expected))


def check_coarse_labels(study: Study) -> None:
    """Stage 1 learns from labels resampled to the nearest voxel (section 1)."""
    _, labels = localization.coarse_volumes(study.cohort, "train", 7.0)
    for case_id, found in zip(study.cohort.ids("train"), labels, strict=True):
        prepared = study.cohort.prepared(case_id)
        grid, truth = localization.coarse(prepared.image, 7.0), sitk.GetArrayFromImage(prepared.label)
        for index in np.ndindex(found.shape):
            point = grid.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]])
            nearest = np.floor(np.array(prepared.label.TransformPhysicalPointToContinuousIndex(point))[::-1] + 0.5)
            assert found[index] == truth[tuple(np.clip(nearest, 0, np.array(truth.shape) - 1).astype(int))]


def watched(study: Study, monkeypatch, notebook: str, stop: str, **parameters: object) -> SimpleNamespace:
    """Which cases a notebook's training learns from, validates on, and reads at all."""
    names: dict[int, str] = {}
    kept, seen = [], SimpleNamespace(trained=set(), validated=set(), read=set())

    def named(case_id: str, volume):
        kept.append(volume)  # so that its id stays its own
        names[id(volume)] = case_id
        seen.read.add(case_id)
        return volume

    class Watched(PatchSource):
        def __init__(self, images, labels, **options):
            seen.trained |= {names[id(volume)] for volume in (*images, *labels)}
            super().__init__(images, labels, **options)

    def mean_dice(network, volumes, labels, **options):
        seen.validated |= {names[id(volume)] for volume in (*volumes, *labels)}
        return true_dice(network, volumes, labels, **options)

    def coarse_volumes(cohort, split, coarse_mm):
        volumes = true_coarse(cohort, split, coarse_mm)
        return [[named(i, v) for i, v in zip(cohort.ids(split), part, strict=True)] for part in volumes]

    true_dice, true_coarse, true_volume = prediction.mean_dice, localization.coarse_volumes, Regions.volume
    with monkeypatch.context() as patch:
        patch.setattr(mupkg.data, "PatchSource", Watched)
        patch.setattr(prediction, "mean_dice", mean_dice)
        patch.setattr(localization, "coarse_volumes", coarse_volumes)
        patch.setattr(Regions, "volume", lambda self, i, kind="image": named(i, true_volume(self, i, kind)))
        study.notebook(notebook, stop, steps=2, batch_size=2, **parameters)
    return seen


STAGE_1 = ("02", "load_localizer(settings", {"patch_size": 8, "filters": 2, "coarse_mm": 8.0})
STAGE_2 = (
    "03",
    "evaluate_run(",
    {"patch_size": 8, "base_filters": 2, "embedding_dim": 4, "validate_every": 1, "configuration": "UNet"},
)


def check_splits(study: Study, stage: tuple, monkeypatch) -> None:
    """A notebook learns from training cases, chooses weights by validation cases, and never reads a test case."""
    for path in [*study.root.rglob("[def]_*"), *study.root.rglob("[def].nii.gz")]:
        path.write_text("torn")  # of the test cases nothing but the names is there
    notebook, stop, parameters = stage
    try:
        seen = watched(study, monkeypatch, notebook, stop, **parameters)
    except ValueError as error:
        raise AssertionError("a test case was read") from error
    assert seen.trained == {"a", "b"}
    assert seen.validated == {"c"}
    assert seen.read == {"a", "b", "c"}


def check_stage_1_splits(study: Study, monkeypatch) -> None:
    check_splits(study, STAGE_1, monkeypatch)


def check_stage_2_splits(study: Study, monkeypatch) -> None:
    check_splits(study, STAGE_2, monkeypatch)


def check_shared_regions(study: Study) -> None:
    """All configurations of a study are trained on the same regions, or they are not compared."""
    notebook, stop, parameters = STAGE_2
    for name in ("UNet", "MetricUNet-R"):
        study.notebook(notebook, stop, **parameters | {"configuration": name, "steps": 2, "batch_size": 2})
        study.test(f"{name}-seed0")
        study.between(study)
    trained_on = [load_tensors(path)[1]["data"] for path in (study.root / "study").glob(f"*-seed0/{BEST}")]
    assert len(trained_on) == 2 and len(set(trained_on)) == 1
    results.case_metrics(results.runs(study.root / "study"))


def check_study_is_refused(study: Study) -> None:
    """Runs whose records tell of different regions are not put into one table."""
    for number, name in enumerate(("UNet", "MetricUNet-R")):
        study.test(f"{name}-seed0")
        write_run(study.root / "study" / f"{name}-seed0", {}, data_fingerprint=str(number))
    try:
        results.case_metrics(results.runs(study.root / "study"))
    except ValueError as error:
        assert "not trained on the same regions" in str(error)
    else:
        raise AssertionError("different regions went into one table")


def refused(study: Study, notebook: str, fault: str) -> None:
    """A notebook of results stops before it shows any, and says why."""
    try:
        study.notebook(notebook, {"04": "summary = ", "05": "hardest, truth ="}[notebook])
    except ValueError as error:
        assert fault in str(error)
    else:
        raise AssertionError("the study was evaluated all the same")


def two_runs(study: Study) -> None:
    """Trained for two steps each, tested by the oracle."""
    notebook, stop, parameters = STAGE_2
    for name in ("UNet", "MetricUNet-R"):
        study.notebook(notebook, stop, **parameters | {"configuration": name, "steps": 2, "batch_size": 2})
        study.test(f"{name}-seed0")


def check_best_shown(study: Study) -> None:
    """Notebook 05 shows the networks that were tested."""
    two_runs(study)
    study.loaded.clear()
    study.notebook("05", "hardest, truth =")
    assert study.loaded == ["weights.safetensors"] * 2


def check_missing_case(study: Study, notebook: str = "04") -> None:
    """A test case that is missing from every run is missed."""
    two_runs(study)
    for path in (study.root / "study").glob("*-seed0/metrics.csv"):
        table = pd.read_csv(path)
        table[table["case_id"] != "e"].to_csv(path, index=False)
    refused(study, notebook, "lacks the test case(s) e;")


def check_new_stage_1(study: Study, notebook: str = "04") -> None:
    """Stage 1 run again after all trainings is seen: results and regions no longer belong together."""
    two_runs(study)
    new_stage_1(study)
    refused(study, notebook, "its regions are not those that the runs were trained on")


def check_settings(study: Study, notebook: str = "04") -> None:
    """Runs trained with other settings are not put into one table."""
    two_runs(study)
    path = study.root / "study" / "MetricUNet-R-seed0" / "run.json"
    record = json.loads(path.read_bytes())
    record["parameters"]["steps"] = 3
    path.write_text(json.dumps(record))
    refused(study, notebook, "steps is 2 in UNet-seed0, 3 in MetricUNet-R-seed0")


def check_paper_apart(study: Study) -> None:
    """None of the paper's figures is in a table that notebook 04 writes."""
    for name in ("UNet", "MetricUNet-R"):
        study.test(f"{name}-seed0")
    study.notebook("04")
    tables = list((study.root / "study" / "report").glob("*.csv"))
    assert len(tables) >= 5
    assert not [path.name for path in tables if POISON.encode() in path.read_bytes()]


def check_seeds(study: Study) -> None:
    """Five seeds that say the same are no more cases than one: same spread, same n, same p."""
    rng = np.random.default_rng(0)
    rows = [
        {"configuration": name, "case_id": f"{case}", "DSC": rng.normal(0.8 + shift, 0.05)}
        for name, shift in (("UNet", 0), ("MetricUNet-R", 0.02))
        for case in range(8)
    ]
    one = pd.DataFrame(rows).assign(seed=0)
    five = pd.concat([one.assign(seed=seed) for seed in range(5)])
    first, second = (results.summary(m, ["DSC"]).drop(columns=("", "seeds")) for m in (one, five))
    pd.testing.assert_frame_equal(first, second)
    over_cases = results.paired_tests(one, ["DSC"])[statistics.PAPERS_T_TEST]
    np.testing.assert_allclose(results.paired_tests(five, ["DSC"])["p"], over_cases)


# The traps


POISON = "98765"  # no number of ours


def on_the_working_grid(mask: sitk.Image, case: Case) -> dict[str, float]:
    on_grid = [sitk.GetArrayFromImage(resample(i, WORKING.spacing_mm, label=True)) > 0 for i in (mask, case.label)]
    return segmentation_metrics(*on_grid, spacing_mm=WORKING.spacing_mm)


def without_failures(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    kept = metrics[np.isfinite(metrics[metric]) & (metrics[metric] > 0)]
    return kept.pivot_table(metric, "case_id", "configuration")


def pooled_over_seeds(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    metrics = metrics.assign(row=metrics["case_id"] + "-" + metrics["seed"].astype(str))
    return metrics.pivot_table(metric, "row", "configuration")[list(dict.fromkeys(metrics["configuration"]))]


def poisoned_paper(study: Study, patch: pytest.MonkeyPatch) -> None:
    """The paper's figures recognisable, wherever they turn up."""

    def poisoned(table: int, **options):
        printed = true_published(table, **options)
        for column in printed:
            if column.endswith("_mean"):
                printed[column] = f"0.{POISON}" if options else float(f"0.{POISON}")
        return printed

    true_published = results.published
    patch.setattr(results, "published", poisoned)


def paper_in_our_table(study: Study, patch: pytest.MonkeyPatch) -> None:
    def summary(metrics, *names):
        table = true_summary(metrics, *names).astype(float)
        table.loc["paper"] = float(results.published(3)["DSC_mean"][0])
        return table

    true_summary = results.summary
    patch.setattr(results, "summary", summary)


def label_by(change: Callable[[Case], Case]) -> Callable[[Study, pytest.MonkeyPatch], None]:
    """Every case read with another label."""

    def install(study: Study, patch: pytest.MonkeyPatch) -> None:
        true_case = Cohort.case
        patch.setattr(Cohort, "case", lambda self, i: change(true_case(self, i)))

    return install


def other_label(case: Case) -> Case:
    label = bright_case(chr(ord(case.case_id) - 1)).label
    label.CopyInformation(case.image)
    return replace(case, label=label)


def swapped(image: sitk.Image) -> sitk.Image:
    """y and x swapped, in the array alone."""
    turned = sitk.GetImageFromArray(sitk.GetArrayFromImage(image).transpose(0, 2, 1))
    turned.CopyInformation(image)
    return turned


def upside_down(probability: sitk.Image, scan: sitk.Image) -> sitk.Image:
    mask = sitk.GetImageFromArray(sitk.GetArrayFromImage(true_to_scan_grid(probability, scan))[::-1])
    mask.CopyInformation(scan)
    return mask


true_to_scan_grid = inference.to_scan_grid


def volume_by(change: Callable[[Study, str, np.ndarray], np.ndarray]) -> Callable[[Study, pytest.MonkeyPatch], None]:
    """Every region's label changed."""

    def install(study: Study, patch: pytest.MonkeyPatch) -> None:
        def volume(self, case_id, kind="image"):
            found = true_volume(self, case_id, kind)
            return found if kind == "image" else change(study, case_id, found)

        true_volume = Regions.volume
        patch.setattr(Regions, "volume", volume)

    return install


def attribute(module: object, name: str, value: object) -> Callable[[Study, pytest.MonkeyPatch], None]:
    return lambda study, patch: patch.setattr(module, name, value)


def in_the_notebook(old: str, new: str) -> Callable[[Study, pytest.MonkeyPatch], None]:
    return lambda study, patch: study.source.update({old: new})


def new_stage_1(study: Study) -> None:
    """Stage 1 run once more, with another outcome."""
    path = study.root / "study" / "stage1" / "regions.csv"
    table = pd.read_csv(path)
    table.assign(centre_x=table["centre_x"] + 9).to_csv(path, index=False)


def all_ids(self: Regions, split: str) -> list[str]:
    return list(self.table.index[self.table["split"] != "test"]) if split == "train" else true_ids(self, split)


true_ids = Regions.ids

true_coarse, true_load_network = localization.coarse, inference.load_network
TO_ALL = ".rename(columns=lambda c: c.removesuffix('_all'))"

TRAPS = {
    "the last weights tested": (check_best_weights, attribute(inference, "BEST", "last.safetensors")),
    "regions cut with stage 1's last weights": (
        check_best_localizer,
        in_the_notebook(
            "load_localizer(settings.stage1_path / training.BEST)",
            "load_localizer(settings.stage1_path / training.LAST)",
        ),
    ),
    "regions cut with an untrained stage 1": (
        check_best_localizer,
        in_the_notebook("network, _ = load_localizer", "_, _ = load_localizer"),
    ),
    "stage 1's last weights given to the runs": (
        check_best_localizer,
        attribute(inference, "BEST", "last.safetensors"),
    ),
    "pictures of the last weights": (check_best_shown, in_the_notebook("training.BEST", "training.LAST")),
    "all components in the headline": (
        check_headline,
        in_the_notebook(
            "results.summary(metrics)", f"results.summary(metrics.drop(columns=[*results.HEADLINE]){TO_ALL})"
        ),
    ),
    "the largest component in the second table": (
        check_headline,
        in_the_notebook(
            "results.summary(metrics, [",
            "results.summary(metrics.assign(**{f'{n}_all': metrics[n] for n in results.HEADLINE}), [",
        ),
    ),
    "coarse labels interpolated": (
        check_coarse_labels,
        attribute(localization, "coarse", lambda image, coarse_mm, label=False: true_coarse(image, coarse_mm)),
    ),
    "a test case missing from all runs": (
        check_missing_case,
        in_the_notebook("case_metrics(runs, regions)", "case_metrics(runs)"),
    ),
    "a test case missing from all runs, in the pictures": (
        partial(check_missing_case, notebook="05"),
        in_the_notebook("case_metrics(runs, regions)", "case_metrics(runs)"),
    ),
    "stage 1 run again after all trainings": (
        check_new_stage_1,
        in_the_notebook("case_metrics(runs, regions)", "case_metrics(runs)"),
    ),
    "stage 1 run again after all trainings, in the pictures": (
        partial(check_new_stage_1, notebook="05"),
        in_the_notebook("case_metrics(runs, regions)", "case_metrics(runs)"),
    ),
    "other settings in one table": (
        check_settings,
        attribute(results, "_check_settings", lambda parameters, may_differ=(): None),
    ),
    "other settings in one picture": (
        partial(check_settings, notebook="05"),
        attribute(results, "_check_settings", lambda parameters, may_differ=(): None),
    ),
    "spacing ignored": (check_rows, attribute(inference, "array_spacing", lambda image: (1.0, 1.0, 1.0))),
    "spacing transposed": (check_rows, attribute(inference, "array_spacing", lambda image: image.GetSpacing())),
    "measured on the resampled grid": (check_rows, attribute(inference, "measure", on_the_working_grid)),
    "measured against another case's label": (check_rows, label_by(other_label)),
    "a test case left out": (check_rows, attribute(inference, "progress", lambda ids, **_: ids[1:])),
    "label's axes swapped": (check_oracle, label_by(lambda case: replace(case, label=swapped(case.label)))),
    "prediction upside down": (check_oracle, attribute(inference, "to_scan_grid", upside_down)),
    "failures dropped from the mean": (check_failure_counts, attribute(results, "per_case", without_failures)),
    "failures dropped at the test": (
        check_failure_counts,
        attribute(inference, "progress", lambda ids, **_: [i for i in ids if i != "e"]),
    ),
    "labels of patches with axes swapped": (
        check_patches,
        volume_by(lambda study, i, label: np.resize(label.transpose(0, 2, 1), label.shape)),
    ),
    "labels of patches from another slice": (check_patches, volume_by(lambda s, i, label: np.roll(label, 4, axis=0))),
    "labels of patches from another case": (
        check_patches,
        volume_by(lambda s, i, label: np.load(s.regions.folder / "regions" / "f_label.npy")[::-1]),
    ),
    "stage 1 validates on test cases": (
        check_stage_1_splits,
        in_the_notebook('(learning, "validation"', '(learning, "test"'),
    ),
    "stage 1 trains on validation cases": (
        check_stage_1_splits,
        in_the_notebook('(learning, "train"', '(learning, "validation"'),
    ),
    "test cases choose the weights": (check_stage_2_splits, in_the_notebook('("validation")', '("test")')),
    "training on test cases": (check_stage_2_splits, in_the_notebook('volumes("train")', 'volumes("test")')),
    "validation cases in training": (check_stage_2_splits, attribute(Regions, "ids", all_ids)),
    "stage 1 run again between two configurations": (
        check_shared_regions,
        lambda study, patch: setattr(study, "between", new_stage_1),
    ),
    "fingerprints not looked at": (
        check_study_is_refused,
        attribute(results, "json", SimpleNamespace(loads=lambda text: {"data_fingerprint": "0"}, dumps=json.dumps)),
    ),
    "the paper's figures in our table": (check_paper_apart, paper_in_our_table),
    "seeds counted as cases": (check_seeds, attribute(results, "per_case", pooled_over_seeds)),
    "seeds counted as cases by the test": (
        check_seeds,
        attribute(
            statistics, "random_effects", lambda d, analysis=statistics.random_effects: analysis(d.reshape(1, -1))
        ),
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_all_is_well_and_the_trap_would_be_noticed(name, study, monkeypatch, built):
    check, install = TRAPS[name]
    patching = (check_stage_1_splits, check_stage_2_splits, check_best_localizer)
    arguments = (monkeypatch,) if check in patching else ()
    if check is check_paper_apart:
        poisoned_paper(study, monkeypatch)
    torch.manual_seed(0)
    check(study, *arguments)
    shutil.rmtree(study.root)
    shutil.copytree(built, study.root)
    study.said.clear()
    study.loaded.clear()
    install(study, monkeypatch)
    with pytest.raises(AssertionError):
        check(study, *arguments)


def test_the_two_grids_differ_enough_to_tell(study):
    """Or the trap of the resampled grid could not be seen at all."""
    study.test()
    for case_id in ("d", "e", "f"):
        case = study.cohort.case(case_id)
        mask = sitk.ReadImage(str(study.root / "study" / "UNet-seed0" / "predictions" / f"{case_id}.nii.gz"))
        own, working = inference.measure(mask, case), on_the_working_grid(mask, case)
        assert abs(own["DSC"] - working["DSC"]) > 0.005 and abs(own["HD"] - working["HD"]) > 0.1


def test_a_mask_on_another_grid_than_its_label_is_not_measured(study):
    case = study.cohort.case("d")
    moved = sitk.Image(case.label)
    moved.SetOrigin((3.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"case d: the mask is not on its label's grid .*; resample it first"):
        inference.measure(moved, case)


# What a notebook is told arrives where it counts


def caught(study: Study, monkeypatch, notebook: str, stop: str, **parameters: object) -> dict[str, Any]:
    """A notebook's cells up to `stop` with another training in place of ours; its names, and `arrived` there."""
    history = pd.DataFrame({"step": [1], "cross_entropy": [1.0], "seconds": [0.1], "validation_dsc": [0.5]})
    signature, arrived = inspect.signature(training.train), {}

    def train(*given, **options):
        bound = signature.bind(*given, **options)
        bound.apply_defaults()
        arrived.update(bound.arguments)
        return history

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", train)
        patch.setattr(figures, "convergence", lambda histories: None)
        return study.notebook(notebook, stop, **parameters) | {"arrived": arrived}


STAGE_2_TOLD = {
    "configuration": "MetricUNet-HCRP",
    "seed": 3,
    "steps": 7,
    "batch_size": 5,
    "base_filters": 3,
    "embedding_dim": 6,
    "patch_size": 24,
    "validate_every": 2,
    "learning_rate": 0.03,
    "momentum": 0.8,
    "weight_decay": 0.002,
    "anchors": 11,
    "pairs": 2,
    "threshold": 0.3,
    "margin": 0.4,
    "metric_weight": 0.05,
    "pair_weight": 0.6,
    "pair_distance": 0.07,
    "normalize": True,
    "precision": "bf16",
    "channels_last": False,
    "compile": True,
    "workers": 2,
    "deterministic": True,
    "film": True,
}


@pytest.fixture
def _as_deterministic_as_before():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_as_deterministic_as_before")
def test_what_notebook_3_is_told_reaches_sampler_loss_patches_and_training(study, monkeypatch):
    told = STAGE_2_TOLD
    names = caught(study, monkeypatch, "03", "inference.copy_localizer", **told)
    arrived, loss, source = names["arrived"], names["loss"], names["source"]
    assert arrived["loss"] is loss and arrived["source"] is source and arrived["network"] is names["network"]
    # samplers and loss
    assert [sampler.letter for sampler in loss.samplers] == ["H", "C", "R"]
    assert {(sampler.anchors, sampler.pairs) for sampler in loss.samplers} == {(11, 2)}
    assert loss.samplers[0].threshold == 0.3
    assert loss.weight == 0.05
    of_tuples = loss.metric_loss
    assert (of_tuples.margin, of_tuples.pair_weight, of_tuples.pair_distance) == (0.4, 0.6, 0.07)
    assert of_tuples.normalize is True
    # patches
    assert (source.patch_size, source.batch_size, source.seed) == ((24, 24), 5, 3)
    assert (source.channels, source.patches_per_image) == (3, 500)
    # the optimisation
    same = ("steps", "validate_every", "learning_rate", "momentum", "weight_decay", "seed", "precision")
    same += ("channels_last", "compile", "workers")
    assert {name: arrived[name] for name in same} == {name: told[name] for name in same}
    assert arrived["power"] == 0.9
    assert arrived["folder"] == study.root / "study" / "MetricUNet-HCRP-seed3"
    assert arrived["on_validation"] is not None and torch.are_deterministic_algorithms_enabled()
    # first weights, of the widths asked for and of the seed
    torch.manual_seed(3)
    expected, _ = build(configuration("MetricUNet-HCRP"), 3, 3, 6)
    pairs = zip(names["network"].parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(first, other) for first, other in pairs)


@pytest.mark.usefixtures("_as_deterministic_as_before")
def test_what_notebook_3_is_told_is_stored_with_the_weights_and_in_the_record(study, monkeypatch):
    """So that no checkpoint of other settings is continued, and no other run compared."""
    told, kept = STAGE_2_TOLD, {"workers", "film"}  # these change no weight
    names = caught(study, monkeypatch, "03", "inference.evaluate_run", **told)
    made_by = names["arrived"]["metadata"]
    flat = made_by | made_by["loss"] | made_by["training"]
    flat["metric_weight"] = flat.pop("weight")
    assert {name: flat.get(name) for name in told if name not in kept} == {
        name: value for name, value in told.items() if name not in kept
    }
    assert made_by["data"] == study.regions.fingerprint()
    record = json.loads((study.root / "study" / "MetricUNet-HCRP-seed3" / "run.json").read_bytes())
    assert {name: record["parameters"][name] for name in told} == told
    assert record["data_fingerprint"] == made_by["data"]


def test_the_first_weights_and_patches_are_the_seeds_alone(study, monkeypatch):
    """What differs between two configurations is the loss."""
    shown = [
        caught(study, monkeypatch, "03", "inference.copy_localizer", configuration=name, seed=seed)
        for name, seed in (("UNet", 1), ("MetricUNet-HCP", 1), ("UNet", 2))
    ]
    weights = [torch.cat([v.flatten().float() for v in s["network"].state_dict().values()]) for s in shown]
    batches = [s["source"].batch(4)[0] for s in shown]
    for first, second, other in (weights, batches):
        assert torch.equal(first, second) and not torch.equal(first, other)


def test_what_notebook_2_is_told_reaches_grid_patches_training_and_regions(study, monkeypatch):
    told = {"seed": 3, "steps": 16, "batch_size": 5, "filters": 3, "patch_size": 24, "learning_rate": 0.03}
    told |= {"coarse_mm": 7.0, "region_mm": [72.0, 51.0, 63.0], "precision": "bf16"}
    cut = {}
    monkeypatch.setattr(
        regions_module, "write_regions", lambda cohort, network, folder, **options: cut.update(options)
    )
    monkeypatch.setattr(inference, "load_localizer", lambda path: (None, {}))
    names = caught(study, monkeypatch, "02", "report = regions.table", **told)
    arrived, source = names["arrived"], names["source"]
    assert arrived["source"] is source
    assert (source.patch_size, source.batch_size, source.seed, source.channels) == ((24, 24), 5, 3, 5)
    prepared = study.cohort.prepared("a").image
    assert names["train_images"][0].shape == localization.coarse(prepared, 7.0).GetSize()[::-1]
    same = ("steps", "learning_rate", "seed", "precision")
    assert {name: arrived[name] for name in same} == {name: told[name] for name in same}
    assert (arrived["validate_every"], arrived["folder"]) == (2, study.root / "study" / "stage1")
    assert not arrived["loss"].samplers
    torch.manual_seed(3)
    first, expected = arrived["network"].state_dict(), light_unet(COARSE_CHANNELS, 3).state_dict()
    assert all(torch.equal(first[name], value) for name, value in expected.items())
    assert (cut["coarse_mm"], list(cut["region_mm"])) == (7.0, [72.0, 51.0, 63.0])
    made_by = arrived["metadata"] | arrived["metadata"]["training"]
    assert {name: made_by[name] for name in told} == told
    assert made_by["preparation"] == study.cohort.preparation.model_dump(mode="json")
    assert made_by["data"] == study.cohort.fingerprint()
    record = json.loads((study.root / "study" / "stage1" / "run.json").read_bytes())
    assert {name: record["parameters"][name] for name in told} == told


# What cannot be shown is said


def test_a_test_region_without_prostate_has_an_empty_row_and_no_picture(study, monkeypatch, capsys):
    path = study.regions.folder / "regions" / "d_label.npy"
    np.save(path, np.zeros_like(np.load(path)))
    two_runs(study)
    monkeypatch.setattr(inference, "load_network", true_load_network)
    names = study.notebook("05")
    assert "test regions that hold no prostate: d\n" in capsys.readouterr().out
    assert set(names["ranked"]) == {"e", "f"} and set(names["shown"]) == {"e", "f"}
    table = pd.read_csv(study.root / "study" / "report" / "embedding_separation.csv", index_col="case_id")
    assert len(table) == 6
    assert table.loc["d", ["silhouette", "Fisher ratio"]].isna().all(axis=None)
    assert table.loc[["e", "f"]].notna().all(axis=None)


def test_pictures_without_any_prostate_are_refused(study):
    for path in (study.regions.folder / "regions").glob("[def]_label.npy"):
        np.save(path, np.zeros_like(np.load(path)))
    two_runs(study)
    with pytest.raises(ValueError, match="no test region holds any prostate; look at stage 1"):
        study.notebook("05")


def test_a_seed_without_a_run_is_named(study):
    two_runs(study)
    with pytest.raises(
        ValueError, match="no finished run of any configuration with seed 4; run notebook 03, or choose"
    ):
        study.notebook("05", seed=4)


@pytest.mark.parametrize("unlabelled", ["c", "abc", "abcdef"])
def test_notebook_1_shows_cases_without_a_label(unlabelled, study, monkeypatch, capsys):
    def source(case_id: str) -> Source:
        case = bright_case(case_id)
        return Source(case_id, lambda: replace(case, label=None) if case_id in unlabelled else case, {})

    shutil.rmtree(study.root / "cohort")
    write_cohort(study.root / "cohort", map(source, SPLITS), WORKING, split_seed=0)
    monkeypatch.setattr(builtins, "display", lambda *_: None, raising=False)
    names = study.notebook("01")
    labelled = len(SPLITS) - len(unlabelled)
    assert f"{labelled} of 6 cases have a label\n" in capsys.readouterr().out
    assert set(names["scans"]) == {"a", "b", "c"}
    assert set(names["curves"]) == {"a", "b", "c"} - set(unlabelled)
    sizes = pd.read_csv(study.root / "study" / "report" / "prostate_ml.csv", index_col="split")
    assert sizes["count"].sum() == labelled


def test_notebook_4_says_when_configurations_differ_in_their_number_of_seeds(study, capsys):
    said = "The number of seeds differs"
    for run in ("UNet-seed0", "MetricUNet-R-seed0"):
        study.test(run)
    study.notebook("04", "everything = ")
    assert said not in capsys.readouterr().out
    study.test("UNet-seed1")
    study.notebook("04", "everything = ")
    assert said in capsys.readouterr().out
