"""Cases made ready for training: preprocessed once, kept in memory, and cached on disk for the next training."""

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from PresenceSegLib.domain.case import Case
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import make_folder, replaced
from PresenceSegLib.domain.model import Preprocessing
from PresenceSegLib.domain.segmentation import vanished
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.engine.preprocessing import network_input, network_shape, resample_labels, to_canonical

_CACHE_FORMAT = 1  # goes into every key: a change of the preprocessing code must not find old entries
_MAX_VOXELS_PER_STRUCTURE = 20_000


@dataclass(frozen=True)
class PreparedCase:
    """A case on the network's grid.

    Attributes:
        image: float32 [S, P, L], normalized.
        labels: uint8 or int32 [L, S, P, L]; Completed structures only, value n is the n-th structure.
        presence: bool [C]; False too for a structure of which nothing is left at the network's voxel size.
        voxels: per annotated structure index (0..C-1) up to 20,000 of its voxels, as flat indices; no entry for a
            structure without voxels.
        spacing: mm [S, P, L].
    """

    name: str
    image: Tensor
    labels: Tensor
    presence: Tensor
    voxels: dict[int, Tensor]
    spacing: tuple[float, float, float]


def prepare_cases(
    cases: Sequence[Case],
    structures: StructureSet,
    preprocessing: Preprocessing,
    cache: Path,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> list[PreparedCase]:
    """Prepare all cases, from the cache folder where they are unchanged since.

    Raises InputError, naming the case, when its files cannot be used.
    """
    result = []
    for case in progress(cases, len(cases)):
        try:
            result.append(_prepare(case, structures, preprocessing, cache))
        except InputError as error:
            raise InputError(f'Case "{case.name}": {error}') from error
    return result


def _prepare(case: Case, structures: StructureSet, preprocessing: Preprocessing, cache: Path) -> PreparedCase:
    wanted, state = _digest(structures.names, asdict(preprocessing) | {"patch": None}), _digest(*_stamps(case))
    path = cache / f"{case.name}-{wanted}-{state}.safetensors"  # whatever the patch: it changes nothing here
    tensors = _load(path)
    if tensors is None:
        tensors = _compute(case, structures, preprocessing)
        _store(path, tensors, outdated=cache.glob(f"{glob.escape(case.name)}-{wanted}-*.safetensors"))
    return PreparedCase(
        name=case.name,
        image=tensors["image"],
        labels=tensors["labels"],
        presence=tensors["presence"],
        voxels={c: tensors[f"voxels.{c}"] for c in range(len(structures)) if f"voxels.{c}" in tensors},
        spacing=tuple(tensors["spacing"].tolist()),
    )


def _compute(case: Case, structures: StructureSet, preprocessing: Preprocessing) -> dict[str, Tensor]:
    cpu = torch.device("cpu")
    volume = case.read_volume()
    labels = case.read_completed_labels(structures, volume.grid)
    order, shape = volume.grid.axis_order(), network_shape(volume.grid, preprocessing)
    layers = torch.stack([resample_labels(to_canonical(layer, order, cpu), shape) for layer in labels])
    presence = torch.from_numpy(case.presence(structures))
    for _, value in vanished(labels, layers.numpy()):
        presence[value - 1] = False  # too small for the network's voxels: it must not be learned as absent
    canonical = [volume.grid.shape[axis] for axis in order.permutation]
    spacing = np.array(volume.grid.canonical_spacing()) * canonical / shape
    tensors = {
        "image": network_input(volume, preprocessing, cpu).contiguous(),
        "labels": layers.contiguous(),
        "presence": presence,
        "spacing": torch.from_numpy(spacing),
    }
    generator = np.random.default_rng(0)
    flat = layers.flatten(1).numpy()
    for c in np.flatnonzero(presence.numpy()):
        found = np.flatnonzero((flat == c + 1).any(axis=0))
        if len(found) > _MAX_VOXELS_PER_STRUCTURE:
            found = generator.choice(found, _MAX_VOXELS_PER_STRUCTURE, replace=False)
        if len(found):
            tensors[f"voxels.{c}"] = torch.from_numpy(found)
    return tensors


def _digest(*content) -> str:
    return hashlib.sha256(json.dumps([_CACHE_FORMAT, *content]).encode()).hexdigest()[:16]


def _stamps(case: Case) -> list:
    """Changes whenever the case's files do."""
    return [str(case.folder.resolve()), *(_stamp(path) for path in (case.volume_path, case.segmentation_path))]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); restore it from a copy.") from error
    return stat.st_size, stat.st_mtime_ns


def _load(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path) if path.exists() else None
    except (OSError, SafetensorError):
        return None  # a damaged cache entry is as good as none: it is computed and written again


def _store(path: Path, tensors: dict[str, Tensor], outdated: Iterable[Path]) -> None:
    """Store an entry in place of those of the case's earlier states."""
    try:
        make_folder(path.parent)
        for old in list(outdated):
            old.unlink(missing_ok=True)
        with replaced(path) as temporary:
            temporary.write_bytes(save(tensors))
    except (InputError, OSError):
        # The cache only saves time: a full or read-only disk must not stop a training that fits into memory.
        return
