"""How a study runs on a machine: every profile of notebooks/studies/profiles plans it, and gives what it promises."""

import os
import subprocess
import sys
import time
import uuid
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]


def plan(warm, folder, profile, *options):
    """Snakemake's plan of the smoke study under a profile, told in full."""
    command = [*warm, "snakemake", "--workflow-profile", f"notebooks/studies/profiles/{profile}"]
    command += ["--configfile", "notebooks/studies/smoke.yaml", "--nolock", "--quiet", "host", *options]
    command += ["--config", f"data_folder={folder / 'data'}", f"outputs_folder={folder / 'outputs'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout + done.stderr


def resources_of(text, rule):
    """The line of resources of the first job of a rule."""
    return next(line for line in text.split(f"rule {rule}:")[1].splitlines() if "resources:" in line)


@pytest.mark.parametrize("profile", ["laptop", "workstation", "slurm"])
def test_every_profile_plans_a_study(tmp_path, profile, warm):
    # --executor dryrun stands in for Slurm's, which need not be installed
    options = {
        "laptop": ["--dry-run", "--cores", "2"],
        "workstation": ["--dry-run"],
        "slurm": ["--executor", "dryrun"],
    }
    text = plan(warm, tmp_path, profile, *options[profile], "--printshellcmds")
    asking = [line.split("notebooks/")[1].split()[0] for line in text.splitlines() if "--one-gpu" in line]
    assert {*asking} == {"02_stage1_localization.ipynb", "03_stage2_training.ipynb"}
    for rule in ("stage1", "stage2"):
        assert "gpu=1" in resources_of(text, rule)
    assert "gpu" not in resources_of(text, "evaluate")
    if profile == "slurm":
        assert "mem_mb=24000" in resources_of(text, "stage2") and "runtime=1440" in resources_of(text, "stage2")
        assert "mem_mb=8000" in resources_of(text, "evaluate") and "runtime=60" in resources_of(text, "evaluate")


def test_every_profile_is_tried():
    assert {path.name for path in (ROOT / "notebooks/studies/profiles").iterdir()} == {
        *("laptop", "workstation", "slurm")
    }


@pytest.mark.skipif(not find_spec("snakemake_executor_plugin_slurm"), reason="the extra `slurm` is not installed")
def test_the_slurm_plugin_takes_its_profile(tmp_path, warm):
    assert "stage2" in plan(warm, tmp_path, "slurm", "--dry-run")


# One GPU for every notebook


CELL = """
import os, pathlib, time
pathlib.Path({seen!r}).write_text(str(os.environ.get("CUDA_VISIBLE_DEVICES")) + "!")
while not pathlib.Path({go!r}).exists():
    time.sleep(0.05)
"""


def holders(folder, number, devices, *options):
    """Batches whose notebooks are at work until `folder/go` is there, and the GPUs that each one's kernel sees."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"TMPDIR": str(folder)}
    environment |= {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    started, told = [], []
    for _ in range(number):
        told.append(folder / f"seen-{uuid.uuid4().hex}")
        path = told[-1].with_suffix(".ipynb")
        cell = nbformat.v4.new_code_cell(CELL.format(seen=str(told[-1]), go=str(folder / "go")))
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
        command = [sys.executable, "-m", "mupkg.batch", str(path), str(path.with_suffix(".done.ipynb")), "{}"]
        started.append(subprocess.Popen([*command, *(options or ["--one-gpu"])], env=environment, cwd=ROOT))
    until = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in told):
        assert time.monotonic() < until
        time.sleep(0.05)
    return started, [path.read_text().removesuffix("!") for path in told]


def end(processes):
    """Kill the batches; their kernels end by themselves."""
    for process in processes:
        process.kill()
        process.wait()


def test_notebooks_at_work_have_a_gpu_each_and_a_killed_one_gives_it_back(tmp_path):
    first, got = holders(tmp_path, 2, "3, GPU-a/b")
    try:
        assert sorted(got) == ["3", "GPU-a/b"]
        more, shared = holders(tmp_path, 1, "3,GPU-a/b")
        end(more)
        assert shared == ["3"]  # all are taken: the first is shared
    finally:
        end(first)
    again, got = holders(tmp_path, 1, "3,GPU-a/b")
    end(again)
    assert got == ["3"]


@pytest.mark.parametrize(("devices", "left"), [(None, "None"), ("1", "1"), ("", "")])
def test_with_one_gpu_or_none_nothing_is_chosen(tmp_path, devices, left):
    processes, got = holders(tmp_path, 1, devices)
    end(processes)
    assert got == [left] and not list(tmp_path.glob("*.lock"))


def test_a_notebook_that_does_not_train_takes_no_gpu_from_those_that_do(tmp_path):
    processes, got = holders(tmp_path, 1, "0,1", "--threads", "1")
    end(processes)
    assert got == ["0,1"] and not list(tmp_path.glob("*.lock"))


def test_several_gpus_must_be_named(tmp_path, monkeypatch, warm):
    options = ("--dry-run", "--resources", "gpu=2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(AssertionError, match=r"gpu=2: which\? set CUDA_VISIBLE_DEVICES"):
        plan(warm, tmp_path, "workstation", *options)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert "rule stage2" in plan(warm, tmp_path, "workstation", *options)
