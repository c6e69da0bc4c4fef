"""Segmentations in Slicer's own `.seg.nrrd` format: segments with names, colors, terminology, statuses and tags.

What this project does not know (other people's segments, extra tags and header fields, overlapping layers) passes
through a load and save unchanged. The format is described at
https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.nrrd_file import read_nrrd, write_nrrd
from PresenceSegLib.domain.status import Status
from PresenceSegLib.domain.structure import Color, Structure, StructureSet, distinct_color

_STATUS_TAG = "Segmentation.Status"
_TERMINOLOGY_TAG = "TerminologyEntry"
# What Slicer expects in the header beside the segments.
_SEGMENTATION_TEXTS = {
    "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
    "Segmentation_MasterRepresentation": "Binary labelmap",
    "Segmentation_ReferenceImageExtentOffset": "0 0 0",
}


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
    fields: dict[str, str] = field(default_factory=dict)


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
    fields: dict[str, str] = field(default_factory=dict)

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
        segment, position = self.named(structure.name), len(self.segments)
        if segment is None:
            segment = self._new_segment(structure, 0, 0, status)
        else:
            self.layers[segment.layer][self.mask(segment)] = 0
            position = self.segments.index(segment)
            self.segments.remove(segment)
        segment.status = status
        self._place(segment, mask, position)

    def add(self, segment: Segment, mask: np.ndarray) -> None:
        """Add somebody else's segment as it is, but for its ID where that is taken.

        Raises InputError when a segment of that name exists.
        """
        if self.named(segment.name) is not None:
            raise InputError(f'There is a segment named "{segment.name}" already; rename one of the two in Slicer.')
        taken = segment.id in {s.id for s in self.segments}
        own = replace(segment, id=self._free_id() if taken else segment.id, fields=dict(segment.fields))
        self._place(own, mask, len(self.segments))

    def _place(self, segment: Segment, mask: np.ndarray, position: int) -> None:
        layer = next((n for n, voxels in enumerate(self.layers) if not voxels[mask].any()), None)
        if layer is None:
            self.layers = np.concatenate([self.layers, np.zeros_like(self.layers[:1])])
            layer = len(self.layers) - 1
        used = {s.label_value for s in self.segments if s.layer == layer}
        free = (value for value in itertools.count(1) if value not in used)
        segment.layer = layer
        # A file may hold voxels of a value that no segment has; they must not become part of this one.
        segment.label_value = next(value for value in free if not (self.layers[layer] == value).any())
        # Older versions of Slicer crop a whole layer to the extent that its first segment has in the file.
        for placed in (segment, *(s for s in self.segments if s.layer == layer)):
            placed.fields.pop("Extent", None)
        if segment.label_value > np.iinfo(self.layers.dtype).max:
            self.layers = self.layers.astype(np.uint16)
        self.layers[layer][mask] = segment.label_value
        self.segments.insert(position, segment)

    def label_layers(self, structures: StructureSet, statuses: Iterable[Status]) -> np.ndarray:
        """Labels [L, k, j, i] (uint8, or uint16 for more than 255 structures) of the named structures.

        Value n is the n-th structure of `structures` (1..C); segments in other statuses or of other names give 0.
        L is 1 unless structures overlap; where they do, each is complete in one of the layers.

        Raises InputError when two segments have the name of one structure.
        """
        dtype = np.uint8 if len(structures) < 256 else np.uint16
        statuses = set(statuses)
        found = (self.named(name) for name in structures.names)
        wanted = [s for s in found if s is not None and s.status in statuses]
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

        Raises InputError, naming both geometries, when the voxels do not coincide; and when nothing of a segment
        would be left, which would make it look empty.
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
        """The same segmentation on any other grid, by nearest neighbor.

        Raises InputError when nothing of a segment would be left.
        """
        reference = grid.to_image(np.zeros(grid.shape, np.uint8))
        layers = [
            sitk.GetArrayFromImage(
                sitk.Resample(self.grid.to_image(layer), reference, sitk.Transform(), sitk.sitkNearestNeighbor)
            )
            for layer in self.layers
        ]
        return self._with_layers(np.stack(layers), grid)

    def _with_layers(self, layers: np.ndarray, grid: Grid) -> "Segmentation":
        gone = vanished(self.layers, layers)
        for segment in self.segments:
            if (segment.layer, segment.label_value) in gone:
                raise InputError(
                    f'Nothing of the segment "{segment.name}" is left on the grid of the volume, it lies outside of it '
                    f"or is too small: the segmentation has {self.grid.describe()}; the volume has {grid.describe()}."
                )
        segments = [replace(s, fields={k: v for k, v in s.fields.items() if k != "Extent"}) for s in self.segments]
        # These describe the grid the file had; Slicer derives them anew from the geometry of the file.
        described = ("Segmentation_ReferenceImageExtentOffset", "Segmentation_ConversionParameters")
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
            fields={"NameAutoGenerated": "0", "ColorAutoGenerated": "0"},
        )

    def _free_id(self) -> str:
        used = {s.id for s in self.segments}
        return next(f"Segment_{n}" for n in range(1, len(used) + 2) if f"Segment_{n}" not in used)


def vanished(before: np.ndarray, after: np.ndarray) -> set[tuple[int, int]]:
    """Layer and value of all labels that `before` [L, k, j, i] has voxels of, and `after` (on another grid) has not."""
    present = [{(n, int(v)) for n, layer in enumerate(a) for v in np.unique(layer) if v} for a in (before, after)]
    return present[0] - present[1]


def read_segmentation(path: str | Path) -> Segmentation:
    """Read a `.seg.nrrd` file.

    Raises InputError when the file is missing, damaged or no segmentation.
    """
    path = Path(path)
    texts, ijk_to_lps, layers = read_nrrd(path, skip_voxels=False)
    if layers.dtype.kind != "u":
        if layers.min(initial=0) < 0 or layers.max(initial=0) > np.iinfo(np.uint16).max:
            raise InputError(f"{path} holds labels below 0 or above 65535; save it anew in Slicer.")
        layers = layers.astype(np.uint16 if layers.max(initial=0) > 255 else np.uint8)
    fields, segments = _segments(texts, path)
    for segment in segments:
        if not 0 <= segment.layer < len(layers):
            raise InputError(f'{path} is damaged: the layer of segment "{segment.name}" is missing.')
    return Segmentation(layers, Grid.from_matrix(layers.shape[:0:-1], ijk_to_lps), segments, fields)


def read_statuses(path: str | Path) -> list[tuple[str, Status]]:
    """Names and statuses of the segments of a `.seg.nrrd` file in its order, from its header alone."""
    path = Path(path)
    return [(s.name, s.status) for s in _segments(read_nrrd(path, skip_voxels=True)[0], path)[1]]


def write_segmentation(path: str | Path, segmentation: Segmentation) -> None:
    """Write a `.seg.nrrd` file that Slicer opens as it is, all or nothing."""
    extent = " ".join(f"0 {n - 1}" for n in segmentation.grid.size)
    texts = {}
    for number, segment in enumerate(segmentation.segments):
        own = {"Extent": extent} | segment.fields | _segment_texts(segment)
        texts.update({f"Segment{number}_{key}": value for key, value in sorted(own.items())})
    texts.update(_SEGMENTATION_TEXTS | segmentation.fields)
    write_nrrd(path, texts, segmentation.grid.ijk_to_lps, segmentation.layers)


def _segments(texts: dict[str, str], path: Path) -> tuple[dict[str, str], list[Segment]]:
    """The texts of a file's header that belong to no segment, and the segments (in the order of their numbers)."""
    fields: dict[str, str] = {}
    entries: dict[int, dict[str, str]] = {}
    for key, text in texts.items():
        match = re.fullmatch(r"Segment(\d+)_(.+)", key)
        if match:
            entries.setdefault(int(match[1]), {})[match[2]] = text
        else:
            fields[key] = text
    if not entries and not any(key.startswith("Segmentation_") for key in fields):
        raise InputError(f"{path} holds no segments.")
    try:
        return fields, [_segment(number, entries[number], path) for number in sorted(entries)]
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it from a copy or save it anew in Slicer.") from error


def _segment(number: int, entry: dict[str, str], path: Path) -> Segment:
    tags = dict(_tag(text) for text in entry.pop("Tags", "").split("|") if text)
    color = entry.pop("Color", None)
    # Files of Slicer before 4.11 name neither layer nor value: there, each segment is a layer of its own.
    return Segment(
        name=entry.pop("Name", f"Segment {number + 1}"),
        id=entry.pop("ID", f"Segment_{number + 1}"),
        layer=int(entry.pop("Layer", number)),
        label_value=int(entry.pop("LabelValue", 1)),
        color=distinct_color(number) if color is None else _color(color),
        status=_status(tags.pop(_STATUS_TAG, Status.NOT_STARTED.value), path),
        # An empty entry stays a tag: without it, Slicer would put its default terminology.
        terminology=tags.pop(_TERMINOLOGY_TAG) if tags.get(_TERMINOLOGY_TAG) else "",
        tags=tags,
        fields=entry,
    )


def _tag(text: str) -> tuple[str, str]:
    name, _, value = text.partition(":")
    return name, value


def _color(text: str) -> Color:
    red, green, blue = (float(part) for part in text.split())
    return red, green, blue


def _status(word: str, path: Path) -> Status:
    try:
        return Status(word)
    except ValueError:
        raise InputError(f'{path} holds the unknown segment status "{word}"; set it anew in Slicer.') from None


def _segment_texts(segment: Segment) -> dict[str, str]:
    tags = segment.tags | {_STATUS_TAG: segment.status.value}
    if segment.terminology:
        tags[_TERMINOLOGY_TAG] = segment.terminology
    return {
        "Color": " ".join(repr(float(part)) for part in segment.color),
        "ID": segment.id,
        "LabelValue": str(segment.label_value),
        "Layer": str(segment.layer),
        "Name": segment.name,
        # Older versions of Slicer need the separator after the last tag too.
        "Tags": "".join(f"{name}:{value}|" for name, value in sorted(tags.items())),
    }


def _overlap(shape, other_shape, offset) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the common voxels in this array and in the other, where this one starts at `offset` in the other."""
    here, there = [], []
    for n, m, o in zip(shape, other_shape, offset, strict=True):
        start, stop = max(0, o), max(0, o, min(m, o + n))
        here.append(slice(start - o, stop - o))
        there.append(slice(start, stop))
    return tuple(here), tuple(there)
