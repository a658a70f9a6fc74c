"""The exit code of a batch, and what it says of bad input from a notebook's first cell to the shell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bad_runs import RUNS
from bad_scans import CORPUS
from spoiling import ROOT, mask, scan, stored, tree

from mupkg.batch import THREAD_VARIABLES, run_notebook

# The exit code of a batch


def batch(notebook: Path, target: Path, **parameters: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mupkg.batch", str(notebook), str(target), json.dumps(parameters)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_failing_notebook_ends_with_exit_code_1_and_a_message(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise ValueError('case P7: mend it')")])
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    done = batch(tmp_path / "bad.ipynb", tmp_path / "out" / "bad.ipynb")
    assert done.returncode == 1
    assert "bad.ipynb failed: ValueError: case P7: mend it" in done.stderr and "kept for reading" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bad.failed.ipynb"]


def test_a_kernel_has_as_many_threads_as_its_notebook_is_given(tmp_path, monkeypatch):
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "7")
    code = "import torch\nfrom SimpleITK import ProcessObject\n"
    code += "print(torch.get_num_threads(), ProcessObject.GetGlobalDefaultNumberOfThreads())"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / "threads.ipynb")
    run_notebook(tmp_path / "threads.ipynb", tmp_path / "out.ipynb", {}, threads=2)
    (output,) = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs
    assert output.text.split() == ["2", "2"]


def test_a_batch_job_loads_nothing_that_its_kernel_loads_once_more_and_builds_no_grammar():
    """Regression: a newer jsonschema parsed the grammar of RFC 3987 in each job, .9 s of a processor."""
    code = "import sys, mupkg.batch; print({'torch', 'pandas', 'SimpleITK', 'rfc3987_syntax'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_notebook_that_is_none_ends_with_exit_code_1_and_a_message(tmp_path):
    (tmp_path / "bad.ipynb").write_text('{"cells": [')
    done = batch(tmp_path / "bad.ipynb", tmp_path / "out.ipynb")
    assert done.returncode == 1
    assert "bad.ipynb: cannot be run" in done.stderr and "check the names" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.ipynb").exists()


def with_good_ones(folder: Path) -> dict[str, object]:
    """Notebook 00 on the bad scan in this folder and two good ones beside it."""
    for number in (1, 2):
        stored(scan(), folder / f"good-{number}.mha")
        stored(mask(), folder / f"good-{number}_label.mha")
    return {"source": "pattern", "source_folder": str(folder)} | {
        "image_pattern": "{case}.mha",
        "label_pattern": "{case}_label.mha",
    }


def for_segmenting(folder: Path) -> dict[str, object]:
    run, scan_file = folder / "study" / "run-seed0", next((folder / "phantoms" / "images").iterdir())
    return {"run": str(run), "scan": str(scan_file), "output": str(folder / "mask.nii.gz")}


def a_series(folder: Path) -> dict[str, object]:
    return for_segmenting(folder) | {"scan": str(folder / "series")}


END_TO_END = {  # one for every way in; test_bad_scans and test_bad_runs refuse the whole corpus
    "NaN": with_good_ones,
    "a missing slice": a_series,
    "a misspelt split": lambda folder: {"source": "table", "source_folder": str(folder / "cohort")},
    "weights cut short": for_segmenting,
}


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("name", END_TO_END)
def test_a_notebook_ends_with_exit_code_1_the_file_and_the_way_out(name, tmp_path, request):
    (bad,) = (bad for bad in (*CORPUS, *RUNS) if bad.id == name)
    folder = tmp_path / "in"
    segments = END_TO_END[name] in (for_segmenting, a_series)
    if segments:
        shutil.copytree(request.getfixturevalue("trained"), folder)
    bad.make(folder)
    notebook = "09_segment_a_patient" if segments else "00_prepare_cohort"
    parameters = END_TO_END[name](folder)
    if not segments:
        parameters |= {"cohort": "cohort", "data_folder": str(tmp_path / "data")}
    (tmp_path / "report").mkdir()
    before = tree(tmp_path)
    done = batch(Path("notebooks") / f"{notebook}.ipynb", tmp_path / "report" / "bad.ipynb", **parameters)
    assert done.returncode == 1
    assert bad.named in done.stderr and bad.cure in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    after = tree(tmp_path)
    assert after.pop("report/bad.failed.ipynb")
    assert after == before
