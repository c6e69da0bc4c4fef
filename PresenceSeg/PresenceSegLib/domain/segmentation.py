"""Segmentations in Slicer's own `.seg.nrrd` format: segments with names, colors, terminology, statuses and tags.

What this project does not know (other people's segments, extra tags and header fields, overlapping layers) passes
through a load and save unchanged. The format is described at
https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import SimpleITK as sitk
import slicerio
from slicerio.segmentation import terminology_entry_from_string, terminology_entry_to_string

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import replaced
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.structure import Color, Structure, StructureSet, distinct_color


class Status(Enum):
    """Slicer's segment status, by the words that Slicer writes into the tag `Segmentation.Status`."""

    NOT_STARTED = "notstarted"
    IN_PROGRESS = "inprogress"
    COMPLETED = "completed"
    FLAGGED = "flagged"


@dataclass
class Segment:
    """One segment: voxels with value `label_value` in layer `layer`.

    Attributes:
        id: Slicer's segment ID, unique in its segmentation.
        terminology: Slicer's serialized terminology entry or "".
        tags: all other tags, by name.
        fields: further per-segment fields of the file that nothing here interprets.
    """

    name: str
    id: str
    layer: int
    label_value: int
    color: Color
    status: Status = Status.NOT_STARTED
    terminology: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Segmentation:
    """Segments over label layers.

    Attributes:
        layers: unsigned integer array [L, k, j, i]; segments in one layer never overlap.
        grid: where the layers' voxels lie.
        segments: in the order of the file.
        fields: further header fields that nothing here interprets.
    """

    layers: np.ndarray
    grid: Grid
    segments: list[Segment] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def empty(grid: Grid) -> "Segmentation":
        return Segmentation(np.zeros((1, *grid.shape), np.uint8), grid)

    @staticmethod
    def from_labels(labels: np.ndarray, structures: StructureSet, grid: Grid, status: Status) -> "Segmentation":
        """One segment per structure from `labels` [L, k, j, i], where value n means the n-th structure (1..C).

        A structure without voxels becomes an empty segment of layer 0.
        """
        result = Segmentation(np.ascontiguousarray(labels), grid)
        layer_of = {int(v): n for n, layer in reversed(list(enumerate(labels))) for v in np.unique(layer)}
        for value, structure in enumerate(structures, start=1):
            result.segments.append(result._new_segment(structure, layer_of.get(value, 0), value, status))
        return result

    def named(self, name: str) -> Segment | None:
        """The segment of that name, or None. Raises InputError when two segments have it."""
        found = [s for s in self.segments if s.name == name]
        if len(found) > 1:
            raise InputError(f'{len(found)} segments are named "{name}"; rename or remove all but one in Slicer.')
        return found[0] if found else None

    def mask(self, segment: Segment) -> np.ndarray:
        """Boolean mask [k, j, i] of a segment on this segmentation's grid."""
        return self.layers[segment.layer] == segment.label_value

    def put(self, structure: Structure, mask: np.ndarray, status: Status) -> None:
        """Set the voxels (`mask` bool [k, j, i]) and status of a structure's segment, adding it if it is new.

        No other segment loses a voxel: the segment moves to a layer of its own where it would overlap another.
        """
        segment = self.named(structure.name)
        if segment is None:
            segment = self._new_segment(structure, 0, 0, status)
        else:
            self.layers[segment.layer][self.mask(segment)] = 0
            self.segments.remove(segment)
        segment.status = status
        self._place(segment, mask)

    def add(self, segment: Segment, mask: np.ndarray) -> None:
        """Add somebody else's segment as it is, but for its ID where that is taken.

        Raises InputError when a segment of that name exists.
        """
        if self.named(segment.name) is not None:
            raise InputError(f'There is a segment named "{segment.name}" already; rename one of the two in Slicer.')
        taken = segment.id in {s.id for s in self.segments}
        self._place(replace(segment, id=self._free_id() if taken else segment.id, fields=dict(segment.fields)), mask)

    def _place(self, segment: Segment, mask: np.ndarray) -> None:
        layer = next((n for n, voxels in enumerate(self.layers) if not voxels[mask].any()), None)
        if layer is None:
            self.layers = np.concatenate([self.layers, np.zeros_like(self.layers[:1])])
            layer = len(self.layers) - 1
        used = {s.label_value for s in self.segments if s.layer == layer}
        segment.layer = layer
        segment.label_value = next(value for value in range(1, len(used) + 2) if value not in used)
        segment.fields.pop("extent", None)
        if segment.label_value > np.iinfo(self.layers.dtype).max:
            self.layers = self.layers.astype(np.uint16)
        self.layers[layer][mask] = segment.label_value
        self.segments.append(segment)

    def label_layers(self, structures: StructureSet, statuses: Iterable[Status]) -> np.ndarray:
        """Labels [L, k, j, i] (uint8, or uint16 for more than 255 structures) of the named structures.

        Value n is the n-th structure of `structures` (1..C); segments in other statuses or of other names give 0.
        L is 1 unless structures overlap; where they do, each is complete in one of the layers.
        """
        dtype = np.uint8 if len(structures) < 256 else np.uint16
        wanted = [s for s in self.segments if s.name in structures and s.status in set(statuses)]
        result: list[np.ndarray] = []
        for number in sorted({s.layer for s in wanted}):
            table = np.zeros(int(self.layers[number].max()) + 1, dtype)
            for segment in wanted:
                if segment.layer == number and segment.label_value < len(table):
                    table[segment.label_value] = structures.channel(segment.name)
            labels = table[self.layers[number]]
            target = next((r for r in result if not ((r > 0) & (labels > 0)).any()), None)
            if target is None:
                result.append(labels)
            else:
                np.maximum(target, labels, out=target)
        return np.stack(result) if result else np.zeros((1, *self.grid.shape), dtype)

    def on_grid(self, grid: Grid) -> "Segmentation":
        """The same segmentation on another grid whose voxels coincide with this one's (a crop or an extension).

        Raises InputError, naming both geometries, when the voxels do not coincide.
        """
        if self.grid.same_as(grid):
            return self
        offset = self.grid.offset_in(grid)
        if offset is None:
            raise InputError(
                "The segmentation lies on another grid than its volume: the segmentation has "
                f"{self.grid.describe()}; the volume has {grid.describe()}."
            )
        layers = np.zeros((len(self.layers), *grid.shape), self.layers.dtype)
        here, there = _overlap(self.grid.shape, grid.shape, offset[::-1])
        layers[(slice(None), *there)] = self.layers[(slice(None), *here)]
        return self._with_layers(layers, grid)

    def resampled(self, grid: Grid) -> "Segmentation":
        """The same segmentation on any other grid, by nearest neighbor."""
        reference = sitk.Image(grid.size, sitk.sitkUInt8)
        reference.CopyInformation(grid.to_image(np.zeros(grid.shape, np.uint8)))
        layers = [
            sitk.GetArrayFromImage(
                sitk.Resample(self.grid.to_image(layer), reference, sitk.Transform(), sitk.sitkNearestNeighbor)
            )
            for layer in self.layers
        ]
        return self._with_layers(np.stack(layers), grid)

    def _with_layers(self, layers: np.ndarray, grid: Grid) -> "Segmentation":
        segments = [replace(s, fields={k: v for k, v in s.fields.items() if k != "extent"}) for s in self.segments]
        # These describe the grid the file had; Slicer derives them anew from the geometry of the file.
        described = ("referenceImageExtentOffset", "conversionParameters")
        return Segmentation(layers, grid, segments, {k: v for k, v in self.fields.items() if k not in described})

    def _new_segment(self, structure: Structure, layer: int, label_value: int, status: Status) -> Segment:
        return Segment(
            structure.name,
            self._free_id(),
            layer,
            label_value,
            structure.color,
            status,
            structure.terminology,
            fields={"nameAutoGenerated": False, "colorAutoGenerated": False},
        )

    def _free_id(self) -> str:
        used = {s.id for s in self.segments}
        return next(f"Segment_{n}" for n in range(1, len(used) + 2) if f"Segment_{n}" not in used)


def read_segmentation(path: str | Path) -> Segmentation:
    """Read a `.seg.nrrd` file.

    Raises InputError when the file is missing, damaged or no segmentation.
    """
    data = _read(Path(path), skip_voxels=False)
    voxels = data.pop("voxels")
    layers = np.ascontiguousarray(np.moveaxis(voxels.T, -1, 0)) if voxels.ndim == 4 else voxels.T[np.newaxis]
    if layers.dtype.kind != "u":
        layers = layers.astype(np.uint16 if layers.max(initial=0) > 255 else np.uint8)
    grid = Grid.from_matrix(layers.shape[:0:-1], data.pop("ijkToLPS"))
    return Segmentation(layers, grid, _segments(data.pop("segments"), len(layers), Path(path)), dict(data))


def read_statuses(path: str | Path) -> dict[str, Status]:
    """Names and statuses of the segments of a `.seg.nrrd` file, from its header alone."""
    segments = _segments(_read(Path(path), skip_voxels=True)["segments"], None, Path(path))
    return {s.name: s.status for s in segments}


def write_segmentation(path: str | Path, segmentation: Segmentation) -> None:
    """Write a `.seg.nrrd` file that Slicer opens as it is, all or nothing."""
    layers = segmentation.layers
    data = dict(segmentation.fields)
    data["voxels"] = layers[0].T if len(layers) == 1 else np.moveaxis(layers, 0, -1).T
    data["ijkToLPS"] = segmentation.grid.ijk_to_lps
    data.setdefault("containedRepresentationNames", ["Binary labelmap"])
    data["segments"] = [_segment_data(s) for s in segmentation.segments]
    with replaced(path) as temporary:
        slicerio.write_segmentation(str(temporary), data, compression_level=1)


def _read(path: Path, skip_voxels: bool) -> dict:
    if not path.is_file():
        raise InputError(f"There is no file {path}; check the path.")
    try:
        data = slicerio.read_segmentation(str(path), skip_voxels=skip_voxels)
    except (OSError, EOFError, ValueError, KeyError, IndexError, nrrd.NRRDError) as error:
        raise InputError(f"{path} cannot be read as a segmentation ({error}); it may be cut short.") from error
    if "segments" not in data:
        raise InputError(f"{path} holds no segments.")
    return data


def _segments(entries: list[dict], layer_count: int | None, path: Path) -> list[Segment]:
    segments = []
    for number, entry in enumerate(entries):
        entry = dict(entry)
        terminology = entry.pop("terminology", None)
        status = entry.pop("status", Status.NOT_STARTED.value)
        # Files of Slicer before 4.11 name neither layer nor value: there, each segment is a layer of its own.
        segment = Segment(
            name=entry.pop("name", f"Segment {number + 1}"),
            id=entry.pop("id"),
            layer=entry.pop("layer", number),
            label_value=entry.pop("labelValue", 1),
            color=tuple(entry.pop("color", distinct_color(number))),
            status=_status(status, path),
            terminology=terminology_entry_to_string(terminology) if terminology else "",
            tags=entry.pop("tags", {}),
            fields=entry,
        )
        if layer_count is not None and not 0 <= segment.layer < layer_count:
            raise InputError(f'{path} is damaged: the layer of segment "{segment.name}" is missing.')
        segments.append(segment)
    return segments


def _status(word: str, path: Path) -> Status:
    try:
        return Status(word)
    except ValueError:
        raise InputError(f'{path} holds the unknown segment status "{word}"; set it anew in Slicer.') from None


def _segment_data(segment: Segment) -> dict:
    data = dict(segment.fields)
    data.update(
        name=segment.name,
        id=segment.id,
        layer=segment.layer,
        labelValue=segment.label_value,
        color=list(segment.color),
        status=segment.status.value,
        tags=segment.tags,
    )
    if segment.terminology:
        data["terminology"] = terminology_entry_from_string(segment.terminology)
    return data


def _overlap(shape, other_shape, offset) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the common voxels in this array and in the other, where this one starts at `offset` in the other."""
    here, there = [], []
    for n, m, o in zip(shape, other_shape, offset, strict=True):
        start, stop = max(0, o), max(0, o, min(m, o + n))
        here.append(slice(start - o, stop - o))
        there.append(slice(start, stop))
    return tuple(here), tuple(there)
