"""What a notebook is told arrives where it counts."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from bright_study import Study

from mupkg.configurations import build, configuration
from mupkg.models import light_unet
from mupkg.report import figures
from mupkg.stages import evaluation, inference, localization, training
from mupkg.stages import regions as regions_module
from mupkg.stages.localization import COARSE_CHANNELS


def caught(study: Study, monkeypatch, notebook: str, stop: str | None = None, **parameters: object) -> dict[str, Any]:
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


METRICS = pd.DataFrame(
    {"case_id": ["d", "e"], "DSC": [0.5, 0.7], "DSC_all": 0.5}
    | dict.fromkeys(("SEN", "PPV", "ASD", "HD95", "aRVD"), 1.0)
)
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
    assert arrived["on_validation"] is not None and arrived["on_step"] is not None
    assert torch.are_deterministic_algorithms_enabled()
    # first weights, of the widths asked for and of the seed
    torch.manual_seed(3)
    expected, _ = build(configuration("MetricUNet-HCRP"), 3, 3, 6)
    pairs = zip(names["network"].parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(first, other) for first, other in pairs)


@pytest.mark.usefixtures("_as_deterministic_as_before")
def test_what_notebook_3_is_told_is_stored_with_the_weights_and_in_the_record(study, monkeypatch):
    """So that no checkpoint of other settings is continued, and no other run compared."""
    told, kept = STAGE_2_TOLD, {"workers", "film"}  # these change no weight
    names = caught(study, monkeypatch, "03", "evaluation.evaluate_run", **told)
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


def test_vnet_learns_from_blocks_of_the_depth_it_is_told(study, monkeypatch):
    told = {"configuration": "VNet", "depth": 32, "batch_size": 96, "patch_size": 16, "base_filters": 4}
    names = caught(study, monkeypatch, "03", "inference.copy_localizer", **told)
    source, network = names["source"], names["arrived"]["network"]
    assert (source.depth, source.batch_size, source.patch_size, source.patches_per_image) == (32, 3, (16, 16), 500)
    assert network.network.in_tr.conv_block.conv.out_channels == 2
    assert names["arrived"]["metadata"]["depth"] == 32


def test_noisy_contours_are_learnt_from_and_known_of_the_weights_but_not_tested_on(study, monkeypatch):
    plain, noisy, again, other = (
        caught(study, monkeypatch, "03", "inference.copy_localizer", configuration="UNet", seed=s, label_noise_mm=mm)
        for s, mm in ((1, 0.0), (1, 6.0), (1, 6.0), (2, 6.0))
    )
    labels = [np.concatenate([v.ravel() for v in names["source"].labels]) for names in (plain, noisy, again, other)]
    assert np.array_equal(labels[1], labels[2])
    assert not np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[1], labels[3])
    about = [names["arrived"]["metadata"]["cases"] for names in (plain, noisy)]
    assert "label_noise_mm" not in about[0] and about[1]["label_noise_mm"] == 6.0
    for ours, theirs in zip(plain["validation"][1], noisy["validation"][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_harder_test_scans_are_tested_when_asked_for(study, monkeypatch):
    tested = []
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *given: tested.append(given[3:]) or METRICS)
    caught(study, monkeypatch, "03", configuration="UNet", test_shifts=["noise", "thick"])
    assert tested == [(), ("noise",), ("thick",)]


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


def test_a_replicate_learns_from_its_own_cases_alone(study, monkeypatch):
    """Two replicates: a and c, b and d; e and f are tested in both."""
    own = {"a": ("train", 0), "b": ("train", 1), "c": ("validation", 0), "d": ("validation", 1)}
    for path in (study.root / "cohort" / "cohort.csv", study.root / "study" / "stage1" / "regions.csv"):
        table = pd.read_csv(path).set_index("case_id", drop=False)
        table["replicate"] = [own.get(case_id, ("", None))[1] for case_id in table.index]
        table["split"] = [own.get(case_id, ("test", None))[0] for case_id in table.index]
        table.to_csv(path, index=False)
    monkeypatch.setattr(regions_module, "write_regions", lambda *_, **__: None)
    monkeypatch.setattr(inference, "load_localizer", lambda path: (None, {}))
    made_by = []
    for replicate, learns in ((None, "ab"), (0, "a"), (1, "b")):
        told = {"replicate": replicate, "coarse_mm": 8.0, "patch_size": 8, "filters": 2}
        names = caught(study, monkeypatch, "02", "report = regions.table", **told)
        coarse = [localization.coarse(study.cohort.prepared(i).image, 8.0) for i in learns]
        assert len(names["train_images"]) == len(learns)
        for volume, image in zip(names["train_images"], coarse, strict=True):
            np.testing.assert_array_equal(volume, sitk.GetArrayFromImage(image))
        made_by.append(names["arrived"]["metadata"])
    assert [made.get("replicate") for made in made_by] == [
        None,
        0,
        1,
    ]  # else a fold would go on from another's weights
    for replicate, learns in ((0, "a"), (1, "b")):
        told = {"configuration": "UNet", "replicate": replicate, "patch_size": 8}
        names = caught(study, monkeypatch, "03", "inference.copy_localizer", **told)
        (label,) = names["source"].labels
        np.testing.assert_array_equal(label, study.regions.volume(learns, "label"))
        assert names["arrived"]["metadata"]["cases"]["replicate"] == replicate


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
