"""A full disk, or a file in a folder's place: the message names path and way out, and what was done stays as it was.

A limit on the size of files stands for the full disk: it needs no rights, and writing fails alike. The read-only
disk is a mount of its own, for root alone.
"""

import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file

from mupkg.configurations import build, configuration
from mupkg.data.build import sources_from_phantoms, write_cohort
from mupkg.data.cohort import Cohort
from mupkg.data.patches import PatchSource
from mupkg.data.preprocessing import Preparation
from mupkg.report import figures
from mupkg.scans.files import read_scan, write_image
from mupkg.scans.writing import whole_file, write_text
from mupkg.stages.runs import load_tensors, save_tensors
from mupkg.stages.training import BEST, CHECKPOINT, LAST, train

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 255, (20, 40, 40)).astype(np.int16)
WAY_OUT = r"cannot be written \(.+\); make room, or choose a folder that can be written to, and run again"


@contextmanager
def full_disk(room=8000):
    """No file can grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_csv(path):
    with whole_file(path) as temporary:
        pd.DataFrame(NOISE.reshape(-1, 40)).to_csv(temporary)


def write_array(path):
    with whole_file(path) as temporary:
        np.save(temporary, NOISE)


def write_figure(path):
    figure, axes = figures.plt.subplots()
    axes.imshow(NOISE[0])
    figures.save(figure, path)


WRITERS = {
    **dict.fromkeys(("a.nii.gz", "a.mha", "a.nrrd"), lambda path: write_image(sitk.GetImageFromArray(NOISE), path)),
    "a.nii": lambda path: write_image(sitk.GetImageFromArray(NOISE), path, compress=False),
    "a.safetensors": lambda path: save_tensors({"a": torch.zeros(9000)}, path, {}),
    "a.json": lambda path: write_text(path, "{" + " " * 9000 + "}"),
    "a.csv": write_csv,
    "a.npy": write_array,
    "a.svg": write_figure,
}


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_the_old_file_stays_whole(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match=rf"{re.escape(str(path))}: {WAY_OUT}"):
        WRITERS[name](path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_the_folders_place_is_named_and_left(tmp_path, name):
    place = tmp_path / "outputs"
    place.write_text("mine")
    with pytest.raises(OSError, match=rf"{re.escape(str(place / name))}: cannot be written \(.*: {place}\)"):
        WRITERS[name](place / name)
    assert place.read_text(encoding="utf-8") == "mine"


def training(folder, *, fill_at=None, before_validation=lambda number: None):
    """A short training; before its validation number `fill_at` the disk is full."""
    torch.manual_seed(0)
    network, loss = build(configuration("UNet"), base_filters=4, embedding_dim=4)
    label = (NOISE > 128).astype(np.uint8)
    source = PatchSource([NOISE.astype(np.uint8)], [label], patch_size=(16, 16), batch_size=2)
    calls = []

    def validate(network):
        calls.append(0)
        before_validation(len(calls))
        if len(calls) == fill_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return len(calls) / 10

    train(network, loss, source, folder, steps=6, validate=validate, validate_every=2, metadata={"a": 1})


@pytest.mark.parametrize("fill_at", [1, 2])
def test_a_training_goes_on_when_there_is_room_again(tmp_path, fill_at):
    training(tmp_path / "whole")
    with full_disk(2**40), pytest.raises(OSError, match=rf"{BEST}: {WAY_OUT}"):
        training(tmp_path / "run", fill_at=fill_at)
    if fill_at == 2:
        for name in (BEST, CHECKPOINT):
            load_tensors(tmp_path / "run" / name)
    training(tmp_path / "run")
    found, wanted = (load_file(tmp_path / name / LAST) for name in ("run", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_cohort_that_found_no_room_is_not_taken_for_whole(tmp_path):
    sources = sources_from_phantoms(range(3), (10.0, 8.0, 8.0))
    preparation = Preparation(spacing_mm=(8.0, 8.0, 8.0))
    with full_disk(), pytest.raises(OSError, match=rf"phantom-0000\.nii\.gz: {WAY_OUT}"):
        write_cohort(tmp_path, sources, preparation, split_seed=0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(ValueError, match="notebook 00 makes one"):
        Cohort.read(tmp_path)
    cohort = write_cohort(tmp_path, sources, preparation, split_seed=0)
    assert len(list(map(read_scan, (tmp_path / "images").iterdir()))) == len(cohort.table) == 3


# A read-only mount


@pytest.fixture
def read_only(tmp_path):
    """A folder on a disk of its own, which a call makes read-only, and a second call writable again."""
    place, state = tmp_path / "disk", ["rw", "ro"]
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a disk, and not in every container")

    def turn():
        subprocess.run(["mount", "-o", f"remount,{state[-1]}", place], check=True)
        state.reverse()

    yield place, turn
    subprocess.run(["umount", place], check=True)


READ_ONLY = (
    r"cannot be written \(.*[Rr]ead-only file system.*\); make room, or choose a folder that can be written to"
)


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_read_only_disk_the_old_file_stays_whole(read_only, name):
    place, turn = read_only
    WRITERS[name](place / name)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    turn()
    for path in (place / name, place / "new" / name):
        with pytest.raises(OSError, match=rf"{re.escape(str(path))}: cannot be written"):
            WRITERS[name](path)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_a_training_goes_on_when_the_disk_can_be_written_again(read_only, tmp_path):
    place, turn = read_only
    training(tmp_path / "whole")
    with pytest.raises(OSError, match=rf"{BEST}: {READ_ONLY}"):
        training(place / "run", before_validation=lambda number: number == 2 and turn())
    for name in (BEST, CHECKPOINT):
        load_tensors(place / "run" / name)
    with pytest.raises(OSError, match=READ_ONLY):
        training(place / "run")
    turn()
    training(place / "run")
    found, wanted = (load_file(folder / LAST) for folder in (place / "run", tmp_path / "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_cohort_on_a_read_only_disk_says_so(read_only):
    place, turn = read_only
    turn()
    with pytest.raises(OSError, match=READ_ONLY):
        write_cohort(
            place / "c",
            sources_from_phantoms(range(3), (10.0, 8.0, 8.0)),
            Preparation(spacing_mm=(8.0, 8.0, 8.0)),
            split_seed=0,
        )
    assert not list(place.iterdir())


def test_a_notebook_on_a_read_only_disk_says_so(read_only):
    place, turn = read_only
    turn()
    done = batch(place / "report" / "04.ipynb")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Read-only file system" in done.stderr and "room to write" in done.stderr


# The batch


def batch(target, room=None):
    limit = None if room is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    command = [sys.executable, "-m", "mupkg.batch", "notebooks/04_evaluation.ipynb", str(target), "{}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, preexec_fn=limit)


def test_a_notebook_that_finds_no_room_says_so(tmp_path):
    done = batch(tmp_path / "04.ipynb", room=4000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "File too large" in done.stderr and "room to write" in done.stderr
    assert not (tmp_path / "04.ipynb").exists()


def test_a_notebook_whose_folder_is_a_file_says_so(tmp_path):
    (tmp_path / "report").write_text("mine")
    done = batch(tmp_path / "report" / "04.ipynb")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(tmp_path / "report") in done.stderr and "check the names" in done.stderr
    assert (tmp_path / "report").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["data", "outputs"])
def test_a_study_whose_folder_is_a_file_says_so(tmp_path, name, warm):
    (tmp_path / name).write_text("mine")
    command = [*warm, "snakemake", "--configfile", "notebooks/studies/smoke.yaml", "--cores", "2"]
    command += ["--nolock", "--config", *(f"{top}_folder={tmp_path / top}" for top in ("data", "outputs"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert f"{tmp_path / name}: is a file in a folder's place; move it" in done.stdout + done.stderr
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"
