"""A sampler, a metric and a backbone that are registered, and nothing else, go all the way through a study."""

import json
import shutil
import subprocess
import sys

import pandas as pd
from spoiling import ROOT

# What somebody would add to samplers.py, metrics.py and models.py; then the cells of the notebooks, one by one.
SCRIPT = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
from mupkg.metrics import METRICS, Metric
from mupkg.models import BACKBONES, Backbone, UNet
from mupkg.samplers import SAMPLERS, Sampler, contour


class BorderSampler(Sampler):
    letter, title = "B", "anchors on the contour, positives inside"

    def candidates(self, labels, foreground_probability=None):
        edge = contour(labels)
        return edge, (labels == 1) & ~edge, labels == 0


class Toy(UNet):
    pass


SAMPLERS["B"] = BorderSampler
METRICS["voxels_off"] = Metric(lambda m: abs(m.voxels[0] - m.voxels[1]), -1, "voxels", 0, headline=7)
BACKBONES["Toy"] = Backbone(Toy, metric=True)
shell = InteractiveShell.instance()
for notebook, parameters in json.loads(sys.argv[1]):
    shell.reset(new_session=True)
    with open(f"notebooks/{notebook}.ipynb", encoding="utf-8") as file:
        cells = [cell for cell in json.load(file)["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        shell.run_cell("".join(cell["source"]), store_history=True).raise_error()
        if "parameters" in cell["metadata"].get("tags", []):
            told = [f"{name} = {value!r}" for name, value in parameters.items()]
            shell.run_cell("\\n".join(told), store_history=True).raise_error()
"""


def test_a_toy_sampler_metric_and_backbone_run_through_notebooks_03_and_04(cohort, regions, tmp_path):
    study = tmp_path / "outputs" / "toy"
    shutil.copytree(regions.folder, study / "stage1")
    folders = {"data_folder": str(cohort.folder.parent), "outputs_folder": str(tmp_path / "outputs")}
    told = {"study": "toy", "cohort": cohort.folder.name, "size": "smoke"} | folders
    names = ["UNet", "MetricToy-BH"]
    notebooks = [("03_stage2_training", told | {"configuration": name}) for name in names]
    notebooks.append(("04_evaluation", told | {"configurations": [names[0], "MetricToy-HB"]}))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(notebooks)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run = study / "MetricToy-HB-seed0"  # letters in the order of the registry
    assert {"metric_H", "metric_B"} <= set(pd.read_csv(run / "history.csv"))
    tested = pd.read_csv(run / "metrics.csv")
    assert {"voxels_off", "voxels_off_all"} <= set(tested) and tested["voxels_off"].ge(0).all()
    table = pd.read_csv(study / "report" / "table.csv", header=[0, 1], index_col=0)
    assert table["voxels_off", "mean"]["MetricToy-HB"] == tested["voxels_off"].mean()
    (row,) = pd.read_csv(study / "report" / "tests.csv").query("metric == 'voxels_off'").to_dict("records")
    assert row["configuration"] == "MetricToy-HB" and row["against"] == "UNet"
    assert "| voxels_off (voxels) |" in (run / "card.md").read_text(encoding="utf-8")
