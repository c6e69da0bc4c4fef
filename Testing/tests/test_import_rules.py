"""Imports go one way: slicer side -> domain <- engine, and module 2 may use module 1's library, never the reverse.

Every source is checked for what it imports itself. That also settles what it imports indirectly: the slicer side
reaches only the slicer side and the domain, the domain only the domain, and neither may name torch.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {"PresenceSegLib": "PresenceSeg", "PresenceSegTrainingLib": "PresenceSegTraining"}

DOMAIN_PACKAGES = {"numpy", "SimpleITK", "nrrd"}
ENGINE_PACKAGES = DOMAIN_PACKAGES | {"torch", "monai", "safetensors", "tqdm"}
SLICER_PACKAGES = {"numpy", "SimpleITK", "slicer", "qt", "ctk", "vtk"}
# room: (packages it may import, rooms it may import)
ROOMS = {
    "root": (set(), set()),
    "domain": (DOMAIN_PACKAGES, {"root", "domain"}),
    "engine": (ENGINE_PACKAGES, {"root", "domain", "engine"}),
    "cli": (ENGINE_PACKAGES, {"root", "domain", "engine", "cli"}),
    "slicerside": (SLICER_PACKAGES, {"root", "domain", "slicerside"}),
}


def imported_names(source):
    """Dotted name and line of everything that a source imports, in functions and by importlib too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            first = node.args[0]
            yield (first.value if isinstance(first, ast.Constant) else "?", node.lineno)


def room_of(library, parts):
    """Room of a module of a library, given the parts of its dotted name behind the library's."""
    return parts[0] if parts and parts[0] in ROOMS else "root"


def violations(source, library, room):
    """One line for each import that a source in that room of that library must not have."""
    packages, rooms = ROOMS[room]
    for name, line in imported_names(source):
        top, *parts = name.split(".")
        if top in LIBRARIES:
            wrong_library = library == "PresenceSegLib" and top != library
            if wrong_library or room_of(top, parts) not in rooms:
                yield f"line {line}: {library} {room} imports {name}"
        elif top not in packages and top not in sys.stdlib_module_names:
            yield f"line {line}: {library} {room} imports {name}"


def sources():
    """Path, library and room of every source that Slicer packages."""
    for library, module in LIBRARIES.items():
        yield ROOT / module / f"{module}.py", library, "slicerside"
        folder = ROOT / module / library
        for path in sorted(folder.rglob("*.py")):
            yield path, library, room_of(library, path.relative_to(folder).parts[:-1])


@pytest.mark.parametrize(
    ("path", "library", "room"), [pytest.param(*s, id=s[0].relative_to(ROOT).as_posix()) for s in sources()]
)
def test_source_keeps_to_its_room(path, library, room):
    assert list(violations(path.read_text(encoding="utf-8"), library, room)) == []


def test_every_library_folder_is_a_known_room():
    folders = {
        p.parent.relative_to(ROOT / m / lib).parts[:1]
        for lib, m in LIBRARIES.items()
        for p in (ROOT / m / lib).rglob("*.py")
    }
    assert folders - {()} <= {(room,) for room in ROOMS}


@pytest.mark.parametrize(
    ("source", "library", "room"),
    [
        ("import torch", "PresenceSegLib", "domain"),
        ("import torch.nn", "PresenceSegLib", "slicerside"),
        ("from monai.networks.nets import UNet", "PresenceSegTrainingLib", "slicerside"),
        ("def f():\n    import torch", "PresenceSegLib", "domain"),
        ("import importlib\nimportlib.import_module('torch')", "PresenceSegLib", "domain"),
        ("import importlib\nimportlib.import_module(name)", "PresenceSegLib", "domain"),
        ("import slicer", "PresenceSegLib", "domain"),
        ("import qt", "PresenceSegLib", "engine"),
        ("import requests", "PresenceSegLib", "engine"),
        ("from PresenceSegLib.engine.worker import main", "PresenceSegLib", "domain"),
        ("from PresenceSegLib import engine", "PresenceSegLib", "slicerside"),
        ("import PresenceSegLib.engine.worker", "PresenceSegTrainingLib", "slicerside"),
        ("from PresenceSegLib.slicerside import statuses", "PresenceSegLib", "engine"),
        ("from PresenceSegTrainingLib.cli import main", "PresenceSegTrainingLib", "engine"),
        ("from PresenceSegTrainingLib.domain import x", "PresenceSegLib", "domain"),
        ("from . import errors", "PresenceSegLib", "domain"),
        ("import numpy", "PresenceSegLib", "root"),
        ("from PresenceSegLib.engine import inference", "PresenceSegLib", "root"),
    ],
)
def test_the_checker_sees_a_forbidden_import(source, library, room):
    assert len(list(violations(source, library, room))) == 1


@pytest.mark.parametrize(
    ("source", "library", "room"),
    [
        ("import json, numpy as np\nimport SimpleITK", "PresenceSegLib", "domain"),
        ("import torch\nfrom PresenceSegLib.domain.errors import InputError", "PresenceSegTrainingLib", "engine"),
        ("import qt, slicer\nfrom PresenceSegLib.domain import errors", "PresenceSegLib", "slicerside"),
        ("from PresenceSegTrainingLib.engine import train", "PresenceSegTrainingLib", "cli"),
        ("from PresenceSegLib import __version__", "PresenceSegTrainingLib", "cli"),
    ],
)
def test_the_checker_allows_what_the_design_allows(source, library, room):
    assert list(violations(source, library, room)) == []


def test_importing_the_domain_loads_no_torch():
    names = [
        path.relative_to(ROOT / LIBRARIES[library]).with_suffix("").as_posix().replace("/", ".")
        for path, library, room in sources()
        if room == "domain"
    ]
    assert "PresenceSegLib.domain.errors" in names
    program = "import sys\n" + "".join(f"import {name}\n" for name in names)
    program += "print(sorted({'torch', 'monai', 'slicer', 'vtk'} & set(sys.modules)))"
    folders = [str(ROOT / module) for module in LIBRARIES.values()]
    program = f"import sys\nsys.path[:0] = {folders}\n" + program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
