"""A study killed three times, and a trial in its second arm, end with the bits of undisturbed ones.

`make soak` kills them at many more moments.
"""

import os
import shutil
import subprocess
import sys
from unittest import mock

import kill_study as kill_study_module
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from kill_study import (
    DATA,
    FIRST_ARM,
    MOMENTS,
    OUT,
    ROOT,
    RUN,
    SAME,
    SECOND_ARM,
    STAGE1,
    STUDY,
    T_DATA,
    T_OUT,
    TRIAL,
    Moment,
    alive,
    chosen,
    compared,
    differences,
    finish,
    finished,
    half_written,
    kill_study,
    says_nothing,
    wait_for,
    workplace,
    writes,
)

THREE = (  # a scan half written, weights half written, and a training between two checkpoints
    writes("00", DATA, ".making/images/*"),
    writes("02", STAGE1, "*.safetensors"),
    Moment("03", RUN, "checkpoint.safetensors"),
)
TARGETS = (f"{RUN}/metrics.csv",)


@pytest.fixture(scope="module")
def finish_warm(_warm_python):
    """`finish` for what nobody kills: it and its kernels start warm."""
    python, environment = _warm_python

    def run(folder, targets, study=STUDY):
        with mock.patch.dict(os.environ, environment):
            finish(folder, targets, study, python)

    return run


@pytest.fixture(scope="module")
def undisturbed(finish_warm, tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("undisturbed") / "study")
    finish_warm(folder, TARGETS)
    return folder


@pytest.mark.timeout(600)
def test_three_kills_leave_no_trace(undisturbed, tmp_path):
    folder = workplace(tmp_path / "study")
    kills = kill_study(folder, THREE, TARGETS)
    assert kills["met"].all() and (kills["processes"] >= 3).all(), kills  # Snakemake, papermill, kernel
    assert kills["parts"].str.contains(".part.")[:2].all(), kills
    assert (kills["half_written"] == "").all(), kills
    assert (kills["redone"] == "").all() and kills["done"].iloc[-1] > 0, kills
    assert differences(compared(folder, undisturbed)) == []
    assert says_nothing(undisturbed) == []
    assert not alive(folder)


@pytest.mark.timeout(600)
def test_a_trial_killed_in_its_second_arm_trains_nothing_twice(finish_warm, tmp_path):
    whole, killed = workplace(tmp_path / "whole"), tmp_path / "killed"
    finish_warm(whole, [f"{FIRST_ARM}/metrics.csv"], TRIAL)
    shutil.copytree(whole, killed)
    done = finished(killed)
    places = {path.relative_to(killed).parts[:3] for path in done}
    assert {place[:2] for place in places} == {tuple(place.split("/")) for place in (T_DATA, T_OUT)}
    assert {place[2] for place in places if place[0] == "outputs"} == {"stage1", FIRST_ARM.rpartition("/")[2]}
    target = [f"{SECOND_ARM}/metrics.csv"]
    finish_warm(whole, target, TRIAL)
    kills = kill_study(killed, [Moment("03", SECOND_ARM, "checkpoint.safetensors")], target, TRIAL)
    assert kills["met"].all() and (kills["half_written"] == "").all(), kills
    assert (kills["redone"] == "").all() and (kills["done"] == len(done)).all(), kills
    assert differences(compared(killed, whole)) == []
    assert not alive(killed)


def test_a_writer_stops_before_its_file_takes_its_name(tmp_path):
    """Regression: on a busy machine some files were there and gone before anybody looked."""
    folder = workplace(tmp_path / "a study")
    script = "from mupkg.scans.writing import whole_file\n"
    script += "for name in 'ab':\n    with whole_file(f'data/x/{name}.csv') as path:\n        path.write_text(name)\n"

    def start():
        environment = os.environ | {kill_study_module.MARK: str(folder)}
        return subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=environment, start_new_session=True)

    path = wait_for(folder, writes("00", "data/x", "b.csv"), start)
    assert path.name.endswith(".part.b.csv")
    assert path.read_text() in ("", "b")  # it was seen, and its writer stopped, before its text was in it or after
    assert kill_study_module.kill(folder) == 1
    assert [path.name for path in (folder / "data" / "x").glob("[!.]*")] == ["a.csv"]


TOY = f"""
import os, time
from pathlib import Path
run = Path({RUN!r})
run.mkdir(parents=True, exist_ok=True)
if (run / "03_toy.ipynb").exists():
    raise SystemExit
(run / "03_toy.running.ipynb").touch()
(run / "frame").exists() or (run / "frame").write_text("written once")
for name in ("checkpoint", "metrics.csv"):
    time.sleep(0.3)
    (run / name).write_text("a,b\\n")
time.sleep(1.5)
os.replace(run / "03_toy.running.ipynb", run / "03_toy.ipynb")
"""


def test_a_moment_that_is_past_is_made_to_come_and_after_one_that_never_does_the_next_ones_do(
    tmp_path, monkeypatch, capsys
):
    """Regression: a film's first frame was there from before, the study ran to its end, and the rest was missed."""

    def toy(folder, targets=(), study="", python=()):
        command, environment = [sys.executable, "-c", TOY], os.environ | {kill_study_module.MARK: str(folder)}
        return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)

    monkeypatch.setattr(kill_study_module, "start", toy)
    monkeypatch.setattr(kill_study_module, "half_written", lambda folder: [])
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / "frame").write_text("from before")
    moments = [Moment("03", RUN, file) for file in ("frame", "checkpoint", "absent", "frame", "metrics.csv")]
    moments.append(Moment("03", RUN, "checkpoint", 2.6))  # too late: the notebook has ended by then
    kills = kill_study(tmp_path, moments)
    assert kills["met"].tolist() == [True, True, False, True, True, True]
    assert (kills["processes"][kills["met"]] == 1).all()  # where none came, the study was about to end, or had
    assert capsys.readouterr().out.count("is past; the notebook's work is done again") == 4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kills", [10, 20, 23, 50])
def test_whatever_is_drawn_falls_into_every_notebook_and_into_a_file(kills, seed):
    moments = chosen(kills, seed)
    assert len(moments) == kills and moments == sorted(moments, key=MOMENTS.index)
    notebooks = {path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {moment.notebook for moment in moments} == notebooks - {
        "06",
        "10",
        "11",
    }  # these are of trials, and of an extra
    assert any(moment.in_a_file for moment in moments)


def test_a_study_that_says_nothing_is_noticed(undisturbed, tmp_path):
    shutil.copytree(undisturbed / RUN, tmp_path / RUN)
    assert says_nothing(tmp_path) == []
    (path,) = (tmp_path / RUN / "predictions").iterdir()
    sitk.WriteImage(sitk.ReadImage(str(path)) * 0, str(path))
    history = pd.read_csv(tmp_path / RUN / "history.csv")
    history.assign(validation_dsc=history["validation_dsc"] * 0).to_csv(tmp_path / RUN / "history.csv", index=False)
    assert [fault.split(": ")[1] for fault in says_nothing(tmp_path)] == [
        "is empty",
        "the first validation was the best",
    ]


def test_a_file_that_is_cut_or_differs_is_noticed(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    for top in ("data", "outputs"):
        for path in (p for p in (undisturbed / top).rglob("*") if p.is_file()):
            copy = folder / path.relative_to(undisturbed)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert half_written(folder) == [] and differences(compared(folder, undisturbed)) == []
    cut = [next(folder.rglob(f"*{kind}")) for kind in (".safetensors", ".nii.gz", ".mha", ".npy", ".png", ".svg")]
    cut += [folder / STAGE1 / "regions.csv", folder / RUN / "run.json", *folder.rglob("03_*.ipynb")]
    for path in cut:
        content = path.read_bytes()
        path.write_bytes(content[:-40])
        (fault,) = half_written(folder)
        assert fault.startswith(str(path.relative_to(folder))), fault
        path.write_bytes(content)
    region = next((folder / OUT).rglob("*_image.npy"))
    voxels = np.load(region)
    voxels.flat[0] += 1
    np.save(region, voxels)
    (RUN_WITHOUT := folder / RUN / "metrics.csv").unlink()
    assert differences(compared(folder, undisturbed)) == [
        f"{RUN_WITHOUT.relative_to(folder)}: is in one of them only",
        f"{region.relative_to(folder)}: differs",
    ]


def test_saved_voxels_and_protocols_are_compared_and_a_cut_file_is_noticed(tmp_path):
    """Regression: at the end of a study, a file of notebook 08 and one of a trial were of no kind known here."""
    (outputs := tmp_path / "outputs").mkdir()
    pd.DataFrame({"probability": [0.5, 0.25]}).to_parquet(outputs / "voxels.parquet")
    shutil.copy(ROOT / "notebooks" / "studies" / f"{TRIAL}.yaml", outputs / "protocol.yaml")
    assert half_written(tmp_path) == [] and compared(tmp_path, tmp_path)["outcome"].tolist() == [SAME, SAME]
    for path in outputs.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-40])
        (fault,) = half_written(tmp_path)
        assert fault.startswith(f"outputs/{path.name}")
        path.write_bytes(content)
