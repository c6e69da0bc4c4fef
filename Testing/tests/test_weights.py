"""Weights on disk: stored exactly and whole, and refused in one sentence when they are not what their card says."""

import dataclasses
import errno
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import CPU, model_card, random_network, write_version

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.model import ModelVersion, NetworkSpec, file_sha256
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.engine.weights import load_network, load_weights, save_weights

CARD = model_card(["a", "b"])


@pytest.fixture
def version(tmp_path):
    return write_version(tmp_path / "v1", CARD, random_network(CARD))


def rewrite_card(version, **changes):
    version.write_card(dataclasses.replace(version.read_card(), **changes))


def test_weights_come_back_bit_for_bit_and_as_plain_data(tmp_path):
    state = {
        "plain": torch.randn(3, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "needs gradients": torch.nn.Parameter(torch.ones(2)),
    }
    save_weights(tmp_path / "w.safetensors", state)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert loaded[key].dtype is value.dtype and torch.equal(loaded[key], value.detach())
        assert not loaded[key].requires_grad
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_disk_that_fills_up_leaves_the_old_weights(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"x": torch.ones(2)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_weights(path, {"x": torch.zeros(2)})
    assert load_weights(path)["x"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_loaded_version_is_the_network_that_was_stored(version):
    network, loaded = random_network(CARD), load_network(version, CPU)
    x = torch.randn(1, 1, 8, 8, 8)
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded(x), network(x))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_weights_damaged_or_cut_anywhere_are_refused(tmp_path_factory, data):
    version = write_version(tmp_path_factory.mktemp("m") / "v1", CARD, random_network(CARD))
    content = version.weights_path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        damaged = content[:place]
    else:
        damaged = bytearray(content)
        damaged[place] ^= data.draw(st.integers(1, 255))
    version.weights_path.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match="do not match their card"):
        load_network(version, CPU)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"no weights at all, but long enough", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused_even_if_the_card_knows_it(version, content):
    version.weights_path.write_bytes(content)
    rewrite_card(version, weights_sha256=file_sha256(version.weights_path))
    with pytest.raises(InputError, match="cannot be read"):
        load_network(version, CPU)


def test_pickled_weights_are_never_opened(version):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the pickle was run",)

    torch.save({"x": Trap()}, version.weights_path)
    rewrite_card(version, weights_sha256=file_sha256(version.weights_path))
    with pytest.raises(InputError, match="cannot be read"):
        load_network(version, CPU)


def test_missing_weights_and_cards_are_refused(version):
    version.weights_path.unlink()
    with pytest.raises(InputError, match="no weights"):
        load_network(version, CPU)
    with pytest.raises(InputError, match="cannot be read"):
        load_weights(version.weights_path)
    version.card_path.unlink()
    with pytest.raises(InputError, match="no model card"):
        load_network(version, CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"structures": StructureSet.from_names("abc"), "label_layers": (("a", "b", "c"),)},
        {"structures": StructureSet.from_names("a"), "label_layers": (("a",),)},
        {"network": NetworkSpec("unet", (4, 16), ((2, 2, 2),))},
        {"network": NetworkSpec("unet", (4, 8), ((2, 2, 1),), "sagittal")},
        {"network": NetworkSpec("segresnet", (16,), ((2, 2, 2),) * 3)},
    ],
)
def test_weights_of_another_network_or_structure_set_are_refused(version, changes):
    rewrite_card(version, **changes)
    with pytest.raises(InputError, match="do not match their card"):
        load_network(version, CPU)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "transformer"),
        ("plane", "oblique"),
        ("channels", []),
        ("channels", [4]),
        ("channels", ["four", "eight"]),
        ("strides", []),
        ("strides", [[2, 2]]),
        ("strides", [[0, 0, 0]]),
    ],
)
def test_a_card_with_an_impossible_network_is_refused(version, key, value):
    card = json.loads(version.card_path.read_text(encoding="utf-8"))
    card["network"][key] = value
    version.card_path.write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(InputError):
        load_network(version, CPU)


def test_a_card_of_a_newer_program_is_refused(version):
    card = json.loads(version.card_path.read_text(encoding="utf-8"))
    version.card_path.write_text(json.dumps(card | {"format": 99}), encoding="utf-8")
    with pytest.raises(InputError, match="newer PresenceSeg"):
        load_network(ModelVersion(version.folder), CPU)
