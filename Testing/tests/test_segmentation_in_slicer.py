"""Segmentation files and Slicer's own core: what one writes, the other reads with every voxel at its place."""

import itertools

import numpy as np
import pytest

from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.segmentation import (
    Segment,
    Segmentation,
    Status,
    read_segmentation,
    read_statuses,
    write_segmentation,
)
from PresenceSegLib.domain.structure import Structure, StructureSet

slicer = pytest.importorskip("slicer", reason="Slicer's core libraries (slicer-core) are not installed")
import vtk  # noqa: E402 (comes with slicer)
from vtk.util.numpy_support import vtk_to_numpy  # noqa: E402

COS, SIN = np.cos(0.35), np.sin(0.35)
TURN = np.array([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, COS, -SIN], [0, SIN, COS]])
AXES = {
    "straight": np.eye(3),
    "oblique": TURN,
    "flipped": np.diag([-1, 1, -1]),
    "sagittal": np.eye(3)[:, [1, 2, 0]],
    "oblique and mirrored": TURN @ np.eye(3)[:, [2, 0, 1]] @ np.diag([1, -1, 1]),
}
TISSUE = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^85756007^Tissue~SCT^85756007^Tissue~^^"
    "~Anatomic codes - DICOM master list~^^~^^"
)
LUNG = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
    "~SCT^39607008^Lung~SCT^24028007^Right~Anatomic codes - DICOM master list~^^~^^"
)
TAGS = {
    "DicomRtImport.RoiNumber": "7",
    "colon": "a:b:=c",
    "newline": "line\nbreak",
    "backslash": "C:\\new\\table",
    "quotes": "\"double\" 'single' 100 %",
    "blanks": " around ",
    "empty": "",
    "Größe ↔ 肝臓": "weiß 🫀",
}


def grid_of(axes, size=(7, 6, 5), origin=(-31.5, 12.25, 400.0)):
    return Grid(size, (0.7, 1.5, 3.0), origin, tuple(np.asarray(axes, float).ravel()))


@pytest.fixture
def scene():
    """A scene with the logic that registers Slicer's segmentation representations."""
    scene = slicer.vtkMRMLScene()
    application = slicer.vtkSlicerApplicationLogic()
    application.SetMRMLScene(scene)
    segmentations = slicer.vtkSlicerSegmentationsModuleLogic()
    segmentations.SetMRMLApplicationLogic(application)
    segmentations.SetMRMLScene(scene)
    yield scene
    scene.Clear(0)


@pytest.fixture
def load(scene):
    """Function that reads a file into a new segmentation node."""

    def load_file(path):
        storage = scene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
        storage.SetFileName(str(path))
        node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        assert storage.ReadData(node) == 1
        return node

    return load_file


@pytest.fixture
def save(scene):
    """Function that writes a segmentation node to a file."""

    def save_file(node, path):
        storage = scene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
        storage.SetFileName(str(path))
        assert storage.WriteData(node) == 1

    return save_file


@pytest.fixture
def make(scene):
    """Function that makes a segmentation node from (name, voxel box on the grid, color) on a grid."""

    def make_node(grid, entries):
        node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        for name, extent, color in entries:
            labelmap = slicer.vtkOrientedImageData()
            labelmap.SetExtent(*extent)
            labelmap.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
            labelmap.GetPointData().GetScalars().Fill(1)
            matrix = vtk.vtkMatrix4x4()
            matrix.DeepCopy((np.diag([-1, -1, 1, 1]) @ grid.ijk_to_lps).ravel())
            labelmap.SetGeometryFromImageToWorldMatrix(matrix)
            node.AddSegmentFromBinaryLabelmapRepresentation(labelmap, name, color)
        node.GetSegmentation().CollapseBinaryLabelmaps(False)
        return node

    return make_node


def segments_of(node):
    segmentation = node.GetSegmentation()
    return [segmentation.GetNthSegment(n) for n in range(segmentation.GetNumberOfSegments())]


def tag(segment, name):
    value = vtk.reference("")
    return str(value) if segment.GetTag(name, value) else None


def mask_in_slicer(segment, grid):
    """Where the segment's voxels lie in the world, as a mask on the grid; a voxel off the grid's voxels fails."""
    labelmap = segment.GetRepresentation("Binary labelmap")
    mask = np.zeros(grid.shape, bool)
    if labelmap.IsEmpty():
        return mask
    first = np.array(labelmap.GetExtent()[::2])
    values = vtk_to_numpy(labelmap.GetPointData().GetScalars()).reshape(labelmap.GetDimensions()[::-1])
    k, j, i = np.nonzero(values == segment.GetLabelValue())
    matrix = vtk.vtkMatrix4x4()
    labelmap.GetImageToWorldMatrix(matrix)
    to_ras = np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])
    ras = to_ras @ np.stack([i + first[0], j + first[1], k + first[2], np.ones(len(i))])
    index = (np.linalg.inv(grid.ijk_to_lps) @ np.diag([-1, -1, 1, 1]) @ ras)[:3]
    assert np.abs(index - np.rint(index)).max(initial=0) < 1e-6
    mask[tuple(np.rint(index).astype(int)[::-1])] = True
    return mask


def everything(node, grid):
    """All that Slicer knows about the segments, with their voxels on the grid."""
    names = ["Segmentation.Status", "TerminologyEntry", *TAGS]
    segmentation = node.GetSegmentation()
    return [
        {
            "id": segmentation.GetNthSegmentID(n),
            "name": segment.GetName(),
            "color": segment.GetColor(),
            "automatic": (segment.GetNameAutoGenerated(), segment.GetColorAutoGenerated()),
            "tags": {name: tag(segment, name) for name in names},
            "voxels": mask_in_slicer(segment, grid).nonzero(),
        }
        for n, segment in enumerate(segments_of(node))
    ]


def assert_same(one, other):
    for before, after in itertools.zip_longest(one, other):
        np.testing.assert_array_equal(before.pop("voxels"), after.pop("voxels"))
        # The status that Slicer takes for granted is written out.
        for entry in (before, after):
            entry["tags"]["Segmentation.Status"] = entry["tags"]["Segmentation.Status"] or "notstarted"
        assert before == after


def random_labels(grid, count):
    return np.random.default_rng(2).integers(0, count + 1, grid.shape).astype(np.uint8)


# --- what we write, in Slicer ---


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("overlap", [False, True], ids=["one layer", "overlapping"])
def test_slicer_reads_names_colors_terminology_statuses_and_voxels(load, tmp_path, axes, overlap):
    grid = grid_of(axes)
    labels = random_labels(grid, 4)
    structures = StructureSet(
        [
            Structure("right lung", (0.25, 0.5, 0.75), LUNG),
            Structure("Größe ↔ 肝臓", (1.0, 0.0, 0.0)),
            Structure('100 % "quoted" \\ name', (0.125, 1.0, 0.25)),
            Structure("rest", (0.0, 0.0, 0.0), LUNG),
        ]
    )
    expected = {s.name: labels == n for n, s in enumerate(structures, start=1)}
    if overlap:
        expected["rest"] = labels < 3
    segmentation = Segmentation.empty(grid)
    for structure, status in zip(structures, Status, strict=True):
        segmentation.put(structure, expected[structure.name], status)
    assert len(segmentation.layers) == (2 if overlap else 1)
    write_segmentation(tmp_path / "a.seg.nrrd", segmentation)

    segments = segments_of(load(tmp_path / "a.seg.nrrd"))

    assert [s.GetName() for s in segments] == list(structures.names)
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    assert [logic.GetSegmentStatus(s) for s in segments] == [
        logic.NotStarted,
        logic.InProgress,
        logic.Completed,
        logic.Flagged,
    ]
    for segment, structure in zip(segments, structures, strict=True):
        assert segment.GetColor() == pytest.approx(structure.color)
        assert tag(segment, "TerminologyEntry") == (structure.terminology or TISSUE)
        np.testing.assert_array_equal(mask_in_slicer(segment, grid), expected[structure.name])


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_slicer_reads_predicted_labels_and_structures_without_voxels(load, tmp_path, axes):
    grid = grid_of(axes)
    labels = random_labels(grid, 3)
    labels[labels == 2] = 0
    structures = StructureSet.from_names(["a", "nowhere", "c"])
    write_segmentation(
        tmp_path / "a.seg.nrrd", Segmentation.from_labels(labels[np.newaxis], structures, grid, Status.NOT_STARTED)
    )
    segments = segments_of(load(tmp_path / "a.seg.nrrd"))
    assert [s.GetName() for s in segments] == ["a", "nowhere", "c"]
    for value, segment in enumerate(segments, start=1):
        np.testing.assert_array_equal(mask_in_slicer(segment, grid), labels == value)
        assert tag(segment, "Segmentation.Status") == "notstarted"


def test_slicer_reads_more_than_255_segments(load, tmp_path):
    grid = grid_of(np.eye(3), (300, 2, 2))
    labels = np.zeros((1, *grid.shape), np.uint16)
    labels[0, 1, 1] = np.arange(1, 301)
    structures = StructureSet.from_names([f"s{n}" for n in range(300)])
    write_segmentation(tmp_path / "a.seg.nrrd", Segmentation.from_labels(labels, structures, grid, Status.COMPLETED))
    segments = segments_of(load(tmp_path / "a.seg.nrrd"))
    assert len(segments) == 300
    np.testing.assert_array_equal(mask_in_slicer(segments[299], grid), labels[0] == 300)


def test_slicer_reads_a_segmentation_without_segments(load, tmp_path):
    write_segmentation(tmp_path / "a.seg.nrrd", Segmentation.empty(grid_of(TURN)))
    assert segments_of(load(tmp_path / "a.seg.nrrd")) == []


def test_slicer_reads_odd_tags(load, tmp_path):
    grid = grid_of(np.eye(3))
    segmentation = Segmentation.empty(grid)
    segmentation.add(
        Segment("a", "somebody's ID: 1", 0, 1, (1, 0, 0), Status.FLAGGED, LUNG, dict(TAGS)), random_labels(grid, 1) > 0
    )
    write_segmentation(tmp_path / "a.seg.nrrd", segmentation)
    (segment,) = segments_of(load(tmp_path / "a.seg.nrrd"))
    assert {name: tag(segment, name) for name in TAGS} == TAGS


# --- what Slicer writes, through a load and save of ours ---


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_what_slicer_wrote_is_the_same_in_slicer_after_our_load_and_save(make, load, save, tmp_path, axes):
    grid = grid_of(axes, (12, 12, 12))
    # Slicer stores only the box around all segments: the file's first voxel is not the grid's.
    node = make(
        grid,
        [
            ("first", (2, 4, 2, 4, 3, 5), (1, 0, 0)),
            ("over it", (4, 8, 4, 5, 3, 4), (0, 0.5, 0)),
            ("Größe", (9, 9, 9, 9, 9, 9), (0, 0, 1)),
        ],
    )
    segments = segments_of(node)
    for name, value in TAGS.items():
        segments[0].SetTag(name, value)
    segments[1].SetTag("TerminologyEntry", LUNG)
    segments[2].SetTag("TerminologyEntry", "")
    node.GetSegmentation().AddEmptySegment("empty", "nothing here")
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    logic.SetSegmentStatus(segments[1], logic.Completed)
    logic.SetSegmentStatus(segments_of(node)[3], logic.Completed)
    save(node, tmp_path / "slicer.seg.nrrd")

    segmentation = read_segmentation(tmp_path / "slicer.seg.nrrd")
    write_segmentation(tmp_path / "ours.seg.nrrd", segmentation)

    before, after = load(tmp_path / "slicer.seg.nrrd"), load(tmp_path / "ours.seg.nrrd")
    assert before.GetSegmentation().GetNumberOfLayers() == after.GetSegmentation().GetNumberOfLayers()
    for parameter in ("Reference image geometry", "Smoothing factor"):
        values = [n.GetSegmentation().GetConversionParameter(parameter) for n in (before, after)]
        assert values[0] == values[1]
    assert_same(everything(before, grid), everything(after, grid))
    # And it was read right: the same names, statuses and voxels here.
    assert segmentation.grid.size == (8, 8, 7)
    assert [s.name for s in segmentation.segments] == ["first", "over it", "Größe", "nothing here"]
    assert segmentation.segments[0].tags == TAGS
    assert dict(read_statuses(tmp_path / "slicer.seg.nrrd"))["over it"] is Status.COMPLETED
    whole = segmentation.on_grid(grid)
    for entry, segment in zip(everything(node, grid), whole.segments, strict=True):
        assert entry["id"] == segment.id
        np.testing.assert_array_equal(entry["voxels"], whole.mask(segment).nonzero())


def test_a_structure_put_beside_slicers_cropped_segments_reaches_slicer_whole(make, load, save, tmp_path):
    grid = grid_of(TURN, (12, 12, 12))
    node = make(grid, [("first", (2, 9, 2, 9, 2, 9), (1, 0, 0)), ("small", (3, 4, 3, 4, 3, 4), (0, 1, 0))])
    assert node.GetSegmentation().GetNumberOfLayers() == 2
    save(node, tmp_path / "a.seg.nrrd")
    segmentation = read_segmentation(tmp_path / "a.seg.nrrd")
    everywhere = ~segmentation.mask(segmentation.named("small"))
    segmentation.put(Structure("everywhere", (0, 0, 1)), everywhere, Status.COMPLETED)
    assert segmentation.named("everywhere").layer == segmentation.named("small").layer
    write_segmentation(tmp_path / "a.seg.nrrd", segmentation)

    # Older versions of Slicer crop a whole layer to the extent that its first segment has in the file.
    assert {s.fields["Extent"] for s in read_segmentation(tmp_path / "a.seg.nrrd").segments} == {"0 7 0 7 0 7"}
    entries = {e["name"]: e["voxels"] for e in everything(load(tmp_path / "a.seg.nrrd"), segmentation.grid)}

    for name, mask in (("everywhere", everywhere), ("first", np.ones_like(everywhere)), ("small", ~everywhere)):
        np.testing.assert_array_equal(entries[name], mask.nonzero())


def test_cropping_or_extending_keeps_every_voxel_at_its_place_in_slicer(make, load, save, tmp_path):
    grid = grid_of(AXES["oblique and mirrored"], (12, 12, 12))
    node = make(grid, [("a", (2, 4, 5, 6, 3, 9), (1, 0, 0)), ("b", (7, 9, 5, 6, 3, 9), (1, 0, 0))])
    save(node, tmp_path / "a.seg.nrrd")
    write_segmentation(tmp_path / "b.seg.nrrd", read_segmentation(tmp_path / "a.seg.nrrd").on_grid(grid))
    assert_same(
        everything(load(tmp_path / "a.seg.nrrd"), grid),
        everything(load(tmp_path / "b.seg.nrrd"), grid),
    )


@pytest.mark.parametrize("name", ["Segmentation.seg.nrrd", "SegmentationOverlapping.seg.nrrd"])
def test_real_segmentations_are_the_same_in_slicer_after_our_load_and_save(shared_folder, load, tmp_path, name):
    source = shared_folder("odd/segnrrd") / name
    segmentation = read_segmentation(source)
    write_segmentation(tmp_path / "a.seg.nrrd", segmentation)
    before, after = (
        everything(load(source), segmentation.grid),
        everything(load(tmp_path / "a.seg.nrrd"), segmentation.grid),
    )
    for entry, segment in zip(before, segmentation.segments, strict=True):
        np.testing.assert_array_equal(entry["voxels"], segmentation.mask(segment).nonzero())
    assert_same(before, after)
