"""Structures and structure sets: the anatomical classes of a project or a model, known by name, never by position."""

import colorsys
import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PresenceSegLib.domain.errors import InputError

Color = tuple[float, float, float]

_LEFT_OR_RIGHT_CODES = ("^7771000^", "^24028007^")  # SNOMED CT qualifiers "Left" and "Right"
_SIDE_WORDS = (  # English, then German, French, Spanish and Italian
    r"left|right|lt|rt|lh|rh|l|r|links|rechts|linke[rs]?|rechte[rs]?|gauche|droite?|"
    r"izquierd[oa]|derech[oa]|sinistr[oa]|destr[oa]"
)
_SIDE_IN_NAME = re.compile(rf"(?:^|[^a-z])({_SIDE_WORDS})(?:[^a-z]|$)")


@dataclass(frozen=True)
class Structure:
    """One anatomical class.

    Attributes:
        name: the identity of the structure, in files, channels and segments alike.
        color: red, green, blue in 0..1.
        terminology: Slicer's serialized terminology entry (the value of the segment tag `TerminologyEntry`,
            with SNOMED CT codes), or "" when nobody chose one.
    """

    name: str
    color: Color
    terminology: str = ""

    @property
    def has_side(self) -> bool:
        """Whether the structure is a left or right one, by its terminology or by its name."""
        if any(code in self.terminology for code in _LEFT_OR_RIGHT_CODES):
            return True
        words = re.sub(r"([a-z])([A-Z])", r"\1 \2", self.name)  # LeftKidney, kidneyL
        return _SIDE_IN_NAME.search(words.casefold()) is not None

    def to_json(self) -> dict:
        return {"name": self.name, "color": list(self.color), "terminology": self.terminology}

    @staticmethod
    def from_json(data: dict) -> "Structure":
        name, terminology = data["name"], data.get("terminology", "")
        if not isinstance(name, str) or not isinstance(terminology, str):
            raise TypeError(f"name and terminology must be texts, not {name!r} and {terminology!r}")
        red, green, blue = (float(c) for c in data["color"])
        return Structure(name, (red, green, blue), terminology)


class StructureSet(Sequence[Structure]):
    """An ordered, immutable set of structures; output channel 0 is background, channel k is the k-th structure.

    Raises InputError when empty, when a name is empty or holds a character that Slicer's file format reserves, when
    two names are equal but for case and surrounding blanks, or when a terminology is no entry of Slicer's.
    """

    def __init__(self, structures: Iterable[Structure]):
        self._structures = tuple(structures)
        self._channels = {s.name: k for k, s in enumerate(self._structures, start=1)}
        _check_names([s.name for s in self._structures])
        _check_terminologies(self._structures)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self._structures)

    @property
    def has_sides(self) -> bool:
        return any(s.has_side for s in self._structures)

    def channel(self, name: str) -> int:
        """Output channel of a structure, 1..C. Raises InputError for an unknown name."""
        if name not in self._channels:
            raise InputError(f'There is no structure "{name}"; the structures are: {", ".join(self.names)}.')
        return self._channels[name]

    def named(self, name: str) -> Structure:
        return self._structures[self.channel(name) - 1]

    def __getitem__(self, index):
        return self._structures[index]

    def __len__(self) -> int:
        return len(self._structures)

    def __iter__(self) -> Iterator[Structure]:
        return iter(self._structures)

    def __contains__(self, item: object) -> bool:
        return item in self._channels if isinstance(item, str) else item in self._structures

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StructureSet) and self._structures == other._structures

    def __hash__(self) -> int:
        return hash(self._structures)

    def __repr__(self) -> str:
        return f"StructureSet({', '.join(self.names)})"

    def to_json(self) -> list[dict]:
        return [s.to_json() for s in self._structures]

    @staticmethod
    def from_json(data: list[dict], path: Path) -> "StructureSet":
        """The structure set stored in the file at `path`. Raises InputError when an entry is damaged."""
        try:
            structures = [Structure.from_json(entry) for entry in data]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"The structures in {path} are damaged ({error!r}); restore it from a copy.") from error
        return StructureSet(structures)

    @staticmethod
    def from_names(names: Iterable[str]) -> "StructureSet":
        """Structures with well separated colors and no terminology."""
        return StructureSet(Structure(name, distinct_color(n)) for n, name in enumerate(names))


def distinct_color(index: int) -> Color:
    """The index-th of an endless row of colors that differ well from their predecessors (golden-angle hues)."""
    hue = (0.02 + index * 0.618033988749895) % 1.0
    saturation = (0.65, 0.45, 0.8)[index % 3]
    value = (0.9, 0.75, 0.98)[(index // 3) % 3]
    return tuple(round(c, 4) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def read_structures(path: str | Path) -> StructureSet:
    """Structures listed in a table or in JSON.

    A `.csv` file has a header with `name` and optionally `color` (`#rrggbb`) and `terminology`; a `.json` file is a
    list of objects with the same keys (color as three numbers in 0..1), or any object with such a list under
    `structures`: a project.json or a model.json.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            data = json.loads(text)
            return StructureSet.from_json(data["structures"] if isinstance(data, dict) else data, path)
        rows = list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(f"The structures cannot be read from {path} ({error}); give a .csv or .json file.") from error
    if not rows or "name" not in rows[0]:
        raise InputError(f'{path} lists no structures: its first line must name the columns, one of them "name".')
    return StructureSet(
        Structure(
            (row["name"] or "").strip(),
            _parse_color(row["color"], path) if row.get("color") else distinct_color(n),
            (row.get("terminology") or "").strip(),
        )
        for n, row in enumerate(rows)
    )


def _parse_color(text: str, path: Path) -> Color:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text.strip()):
        raise InputError(f'"{text}" in {path} is not a color; write it as #rrggbb.')
    return tuple(round(int(text.strip()[n : n + 2], 16) / 255, 6) for n in (1, 3, 5))


def _check_names(names: list[str]) -> None:
    if not names:
        raise InputError("A structure set needs at least one structure; give the structures' names.")
    seen: dict[str, str] = {}
    for name in names:
        if not name.strip() or name != name.strip():
            raise InputError(f'"{name}" is no name for a structure: it is empty or has blanks around it.')
        if any(c in name for c in "|\n\r\t"):
            raise InputError(f"The structure name {name!r} holds a line break, tab or |, which Slicer's files reserve.")
        key = name.casefold()
        if key in seen:
            raise InputError(f'The structure "{name}" is named twice (before as "{seen[key]}"); keep one of them.')
        seen[key] = name


def _check_terminologies(structures: Iterable[Structure]) -> None:
    for structure in structures:
        # Context, category, type, type modifier, anatomic context, region, region modifier.
        if structure.terminology and not re.fullmatch(r"[^~|\n\r]*(?:~[^~|\n\r]*){6}", structure.terminology):
            raise InputError(
                f'The terminology of "{structure.name}" is no entry as Slicer writes it (seven parts joined by ~); '
                "copy it from a segmentation that Slicer saved, or leave it empty."
            )
