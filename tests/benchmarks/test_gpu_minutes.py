"""The parcel for a GPU, at smoke size, run where there is nothing but PyTorch and NumPy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pandas as pd
import pytest

HERE = Path(__file__).parent
PYTORCH = ("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions")


@pytest.fixture(scope="module")
def parcel(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parcel") / "gpu_minutes.zip"
    command = [sys.executable, str(HERE / "gpu_minutes.py"), "pack", str(path), "--size", "smoke", "--phantoms", "5"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    """A folder of packages with PyTorch, what PyTorch needs, and NumPy."""
    folder = tmp_path_factory.mktemp("machine")
    for name in ("torch", "numpy", *PYTORCH):
        for file in distribution(name).files:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution(name).locate_file(top)))
    return folder


def started(parcel: Path, machine: Path, out: Path, minutes: float) -> subprocess.CompletedProcess:
    """The parcel by a Python that sees none of the packages installed here."""
    options = ["--minutes", str(minutes), "--replicates", "1", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-S", str(parcel), "run", str(out), *options],
        env=environment | {"PYTHONPATH": str(machine), "OMP_NUM_THREADS": "1"},
        cwd=out.parent,
        capture_output=True,
        text=True,
    )


def test_the_machine_has_nothing_but_pytorch_and_numpy(machine):
    command = [sys.executable, "-S", "-c", "import torch, numpy\nimport pandas"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(machine)}, capture_output=True, text=True)
    assert "No module named 'pandas'" in done.stderr


def test_the_parcel_leaves_room_for_phantoms(parcel):
    """At 1 mm one takes 1.6 MB; of 64 MB a third is theirs."""
    with zipfile.ZipFile(parcel) as archive:
        names = archive.namelist()
    assert parcel.stat().st_size < 45e6
    of_split = [name.split("/")[1] for name in names if name.startswith("regions/")]
    assert of_split == ["train", "test", "train", "validation", "train"]
    assert not [name for name in names if name.startswith(("site/torch", "site/numpy"))]


@pytest.mark.timeout(900)
def test_trainings_until_the_time_is_up_and_on_from_there(parcel, machine, tmp_path):
    out = tmp_path / "out"
    done = started(parcel, machine, out, 0.0)
    assert done.returncode == 0 and "0 minutes are over: 0 training(s)" in done.stdout, done.stderr
    done = started(parcel, machine, out, 10)
    assert done.returncode == 0 and "minutes are over" not in done.stdout, done.stderr
    assert "loader" in (out / "bench" / "bench.txt").read_text(encoding="utf-8")
    finished = sorted(out.glob("*-seed*/metrics.csv"))
    assert [path.parent.name for path in finished] == ["HCP-seed0", "UNet-seed0"]
    for path in finished:
        assert sorted(file.name for file in path.parent.iterdir()) == ["history.csv", "metrics.csv", "run.json"]
        record = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        assert record["cases"] == {"test": 1, "train": 3, "validation": 1} and record["training_seconds"] > 0
        assert "CPU" in record["device"] and "peak_gb" not in record
        table = pd.read_csv(path)
        assert {"DSC_all", "HD95_all", "Brier"} <= {*table} and table["case_id"].tolist() == ["phantom-1000000"]
        assert pd.read_csv(path.parent / "history.csv")["step"].max() == 60
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 64e6


def test_another_python_is_refused(parcel, machine, tmp_path):
    other = tmp_path / "gpu_minutes.zip"
    with zipfile.ZipFile(parcel) as archive, zipfile.ZipFile(other, "w") as copy:
        about = json.loads(archive.read("parcel.json"))
        copy.writestr("parcel.json", json.dumps(about | {"python": "Python 2.7 on Windows AMD64"}))
        copy.writestr("__main__.py", archive.read("__main__.py"))
    done = started(other, machine, tmp_path / "out", 0.1)
    assert done.returncode == 1 and "the parcel is for Python 2.7 on Windows AMD64, this is Python 3" in done.stderr
