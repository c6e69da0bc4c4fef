"""The PresenceSegTraining module of 3D Slicer: what the cases of a project tell about each of its structures."""

import importlib.util

import ctk
import qt
import slicer
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


class PresenceSegTraining(ScriptedLoadableModule):
    """Registration of the module."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = "PresenceSeg Training"
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = ["PresenceSeg"]
        self.parent.contributors = ["PresenceSeg developers"]
        self.parent.helpText = _(
            "Shows the presence matrix of a project: which structures are annotated in which of its cases. "
            'See the <a href="{url}">documentation</a>.'
        ).format(url="https://github.com/PresenceSeg/SlicerPresenceSeg#readme")
        self.parent.acknowledgementText = _(
            "The method comes from Wong et al., Training CNN classifiers for semantic segmentation using partially "
            "annotated images, 2020, arXiv:2008.07030."
        )


class PresenceSegTrainingWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: a project folder and its presence matrix, cases by structures, with totals.

    Telling a confirmed absent structure from an annotated one takes the voxels of the case's segmentation. The cases
    are therefore read one at a time between the events of the application, and the table fills as they come.
    """

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/PresenceSegTraining.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = PresenceSegTrainingLogic()
        self.structures = None
        self.cases = []
        self.states = []
        self.problems = []
        self.readTimer = qt.QTimer()
        self.readTimer.setSingleShot(True)
        self.readTimer.setInterval(0)

        self.ui.projectPathLineEdit.filters = ctk.ctkPathLineEdit.Dirs
        self.ui.projectPathLineEdit.connect("currentPathChanged(QString)", self.onProjectPathChanged)
        self.readTimer.connect("timeout()", self.readNextCase)
        self.onProjectPathChanged(self.ui.projectPathLineEdit.currentPath)

    def cleanup(self):
        self.readTimer.stop()
        self.removeObservers()

    def enter(self):
        # Cases may have been saved since the panel was left.
        self.onProjectPathChanged(self.ui.projectPathLineEdit.currentPath)

    def exit(self):
        self.readTimer.stop()

    def onProjectPathChanged(self, projectPath):
        """Show another project, or say why there is none to show."""
        self.readTimer.stop()
        self.structures, self.cases, self.states, self.problems = None, [], [], []
        if not projectPath:
            self.problems = [_("Select the folder of a project.")]
        else:
            try:
                project = self.logic.openProject(projectPath)
                self.structures, self.cases = project.structures, project.cases()
            except InputError as error:
                self.problems = [str(error)]
        self.showEmptyTable()
        self.showSummary()
        if self.cases:
            self.readTimer.start()

    def readNextCase(self):
        """Read one case into its row of the table and go on with the next when the application is idle."""
        case = self.cases[len(self.states)]
        try:
            states = case.states(self.structures)
        except InputError as error:
            self.problems.append(str(error))
            states = []
        self.showRow(len(self.states), [stateLabel(state) for state in states])
        self.states.append(states)
        if len(self.states) < len(self.cases):
            self.readTimer.start()
        else:
            self.showRow(len(self.cases), self.totals())
        self.showSummary()

    def showEmptyTable(self):
        """Rows for the cases and the totals, columns for the structures, no content yet."""
        table = self.ui.presenceTable
        table.clear()
        names = self.structures.names if self.structures is not None else ()
        table.setColumnCount(len(names))
        table.setHorizontalHeaderLabels(list(names))
        rows = [case.name for case in self.cases]
        table.setRowCount(len(rows) + 1 if rows else 0)
        table.setVerticalHeaderLabels([*rows, _("Total")])

    def showRow(self, row, texts):
        for column, text in enumerate(texts):
            self.ui.presenceTable.setItem(row, column, qt.QTableWidgetItem(text))

    def totals(self):
        """Text per structure: in how many cases it is annotated, and in how many of these confirmed absent."""
        columns = zip(*[states for states in self.states if states], strict=True)
        return [
            _("{annotated} annotated, {absent} confirmed absent").format(
                annotated=sum(state.name == "ANNOTATED" for state in column),
                absent=sum(state.name == "ABSENT" for state in column),
            )
            for column in columns
        ]

    def showSummary(self):
        """One line on what was read, then what went wrong."""
        lines = list(self.problems)
        if self.structures is not None:
            text = _("{read} of {cases} cases read, {structures} structures.")
            lines.insert(0, text.format(read=len(self.states), cases=len(self.cases), structures=len(self.structures)))
        self.ui.summaryLabel.text = "\n".join(lines)


class PresenceSegTrainingLogic(ScriptedLoadableModuleLogic):
    """Projects, for scripts. Needs no panel::

    matrix = PresenceSegTrainingLogic().presenceMatrix("/data/abdomen")
    matrix.presence  # bool [cases, structures]: annotated or confirmed absent
    """

    def openProject(self, projectPath):
        """The project in a folder: a PresenceSegLib.domain.project.Project.

        :raises InputError: there is no project, or a damaged one, or the package pynrrd is missing.
        """
        if importlib.util.find_spec("nrrd") is None:
            raise InputError(
                _(
                    "The Python package pynrrd, which reads the cases, is missing; run "
                    'slicer.util.pip_install("pynrrd") in the Python console and choose the project again.'
                )
            )
        # Imported here since it needs pynrrd, which Slicer does not bring.
        from PresenceSegLib.domain.project import Project

        return Project.open(projectPath)

    def presenceMatrix(self, projectPath):
        """What each case of a project tells about each structure: a PresenceSegLib.domain.project.PresenceMatrix.

        Reads the segmentations of all cases; with many or large ones this takes a while.

        :param projectPath: folder of the project.
        :raises InputError: there is no project, or it or one of its cases cannot be read.
        """
        return self.openProject(projectPath).presence_matrix()


def stateLabel(state):
    """The words with which the table shows a PresenceSegLib.domain.case.State."""
    return {
        "ANNOTATED": _("annotated"),
        "ABSENT": _("confirmed absent"),
        "PREDICTED": _("predicted only"),
        "IN_PROGRESS": _("in progress"),
        "FLAGGED": _("flagged"),
        "UNTOUCHED": _("untouched"),
    }[state.name]


class PresenceSegTrainingTest(ScriptedLoadableModuleTest):
    """Self test: refusals of the logic, no data needed."""

    def setUp(self):
        slicer.mrmlScene.Clear(0)

    def runTest(self):
        self.setUp()
        self.test_aFolderWithoutProjectIsRefused()

    def test_aFolderWithoutProjectIsRefused(self):
        with self.assertRaises(InputError):
            PresenceSegTrainingLogic().presenceMatrix(slicer.app.temporaryPath)
