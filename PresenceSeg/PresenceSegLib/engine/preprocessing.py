"""From a volume to network input: canonical axes, network spacing, normalized intensities. All steps on the device.

The network's grid spans exactly the same space as the volume's grid, edge to edge, with a whole number of voxels; its
spacing is therefore the model's spacing only to within half a voxel over the whole length.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from PresenceSegLib.domain.geometry import AxisOrder, Grid
from PresenceSegLib.domain.model import Preprocessing
from PresenceSegLib.domain.volume import Volume

_PERCENTILES = (0.005, 0.995)
_MAX_SAMPLES = 1 << 20  # voxels that the percentiles are estimated from


def network_input(volume: Volume, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Float32 tensor [S', P', L'] of a volume on the network's grid, normalized."""
    x = to_canonical(volume.array, volume.grid.axis_order(), device).float()
    x = resample(x, network_shape(volume.grid, preprocessing))
    return normalize(x, preprocessing.intensity)


def network_shape(grid: Grid, preprocessing: Preprocessing) -> tuple[int, int, int]:
    """Voxels [S', P', L'] of the network's grid over a volume's grid."""
    shape = [grid.shape[axis] for axis in grid.axis_order().permutation]
    spacing = grid.canonical_spacing()
    return tuple(
        n if target is None else max(1, int(n * s / target + 0.5))
        for n, s, target in zip(shape, spacing, preprocessing.spacing, strict=True)
    )


def to_canonical(array: np.ndarray, order: AxisOrder, device: torch.device) -> Tensor:
    """Tensor [S, P, L] of an array [k, j, i], copied to the device once, in its own number type."""
    if array.dtype in (np.uint16, np.uint32, np.uint64):  # torch has few operations for these
        array = array.astype(np.int64 if array.dtype == np.uint64 else np.int32)
    x = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    return x.permute(order.permutation).flip(order.flips) if order.flips else x.permute(order.permutation)


def resample(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Linear interpolation of the last three axes to `shape`, edge to edge.

    Where an axis shrinks, the interpolation kernel widens with it, so that fine detail is averaged, not aliased.
    """
    for axis, size in zip((-3, -2, -1), shape, strict=True):
        if x.shape[axis] != size:
            weights = interpolation_matrix(x.shape[axis], size).to(x.device, x.dtype)
            x = (x.movedim(axis, -1) @ weights.T).movedim(-1, axis)
    return x


def interpolation_matrix(size: int, new_size: int) -> Tensor:
    """Weights [new_size, size] of linear interpolation with voxel centers at (n + 0.5) / size of the extent."""
    scale = size / new_size
    width = max(1.0, scale)
    centers = (torch.arange(new_size, dtype=torch.float64) + 0.5) * scale - 0.5
    distance = (centers[:, None] - torch.arange(size, dtype=torch.float64)[None, :]).abs()
    if scale <= 1:  # beyond the first and last centers the nearest voxel holds
        distance = (centers.clamp(0, size - 1)[:, None] - torch.arange(size, dtype=torch.float64)[None, :]).abs()
    weights = (1 - distance / width).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def resample_labels(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Nearest-neighbor resampling of the last three axes of integer labels to `shape`, edge to edge."""
    for axis, size in zip((-3, -2, -1), shape, strict=True):
        if labels.shape[axis] != size:
            centers = (torch.arange(size, dtype=torch.float64) + 0.5) * labels.shape[axis] / size
            labels = labels.index_select(axis, centers.long().to(labels.device))
    return labels


def normalize(x: Tensor, intensity: dict) -> Tensor:
    """Normalized intensities of a float tensor [S, P, L]; see `Preprocessing.intensity`."""
    if intensity["kind"] == "ct":
        return (x.clamp(intensity["low"], intensity["high"]) - intensity["mean"]) / intensity["std"]
    # The least value is what is outside of the patient or the mask, and would pull mean and percentiles with its share.
    inside = x[x > x.min()]
    if not inside.numel():  # all the same, after resampling or in float32
        return torch.zeros_like(x)
    sample = inside[:: max(1, inside.numel() // _MAX_SAMPLES)]
    low, high = torch.quantile(sample, torch.tensor(_PERCENTILES, device=x.device)).tolist()
    inside = inside.clamp(low, high)
    return (x.clamp(low, high) - inside.mean()) / inside.std(unbiased=False).clamp(min=1e-6)
