"""Samplers on a patch and the film: the numbers shown are the loss's own."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection

from mupkg.explore.predictions import CasePredictions
from mupkg.explore.samplers_and_film import CaseFilm, FilmPlayer, SamplersAtWork
from mupkg.losses import VoxelMetricLoss
from mupkg.models import UNet
from mupkg.report.figures import mix, png
from mupkg.samplers import VoxelTuples, contour, distance_to_contour
from mupkg.stages.film import Film, read_film
from mupkg.stages.voxels import embed_slice

TRUTH = np.zeros((5, 40, 48), bool)
TRUTH[1:4, 12:26, 14:30] = True
REGION = np.random.default_rng(0).integers(0, 256, TRUTH.shape).astype(np.uint8)


@pytest.fixture
def seen() -> CasePredictions:
    torch.manual_seed(3)
    heat = TRUTH * np.linspace(0.5, 1, 48, dtype=np.float32)  # surer to the right
    return CasePredictions("made up", REGION, TRUTH, (3.0, 1.0, 1.0), {"UNet": UNet(3, 2, 6).eval()}, {"UNet": heat})


@pytest.fixture
def films(tmp_path) -> dict[str, CaseFilm]:
    film, found = Film(tmp_path / "UNet-seed0", "case", REGION, TRUTH.astype(np.uint8), per_kind=30, patch=16), {}
    for step in (0, 5, 10):
        torch.manual_seed(step)
        film.record(UNet(3, 2, 6), step)
    frames = read_film(tmp_path / "UNet-seed0")
    found["UNet"] = CaseFilm(frames, REGION[frames.z], TRUTH[frames.z], (3.0, 1.0, 1.0))
    return found


def test_the_tuples_are_the_samplers_and_the_distances_the_losses(seen):
    work = SamplersAtWork(seen, anchors=15, pairs=2, tau=0.3, patch=32)
    drawn, embeddings = work.tuples(), torch.from_numpy(work.patch.embedding).movedim(-1, 0)[None]
    top, left = work.top.value, work.left.value
    label, heat = (v[work.slice.value, top : top + 32, left : left + 32] for v in (TRUTH, seen.heat["UNet"]))
    edge = contour(torch.from_numpy(label.copy())[None])[0].numpy()
    embedding = embed_slice(seen.networks["UNet"], REGION, work.slice.value)[top : top + 32, left : left + 32]
    allowed = {"R": label, "H": label & (1 - heat > 0.3), "C": edge}
    for letter, mine in drawn.groupby("sampler"):
        assert len(mine) == 30
        assert allowed[letter].ravel()[mine["anchors"]].all()
        assert not label.ravel()[mine["negatives"]].any()
        anchor, positive, negative = (
            embedding.reshape(-1, 6)[mine[role]] for role in ("anchors", "positives", "negatives")
        )
        np.testing.assert_allclose(mine["d(a, p)"], ((anchor - positive) ** 2).sum(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(mine["d(a, n)"], ((anchor - negative) ** 2).sum(1), rtol=1e-4, atol=1e-6)
        tuples = VoxelTuples(*(torch.tensor(mine[r].to_numpy()) for r in ("anchors", "positives", "negatives")))
        hinge = (mine["d(a, p)"] - mine["d(a, n)"] + work.margin).clip(lower=0)
        assert hinge.mean() == pytest.approx(VoxelMetricLoss()(embeddings, tuples).item(), rel=1e-4)
        assert (mine["active"] == (hinge > 0)).all()


@pytest.mark.slow
def test_every_slider_draws_anew(seen):
    work = SamplersAtWork(seen)
    pictures = [png(work.figure)]
    sliders = (
        (work.anchors, 40),
        (work.pairs, 3),
        (work.tau, 0.4),
        (work.draw_number, 5),
        (work.slice, 3),
        (work.left, 0),
    )
    for slider, value in sliders:
        slider.value = value
        pictures.append(png(work.figure))
        assert len(set(pictures)) == len(pictures), slider.description
    assert len(work.tuples().query("sampler == 'R'")) == 120
    assert "R: 120 tuples" in work.figure.axes[0].get_title()


def test_a_sampler_without_candidates_draws_nothing(seen):
    work = SamplersAtWork(seen, tau=0.95)  # the head errs by 0.5 at most
    assert set(work.tuples()["sampler"]) == {"R", "C"}
    assert "H: 0 tuples, 0 still teach" in work.figure.axes[1].get_title()
    assert "none" in work.figure.axes[4].get_title()
    work.slice.value = 0  # no prostate at all
    assert work.tuples().empty
    assert work.figure.axes[3].get_title().startswith("mean hinge none")


@pytest.mark.slow
def test_a_filmed_step_shows_its_own_patch_and_the_trained_one_comes_back(seen, films):
    work = SamplersAtWork(seen, films)
    trained = png(work.figure)
    assert work.step.options == ("0", "5", "10", "trained")
    for number, step in enumerate(("0", "5", "10")):
        work.step.value = step
        assert work.top.disabled
        film = films["UNet"]
        rows, columns = film.frames.patch
        np.testing.assert_array_equal(work.patch[1], TRUTH[film.frames.z, rows, columns])
        np.testing.assert_array_equal(work.patch.embedding[3, 4], film.frames.patch_embeddings[number, 3, 4])
    work.step.value = "trained"
    same = png(work.figure) == trained  # pytest would spend minutes on how unequal bytes differ
    assert not work.top.disabled and same


@pytest.mark.slow
def test_a_picture_is_the_same_twice_in_a_lesson_s_kernel(seen, films):
    """Which lays all figures out by constraints, and a little further at every drawing."""
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):
        work = SamplersAtWork(seen, films)
        panel, strip = (png(work.figure) for _ in range(2)), (FilmPlayer(films).png() for _ in range(2))
        assert len(set(panel)) == len(set(strip)) == 1


@pytest.mark.slow
def test_active_shares_by_step(seen, films):
    work = SamplersAtWork(seen, films)
    table = work.active_by_step()
    assert table.index.tolist() == ["0", "5", "10"] and list(table) == ["R", "H", "C", "RN", "HN", "CN"]
    before = work.patch.embedding
    work.step.value, work.anchors.value = "5", 200
    by_hand = work.tuples().query("sampler == 'C'")["active"].mean()
    assert table.loc["5", "C"] == pytest.approx(by_hand)
    work.near.value = True
    by_hand = work.tuples().query("sampler == 'C'")["active"].mean()
    assert table.loc["5", "CN"] == pytest.approx(by_hand)
    work.near.value = False
    work.step.value = "trained"
    assert work.active_by_step().equals(table) and np.array_equal(work.patch.embedding, before)
    alone = SamplersAtWork(seen)
    alone.slice.value = 0
    assert alone.active_by_step().loc["trained"].isna().all()


@pytest.mark.slow
def test_the_film_moves_in_the_plane_of_its_last_frame(films):
    player = FilmPlayer(films)
    last = films["UNet"].frames.embeddings[-1]
    mean = last.mean(axis=0)
    axes = np.linalg.svd(last - mean, full_matrices=False)[2][:2]
    for number in range(3):
        by_hand = (films["UNet"].frames.embeddings[number] - mean) @ axes.T
        np.testing.assert_allclose(np.abs(player.points["UNet"][number]), np.abs(by_hand), atol=1e-4)
    pictures = set()
    for step in player.steps:
        player.frame.value = step
        pictures.add(player.png())
    assert len(pictures) == 3
    titles = [ax.get_title() for ax in player.figure.axes]
    assert [f"UNet, step {step}\ncase, slice 1" in titles for step in (0, 5, 10)] == [True] * 3


def test_the_prostate_lies_to_the_right_and_above_in_every_run(films):
    player = FilmPlayer(films)
    inside = films["UNet"].frames.kind < 2
    means = (player.points["UNet"][-1][rows].mean(axis=0) for rows in (inside, ~inside))
    assert (np.subtract(*means) > 0).all()


def test_the_slice_shown_is_the_films(films):
    film = films["UNet"]
    shown = FilmPlayer(films).figure.axes[1].images[0].get_array()  # the middle one of three
    np.testing.assert_array_equal(shown, mix(film.grey, film.frames.probability[1], opacity=0.6))


def test_pictures_name_case_plane_and_sides_and_show_a_length(seen, films):
    work = SamplersAtWork(seen, films)
    for step, case in (("trained", f"made up, slice {seen.slice.value}"), ("5", "case, slice 1"), ("trained", None)):
        work.step.value = step
        for top in work.figure.axes[:3]:
            texts = [text.get_text() for text in top.texts]
            assert len(texts) == 4 and {"R", "L", "20 mm"} < set(texts) and case in (None, *texts)
            (bar,) = top.lines
            assert np.ptp(bar.get_xdata()) == pytest.approx(20)  # voxels of 1 mm
            assert np.ptp(top.get_xlim()) == work.patch[0].shape[1]
    shown = FilmPlayer(films).figure.axes[0]
    assert {"R", "L", "20 mm", "axial"} == {text.get_text() for text in shown.texts}


def test_near_negatives_lie_at_the_contour_and_teach_more(seen):
    work = SamplersAtWork(seen, anchors=100)
    far = work.tuples()
    work.near.value = True
    near, label = work.tuples(), work.patch[1]
    allowed = (distance_to_contour(torch.from_numpy(label.copy())[None], 2)[0].numpy() <= 2) & ~label
    assert allowed.ravel()[near["negatives"]].all() and not allowed.ravel()[far["negatives"]].all()
    assert "CN: 100 tuples" in work.figure.axes[2].get_title()


def test_the_samplers_draw_each_for_itself(seen):
    """With a head that errs everywhere H may draw what R may; their draws differ all the same."""
    drawn = SamplersAtWork(seen, tau=0.0).tuples().groupby("sampler")["negatives"].agg(tuple)
    assert drawn["R"] != drawn["H"]


def test_lines_join_each_anchor_to_its_positive_and_its_negative(seen):
    work = SamplersAtWork(seen, anchors=5)
    mine = work.tuples().query("sampler == 'C'")
    drawn = [c for c in work.figure.axes[2].collections if isinstance(c, LineCollection)]
    width = work.patch[0].shape[1]
    for role, marks in zip(("positive", "negative"), drawn[1:], strict=True):
        lines = np.array([path.vertices for path in marks.get_paths()])
        for end, name in ((0, "anchors"), (1, f"{role}s")):
            assert (lines[:, end] == np.column_stack([mine[name] % width, mine[name] // width])).all()


def test_no_film_is_said(seen):
    with pytest.raises(ValueError, match="no run has a film; set film to True"):
        FilmPlayer({})
    assert SamplersAtWork(seen).step.options == ("trained",)
    assert isinstance(SamplersAtWork(seen).active_by_step(), pd.DataFrame)
