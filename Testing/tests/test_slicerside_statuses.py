"""Statuses and presence, read from real segmentation nodes of Slicer's core libraries."""

import pytest

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.status import Status

slicer = pytest.importorskip("slicer", reason="Slicer's core libraries (slicer-core) are not installed")
from PresenceSegLib.slicerside import statuses  # noqa: E402 (imports slicer)

SegmentationsLogic = slicer.vtkSlicerSegmentationsModuleLogic


@pytest.fixture
def scene():
    """A scene with the logic that registers Slicer's segmentation representations."""
    scene = slicer.vtkMRMLScene()
    application = slicer.vtkSlicerApplicationLogic()
    application.SetMRMLScene(scene)
    segmentations = SegmentationsLogic()
    segmentations.SetMRMLApplicationLogic(application)
    segmentations.SetMRMLScene(scene)
    yield scene
    scene.Clear(0)


@pytest.fixture
def node(scene):
    return scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Case 7")


def add_segment(node, name, status=None):
    segmentation = node.GetSegmentation()
    segment = segmentation.GetSegment(segmentation.AddEmptySegment("", name))
    if status is not None:
        SegmentationsLogic.SetSegmentStatus(segment, status)
    return segment


@pytest.fixture
def four(node):
    """A node with one segment in each status; the first was never given one."""
    add_segment(node, "liver")
    add_segment(node, "spleen", SegmentationsLogic.InProgress)
    add_segment(node, "left kidney", SegmentationsLogic.Completed)
    add_segment(node, "right kidney", SegmentationsLogic.Flagged)
    return node


def test_each_status_is_named_as_slicer_names_it(four):
    assert statuses.statuses(four) == {
        "liver": Status.NOT_STARTED,
        "spleen": Status.IN_PROGRESS,
        "left kidney": Status.COMPLETED,
        "right kidney": Status.FLAGGED,
    }


def test_only_completed_is_present(four):
    names = ["right kidney", "left kidney", "spleen", "liver"]
    assert statuses.presence(four, names) == {
        "right kidney": False,
        "left kidney": True,
        "spleen": False,
        "liver": False,
    }


def test_a_structure_without_a_segment_is_not_present(four):
    assert statuses.presence(four, ["pancreas"]) == {"pancreas": False}
    assert statuses.presence(four, []) == {}


def test_a_status_that_is_taken_back_no_longer_counts(four):
    segmentation = four.GetSegmentation()
    segment = segmentation.GetSegment(segmentation.GetSegmentIdBySegmentName("left kidney"))
    SegmentationsLogic.SetSegmentStatus(segment, SegmentationsLogic.InProgress)
    assert statuses.presence(four, ["left kidney"]) == {"left kidney": False}


def test_an_unknown_status_does_not_train(node):
    add_segment(node, "liver").SetTag("Segmentation.Status", "reviewed-by-someone")
    assert statuses.statuses(node) == {"liver": Status.NOT_STARTED}


def test_names_are_matched_exactly_and_may_hold_any_character(node):
    add_segment(node, "Größe ↔ left", SegmentationsLogic.Completed)
    assert statuses.presence(node, ["Größe ↔ left", "größe ↔ left"]) == {
        "Größe ↔ left": True,
        "größe ↔ left": False,
    }


def test_order_follows_the_segmentation(four):
    four.GetSegmentation().SetSegmentIndex(four.GetSegmentation().GetNthSegmentID(3), 0)
    assert [name for name, _ in statuses.segment_statuses(four)] == ["right kidney", "liver", "spleen", "left kidney"]


def test_two_segments_of_one_name_are_refused_but_listed(node):
    add_segment(node, "liver", SegmentationsLogic.Completed)
    add_segment(node, "liver")
    assert statuses.segment_statuses(node) == [("liver", Status.COMPLETED), ("liver", Status.NOT_STARTED)]
    for read in (statuses.statuses, lambda n: statuses.presence(n, ["liver"])):
        with pytest.raises(InputError, match='"Case 7" has two segments named "liver"'):
            read(node)


def test_an_empty_segmentation_has_no_statuses(node):
    assert statuses.statuses(node) == {}


def test_statuses_survive_saving_and_loading(four, scene, tmp_path):
    storage = scene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
    storage.SetFileName(str(tmp_path / "case.seg.nrrd"))
    assert storage.WriteData(four) == 1
    loaded = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "loaded")
    assert storage.ReadData(loaded) == 1
    assert statuses.statuses(loaded) == statuses.statuses(four)


def test_labels_are_the_words_slicer_shows():
    assert [statuses.status_label(s) for s in Status] == [
        "Not started",
        "In progress",
        "Completed",
        "Flagged",
    ]
