"""Notebook 11 with the real nnU-Net, where the extra is installed; without it, the way out before any work."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from written_numbers import unfounded

from mupkg.batch import run_notebook
from mupkg.report import results

NOTEBOOK = Path(__file__).parents[2] / "notebooks/11_nnunet.ipynb"


def parameters(cohort, regions) -> dict[str, str]:
    study = regions.folder.parent
    places = {"data_folder": str(cohort.folder.parent), "outputs_folder": str(study.parent)}
    return {"study": study.name, "cohort": cohort.folder.name, "size": "smoke", **places}


@pytest.mark.skipif(bool(find_spec("nnunetv2")), reason="nnU-Net is installed")
def test_without_nnunet_it_stops_before_any_work(cohort, regions, tmp_path):
    with pytest.raises(RuntimeError, match=r'no nnunetv2 is installed .* pip install .*"\.\[nnunet\]"'):
        run_notebook(NOTEBOOK, tmp_path / "11.ipynb", parameters(cohort, regions))
    assert not list(regions.folder.parent.glob("nnunet*"))


@pytest.mark.skipif(not find_spec("nnunetv2"), reason="nnunetv2, the extra `nnunet`, is not installed")
@pytest.mark.timeout(1200)
def test_nnunet_with_and_without_the_branch_comes_to_rows_beside_ours(cohort, regions, run_folder, tmp_path):
    run_notebook(NOTEBOOK, tmp_path / "11.ipynb", parameters(cohort, regions))
    assert unfounded(nbformat.read(tmp_path / "11.ipynb", 4)) == []
    study = regions.folder.parent
    losses = []
    for name in ("nnUNet", "nnUNet-HCP"):
        run = study / f"{name}-seed0"
        assert pd.read_csv(run / "metrics.csv")["case_id"].tolist() == regions.ids("test")
        record = json.loads((run / "run.json").read_bytes())
        assert record["parameters"]["configuration"] == name and record["parameters"]["epochs"] == 2
        assert record["plans"]["used"]["features_per_stage"][0] == 4
        assert record["plans"]["planned"]["features_per_stage"][0] == 32
        log = (run / "nnunet.log").read_text(encoding="utf-8")
        losses.append([line.split()[-1] for line in log.splitlines() if "train_loss" in line])
        losses.append([line.split()[-1] for line in log.splitlines() if "val_loss" in line])
    assert len(losses[0]) == 2
    assert float(losses[2][0]) > float(losses[0][0])  # the branch's loss, of the same weights and patches
    ours = run_folder.name.rpartition("-seed")[0]
    runs = results.finished_runs(study, ["nnUNet", "nnUNet-HCP"])
    assert len(results.case_metrics(runs, regions)) == 2 * len(regions.ids("test"))
    assert set(results.finished_runs(study)["configuration"]) == {ours}  # where nobody asks for nnU-Net's
