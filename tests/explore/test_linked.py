"""The views' states, without a browser (tests/lab drives them in one): what is chosen, cut, measured."""

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

from mupkg.explore import predictions, scatters
from mupkg.explore.panels import CaseViewer, DistanceMap
from mupkg.explore.predictions import CasePredictions, Cases
from mupkg.explore.workbench import EmbeddingExplorer
from mupkg.models import EmbeddingTap, SegmentationOutput, UNet
from mupkg.report.figures import CHOSEN, KIND_COLOURS, png
from mupkg.stages import voxels
from mupkg.stages.inference import load_network
from mupkg.stages.prediction import predict_volume
from mupkg.stages.runs import BEST
from mupkg.stages.voxels import KINDS, embed_slice, embed_voxels, kinds

SPACING = (3.0, 2.0, 1.0)
TRUTH = np.zeros((6, 24, 30), bool)
TRUTH[1:5, 8:18, 10:22] = True


class Places(nn.Module):
    """Embeddings (row, column): distances in feature space are distances in the picture."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in images.shape[2:]), indexing="ij")
        embeddings = torch.stack([rows, columns]).expand(len(images), 2, *rows.shape) * self.scale
        return SegmentationOutput(torch.zeros(len(images), 2, *rows.shape), embeddings)


@pytest.fixture
def seen() -> CasePredictions:
    """Two runs: one nearly right, one a voxel off to the right and unsure on slice 3."""
    region = np.random.default_rng(0).integers(0, 256, TRUTH.shape).astype(np.uint8)
    sure, shifted = TRUTH * 0.9, np.roll(TRUTH, 1, axis=2) * 0.8
    shifted[3] *= 0.5
    heat = {"UNet": sure.astype(np.float32), "MetricUNet-H": shifted.astype(np.float32)}
    return CasePredictions("made up", region, TRUTH, SPACING, {"UNet": Places(), "MetricUNet-H": Places(3.0)}, heat)


def test_embeddings_are_shown_at_unit_length_if_the_loss_took_them_so():
    images = torch.rand(2, 3, 8, 8)
    for told, unit in (({"loss": {"normalize": True}}, True), ({"loss": {"normalize": False}}, False), ({}, False)):
        torch.manual_seed(0)
        network = predictions._as_the_loss_sees_it(UNet(3, 2, 4).eval(), told)
        lengths = network(images).embeddings.norm(dim=1)
        assert torch.allclose(lengths, torch.ones(()), atol=1e-5) == unit


@pytest.mark.slow
def test_a_case_is_read_with_its_runs(regions, run_folder, tmp_path):
    shutil.copytree(run_folder.parent, tmp_path / "study")
    run_folder = tmp_path / "study" / run_folder.name
    (case_id,) = regions.ids("test")
    (run_folder / "metrics.csv").write_text(f"case_id,DSC\n{case_id},0.5\n", encoding="utf-8")
    record = json.dumps({"data_fingerprint": regions.fingerprint(), "parameters": {}})
    (run_folder / "run.json").write_text(record, encoding="utf-8")
    cases = Cases.read(run_folder.parent)
    seen = cases.open(case_id)
    assert seen.case_id == case_id and list(seen.networks) == ["MetricUNet-HCP"] and seen.split == "test"
    np.testing.assert_array_equal(seen.truth, regions.volume(case_id, "label") == 1)
    assert seen.spacing_mm == (6.0, 5.0, 5.0) and seen.heat["MetricUNet-HCP"].shape == seen.region.shape
    network = seen.networks["MetricUNet-HCP"]
    np.testing.assert_array_equal(seen.heat["MetricUNet-HCP"], predict_volume(network, seen.region))
    index = np.array([[2, 5, 7], [0, 1, 2], [2, 3, 3]])
    np.testing.assert_allclose(  # what the prediction computed is what running the slices again gives
        seen.embed("MetricUNet-HCP", index), embed_voxels(network, seen.region, index), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"case 'nobody' is not in .*; there are phantom"):
        cases.open("nobody")
    with pytest.raises(ValueError, match=r"no finished run of any configuration with seed 7"):
        Cases.read(run_folder.parent, seed=7)


def test_nothing_is_run_again_for_embeddings_or_a_case_that_was_open(regions, run_folder, monkeypatch):
    runs = []
    network, _ = load_network(run_folder / BEST)
    network.register_forward_hook(lambda *_: runs.append(1))
    cases = Cases(regions, {"mine": network})
    explorer = EmbeddingExplorer(cases.open(), per_kind=10)
    passes = len(runs)
    assert passes and np.stack(explorer.table["embedding mine"]).shape[1] == 4
    DistanceMap(explorer.shown)
    cases.open(explorer.shown.case_id)
    assert len(runs) == passes
    monkeypatch.setattr(voxels, "EMBEDDINGS_KEPT", 0)  # embeddings that are too large to keep are made when needed
    large = Cases(regions, {"mine": network}).open()
    kept = np.stack(explorer.table["embedding mine"])
    np.testing.assert_allclose(large.embed("mine", explorer.index), kept, rtol=1e-4, atol=1e-5)


def test_a_place_in_mm_is_the_scans_own(seen, regions):
    assert seen.world_mm(np.array([[1, 2, 3]])).tolist() == [[3.0, 4.0, 3.0]]
    (case_id,) = regions.ids("test")
    image = regions.image(case_id)
    case = replace(seen, grid=image, spacing_mm=image.GetSpacing()[::-1])
    expected = image.TransformIndexToPhysicalPoint((4, 3, 2))
    np.testing.assert_allclose(case.world_mm(np.array([[2, 3, 4]]))[0], expected)


def test_scores_follow_the_threshold(seen):
    by_hand = 2 * (TRUTH & np.roll(TRUTH, 1, axis=2)).sum() / (2 * TRUTH.sum())
    assert seen.scores(0.3)["DSC"].to_numpy() == pytest.approx([1, by_hand])
    assert seen.scores(0.5).loc["MetricUNet-H", "DSC"] < by_hand  # slice 3 is gone
    assert seen.scores(0.3).loc["MetricUNet-H", "HD95"] == pytest.approx(1.0)  # a voxel along x is 1 mm
    assert seen.scores(0.95)["DSC"].tolist() == [0, 0] and np.isinf(seen.scores(0.95)["HD95"]).all()


def test_the_worst_slice_has_most_wrong_voxels_over_all_runs(seen):
    assert seen.worst_slice(0.5) == 3
    wrong = [sum(((h[z] > 0.3) != TRUTH[z]).sum() for h in seen.heat.values()) for z in range(6)]
    assert seen.worst_slice(0.3) == int(np.argmax(wrong)) == 1


def test_distance_to_the_contour_is_in_mm_and_negative_inside(seen):
    distance = seen.distance_mm
    assert distance[2, 12, 9] == pytest.approx(1.0) and distance[2, 12, 10] == pytest.approx(-1.0)
    assert distance[2, 7, 15] == pytest.approx(2.0) and distance[0, 12, 15] == pytest.approx(3.0)
    assert ((distance < 0) == TRUTH).all()


@pytest.mark.slow
def test_the_viewer_draws_anew_and_jumps(seen):
    view = CaseViewer(seen, "slices")
    assert view.slice.value in range(1, 5)
    first = png(view.figure)
    view.threshold.value = 0.3
    assert view.scores["DSC"].iloc[1] == pytest.approx(seen.scores(0.3)["DSC"].iloc[1])
    second = png(view.figure)
    assert first != second and "DSC 1.000" in view.titles[0]
    view.threshold.value = 0.5
    view.worst.click()
    assert view.slice.value == 3 and png(view.figure) != second
    assert view.widget
    before = view._images[0].value
    view.opacity.value = 0.9
    assert view._images[0].value != before


def test_one_slider_moves_all_views_of_a_case(seen):
    view, explorer, distance = CaseViewer(seen, "slices"), EmbeddingExplorer(seen, per_kind=10), DistanceMap(seen)
    views = view, explorer.view, distance
    assert view.slice is explorer.slice is distance.slice
    for panel in views:
        assert panel.pictures
    before = [panel._images[0].value for panel in views]
    explorer.slice.value = 3
    assert all(panel._images[0].value != was for panel, was in zip(views, before, strict=True))


def test_a_voxel_is_described_by_what_it_is_and_what_is_said_of_it(seen):
    said = seen.describe(2, 12, 9)  # a voxel beside the prostate
    assert said.splitlines() == [
        "voxel (z, y, x) 2, 12, 9",
        "x 9.00, y 24.00, z 6.00 mm",
        "near background, +1.00 mm",
        "probability: A 0.00, B 0.00",
    ]
    assert "far background" in seen.describe(0, 12, 9)  # its slice has no prostate
    assert "TRAINING" in replace(seen, split="train").describe(2, 12, 9)


def test_a_mask_with_islands_says_so_and_a_training_case_is_marked_beside_every_number(seen):
    heat = {name: heat.copy() for name, heat in seen.heat.items()}
    heat["UNet"][5, 22, 28] = 1.0
    heat["MetricUNet-H"][:] = 0.9 * TRUTH
    case = replace(seen, heat=heat, split="train")
    view, explorer, distance = CaseViewer(case, "slices"), EmbeddingExplorer(case, per_kind=5), DistanceMap(case)
    assert case.scores()["islands"].tolist() == [1, 0]
    assert "with 1 island" in view.titles[0] and "island" not in view.titles[1]
    titles = [*view.titles, *distance.titles, *(t.value for t in explorer.titles)]
    assert len(titles) == 6 and all("TRAINING case" in title for title in titles)
    assert "TRAINING case" in explorer.measured.value
    assert "TRAINING" not in "".join(CaseViewer(seen, "slices").titles)


def test_the_embeddings_of_a_slice_are_the_networks(seen):
    expected = embed_slice(seen.networks["MetricUNet-H"], seen.region, 3)
    np.testing.assert_array_equal(seen.embedding("MetricUNet-H", 3), expected)
    assert seen.embedding("MetricUNet-H", 3) is seen.embedding("MetricUNet-H", 3)


def test_any_network_and_any_layer_can_be_seen(seen):
    class Own(nn.Module):
        """Returns logits alone, as networks of other libraries do."""

        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)

        def forward(self, images):
            return self.head(torch.relu(self.inner(images)))

    own = Own().eval()
    tap = EmbeddingTap(own, "inner")
    heat = {"own": predict_volume(tap, seen.region)}
    mine = CasePredictions("mine", seen.region, TRUTH, SPACING, {"own": tap}, heat)
    assert mine.embedding("own", 2).shape == (24, 30, 5)
    assert len(EmbeddingExplorer(mine, per_kind=10).table["embedding own"][0]) == 5
    tapped = mine.tapped("network.head")
    assert tapped.embedding("own", 2).shape == (24, 30, 2) and tapped.heat is mine.heat
    with pytest.raises(ValueError, match="no layer named 'innner'"):
        mine.tapped("innner")


def test_an_unknown_viewer_is_refused(seen):
    with pytest.raises(ValueError, match="niivue, slices or itkwidgets, not 'vtk'"):
        CaseViewer(seen, "vtk")


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


def test_the_distance_map_is_the_squared_distance_over_the_runs_own_scale(seen):
    view = DistanceMap(seen)
    view.slice.value = 2
    view.measure_from((2, 5, 7))
    rows, columns = np.indices(TRUTH.shape[1:])
    squared = (rows - 5) ** 2 + (columns - 7) ** 2
    for name, factor in (("UNet", 1), ("MetricUNet-H", 9)):
        np.testing.assert_allclose(view.distances()[name] * view.scale[name], factor * squared, rtol=1e-4)
    np.testing.assert_allclose(*view.distances().values(), rtol=1e-4)  # free of scale
    assert view.lit.tolist() == [[5, 7]]
    view.choose((9.0, 3.0), (9.0, 3.0))
    assert view.voxel == (2, 9, 3) and all(d[9, 3] == 0 for d in view.distances().values())
    # what is near glows: all at the voxel, nothing as far away as background usually is
    near, far = view.heats[0], view.distances()["UNet"] >= 1
    assert near[9, 3] == 1 and (near[far] == 0).all() and (near >= 0).all()
    assert view.describe(2, 9, 3).splitlines()[4] == "distance: A 0.00, B 0.00"


def test_distances_are_those_of_the_slice_shown(seen):
    class Slices(Places):
        def forward(self, images):
            output = super().forward(images)
            grey = images[:, 1:2, :1, :1]  # a corner of the middle slice
            return output._replace(embeddings=output.embeddings * grey)

    seen = CasePredictions("made up", seen.region, TRUTH, SPACING, {"UNet": Slices()}, {"UNet": seen.heat["UNet"]})
    view, at = DistanceMap(seen), np.array([5, 7])
    view.measure_from((2, 5, 7))
    chosen = seen.region[2, 0, 0] / 255 * at  # the voxel's embedding stays, whichever slice is shown
    for z in (2, 4, 2):
        view.slice.value = z
        expected = ((seen.region[z, 0, 0] / 255 * np.array([12, 7]) - chosen) ** 2).sum() / view.scale["UNet"]
        assert view.distances()["UNet"][12, 7] == pytest.approx(expected, rel=1e-3)
        assert view.lit.tolist() == ([[5, 7]] if z == 2 else [])


def test_edges_are_not_lost_by_a_box_that_leaves_the_picture(seen):
    explorer = EmbeddingExplorer(seen, per_kind=2000)
    explorer.slice.value = 2
    explorer.view.choose((-8, -5), (90, 90))
    assert len(explorer.rows) == (explorer.index[:, 0] == 2).sum()
    assert len(explorer.view.lit) == len(explorer.rows)
