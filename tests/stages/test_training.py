"""Training keeps the best weights, goes on after a break as if there had been none, and refuses what cannot be."""

import json
import multiprocessing
import os
import shlex
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from watching import Watch

from mupkg.configurations import build, configuration
from mupkg.data.cohort import Cohort
from mupkg.data.patches import PatchSource
from mupkg.losses import LossTerms
from mupkg.models import SegmentationOutput, conv_bn_relu, light_unet
from mupkg.scans.writing import machine_lock
from mupkg.stages import hardware, training
from mupkg.stages.film import Film, read_film
from mupkg.stages.localization import coarse_volumes
from mupkg.stages.prediction import predict_volume
from mupkg.stages.regions import Regions
from mupkg.stages.runs import BEST, CHECKPOINT, HISTORY, LAST, load_tensors, processor_name
from mupkg.stages.training import never_left_plateau, poly_learning_rate, train

RNG = np.random.default_rng(0)
LABEL = np.zeros((6, 24, 24), np.uint8)
LABEL[1:5, 6:18, 8:20] = 1
IMAGE = np.clip(100 + 60 * LABEL + RNG.normal(0, 25, LABEL.shape), 0, 255).astype(np.uint8)
METADATA = {"configuration": "MetricUNet-HCP", "sizes": (2, 4), "seed": 5}


def mean_probability(network):
    """A number that depends on every weight, to stand for a validation."""
    return float(predict_volume(network, IMAGE).mean())


def parts(name="MetricUNet-HCP"):
    torch.manual_seed(5)
    return build(configuration(name), base_filters=2, embedding_dim=4, anchors=5, pairs=2)


def run(folder, *, name="MetricUNet-HCP", steps=9, validate=mean_probability, network=None, source=None, **options):
    built, loss = parts(name)
    network = network or built
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
    write, calls = training._Run.checkpoint, []

    def broken(self):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        write(self)

    monkeypatch.setattr(training._Run, "checkpoint", broken)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert (tmp_path / BEST).exists() and (tmp_path / CHECKPOINT).exists() == (number > 1)
    monkeypatch.setattr(training._Run, "checkpoint", write)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["VNet", "BoundaryFCN"])
def test_a_row_of_table_iv_learns_and_a_break_leaves_no_trace(tmp_path, name):
    depth = {"VNet": 16}.get(name)
    source = PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=2, seed=5, depth=depth)
    history = run(tmp_path / "whole", name=name, source=source, steps=6)
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", name=name, source=source, steps=6, validate=breaking(2))
    run(tmp_path / "run", name=name, source=source, steps=6)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert ("metric_distance" in history) == (name == "BoundaryFCN")


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    run(tmp_path / "run", validate=lambda network: pytest.fail("trained again"))
    assert_same_run(tmp_path / "run", whole)


def test_what_an_earlier_training_left_goes_when_it_begins_anew(tmp_path, whole):
    """Else a kill halfway would leave its metrics beside other weights, to be taken for theirs."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / CHECKPOINT).unlink()
    for name in ("metrics.csv", "run.json", "regions.csv", "film/000000.safetensors", "predictions/a.nii.gz", "mine"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("of before")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", validate=breaking(1))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_what_follows_from_a_training_stays_when_it_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validate=breaking(2))
    (tmp_path / "film").mkdir()
    (tmp_path / "film" / "000000.safetensors").write_text("a frame")
    run(tmp_path)
    assert (tmp_path / "film" / "000000.safetensors").exists()


def test_two_trainings_in_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "machine_lock", lambda name, timeout_s: machine_lock(name, 0.1))

    def validate(network):
        with pytest.raises(
            ValueError, match=rf"{tmp_path.name}: another process is training in it; wait for its end"
        ):
            run(tmp_path)
        return mean_probability(network)

    run(tmp_path, validate=validate)
    run(tmp_path)  # it was given back


@pytest.mark.slow
def test_the_machines_and_threads_that_made_the_weights_are_told(tmp_path, capsys, whole):
    made_on = [load_tensors(whole / name)[1]["made_on"] for name in (BEST, LAST, CHECKPOINT)]
    assert made_on == [[f"{processor_name()}, 1 thread(s)"]] * 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validate_every=8, validate=breaking(2))
    torch.set_num_threads(2)
    try:
        run(tmp_path, validate_every=8)  # one step more
    finally:
        torch.set_num_threads(1)
    machine = processor_name()
    assert f"begun on {machine}, 1 thread(s) and continues on {machine}, 2 thread" in capsys.readouterr().out
    assert load_tensors(tmp_path / LAST)[1]["made_on"] == [f"{processor_name()}, {n} thread(s)" for n in (1, 2)]
    run(tmp_path)  # nothing is left to do
    assert "begun on" not in capsys.readouterr().out


# Workers that cut batches ahead


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_bit_and_end_with_the_training(tmp_path, whole, workers):
    run(tmp_path, workers=workers)
    assert_same_run(tmp_path, whole)
    assert not multiprocessing.active_children()


def test_a_break_with_workers_leaves_no_trace_and_no_worker(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt) as kept:  # its traceback keeps every frame, as a notebook does
        run(tmp_path, workers=2, validate=breaking(2))
    assert not multiprocessing.active_children(), kept
    run(tmp_path, workers=1)
    assert_same_run(tmp_path, whole)


def test_an_error_in_a_worker_is_raised_and_leaves_none(tmp_path, monkeypatch):
    source = PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=3, seed=5)
    batch = source.batch
    monkeypatch.setattr(source, "batch", lambda step: batch(step if step < 2 else "two"))
    with pytest.raises(TypeError) as kept:
        run(tmp_path, source=source, workers=2)
    assert not multiprocessing.active_children(), kept


def test_workers_and_training_leave_torchs_own_draws_alone(tmp_path):
    after = []
    for workers in (0, 2):
        run(tmp_path / str(workers), workers=workers, steps=2)
        after.append(torch.get_rng_state())
    parts()
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], torch.get_rng_state())


# The cohort in a GPU's memory


def a_gpu(free):
    return SimpleNamespace(device=torch.device("cuda"), print=print, free=free)


@pytest.mark.parametrize(("free", "fits"), [(2 * 2 * LABEL.size, True), (2 * 2 * LABEL.size - 1, False)])
def test_the_cohort_goes_to_the_gpu_if_half_of_its_free_memory_is_enough(monkeypatch, capsys, free, fits):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    source = PatchSource([IMAGE], [LABEL], patch_size=(16, 16))
    monkeypatch.setattr(source, "to", lambda device: f"on {device}")
    found = hardware.on_gpu_if_it_fits(source, a_gpu(free))
    assert found == "on cuda" if fits else found is source
    assert ("lies in GPU memory" if fits else "cut on the CPU, see `workers`") in capsys.readouterr().out


def test_without_a_gpu_the_volumes_stay_where_they_are():
    source = PatchSource([IMAGE], [LABEL], patch_size=(16, 16))
    assert hardware.on_gpu_if_it_fits(source, SimpleNamespace(device=torch.device("cpu"))) is source


@pytest.fixture
def in_device_memory(monkeypatch):
    """The CPU stands for the GPU."""
    monkeypatch.setattr(training, "on_gpu_if_it_fits", lambda source, accelerator: source.to("cpu"))


@pytest.mark.parametrize("workers", [0, 2])
def test_where_patches_are_cut_changes_no_bit(tmp_path, whole, in_device_memory, workers):
    run(tmp_path, workers=workers)
    assert_same_run(tmp_path, whole)


def test_a_break_with_the_cohort_in_device_memory_leaves_no_trace(tmp_path, whole, in_device_memory):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validate=breaking(2))
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_between_two_rows_of_the_history_nothing_waits_for_the_device(tmp_path, in_device_memory):
    with Watch() as watch:
        history = run(tmp_path, steps=20, validate_every=20, validate=lambda network: 0.5)
    values = ["loss", "cross_entropy", "metric_H", "metric_C", "active_H", "active_C"]
    assert len(history) == 10 and set(values) <= set(history)
    assert watch.waits == ["_local_scalar_dense"] * len(history) * len(values)


# Speed: rounding alone


class Tiny(torch.nn.Module):
    """Compiles in half the time of a UNet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.body, self.head = conv_bn_relu(3, 4), torch.nn.Conv2d(4, 2, 1)

    def forward(self, images):
        embeddings = self.body(images)
        return SegmentationOutput(self.head(embeddings), embeddings)


def unquotable():
    """Whether PyTorch lies in a folder whose path its own command for the linker would tear apart."""
    folders = Path(torch.__file__).parent / "lib", sysconfig.get_config_var("LIBDIR")
    try:
        return any(shlex.split(f"-L{folder}") != [f"-L{folder}"] for folder in folders)
    except ValueError:  # a quote that never ends
        return True


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # checked signatures do not compile
@pytest.mark.parametrize("options", [{"channels_last": False}, {"compile": True}])
def test_layout_and_compiler_change_rounding_alone(tmp_path, options):
    if "compile" in options and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none here")
    if "compile" in options and unquotable():
        with pytest.raises(ValueError, match="compile does not work here"):
            run(tmp_path / "run", **options)
        return
    # At a higher rate a rounding soon makes the hard sampler draw another voxel, and from there losses part.
    wanted = run(tmp_path / "plain", network=Tiny(), learning_rate=0.01)
    history = run(tmp_path / "run", network=Tiny(), learning_rate=0.01, **options)
    np.testing.assert_allclose(history["loss"], wanted["loss"], atol=1e-4)
    kept = Tiny()
    kept.load_state_dict(load_file(tmp_path / "run" / BEST))  # under its plain names
    assert mean_probability(kept) == pytest.approx(history["validation_dsc"].max(), abs=1e-6)


def test_layout_is_what_was_asked(tmp_path):
    for channels_last in (True, False):
        layouts = []

        def validate(network, layouts=layouts):
            weight = next(p for p in network.parameters() if p.ndim == 4 and min(p.shape) > 1)
            layouts.append(weight.is_contiguous(memory_format=torch.channels_last))
            return 0.5

        run(tmp_path / str(channels_last), steps=1, validate=validate, channels_last=channels_last)
        assert layouts == [channels_last]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_what_is_compiled_goes_on_after_a_break(tmp_path, monkeypatch):
    """With the compiler's front end alone: wrapped, the network must still be stored under its plain names."""
    wrap = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: wrap(model, backend="eager"))
    run(tmp_path / "whole", compile=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", compile=True, validate=breaking(2))
    run(tmp_path / "broken", compile=True)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["no compiler", "a quote in the path of the libraries"])
def test_what_cannot_be_compiled_is_refused_before_any_work(tmp_path, monkeypatch, reason):
    """Regression: PyTorch hands such a path to g++ unquoted, which ended late in a page of its compiler's words."""
    if reason == "no compiler":
        monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
        told = "InvalidCxxCompiler: No working C\\+\\+ compiler"
    else:
        monkeypatch.setattr(sysconfig, "get_config_var", lambda _name: "/plain/it's/lib")
        told = "backend='inductor' raised: "
    torch.compiler.reset()
    with pytest.raises(ValueError, match=rf"compile does not work here \({told}.* or set compile to False"):
        run(tmp_path, compile=True)
    assert not list(tmp_path.iterdir())


def train_on_noise(folder):
    """A training wide enough for PyTorch to share its sums out among threads."""
    rng = np.random.default_rng(0)
    image, label = (rng.integers(0, top, (6, 48, 48), np.uint8) for top in (256, 2))
    torch.manual_seed(5)
    network, loss = build(configuration("MetricUNet-HCP"), base_filters=8, embedding_dim=16)
    source = PatchSource([image], [label], patch_size=(48, 48), batch_size=4)
    options = {"steps": 2, "validate_every": 2, "learning_rate": 0.01, "metadata": {}}
    train(network, loss, source, folder, validate=mean_probability, **options)


@pytest.mark.slow
def test_another_thread_count_changes_rounding_alone(tmp_path):
    """Sums are cut into as many pieces as there are threads; so "the same bits" holds for one thread count."""
    train_on_noise(tmp_path / "one")
    torch.set_num_threads(2)
    try:
        train_on_noise(tmp_path / "two")
    finally:
        torch.set_num_threads(1)
    one, two = (load_file(tmp_path / name / LAST) for name in ("one", "two"))
    largest = max((one[name] - two[name]).abs().max().item() for name in one)
    print(f"largest difference of a weight between one thread and two after 2 steps: {largest:.1e}")
    assert largest < 1e-4


# A film


def test_a_film_changes_no_bit_and_a_break_leaves_no_trace_in_it(tmp_path, whole):
    def filmed(name, **options):
        film = Film(tmp_path / name, "case", IMAGE, LABEL, per_kind=5)
        return run(tmp_path / name, on_validation=film.record, **options)

    filmed("whole")
    assert_same_run(tmp_path / "whole", whole)
    assert read_film(tmp_path / "whole").steps == [0, 3, 6, 9]
    with pytest.raises(KeyboardInterrupt):
        filmed("broken", validate=breaking(3))
    assert read_film(tmp_path / "broken").steps == [0, 3, 6]
    filmed("broken")
    assert_same_run(tmp_path / "broken", whole)
    found, wanted = ({p.name: p.read_bytes() for p in (tmp_path / n / "film").iterdir()} for n in ("broken", "whole"))
    assert found == wanted


def test_a_frame_shows_the_network_as_it_was_validated(tmp_path):
    seen = []
    run(
        tmp_path,
        validate=lambda network: seen.append(mean_probability(network)) or 0.5,
        on_validation=lambda network, step: seen.append((step, mean_probability(network))),
    )
    (first, untrained), *pairs = seen
    assert first == 0 and untrained != pairs[0]
    assert pairs[1::2] == list(zip((3, 6, 9), pairs[::2], strict=True))


# Precision


@pytest.mark.parametrize(
    ("precision", "told"),
    [("fp16", "precision 'fp16' cannot be on a cpu; choose no or bf16"), ("fp8", "precision 'fp8' cannot be")],
)
def test_a_precision_that_cannot_be_is_refused_not_passed_over(tmp_path, precision, told):
    with pytest.raises(ValueError, match=told):
        run(tmp_path, precision=precision)
    assert not list(tmp_path.iterdir())


def plain_output(network):
    """What a new network with the same weights answers, and that the given one is of its class and nothing more."""
    assert network.forward.__func__ is type(network).forward
    fresh, _ = parts()
    fresh.load_state_dict(network.state_dict())
    fresh.to(memory_format=torch.channels_last)  # as training lays it out
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, wanted = network.eval()(images), fresh.eval()(images)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    return mean_probability(fresh)


def test_bf16_trains_in_bf16_and_validates_and_returns_the_plain_network(tmp_path, whole):
    network, _ = parts()
    history = run(tmp_path, network=network, precision="bf16", validate=plain_output)
    assert not history["loss"].equals(pd.read_csv(whole / HISTORY)["loss"])  # it was computed in bf16
    plain_output(network)
    best, about = load_tensors(tmp_path / BEST)
    network.load_state_dict(best)
    assert mean_probability(network) == about["validation_dsc"] == history["validation_dsc"].max()


@pytest.mark.parametrize("where", ["batch", "validation"])
def test_a_failing_training_leaves_the_network_as_it_was(tmp_path, where):
    network, _ = parts()
    source = PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=3, seed=5)
    batch = source.batch
    source.batch = lambda step: batch(step if where == "validation" or step < 4 else "four")
    with pytest.raises((TypeError, KeyboardInterrupt)):
        run(tmp_path, network=network, source=source, precision="bf16", validate=breaking(2))
    plain_output(network)


def test_trainings_of_unlike_precision_follow_each_other(tmp_path, whole):
    """In one kernel, also after another program there has set Accelerate to a precision of its own."""
    run(tmp_path / "bf16", precision="bf16", steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(accelerate.Accelerator().state), "_mixed_precision", "bf16")
        run(tmp_path / "no")
    assert_same_run(tmp_path / "no", whole)


@pytest.fixture
def with_scaler(monkeypatch):
    """The gradient scaler of fp16 on a CPU, with float32 beneath: a scale so low that rounding depends on it."""
    scalers = []

    def scaled(device, enabled):
        assert not enabled
        scalers.append(torch.amp.GradScaler(device, init_scale=2.0**-126, growth_interval=2))
        return scalers[-1]

    monkeypatch.setattr(training, "GradScaler", scaled)
    return scalers


def test_a_break_keeps_the_loss_scale(tmp_path, with_scaler):
    run(tmp_path / "whole")
    (scaler,) = with_scaler
    assert scaler.get_scale() == 2.0**-122  # it grew at every second of nine steps
    stored = load_tensors(tmp_path / "whole" / CHECKPOINT)[1]["scaler"]
    assert stored == scaler.state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", validate=breaking(2))
    run(tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert with_scaler[-1].state_dict() == scaler.state_dict()


def test_a_checkpoint_without_its_loss_scale_is_not_resumed(tmp_path, whole, with_scaler):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(
        ValueError, match=rf"{CHECKPOINT}: is no whole checkpoint \(it lacks .* loss scale\); delete it"
    ):
        run(tmp_path / "run")


@pytest.mark.slow
def test_a_lost_loss_scale_would_be_seen(tmp_path, with_scaler, monkeypatch):
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", validate=breaking(2))
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda *arguments: None)
    run(tmp_path / "broken")
    found, wanted = (load_file(tmp_path / name / LAST) for name in ("broken", "whole"))
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted)


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
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: cannot be read as a file of this suite"):
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


@pytest.mark.parametrize(
    ("choose_from", "scores", "step"),
    [(0.5, (0.9, 0.5, 0.6), 9), (0.5, (0.9, 0.6, 0.6), 6), (6 / 9, (0.9, 0.6, 0.5), 6), (1.0, (0.9, 0.8, 0.0), 9)],
)
def test_the_best_weights_are_looked_for_only_when_the_network_has_arrived(tmp_path, choose_from, scores, step):
    left = iter(scores)
    run(tmp_path, validate=lambda network: next(left), choose_from=choose_from)
    about = load_tensors(tmp_path / BEST)[1]
    assert (about["step"], about["validation_dsc"]) == (step, scores[step // 3 - 1])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_break_before_weights_may_be_the_best_leaves_no_trace(tmp_path, number):
    for name in ("whole", "broken"):
        if name == "broken":
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / name, validate=breaking(number), choose_from=0.9)
            assert not (tmp_path / name / BEST).exists()
        run(tmp_path / name, choose_from=0.9)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("choose_from", [-0.1, 1.5, float("nan")])
def test_a_share_of_the_steps_that_is_none_is_refused(tmp_path, choose_from):
    with pytest.raises(ValueError, match=f"choose_from a share of the steps, not 9, 3 and {choose_from}"):
        run(tmp_path, choose_from=choose_from)


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


@pytest.mark.slow
def test_a_row_is_the_mean_since_the_last_one(tmp_path):
    every = run(tmp_path / "a", steps=20, validate_every=20)
    by_hand = run(tmp_path / "b", steps=20, validate_every=1)
    assert every["step"].tolist() == list(range(2, 21, 2))
    means = by_hand["loss"].to_numpy().reshape(10, 2).mean(axis=1)
    np.testing.assert_allclose(every["loss"], means, rtol=1e-5)


@pytest.mark.slow
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
    history = run(tmp_path, steps=5, validate_every=1, power=0.5, validate=lambda network: 0.5)
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


def test_momentum_and_weight_decay_by_hand(tmp_path):
    """v = momentum v + gradient + decay w; w = w - rate v: no dampening, no Nesterov."""
    network, loss = parts("UNet")
    source, velocity = PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=3, seed=5), {}
    for step, rate in enumerate((0.1, 0.1 * 0.5**0.9)):
        images, labels = source.batch(step)
        network.zero_grad()
        loss(network(images), labels).total.backward()
        with torch.no_grad():
            for name, weights in network.named_parameters():
                velocity[name] = 0.8 * velocity.get(name, 0) + weights.grad + 0.05 * weights
                weights -= rate * velocity[name]
    run(tmp_path, name="UNet", steps=2, momentum=0.8, weight_decay=0.05)
    found = load_file(tmp_path / LAST)
    for name, wanted in network.named_parameters():
        torch.testing.assert_close(found[name], wanted.detach(), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_validation_that_is_no_number_ends_it(tmp_path, value):
    with pytest.raises(FloatingPointError, match=r"the validation_dsc is (nan|inf) at step 3; .* see to `validate`"):
        run(tmp_path, validate=lambda network: value)
    assert not (tmp_path / BEST).exists()


@pytest.mark.parametrize("options", [{"steps": 0}, {"validate_every": 0}])
def test_nothing_to_do_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="steps and validate_every must be at least 1"):
        run(tmp_path, **options)


@pytest.mark.parametrize(
    ("scores", "never_left"),
    [((0, 0, 0), True), ((0.75, 0, 0), True), ((0, 0.7501, 0), False), ((0.9, 0, 0.8), False)],
)
def test_a_training_whose_best_validation_is_at_most_three_quarters_never_left_the_plateau(
    tmp_path, scores, never_left
):
    left = iter(scores)
    history = run(tmp_path, validate=lambda network: next(left), validate_every=4)
    assert never_left_plateau(history) is never_left  # with rows of history between the validations
    assert never_left_plateau(pd.read_csv(tmp_path / HISTORY)) is never_left


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
        copy, cut = Cohort.read(folder / "cohort"), Regions.read(folder / "stage1")
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


def test_weights_in_the_checkpoints_place_are_refused_by_name(tmp_path, whole):
    shutil.copy(whole / LAST, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: is no whole checkpoint"):
        run(tmp_path)
