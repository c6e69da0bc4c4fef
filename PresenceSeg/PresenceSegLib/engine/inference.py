"""Single-pass inference: a volume in, labels of all structures on the volume's own grid out.

The network runs over tiles, row by row along the S axis. As soon as no later tile can change a plane of blended logits,
that plane goes on to the volume's grid, is decided and forgotten: logits exist for one row of tiles only, so memory is
O(C x slab) and not O(C x volume).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.model import PLANES, ModelCard, ModelVersion
from PresenceSegLib.domain.segmentation import Segmentation, Status
from PresenceSegLib.domain.volume import Volume
from PresenceSegLib.engine.device import autocast
from PresenceSegLib.engine.networks import SegmentationNetwork, fit_to_stride, stride
from PresenceSegLib.engine.preprocessing import network_input, network_shape
from PresenceSegLib.engine.weights import load_network

OVERLAP = 0.25
_SLICES_PER_TILE = 32  # of slice networks; slices are independent, so this bounds memory and nothing else
_CHUNK_BYTES = 64 << 20  # logits on the volume's grid that exist at one time

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Model:
    """A model version loaded for work: its card and its network on a device."""

    card: ModelCard
    network: SegmentationNetwork
    device: torch.device

    @staticmethod
    def load(version: ModelVersion, device: torch.device) -> "Model":
        """Raises InputError when the version is damaged."""
        return Model(version.read_card(), load_network(version, device), device)

    def check(self, volume: Volume) -> None:
        """Raises InputError for a volume that is too small for the network; see `check_size`."""
        check_size(volume.grid, self.card)

    def segment(self, volume: Volume, progress: Progress = lambda fraction: None) -> np.ndarray:
        """Labels [layers, k, j, i] of a volume on its own grid; value n is the n-th structure of the card, 0 none.

        uint8, or uint16 for more than 255 structures; one layer unless structures may overlap (`card.label_layers`).
        `progress` gets the fraction done after each batch of tiles and stops the work by raising.

        Raises:
            InputError: the volume is too small for the network.
        """
        self.check(volume)
        order = volume.grid.axis_order()
        x = network_input(volume, self.card.preprocessing, self.device)
        shape = [volume.grid.shape[axis] for axis in order.permutation]
        labels = predict(self.network, x, self.card, shape, progress)
        labels = labels.cpu().numpy()
        if len(self.card.structures) > 255:
            labels = labels.astype(np.uint16)
        return np.stack([order.invert(layer) for layer in labels])

    def segmentation(self, volume: Volume, progress: Progress = lambda fraction: None) -> Segmentation:
        """The same as a segmentation: a segment for each structure, Not started, on the volume's grid."""
        labels = self.segment(volume, progress)
        return Segmentation.from_labels(labels, self.card.structures, volume.grid, Status.NOT_STARTED)


def check_size(grid: Grid, card: ModelCard) -> None:
    """Raises InputError for a volume smaller than the network's stride, which would see mostly made-up edges."""
    shape, step = network_shape(grid, card.preprocessing), stride(card.network)
    if any(n < s for n, s in zip(shape, step, strict=True)):
        raise InputError(
            f"The volume is too small for this model: {'×'.join(map(str, grid.size))} voxels become "
            f"{'×'.join(map(str, shape[::-1]))} at the model's spacing, and it needs at least "
            f"{'×'.join(map(str, step[::-1]))}; use a model with smaller voxels."
        )


@torch.inference_mode()
def predict(
    network: SegmentationNetwork,
    x: Tensor,
    card: ModelCard,
    shape: Sequence[int],
    progress: Progress = lambda fraction: None,
) -> Tensor:
    """Labels [layers, *shape] for network input `x` [S', P', L'], at `shape` voxels over the same extent."""
    layers = _layer_channels(card, x.device)
    dtype = torch.uint8 if len(card.structures) < 256 else torch.int32
    labels = torch.zeros((len(layers), *shape), dtype=dtype, device=x.device)
    slabs = logit_slabs(network, x, tile_shape(x.shape, card), progress)
    for first, logits in resampled_slabs(slabs, x.shape[0], shape):
        planes = slice(first, first + logits.shape[1])
        for n, channels in enumerate(layers):
            labels[n, planes] = decide(logits, channels, card.activation).to(dtype)
    return labels


def decide(logits: Tensor, channels: Tensor, activation: str) -> Tensor:
    """Label values [...] from logits [1 + C, ...]: the best of `channels` (1..C), or 0 where none is likely.

    With "softmax" background competes as channel 0; with "sigmoid" a structure needs a probability above one half.
    """
    scores = logits[channels]
    if activation == "softmax":
        scores = torch.cat([logits[:1], scores])
    else:
        scores = torch.cat([torch.zeros_like(logits[:1]), scores])
    values = torch.cat([channels.new_zeros(1), channels])
    return values[scores.argmax(dim=0)]


def tile_shape(shape: Sequence[int], card: ModelCard) -> tuple[int, int, int]:
    """Tile size [S, P, L]: about the training patch, fitted to the input, a multiple of the network's stride."""
    slice_axis = PLANES.index(card.network.plane) if card.network.plane else None
    patch = [_SLICES_PER_TILE if axis == slice_axis else n for axis, n in enumerate(card.preprocessing.patch)]
    wanted = [min(size, n) for size, n in zip(shape, patch, strict=True)]
    return fit_to_stride(wanted, stride(card.network))


def tile_starts(size: int, tile: int, overlap: float) -> list[int]:
    """First voxels of tiles that cover `size` voxels evenly, overlapping by at least `overlap` of a tile."""
    if size <= tile:
        return [0]
    count = -(-(size - tile) // max(1, int(tile * (1 - overlap)))) + 1
    return [round(n * (size - tile) / (count - 1)) for n in range(count)]


def tile_importance(tile: Sequence[int], slice_axis: int | None) -> Tensor:
    """Blending weights [S, P, L] of a tile: a Gaussian of an eighth of its size, flat across independent slices."""
    weights = torch.ones(())
    for axis, size in enumerate(tile):
        x = (torch.arange(size) + 0.5) / size - 0.5
        line = torch.ones(size) if axis == slice_axis else torch.exp(-0.5 * (x / 0.125) ** 2)
        weights = weights[..., None] * line
    return weights.clamp(min=1e-3)


def logit_slabs(
    network: SegmentationNetwork, x: Tensor, tile: Sequence[int], progress: Progress = lambda fraction: None
) -> Iterator[tuple[int, Tensor]]:
    """Blended logits of network input `x` [S, P, L], plane by plane in order.

    Yields (first plane, logits [1 + C, planes, P, L] float32); together the slabs cover all planes once. Input shorter
    than the tile is continued by its edge values, and the logits there are dropped.
    """
    size = x.shape
    x = F.pad(x[None, None], [n for axis in (2, 1, 0) for n in (0, max(0, tile[axis] - size[axis]))], mode="replicate")
    x = x[0, 0]
    slice_axis = network.slice_axis
    starts = [tile_starts(x.shape[a], tile[a], 0.0 if a == slice_axis else OVERLAP) for a in range(3)]
    importance = tile_importance(tile, slice_axis).to(x.device)
    row = [(p, q) for p in starts[1] for q in starts[2]]
    tiles, done = len(starts[0]) * len(row), 0
    slab = blend = None
    for n, s in enumerate(starts[0]):
        for p, q in row:
            part = (slice(s, s + tile[0]), slice(p, p + tile[1]), slice(q, q + tile[2]))
            with autocast(x.device):
                logits = network(x[part][None, None])[0].float()
            if slab is None:
                slab = logits.new_zeros(len(logits), tile[0], *x.shape[1:])
                blend = logits.new_zeros(tile[0], *x.shape[1:])
            slab[(slice(None), slice(None), *part[1:])] += logits * importance
            blend[(slice(None), *part[1:])] += importance
            done += 1
            progress(done / tiles)
        finished = (starts[0][n + 1] if n + 1 < len(starts[0]) else size[0]) - s
        yield s, (slab[:, :finished] / blend[:finished])[..., : size[1], : size[2]]
        slab, blend = _shifted(slab, finished, 1), _shifted(blend, finished, 0)


def resampled_slabs(
    slabs: Iterator[tuple[int, Tensor]], depth: int, shape: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Logits interpolated linearly, edge to edge, from `depth` planes to `shape` = [S, P, L] voxels.

    Takes and yields (first plane, logits [1 + C, planes, ...]) in order; each yielded chunk is of bounded size.
    """
    centers = ((torch.arange(shape[0], dtype=torch.float64) + 0.5) * depth / shape[0] - 0.5).clamp(0, depth - 1)
    below = centers.floor().long().clamp(max=max(depth - 2, 0))
    above = (below + 1).clamp(max=depth - 1)
    weight = (centers - below).float()
    held, first_held, next_out = None, 0, 0
    for _, slab in slabs:
        held = slab if held is None else torch.cat([held, slab], dim=1)
        ready = int((above < first_held + held.shape[1]).sum())
        chunk = max(1, _CHUNK_BYTES // (4 * held.shape[0] * shape[1] * shape[2]))
        for start in range(next_out, ready, chunk):
            out = slice(start, min(start + chunk, ready))
            low = held[:, (below[out] - first_held).to(held.device)]
            high = held[:, (above[out] - first_held).to(held.device)]
            planes = torch.lerp(low, high, weight[out].to(held.device)[:, None, None])
            if tuple(planes.shape[2:]) != tuple(shape[1:]):
                planes = F.interpolate(planes, size=tuple(shape[1:]), mode="bilinear", align_corners=False)
            yield start, planes
        next_out = max(next_out, ready)
        if next_out < shape[0]:
            keep_from = min(int(below[next_out]) - first_held, held.shape[1])  # the next one may lie in a later slab
            held, first_held = held[:, keep_from:], first_held + keep_from


def _shifted(buffer: Tensor, by: int, axis: int) -> Tensor:
    """The buffer moved on by some planes: what is still unfinished comes first, zeros follow."""
    rest = buffer.narrow(axis, by, buffer.shape[axis] - by)
    return torch.cat([rest, torch.zeros_like(buffer.narrow(axis, 0, by))], dim=axis)


def _layer_channels(card: ModelCard, device: torch.device) -> list[Tensor]:
    return [torch.tensor([card.structures.channel(n) for n in names], device=device) for names in card.label_layers]
