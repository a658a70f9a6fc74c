"""All notebooks at smoke size, through Snakemake and papermill, none skipped; and what a failure leaves behind."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import SimpleITK as sitk
from jupyter_client.connect import LocalPortCache
from written_numbers import unfounded

from mupkg.batch import run_notebook
from mupkg.scans.cases import grid_difference
from mupkg.stages import card, segment
from mupkg.trials.protocol import Study, TrialSettings

pytestmark = pytest.mark.usefixtures("warm")
ROOT = Path(__file__).parents[2]
RUNS = ("UNet-seed0", "VNet-seed0", "BoundaryFCN-seed0", "MetricUNet-HCP-seed0")
OF_EXTRAS = {"11_nnunet.ipynb"}  # see test_notebook_11.py


def executed_notebooks(folder: Path) -> list[Path]:
    """The finished notebooks of a study; running and failed ones are left out."""
    return sorted(path for path in folder.rglob("[0-9][0-9]_*.ipynb") if path.suffixes == [".ipynb"])


@pytest.fixture(scope="module")
def snakemake(warm: list[str]) -> Callable[..., subprocess.CompletedProcess]:
    """Snakemake on a study file, with data and outputs in this folder."""

    def run(folder: Path, *options: str, file: str = "smoke", more: tuple = (), **config: object):
        folders = {"data_folder": str(folder / "data"), "outputs_folder": str(folder / "outputs"), **config}
        command = [*warm, "snakemake", "--configfile", f"notebooks/studies/{file}.yaml", *map(str, more)]
        command += ["--cores", "2", "--nolock", *options]
        command += ["--config", *(f"{name}={value}" for name, value in folders.items())]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)

    return run


@pytest.fixture(scope="module")
def study(snakemake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke study and the smoke trials, run from scans to tables and figures in a folder of their own."""
    folder = tmp_path_factory.mktemp("smoke")
    for name in ("smoke", "trials/smoke", "trials/smoke_parameters"):
        done = snakemake(folder, file=name)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.timeout(600)
def test_every_notebook_ran_to_its_end(study: Path) -> None:
    executed = {path.name for path in executed_notebooks(study)}
    assert executed == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} - OF_EXTRAS
    for path in executed_notebooks(study):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                assert cell.execution_count is not None, path.name
                assert not [output for output in cell.outputs if output.output_type == "error"]


def test_numbers_in_the_text_come_from_the_cells_or_name_their_study(study: Path) -> None:
    assert {path.name: unfounded(nbformat.read(path, 4)) for path in executed_notebooks(study)} == {
        path.name: [] for path in executed_notebooks(study)
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("The Fisher ratio is 1.25, and 12 % of the triplets are active.", []),  # as the cell below prints
        ("The Fisher ratio is 1.52, and 21 % of the triplets are active.", ["1.52", "21"]),
        ("The network has 10 810 parameters.", []),
        ("The network has 163 810 parameters.", ["163 810"]),
        ("With the paper's 32 filters it has 163 810 parameters.", []),
        ("With the paper's 32 filters it is small. It has 163 810 parameters.", ["163 810"]),
        ("On the quick phantoms the DSC is .87 and more.", []),
        ("On phantoms the DSC is .87 and more.", [".87"]),
        ("A prostate of 20 ml (Berry et al. 1984) is healthy. One of 47 ml is not.", ["47"]),
        (
            "See Eq. (12), Section 4.2, Table 11, notebook `10`, lessons 10 and 11, and readings R12 and R15 (2021).",
            [],
        ),
        ("A margin of `0.75` or $\\sigma = 0.75$, five steps, 3 slices; the cell's own 0.7 and 300 voxels.", []),
        ("| run | DSC |\n| --- | --- |\n| UNet | 0.91 |", ["0.91"]),
    ],
)
def test_a_number_that_no_cell_shows_is_told(text: str, told: list[str]) -> None:
    cell = nbformat.v4.new_code_cell(
        "margin, voxels = 0.7, 300",
        outputs=[
            nbformat.v4.new_output("stream", text="Fisher ratio 1.25\n10,810 parameters\n"),
            nbformat.v4.new_output("display_data", {"text/html": "<td>0.12</td>", "image/png": "0.91 163810 47"}),
        ],
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), cell])
    assert [number for number, _ in unfounded(notebook)] == told


def test_a_run_folder_holds_everything(study: Path) -> None:
    tests = pd.read_csv(study / "outputs/smoke/stage1/regions.csv").query("split == 'test'")["case_id"].tolist()
    for run in RUNS:
        folder = study / "outputs/smoke" / run
        metrics = pd.read_csv(folder / "metrics.csv")
        assert metrics["case_id"].tolist() == tests
        assert {"DSC", "ASD", "HD95", "DSC_all", "ASD_all"} <= set(metrics)
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert record["parameters"]["steps"] == 60
        assert record["data"]["source"] == "phantoms" and sum(record["data"]["cases"].values()) == 3
        assert (folder / "card.md").read_text(encoding="utf-8") == card(folder)
        assert {"data_fingerprint", "packages", "device", "threads", "training_seconds"} <= set(record)
        for name in ("weights", "last", "checkpoint", "localizer"):
            assert (folder / f"{name}.safetensors").stat().st_size > 1000
        assert pd.read_csv(folder / "history.csv")["step"].iloc[-1] == 60


def test_predictions_lie_on_the_scans_own_grids_and_segment_repeats_them(study: Path) -> None:
    for run in RUNS:
        paths = [*(study / "outputs/smoke" / run / "predictions").glob("*.nii.gz")]
        assert len(paths) == len(pd.read_csv(study / "outputs/smoke" / run / "metrics.csv"))
        for path in paths:
            scan = sitk.ReadImage(str(study / "data/phantoms-smoke/images" / path.name))
            prediction = sitk.ReadImage(str(path))
            assert grid_difference(scan, prediction) is None
            again = sitk.GetArrayFromImage(segment(scan, path.parents[1]))
            assert (again == sitk.GetArrayFromImage(prediction)).all()


def test_tables_are_csv_and_figures_png_and_svg(study: Path) -> None:
    report = study / "outputs/smoke/report"
    for name in (
        "cases",
        "table",
        "table_all_components",
        "trivial",
        "tests",
        "table3_rankings",
        "embedding_separation",
    ):
        assert len(pd.read_csv(report / f"{name}.csv"))
    figures = ("figure1_heatmaps", "figure5_samplers", "figure7_convergence", "figure8_contours", "embeddings")
    for name in (*figures, "scans", "boxes"):
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (report / f"{name}.svg").read_text(encoding="utf-8")


def without_its_last_case(run: Path) -> None:
    metrics = pd.read_csv(run / "metrics.csv")
    metrics.iloc[:-1].to_csv(run / "metrics.csv", index=False)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: (run / "metrics.csv").unlink(), "plans 4 runs, but HCNP-seed1001: is missing"),
        (
            without_its_last_case,
            r"HCNP-seed1001.metrics\.csv: lacks the test case\(s\) phantom-\d+; test the run again",
        ),
    ],
)
def test_a_trial_without_a_prediction_is_refused_before_any_table(spoil, told, study: Path, tmp_path: Path) -> None:
    """The protocol, or a run, lacks a part: notebook 10 names it and writes nothing."""
    trial = tmp_path / "outputs" / "smoke-trials"
    shutil.copytree(study / "outputs" / "smoke-trials", trial, ignore=shutil.ignore_patterns("report"))
    spoil(trial / "HCNP-seed1001")
    parameters = {"protocol": "notebooks/studies/trials/smoke.yaml", "data_folder": str(study / "data")}
    with pytest.raises(RuntimeError, match=told):
        run_notebook(
            ROOT / "notebooks/10_does_it_help.ipynb",
            tmp_path / "10.ipynb",
            parameters | {"outputs_folder": str(tmp_path / "outputs")},
        )
    assert not (trial / "report").exists()


def test_a_study_with_one_configuration_is_evaluated(study: Path, tmp_path: Path) -> None:
    """Regression: a KeyError where the table of tests was empty; in a batch, after the training."""
    shutil.copytree(study / "outputs" / "smoke", tmp_path / "smoke", ignore=shutil.ignore_patterns("report", "film"))
    told = {"study": "smoke", "cohort": "phantoms-smoke", "size": "smoke", "configurations": ["UNet"]}
    told |= {"data_folder": str(study / "data"), "outputs_folder": str(tmp_path)}
    run_notebook(ROOT / "notebooks/04_evaluation.ipynb", tmp_path / "04.ipynb", told)
    assert "one configuration: there is nothing to compare it with" in (tmp_path / "04.ipynb").read_text()


def told_by(notebook: Path) -> dict[str, Any]:
    return nbformat.read(notebook, 4).metadata.papermill.parameters


def test_what_overrides_a_protocol_reaches_its_notebook(study: Path, tmp_path: Path, snakemake) -> None:
    """Regression: notebook 10 read the first file, answered by it, and wrote over its tables."""
    before = {path: path.read_bytes() for path in (study / "outputs/smoke-trials/report/smoke").iterdir()}
    (tmp_path / "more.yaml").write_text("trial: {name: again, margin: 0.3, primary: ASD}\n", encoding="utf-8")
    done = snakemake(study, file="trials/smoke", more=(tmp_path / "more.yaml",), trial='{"margin": 0.25}')
    assert done.returncode == 0, done.stderr[-4000:]
    report = study / "outputs/smoke-trials/report/again"
    trial = Study.read(report / "protocol.yaml").trial
    assert (trial.name, trial.margin, trial.primary, trial.replicates) == ("again", 0.25, "ASD", 2)
    assert told_by(report / "10_does_it_help.ipynb")["protocol"] == str(report / "protocol.yaml")
    assert "primary outcome ASD, margin 0.25" in (report / "10_does_it_help.ipynb").read_text(encoding="utf-8")
    assert "ASD" in set(pd.read_csv(report / "answers.csv")["metric"])
    assert {path: path.read_bytes() for path in before} == before


def test_a_study_and_a_cohort_by_another_name_are_those_of_the_protocol(tmp_path: Path, snakemake) -> None:
    """And a change of either makes the protocol anew."""
    target = tmp_path / "outputs/other/report/smoke/protocol.yaml"
    for cohort in ("mine", "yours"):
        given = {"study": "other", "cohort": cohort, "source_folder": "/scans"}
        done = snakemake(tmp_path, str(target), file="trials/smoke", **given)
        assert done.returncode == 0, done.stderr[-4000:]
        told = Study.read(target)
        assert (told.study, told.cohort, told.source_folder) == ("other", cohort, "/scans")
        settings = TrialSettings(protocol=str(target), outputs_folder=str(tmp_path / "outputs"))
        assert settings.report_path == target.parent and settings.cohort_path.name == cohort


def test_what_is_done_is_skipped(study: Path, snakemake) -> None:
    again = snakemake(study, "--dry-run")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_cohort_prepared_anew_is_seen_by_all_that_follow(study: Path, snakemake) -> None:
    """Though its table says the same as before; and prepared as before, all is up to date again."""
    parameters = {"cohort": "phantoms-smoke", "size": "smoke", "data_folder": str(study / "data")}
    target = study / "data/phantoms-smoke/00_prepare_cohort.ipynb"
    table = (study / "data/phantoms-smoke/cohort.csv").read_bytes()
    for window, followers in (([-300.0, 500.0], {"stage1", "stage2", "evaluate"}), ([-160.0, 240.0], set())):
        run_notebook(ROOT / "notebooks/00_prepare_cohort.ipynb", target, {**parameters, "window_hu": window})
        assert (study / "data/phantoms-smoke/cohort.csv").read_bytes() == table
        plan = snakemake(study, "--dry-run").stdout
        planned = {rule for rule in ("stage1", "stage2", "evaluate") if f"rule {rule}:" in plan}
        assert planned == followers


def test_no_part_of_the_package_leaves_temporary_files(study: Path) -> None:
    assert not list(study.rglob("*.part.*"))
    assert not list(study.rglob("*.running.ipynb"))


def test_notebook_08_shows_the_shipped_pair_in_pictures_without_a_browser(tmp_path: Path) -> None:
    target = tmp_path / "08.ipynb"
    parameters = {"viewer": "itkwidgets", "pictures_folder": str(tmp_path / "pictures")}
    run_notebook(ROOT / "notebooks/08_explore.ipynb", target, parameters)
    assert target.stat().st_size < 2_000_000
    notebook = nbformat.read(target, 4)
    assert "widgets" not in notebook.metadata  # their state is stripped
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 9
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert text.count("itkwidgets works in JupyterLab only") == 1
    for name in ("workbench", "case", "embeddings", "distance", "neighbours", "samplers", "film", "cohort"):
        assert (tmp_path / "pictures" / f"explore_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "pictures" / f"explore_{name}.svg").read_text(encoding="utf-8")
    numbers = pd.read_csv(tmp_path / "pictures/explore_numbers.csv", index_col="run")
    assert numbers.index.tolist() == ["UNet", "MetricUNet-HCP"] and numbers.notna().all(axis=None)


def test_a_failed_notebook_is_kept_for_reading_and_that_of_before_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "03.ipynb"
    target.write_text("of a run before")
    with pytest.raises(RuntimeError, match=r"(?s)unknown configuration 'UNet3'.*kept for reading") as failure:
        run_notebook(ROOT / "notebooks/03_stage2_training.ipynb", target, {"configuration": "UNet3"})
    assert [path.name for path in tmp_path.iterdir()] == ["03.failed.ipynb"]
    assert "03_stage2_training.ipynb" in str(failure.value)


def test_a_kernel_that_dies_is_told_with_its_notebook(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "dies.ipynb")
    with pytest.raises(RuntimeError, match=r"(?s)dies\.ipynb failed: its kernel died, .* out of memory; .*kept for"):
        run_notebook(tmp_path / "dies.ipynb", tmp_path / "out" / "dies.ipynb", {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dies.failed.ipynb"]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_kernel_that_loses_its_port_is_started_once_more(lost: int, tmp_path: Path, monkeypatch) -> None:
    """Regression: two kernels chose one port; the notebook was not named, and its .running file stayed."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(3)")]), tmp_path / "a.ipynb")
    target, free, starts = tmp_path / "out" / "a.ipynb", LocalPortCache.find_available_port, []
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def port(cache: LocalPortCache, ip: str) -> int:
            starts.append(ip)  # five ports a start
            return taken.getsockname()[1] if (len(starts) - 1) // 5 < lost else free(cache, ip)

        monkeypatch.setattr(LocalPortCache, "find_available_port", port)
        if lost == 1:
            run_notebook(tmp_path / "a.ipynb", target, {})
            (cell,) = nbformat.read(target, 4).cells
            assert cell.outputs[0].text == "3\n"
        else:
            with pytest.raises(
                RuntimeError, match=r"(?s)a\.ipynb failed: its kernel was started twice .*kept for reading"
            ):
                run_notebook(tmp_path / "a.ipynb", target, {})
    assert len(starts) == 10
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.ipynb" if lost == 1 else "a.failed.ipynb"]


def test_a_folder_in_the_targets_place_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "04.ipynb").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: .*04\.ipynb"):
        run_notebook(ROOT / "notebooks/04_evaluation.ipynb", tmp_path / "04.ipynb", {})


def test_two_runs_go_at_once(study: Path) -> None:
    """Two trainings of the study were at work at the same time, and disturbed each other in nothing."""
    notebooks = [nbformat.read(study / "outputs/smoke" / run / "03_stage2_training.ipynb", 4) for run in RUNS]
    times = sorted((n.metadata.papermill.start_time, n.metadata.papermill.end_time) for n in notebooks)
    assert any(begun < ended for (_, ended), (begun, _) in pairwise(times))


def test_a_misspelt_parameter_fails_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"unknown parameter 'phantom'; there are: .*phantoms"):
        run_notebook(
            ROOT / "notebooks/00_prepare_cohort.ipynb",
            tmp_path / "00.ipynb",
            {"phantom": 3, "size": "smoke", "data_folder": str(tmp_path / "data")},
        )
    assert not (tmp_path / "data").exists()


def test_a_parameters_cell_with_more_than_literals_is_followed(tmp_path: Path) -> None:
    """Regression: notebook 00 ran with its defaults, and wrote over data/phantoms-quick."""
    notebook = nbformat.read(ROOT / "notebooks/00_prepare_cohort.ipynb", 4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = f"%%time\nimport os\n{cell.source}\n" + (
        "name = os.environ.get('NO_SUCH_NAME', 'mine')\nif seed == 0:\n    cohort = f'{name}-{seed}'\nprint(cohort)"
    )
    nbformat.write(notebook, tmp_path / "00.ipynb")
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "data").rglob("*")}
    parameters = {"size": "smoke", "data_folder": str(tmp_path / "data")}
    run_notebook(tmp_path / "00.ipynb", tmp_path / "out" / "00.ipynb", parameters)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine-0"]
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "data").rglob("*")} == before
    with pytest.raises(RuntimeError, match="unknown parameter 'cohrot'"):
        run_notebook(tmp_path / "00.ipynb", tmp_path / "out" / "00.ipynb", {**parameters, "cohrot": "other"})


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks/studies").glob("*.yaml")))
def test_every_study_can_be_planned(name: str, tmp_path: Path, snakemake) -> None:
    planned = snakemake(tmp_path, "--dry-run", file=name)
    assert planned.returncode == 0, planned.stderr[-2000:]
    assert "03_stage2_training.ipynb" in planned.stdout + planned.stderr


def test_a_study_file_with_a_misspelt_key_is_refused(tmp_path: Path, snakemake) -> None:
    planned = snakemake(tmp_path, "--dry-run", seedz=1)
    assert planned.returncode != 0
    assert "seedz" in planned.stdout + planned.stderr
