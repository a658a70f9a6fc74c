"""The pair that ships: it is small, whole, and as good as its record says; and how it is taken out of a study."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from mupkg.data.phantom import make_phantom
from mupkg.explore.samplers_and_film import read_films
from mupkg.explore.seen import SeenCase
from mupkg.parameters import SIZES
from mupkg.report.ship import ship
from mupkg.samplers import HardNegativeSampler
from mupkg.stages import card
from mupkg.stages.evaluation import measure
from mupkg.stages.film import Film
from mupkg.stages.inference import Pipeline
from mupkg.trials.protocol import Study

ROOT = Path(__file__).parents[2]
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
        found[case_id] = measure(pipeline(case.image).mask, case)["DSC"]
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
    seen, films = SeenCase.read(DEMO), read_films(DEMO)
    assert list(seen.networks) == list(films) == list(RUNS)
    assert seen.scores()["DSC"].min() > 0.75
    assert all({0, 5, 10, 20, 40, 80} < set(film.frames.steps) for film in films.values())


def test_the_shipped_pair_is_sure_enough_for_h_to_differ_from_r():
    """Where nothing exceeds 1 - tau every prostate voxel is hard, and H draws as R does."""
    seen = SeenCase.read(DEMO)
    z = seen.widest
    label = torch.from_numpy(seen.truth[z])[None]
    for heat in seen.heat.values():
        hard, _, _ = HardNegativeSampler().candidates(label, torch.from_numpy(heat[z])[None])
        assert 0.02 < hard.sum() / label.sum() < 0.6


def finished(run_folder, regions, tmp_path: Path, film: bool) -> Path:
    study = tmp_path / "study"
    shutil.copytree(run_folder.parent, study)
    run = study / run_folder.name
    (run / "metrics.csv").write_text("case_id,DSC\nx,1\n", encoding="utf-8")
    (run / "run.json").write_text("{}", encoding="utf-8")
    (run / "history.csv").write_text("step\n12\n", encoding="utf-8")
    if film:
        (case_id,) = regions.ids("validation")
        volumes = (np.array(regions.volume(case_id, kind)) for kind in ("image", "label"))
        from mupkg.stages.inference import load_network

        Film(run, case_id, *volumes, per_kind=5).record(load_network(run / "weights.safetensors")[0], 0)
    return study


def test_what_ships_is_all_that_is_needed(run_folder, regions, tmp_path):
    study = finished(run_folder, regions, tmp_path, film=True)
    (tmp_path / "target" / "old").mkdir(parents=True)
    ship(study, tmp_path / "target")
    shutil.rmtree(study)
    seen = SeenCase.read(tmp_path / "target")
    assert seen.case_id == regions.ids("test")[0] and not (tmp_path / "target" / "old").exists()
    assert not list((tmp_path / "target").rglob("checkpoint*"))
    shipped = tmp_path / "target" / run_folder.name
    assert (shipped / "card.md").read_text(encoding="utf-8") == card(shipped)
    (film,) = read_films(tmp_path / "target").values()
    assert film.frames.case_id == regions.ids("validation")[0]
    scan = sitk.Image(4, 4, 4, sitk.sitkInt16)
    with pytest.raises(ValueError, match="scan"):  # the pipeline loads; the scan is no scan
        Pipeline.load(tmp_path / "target" / run_folder.name)(scan)


def test_a_study_without_films_does_not_ship_and_leaves_what_was_there(run_folder, regions, tmp_path):
    study = finished(run_folder, regions, tmp_path, film=False)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    with pytest.raises(ValueError, match=r"MetricUNet-HCP-seed0/film: is missing; train the run .* film set to True"):
        ship(study, tmp_path / "target")
    assert (tmp_path / "target" / "kept").exists()


def test_a_study_is_not_replaced_by_itself(run_folder, regions, tmp_path):
    study = finished(run_folder, regions, tmp_path, film=True)
    for target in (study, tmp_path):
        with pytest.raises(ValueError, match="holds the study itself"):
            ship(study, target)
    assert (study / run_folder.name / "weights.safetensors").exists()
