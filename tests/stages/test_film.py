"""A film shows the same voxels in every frame, as the network saw them, and changes nothing of the training."""

import shutil

import numpy as np
import pytest
import torch

from mupkg.models import UNet
from mupkg.stages.film import Film, read_film
from mupkg.stages.prediction import run_slices
from mupkg.stages.runs import FILM

LABEL = np.zeros((6, 30, 44), np.uint8)
LABEL[1:5, 12:22, 30:42] = 1
LABEL[3, 10:24, 28:42] = 1  # the widest slice
REGION = np.random.default_rng(0).integers(0, 256, LABEL.shape).astype(np.uint8)


def network(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(3, 2, 6).eval()


def test_a_frame_is_what_the_network_sees(tmp_path):
    film = Film(tmp_path, "case-1", REGION, LABEL, per_kind=20, patch=16)
    networks = {0: network(0), 100: network(1)}
    for step, net in networks.items():
        film.record(net, step)
    frames = read_film(tmp_path)
    assert (frames.case_id, frames.z, frames.steps) == ("case-1", 3, [0, 100])
    assert np.bincount(frames.kind).tolist() == [20] * 4
    (top, left), z = frames.corner, frames.index[:, 0]
    patch = LABEL[3][frames.patch]
    np.testing.assert_array_equal(patch, LABEL[3, top : top + 16, left : left + 16])
    assert patch.shape == (16, 16) and patch.sum() > 0.8 * LABEL[3].sum()  # at the border it is moved, not cut
    for number, net in enumerate(networks.values()):
        whole = run_slices(net, REGION, np.arange(6), 3)
        expected = whole.embeddings.numpy()[z, :, frames.index[:, 1], frames.index[:, 2]]
        np.testing.assert_allclose(frames.embeddings[number], expected, rtol=2e-3, atol=1e-3)  # kept as float16
        inside = whole.embeddings[3, :, top : top + 16, left : left + 16].movedim(0, -1)
        np.testing.assert_allclose(frames.patch_embeddings[number], inside, rtol=2e-3, atol=1e-3)
        probability = whole.logits.softmax(1)[3, 1]
        np.testing.assert_allclose(frames.probability[number], probability, atol=0.5 / 255 + 1e-6)


def test_frames_are_read_in_the_order_of_their_steps(tmp_path):
    film = Film(tmp_path, "c", REGION, LABEL, per_kind=3)
    for step in (0, 2_000_000, 1000):
        film.record(network(0), step)
    assert read_film(tmp_path).steps == [0, 1000, 2_000_000]


def test_recording_again_gives_the_same_bytes(tmp_path):
    film = Film(tmp_path, "c", REGION, LABEL, per_kind=3)
    film.record(network(0), 5)
    (path,) = (tmp_path / FILM).iterdir()
    before = path.read_bytes()
    Film(tmp_path, "c", REGION, LABEL, per_kind=3).record(network(0), 5)
    assert path.read_bytes() == before


def test_step_0_begins_a_new_film(tmp_path):
    film = Film(tmp_path, "c", REGION, LABEL, per_kind=3)
    for step in (0, 7, 0, 5):
        film.record(network(0), step)
    assert read_film(tmp_path).steps == [0, 5]


def test_early_steps_are_filmed_beside_those_that_are_recorded(tmp_path):
    film, net = Film(tmp_path, "c", REGION, LABEL, per_kind=3), network(0)
    film.record(net, 0)
    for step in range(1, 101):  # as a training that calls after every step, with validations at 50 and 100
        film.watch(net, step)
        if step % 50 == 0:
            film.record(net, step)
    assert read_film(tmp_path).steps == [0, 5, 10, 20, 40, 50, 80, 100]


def test_recording_draws_no_random_numbers(tmp_path):
    film, state = Film(tmp_path, "c", REGION, LABEL), torch.get_rng_state()
    net = network(0)
    state = torch.get_rng_state()
    film.record(net, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_patch_larger_than_the_slice_is_the_slice(tmp_path):
    Film(tmp_path, "c", REGION, LABEL, patch=64).record(network(0), 0)
    frames = read_film(tmp_path)
    assert frames.corner == (0, 0) and frames.patch_embeddings.shape[1:3] == LABEL.shape[1:]


def test_the_first_validation_case_is_filmed(regions, tmp_path):
    assert Film.of_validation(tmp_path, regions).case_id == regions.ids("validation")[0]
    nobody = type(regions)(regions.folder, regions.table[regions.table["split"] != "validation"])
    with pytest.raises(ValueError, match="no validation case with a prostate to film"):
        Film.of_validation(tmp_path, nobody)


def test_no_film_is_said_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"film: holds no film; set film to True in notebook 03"):
        read_film(tmp_path)


def test_frames_that_do_not_belong_together_are_refused_by_name(tmp_path):
    Film(tmp_path, "c", REGION, LABEL, per_kind=3).record(network(0), 0)
    Film(tmp_path, "d", REGION, LABEL, per_kind=3).record(network(0), 10)
    with pytest.raises(ValueError, match=r"000010.safetensors: is of another film than 000000.safetensors"):
        read_film(tmp_path)


def test_a_copy_beside_the_frames_is_none(tmp_path):
    Film(tmp_path, "c", REGION, LABEL, per_kind=3).record(network(0), 5)
    shutil.copy(tmp_path / FILM / "000005.safetensors", tmp_path / FILM / "000005 (copy).safetensors")
    assert read_film(tmp_path).steps == [5]


def test_a_broken_frame_is_refused_by_name(tmp_path):
    Film(tmp_path, "c", REGION, LABEL, per_kind=3).record(network(0), 0)
    (path,) = (tmp_path / FILM).iterdir()
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"000000.safetensors: cannot be read as a file of this suite"):
        read_film(tmp_path)
