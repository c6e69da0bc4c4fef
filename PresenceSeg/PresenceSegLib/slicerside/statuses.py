"""Segment statuses in a segmentation node: which structures a person has completed, and so which of them train."""

from collections.abc import Iterable

import slicer

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.status import Status


def segment_statuses(segmentation_node) -> list[tuple[str, Status]]:
    """Name and status of each segment of a vtkMRMLSegmentationNode, in the node's order.

    A segment without a status, or with one that Slicer does not know, is NotStarted: only what a person clearly marked
    may train.
    """
    segmentation = segmentation_node.GetSegmentation()
    segments = (segmentation.GetNthSegment(n) for n in range(segmentation.GetNumberOfSegments()))
    return [(segment.GetName(), _status(segment)) for segment in segments]


def statuses(segmentation_node) -> dict[str, Status]:
    """Status of each structure that has a segment in a vtkMRMLSegmentationNode, in the node's order.

    Raises:
        InputError: two segments have the same name, so the name does not tell which structure is meant.
    """
    found: dict[str, Status] = {}
    for name, status in segment_statuses(segmentation_node):
        if name in found:
            raise InputError(
                f'The segmentation "{segmentation_node.GetName()}" has two segments named "{name}"; rename or remove '
                "one of them."
            )
        found[name] = status
    return found


def presence(segmentation_node, structure_names: Iterable[str]) -> dict[str, bool]:
    """Whether each of the structures is annotated in a vtkMRMLSegmentationNode: its segment is Completed.

    A structure without a segment is not annotated. An empty segment that is Completed is: the annotator looked, and
    the structure is not in this volume.

    Raises:
        InputError: two segments have the same name.
    """
    found = statuses(segmentation_node)
    return {name: found.get(name) is Status.COMPLETED for name in structure_names}


def status_label(status: Status) -> str:
    """The words with which Slicer shows a status, in the user's language."""
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    return logic.GetSegmentStatusAsHumanReadableString(logic.GetSegmentStatusFromMachineReadableString(status.value))


def _status(segment) -> Status:
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    word = logic.GetSegmentStatusAsMachineReadableString(logic.GetSegmentStatus(segment))
    return next((status for status in Status if status.value == word), Status.NOT_STARTED)
