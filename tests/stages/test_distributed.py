"""Training by several processes: two on the CPU stand for two GPUs. Each normalises its own half of a batch.

Other processes are waited for without a limit but the suite's own, since a loaded machine may take long.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
from two_processes import SEED, parts

from mupkg.stages.runs import BEST, CHECKPOINT, HISTORY, LAST, load_tensors
from mupkg.stages.training import train

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(autouse=True, scope="module")
def _interruptible():
    """Processes started here heed SIGINT.

    A shell that starts tests in the background has them ignore it, and all their processes would inherit that. A
    handler is not inherited: they get the default.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def launch(*arguments, **options):
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # Accelerate sets more otherwise
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, env=one_thread, start_new_session=True, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trainings of two_processes.py."""
    folder = tmp_path_factory.mktemp("two")
    process = launch(folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    return folder


def ranks(folder):
    return [load_tensors(folder / f"rank{rank}.safetensors") for rank in (0, 1)]


def of_kind(tensors, kind):
    return {name: tensor for name, tensor in tensors.items() if name.startswith(kind)}


def test_the_gradient_is_the_mean_of_both_processes_own(trained):
    wanted: dict[str, torch.Tensor] = {}
    for rank in (0, 1):
        network, loss, source = parts()
        images, labels = source.batch(rank)
        seed = np.random.SeedSequence([SEED, 0, rank]).generate_state(1)
        loss(network.train()(images), labels, torch.Generator().manual_seed(int(seed[0]))).total.backward()
        for name, parameter in network.named_parameters():
            wanted[name] = wanted.get(name, 0.0) + parameter.grad / 2
    for tensors, _ in ranks(trained / "step"):
        found = of_kind(tensors, "gradient.")
        assert len(found) == len(wanted)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[f"gradient.{name}"], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["whole", "broken", "same_batch", "UNet", "MetricUNet++-H", "MetricUNet-R-Sep"])
def test_both_processes_keep_the_same_weights_and_the_first_writes_them(trained, name):
    (first, _), (second, _) = ranks(trained / name)
    weights, written = of_kind(first, "weight."), load_tensors(trained / name / LAST)[0]
    for key, tensor in weights.items():
        assert torch.equal(tensor, second[key]), key
        assert torch.equal(tensor, written[key.removeprefix("weight.")]), key
    assert {path.name for path in (trained / name).iterdir()} == {
        *(BEST, LAST, CHECKPOINT, HISTORY),
        *("rank0.safetensors", "rank1.safetensors"),
    }


def test_processes_share_the_batches_out(trained):
    (_, first), (_, second) = ranks(trained / "whole")
    assert first["asked"] == [0, 2, 4, 6, 8, 10]
    assert second["asked"] == [1, 3, 5, 7, 9, 11]


def test_draws_differ_between_processes_and_steps_on_one_and_the_same_batch(trained):
    (first, _), (second, _) = ranks(trained / "same_batch")
    for name, draws in of_kind(first, "draws.").items():
        assert not torch.equal(draws[0], second[name][0]), name  # same weights, same images: only the seed differs
        assert not torch.equal(draws[0], draws[1]), name


def test_a_break_leaves_no_trace_and_draws_repeat(trained):
    for rank in (0, 1):
        (whole, _), (broken, record) = (ranks(trained / name)[rank] for name in ("whole", "broken"))
        assert record["asked"] == [4 + rank, 6 + rank, 8 + rank, 10 + rank]  # went on behind the checkpoint at 2
        for name, tensor in of_kind(whole, "weight.").items():
            assert torch.equal(tensor, broken[name]), name
        for name, draws in of_kind(whole, "draws.").items():
            assert torch.equal(draws[2:], broken[name]), name


def test_what_made_the_weights_tells_the_number_of_processes(trained, tmp_path):
    assert load_tensors(trained / "whole" / BEST)[1]["processes"] == 2
    network, loss, source = parts()
    shutil.copytree(trained / "whole", tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(processes\)"):  # one process would take other batches
        train(
            network,
            loss,
            source,
            tmp_path / "run",
            steps=6,
            validate=lambda net: 0.0,
            validate_every=2,
            metadata={"name": "MetricUNet-HCP"},
        )


# By the launchers that people use

CELL = """
import os, socket, sys
from pathlib import Path
from accelerate import notebook_launcher
sys.path.insert(0, {here!r})
from two_processes import launched
os.environ["ACCELERATE_USE_CPU"] = "true"
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
notebook_launcher(launched, (Path({folder!r}), {steps}), num_processes=2, use_port=port)
"""


def launch_notebook(folder, **trainings):
    """papermill at work on a notebook whose cells launch two processes each."""
    here = str(SCRIPT.parent)
    cells = [CELL.format(here=here, folder=str(folder / name), steps=steps) for name, steps in trainings.items()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path = folder / "notebook.ipynb"
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "papermill", str(path), str(path), "--kernel", "python3", "--language", "python"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    outputs = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=one_thread, start_new_session=True, **outputs)


def accelerate_launch(folder, steps):
    """`accelerate launch` as on a machine with two GPUs; the CPU stands for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", port, str(SCRIPT), str(folder), "--launched", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **outputs)


def assert_same_training(found, wanted):
    for name in (LAST, BEST, *(f"rank{rank}.safetensors" for rank in (0, 1))):
        (tensors, about), (wanted_tensors, wanted_about) = (load_tensors(folder / name) for folder in (found, wanted))
        assert about == wanted_about and tensors.keys() == wanted_tensors.keys()
        assert all(torch.equal(tensors[key], wanted_tensors[key]) for key in wanted_tensors), name


def test_accelerate_launches_the_same_training(trained, tmp_path):
    launcher = accelerate_launch(tmp_path, steps=6)
    output, _ = launcher.communicate()
    assert launcher.returncode == 0, output[-4000:]
    assert_same_training(tmp_path, trained / "whole")


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch, tmp_path):
    """Without that variable notebook_launcher's processes train alone on a CPU, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    network, loss, source = parts()
    options = {"steps": 1, "validate": lambda net: 0.0, "validate_every": 1, "metadata": {}}
    with pytest.raises(ValueError, match=r"one of 2 processes sees 1; .*ACCELERATE_USE_CPU to true"):
        train(network, loss, source, tmp_path, **options)
    assert not list(tmp_path.iterdir())


# No process outlives the training


@pytest.mark.parametrize("how", ["stop button", "papermill is killed"])
def test_a_notebook_launches_the_same_training_and_no_process_survives_an_interrupt(trained, tmp_path, how):
    papermill = launch_notebook(tmp_path, short=6, endless=10**6)
    family = []
    try:
        wait_for_checkpoint(papermill, tmp_path / "endless")
        assert_same_training(tmp_path / "short", trained / "whole")
        family = psutil.Process(papermill.pid).children(recursive=True)
        kernel, *workers = family
        assert len(workers) == 2
        if how == "stop button":  # Jupyter sends it to the kernel's group
            os.killpg(os.getpgid(kernel.pid), signal.SIGINT)
        else:
            papermill.kill()  # the kernel then ends by itself
        psutil.wait_procs(workers)  # until none is left
        assert papermill.wait() != 0
        load_tensors(tmp_path / "endless" / CHECKPOINT)
    finally:
        for process in filter(psutil.Process.is_running, family):
            process.kill()
        papermill.kill()


def wait_for_checkpoint(launcher, folder):
    while not (folder / CHECKPOINT).exists():
        assert launcher.poll() is None
        time.sleep(0.1)


def endless(folder):
    """A launcher at work, and its two processes."""
    launcher = launch(folder, "--endless", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(launcher, folder)
    return launcher, psutil.Process(launcher.pid).children(recursive=True)


def endless_accelerated(folder):
    """The same by `accelerate launch`."""
    launcher = accelerate_launch(folder, steps=10**6)
    wait_for_checkpoint(launcher, folder)
    return launcher, psutil.Process(launcher.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("how", "begin"),
    [
        ("Ctrl-C", endless),
        ("Ctrl-C", endless_accelerated),
        ("the launcher is killed", endless_accelerated),
    ],
)
def test_no_process_survives_an_interrupt(tmp_path, how, begin):
    launcher, children = begin(tmp_path)
    try:
        assert len(children) == 2 if begin is endless else len(children) >= 2
        if how == "Ctrl-C":  # a terminal and Jupyter's stop button send it to the launcher and its processes alike
            os.killpg(launcher.pid, signal.SIGINT)
        else:
            launcher.kill()
        assert launcher.wait() != 0
        psutil.wait_procs(children)  # until none is left
        load_tensors(tmp_path / CHECKPOINT)
    finally:
        for child in filter(psutil.Process.is_running, children):
            child.kill()
        launcher.kill()
        if launcher.stdout:
            launcher.stdout.close()
