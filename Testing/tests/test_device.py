"""Devices: which one computes, in which precision, and what is said when it is not there."""

import re

import pytest
import torch

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.engine import device as devices
from PresenceSegLib.engine.device import autocast, choose_device, describe_device, gradient_scaler, half_precision

CPU = torch.device("cpu")


def test_a_named_device_is_taken_and_auto_takes_one_that_computes():
    assert choose_device("cpu") == CPU
    automatic = choose_device("auto")
    assert torch.ones(2, device=automatic).sum().item() == 2
    assert choose_device() == automatic


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "cpu"), (False, False, "cpu")],
)
def test_auto_prefers_cuda_and_never_takes_mps_unasked(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == expected


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cuda:99", "cpu;", "CUDA 0", "xla"])
def test_a_device_that_is_not_there_is_refused_in_one_line_that_names_it(name):
    with pytest.raises(InputError, match=re.escape(f'"{name}"')) as refusal:
        choose_device(name)
    assert "auto, cpu, cuda or mps" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, None),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, None),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_processors_use_bfloat16_only_where_they_have_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert half_precision(CPU) is expected


def test_processors_of_unknown_capabilities_use_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert half_precision(CPU) is None


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_graphics_cards_use_the_half_precision_that_is_not_emulated(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half_precision(torch.device("cuda")) is expected


@pytest.mark.parametrize(("precision", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_convolutions_run_in_the_precision_of_the_device(monkeypatch, precision, expected):
    monkeypatch.setattr(devices, "half_precision", lambda device: precision)
    layer = torch.nn.Conv3d(1, 2, 3, padding=1)
    with autocast(CPU):
        assert layer(torch.ones(1, 1, 4, 4, 4)).dtype is expected
    assert layer(torch.ones(1, 1, 4, 4, 4)).dtype is torch.float32


@pytest.mark.parametrize(("precision", "scales"), [(None, False), (torch.bfloat16, False), (torch.float16, True)])
def test_gradients_are_scaled_only_in_float16(monkeypatch, precision, scales):
    monkeypatch.setattr(devices, "half_precision", lambda device: precision)
    scaler = gradient_scaler(CPU)
    assert scaler.is_enabled() is scales
    assert (scaler.scale(torch.ones(())).item() > 1) is scales


def test_an_idle_scaler_steps_and_has_a_state_that_can_be_stored():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.5), gradient_scaler(CPU)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == 0.5
    gradient_scaler(CPU).load_state_dict(scaler.state_dict())


@pytest.mark.parametrize(("precision", "word"), [(None, "float32"), (torch.bfloat16, "bfloat16")])
def test_the_description_names_device_threads_and_precision(monkeypatch, precision, word):
    monkeypatch.setattr(devices, "half_precision", lambda device: precision)
    assert describe_device(CPU) == f"CPU, {torch.get_num_threads()} threads ({word})"
