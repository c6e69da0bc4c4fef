"""The PresenceSeg module of 3D Slicer: which structures of a segmentation are annotated, and so would be taught."""

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.status import Status
from PresenceSegLib.slicerside import statuses


class PresenceSeg(ScriptedLoadableModule):
    """Registration of the module."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = "PresenceSeg"
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = ["Segmentations"]
        self.parent.contributors = ["PresenceSeg developers"]
        self.parent.helpText = _(
            "Shows which structures of a segmentation are annotated. Only segments whose status is Completed teach a "
            "network; a segment that is Completed and empty says that the structure is not in the volume. "
            'See the <a href="{url}">documentation</a>.'
        ).format(url="https://github.com/PresenceSeg/SlicerPresenceSeg#readme")
        self.parent.acknowledgementText = _(
            "The method comes from Wong et al., Training CNN classifiers for semantic segmentation using partially "
            "annotated images, 2020, arXiv:2008.07030."
        )


class PresenceSegWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: a segmentation, its segments with their status, and how many of them this case would teach."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/PresenceSeg.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = PresenceSegLogic()

        self.ui.segmentationSelector.connect("currentNodeChanged(vtkMRMLNode*)", self.onSegmentationChanged)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.onSegmentationChanged(self.ui.segmentationSelector.currentNode())

    def cleanup(self):
        self.removeObservers()

    def enter(self):
        self.onSegmentationChanged(self.ui.segmentationSelector.currentNode())

    def exit(self):
        # A hidden panel need not follow every change; enter() brings it up to date.
        self.removeObservers(self.onSegmentationModified)

    def onSceneStartClose(self, caller, event):
        self.onSegmentationChanged(None)

    def onSegmentationChanged(self, segmentationNode):
        """Show another segmentation node, or none, and follow its changes."""
        self.removeObservers(self.onSegmentationModified)
        if segmentationNode is not None:
            for event in (
                vtk.vtkCommand.ModifiedEvent,
                slicer.vtkSegmentation.SegmentAdded,
                slicer.vtkSegmentation.SegmentRemoved,
                slicer.vtkSegmentation.SegmentModified,
                slicer.vtkSegmentation.SegmentsOrderModified,
            ):
                self.addObserver(segmentationNode, event, self.onSegmentationModified)
        self.showStatuses(segmentationNode)

    def onSegmentationModified(self, caller, event):
        self.showStatuses(caller)

    def showStatuses(self, segmentationNode):
        """Fill the table and the line below it from a segmentation node; empty them for None."""
        rows = statuses.segment_statuses(segmentationNode) if segmentationNode is not None else []
        table = self.ui.statusTable
        table.setRowCount(len(rows))
        for row, (name, status) in enumerate(rows):
            table.setItem(row, 0, qt.QTableWidgetItem(name))
            table.setItem(row, 1, qt.QTableWidgetItem(statuses.status_label(status)))
        self.ui.summaryLabel.text = self.summary(segmentationNode)

    def summary(self, segmentationNode):
        """One sentence: how many structures of the segmentation this case teaches, or why none can be counted."""
        if segmentationNode is None:
            return _("Select a segmentation to see which of its structures are Completed.")
        try:
            found = self.logic.statuses(segmentationNode)
        except InputError as error:
            return str(error)
        return _(
            "{completed} of {total} structures are Completed: this case will teach {completed} structures."
        ).format(completed=sum(self.logic.presence(segmentationNode, found).values()), total=len(found))


class PresenceSegLogic(ScriptedLoadableModuleLogic):
    """The annotation state of a case, for scripts. Needs no panel::

    logic = PresenceSegLogic()
    logic.presence(getNode("Segmentation"), ["liver", "spleen"])  # {"liver": True, "spleen": False}
    """

    def statuses(self, segmentationNode):
        """Status of each structure: dict from segment name to PresenceSegLib.domain.status.Status.

        :param segmentationNode: a vtkMRMLSegmentationNode.
        :raises InputError: two segments have the same name.
        """
        return statuses.statuses(segmentationNode)

    def presence(self, segmentationNode, structureNames):
        """Whether each structure is annotated: dict from name to True exactly if its segment is Completed.

        :param segmentationNode: a vtkMRMLSegmentationNode.
        :param structureNames: names to look up; one that has no segment is not annotated.
        :raises InputError: two segments have the same name.
        """
        return statuses.presence(segmentationNode, structureNames)


class PresenceSegTest(ScriptedLoadableModuleTest):
    """Self test: the logic on a segmentation made here, no data needed."""

    def setUp(self):
        slicer.mrmlScene.Clear(0)

    def runTest(self):
        self.setUp()
        self.test_onlyCompletedIsPresent()

    def test_onlyCompletedIsPresent(self):
        segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "PresenceSegTest")
        segmentation = segmentationNode.GetSegmentation()
        segmentationsLogic = slicer.vtkSlicerSegmentationsModuleLogic
        for status in Status:
            segment = segmentation.GetSegment(segmentation.AddEmptySegment("", status.name))
            segmentationsLogic.SetSegmentStatus(
                segment, segmentationsLogic.GetSegmentStatusFromMachineReadableString(status.value)
            )

        logic = PresenceSegLogic()
        self.assertEqual(logic.statuses(segmentationNode), {status.name: status for status in Status})
        self.assertEqual(
            logic.presence(segmentationNode, [*(status.name for status in Status), "nowhere"]),
            {"NOT_STARTED": False, "IN_PROGRESS": False, "COMPLETED": True, "FLAGGED": False, "nowhere": False},
        )
