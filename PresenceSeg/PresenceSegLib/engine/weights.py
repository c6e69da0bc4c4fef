"""Weights as data: saving networks as safetensors and loading them against their model card."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import replaced
from PresenceSegLib.domain.model import ModelVersion
from PresenceSegLib.engine.networks import SegmentationNetwork, build_network


def save_weights(path: str | Path, state: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors, all or nothing."""
    data = save({key: value.detach().cpu().contiguous() for key, value in state.items()})
    with replaced(path) as temporary:
        temporary.write_bytes(data)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict. Raises InputError when the file is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"The weights {path} cannot be read ({error}); restore them from a copy.") from error


def load_network(model: ModelVersion, device: torch.device) -> SegmentationNetwork:
    """The network of a model version with its weights, on the device, ready to segment.

    Raises InputError when card and weights are missing, damaged, or do not belong together.
    """
    card = model.read_card()
    model.check_weights(card)
    network = build_network(card.network, card.structures)
    try:
        network.load_state_dict(load_weights(model.weights_path))
    except RuntimeError as error:
        raise InputError(
            f"The weights {model.weights_path} do not match their card: they are those of another network or "
            "structure set; restore both from the same copy."
        ) from error
    return network.to(device).eval()
