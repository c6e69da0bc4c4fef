"""Cases: one volume, its segmentation and statuses, as files in a folder of the project.

volume.nrrd              the volume, stored once
segmentation.seg.nrrd    Slicer's own format; the statuses live here and nowhere else
case.json                source, subject, split, times
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path

import numpy as np

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import read_json, write_json
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.names import repeated
from PresenceSegLib.domain.segmentation import (
    Segmentation,
    Status,
    read_segmentation,
    read_statuses,
    write_segmentation,
)
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import Volume, read_grid, read_volume, write_volume

SPLITS = ("", "train", "validation", "test")


class State(Enum):
    """What a case tells about one structure: the cells of the presence matrix."""

    ANNOTATED = "annotated"
    ABSENT = "confirmed absent"
    PREDICTED = "predicted only"
    IN_PROGRESS = "in progress"
    FLAGGED = "flagged"
    UNTOUCHED = "untouched"


_STATE_OF_STATUS = {
    Status.COMPLETED: State.ANNOTATED,
    Status.NOT_STARTED: State.PREDICTED,
    Status.IN_PROGRESS: State.IN_PROGRESS,
    Status.FLAGGED: State.FLAGGED,
}


@dataclass(frozen=True)
class CaseInfo:
    """What `case.json` holds.

    Attributes:
        source: name of the file or folder the volume came from (no path: paths carry names of people).
        subject: groups repeat scans, so that training and validation never share a person.
        split: "train", "validation", "test" or "" (training chooses). Test cases are never trained on.
        created: ISO 8601 time, UTC. (When the segmentation changed last is its file's own time.)
    """

    source: str
    subject: str
    split: str = ""
    created: str = ""

    def __post_init__(self):
        if self.split not in SPLITS:
            raise InputError(f'"{self.split}" is no split; use train, validation or test, or leave it empty.')


@dataclass(frozen=True)
class Case:
    """A case of a project; `folder` holds its files and its name is the case's name."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def volume_path(self) -> Path:
        return self.folder / "volume.nrrd"

    @property
    def segmentation_path(self) -> Path:
        return self.folder / "segmentation.seg.nrrd"

    @property
    def info(self) -> CaseInfo:
        data = read_json(self.folder / "case.json", "case file")
        known = CaseInfo.__dataclass_fields__
        return CaseInfo(**{"source": "", "subject": self.name} | {k: v for k, v in data.items() if k in known})

    def read_grid(self) -> Grid:
        """The volume's grid, from its header alone."""
        return read_grid(self.volume_path)

    def read_volume(self) -> Volume:
        return read_volume(self.volume_path)

    def read_segmentation(self) -> Segmentation:
        return read_segmentation(self.segmentation_path)

    def read_completed_labels(self, structures: StructureSet, grid: Grid) -> np.ndarray:
        """Labels [L, k, j, i] of the Completed structures on the volume's `grid`; see `Segmentation.label_layers`."""
        return self.read_segmentation().on_grid(grid).label_layers(structures, [Status.COMPLETED])

    def presence(self, structures: StructureSet) -> np.ndarray:
        """Presence vector, bool [C]: whether the segment of structure c is Completed; read from the header alone.

        Raises InputError when two segments have the name of one structure.
        """
        found = read_statuses(self.segmentation_path)
        names = [name for name, _ in found if name in structures]
        twice = repeated(names)
        if twice:
            raise InputError(f'{self.segmentation_path} has several segments named "{twice[0]}"; keep one, in Slicer.')
        statuses = dict(found)
        return np.array([statuses.get(name) is Status.COMPLETED for name in structures.names])

    def states(self, structures: StructureSet) -> list[State]:
        """One state per structure; reads the voxels, to tell annotated from confirmed absent."""
        segmentation = self.read_segmentation()
        return [_state(segmentation, name) for name in structures.names]

    def write(self, volume: Volume, segmentation: Segmentation, info: CaseInfo) -> None:
        """Write all files of a new case into its folder, which exists."""
        write_volume(self.volume_path, volume)
        self.write_info(replace(info, created=datetime.now(timezone.utc).isoformat(timespec="seconds")))
        write_segmentation(self.segmentation_path, segmentation)

    def write_segmentation(self, segmentation: Segmentation) -> None:
        """Replace the stored segmentation, all or nothing."""
        write_segmentation(self.segmentation_path, segmentation)

    def write_info(self, info: CaseInfo) -> None:
        write_json(self.folder / "case.json", asdict(info))


def _state(segmentation: Segmentation, name: str) -> State:
    segment = segmentation.named(name)
    if segment is None:
        return State.UNTOUCHED
    if segment.status is Status.COMPLETED and not segmentation.mask(segment).any():
        return State.ABSENT
    return _STATE_OF_STATUS[segment.status]
