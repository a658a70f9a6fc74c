"""Runs kept as small tables stand for the runs themselves, where they were told the same."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from mupkg.stages.runs import BEST, HISTORY, METRICS_CSV, RUN, save_tensors
from mupkg.trials import kept
from mupkg.trials.tables import trial_metrics, trial_runs

TOLD = {
    f"{arm}-seed{n}": {"arm": arm, "seed": n, "replicate": n, "configuration": "UNet", "size": "smoke", "steps": 30}
    for n in range(2)
    for arm in "AB"
}


def trained(folder, told, dsc=0.123456789):
    """What a finished training leaves, weights and predictions and all."""
    folder.mkdir(parents=True)
    (folder / RUN).write_text(json.dumps({"data_fingerprint": "f", "parameters": told, "collapsed": False}))
    pd.DataFrame({"case_id": ["007", "NA"], "DSC": [dsc, 0.5]}).to_csv(folder / METRICS_CSV, index=False)
    rows = {"step": [10, 30], "learning_rate": 0.1, "cross_entropy": 0.2, "validation_dsc": [np.nan, 0.4]}
    pd.DataFrame(rows | {"active_H": [0.9, 0.25]}).to_csv(folder / HISTORY, index=False)
    save_tensors({"w": torch.zeros(3)}, folder / BEST, {"made_on": ["x86_64 CPU, 1 thread(s)"]})
    (folder / "predictions").mkdir()
    (folder / "predictions" / "x.nii.gz").write_bytes(b"large")


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "repository", lambda: tmp_path)
    for name, told in TOLD.items():
        trained(tmp_path / "outputs" / "s" / name, told)
    return tmp_path / "outputs" / "s"


def test_small_tables_are_kept_and_nothing_large(study):
    names = kept.keep(study, kept.kept_folder("s"))
    assert names == sorted(TOLD)
    folder = kept.kept_folder("s") / "A-seed1"
    assert sorted(path.name for path in folder.iterdir()) == [HISTORY, METRICS_CSV, RUN]
    table = pd.read_csv(folder / METRICS_CSV, dtype={"case_id": str}, keep_default_na=False)
    assert table.to_dict("list") == {"case_id": ["007", "NA"], "DSC": [0.123457, 0.5]}
    record = json.loads((folder / RUN).read_text())
    assert record["parameters"] == TOLD["A-seed1"] and record["data_fingerprint"] == "f"
    assert record["made_on"] == ["x86_64 CPU, 1 thread(s)"] and record["processor"]


def test_a_kept_run_that_had_other_parameters_is_replaced(study):
    kept.keep(study, kept.kept_folder("s"))
    told = TOLD | {"A-seed0": TOLD["A-seed0"] | {"steps": 31}}
    (of_the_other := kept.kept_folder("s") / "A-seed0" / "metrics_noise.csv").touch()
    shutil.rmtree(study / "A-seed0")
    trained(study / "A-seed0", told["A-seed0"], dsc=0.75)
    assert kept.kept_runs("s", told, {"stage1": {}}) == {*TOLD} - {"A-seed0"}
    assert kept.keep(study, kept.kept_folder("s")) == ["A-seed0"]
    assert kept.kept_runs("s", told, {"stage1": {}}) == {*TOLD}
    assert pd.read_csv(kept.kept_folder("s") / "A-seed0" / METRICS_CSV)["DSC"].tolist() == [0.75, 0.5]
    assert not of_the_other.exists()


def test_a_kept_run_of_other_regions_is_replaced(study):
    kept.keep(study, kept.kept_folder("s"))
    record = json.loads((study / "A-seed0" / RUN).read_text())
    (study / "A-seed0" / RUN).write_text(json.dumps(record | {"data_fingerprint": "g"}))
    assert kept.keep(study, kept.kept_folder("s")) == ["A-seed0"]
    assert json.loads((kept.kept_folder("s") / "A-seed0" / RUN).read_text())["data_fingerprint"] == "g"


def test_runs_of_nnunet_are_no_arms_and_left_out(study):
    shutil.copytree(study / "A-seed0", study / "nnUNet-seed0")
    (study / "nnUNet-seed0" / BEST).unlink()
    assert kept.keep(study, kept.kept_folder("s")) == sorted(TOLD)


def test_a_broken_record_of_a_kept_run_is_named_with_a_cure_that_works(study):
    kept.keep(study, kept.kept_folder("s"))
    (broken := kept.kept_folder("s") / "A-seed0" / RUN).write_text("{")
    with pytest.raises(ValueError, match=r"A-seed0.run\.json: .*; remove its folder, and the batch trains it anew"):
        kept.kept_runs("s", TOLD, {"stage1": {}})
    shutil.rmtree(broken.parent)
    assert kept.kept_runs("s", TOLD, {"stage1": {}}) == {*TOLD} - {"A-seed0"}


def test_what_is_kept_stays_and_only_more_is_added(study):
    kept.keep(study, kept.kept_folder("s"))
    shutil.rmtree(study / "B-seed0")
    trained(study / "C-seed0", TOLD["A-seed0"] | {"arm": "C"})
    before = (kept.kept_folder("s") / "A-seed0" / METRICS_CSV).stat().st_mtime_ns
    assert kept.keep(study, kept.kept_folder("s")) == ["C-seed0"]
    assert (kept.kept_folder("s") / "A-seed0" / METRICS_CSV).stat().st_mtime_ns == before
    assert (kept.kept_folder("s") / "B-seed0" / METRICS_CSV).is_file()


def test_only_runs_that_were_told_the_same_are_taken_for_done(study):
    assert kept.kept_runs("s", TOLD, {"stage1": {}}) == set()
    kept.keep(study, kept.kept_folder("s"))
    assert kept.kept_runs("s", TOLD, {"stage1": {}}) == {*TOLD}
    longer = {name: told | {"steps": 31} for name, told in TOLD.items()}
    assert kept.kept_runs("s", longer, {"stage1": {}}) == set()
    filmed = {name: told | {"film": True, "test_last": True} for name, told in TOLD.items()}
    assert kept.kept_runs("s", filmed, {"stage1": {}}) == {*TOLD}  # what changes no weight may differ
    assert kept.kept_runs("another", TOLD, {"stage1": {}}) == set()


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({}, {"cohort": "another"}),
        ({"dice": True}, {}),  # the protocol does not name it, so its default holds
        ({"steps": 29, "learning_rate": 0.3}, {"steps": 29}),
        ({"weight_decay": 0.1}, {}),
    ],
)
def test_a_kept_run_answers_for_no_protocol_with_other_data_or_defaults(study, made, told):
    """Regression: only what the protocol wrote down was compared, and not the cohort."""
    path = study / "A-seed0" / RUN
    path.write_text(json.dumps({"data_fingerprint": "f", "parameters": TOLD["A-seed0"] | made}))
    kept.keep(study, kept.kept_folder("s"))
    asked = TOLD | {"A-seed0": TOLD["A-seed0"] | told}
    assert kept.kept_runs("s", asked, {"stage1": {}}) == {*TOLD} - {"A-seed0"}
    with pytest.raises(ValueError, match=r"A-seed0: .*; remove what was told something else"):
        trial_runs(study, asked, {})


def test_a_trial_is_read_from_kept_runs_alone_as_from_the_runs(study):
    there = trial_metrics(trial_runs(study, TOLD, {}), None)
    kept.keep(study, kept.kept_folder("s"))
    shutil.rmtree(study)
    runs = trial_runs(study, TOLD, {}, kept.kept_folder("s"))
    assert runs["kept"].all()
    pd.testing.assert_frame_equal(trial_metrics(runs, None), there, atol=1e-6)
    assert there["active_share"].unique().tolist() == [0.25]


def test_a_run_of_ones_own_is_taken_before_a_kept_one(study):
    kept.keep(study, kept.kept_folder("s"))
    shutil.rmtree(study / "A-seed0")
    runs = trial_runs(study, TOLD, {}, kept.kept_folder("s")).set_index("folder")["kept"]
    assert [path.name for path in runs.index[runs]] == ["A-seed0"]


def test_kept_runs_of_other_regions_are_refused(study):
    kept.keep(study, kept.kept_folder("s"))
    record = json.loads((study / "A-seed0" / RUN).read_text())
    (study / "A-seed0" / RUN).write_text(json.dumps(record | {"data_fingerprint": "another"}))
    shutil.rmtree(study / "B-seed0")
    with pytest.raises(ValueError, match="not trained on the same regions"):
        trial_metrics(trial_runs(study, TOLD, {}, kept.kept_folder("s")), None)


# A study's first stage


@pytest.fixture
def of_the_session(cohort, regions, tmp_path, monkeypatch):
    """The session's stage 1, kept."""
    monkeypatch.setattr(kept, "repository", lambda: tmp_path)
    assert kept.keep(regions.folder.parent, kept.kept_folder("s")) == ["stage1"]
    return kept.kept_folder("s") / "stage1"


def test_a_kept_stage_1_cuts_the_same_regions_anew(cohort, regions, of_the_session, tmp_path):
    again = kept.restore_stage1(cohort, of_the_session, tmp_path / "again" / "stage1")
    assert again.fingerprint() == regions.fingerprint()
    files = sorted(path.relative_to(again.folder) for path in again.folder.rglob("*") if path.is_file())
    assert {path.parts[0] for path in files} == {"regions", *kept.STAGE1_FILES}
    assert all((again.folder / path).read_bytes() == (regions.folder / path).read_bytes() for path in files)


def test_regions_that_come_out_otherwise_are_refused(cohort, of_the_session, tmp_path):
    table = pd.read_csv(of_the_session / "regions.csv")
    table.loc[1, "centre_z"] += 12.0
    table.to_csv(of_the_session / "regions.csv", index=False)
    with pytest.raises(ValueError, match=r"stage1: its regions, cut anew .* are not the same; remove .*stage1 and"):
        kept.restore_stage1(cohort, of_the_session, tmp_path / "again" / "stage1")
    assert not (tmp_path / "again" / "stage1" / "regions.csv").exists()
    assert not (tmp_path / "again" / "stage1" / "fingerprint.json").exists()


def test_a_cohort_of_other_volumes_is_refused_before_any_region_is_cut(cohort, of_the_session, tmp_path):
    (of_the_session / "fingerprint.json").write_text(json.dumps({"cohort": "another", "regions": "r"}))
    with pytest.raises(ValueError, match=r"was trained on other volumes than .*phantoms has"):
        kept.restore_stage1(cohort, of_the_session, tmp_path / "again" / "stage1")
    assert not (tmp_path / "again").exists()


def test_a_first_stage_stands_if_it_was_told_the_same_and_was_not_trained_here(of_the_session, tmp_path):
    record = json.loads((of_the_session / RUN).read_text())
    told = {"stage1": {"size": "smoke", "filters": 2, "coarse_mm": 8.0, "region_mm": [96.0, 120.0, 120.0]}}
    record["parameters"] |= {"size": "smoke", "filters": 2}
    (of_the_session / RUN).write_text(json.dumps(record))
    here = tmp_path / "outputs" / "s"
    assert kept.kept_stages("s", told, here) == {"stage1"}
    assert kept.kept_stages("s", {"stage1": told["stage1"] | {"filters": 3}}, here) == set()
    (here / "stage1").mkdir(parents=True)
    (here / "stage1" / "last.safetensors").touch()
    assert kept.kept_stages("s", told, here) == set()


def test_runs_stand_only_beside_a_first_stage_that_was_told_the_same(study):
    kept.keep(study, kept.kept_folder("s"))
    stage1 = kept.kept_folder("s") / "stage1"
    stage1.mkdir()
    (stage1 / "regions.csv").touch()
    (stage1 / RUN).write_text(json.dumps({"parameters": {"size": "smoke", "region_mm": [128.0, 128.0, 128.0]}}))
    (stage1 / "fingerprint.json").write_text(json.dumps({"cohort": "c", "regions": "f"}))
    told = {"stage1": {"size": "smoke"}}
    assert kept.kept_runs("s", TOLD, told) == {*TOLD}
    trial_runs(study, TOLD, told, kept.kept_folder("s"))
    other = {"stage1": {"size": "smoke", "region_mm": [96.0, 96.0, 96.0]}}
    assert kept.kept_runs("s", TOLD, other) == set()
    shutil.rmtree(study)
    with pytest.raises(ValueError, match="stage1: region_mm is"):
        trial_runs(study, TOLD, other, kept.kept_folder("s"))
    (stage1 / "fingerprint.json").write_text(json.dumps({"cohort": "c", "regions": "g"}))
    assert kept.kept_runs("s", TOLD, told) == set()


@pytest.mark.parametrize(("regions_here", "stand"), [("f", {*TOLD}), ("g", set())])
def test_a_kept_run_stands_for_one_on_the_regions_that_are_here(study, regions_here, stand):
    kept.keep(study, kept.kept_folder("s"))
    (study / "stage1").mkdir()
    (study / "stage1" / "fingerprint.json").write_text(json.dumps({"cohort": "c", "regions": regions_here}))
    assert kept.kept_runs("s", TOLD, {"stage1": {}}, study) == stand
