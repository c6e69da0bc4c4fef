"""Varied patches: one affine resampling and a few intensity changes, for a whole batch at once on its device."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from PresenceSegTrainingLib.engine.presence import IGNORE
from PresenceSegTrainingLib.engine.sampling import Batch

# The sampler draws patches larger by this factor, so that rotated and enlarged ones rarely reach beyond what is there.
MARGIN = 1.2

_ROTATION = math.radians(15)
_SCALE = 0.15
_ANISOTROPIC = 2.5  # from this ratio of voxel sides on, only rotation around the longest side keeps the detail
_NOISE = 0.1
_CONTRAST = 0.25
_SHIFT = 0.2
_BIAS = 0.25
_GAMMA = 0.3
_PROBABILITY = 0.3  # of each intensity change but contrast and shift, which always happen


def margin_size(patch: Sequence[int], slice_axis: int | None) -> tuple[int, ...]:
    """Size of the patches to draw for augmentation to `patch`."""
    return tuple(n if axis == slice_axis else math.ceil(n * MARGIN) for axis, n in enumerate(patch))


def augment(batch: Batch, patch: Sequence[int], mirror: bool, slice_axis: int | None, seed: int) -> Batch:
    """Vary a batch of patches drawn with `margin_size`, down to the size `patch` [S, P, L].

    Images are interpolated linearly and labels by nearest neighbor; what falls outside of the drawn patch is IGNORE.
    With `mirror`, half of the patches change left and right: only for structure sets in which no structure has a side.
    """
    device = batch.images.device
    generator = torch.Generator().manual_seed(seed)
    theta = _affine(batch, patch, mirror, slice_axis, generator).to(device)
    grid = F.affine_grid(theta, [len(theta), 1, *patch], align_corners=False)
    images = F.grid_sample(batch.images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Zero padding gives 0, so labels travel one higher than they are: IGNORE + 1 = 0.
    shifted = (batch.labels - IGNORE).float()
    labels = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return Batch(_vary_intensity(images, generator), labels.round().int() + IGNORE, batch.presence, batch.spacing)


def _affine(batch: Batch, patch: Sequence[int], mirror: bool, slice_axis: int | None, generator) -> Tensor:
    """Matrices [B, 3, 4] for `affine_grid` (its axes are L, P, S): rotation and scaling about the middle, in mm."""
    count = len(batch.images)
    drawn = torch.tensor(batch.images.shape[2:], dtype=torch.float64).flip(0)
    wanted = torch.tensor(patch, dtype=torch.float64).flip(0)
    matrices = []
    for n in range(count):
        spacing = batch.spacing[n].flip(0)
        matrix = torch.diag(1 + _uniform(generator, 3) * _SCALE)
        for axis in _rotation_axes(spacing, None if slice_axis is None else 2 - slice_axis):
            matrix = _rotation(axis, float(_uniform(generator, 1)) * _ROTATION) @ matrix
        if slice_axis is not None:
            matrix[2 - slice_axis] = matrix[:, 2 - slice_axis] = 0
            matrix[2 - slice_axis, 2 - slice_axis] = 1
        if mirror and torch.rand(1, generator=generator) < 0.5:
            matrix = matrix @ torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
        in_voxels = torch.diag(1 / spacing) @ matrix @ torch.diag(spacing)
        matrices.append(torch.diag(1 / drawn) @ in_voxels @ torch.diag(wanted))
    return torch.cat([torch.stack(matrices), torch.zeros(count, 3, 1)], dim=2).float()


def _rotation_axes(spacing: Tensor, slice_axis: int | None) -> list[int]:
    if slice_axis is not None:
        return [slice_axis]
    if spacing.max() > _ANISOTROPIC * spacing.min():
        return [int(spacing.argmax())]
    return [0, 1, 2]


def _rotation(axis: int, angle: float) -> Tensor:
    first, second = (a for a in range(3) if a != axis)
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix


def _vary_intensity(images: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast, brightness, gamma, a smooth bias field and noise, each of its own strength per patch."""
    count, device = len(images), images.device

    def per_patch(strength: float, always: bool = False) -> Tensor:
        values = _uniform(generator, count) * strength
        happens = torch.rand(count, generator=generator) < (1.0 if always else _PROBABILITY)
        return (values * happens).float().view(-1, 1, 1, 1, 1).to(device)

    low, high = images.amin((2, 3, 4), keepdim=True), images.amax((2, 3, 4), keepdim=True)
    unit = (images - low) / (high - low).clamp(min=1e-6)
    images = unit.pow(per_patch(_GAMMA).exp()) * (high - low) + low
    coarse = torch.randn((count, 1, 3, 3, 3), generator=generator).to(device)
    bias = F.interpolate(coarse, images.shape[2:], mode="trilinear", align_corners=True)
    images = images * (bias * per_patch(_BIAS)).exp()
    images = images * (1 + per_patch(_CONTRAST, always=True)) + per_patch(_SHIFT, always=True)
    noise = torch.randn(images.shape, generator=generator).to(device)
    return images + noise * per_patch(_NOISE).abs()


def _uniform(generator: torch.Generator, count: int) -> Tensor:
    """Uniform in -1..1."""
    return torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1
