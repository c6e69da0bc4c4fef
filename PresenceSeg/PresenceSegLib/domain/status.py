"""Segment statuses, in Slicer's own words: only a Completed segment is annotated, and only it trains."""

from enum import Enum


class Status(Enum):
    """Slicer's segment status, by the words that Slicer writes into the tag `Segmentation.Status`."""

    NOT_STARTED = "notstarted"
    IN_PROGRESS = "inprogress"
    COMPLETED = "completed"
    FLAGGED = "flagged"
