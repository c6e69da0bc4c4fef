"""The extension as Slicer sees it: CMake files, module files, icons and packages agree with the folders."""

import ast
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("PresenceSeg", "PresenceSegTraining")
RAW_URL = "https://raw.githubusercontent.com/PresenceSeg/SlicerPresenceSeg/main/"


def cmake_program():
    beside_python = shutil.which("cmake", path=str(Path(sys.executable).parent))
    program = beside_python or shutil.which("cmake")
    if program is None:
        pytest.skip("no cmake: install Testing/requirements.txt")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 28):
        pytest.skip(f"cmake {version} is older than the 3.28 that Slicer needs: install Testing/requirements.txt")
    return program


def read_cmake(root, tmp_path):
    """What the CMake files below `root` declare: dict from kind of declaration to a list of its fields."""
    empty = tmp_path / "empty.cmake"
    empty.touch()
    script = ROOT / "Testing" / "tests" / "fake_slicer.cmake"
    command = [cmake_program(), f"-DROOT={root.as_posix()}", f"-DEMPTY={empty.as_posix()}", "-P", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(done.stderr)
    declared = defaultdict(list)
    for line in done.stderr.splitlines():
        kind, *fields = line.split("|")
        declared[kind].append(fields)
    return declared


@pytest.fixture
def declared(tmp_path):
    return read_cmake(ROOT, tmp_path)


def files_below(folder, pattern):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob(pattern) if p.is_file())


def listed(declared, kind, module):
    return [file for name, file in declared[kind] if name == module]


@pytest.mark.parametrize("module", MODULES)
def test_cmake_packages_every_source_and_resource_once(declared, module):
    folder = ROOT / module
    assert sorted(listed(declared, "SCRIPTS", module)) == files_below(folder, "*.py")
    assert sorted(listed(declared, "RESOURCES", module)) == [
        f"Resources/{file}" for file in files_below(folder / "Resources", "*")
    ]


def test_cmake_builds_and_tests_both_modules(declared):
    assert declared["project"] == [["PresenceSeg"]]
    assert declared["subdirectory"] == [[module] for module in MODULES]
    assert declared["module"] == [[module, "WITH_GENERIC_TESTS=TRUE"] for module in MODULES]
    assert declared["unittest"] == [[f"{module}.py"] for module in MODULES]


def test_extension_description_is_complete_and_its_pictures_exist(declared):
    extension = dict(declared["extension"])
    assert extension["DEPENDS"] == "PyTorch"
    assert all(extension[name] for name in ("HOMEPAGE", "CONTRIBUTORS", "DESCRIPTION"))
    for url in [extension["ICONURL"], *extension["SCREENSHOTURLS"].split()]:
        assert url.startswith(RAW_URL)
        assert (ROOT / url.removeprefix(RAW_URL)).is_file()


def test_a_listed_file_that_does_not_exist_is_reported(tmp_path):
    extension = tmp_path / "extension"
    for module in MODULES:
        (extension / module).mkdir(parents=True)
    shutil.copy(ROOT / "CMakeLists.txt", extension)
    shutil.copy(ROOT / "PresenceSeg" / "CMakeLists.txt", extension / "PresenceSeg")
    with pytest.raises(ValueError, match="does not exist"):
        read_cmake(extension, tmp_path)


@pytest.mark.parametrize("module", MODULES)
def test_module_file_has_the_four_classes(module):
    tree = ast.parse((ROOT / module / f"{module}.py").read_text(encoding="utf-8"))
    bases = {node.name: [ast.unparse(base) for base in node.bases] for node in tree.body if type(node) is ast.ClassDef}
    assert bases == {
        module: ["ScriptedLoadableModule"],
        f"{module}Widget": ["ScriptedLoadableModuleWidget", "VTKObservationMixin"],
        f"{module}Logic": ["ScriptedLoadableModuleLogic"],
        f"{module}Test": ["ScriptedLoadableModuleTest"],
    }


@pytest.mark.parametrize("module", MODULES)
def test_every_widget_that_the_module_file_uses_is_in_its_ui_file(module):
    tree = ast.parse((ROOT / module / f"{module}.py").read_text(encoding="utf-8"))
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.ui"
    }
    ui = ElementTree.parse(ROOT / module / "Resources" / "UI" / f"{module}.ui")
    assert used
    assert used <= {widget.get("name") for widget in ui.iter("widget")}


@pytest.mark.parametrize("module", MODULES)
def test_every_scene_widget_is_connected_to_the_scene(module):
    ui = ElementTree.parse(ROOT / module / "Resources" / "UI" / f"{module}.ui")
    scene_widgets = {w.get("name") for w in ui.iter("widget") if w.get("class").startswith("qMRML")}
    top = ui.find("widget").get("name")
    connected = {
        connection.findtext("receiver")
        for connection in ui.iter("connection")
        if connection.findtext("signal") == "mrmlSceneChanged(vtkMRMLScene*)"
    }
    assert scene_widgets - {top} == connected


@pytest.mark.parametrize(
    "icon",
    ["Resources/PresenceSeg", *(f"{module}/Resources/Icons/{module}" for module in MODULES)],
)
def test_icons_are_square_and_large_enough(icon):
    png = (ROOT / f"{icon}.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")  # PNG 1.2, section 11.2.2
    assert width == height >= 128
    assert ElementTree.parse(ROOT / f"{icon}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("module", MODULES)
def test_every_folder_with_python_files_is_a_package(module):
    library = ROOT / module / f"{module}Lib"
    folders = {path.parent for path in library.rglob("*.py")}
    assert library in folders
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
