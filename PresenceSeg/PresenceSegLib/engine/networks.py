"""The networks: MONAI backbones by name, each with one 1x1x1 head that has a channel per structure.

The head is a layer of its own in every network, so that channels can be kept by structure name when a structure set
changes. Tensors are [B, channels, S, P, L] (canonical axes) for slice networks too, which treat slices as a batch.
"""

from collections.abc import Sequence

import torch
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.model import PLANES, NetworkSpec
from PresenceSegLib.domain.structure import StructureSet

NETWORKS = ("unet", "segresnet", "dynunet")

_CHANNELS = {"unet": (16, 32, 64, 128), "segresnet": (16,), "dynunet": (16, 32, 64, 128, 160)}
_SLICE_CHANNELS = {"unet": (32, 64, 128, 256), "segresnet": (32,), "dynunet": (32, 64, 128, 256, 320)}
_SEGRESNET_BLOCKS = (1, 2, 2, 4)

# An axis is halved only while its voxels are not much longer than those of the finest axis.
_MAX_ANISOTROPY = 1.9


class SegmentationNetwork(nn.Module):
    """A backbone that gives features at full resolution, and a head that gives one logit per class.

    Maps [B, 1, S, P, L] to logits [B, 1 + C, S, P, L]. With `slice_axis` (0, 1 or 2 for S, P or L) the backbone is
    2-D and sees each slice across that axis by itself.
    """

    def __init__(self, backbone: nn.Module, features: int, classes: int, slice_axis: int | None):
        super().__init__()
        self.backbone = backbone
        self.head = (nn.Conv3d if slice_axis is None else nn.Conv2d)(features, classes, kernel_size=1)
        self.slice_axis = slice_axis

    def forward(self, x: Tensor) -> Tensor:
        if self.slice_axis is None:
            return self.head(self.backbone(x))
        axis = self.slice_axis + 2
        slices = x.movedim(axis, 1)  # [B, slices, 1, height, width]
        logits = self.head(self.backbone(slices.flatten(0, 1)))
        return logits.unflatten(0, slices.shape[:2]).movedim(1, axis)


def default_spec(name: str, plane: str, spacing: Sequence[float], patch: Sequence[int]) -> NetworkSpec:
    """The specification of a network for data of a given spacing (mm, [S, P, L]) and patch size.

    Raises InputError for an unknown network or plane.
    """
    if name not in NETWORKS:
        raise InputError(f'There is no network "{name}"; the networks are: {", ".join(NETWORKS)}.')
    if plane and plane not in PLANES:
        raise InputError(f'There is no plane "{plane}"; the planes are: {", ".join(PLANES)}.')
    channels = (_SLICE_CHANNELS if plane else _CHANNELS)[name]
    fixed_axis = PLANES.index(plane) if plane else None
    if name == "segresnet":
        step = tuple(1 if axis == fixed_axis else 2 for axis in range(3))
        return NetworkSpec(name, channels, (step,) * (len(_SEGRESNET_BLOCKS) - 1), plane)
    return NetworkSpec(name, channels, _strides(len(channels) - 1, spacing, patch, fixed_axis), plane)


def stride(spec: NetworkSpec) -> tuple[int, int, int]:
    """Total down-sampling [S, P, L]: sizes of tiles and patches are multiples of it."""
    return tuple(int(torch.tensor(spec.strides)[:, axis].prod()) for axis in range(3))


def fit_to_stride(size: Sequence[int], step: Sequence[int]) -> tuple[int, int, int]:
    """The size [S, P, L] rounded up to multiples of a total stride, of which at least two along each strided axis.

    Of a single voxel at the deepest level, instance normalization cannot tell mean and deviation.
    """
    return tuple(max(-(-n // s), 2 if s > 1 else 1) * s for n, s in zip(size, step, strict=True))


def build_network(spec: NetworkSpec, structures: StructureSet) -> SegmentationNetwork:
    """A freshly initialized network for a structure set. Raises InputError for an unknown or impossible network."""
    if spec.name not in NETWORKS:
        raise InputError(f'The model needs the network "{spec.name}", which this PresenceSeg does not have.')
    if not _is_possible(spec):
        raise InputError(f"The model's card is damaged ({spec} is no network); restore the model from a copy.")
    slice_axis = PLANES.index(spec.plane) if spec.plane else None
    dims = 3 if slice_axis is None else 2
    strides = [tuple(s for axis, s in enumerate(step) if axis != slice_axis) for step in spec.strides]
    backbone = _BACKBONES[spec.name](dims, spec.channels, strides)
    return SegmentationNetwork(backbone, spec.channels[0], 1 + len(structures), slice_axis)


def keep_channels(
    state: dict[str, Tensor], known: StructureSet, fresh: dict[str, Tensor], structures: StructureSet
) -> dict[str, Tensor]:
    """Weights for `structures` out of a `state` learned for `known`: channels are kept by structure name.

    Structures that `known` lacks keep their channel of `fresh`, the state of a newly initialized network.
    """
    result = dict(state)
    for key in ("head.weight", "head.bias"):
        rows = fresh[key].clone()
        rows[0] = state[key][0]
        for name in structures.names:
            if name in known:
                rows[structures.channel(name)] = state[key][known.channel(name)]
        result[key] = rows
    return result


def _is_possible(spec: NetworkSpec) -> bool:
    """Whether plane, channels and strides of a specification, which may come from a damaged file, make a network."""
    levels = len(_SEGRESNET_BLOCKS) if spec.name == "segresnet" else len(spec.channels)
    numbers = (*spec.channels, *(n for step in spec.strides for n in step))
    return (
        spec.plane in ("", *PLANES)
        and len(spec.channels) > 0
        and len(spec.strides) == levels - 1 > 0
        and all(len(step) == 3 for step in spec.strides)
        and all(isinstance(n, int) and n > 0 for n in numbers)
    )


def _unet(dims: int, channels: Sequence[int], strides: list[tuple[int, ...]]) -> nn.Module:
    net = UNet(dims, 1, channels[0], channels, strides, num_res_units=2, act="LEAKYRELU")
    return nn.Sequential(net, nn.LeakyReLU())  # MONAI's UNet ends without activation, the head needs one


def _segresnet(dims: int, channels: Sequence[int], strides: list[tuple[int, ...]]) -> nn.Module:
    net = SegResNet(dims, channels[0], 1, 1, blocks_down=_SEGRESNET_BLOCKS, blocks_up=(1,) * len(strides))
    net.conv_final = net.conv_final[:2]  # norm and activation; its last convolution is our head
    return net


def _dynunet(dims: int, channels: Sequence[int], strides: list[tuple[int, ...]]) -> nn.Module:
    first = (1,) * dims
    net = DynUNet(dims, 1, 1, [3] * len(channels), [first, *strides], strides, filters=channels)
    # All layers but the last convolution, which is our head, and each by one name only: DynUNet keeps two.
    return net.skip_layers


_BACKBONES = {"unet": _unet, "segresnet": _segresnet, "dynunet": _dynunet}


def _strides(
    levels: int, spacing: Sequence[float], patch: Sequence[int], fixed_axis: int | None
) -> tuple[tuple[int, int, int], ...]:
    """Strides per level: an axis is halved while it is about as fine as the finest and at least 8 voxels remain."""
    spacing, size, result = list(spacing), list(patch), []
    for _ in range(levels):
        axes = [axis for axis in range(3) if axis != fixed_axis and size[axis] >= 8]
        finest = min((spacing[axis] for axis in axes), default=1.0)
        step = tuple(2 if axis in axes and spacing[axis] <= _MAX_ANISOTROPY * finest else 1 for axis in range(3))
        spacing = [s * n for s, n in zip(spacing, step, strict=True)]
        size = [s // n for s, n in zip(size, step, strict=True)]
        result.append(step)
    return tuple(result)
