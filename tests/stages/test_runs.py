"""Weights are read back to the bit or refused by name; a run's record says what it takes to repeat it."""

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from mupkg.models import UNet, light_unet
from mupkg.stages.runs import load_tensors, load_weights, provenance, require, save_tensors, write_run

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7), "b": torch.tensor([0, 255], dtype=torch.uint8)}


def test_tensors_and_metadata_come_back_as_they_were(tmp_path):
    wide = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    save_tensors(TENSORS | {"wide": wide}, tmp_path / "new" / "w.safetensors", {"filters": 4, "range": [1.5, None]})
    tensors, metadata = load_tensors(tmp_path / "new" / "w.safetensors")
    assert metadata == {"filters": 4, "range": [1.5, None]}
    for name, tensor in (TENSORS | {"wide": wide}).items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def test_a_missing_file_is_named_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"w\.safetensors: cannot be read .*No such file.*, or train the run"):
        load_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", ["cut", "empty", "pickle", "text"])
def test_a_broken_file_is_named_with_the_way_out(tmp_path, kind):
    path = tmp_path / "w.safetensors"
    save_tensors(TENSORS, path, {})
    content = {"cut": path.read_bytes()[:-5], "empty": b"", "pickle": pickle.dumps(TENSORS), "text": b"hello" * 9}
    path.write_bytes(content[kind])
    with pytest.raises(ValueError, match=r"w\.safetensors: cannot be read as a file of this suite .*; copy .*train"):
        load_tensors(path)


def test_a_pickle_is_never_unpacked(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    for write in (lambda path: path.write_bytes(pickle.dumps(Trap())), lambda path: torch.save(Trap(), path)):
        write(tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match="cannot be read as a file of this suite"):
            load_tensors(tmp_path / "w.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_a_file_of_somebody_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: cannot be read as a file of this suite \(KeyError"):
        load_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("other", [UNet(3, 4, 4), UNet(5, 2, 4), light_unet(3, 2), nn.Linear(1, 1)])
def test_weights_of_another_network_are_refused_by_name(other):
    with pytest.raises(ValueError, match=r"^w\.safetensors: holds weights of another network \("):
        load_weights(UNet(3, 2, 4), other.state_dict(), Path("w.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_and_the_network_stays_as_it_was(value):
    network, tensors = UNet(3, 2, 4), UNet(3, 2, 4).state_dict()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_weights(UNet(3, 2, 4), tensors, Path("w.safetensors"))
    tensors["head.0.0.weight"][1, 2] = value
    with pytest.raises(ValueError, match=r"^w\.safetensors: its head\.0\.0\.weight is not finite .*; copy"):
        load_weights(network, tensors, Path("w.safetensors"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path, monkeypatch):
    """Regression: it was told to train again, and nothing of the permissions."""
    path = tmp_path / "w.safetensors"
    save_tensors(TENSORS, path, {})

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # not by its permissions: root may read everything
    with pytest.raises(ValueError, match=r"w\.safetensors: cannot be read .*Permission denied.*; .*see to its perm"):
        load_tensors(path)


def test_lacking_metadata_is_named():
    require({"filters": 4}, ("filters",), Path("w"))
    with pytest.raises(ValueError, match=r"^w: holds weights of another network \(it lacks a, lacks b\)"):
        require({"filters": 4}, ("a", "filters", "b"), Path("w"))


def test_a_record_says_what_it_takes_to_repeat_a_run(tmp_path):
    content = write_run(
        tmp_path, {"seed": 3, "folder": Path("outputs")}, data_fingerprint="abc", training_seconds=1.5
    )
    stored = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert stored["parameters"] == {"seed": 3, "folder": "outputs"}
    assert (stored["data_fingerprint"], stored["training_seconds"]) == ("abc", 1.5)
    assert stored.keys() == content.keys() >= provenance().keys()
    assert {"torch", "SimpleITK", "numpy", "mupkg"} <= stored["packages"].keys()
    assert stored["threads"] == torch.get_num_threads() and stored["device"]
