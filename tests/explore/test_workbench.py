"""The workbench: worst case first, one click for all pictures, another case in the same panel."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from mupkg.explore.workbench import Workbench
from mupkg.report import results

SMALL = {"per_kind": 10}


@pytest.fixture(scope="module")
def study(run_folder, regions, tmp_path_factory):
    """The smoke study with its validation case tested, too, and worse than its test case."""
    folder = tmp_path_factory.mktemp("workbench") / "study"
    shutil.copytree(run_folder.parent, folder)
    (good,), (bad,) = regions.ids("test"), regions.ids("validation")
    metrics = pd.DataFrame({"case_id": [good, bad, "not at hand"], "DSC": [0.9, 0.4, 0.1]})
    metrics.to_csv(folder / run_folder.name / "metrics.csv", index=False)
    record = json.dumps({"data_fingerprint": regions.fingerprint(), "parameters": {}})
    (folder / run_folder.name / "run.json").write_text(record, encoding="utf-8")
    return folder, bad, good


@pytest.fixture(scope="module")
def bench(study):
    return Workbench(study[0], **SMALL)


def test_the_worst_case_comes_first_and_is_shown(bench, study, regions):
    _, bad, good = study
    (other,) = regions.ids("train")
    assert [case for _, case in bench.case.options] == [bad, good, other]
    assert [text for text, _ in bench.case.options] == [
        f"{bad}: DSC 0.400",
        f"{good}: DSC 0.900",
        f"{other}: DSC not tested",
    ]
    assert bench.seen.case_id == bad


def test_worst_is_the_mean_over_runs_and_a_failed_case_is_worse_than_any(regions):
    (a,), (b,), (c,) = (regions.ids(split) for split in ("train", "validation", "test"))
    rows = [("UNet", a, 0.5), ("UNet", b, 0.7), ("UNet", c, 0.0), ("H", a, 0.9), ("H", b, 0.6), ("H", c, 0.8)]
    metrics = pd.DataFrame(rows, columns=["configuration", "case_id", "DSC"]).assign(seed=0)
    ranked = results.worst_first(metrics, regions)
    assert ranked.index.tolist() == [c, b, a] and list(ranked) == ["UNet", "H"]


def test_a_click_chooses_a_voxel_and_measures_from_it_and_a_box_only_chooses(bench):
    (z, y, x), before = bench.explorer.index[0], bench.distance.voxel
    bench.seen.slice.value = int(z)
    bench.panels[0].choose((y - 2, x - 2), (y + 2, x + 2))
    assert 0 in bench.explorer.rows and bench.distance.voxel == before
    for panel in bench.panels:  # in the slices as in the distance maps
        bench.explorer.choose(np.empty(0, int))
        panel.choose((y, x), (y, x))
        assert bench.explorer.rows.tolist() == [0] and bench.distance.voxel == (z, y, x)


def test_both_pictures_tell_of_the_voxel_in_one_line(bench):
    assert bench.panels[0].words is bench.panels[1].words
    assert "distance: " in bench.panels[0].told(0, 1, 2)


def test_another_case_comes_into_the_same_panel(study):
    folder, bad, good = study
    bench = Workbench(folder, bad, **SMALL)
    pictures = bench.widget.children
    bench.case.value = good
    assert bench.seen.case_id == bench.explorer.seen.case_id == bench.distance.seen.case_id == good
    assert bench.widget.children != pictures
    names = [type(part).__name__ for part in bench.widget.children[0].children]
    assert names[:2] == ["Dropdown", "IntSlider"] and bench.seen.slice in bench.widget.children[0].children


def test_a_case_that_cannot_be_shown_is_said_and_the_one_before_stays(study, regions, monkeypatch):
    folder, bad, good = study
    bench = Workbench(folder, bad, **SMALL)
    volume = regions.volume

    def empty(self, case_id, kind="image"):
        return np.zeros_like(volume(case_id, kind)) if (case_id, kind) == (good, "label") else volume(case_id, kind)

    monkeypatch.setattr(type(regions), "volume", empty)
    bench.case.value = good
    assert f"case {good}: its region holds no prostate" in bench.explorer.found.value
    assert bench.seen.case_id == bench.explorer.seen.case_id == bad


def test_without_a_browser_it_is_a_picture_of_three_columns(bench):
    slices, feature_space, distances = bench.figure.axes
    assert "DSC" in slices.get_title() and "silhouette" in feature_space.get_title()
    assert "mean distance" in distances.get_title()


def test_a_case_that_is_not_there_is_named(study):
    with pytest.raises(ValueError, match="case 'nobody' is not in"):
        Workbench(study[0], "nobody", **SMALL)
