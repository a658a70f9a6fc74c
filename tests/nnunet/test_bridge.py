"""nnU-Net on our regions: what it is given, the branch in its training, and its predictions measured as ours are."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from mupkg.losses import SegmentationMetricLoss, VoxelMetricLoss
from mupkg.nnunet import bridge as nnunet
from mupkg.samplers import ContourSampler, RandomSampler
from mupkg.stages import evaluation, inference

try:
    INSTALLED = version("nnunetv2")
except PackageNotFoundError:
    INSTALLED = None
needs_nnunet = pytest.mark.skipif(
    INSTALLED != nnunet.VERSION, reason=f"nnunetv2 {nnunet.VERSION}, the extra `nnunet`, is not installed"
)


# What nnU-Net is given


@pytest.fixture
def exported(cohort, regions, tmp_path):
    nnunet.export(regions, cohort, tmp_path)
    return tmp_path


def test_the_raw_layout_holds_every_region_once_with_its_place_in_space(exported, cohort, regions):
    raw = exported / "raw" / nnunet.DATASET
    ids = {split: regions.ids(split) for split in ("train", "validation", "test")}
    learnt = sorted(ids["train"] + ids["validation"])
    for name, ending, wanted in (
        ("imagesTr", "_0000.nii.gz", learnt),
        ("labelsTr", ".nii.gz", learnt),
        ("imagesTs", "_0000.nii.gz", ids["test"]),
    ):
        assert sorted(path.name for path in (raw / name).iterdir()) == [f"{case_id}{ending}" for case_id in wanted]
        for case_id in wanted:
            image = sitk.ReadImage(str(raw / name / f"{case_id}{ending}"))
            region = regions.image(case_id, "label" if name == "labelsTr" else "image")
            assert (sitk.GetArrayFromImage(image) == sitk.GetArrayFromImage(region)).all()
            assert image.GetSpacing() == pytest.approx(region.GetSpacing())
            assert image.GetOrigin() == pytest.approx(region.GetOrigin(), abs=1e-4)
    assert not (raw / "labelsTs").exists()


def test_the_dataset_and_the_split_are_told(exported, regions):
    told = json.loads((exported / "raw" / nnunet.DATASET / "dataset.json").read_text(encoding="utf-8"))
    assert told["channel_names"] == {"0": "CT"} and told["labels"] == {"background": 0, "prostate": 1}
    assert told["numTraining"] == 2 and told["file_ending"] == ".nii.gz"
    splits = json.loads((exported / "preprocessed" / nnunet.DATASET / "splits_final.json").read_bytes())
    assert splits == [{"train": regions.ids("train"), "val": regions.ids("validation")}]


def test_an_export_leaves_nothing_of_the_one_before(exported, cohort, regions):
    old = exported / "raw" / nnunet.DATASET / "imagesTr" / "another_0000.nii.gz"
    planned = exported / "preprocessed" / nnunet.DATASET / f"{nnunet.PLANS}.json"
    for path in (old, planned):
        path.write_bytes(b"")
    nnunet.export(regions, cohort, exported)
    assert not old.exists() and not planned.exists()


@pytest.mark.parametrize(
    ("batch_size", "width", "used"),
    [
        (4, 8, (4, [8, 16, 32])),
        (None, None, (45, [32, 64, 128])),
        (None, 1, (45, [1, 2, 4])),
        (2, 64, (2, [64, 128, 256])),
    ],
)
def test_reduced_plans_are_a_copy_with_another_batch_and_width(tmp_path, batch_size, width, used):
    own = {"batch_size": 45, "patch_size": [56, 56]}
    own["architecture"] = {"arch_kwargs": {"features_per_stage": [32, 64, 128], "n_stages": 3}}
    plans = {"plans_name": nnunet.PLANS, "configurations": {"2d": own, "3d_fullres": {"batch_size": 2}}}
    path = tmp_path / "preprocessed" / nnunet.DATASET / f"{nnunet.PLANS}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(plans), encoding="utf-8")
    told = nnunet.reduce_plans(tmp_path, batch_size, width)
    assert told["planned"] == {"batch_size": 45, "features_per_stage": [32, 64, 128]}
    assert told["used"] == dict(zip(("batch_size", "features_per_stage"), used, strict=True))
    assert json.loads(path.read_bytes()) == plans
    reduced = json.loads(path.with_name(f"{nnunet.REDUCED}.json").read_bytes())
    own["batch_size"], own["architecture"]["arch_kwargs"]["features_per_stage"] = used
    assert reduced == plans | {"plans_name": nnunet.REDUCED}


def test_what_is_prepared_is_not_prepared_again_unless_the_regions_change(cohort, regions, tmp_path, monkeypatch):
    ran, failing = [], []

    def run(command, *_, **__):
        if failing:
            raise RuntimeError(failing.pop())
        ran.append(command)

    monkeypatch.setattr(nnunet, "run", run)
    for _ in range(2):
        nnunet.prepare(regions, cohort, tmp_path)
    assert ran == ["nnUNetv2_plan_and_preprocess"]
    others = replace(regions, table=regions.table.iloc[::-1].drop(index=regions.ids("validation")))
    failing.append("broke off")
    with pytest.raises(RuntimeError, match="broke off"):
        nnunet.prepare(others, cohort, tmp_path)
    nnunet.prepare(regions, cohort, tmp_path)  # of the regions before, nothing is left
    assert len(ran) == 2


# The branch


class StandIn(nn.Module):
    """As nnU-Net's networks: a decoder of stages, a segmentation layer for each, the finest output first."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.decoder = nn.Module()
        self.decoder.stages = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1), nn.ConvTranspose2d(6, 4, 2, stride=2)])
        self.decoder.seg_layers = nn.ModuleList([nn.Conv2d(6, 2, 1), nn.Conv2d(4, 2, 1)])
        self.deep_supervision = True

    def forward(self, images):
        x, outputs = self.encoder(images), []
        for stage, seg_layer in zip(self.decoder.stages, self.decoder.seg_layers, strict=True):
            x = stage(x).tanh()
            outputs.insert(0, seg_layer(x))
        return outputs if self.deep_supervision else outputs[0]


class Supervised(nn.Module):
    """Cross-entropy of every output, the coarser by half."""

    def forward(self, output, target):
        pairs = [(output, target)] if isinstance(output, torch.Tensor) else zip(output, target, strict=True)
        terms = (nn.functional.cross_entropy(logits, labels[:, 0].long()) for logits, labels in pairs)
        return sum(term / 2**i for i, term in enumerate(terms))


def batch(foreground=True):
    images, labels = torch.rand(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    if foreground:
        labels[:, :, 2:6, 3:7] = 1
    return images, labels, [labels, labels[..., ::2, ::2]]


def branch_on(network):
    loss = SegmentationMetricLoss([RandomSampler(8), ContourSampler(8)], VoxelMetricLoss(pair_weight=0.1), weight=0.5)
    return nnunet.MetricBranch(Supervised(), nnunet.embedding_layer(network), loss, seed=0)


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_the_branch_adds_the_metric_losses_of_the_last_stage_and_nothing_else(deep_supervision):
    network = StandIn()
    network.deep_supervision = deep_supervision
    branch, (images, labels, targets) = branch_on(network), batch()
    target = targets if deep_supervision else labels
    output = network(images)
    total = branch(output, target)
    # by hand: the same draws, tuple after tuple
    stage = network.decoder.stages
    embeddings = stage[1](stage[0](network.encoder(images)).tanh())
    rows, generator, metric = embeddings.movedim(1, -1).reshape(-1, 4), torch.Generator().manual_seed(0), 0.0
    finest = output[0] if deep_supervision else output
    for sampler in branch.metric_loss.samplers:
        tuples = sampler(labels[:, 0].long(), finest.detach().softmax(1)[:, 1], generator)
        losses = []
        for a, p, n in zip(*tuples, strict=True):
            near, far = ((rows[a] - rows[b]).square().sum() for b in (p, n))
            losses.append((near - far + 0.7).clamp(min=0) + 0.1 * (near - 0.01).clamp(min=0))
        metric = metric + torch.stack(losses).mean()
    assert len(losses) == 16
    expected = Supervised()(output, target) + 0.5 * metric
    assert total.item() == pytest.approx(expected.item(), rel=1e-5) and metric.item() > 0


def test_its_gradient_reaches_the_embeddings_and_all_below_but_no_head():
    network = StandIn()
    branch, (images, _, targets) = branch_on(network), batch()
    total = branch(output := network(images), targets)
    (total - Supervised()(output, targets)).backward()
    reached = {n: p.grad is not None and bool(p.grad.abs().max() > 1e-7) for n, p in network.named_parameters()}
    # a distance does not change when all embeddings move alike
    of_no_use = {"decoder.stages.1.bias", *(name for name in reached if "seg_layers" in name)}
    assert reached == {name: name not in of_no_use for name in reached}


def test_a_batch_without_tuples_adds_a_zero_that_can_be_trained_on():
    network = StandIn()
    branch, (images, _, targets) = branch_on(network), batch(foreground=False)
    output = network(images)
    total = branch(output, targets)
    assert total.item() == Supervised()(output, targets).item()
    total.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_in_validation_it_is_nnunets_loss_alone():
    network = StandIn()
    branch, (images, _, targets) = branch_on(network), batch()
    branch(network(images), targets)
    network.eval()
    with torch.no_grad():
        output = network(images)
        assert branch(output, targets) == Supervised()(output, targets)
    assert branch.embeddings is None


def test_it_draws_no_random_number_that_nnunet_would_draw():
    network = StandIn()
    branch, (images, _, targets) = branch_on(network), batch()
    before = torch.get_rng_state()
    branch(network(images), targets)
    assert (torch.get_rng_state() == before).all()


def test_the_metric_losses_stay_in_float32_under_autocast():
    network = StandIn()
    branch, (images, _, targets) = branch_on(network), batch()
    dtypes, loss = [], branch.metric_loss.metric_loss
    of_vectors = loss.of_vectors
    loss.of_vectors = lambda *vectors: (value := of_vectors(*vectors), dtypes.append(value.dtype))[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images)
        assert output[0].dtype == torch.bfloat16
        branch(output, targets).backward()
    assert dtypes == [torch.float32, torch.float32]


@pytest.mark.slow
def test_it_is_found_behind_the_wrappers_of_a_compiled_training_on_several_gpus():
    network = StandIn()
    compiled = torch.compile(network, backend="eager")
    assert nnunet.embedding_layer(SimpleNamespace(module=compiled)) is network.decoder.stages[-1]
    images, _, targets = batch()
    branch, plain = branch_on(compiled), branch_on(StandIn())
    total = branch(compiled(images), targets)
    with torch.no_grad():
        expected = Supervised()(network(images), targets)
    assert total > expected
    total.backward()
    assert plain.embeddings is None and network.decoder.stages[-1].weight.grad.abs().sum() > 0


def test_a_network_without_such_a_layer_is_told():
    with pytest.raises(ValueError, match="Conv2d: has no decoder; choose plans"):
        nnunet.embedding_layer(nn.Conv2d(1, 1, 1))


# Its runs


PARAMETERS = {"epochs": 2, "seed": 0, "configuration": "nnUNet"}


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    nnunet.begin(tmp_path, PARAMETERS, data_fingerprint="12")
    nnunet.begin(tmp_path, PARAMETERS, data_fingerprint="12")
    before = (tmp_path / "run.json").read_bytes()
    for parameters, fingerprint, said in (
        (PARAMETERS | {"epochs": 3}, "12", "epochs 2 and not 3"),
        (PARAMETERS, "13", "data_fingerprint 12 and not 13"),
        (PARAMETERS | {"width": 8}, "12", "width None and not 8"),
    ):
        with pytest.raises(ValueError, match=rf"holds a run with {said}; delete it"):
            nnunet.begin(tmp_path, parameters, data_fingerprint=fingerprint)
    assert (tmp_path / "run.json").read_bytes() == before


def test_predictions_are_measured_as_those_of_our_networks(cohort, regions, run_folder, copied, bones, tmp_path):
    """The same probabilities, once from our network and once from nnU-Net's files, give the same rows and masks."""
    ours = evaluation.evaluate_run(copied, cohort, regions)
    run = tmp_path / "nnUNet-seed0"
    for case_id in regions.ids("test"):
        probability = sitk.GetArrayFromImage(inference.region_probability(None, regions.image(case_id)))
        path = run / nnunet.MODEL / nnunet.TEST / f"{case_id}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, probabilities=np.stack([1 - probability, probability]))
    theirs = nnunet.evaluate(run, cohort, regions)
    pd.testing.assert_frame_equal(theirs, ours)
    pd.testing.assert_frame_equal(pd.read_csv(run / "metrics.csv"), ours)
    for case_id in regions.ids("test"):
        masks = [sitk.ReadImage(str(folder / "predictions" / f"{case_id}.nii.gz")) for folder in (copied, run)]
        assert (sitk.GetArrayFromImage(masks[0]) == sitk.GetArrayFromImage(masks[1])).all()


def archive(**arrays):
    np.savez_compressed(file := io.BytesIO(), **arrays)
    return file.getvalue()


WHOLE = archive(probabilities=np.random.default_rng(0).random((2, 9, 9, 9)))
SPOILT = WHOLE[: len(WHOLE) // 2] + bytes(100) + WHOLE[len(WHOLE) // 2 + 100 :]


@pytest.mark.parametrize(
    "content", [None, b"", b"no zip", WHOLE[:500], SPOILT, archive(softmax=np.zeros((2, 9, 9, 9)))]
)
def test_a_prediction_that_is_missing_or_broken_is_told_before_any_table(cohort, regions, tmp_path, content):
    (case_id,) = regions.ids("test")
    path = tmp_path / nnunet.MODEL / nnunet.TEST / f"{case_id}.npz"
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{case_id}\.npz: no prediction can be read .* train and predict again"):
        nnunet.evaluate(tmp_path, cohort, regions)
    assert not (tmp_path / "metrics.csv").exists()


# Its commands


@pytest.mark.parametrize("found", [None, "2.8.1"])
def test_without_its_nnunet_the_way_out_is_told(found, cohort, regions, monkeypatch, tmp_path):
    def version(_name):
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(nnunet, "version", version)
    said = rf"nnU-Net {nnunet.VERSION} is needed, and {f'nnunetv2 {found}' if found else 'no nnunetv2'} is installed"
    for ask in (nnunet.require_nnunet, nnunet.install_trainers, lambda: nnunet.prepare(regions, cohort, tmp_path)):
        with pytest.raises(ModuleNotFoundError, match=rf'{said} .*pip install -c constraints\.txt -e "\.\[nnunet\]"'):
            ask()
    assert not (tmp_path / "fingerprint.json").exists()


def test_a_command_that_fails_is_told_with_the_end_of_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(nnunet, "version", lambda _name: nnunet.VERSION)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "nnUNetv2_train"
    command.write_text('#!/bin/sh\necho "$nnUNet_raw"\necho no case\nexit 1\n')
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(RuntimeError, match=r"(?s)nnUNetv2_train 1 2d .* failed; .*nnunet\.log ends with:.*no case"):
        nnunet.train(tmp_path / "nnUNet-HCP-seed0", tmp_path, epochs=1, iterations=1, seed=0)
    assert (tmp_path / "nnUNet-HCP-seed0" / "nnunet.log").read_text().startswith(str(tmp_path / "raw"))


@pytest.mark.slow
def test_the_suite_needs_no_nnunet():
    script = "import sys; sys.modules['nnunetv2'] = None; import mupkg.nnunet.bridge, mupkg.stages"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_nnunet
def test_nnunets_own_search_finds_the_trainers():
    written = nnunet.install_trainers()
    assert len(written.read_text().splitlines()) == 1
    names = list(nnunet.TRAINERS.values())
    script = f"""
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
for name in {names!r}:
    print(recursive_find_python_class(nnunetv2.__path__[0] + "/training/nnUNetTrainer", name,
                                      "nnunetv2.training.nnUNetTrainer").__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == names, done.stderr
