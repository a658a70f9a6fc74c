"""The benchmarks' own arithmetic: exponents, ratios, limits of a fresh process, and time by notebook."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bench import ON_A_GPU
from demo_by_notebook import breakdown, side_by_side
from growth import of_a_cohort, write_study
from measuring import exponent, interleaved, isolated, memory_mb, row
from metric_loss import operations
from whole_chain import PAINT_HU, find_by_grey, widened

from mupkg.data.preprocessing import Preparation
from mupkg.models import UNet, light_unet

HERE = Path(__file__).parent


@pytest.mark.parametrize("true", [-0.5, 0.0, 1.0, 2.7])
def test_an_exponent_is_that_of_the_power_law(true):
    sizes = np.array([10, 100, 1000, 7000])
    assert exponent(sizes, 3.5 * sizes**true) == pytest.approx(true, abs=1e-9)


@pytest.mark.parametrize(("sizes", "costs"), [([1], [1]), ([1, 2], [0, 1]), ([0, 2], [1, 1])])
def test_an_exponent_of_nothing_is_refused(sizes, costs):
    with pytest.raises(ValueError, match="two positive sizes"):
        exponent(sizes, costs)


def test_a_ratio_is_the_median_of_pairs_not_of_the_sides():
    found = row("work", [1.0, 2.0, 9.0], [2.0, 8.0, 3.0], "peer")
    assert (found["ratio"], found["ours_ms"], found["peer_ms"]) == (0.5, 2000, 3000)
    assert row("work", [1.0], [4.0], "peer")["ratio"] == 0.25


def test_a_matrix_product_has_two_operations_a_multiplication():
    assert operations(lambda: torch.rand(4, 5) @ torch.rand(5, 6)) == 2 * 4 * 5 * 6


@torch.no_grad()
def test_a_widened_network_says_the_same():
    torch.manual_seed(0)
    narrow, wide = light_unet(5, 8).eval(), light_unet(5, 24).eval()
    state = {name: widened(tensor, wide.state_dict()[name], 8, 24) for name, tensor in narrow.state_dict().items()}
    wide.load_state_dict(state)
    images = torch.rand(2, 5, 16, 24)
    torch.testing.assert_close(wide(images).logits, narrow(images).logits)
    assert narrow(images).logits.std() > 1e-3


@torch.no_grad()
def test_a_painted_square_is_found_by_its_grey():
    network, painted = UNet(3, 8, 16).eval(), torch.zeros(32, 32, dtype=torch.bool)
    painted[8:24, 4:20] = True
    find_by_grey(network)
    low, high = Preparation().window_hu
    images = torch.rand(1, 3, 32, 32)
    images[0, 1] = (torch.where(painted, PAINT_HU, 30.0) - low) / (high - low)
    found = network(images).logits[0].argmax(dim=0).bool()
    assert not (found & ~painted).any() and found[11:21, 7:17].all()


def test_calls_take_turns_after_a_warm_up():
    seen = []
    times = interleaved({name: lambda name=name: seen.append(name) for name in "ab"}, 2)
    assert "".join(seen) == "ab" + "abab"
    assert [len(times[name]) for name in "ab"] == [2, 2]


# What runs in a fresh process must be at a module's top.


def fills(megabytes: int) -> dict:
    kept = np.ones(megabytes * 2**20, np.uint8)
    return {"sum": int(kept[0]), "before": memory_mb("VmRSS")}


def sleeps() -> dict:
    time.sleep(60)
    return {}


def fails() -> dict:
    raise RuntimeError("a fault")


def exits() -> dict:
    os._exit(3)


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks of memory are read as on Linux")


@linux
def test_a_fresh_process_tells_its_own_peak_of_memory():
    ballast = np.ones(600 * 2**20, np.uint8)  # a parent's memory is not its child's
    small, large = isolated(fills, 10), isolated(fills, 210)
    assert ballast[0] == small["sum"] == 1
    assert large["peak_mb"] - small["peak_mb"] == pytest.approx(200, abs=30)
    assert small["peak_mb"] < 600


@linux
def test_a_process_that_hits_a_limit_says_which():
    assert isolated(fills, 3000, cap_gb=2) == {"note": "out of memory (cap 2 GB)"}
    assert isolated(sleeps, limit_s=0.1) == {"note": "over 0 s"}
    assert isolated(exits) == {"note": "ended with exit code 3"}
    with pytest.raises(RuntimeError, match=r"fails.*a fault"):
        isolated(fails)


def with_few_files_open(folder: str) -> dict:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return of_a_cohort(folder, 1)


@linux
def test_a_cohort_may_have_more_volumes_than_files_may_be_open(tmp_path):
    write_study(tmp_path, 60)  # an image and a label each
    found = isolated(with_few_files_open, str(tmp_path))
    assert found["a batch"] > 0 and 0 < found["added_mb"] < found["own_mb"]


def write_notebook(path, duration, cells, **parameters):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "metadata": {"papermill": {"duration": duration, "parameters": parameters}} if duration else {},
        "cells": [
            {"source": [f"{line}\n", "more"], "metadata": {"papermill": {"duration": took}} if took else {}}
            for line, took in cells.items()
        ],
    }
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def study(tmp_path):
    told = {"cohort": "c", "data_folder": "data"}
    write_notebook(tmp_path / "data/c/00_prepare_cohort.ipynb", 9.0, {"read": 8.0}, cohort="c")
    write_notebook(tmp_path / "outputs/s/stage1/02.ipynb", 30.0, {"import": 2, "train": 20, "# text": 0}, **told)
    write_notebook(tmp_path / "outputs/s/report/04.ipynb", 5.0, {"a": 0.5, "b": 0.25, "c": 0.75, "d": 1}, **told)
    write_notebook(tmp_path / "outputs/s/report/05.failed.ipynb", None, {"never": 0})
    return tmp_path / "outputs/s"


def test_time_by_notebook_with_the_cohorts_own_and_the_costliest_cells(study):
    notebooks, cells = breakdown(study)
    assert notebooks.to_dict("list") == {
        "notebook": ["stage1/02.ipynb", "00_prepare_cohort.ipynb", "report/04.ipynb"],
        "seconds": [30, 9, 5],
        "kernel": [8, 1, 2.5],
    }
    assert list(cells["cell"]) == ["train", "read", "import", "d", "c"]
    assert list(cells["seconds"]) == [20, 8, 2, 1, 0.75]


def test_studies_side_by_side(study, tmp_path):
    write_notebook(tmp_path / "outputs/t/stage1/02.ipynb", 15.0, {"train": 10})
    table = side_by_side([study, tmp_path / "outputs/t"])
    ratio = table[f"{tmp_path / 'outputs/t'} / {study}"]
    assert ratio["stage1/02.ipynb"] == 0.5
    assert ratio["all"] == pytest.approx(15 / 44)
    assert pd.isna(ratio["report/04.ipynb"])


def test_a_folder_without_executed_notebooks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no executed notebook; run `make study"):
        breakdown(tmp_path)


def test_what_a_gpu_is_measured_with_runs_here_too_and_needs_no_peer_and_no_scans():
    """In small; nothing is kept. With a GPU the same runs with --device cuda."""
    script = f"""
import runpy, sys
sys.modules |= dict.fromkeys({["SimpleITK", "monai", "torchio", "pytorch_metric_learning", "pydantic"]!r})
sys.path.insert(0, {str(HERE)!r})
sys.argv = ["bench.py", *{[*ON_A_GPU, "repeating"]!r}, "--quick", "--repeats", "2"]
runpy.run_path({str(HERE / "bench.py")!r}, run_name="__main__")
"""
    kept = sorted(path.name for path in (HERE / "results").iterdir())
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"{name}: " in done.stdout for name in (*ON_A_GPU, "repeating"))
    assert done.stdout.count("the same bits") == 4  # once more, resumed, one worker, two workers
    assert sorted(path.name for path in (HERE / "results").iterdir()) == kept
