"""Segmentations: what is put in comes out, nobody else's voxels, tags or fields are lost, damage is refused."""

import bz2
import gzip
import string

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegLib.domain.errors import InputError
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

COS, SIN = np.cos(0.4), np.sin(0.4)
GRID = Grid((5, 4, 3), (0.7, 1.5, 3.0), (-31.5, 12.25, 400.0), (COS, -SIN, 0, SIN, COS, 0, 0, 0, -1))
STRUCTURES = StructureSet.from_names(["liver", "spleen", "left kidney", "Größe", "aorta"])
LIVER_TERMINOLOGY = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
    "~SCT^10200004^Liver~^^~Anatomic codes - DICOM master list~^^~^^"
)
# Whatever Slicer can keep in a tag: all but the separator of tags, and in names all but the one of name and value.
VALUES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="|"), max_size=10) | st.sampled_from(
    ["a\nb", "a\\nb", "\\", " blanks ", "x:y:=z", "100% \"q\" 'q'", "Größe ↔ 肝臓 🫀", "", "# no comment", "~^"]
)
KEYS = st.text(st.characters(exclude_categories=("C",), exclude_characters="|:"), min_size=1, max_size=10)
MASKS = st.binary(min_size=60, max_size=60).map(
    lambda data: (np.frombuffer(data, np.uint8) % 3 == 0).reshape(GRID.shape)
)


def box(*slices):
    mask = np.zeros(GRID.shape, bool)
    mask[slices] = True
    return mask


def some_segmentation():
    """Three segments, two of them overlapping, with tags and fields that nothing here knows."""
    segmentation = Segmentation.empty(GRID)
    segmentation.put(STRUCTURES.named("liver"), box(slice(0, 2)), Status.COMPLETED)
    segmentation.put(STRUCTURES.named("Größe"), box(slice(1, 3)), Status.FLAGGED)
    vessel = Segment("somebody's vessel", "Segment_9", 0, 1, (0.1, 0.2, 0.3), Status.IN_PROGRESS, LIVER_TERMINOLOGY)
    vessel.tags = {"DicomRtImport.RoiNumber": "7", "Größe": "ü\nx\\"}
    vessel.fields = {"Other": "kept"}
    segmentation.add(vessel, box(2, slice(None), 4))
    segmentation.fields = {"Segmentation_ConversionParameters": "a|1|b&", "content": "made by hand"}
    return segmentation


def assert_same(one, other):
    """The same segments in the same order with the same voxels, layers, tags and fields."""
    np.testing.assert_array_equal(one.layers, other.layers)
    assert one.grid.same_as(other.grid)
    assert one.segments == other.segments
    assert one.fields == other.fields


def file_with(path, lines, data=b"", encoding="gzip", sizes="5 4 3", kind="unsigned char"):
    """A NRRD file written by hand, as other programs might."""
    header = ["NRRD0005", "# made by hand", f"type: {kind}", f"dimension: {len(sizes.split())}", f"sizes: {sizes}"]
    header += [f"encoding: {encoding}", "endian: big", *lines, "", ""]
    path.write_bytes("\n".join(header).encode("utf-8") + data)
    return path


GEOMETRY = ["space: left-posterior-superior", "space directions: (1,0,0) (0,2,0) (0,0,3)", "space origin: (4,5,6)"]


# --- in memory ---


@given(st.lists(st.tuples(st.sampled_from(STRUCTURES.names), MASKS, st.sampled_from(Status)), max_size=8))
def test_every_segment_keeps_the_mask_it_was_last_given(puts):
    segmentation = Segmentation.empty(GRID)
    expected = {}
    for name, mask, status in puts:
        segmentation.put(STRUCTURES.named(name), mask, status)
        expected[name] = (mask, status)  # a segment keeps its place among the others
    assert [s.name for s in segmentation.segments] == list(expected)
    for name, (mask, status) in expected.items():
        segment = segmentation.named(name)
        np.testing.assert_array_equal(segmentation.mask(segment), mask)
        assert segment.status is status
    assert len({s.id for s in segmentation.segments}) == len(expected)
    assert len({(s.layer, s.label_value) for s in segmentation.segments}) == len(expected)


@given(st.lists(st.tuples(MASKS, st.sampled_from(Status)), min_size=5, max_size=5), st.permutations(STRUCTURES.names))
def test_label_layers_hold_the_asked_statuses_completely_under_the_number_of_their_structure(entries, order):
    segmentation = Segmentation.empty(GRID)
    for name, (mask, status) in zip(order, entries, strict=True):
        segmentation.put(STRUCTURES.named(name), mask, status)
    segmentation.put(Structure("other", (0, 0, 0)), ~entries[0][0], Status.COMPLETED)
    # A one-time iterable must do.
    layers = segmentation.label_layers(STRUCTURES, iter([Status.COMPLETED, Status.FLAGGED]))
    assert layers.dtype == np.uint8
    for name, (mask, status) in zip(order, entries, strict=True):
        voxels = layers == STRUCTURES.channel(name)
        if status in (Status.COMPLETED, Status.FLAGGED):
            assert sum(layer.any() for layer in voxels) <= 1
            np.testing.assert_array_equal(voxels.any(axis=0), mask)
        else:
            assert not voxels.any()


def test_structures_that_do_not_overlap_share_one_label_layer_though_stored_in_two():
    segmentation = Segmentation.empty(GRID)
    segmentation.put(STRUCTURES.named("liver"), box(0), Status.COMPLETED)
    segmentation.put(STRUCTURES.named("spleen"), box(slice(0, 2)), Status.IN_PROGRESS)
    segmentation.put(STRUCTURES.named("aorta"), box(1, 0), Status.COMPLETED)
    layers = segmentation.label_layers(STRUCTURES, [Status.COMPLETED])
    assert len(segmentation.layers) == 2
    assert layers.shape == (1, *GRID.shape)
    assert layers[0, 0, 0, 0] == 1 and layers[0, 1, 0, 0] == 5 and layers[0, 2].max() == 0


def test_more_than_255_structures_keep_their_numbers():
    structures = StructureSet.from_names([f"s{n}" for n in range(300)])
    grid = Grid((300, 2, 2), (1, 1, 1), (0, 0, 0), tuple(np.eye(3).ravel()))
    segmentation = Segmentation.empty(grid)
    for n, structure in enumerate(structures):
        mask = np.zeros(grid.shape, bool)
        mask[1, 1, n] = True
        segmentation.put(structure, mask, Status.COMPLETED)
    labels = segmentation.label_layers(structures, [Status.COMPLETED])
    assert labels[0, 1, 1].tolist() == list(range(1, 301))
    again = Segmentation.from_labels(labels, structures, grid, Status.NOT_STARTED)
    assert all(again.mask(again.named(f"s{n}")).sum() == 1 for n in range(300))
    assert again.mask(again.named("s299"))[1, 1, 299]


def test_labels_become_one_segment_per_structure_even_where_there_are_no_voxels():
    labels = np.zeros((2, *GRID.shape), np.uint8)
    labels[0, 0], labels[1, :, 1] = 1, 4
    structures = StructureSet([Structure("a", (0.1, 0.2, 0.3), LIVER_TERMINOLOGY), *STRUCTURES[1:4]])
    segmentation = Segmentation.from_labels(labels, structures, GRID, Status.NOT_STARTED)
    assert [s.name for s in segmentation.segments] == ["a", "spleen", "left kidney", "Größe"]
    assert {s.status for s in segmentation.segments} == {Status.NOT_STARTED}
    assert (segmentation.segments[0].color, segmentation.segments[0].terminology) == (
        (0.1, 0.2, 0.3),
        LIVER_TERMINOLOGY,
    )
    masks = [segmentation.mask(s) for s in segmentation.segments]
    np.testing.assert_array_equal(masks[0], box(0))
    np.testing.assert_array_equal(masks[3], box(slice(None), 1))
    assert not masks[1].any() and not masks[2].any()


def test_voxels_that_belong_to_no_segment_do_not_join_a_new_one():
    layers = np.zeros((1, *GRID.shape), np.uint8)
    layers[0, 0], layers[0, 1] = 1, 2
    segmentation = Segmentation(layers, GRID)
    segmentation.put(STRUCTURES.named("liver"), box(2), Status.COMPLETED)
    np.testing.assert_array_equal(segmentation.mask(segmentation.named("liver")), box(2))


def test_a_segment_from_elsewhere_keeps_all_but_a_taken_id():
    segmentation = some_segmentation()
    taken = segmentation.segments[0].id
    other = Segment("other", taken, 3, 9, (1, 0, 0), Status.FLAGGED, LIVER_TERMINOLOGY, {"a": "b"}, {"Extent": "0 1"})
    segmentation.add(other, box(0, 0))
    added = segmentation.named("other")
    assert len({s.id for s in segmentation.segments}) == 4
    assert (added.color, added.status, added.terminology, added.tags) == (
        (1, 0, 0),
        Status.FLAGGED,
        LIVER_TERMINOLOGY,
        {"a": "b"},
    )
    assert (other.id, other.layer, other.label_value, other.fields) == (taken, 3, 9, {"Extent": "0 1"})
    with pytest.raises(InputError, match='a segment named "other" already'):
        segmentation.add(other, box(0, 0))


def test_two_segments_of_one_name_are_refused_when_asked_for_by_name():
    segmentation = some_segmentation()
    segmentation.segments[1].name = "liver"
    with pytest.raises(InputError, match='2 segments are named "liver"'):
        segmentation.named("liver")
    assert segmentation.named("nobody") is None


def test_two_segments_of_one_structure_are_refused_in_labels():
    segmentation = some_segmentation()
    segmentation.segments[1].name = "liver"
    with pytest.raises(InputError, match='2 segments are named "liver"'):
        segmentation.label_layers(STRUCTURES, Status)


def test_labels_that_do_not_fit_16_bits_are_refused(tmp_path):
    for value in (-1, 70000):
        data = gzip.compress(np.full((3, 4, 5), value, ">i4").tobytes())
        path = file_with(tmp_path / "a.seg.nrrd", [*GEOMETRY, "Segmentation_MasterRepresentation:=x"], data, kind="int")
        with pytest.raises(InputError, match="below 0 or above 65535"):
            read_segmentation(path)


@given(st.tuples(*[st.integers(-4, 6)] * 3), st.tuples(*[st.integers(2, 8)] * 3))
def test_on_another_grid_each_voxel_stays_at_its_place(start, size):
    segmentation = some_segmentation()
    origin = tuple((GRID.ijk_to_lps @ [*start, 1])[:3])
    target = Grid(size, GRID.spacing, origin, GRID.direction)
    shown = [np.argwhere(segmentation.mask(s))[:, ::-1] - start for s in segmentation.segments]
    if any(len(v) and not ((v >= 0) & (v < size)).all(axis=1).any() for v in shown):
        with pytest.raises(InputError, match="Nothing of the segment"):
            segmentation.on_grid(target)
        return
    moved = segmentation.on_grid(target)
    assert moved.layers.shape[1:] == size[::-1]
    for before, after in zip(segmentation.segments, moved.segments, strict=True):
        mask = segmentation.mask(before)
        for k, j, i in np.ndindex(size[::-1]):
            there = (k + start[2], j + start[1], i + start[0])
            inside = all(0 <= t < n for t, n in zip(there, mask.shape, strict=True))
            assert moved.mask(after)[k, j, i] == (inside and mask[there])
    assert [s.tags for s in moved.segments] == [s.tags for s in segmentation.segments]


def test_on_another_grid_nothing_is_kept_that_describes_the_old_one():
    segmentation = some_segmentation()
    segmentation.fields |= {"Segmentation_ReferenceImageExtentOffset": "1 2 3", "Other": "kept"}
    segmentation.segments[0].fields["Extent"] = "0 4 0 3 0 2"
    moved = segmentation.on_grid(Grid((6, 4, 3), GRID.spacing, GRID.origin, GRID.direction))
    assert moved.fields == {"content": "made by hand", "Other": "kept"}
    assert all("Extent" not in s.fields for s in moved.segments)
    assert moved.segments[2].fields == {"Other": "kept"}
    assert segmentation.on_grid(GRID) is segmentation


def test_a_grid_whose_voxels_do_not_coincide_is_refused_with_both_geometries():
    other = Grid((5, 4, 3), (0.7, 1.5, 2.5), GRID.origin, GRID.direction)
    with pytest.raises(InputError) as caught:
        some_segmentation().on_grid(other)
    assert GRID.describe() in str(caught.value) and other.describe() in str(caught.value)


def test_resampling_takes_the_nearest_voxel():
    segmentation = some_segmentation()
    # Half the voxel size: each voxel becomes 2x2x2, the centers a quarter of a voxel off the old one.
    origin = tuple((GRID.ijk_to_lps @ [-0.25, -0.25, -0.25, 1])[:3])
    fine = Grid((10, 8, 6), tuple(s / 2 for s in GRID.spacing), origin, GRID.direction)
    resampled = segmentation.resampled(fine)
    for before, after in zip(segmentation.segments, resampled.segments, strict=True):
        expected = segmentation.mask(before).repeat(2, 0).repeat(2, 1).repeat(2, 2)
        np.testing.assert_array_equal(resampled.mask(after), expected)


# --- in files ---


def test_a_saved_segmentation_is_read_as_it_was(tmp_path):
    segmentation = some_segmentation()
    write_segmentation(tmp_path / "a.seg.nrrd", segmentation)
    again = read_segmentation(tmp_path / "a.seg.nrrd")
    for segment in again.segments:
        assert segment.fields.pop("Extent") == "0 4 0 3 0 2"
    for key, value in (
        ("ContainedRepresentationNames", "Binary labelmap|"),
        ("MasterRepresentation", "Binary labelmap"),
    ):
        assert again.fields.pop(f"Segmentation_{key}") == value
    assert again.fields.pop("Segmentation_ReferenceImageExtentOffset") == "0 0 0"
    assert_same(again, segmentation)
    assert dict(read_statuses(tmp_path / "a.seg.nrrd")) == {
        "liver": Status.COMPLETED,
        "Größe": Status.FLAGGED,
        "somebody's vessel": Status.IN_PROGRESS,
    }


def test_loading_and_saving_writes_the_same_file(tmp_path):
    first, second = tmp_path / "a.seg.nrrd", tmp_path / "b.seg.nrrd"
    write_segmentation(first, some_segmentation())
    write_segmentation(second, read_segmentation(first))
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.seg.nrrd", "b.seg.nrrd"]


@settings(deadline=None)
@given(name=VALUES.filter(bool), tags=st.dictionaries(KEYS, VALUES, max_size=4), terminology=VALUES, field=VALUES)
def test_texts_of_any_characters_survive(tmp_path_factory, name, tags, terminology, field):
    tags = {k: v for k, v in tags.items() if k not in ("TerminologyEntry", "Segmentation.Status")}
    path = tmp_path_factory.mktemp("texts") / "a.seg.nrrd"
    segment = Segment(name, "Größe 1", 0, 1, (0.1, 0.2, 1 / 3), Status.COMPLETED, terminology, tags, {"Other": field})
    write_segmentation(path, Segmentation(np.ones((1, *GRID.shape), np.uint8), GRID, [segment], {"key": field}))
    again = read_segmentation(path)
    assert again.fields["key"] == field
    (stored,) = again.segments
    stored.fields.pop("Extent")
    assert stored == segment


def test_bytes_that_are_no_utf8_survive(tmp_path):
    path = file_with(tmp_path / "a.seg.nrrd", [*GEOMETRY, "Segment0_Name:=Gr?sse"], gzip.compress(bytes(60)))
    path.write_bytes(path.read_bytes().replace(b"Gr?sse", b"Gr\xf6sse"))
    write_segmentation(path, read_segmentation(path))
    assert b"\nSegment0_Name:=Gr\xf6sse\n" in path.read_bytes()


@given(layers=st.integers(1, 3), dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]))
@settings(deadline=None, max_examples=15)
def test_other_programs_read_the_same_voxels_at_the_same_place(tmp_path_factory, layers, dtype):
    path = tmp_path_factory.mktemp("voxels") / "a.seg.nrrd"
    voxels = np.random.default_rng(layers).integers(0, np.iinfo(dtype).max, (layers, *GRID.shape)).astype(dtype)
    write_segmentation(path, Segmentation(voxels, GRID, [Segment("a", "a", 0, 1, (0, 0, 0))]))
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    np.testing.assert_array_equal(array if layers == 1 else np.moveaxis(array, -1, 0), voxels.squeeze())
    assert Grid.from_image(image).same_as(GRID)
    assert image.GetMetaData("Segment0_Name") == "a"
    again = read_segmentation(path)
    assert again.layers.dtype == dtype
    np.testing.assert_array_equal(again.layers, voxels)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
@pytest.mark.parametrize("kind", ["unsigned char", "short", "ushort", "int"])
def test_files_of_other_programs_are_read(tmp_path, encoding, kind):
    dtype = np.dtype({"unsigned char": "u1", "short": ">i2", "ushort": ">u2", "int": ">i4"}[kind])
    voxels = np.random.default_rng(3).integers(0, 4, (3, 4, 5))
    raw = voxels.astype(dtype).tobytes()
    text = " ".join(map(str, voxels.ravel())).encode()
    data = {"raw": raw, "gzip": gzip.compress(raw), "bzip2": bz2.compress(raw), "ascii": text}[encoding]
    lines = ["space: right-anterior-superior", *GEOMETRY[1:], "kinds: domain domain domain"]
    lines += ["Segment0_Name:=a", "Segment0_LabelValue:=3", "Segment0_Layer:=0"]
    segmentation = read_segmentation(file_with(tmp_path / "a.seg.nrrd", lines, data, encoding, kind=kind))
    np.testing.assert_array_equal(segmentation.mask(segmentation.segments[0]), voxels == 3)
    assert segmentation.layers.dtype.kind == "u"
    expected = Grid((5, 4, 3), (1, 2, 3), (-4, -5, 6), (-1, 0, 0, 0, -1, 0, 0, 0, 1))
    assert segmentation.grid.same_as(expected)


def test_a_file_of_an_old_slicer_has_one_layer_per_segment(tmp_path):
    voxels = np.random.default_rng(3).integers(0, 2, (3, 4, 5, 2)).astype(np.uint8)
    lines = [
        "space: left-posterior-superior",
        "space directions: none (1,0,0) (0,2,0) (0,0,3)",
        "space origin: (4,5,6)",
    ]
    lines += ["kinds: list domain domain domain", "Segment1_Name:=b", "Segment0_Name:=a", "Segment0_ID:=x"]
    path = file_with(tmp_path / "a.seg.nrrd", lines, gzip.compress(voxels.tobytes()), sizes="2 5 4 3")
    segmentation = read_segmentation(path)
    assert [s.name for s in segmentation.segments] == ["a", "b"]
    assert {s.status for s in segmentation.segments} == {Status.NOT_STARTED}
    for n, segment in enumerate(segmentation.segments):
        np.testing.assert_array_equal(segmentation.mask(segment), voxels[..., n] == 1)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["Segment0_Name:=a", *GEOMETRY[:1], *GEOMETRY[2:]], "space directions"),
        (["Segment0_Name:=a", *GEOMETRY[:2]], "space origin"),
        (["Segment0_Name:=a", *GEOMETRY[1:]], "space must be"),
        (["Segment0_Name:=a", "space: scanner-xyz", *GEOMETRY[1:]], "space must be"),
        (["Segment0_Name:=a", GEOMETRY[0], "space directions: (1,0,0) (0,2,0) (0,2,0)", GEOMETRY[2]], "span no space"),
        (["Segment0_Name:=a", *GEOMETRY, "kinds: list domain domain"], "three spatial axes"),
        (GEOMETRY, "holds no segments"),
        (["Segment0_Layer:=1", *GEOMETRY], "layer of segment"),
        (["Segment0_Layer:=-1", *GEOMETRY], "layer of segment"),
        (["Segment0_Layer:=x", *GEOMETRY], "is damaged"),
        (["Segment0_LabelValue:=", *GEOMETRY], "is damaged"),
        (["Segment0_Color:=1 0", *GEOMETRY], "is damaged"),
        (["Segment0_Color:=red", *GEOMETRY], "is damaged"),
        (["Segment0_Tags:=Segmentation.Status:done|", *GEOMETRY], 'unknown segment status "done"'),
        (["Segment0_Name:=a", *GEOMETRY, "no colon here"], "cannot be read"),
        (["Segment0_Name:=a", *GEOMETRY, "byte skip: x"], "cannot be read"),
    ],
)
def test_a_file_that_is_no_segmentation_is_refused(tmp_path, lines, complaint):
    path = file_with(tmp_path / "a.seg.nrrd", lines, gzip.compress(bytes(60)))
    with pytest.raises(InputError, match=complaint) as caught:
        read_segmentation(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_nrrd_file_is_refused(tmp_path):
    path = tmp_path / "a.seg.nrrd"
    for read in (read_segmentation, read_statuses):
        with pytest.raises(InputError, match="no file"):
            read(path)
        with pytest.raises(InputError, match="no file"):
            read(tmp_path)
    for content in (b"", b"\n", b"hello", b"NRRD0004", b"NRRD0004\n\n", b"NRRD9999\n\n", bytes(500), b"\xff" * 99):
        path.write_bytes(content)
        for read in (read_segmentation, read_statuses):
            with pytest.raises(InputError):
                read(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.seg.nrrd"
    write_segmentation(path, some_segmentation())
    return path.read_bytes()


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_segmentation_that_is_cut_short_is_refused_or_complete(tmp_path_factory, whole, data):
    length = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 20).map(lambda n: len(whole) - 1 - n))
    path = tmp_path_factory.mktemp("cut") / "a.seg.nrrd"
    path.write_bytes(whole[:length])
    try:
        again = read_segmentation(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        # Nothing but the checksum behind the last voxel may be missing.
        assert length >= len(whole) - 12
        np.testing.assert_array_equal(again.layers, some_segmentation().layers)
    if length < whole.index(b"\n\n") + 2:
        with pytest.raises(InputError):
            read_statuses(path)
    else:
        assert dict(read_statuses(path))["liver"] is Status.COMPLETED


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_file_gives_a_refusal_or_a_segmentation_but_no_other_error(tmp_path_factory, whole, data):
    content = bytearray(whole)
    header = whole.index(b"\n\n")
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header) | st.integers(0, len(whole) - 1))
        character = st.sampled_from(string.printable.encode()) | st.integers(0, 255)
        content[position] = data.draw(character)
    path = tmp_path_factory.mktemp("damaged") / "a.seg.nrrd"
    path.write_bytes(content)
    for read in (read_segmentation, read_statuses):
        try:
            read(path)
        except InputError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("name", "layers", "segments", "first"),
    [("Segmentation.seg.nrrd", 1, 7, "ribs"), ("SegmentationOverlapping.seg.nrrd", 2, 8, "ribs")],
)
def test_real_segmentations_survive_a_load_and_save(shared_folder, tmp_path, name, layers, segments, first):
    source = shared_folder("odd/segnrrd") / name
    segmentation = read_segmentation(source)
    assert len(segmentation.layers) == layers
    assert len(segmentation.segments) == segments
    assert segmentation.segments[0].name == first
    assert segmentation.segments[0].status is Status.IN_PROGRESS
    assert all(segmentation.mask(s).any() for s in segmentation.segments)
    write_segmentation(tmp_path / "a.seg.nrrd", segmentation)
    assert_same(read_segmentation(tmp_path / "a.seg.nrrd"), segmentation)
    assert dict(read_statuses(source)) == {s.name: s.status for s in segmentation.segments}

    def texts(path):
        image = sitk.ReadImage(str(path))
        pairs = {k: image.GetMetaData(k) for k in image.GetMetaDataKeys() if k.startswith("Segment")}
        return {k: sorted(v.split("|")) if k.endswith("_Tags") else v for k, v in pairs.items()}, image

    (before, image), (after, image_again) = texts(source), texts(tmp_path / "a.seg.nrrd")
    assert after.keys() == before.keys()
    assert {k: v for k, v in after.items() if "Color" not in k} == {k: v for k, v in before.items() if "Color" not in k}
    assert sitk.Hash(image) == sitk.Hash(image_again)
    assert Grid.from_image(image).same_as(Grid.from_image(image_again))
