"""Training keeps the best weights, goes on after a break as if there had been none, and refuses what cannot be."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from mupkg.configurations import build, configuration
from mupkg.data.cohort import Cohort
from mupkg.data.patches import PatchSource
from mupkg.losses import LossTerms
from mupkg.models import light_unet
from mupkg.stages import training
from mupkg.stages.localization import Regions, coarse_volumes
from mupkg.stages.runs import load_tensors, save_tensors
from mupkg.stages.slices import predict_volume
from mupkg.stages.training import BEST, CHECKPOINT, HISTORY, LAST, poly_learning_rate, train

RNG = np.random.default_rng(0)
LABEL = np.zeros((6, 24, 24), np.uint8)
LABEL[1:5, 6:18, 8:20] = 1
IMAGE = np.clip(100 + 60 * LABEL + RNG.normal(0, 25, LABEL.shape), 0, 255).astype(np.uint8)
METADATA = {"configuration": "MetricUNet-HCP", "sizes": (2, 4), "seed": 5}


def mean_probability(network):
    """A number that depends on every weight, to stand for a validation."""
    return float(predict_volume(network, IMAGE).mean())


def run(folder, *, name="MetricUNet-HCP", steps=9, validate=mean_probability, source=None, **options):
    torch.manual_seed(5)
    network, loss = build(configuration(name), base_filters=2, embedding_dim=4, anchors=5, pairs=2)
    source = source or PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=3, seed=5)
    options = {"validate_every": 3, "metadata": METADATA, "learning_rate": 0.1, "seed": 5} | options
    return train(network, loss, source, folder, steps=steps, validate=validate, **options)


def breaking(number):
    """A validation that breaks off when it is called for the `number`th time."""
    calls = []

    def validate(network):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        return mean_probability(network)

    return validate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training without a break."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def assert_same_run(folder, whole):
    for name in (BEST, LAST):
        (tensors, metadata), (wanted, wanted_metadata) = load_tensors(folder / name), load_tensors(whole / name)
        assert metadata == wanted_metadata and tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted), name
    found, wanted = (pd.read_csv(f / HISTORY).drop(columns="seconds") for f in (folder, whole))
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


# The same to the bit


def test_the_same_seed_gives_the_same_run(tmp_path, whole):
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_another_seed_gives_another(tmp_path, whole):
    run(tmp_path, seed=6)  # only the tuples differ
    found, wanted = load_file(tmp_path / LAST), load_file(whole / LAST)
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_break_while_validating_leaves_no_trace(tmp_path, whole, number):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validate=breaking(number))
    assert not (tmp_path / LAST).exists() and (tmp_path / CHECKPOINT).exists() == (number > 1)
    run(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("number", [1, 2])
def test_a_break_between_best_weights_and_checkpoint_leaves_no_trace(tmp_path, whole, monkeypatch, number):
    write, calls = training._checkpoint, []

    def broken(*arguments):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(training, "_checkpoint", broken)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert (tmp_path / BEST).exists() and (tmp_path / CHECKPOINT).exists() == (number > 1)
    monkeypatch.setattr(training, "_checkpoint", write)
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_break_in_the_midst_of_steps_leaves_no_trace(tmp_path, whole, monkeypatch):
    source = PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=3, seed=5)
    batch = source.batch
    monkeypatch.setattr(source, "batch", lambda step: batch(step) if step < 7 else pytest.fail("broke off"))
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path, source=source)
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    run(tmp_path / "run", validate=lambda network: pytest.fail("trained again"))
    assert_same_run(tmp_path / "run", whole)


# Settings of a checkpoint


@pytest.mark.parametrize(
    ("metadata", "named"),
    [({"seed": 6}, "seed"), ({"more": 1}, "more"), ({"sizes": (2, 8), "seed": 7}, "seed, sizes")],
)
def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path, whole, metadata, named):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(
        ValueError, match=rf"checkpoint\.safetensors: .*other settings \({named}\).*delete the folder"
    ):
        run(tmp_path / "run", metadata=METADATA | metadata)
    assert_same_run(tmp_path / "run", whole)


def test_a_checkpoint_of_another_network_is_not_resumed(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: holds weights of another network"):
        run(tmp_path / "run", name="UNet++")


def test_a_cut_checkpoint_is_named(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: is not a whole safetensors file"):
        run(tmp_path / "run")


def test_a_checkpoint_without_its_best_weights_is_not_resumed(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / BEST).unlink()
    with pytest.raises(ValueError, match=rf"{BEST}: is missing beside its checkpoint; delete {CHECKPOINT}"):
        run(tmp_path / "run")


# What is kept


def test_the_best_weights_are_those_of_the_best_validation(tmp_path):
    scores, states = iter([0.2, 0.9, 0.5, 0.9]), []

    def validate(network):
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return next(scores)

    history = run(tmp_path, validate=validate, steps=8, validate_every=2)
    best, metadata = load_tensors(tmp_path / BEST)
    assert (metadata["step"], metadata["validation_dsc"]) == (4, 0.9)  # the first of two equals
    last, _ = load_tensors(tmp_path / LAST)
    for tensors, state in ((best, states[1]), (last, states[3])):
        assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert history["validation_dsc"].dropna().tolist() == [0.2, 0.9, 0.5, 0.9]


def test_a_dsc_of_zero_is_still_a_best(tmp_path):
    run(tmp_path, validate=lambda network: 0.0, steps=2)
    assert load_tensors(tmp_path / BEST)[1]["validation_dsc"] == 0


def test_what_made_the_weights_is_stored_with_them(whole):
    for name in (BEST, LAST, CHECKPOINT):
        metadata = load_tensors(whole / name)[1]
        assert metadata.items() >= json.loads(json.dumps(METADATA)).items()


def test_the_history_tells_the_losses_of_every_sampler_and_validates_at_the_end(tmp_path):
    history = run(tmp_path, steps=7, validate_every=3)
    assert history["step"].tolist() == list(range(1, 8))
    assert history.dropna()["step"].tolist() == [3, 6, 7]
    assert {"loss", "cross_entropy", "metric_H", "metric_C", "seconds"} <= set(history)
    assert not list(tmp_path.glob(".*"))


def test_a_row_is_the_mean_since_the_last_one(tmp_path):
    every = run(tmp_path / "a", steps=20, validate_every=20)
    by_hand = run(tmp_path / "b", steps=20, validate_every=1)
    assert every["step"].tolist() == list(range(2, 21, 2))
    means = by_hand["loss"].to_numpy().reshape(10, 2).mean(axis=1)
    np.testing.assert_allclose(every["loss"], means, rtol=1e-5)


def test_it_learns(tmp_path):
    history = run(tmp_path, name="UNet", steps=60, validate_every=20, learning_rate=0.2)
    assert history["cross_entropy"].iloc[-1] < 0.7 * history["cross_entropy"].iloc[0]


# The learning rate


def test_poly_decay_by_hand():
    assert poly_learning_rate(0.01, 0, 1000) == 0.01
    assert poly_learning_rate(0.01, 500, 1000) == pytest.approx(0.01 * 0.5**0.9)
    assert poly_learning_rate(0.01, 999, 1000) == pytest.approx(0.01 * 0.001**0.9)
    assert poly_learning_rate(0.5, 3, 4, power=2.0) == pytest.approx(0.5 / 16)


def test_the_learning_rate_decays_as_said(tmp_path):
    history = run(tmp_path, steps=5, validate_every=1, power=0.5)
    np.testing.assert_allclose(history["learning_rate"], [0.1 * (1 - i / 5) ** 0.5 for i in range(5)])


def test_the_optimizer_is_plain_sgd(tmp_path):
    """Without momentum and decay, one step goes the learning rate down the gradient."""
    torch.manual_seed(5)
    network, loss = build(configuration("UNet"), base_filters=2, embedding_dim=4)
    source = PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=3, seed=5)
    images, labels = source.batch(0)
    loss(network(images), labels).total.backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in network.named_parameters()}
    run(tmp_path, name="UNet", steps=1, momentum=0.0, weight_decay=0.0)
    found = load_file(tmp_path / LAST)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)


# What cannot go on


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_ends_it_before_weights_are_written(tmp_path, value):
    def loss(output, labels, generator=None):
        total = output.logits.square().mean() * value
        return LossTerms(total, total, {})

    torch.manual_seed(0)
    network, _ = build(configuration("UNet"), base_filters=2, embedding_dim=4)
    source = PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=3)
    with pytest.raises(FloatingPointError, match="at step 1; lower the learning rate"):
        train(network, loss, source, tmp_path, steps=4, validate=lambda n: 1.0, validate_every=2, metadata={})
    assert not list(tmp_path.iterdir())


# Who is asked


def test_training_never_touches_a_test_case(cohort, regions, tmp_path):
    """With the test cases' volumes torn, both stages train to the same bits."""
    for name, tear in (("whole", False), ("torn", True)):
        folder = tmp_path / name
        shutil.copytree(cohort.folder, folder / "cohort")
        shutil.copytree(regions.folder, folder / "stage1")
        (case_id,) = cohort.ids("test")
        for path in (
            [*folder.glob(f"cohort/*/{case_id}*"), *folder.glob(f"stage1/regions/{case_id}*")] if tear else []
        ):
            path.write_text("torn")
        copy, cut = Cohort.read(folder / "cohort", check_voxels=False), Regions.read(folder / "stage1")
        torch.manual_seed(0)
        network, (_, loss) = light_unet(5, 2), build(configuration("UNet"))
        coarse = PatchSource(*coarse_volumes(copy, "train", 8.0), patch_size=(16, 16), channels=5, batch_size=2)
        images, _ = coarse_volumes(copy, "validation", 8.0)
        options = {"steps": 2, "validate_every": 1, "metadata": {}}
        train(
            network,
            loss,
            coarse,
            folder / "one",
            validate=lambda net, images=images: float(predict_volume(net, images[0], channels=5).mean()),
            **options,
        )
        images, _ = cut.volumes("validation")
        run(
            folder / "two",
            source=PatchSource(*cut.volumes("train"), patch_size=(16, 16), batch_size=2),
            validate=lambda net, images=images: float(predict_volume(net, images[0]).mean()),
            **options,
        )
    for stage in ("one", "two"):
        assert_same_run(tmp_path / "torn" / stage, tmp_path / "whole" / stage)


def test_weights_in_the_checkpoints_place_are_refused_by_name(tmp_path):
    save_tensors({"head": torch.zeros(1)}, tmp_path / training.CHECKPOINT, {"configuration": "UNet"})
    network = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: is no checkpoint"):
        training._resume(
            tmp_path / training.CHECKPOINT, network, torch.optim.SGD(network.parameters()), {"configuration": "UNet"}
        )
