"""The workbench: worst case first, one click for all pictures, another case in the same panel."""

import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from a_case import SPACING, TRUTH
from matplotlib.colors import to_hex

from mupkg.data import Cohort
from mupkg.explore import scatters
from mupkg.explore.predictions import CasePredictions, Cases
from mupkg.explore.workbench import EmbeddingExplorer, Workbench
from mupkg.models import UNet
from mupkg.report import results
from mupkg.report.figures import CHOSEN, KIND_COLOURS, png
from mupkg.stages.voxels import KINDS, kinds

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
    assert [text.value.count("<img") for text in words] == [10, 10] and "p ." in words[0].value
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


def test_the_table_says_of_every_voxel_what_it_is(seen):
    table = EmbeddingExplorer(seen, per_kind=20, tau=0.15).table
    z, y, x = table[["z", "y", "x"]].to_numpy().T
    assert not table.duplicated(["z", "y", "x"]).any()
    assert (table["kind"] == np.array(KINDS)[kinds(TRUTH)[z, y, x]]).all()
    np.testing.assert_allclose(table["p UNet"], seen.heat["UNet"][z, y, x])
    np.testing.assert_allclose(table["error UNet"], np.abs(seen.heat["UNet"][z, y, x] - TRUTH[z, y, x]))
    assert ((table["mm to contour"] < 0) == TRUTH[z, y, x]).all()


def test_hard_voxels_are_added_and_left_out_of_the_numbers(seen):
    few, many = (EmbeddingExplorer(seen, per_kind=20, tau=tau) for tau in (1.0, 0.15))
    assert len(few.table) == 80 and len(many.table) == 100  # nothing errs by more than 1
    errors, extra = many.table[["error UNet", "error MetricUNet-H"]].max(axis=1), ~many.table["balanced"]
    assert extra.sum() == 20 and (errors[extra] > 0.15).all()
    assert few.numbers.equals(many.numbers)
    assert list(few.numbers) == ["silhouette", "Fisher ratio", "active triplets", "mean d(a, p)", "mean d(a, n)"]
    # the second network's distances are nine times the first's, which separates nothing better
    ratio = few.numbers.loc["MetricUNet-H"] / few.numbers.loc["UNet"]
    assert ratio[["mean d(a, p)", "mean d(a, n)"]].to_numpy() == pytest.approx([9, 9], rel=1e-4)
    assert ratio[["silhouette", "Fisher ratio"]].to_numpy() == pytest.approx([1, 1], rel=1e-3)


def test_what_is_chosen_lights_up_in_its_slice_and_in_every_scatter(seen):
    explorer = EmbeddingExplorer(seen, per_kind=30)
    first, second = explorer.scatters
    first.widget.selection = np.array([4, 2, 77])  # as a lasso does
    assert explorer.rows.tolist() == [2, 4, 77]
    assert sorted(first.widget.selection) == sorted(second.widget.selection) == [2, 4, 77]
    for z in range(6):
        explorer.slice.value = z
        mine = {tuple(explorer.index[r, 1:]) for r in (2, 4, 77) if explorer.index[r, 0] == z}
        assert {tuple(v) for v in explorer.view.lit} == mine
    explorer.clear.click()
    assert not len(explorer.rows) and not len(explorer.view.lit)
    assert not len(first.widget.selection) and not len(second.widget.selection)


def test_a_click_on_a_point_goes_to_its_slice_and_a_lasso_stays(seen, monkeypatch):
    explorer, places, go = EmbeddingExplorer(seen, per_kind=30), [], EmbeddingExplorer.go
    monkeypatch.setattr(EmbeddingExplorer, "go", lambda self, voxel: places.append(tuple(voxel)) or go(self, voxel))
    row = int(np.flatnonzero(explorer.index[:, 0] != explorer.slice.value)[0])
    explorer.scatters[1].widget.selection = np.array([row])
    assert explorer.slice.value == explorer.index[row, 0] and places == [tuple(explorer.index[row])]
    before = explorer.slice.value
    explorer.scatters[0].widget.selection = np.flatnonzero(explorer.index[:, 0] != before)[:2]
    assert explorer.slice.value == before and len(places) == 1


def test_a_point_under_the_mouse_is_told(seen):
    explorer = EmbeddingExplorer(seen, per_kind=30)
    explorer.scatters[0].widget.hovering = 3
    assert "voxel (z, y, x) {}, {}, {}".format(*explorer.index[3]) in explorer.words.value
    assert not explorer.scatters[0].widget.tooltip_enable  # which would lie over the points


def test_the_prostate_is_painted_last_and_points_are_translucent_where_they_are_dense(seen):
    explorer = EmbeddingExplorer(seen, per_kind=30)
    numbers = explorer.table["kind"].map(KINDS.index).to_numpy()
    assert (np.diff(numbers) <= 0).all() and numbers[-1] == 0
    assert explorer.scatters[0].widget.opacity_by == "density"


def test_a_box_chooses_all_drawn_voxels_in_it_and_a_click_the_nearest(seen):
    explorer = EmbeddingExplorer(seen, per_kind=30)
    explorer.slice.value = 2
    z, y, x = explorer.index.T
    explorer.view.choose((17.2, 21.9), (9.6, 11.4))  # dragged from the lower right to the upper left
    expected = np.flatnonzero((z == 2) & (y >= 10) & (y <= 17) & (x >= 11) & (x <= 22))
    assert len(expected) > 3 and explorer.rows.tolist() == expected.tolist()
    explorer.view.choose((3.0, 4.0), (3.2, 4.1))
    far = np.where(z == 2, np.hypot(2.0 * (y - 3), 1.0 * (x - 4)), np.inf)  # in mm: rows are 2 mm apart
    assert far[explorer.rows] == far.min()


def test_a_box_without_drawn_voxels_chooses_none(seen):
    explorer = EmbeddingExplorer(seen, per_kind=10)
    explorer.slice.value = 0  # holds no prostate, so no voxel of it is drawn
    explorer.choose(np.array([1]))
    explorer.view.choose((0, 0), (20, 20))
    assert not len(explorer.rows)
    explorer.view.choose((5, 5), (5, 5))
    assert not len(explorer.rows)


@pytest.mark.slow
@pytest.mark.parametrize("colour", ["kind", "probability", "mm to contour", "error"])
def test_colours_and_projections(seen, colour):
    explorer = EmbeddingExplorer(seen, per_kind=20)
    shown, scatter = explorer, explorer.scatters[0]
    shown.colour.value = colour
    assert (KINDS[0] in shown.legend.value) if colour == "kind" else (colour in shown.legend.value)
    assert CHOSEN in shown.legend.value and set(scatter.widget.color_selected) == {CHOSEN}
    before, coloured = explorer.points["UNet"], scatter.widget.points[:, 2].copy()
    assert len(scatter.widget.color) == len(scatter.widget.color_selected)
    column = {"probability": "p UNet", "error": "error UNet"}.get(colour, colour)
    own = explorer.table[column]
    if colour == "kind":
        steps = np.minimum((coloured * 256).astype(int), 255)
        colours = [to_hex(c) for c in np.array(scatter.widget.color)[steps]]
        assert colours == [KIND_COLOURS[KINDS.index(kind)].lower() for kind in own]
    else:
        assert np.corrcoef(coloured, own.clip(-10, 10))[0, 1] == pytest.approx(1, abs=1e-5)
    shown.projection.value = "t-SNE"
    after = explorer.points["UNet"]
    assert not np.allclose(before, after)
    shown = scatter.widget.points[:, :2]
    for axis in range(2):  # scaled to fit, nothing else
        assert np.corrcoef(shown[:, axis], after[:, axis])[0, 1] == pytest.approx(1, abs=1e-5)
        assert np.abs(shown[:, axis]).max() == pytest.approx(1 / 1.05, abs=1e-3)
    np.testing.assert_array_equal(scatter.widget.points[:, 2], coloured)
    assert not scatter.widget.transition_points  # on their way, points swallow a lasso and what is sent next
    assert png(explorer.figure).startswith(b"\x89PNG")


def test_only_projections_that_are_installed_are_offered(seen, monkeypatch):
    monkeypatch.setattr(scatters, "find_spec", lambda name: None)
    assert EmbeddingExplorer(seen, per_kind=10).projection.options == ("PCA", "t-SNE")
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ModuleNotFoundError, match="UMAP is not installed: pip install"):
        EmbeddingExplorer(seen, per_kind=10, projection="UMAP")


def test_the_axes_are_named_with_their_share_of_the_variance(seen):
    explorer = EmbeddingExplorer(seen, per_kind=30)
    values = np.stack(explorer.table["embedding UNet"])
    share = np.linalg.svd(values - values.mean(axis=0), compute_uv=False) ** 2
    assert f"PC 1 ({share[0] / share.sum():.0%})" in explorer.titles[0].value
    steps = []
    explorer.status.observe(lambda change: steps.append(change["new"]), "value")
    explorer.projection.value = "t-SNE"
    title = explorer.titles[0].value
    assert "t-SNE: gaps, sizes mean nothing" in title and "%)" not in title
    shares = [int(share) for text in steps for share in re.findall(r"t-SNE of UNet: (\d+)%", text)]
    assert len(shares) > 5 and shares == sorted(shares) and shares[-1] == 100
    assert "voxels chosen" in explorer.status.value


def test_the_chosen_voxels_are_saved_and_named_by_how_they_were_chosen(seen, tmp_path):
    explorer = EmbeddingExplorer(seen, per_kind=10, folder=tmp_path)
    explorer.choose(np.array([4, 2]), "lasso")
    explorer.keep.click()
    saved = pd.read_parquet(tmp_path / "voxels_made-up_lasso-2_UNet_MetricUNet-H.parquet")
    assert saved["run"].tolist() == ["UNet"] * 2 + ["MetricUNet-H"] * 2
    chosen = explorer.table.loc[[2, 4]]
    assert saved[["z", "y", "x"]].to_numpy().tolist() == 2 * chosen[["z", "y", "x"]].to_numpy().tolist()
    np.testing.assert_allclose(saved["probability"][2:], chosen["p MetricUNet-H"])
    assert "2 voxels written to" in explorer.status.value
    explorer.clear.click()
    assert explorer.save().name == f"voxels_made-up_all-{len(explorer.table)}_UNet_MetricUNet-H.parquet"


def test_scatters_made_later_show_what_was_chosen_before(seen):
    explorer = EmbeddingExplorer(seen, per_kind=10)
    explorer.choose(np.array([3, 9]))
    assert [sorted(s.widget.selection) for s in explorer.scatters] == [[3, 9]] * 2


def test_a_case_without_prostate_cannot_be_explored(seen):
    empty = CasePredictions("none", seen.region, np.zeros_like(TRUTH), SPACING, seen.networks, seen.heat)
    with pytest.raises(ValueError, match="case none: its region holds no prostate"):
        EmbeddingExplorer(empty)
