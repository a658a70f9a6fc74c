"""The workbench: worst case first, one click for all pictures, another case in the same panel."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from mupkg.data import Cohort
from mupkg.explore.predictions import Cases
from mupkg.explore.workbench import Workbench
from mupkg.models import UNet
from mupkg.report import results
from mupkg.stages.voxels import KINDS

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
        f"{bad} · validation · MetricUNet-HCP 0.400",
        f"{good} · test · MetricUNet-HCP 0.900",
        f"{other} · TRAINING case",
    ]
    assert bench.shown.case_id == bad


def test_a_case_that_was_not_tested_is_blank_until_it_is_opened(study, regions):
    bench = Workbench(study[0], **SMALL)
    (other,) = regions.ids("train")
    bench.case.value = other
    dsc = bench.shown.scores()["DSC"].iloc[0]
    assert [text for text, case in bench.case.options if case == other] == [
        f"{other} · TRAINING case · MetricUNet-HCP ≈ {dsc:.3f}"
    ]
    assert bench.case.value == other == bench.shown.case_id


def test_worst_is_the_mean_over_runs_and_a_failed_case_is_worse_than_any(regions):
    (a,), (b,), (c,) = (regions.ids(split) for split in ("train", "validation", "test"))
    rows = [("UNet", a, 0.5), ("UNet", b, 0.7), ("UNet", c, 0.0), ("H", a, 0.9), ("H", b, 0.6), ("H", c, 0.8)]
    metrics = pd.DataFrame(rows, columns=["configuration", "case_id", "DSC"]).assign(seed=0)
    cases = Cases(regions, {"UNet": None, "H": None}, results.per_case(metrics, "DSC"))
    assert cases.worst_first(["UNet", "H"]) == [c, b, a]


def test_a_click_chooses_a_voxel_and_measures_from_it_and_a_box_only_chooses(bench):
    (z, y, x), before = bench.index[0], bench.distance.voxel
    bench.shown.slice.value = int(z)
    bench.view.choose((y - 2, x - 2), (y + 2, x + 2))
    assert 0 in bench.rows and bench.distance.voxel == before
    for panel in (bench.view, bench.distance):  # in the slices as in the distance maps
        bench.choose(np.empty(0, int))
        panel.choose((y, x), (y, x))
        assert bench.rows.tolist() == [0] and bench.distance.voxel == (z, y, x)


def test_both_pictures_tell_of_the_voxel_in_five_lines(bench):
    assert bench.view.words is bench.distance.words
    assert bench.view.describe(0, 1, 2).splitlines()[4].startswith("distance: A ")


def test_another_case_comes_into_the_same_panel(study):
    folder, bad, good = study
    bench = Workbench(folder, bad, **SMALL)
    controls, _ = bench.widget.children
    scatters, before = bench.scatters, bench.view._images[0].value
    bench.colour.value, bench.view.threshold.value = "error", 0.3
    bench.projection.value = "t-SNE"
    bench.case.value = good
    assert bench.shown.case_id == bench.distance.case.case_id == good
    assert bench.view._images[0].value != before and bench.shown is bench.view.case
    assert bench.shown.slice in controls.children and bench.case in controls.children
    # what was chosen stays chosen
    assert bench.scatters is scatters and bench.view.threshold.value == 0.3
    assert bench.colour.value == "error" and "t-SNE" in bench.titles[0].value
    np.testing.assert_allclose(scatters[0].widget.points[:, 2], bench.table["error MetricUNet-HCP"], rtol=1e-5)


def test_a_case_that_cannot_be_shown_is_said_and_the_one_before_stays(study, regions, monkeypatch):
    folder, bad, good = study
    bench = Workbench(folder, bad, **SMALL)
    volume = regions.volume

    def empty(self, case_id, kind="image"):
        return np.zeros_like(volume(case_id, kind)) if (case_id, kind) == (good, "label") else volume(case_id, kind)

    monkeypatch.setattr(type(regions), "volume", empty)
    bench.case.value = good
    assert f"case {good}: its region holds no prostate" in bench.status.value
    assert bench.shown.case_id == bench.case.value == bad


def test_without_a_browser_it_is_a_picture_of_three_columns(bench):
    slices, feature_space, distances, *_ = bench.figure.axes
    assert "DSC" in slices.get_title() and "silhouette" in feature_space.get_title()
    assert "mean: prostate" in distances.get_title()


def test_a_case_that_is_not_there_is_named(study):
    with pytest.raises(ValueError, match="case 'nobody' is not in"):
        Workbench(study[0], "nobody", **SMALL)


def run_of_its_own(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(3, 2, 4).eval()


@pytest.fixture(scope="module")
def three(regions):
    """A workbench of three networks of one's own."""
    return Workbench(Cases(regions, {name: run_of_its_own(n) for n, name in enumerate("xyz")}), **SMALL)


def test_two_different_runs_are_compared(three):
    a, b = three.runs.lists
    assert three.runs.names == ["x", "z"] == list(three.shown.heat)
    a.value = "y"
    assert list(three.shown.heat) == ["y", "z"] and len(three.figure.axes) == 9
    b.value = "y"  # they change places
    assert three.runs.names == ["z", "y"] == list(three.shown.heat) == list(three.numbers.index)
    assert three.shown.title("y", "").startswith("B · y")
    assert [text.split(" · ")[2][0] for text, case in three.case.options if case == three.shown.case_id] == ["z"]


def test_a_single_run_has_one_list_and_one_row(bench):
    assert len(bench.runs.lists) == 1 and len(bench.widget.children[1].children[0].children) == 1


def test_a_click_on_a_point_moves_all_views_and_measures_from_it(three):
    row = int(np.flatnonzero(three.index[:, 0] != three.shown.slice.value)[0])
    three.scatters[0].widget.selection = np.array([row])
    voxel = tuple(three.index[row])
    assert three.shown.slice.value == voxel[0] and three.distance.voxel == voxel
    assert three.rows.tolist() == [row]


def test_the_neighbours_are_the_nearest_of_all_open_cases_in_the_whole_space(three, regions):
    (first,), (second,) = regions.ids("test"), regions.ids("train")
    for case_id in (first, second):
        three.case.value = case_id
    assert set(three.opened) >= {first, second}
    z, y, x = three.index[5]
    three.shown.slice.value = int(z)
    three.view.choose((y, x), (y, x))
    name = three.runs.names[1]
    near = three.neighbours.table(name)
    # by hand, case by case, over everything that was drawn
    chosen, every = three.distance.embedding(name), []
    for case_id in three.opened:
        for *place, embedding in three.drawn(case_id)[["z", "y", "x", f"embedding {name}"]].itertuples(index=False):
            if (case_id, *place) != (second, z, y, x):
                every.append((((embedding - chosen) ** 2).sum() / three.distance.scale[name], case_id, *place))
    np.testing.assert_allclose(near["distance"], [row[0] for row in sorted(every)[:10]], rtol=1e-4, atol=1e-9)
    assert len(near) == 10 and near["distance"].is_monotonic_increasing
    row = near.iloc[0]
    case = three.cases.open(row["case"], three.runs.names)
    place = tuple(row[["z", "y", "x"]])
    assert row["p"] == pytest.approx(case.heat[name][place]) and row["kind"] == KINDS[case.kind[place]]


def test_neighbours_are_shown_as_patches_that_follow_the_click(three):
    assert three.widget
    three.right.value = "neighbours"
    words = three.neighbours.words
    assert [text.value.count("<img") for text in words] == [10, 10] and "p 0" in words[0].value
    assert all(place.layout.display == "none" for place in (*three.view.pictures, *three.distance.pictures))
    before = words[0].value
    row = int(np.flatnonzero(three.table["kind"] == "far background")[0])
    three.scatters[0].widget.selection = np.array([row])
    assert words[0].value != before
    three.right.value = "distances"
    assert three._near[0].layout.display == "none" and three.view.pictures[0].layout.display == "flex"
    assert words[0].layout.display != "none"  # shown alone, they are to be seen all the same
    assert len(three.neighbours.figure.axes) == 22


def test_a_cohort_s_scans_without_a_label_are_passed_over(cohort):
    """Regression: they are in no split, and "nan is not in list" was all that was said."""
    table = cohort.table.copy()
    table.loc["unlabelled"] = table.iloc[0].to_dict() | {"split": np.nan, "label": np.nan}
    cases = Cases(Cohort(cohort.folder, table), {"mine": None})
    assert cases.worst_first(["mine"])[0] == cohort.ids("test")[0]
    assert {case_id for _, case_id in cases.listed(["mine"])} == {*cohort.table.index}


def test_a_whole_cohort_will_do_as_well(cohort):
    bench = Workbench(Cases(cohort, {"mine": run_of_its_own(0)}), **SMALL)
    (case_id,) = cohort.ids("test")
    prepared = cohort.prepared(case_id)
    bench.case.value = case_id
    assert bench.shown.region.shape == prepared.image.GetSize()[::-1]
    voxel = bench.index[0]
    expected = prepared.image.TransformIndexToPhysicalPoint([int(i) for i in voxel[::-1]])
    np.testing.assert_allclose(bench.shown.world_mm(voxel[None])[0], expected)
