"""The pair that ships: it is small, whole, and as good as its record says; and how it is taken out of a study."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from mupkg.data.phantom import make_phantom
from mupkg.explore.predictions import Cases
from mupkg.explore.samplers_and_film import read_films
from mupkg.parameters import SIZES
from mupkg.samplers import HardNegativeSampler
from mupkg.stages import card
from mupkg.stages.evaluation import mask_metrics
from mupkg.stages.film import Film
from mupkg.stages.inference import Pipeline, load_network
from mupkg.trials.protocol import Study

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "data" / "demo"
RUNS = {"UNet": DEMO / "UNet-seed0", "MetricUNet-HCP": DEMO / "MetricUNet-HCP-seed0"}


def test_the_shipped_pair_is_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 2_000_000
    assert sum((folder / "weights.safetensors").stat().st_size for folder in RUNS.values()) < 400_000


@pytest.mark.parametrize("name", RUNS)
def test_the_shipped_runs_are_as_good_as_their_record_says(name):
    """Both stages, on test phantoms made anew from their seeds: what metrics.csv says, and well above trivial."""
    record = pd.read_csv(RUNS[name] / "metrics.csv", index_col="case_id")
    pipeline, found = Pipeline.load(RUNS[name]), {}
    for case_id in record.index[:4]:
        case = make_phantom(
            int(case_id.rpartition("-")[2]), spacing_mm=SIZES["quick"]["cohort"]["phantom_spacing_mm"]
        )
        found[case_id] = mask_metrics(pipeline(case.image).mask, case)["DSC"]
    # another machine's rounding may turn a voxel over
    assert found == pytest.approx(record["DSC"][:4].to_dict(), abs=0.01)
    assert record["DSC"].mean() > 0.8


def test_the_shipped_runs_are_the_committed_studys():
    import json

    import yaml

    study = Study.model_validate(yaml.safe_load((ROOT / "notebooks/studies/demo.yaml").read_text(encoding="utf-8")))
    assert list(RUNS) == list(study.configurations)
    for folder in RUNS.values():
        parameters = json.loads((folder / "run.json").read_text(encoding="utf-8"))["parameters"]
        assert {name: parameters[name] for name in study.stage2} == study.stage2
        assert pd.read_csv(folder / "history.csv")["step"].iloc[-1] == study.stage2["steps"]
        assert (folder / "card.md").read_text(encoding="utf-8") == card(folder)


def test_the_shipped_pair_can_be_explored():
    seen, films = Cases.read(DEMO).open("phantom-0005"), read_films(DEMO)
    assert list(seen.networks) == list(films) == list(RUNS)
    assert seen.scores()["DSC"].min() > 0.75
    assert all({0, 5, 10, 20, 40, 80} < set(film.frames.steps) for film in films.values())


def test_most_of_the_prostate_gets_the_probability_of_the_head_s_bias_alone():
    """What RESULTS.md (Table III, H) and notebook 08 say of the shipped pair."""
    cases = Cases.read(DEMO)
    seen = cases.open(cases.table.index[cases.table["split"] == "test"][0])
    for name, network in seen.networks.items():
        of_bias = network.head[-1].bias.detach().softmax(dim=0)[1].item()
        assert (np.abs(seen.heat[name][seen.truth] - of_bias) < 1e-4).mean() > 0.5
        assert seen.heat[name].max() < of_bias + 1e-4


def test_the_shipped_pair_is_sure_enough_for_h_to_differ_from_r():
    """Where nothing exceeds 1 - tau every prostate voxel is hard, and H draws as R does."""
    seen = Cases.read(DEMO).open("phantom-0005")
    z = seen.widest
    label = torch.from_numpy(seen.truth[z])[None]
    for heat in seen.heat.values():
        hard, _, _ = HardNegativeSampler().candidates(label, torch.from_numpy(heat[z])[None])
        assert 0.02 < hard.sum() / label.sum() < 0.6


@pytest.fixture
def repository(run_folder, regions, tmp_path: Path) -> Path:
    """A folder with the Makefile, and in its outputs/demo a stage 1 and a finished run with a film."""
    study = tmp_path / "a repository/outputs/demo"
    shutil.copytree(run_folder.parent, study)
    shutil.copy2(ROOT / "Makefile", study.parents[1])
    run = study / run_folder.name
    for name, text in {"metrics.csv": "case_id,DSC\nx,1\n", "history.csv": "step\n12\n"}.items():
        (run / name).write_text(text, encoding="utf-8")
    record = {"data_fingerprint": regions.fingerprint(), "parameters": {}}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (run / "card.md").write_text(card(run), encoding="utf-8")
    (case_id,) = regions.ids("validation")
    volumes = (np.array(regions.volume(case_id, kind)) for kind in ("image", "label"))
    Film(run, case_id, *volumes, per_kind=5).record(load_network(run / "weights.safetensors")[0], 0)
    (study / "stage1/run.json").write_text("{}", encoding="utf-8")
    (study.parents[1] / "data/demo/old").mkdir(parents=True)
    return study.parents[1]


def ship(repository: Path) -> int:
    return subprocess.run(["make", "demo-pair-files"], cwd=repository, capture_output=True, timeout=60).returncode


def test_what_ships_is_all_that_is_needed(repository, run_folder, regions):
    assert ship(repository) == 0
    shutil.rmtree(repository / "outputs")
    shipped, names = repository / "data/demo", {path.name for path in RUNS["UNet"].iterdir()}
    assert Cases.read(shipped).open().case_id == regions.ids("test")[0] and not (shipped / "old").exists()
    assert {path.name for path in (shipped / run_folder.name).iterdir()} == names
    (film,) = read_films(shipped).values()
    assert film.frames.case_id == regions.ids("validation")[0]
    scan = sitk.Image(4, 4, 4, sitk.sitkInt16)
    with pytest.raises(ValueError, match="scan"):  # the pipeline loads; the scan is no scan
        Pipeline.load(shipped / run_folder.name)(scan)


@pytest.mark.parametrize("name", ["film", "metrics.csv", "localizer.safetensors", "card.md"])
def test_a_run_that_lacks_a_part_does_not_ship_and_leaves_what_was_there(repository, run_folder, name):
    part = repository / "outputs/demo" / run_folder.name / name
    part.rename(part.with_name("elsewhere"))
    assert ship(repository) != 0
    assert (repository / "data/demo/old").exists()
