"""Which patches a step sees: drawn from annotated structures of each case only, balanced over (case, structure) pairs.

Every draw depends on the seed and the iteration alone, so a training that was stopped goes on exactly as it would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from PresenceSegLib.domain.errors import InputError
from PresenceSegTrainingLib.engine.preparation import PreparedCase
from PresenceSegTrainingLib.engine.presence import IGNORE


@dataclass(frozen=True)
class Batch:
    """Patches of one step: images [B, 1, S, P, L] float32, labels [B, L, S, P, L] int32 (IGNORE outside of the
    volume), presence bool [B, C], spacing float64 [B, 3] in mm."""

    images: Tensor
    labels: Tensor
    presence: Tensor
    spacing: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.presence.to(device, non_blocking=True),
            self.spacing,
        )


class PatchSampler:
    """Draws batches of patches of a fixed size.

    A patch is centered near a voxel of an annotated (case, structure) pair, or, for `1 - foreground_fraction` of the
    patches, anywhere in a case in which something is annotated, confirmed absent included. A pair's chance falls with
    the square root of the number of cases its structure is annotated in, so that a structure annotated in few cases
    still appears often.

    Raises InputError when nothing is annotated in any of the cases.
    """

    def __init__(self, cases: Sequence[PreparedCase], size: Sequence[int], foreground_fraction: float, seed: int):
        self._cases = cases
        self._size = tuple(size)
        self._foreground_fraction = foreground_fraction
        self._seed = seed
        self._teaching = [n for n, case in enumerate(cases) if case.presence.any()]
        if not self._teaching:
            raise InputError("Nothing annotated is left at the voxel size of the network; use smaller voxels.")
        self._pairs = [(n, c) for n in self._teaching for c in cases[n].voxels]
        counts = np.bincount([c for _, c in self._pairs], minlength=1)
        weights = np.array([1 / np.sqrt(counts[c]) for _, c in self._pairs])
        self._pair_chances = weights / weights.sum() if len(weights) else weights

    def draw(self, iteration: int, batch: int) -> Batch:
        """The batch of an iteration; the same arguments always give the same batch."""
        rng = np.random.default_rng([self._seed, 2, iteration])
        parts = [self._patch(rng, foreground=self._wants_foreground(n, batch, rng)) for n in range(batch)]
        layers = max(labels.shape[0] for _, labels, _ in parts)
        return Batch(
            torch.stack([image[None] for image, _, _ in parts]),
            torch.stack([_with_layers(labels, layers) for _, labels, _ in parts]),
            torch.stack([case.presence for _, _, case in parts]),
            torch.tensor(np.array([case.spacing for _, _, case in parts])),
        )

    def _wants_foreground(self, n: int, batch: int, rng: np.random.Generator) -> bool:
        """Stratified over the batch, so that every batch has about its share of both."""
        return bool(self._pairs) and (n + rng.random()) / batch < self._foreground_fraction

    def _patch(self, rng: np.random.Generator, foreground: bool) -> tuple[Tensor, Tensor, PreparedCase]:
        if foreground:
            number, structure = self._pairs[rng.choice(len(self._pairs), p=self._pair_chances)]
            case = self._cases[number]
            voxels = case.voxels[structure]
            center = np.unravel_index(int(voxels[rng.integers(len(voxels))]), case.image.shape)
        else:
            case = self._cases[self._teaching[rng.integers(len(self._teaching))]]
            center = rng.integers(case.image.shape)
        # Off-center by up to a quarter, or every structure would be learned at the middle of the patch only.
        starts = [
            self._start(int(c + rng.integers(-(size // 4), size // 4 + 1)), size, n)
            for c, size, n in zip(center, self._size, case.image.shape, strict=True)
        ]
        return *_crop(case, starts, self._size), case

    @staticmethod
    def _start(center: int, size: int, length: int) -> int:
        """First voxel of the patch along one axis: inside the volume, or around it where the volume is shorter."""
        low, high = min(0, length - size), max(0, length - size)
        return min(max(center - size // 2, low), high)


def _crop(case: PreparedCase, starts: Sequence[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Patch of image and labels; beyond the volume the image goes on with its edge values and labels are IGNORE."""
    wanted = [torch.arange(start, start + n) for start, n in zip(starts, size, strict=True)]
    inside = [(w >= 0) & (w < n) for w, n in zip(wanted, case.image.shape, strict=True)]
    s, p, q = (w.clamp(0, n - 1) for w, n in zip(wanted, case.image.shape, strict=True))
    image = case.image[s[:, None, None], p[:, None], q]
    labels = case.labels[:, s[:, None, None], p[:, None], q].int()
    valid = inside[0][:, None, None] & inside[1][:, None] & inside[2]
    return image, labels.masked_fill(~valid, IGNORE)


def _with_layers(labels: Tensor, layers: int) -> Tensor:
    missing = layers - labels.shape[0]
    return torch.cat([labels, labels.clamp(max=0)[:1].expand(missing, -1, -1, -1)]) if missing else labels
