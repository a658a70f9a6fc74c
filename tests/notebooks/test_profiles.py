"""How a study runs on a machine: every profile of notebooks/studies/profiles plans it, and gives what it promises."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def plan(folder, profile, *options):
    """Snakemake's plan of the smoke study under a profile, told in full."""
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", f"notebooks/studies/profiles/{profile}"]
    command += ["--configfile", "notebooks/studies/smoke.yaml", "--nolock", "--quiet", "host", *options]
    command += ["--config", f"data_folder={folder / 'data'}", f"outputs_folder={folder / 'outputs'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def resources_of(text, rule):
    """The line of resources of the first job of a rule."""
    return next(line for line in text.split(f"rule {rule}:")[1].splitlines() if "resources:" in line)


@pytest.mark.parametrize("profile", ["laptop", "workstation", "slurm"])
def test_every_profile_plans_a_study(tmp_path, profile):
    # --executor dryrun stands in for Slurm's, which need not be installed
    options = {
        "laptop": ["--dry-run", "--cores", "2"],
        "workstation": ["--dry-run"],
        "slurm": ["--executor", "dryrun"],
    }
    text = plan(tmp_path, profile, *options[profile])
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
def test_the_slurm_plugin_takes_its_profile(tmp_path):
    assert "stage2" in plan(tmp_path, "slurm", "--dry-run")


# One GPU for every notebook


SHOW = """
import os, sys
from mupkg.report.batch import one_gpu
with one_gpu():
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    sys.stdin.read()
"""


def holders(folder, number, devices):
    """Processes that hold a GPU each, started one after the other, and what each got."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"TMPDIR": str(folder)}
    environment |= {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": ROOT}
    started = [subprocess.Popen([sys.executable, "-c", SHOW], **pipes) for _ in range(number)]
    return started, [process.stdout.readline().strip() for process in started]


def end(processes):
    for process in processes:
        process.kill()
        process.communicate()


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
    assert got == [left] and not list(tmp_path.iterdir())
