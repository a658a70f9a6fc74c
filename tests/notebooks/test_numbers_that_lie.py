"""Known ways in which a number can be wrong while everything runs; each check is shown to notice its trap.

A check passes on the code as it is, and fails with the trap built in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from bright_study import BRIGHT, SPACING, SPLITS, STAGE_1, STAGE_2, WORKING, Study, bright_case, two_runs
from scipy import ndimage
from scipy.spatial.distance import cdist

import mupkg.data
from mupkg.data.cohort import Cohort
from mupkg.data.patches import PatchSource
from mupkg.data.preprocessing import resample
from mupkg.metrics import segmentation_metrics
from mupkg.report import results
from mupkg.scans.cases import Case
from mupkg.stages import evaluation, inference, localization, prediction
from mupkg.stages import regions as regions_module
from mupkg.stages.regions import Regions
from mupkg.stages.runs import load_tensors, write_run
from mupkg.stages.training import BEST
from mupkg.trials import statistics


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
    mean = results.summary(results.case_metrics(results.finished_runs(study.root / "study")), ["DSC", "ASD"]).loc[
        "UNet"
    ]
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
    results.case_metrics(results.finished_runs(study.root / "study"))


def check_study_is_refused(study: Study) -> None:
    """Runs whose records tell of different regions are not put into one table."""
    for number, name in enumerate(("UNet", "MetricUNet-R")):
        study.test(f"{name}-seed0")
        write_run(study.root / "study" / f"{name}-seed0", {}, data_fingerprint=str(number))
    try:
        results.case_metrics(results.finished_runs(study.root / "study"))
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
    over_cases = statistics.paired_tests(one, ["DSC"])[statistics.PAPERS_T_TEST]
    np.testing.assert_allclose(statistics.paired_tests(five, ["DSC"])["p"], over_cases)


# The traps


POISON = "98765"  # no number of ours


def on_the_working_grid(mask: sitk.Image, case: Case, **options) -> dict[str, float]:
    on_grid = [sitk.GetArrayFromImage(resample(i, WORKING.spacing_mm, label=True)) > 0 for i in (mask, case.label)]
    return segmentation_metrics(*on_grid, spacing_mm=WORKING.spacing_mm, **options)


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


true_to_scan_grid = evaluation.to_scan_grid


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

true_coarse = localization.coarse
TO_ALL = ".rename(columns=lambda c: c.removesuffix('_all'))"

TRAPS = {
    "the last weights tested": (check_best_weights, attribute(evaluation, "BEST", "last.safetensors")),
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
        in_the_notebook("results.summary(metrics)", f"results.summary(metrics.drop(columns=[*headline()]){TO_ALL})"),
    ),
    "the largest component in the second table": (
        check_headline,
        in_the_notebook(
            "results.summary(metrics, [",
            "results.summary(metrics.assign(**{f'{n}_all': metrics[n] for n in headline()}), [",
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
        attribute(results, "check_settings", lambda parameters: None),
    ),
    "other settings in one picture": (
        partial(check_settings, notebook="05"),
        attribute(results, "check_settings", lambda parameters: None),
    ),
    "spacing ignored": (check_rows, attribute(evaluation, "array_spacing", lambda image: (1.0, 1.0, 1.0))),
    "spacing transposed": (check_rows, attribute(evaluation, "array_spacing", lambda image: image.GetSpacing())),
    "measured on the resampled grid": (check_rows, attribute(evaluation, "mask_metrics", on_the_working_grid)),
    "measured against another case's label": (check_rows, label_by(other_label)),
    "a test case left out": (check_rows, attribute(evaluation, "progress", lambda ids, **_: ids[1:])),
    "label's axes swapped": (check_oracle, label_by(lambda case: replace(case, label=swapped(case.label)))),
    "prediction upside down": (check_oracle, attribute(evaluation, "to_scan_grid", upside_down)),
    "failures dropped from the mean": (check_failure_counts, attribute(results, "per_case", without_failures)),
    "failures dropped at the test": (
        check_failure_counts,
        attribute(evaluation, "progress", lambda ids, **_: [i for i in ids if i != "e"]),
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
    "training on test cases": (check_stage_2_splits, in_the_notebook('volumes("train", ', 'volumes("test", ')),
    "validation cases in training": (check_stage_2_splits, attribute(Regions, "ids", all_ids)),
    "stage 1 run again between two configurations": (
        check_shared_regions,
        lambda study, patch: setattr(study, "between", new_stage_1),
    ),
    "fingerprints not looked at": (
        check_study_is_refused,
        attribute(results, "read_run", lambda path, *needed: {"data_fingerprint": "0", "parameters": {}}),
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
        own, working = evaluation.mask_metrics(mask, case), on_the_working_grid(mask, case)
        assert abs(own["DSC"] - working["DSC"]) > 0.005 and abs(own["HD"] - working["HD"]) > 0.1


def test_a_mask_on_another_grid_than_its_label_is_not_measured(study):
    case = study.cohort.case("d")
    moved = sitk.Image(case.label)
    moved.SetOrigin((3.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"case d: the mask is not on its label's grid .*; resample it first"):
        evaluation.mask_metrics(moved, case)
