"""What the cases decide before a training: who validates, which spacing, patch, intensities and network."""

from collections.abc import Sequence

import numpy as np
import torch

from PresenceSegLib.domain.case import Case
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.model import PLANES, ModelCard, NetworkSpec, Preprocessing
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.engine.networks import default_spec, fit_to_stride, stride
from PresenceSegLib.engine.preprocessing import network_shape
from PresenceSegTrainingLib.domain.settings import TrainingSettings

# Voxels of a patch: what trains at some steps a second on two cores, and what fills a small graphics card.
_PATCH_VOXELS = {"cpu": 48 * 56 * 48, "other": 96**3}
_SLICE_VOXELS = 192 * 192
_BATCH = {"cpu": 4, "other": 4, "slices": 12}
_CT_LEVEL = -200  # Hounsfield units: no other modality has volumes that reach below this
_SAMPLES_PER_CASE = 20_000


def split_cases(cases: Sequence[Case], structures: StructureSet, settings: TrainingSettings):
    """Split the cases that teach anything into training and validation cases; test cases are left out.

    Cases marked "validation" validate. Where none is marked, a fraction of the subjects is drawn, so that as many
    structures as possible are scored but none loses its last training case; none at all from fewer than four subjects.
    All cases of a subject fall on the same side; a subject of which one case is a test case is not trained on at all.

    Returns:
        (training cases, validation cases)

    Raises:
        InputError: no structure is annotated in any case that may be trained on, or the cases of one subject are marked
            for training and for validation.
    """
    infos = {case.name: case.info for case in cases}
    presence = {case.name: case.presence(structures) for case in cases}
    marked = {
        split: {i.subject for i in infos.values() if i.split == split} for split in ("train", "validation", "test")
    }
    both = sorted(marked["train"] & marked["validation"])
    if both:
        raise InputError(
            f'Cases of the subject "{both[0]}" are marked for training and for validation; decide for one.'
        )
    usable = [c for c in cases if infos[c.name].subject not in marked["test"] and presence[c.name].any()]
    validation = marked["validation"]
    if not validation & {infos[c.name].subject for c in usable}:
        validation = _draw_validation(usable, infos, presence, settings)
    train = [c for c in usable if infos[c.name].subject not in validation]
    held_out = [c for c in usable if infos[c.name].subject in validation]
    if not train:
        raise InputError(
            "No case has an annotated structure to train on: complete structures in Slicer, or import labels with a "
            "mapping; only Completed segments train."
        )
    return train, held_out


def _draw_validation(cases, infos, presence, settings: TrainingSettings) -> set[str]:
    marked = {infos[c.name].subject for c in cases if infos[c.name].split != ""}
    free = sorted({infos[c.name].subject for c in cases} - marked)
    wanted = round(settings.validation_fraction * len(free)) if len(free) >= 4 else 0
    if settings.validation_fraction > 0 and len(free) >= 4:
        wanted = max(wanted, 1)
    presence_of = {
        subject: sum(
            (presence[c.name].astype(int) for c in cases if infos[c.name].subject == subject), np.zeros(1, int)
        )
        for subject in {infos[c.name].subject for c in cases}
    }
    left = sum(presence_of.values())
    chosen: list[str] = []
    candidates = np.random.default_rng([settings.seed, 1]).permutation(free).tolist()
    while candidates and len(chosen) < wanted:
        # First those that score structures which no chosen subject scores, else in the drawn order.
        scored = sum((presence_of[s] for s in chosen), np.zeros(1, int)) > 0
        subject = max(candidates, key=lambda s: ((presence_of[s] > 0) & ~scored).sum())
        candidates.remove(subject)
        if not ((presence_of[subject] > 0) & (left <= presence_of[subject])).any():
            chosen.append(subject)
            left = left - presence_of[subject]
    return set(chosen)


def plan(
    cases: Sequence[Case],
    structures: StructureSet,
    settings: TrainingSettings,
    device: torch.device,
    parent: ModelCard | None,
) -> tuple[NetworkSpec, Preprocessing]:
    """Network and preprocessing for training on `cases`: the parent's, or what the cases' spacing and size suggest.

    Raises InputError for an unknown network or plane.
    """
    if parent is not None:
        return parent.network, parent.preprocessing
    grids = [case.read_grid() for case in cases]
    median = np.median([g.canonical_spacing() for g in grids], axis=0)
    slice_axis = PLANES.index(settings.plane) if settings.plane in PLANES else None
    spacing = tuple(
        None if axis == slice_axis else float(wanted or round(found, 4))
        for axis, (wanted, found) in enumerate(zip(settings.spacing, median, strict=True))
    )
    intensity = _intensity(cases, structures, settings.intensity)
    shapes = [network_shape(g, Preprocessing(spacing, intensity, (1, 1, 1))) for g in grids]
    patch = _patch(np.median(shapes, axis=0), spacing, settings, device, slice_axis)
    physical = tuple(float(s or m) for s, m in zip(spacing, median, strict=True))
    spec = default_spec(settings.network, settings.plane, physical, patch)
    return spec, Preprocessing(spacing, intensity, fit_to_stride(patch, stride(spec)))


def batch_size(settings: TrainingSettings, spec: NetworkSpec, device: torch.device) -> int:
    return settings.batch or _BATCH["slices" if spec.plane else "cpu" if device.type == "cpu" else "other"]


def _patch(shape, spacing, settings: TrainingSettings, device: torch.device, slice_axis: int | None) -> tuple[int, ...]:
    """The median size of the cases, its longest axes (in mm) cut down to what the device trains in a batch."""
    budget = _PATCH_VOXELS["cpu" if device.type == "cpu" else "other"] if slice_axis is None else _SLICE_VOXELS
    patch = [int(n) for n in shape]
    if slice_axis is not None:
        patch[slice_axis] = 1
    length = [1.0 if s is None else s for s in spacing]
    while np.prod(patch) > budget:
        axis = max((a for a in range(3) if a != slice_axis), key=lambda a: patch[a] * length[a])
        patch[axis] -= max(1, patch[axis] // 16)
    return tuple(wanted or n for wanted, n in zip(settings.patch, patch, strict=True))


def _intensity(cases: Sequence[Case], structures: StructureSet, kind: str) -> dict:
    """The intensity part of the preprocessing; constants for CT come from the annotated voxels."""
    if kind == "mr":
        return {"kind": "mr"}
    samples, lows = [], []
    for n, case in enumerate(cases):
        volume = case.read_volume()
        array = volume.array
        lows.append(float(array.min()))
        if kind == "auto" and n == 0 and lows[0] > _CT_LEVEL:
            return {"kind": "mr"}
        inside = array[case.read_completed_labels(structures, volume.grid).max(axis=0) > 0]
        samples.append(np.random.default_rng(n).permutation(inside)[:_SAMPLES_PER_CASE])
    values = np.concatenate(samples).astype(np.float64)
    if kind == "auto" and (max(lows) > _CT_LEVEL or values.size == 0):
        return {"kind": "mr"}
    if values.size == 0:
        raise InputError("CT intensities are scaled by the annotated voxels, and there are none; annotate some first.")
    low, high = np.percentile(values, (0.5, 99.5))
    clipped = values.clip(low, high)
    return {
        "kind": "ct",
        "low": float(low),
        "high": float(max(high, low + 1)),
        "mean": float(clipped.mean()),
        "std": float(max(clipped.std(), 1e-3)),
    }
