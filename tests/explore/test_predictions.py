"""A case as its runs predict it: its numbers, places and embeddings, and what is read or run once."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from a_case import SPACING, TRUTH
from torch import nn

from mupkg.explore import predictions
from mupkg.explore.panels import DistanceMap
from mupkg.explore.predictions import CasePredictions, Cases
from mupkg.explore.workbench import EmbeddingExplorer
from mupkg.models import EmbeddingTap, UNet
from mupkg.stages import voxels
from mupkg.stages.inference import load_network
from mupkg.stages.prediction import predict_volume
from mupkg.stages.runs import BEST
from mupkg.stages.voxels import embed_slice, embed_voxels


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
