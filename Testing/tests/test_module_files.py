"""The logic classes and self tests of the module files, on Slicer's core libraries; the panels need Slicer."""

import importlib.util
import sys
import unittest
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from PresenceSegLib.domain.case import CaseInfo, State
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.segmentation import Segmentation, Status
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import Volume

slicer = pytest.importorskip("slicer", reason="Slicer's core libraries (slicer-core) are not installed")

ROOT = Path(__file__).resolve().parents[2]


def add_module(monkeypatch, name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Function that loads a module file, with a scene and the few names that slicer-core lacks."""
    scene = slicer.vtkMRMLScene()
    application = slicer.vtkSlicerApplicationLogic()
    application.SetMRMLScene(scene)
    segmentations = slicer.vtkSlicerSegmentationsModuleLogic()
    segmentations.SetMRMLApplicationLogic(application)
    segmentations.SetMRMLScene(scene)
    monkeypatch.setattr(slicer, "mrmlScene", scene, raising=False)
    monkeypatch.setattr(slicer, "app", SimpleNamespace(temporaryPath=str(tmp_path)), raising=False)
    add_module(
        monkeypatch,
        "slicer.ScriptedLoadableModule",
        ScriptedLoadableModule=type("ScriptedLoadableModule", (), {}),
        ScriptedLoadableModuleWidget=type("ScriptedLoadableModuleWidget", (), {}),
        ScriptedLoadableModuleLogic=type("ScriptedLoadableModuleLogic", (), {}),
        ScriptedLoadableModuleTest=unittest.TestCase,
    )
    add_module(monkeypatch, "slicer.i18n", tr=lambda text: text, translate=lambda context, text: text)
    add_module(monkeypatch, "qt")
    add_module(monkeypatch, "ctk")

    def load_file(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / name / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load_file
    scene.Clear(0)


@pytest.mark.parametrize("name", ["PresenceSeg", "PresenceSegTraining"])
def test_self_test_passes(load, name):
    getattr(load(name), f"{name}Test")().runTest()


def test_presence_logic_reads_a_segmentation_node(load):
    logic = load("PresenceSeg").PresenceSegLogic()
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    segment_id = node.GetSegmentation().AddEmptySegment("", "liver")
    segment = node.GetSegmentation().GetSegment(segment_id)
    slicer.vtkSlicerSegmentationsModuleLogic.SetSegmentStatus(
        segment, slicer.vtkSlicerSegmentationsModuleLogic.Completed
    )
    assert logic.statuses(node) == {"liver": Status.COMPLETED}
    assert logic.presence(node, ["liver", "spleen"]) == {"liver": True, "spleen": False}


def test_training_logic_reads_the_presence_matrix_of_a_project(load, tmp_path):
    structures = StructureSet.from_names(["liver", "spleen"])
    grid = Grid((4, 3, 2), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    liver = np.zeros(grid.shape, bool)
    liver[0, 0, :2] = True
    segmentation = Segmentation.empty(grid)
    segmentation.put(structures.named("liver"), liver, Status.COMPLETED)
    segmentation.put(structures.named("spleen"), np.zeros(grid.shape, bool), Status.COMPLETED)
    project = Project.create(tmp_path / "abdomen", "abdomen", structures)
    project.add_case("case 1", Volume(np.zeros(grid.shape, np.int16), grid), segmentation, CaseInfo("a.nrrd", "a"))

    matrix = load("PresenceSegTraining").PresenceSegTrainingLogic().presenceMatrix(str(tmp_path / "abdomen"))

    assert matrix.cases == ("case 1",)
    assert matrix.structures == ("liver", "spleen")
    assert matrix.states == ((State.ANNOTATED, State.ABSENT),)


def test_every_state_of_the_matrix_has_a_label_of_its_own(load):
    label = load("PresenceSegTraining").stateLabel
    assert len({label(state) for state in State}) == len(State)


def test_training_logic_names_the_missing_package(load, monkeypatch, tmp_path):
    logic = load("PresenceSegTraining").PresenceSegTrainingLogic()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pynrrd"):
        logic.openProject(str(tmp_path))
