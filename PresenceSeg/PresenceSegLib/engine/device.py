"""Which device computes, and in which precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from PresenceSegLib.domain.errors import InputError


def choose_device(name: str = "auto") -> torch.device:
    """The device named "auto", "cpu", "cuda", "cuda:N" or "mps"; "auto" is CUDA, else the CPU.

    Apple's "mps" must be asked for: older versions of torch lack 3-D operations there.

    Raises InputError when the named device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f'The device "{name}" cannot be used ({str(error).splitlines()[0]}); use auto, cpu, cuda or mps.'
        ) from error
    return device


def half_precision(device: torch.device) -> torch.dtype | None:
    """The half precision in which convolutions are fast on this device, or None where float32 is.

    On processors without bfloat16 instructions it is emulated and slower than float32.
    """
    if device.type == "cuda":
        # Before the generation of capability 8, bfloat16 is emulated.
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # new in torch 2.10
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return None


def autocast(device: torch.device) -> AbstractContextManager:
    """Context in which the network runs in the device's fast precision."""
    dtype = half_precision(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def gradient_scaler(device: torch.device):
    """Scaler that keeps small gradients from vanishing in float16; idle in precisions with the range of float32."""
    enabled = half_precision(device) is torch.float16
    if hasattr(torch.amp, "GradScaler"):  # new in torch 2.3
        return torch.amp.GradScaler(device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)


def describe_device(device: torch.device) -> str:
    """Name of the device for people, for example "NVIDIA ... (bfloat16)" or "CPU, 2 threads (float32)"."""
    dtype = str(half_precision(device) or torch.float32).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({dtype})"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device.type.upper()}{threads} ({dtype})"
