"""Projects: a folder with a structure set, cases and model versions, readable without PresenceSeg.

project.json        name, format number, structure set, active model version
cases/<case>/       see case.py
models/<version>/   see model.py
training/<version>/ checkpoint of a training that has not ended; gone when the version is written
cache/              preprocessed cases; can be deleted at any time
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from PresenceSegLib.domain.case import Case, CaseInfo, State
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import check_format, make_folder, move, read_json, staging_folder, write_json
from PresenceSegLib.domain.model import ModelVersion
from PresenceSegLib.domain.names import check_case_name
from PresenceSegLib.domain.segmentation import Segmentation
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import Volume

PROJECT_FORMAT = 1


@dataclass(frozen=True)
class PresenceMatrix:
    """What every case tells about every structure: `states[n][c]` for case n and structure c."""

    cases: tuple[str, ...]
    structures: tuple[str, ...]
    states: tuple[tuple[State, ...], ...]

    @property
    def presence(self) -> np.ndarray:
        """Bool [cases, C]: annotated or confirmed absent."""
        known = (State.ANNOTATED, State.ABSENT)
        shape = len(self.cases), len(self.structures)
        return np.array([[s in known for s in row] for row in self.states], bool).reshape(shape)

    def count(self, structure: str, state: State) -> int:
        """Number of cases in which the structure has the state."""
        column = self.structures.index(structure)
        return sum(row[column] is state for row in self.states)


@dataclass(frozen=True)
class Project:
    """An opened project. Cheap: cases and models are read from disk when asked for."""

    folder: Path
    name: str
    structures: StructureSet
    active_version: str = ""

    @staticmethod
    def create(folder: str | Path, name: str, structures: StructureSet) -> "Project":
        """Make a new project folder. Raises InputError when there is something at `folder` already."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists already and is not empty; choose a new folder for the project.")
        make_folder(folder)
        project = Project(folder, name, structures)
        project.save()
        return project

    @staticmethod
    def open(folder: str | Path) -> "Project":
        """Raises InputError when there is no project, or a damaged or newer one."""
        folder = Path(folder)
        path = folder / "project.json"
        if folder.is_dir() and not path.exists():
            raise InputError(f"{folder} is no project: it has no project.json; make one with `presenceseg new`.")
        data = read_json(path, "project")
        check_format(data, PROJECT_FORMAT, path, "project")
        try:
            structures = StructureSet.from_json(data["structures"], path)
            return Project(folder, str(data["name"]), structures, str(data.get("active_version", "")))
        except KeyError as error:
            raise InputError(f"The project {path} is damaged: {error} is missing; restore it from a copy.") from error

    def save(self) -> None:
        write_json(
            self.folder / "project.json",
            {
                "format": PROJECT_FORMAT,
                "name": self.name,
                "structures": self.structures.to_json(),
                "active_version": self.active_version,
            },
        )

    def activate(self, version: str) -> "Project":
        """Make a model version the one that segments by default; returns the changed project."""
        changed = replace(self, active_version=self.model(version).name)
        changed.save()
        return changed

    @property
    def training_folder(self) -> Path:
        return self.folder / "training"

    @property
    def cache_folder(self) -> Path:
        return self.folder / "cache"

    def cases(self) -> list[Case]:
        """All cases, by name."""
        return [Case(folder) for folder in _subfolders(self.folder / "cases")]

    def case(self, name: str) -> Case:
        case = Case(self.folder / "cases" / name)
        if not case.folder.is_dir():
            raise InputError(f'The project {self.folder} has no case "{name}"; its cases are listed by its info.')
        return case

    def add_case(self, name: str, volume: Volume, segmentation: Segmentation, info: CaseInfo) -> Case:
        """Store a new case, all files or none. Raises InputError when the name is taken or no file name."""
        check_case_name(name)
        target = Case(self.folder / "cases" / name)
        with staging_folder(self.folder) as staging:
            Case(staging).write(volume, segmentation, info)
            move(staging, target.folder)
        return target

    def presence_matrix(self) -> PresenceMatrix:
        cases = self.cases()
        states = tuple(tuple(case.states(self.structures)) for case in cases)
        return PresenceMatrix(tuple(c.name for c in cases), self.structures.names, states)

    def models(self) -> list[ModelVersion]:
        """All model versions, oldest first."""
        return [ModelVersion(folder) for folder in _subfolders(self.folder / "models")]

    def model(self, version: str = "") -> ModelVersion:
        """A model version by name; without a name the active one."""
        version = version or self.active_version
        if not version:
            raise InputError(f"The project {self.folder} has no active model version; train one first.")
        model = ModelVersion(self.folder / "models" / version)
        if not model.card_path.is_file():
            versions = ", ".join(m.name for m in self.models()) or "none"
            raise InputError(f'The project {self.folder} has no model version "{version}"; it has: {versions}.')
        return model

    def unfinished_trainings(self) -> list[Path]:
        """Folders of trainings that were stopped before they made a model version, oldest first."""
        made = {model.name for model in self.models()}  # one killed right after leaves its folder behind
        return [folder for folder in _subfolders(self.training_folder) if folder.name not in made]

    def next_version(self) -> str:
        """A version name that is free among the models and the unfinished trainings: v1, v2, ..."""
        taken = [f.name for f in _subfolders(self.folder / "models") + self.unfinished_trainings()]
        numbers = [int(m.group(1)) for m in (re.fullmatch(r"v(\d+)", name) for name in taken) if m]
        return f"v{max(numbers, default=0) + 1}"


def _subfolders(folder: Path) -> list[Path]:
    """Folders inside, without hidden (unfinished) ones, in natural order: v2 before v10."""
    if not folder.is_dir():
        return []
    found = [f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")]
    return sorted(found, key=lambda f: [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", f.name)])
