"""Importing images with partial labels: what becomes Completed, what stays as it was, and what is refused."""

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegLib.domain.case import State
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.importing import ImportOptions, import_cases, parse_mapping
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.segmentation import Segmentation, Status, read_segmentation, write_segmentation
from PresenceSegLib.domain.structure import Structure, StructureSet

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
GRID = Grid((6, 5, 4), (1.0, 1.5, 2.0), (10.0, -20.0, 30.0), IDENTITY)
# Tilted by 17 degrees around the first axis, the second axis reversed: a left-handed oblique grid.
C, S = np.cos(np.radians(17)), np.sin(np.radians(17))
OBLIQUE = Grid((6, 5, 4), (0.7, 1.2, 3.0), (-3.5, 8.25, 41.0), (1.0, 0.0, 0.0, 0.0, -C, -S, 0.0, -S, C))
NAMES = ("liver", "spleen", "tumor")


@pytest.fixture
def project(tmp_path):
    return new_project(tmp_path / "project")


@pytest.fixture
def folders(tmp_path):
    """Empty folders for images and for labels."""
    folders = tmp_path / "images", tmp_path / "labels"
    for folder in folders:
        folder.mkdir()
    return folders


def new_project(folder, names=NAMES):
    return Project.create(folder, "Abdomen", StructureSet.from_names(names))


def write_image(path, array, grid=GRID):
    """Write an image file with ITK, without any code of the product that writes."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    sitk.WriteImage(image, str(path))


def intensities(seed=0, shape=GRID.shape):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def random_labels(seed=0, values=3, shape=GRID.shape):
    labels = np.random.default_rng(seed).integers(0, values + 1, shape).astype(np.uint8)
    labels.flat[: values + 1] = range(values + 1)  # each value at least once
    return labels


def put_pair(folders, name, labels, seed=0, grid=GRID):
    images, label_folder = folders
    write_image(images / f"{name}.nii.gz", intensities(seed, grid.shape), grid)
    write_image(label_folder / f"{name}.nii.gz", labels, grid)


def run_import(project, images, labels=None, mapping=None, **options):
    parsed = parse_mapping(mapping) if mapping is not None else None
    return import_cases(project, images, labels, ImportOptions(mapping=parsed, **options))


def states(project, case):
    return dict(zip(project.structures.names, project.case(case).states(project.structures), strict=True))


def statuses(project, case):
    return {s.name: s.status for s in project.case(case).read_segmentation().segments}


def voxels(project, case, name):
    """Mask of a structure in the stored segmentation, read with ITK and the file's own header."""
    path = project.case(case).segmentation_path
    image = sitk.ReadImage(str(path))
    header = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    number = next(k.split("_")[0] for k, v in header.items() if k.endswith("_Name") and v == name)
    array = sitk.GetArrayFromImage(image)
    if array.ndim == 4:
        array = array[..., int(header[f"{number}_Layer"])]
    return array == int(header[f"{number}_LabelValue"])


def refusal(function, *arguments, **options):
    """The message of the refusal: one sentence in one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message.endswith((".", ". ")) and "\n" not in message, message
    return message


def segmentation_file(path, segments, grid=GRID):
    """Write a `.seg.nrrd` of (name, mask, status) entries."""
    result = Segmentation.empty(grid)
    for n, (name, mask, status) in enumerate(segments):
        result.put(Structure(name, (0.1 * n, 0.5, 0.25)), mask, status)
    write_segmentation(path, result)
    return result


def write_dicom(folder, array, grid=GRID, series="1.2.3.4.5", skip=()):
    """Write a volume as a DICOM series, one file per slice."""
    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    axes = np.array(grid.direction).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in set(range(len(array))) - set(skip):
        slice_image = image[:, :, k]
        for tag, value in {
            "0008|0060": "CT",
            "0008|0018": f"{series}.{k + 1}",
            "0020|000d": "1.2.3.4",
            "0020|000e": series,
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, k)))),
            "0020|0037": "\\".join(str(v) for v in (*axes[:, 0], *axes[:, 1])),
        }.items():
            slice_image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{k:03d}.dcm"))
        writer.Execute(slice_image)


# What a mapped label becomes


def test_a_mapped_label_becomes_completed_and_other_structures_stay_untouched(project, folders):
    labels = random_labels(values=2)
    put_pair(folders, "a", labels)
    report = run_import(project, *folders, ["1=liver", "2="])
    assert states(project, "a") == {
        "liver": State.ANNOTATED,
        "spleen": State.UNTOUCHED,
        "tumor": State.UNTOUCHED,
    }
    assert np.array_equal(voxels(project, "a", "liver"), labels == 1)
    assert (report.added, report.extended, report.annotated) == (["a"], [], {"liver": 1})


def test_labels_that_the_mapping_joins_become_one_structure(project, folders):
    labels = random_labels(values=5)
    put_pair(folders, "a", labels)
    run_import(project, *folders, ["1+4=liver", "2=spleen,5=tumor", "3="])
    assert np.array_equal(voxels(project, "a", "liver"), (labels == 1) | (labels == 4))
    assert np.array_equal(voxels(project, "a", "spleen"), labels == 2)
    assert np.array_equal(voxels(project, "a", "tumor"), labels == 5)


def test_a_label_that_is_left_out_leaves_no_segment(project, folders):
    put_pair(folders, "a", random_labels(values=2))
    run_import(project, *folders, ["1=liver", "2="])
    assert [s.name for s in project.case("a").read_segmentation().segments] == ["liver"]


def test_a_mapped_label_without_voxels_is_confirmed_absent(project, folders):
    put_pair(folders, "a", random_labels(values=1))
    report = run_import(project, *folders, ["1=liver", "2=spleen"])
    assert states(project, "a")["spleen"] is State.ABSENT
    assert (report.annotated, report.empty) == ({"liver": 1, "spleen": 1}, {"spleen": 1})


def test_only_the_structures_given_as_annotated_are_completed(project, folders):
    labels = random_labels(values=2)
    put_pair(folders, "a", labels)
    report = run_import(project, *folders, ["1=liver", "2=spleen"], annotated=("spleen",))
    assert states(project, "a") == {
        "liver": State.PREDICTED,
        "spleen": State.ANNOTATED,
        "tumor": State.UNTOUCHED,
    }
    assert np.array_equal(voxels(project, "a", "liver"), labels == 1)
    assert report.annotated == {"spleen": 1}


def test_a_structure_given_as_absent_is_confirmed_absent_in_every_case(project, folders):
    put_pair(folders, "a", random_labels(values=1))
    put_pair(folders, "b", random_labels(values=1, seed=1), seed=1)
    report = run_import(project, *folders, ["1=liver"], absent=("tumor",))
    assert [states(project, case)["tumor"] for case in "ab"] == [State.ABSENT, State.ABSENT]
    assert not voxels(project, "b", "tumor").any()
    assert report.empty == {"tumor": 2}


def test_images_without_labels_become_cases_without_annotation(project, folders):
    write_image(folders[0] / "a.nii.gz", intensities())
    report = run_import(project, folders[0], absent=("tumor",))
    assert states(project, "a") == {
        "liver": State.UNTOUCHED,
        "spleen": State.UNTOUCHED,
        "tumor": State.ABSENT,
    }
    assert report.added == ["a"]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_presence_and_masks_depend_on_names_only_whatever_the_order_and_the_label_values(data):
    values = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6, unique=True), "label values")
    targets = data.draw(st.lists(st.sampled_from([*NAMES, ""]), min_size=len(values), max_size=len(values)))
    order = data.draw(st.permutations(NAMES), "order of the structure set")
    labels = np.random.default_rng(len(values)).choice([0, *values], GRID.shape).astype(np.uint16)
    joined = {name: [v for v, t in zip(values, targets, strict=True) if t == name] for name in (*NAMES, "")}
    entries = [f"{'+'.join(map(str, vs))}={name}" for name, vs in joined.items() if vs]
    with tempfile.TemporaryDirectory() as folder:
        project = new_project(Path(folder) / "project", order)
        write_image(Path(folder) / "a.nii.gz", intensities())
        write_image(Path(folder) / "labels.nrrd", labels)
        mapping = data.draw(st.permutations(entries), "order of the mapping")
        run_import(project, Path(folder) / "a.nii.gz", Path(folder) / "labels.nrrd", mapping)
        presence = project.case("a").presence(project.structures)
        assert presence.tolist() == [bool(joined[name]) for name in order]
        for name in NAMES:
            if joined[name]:
                assert np.array_equal(voxels(project, "a", name), np.isin(labels, joined[name]))


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(["liver", "lump", "node", "skin"]), shuffled=st.permutations(range(3)))
def test_segments_are_matched_by_name_whatever_their_order_in_the_file(order, shuffled):
    rng = np.random.default_rng(3)
    masks = {name: rng.random(GRID.shape) < 0.3 for name in sorted(order)}  # they overlap
    mapping = ["liver=liver", "lump+node=tumor"]
    with tempfile.TemporaryDirectory() as folder:
        project = new_project(Path(folder) / "project", [NAMES[n] for n in shuffled])
        write_image(Path(folder) / "a.nii.gz", intensities())
        segmentation_file(Path(folder) / "a.seg.nrrd", [(n, masks[n], Status.IN_PROGRESS) for n in order])
        run_import(project, Path(folder) / "a.nii.gz", Path(folder) / "a.seg.nrrd", mapping)
        assert states(project, "a") == {
            "liver": State.ANNOTATED,
            "spleen": State.UNTOUCHED,
            "tumor": State.ANNOTATED,
        }
        assert np.array_equal(voxels(project, "a", "liver"), masks["liver"])
        assert np.array_equal(voxels(project, "a", "tumor"), masks["lump"] | masks["node"])
        assert np.array_equal(voxels(project, "a", "skin"), masks["skin"])


# Kinds of files


@pytest.mark.parametrize("grid", [GRID, OBLIQUE], ids=["upright", "oblique"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_every_image_format_comes_in_with_its_voxels_and_in_its_place(project, folders, ending, grid):
    labels = random_labels(values=1)
    write_image(folders[0] / f"a{ending}", intensities(), grid)
    write_image(folders[1] / f"a{ending}", labels, grid)
    run_import(project, *folders, ["1=liver"])
    stored = sitk.ReadImage(str(project.case("a").volume_path))
    assert np.array_equal(sitk.GetArrayFromImage(stored), intensities())
    assert np.array_equal(voxels(project, "a", "liver"), labels == 1)
    written = sitk.ReadImage(str(project.case("a").segmentation_path))
    for image in (stored, written):
        corner = image.TransformIndexToPhysicalPoint((5, 4, 3))
        expected = np.array(grid.origin) + np.array(grid.direction).reshape(3, 3) @ (
            np.array([5, 4, 3]) * np.array(grid.spacing)
        )
        assert np.allclose(corner, expected, atol=1e-4)


def test_a_nifti_image_with_slope_and_intercept_comes_in_scaled(project, folders):
    raw = intensities()
    image = sitk.GetImageFromArray(raw)
    image.SetSpacing(GRID.spacing)
    path = folders[0] / "a.nii"
    sitk.WriteImage(image, str(path))
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([0.5, 100.0], "<f4").tobytes()  # scl_slope and scl_inter of the NIfTI-1 header
    path.write_bytes(content)
    run_import(project, folders[0])
    assert np.allclose(project.case("a").read_volume().array, raw * 0.5 + 100)


@pytest.mark.parametrize("spoiled", [False, True], ids=["whole", "with NaN"])
def test_a_big_endian_nifti_image_comes_in_and_its_nan_is_refused(project, folders, spoiled):
    array = intensities().astype(np.float32)
    write_image(folders[0] / "a.nii", array)
    little = (folders[0] / "a.nii").read_bytes()
    # Number types of the NIfTI-1 header's fields, in order; texts stay as they are.
    fields = "i4 V28 i4 i2 V2 8i2 3f4 4i2 8f4 3f4 i2 V2 4f4 2i4 V104 2i2 18f4 V20".split()
    header = np.frombuffer(little[:348], np.dtype(",".join(f"<{f}" if f[0].isalpha() else f for f in fields)))
    if spoiled:
        array[1, 2, 3] = np.nan
    swapped = header.astype(header.dtype.newbyteorder(">")).tobytes() + little[348:352] + array.astype(">f4").tobytes()
    (folders[0] / "a.nii").write_bytes(swapped)
    if spoiled:
        assert "1 voxels that are NaN" in refusal(run_import, project, folders[0])
    else:
        run_import(project, folders[0])
        assert np.array_equal(project.case("a").read_volume().array, array)


def test_segments_of_seg_nrrd_files_match_by_name_and_keep_their_statuses(project, folders):
    rng = np.random.default_rng(0)
    masks = {name: rng.random(GRID.shape) < 0.4 for name in (*NAMES, "other")}
    statuses = (Status.COMPLETED, Status.IN_PROGRESS, Status.FLAGGED, Status.COMPLETED)
    write_image(folders[0] / "a.nrrd", intensities())
    entries = [(name, masks[name], status) for name, status in zip(masks, statuses, strict=True)]
    segmentation_file(folders[1] / "a.seg.nrrd", entries)
    report = run_import(project, *folders)
    assert states(project, "a") == {
        "liver": State.ANNOTATED,
        "spleen": State.IN_PROGRESS,
        "tumor": State.FLAGGED,
    }
    assert all(np.array_equal(voxels(project, "a", name), mask) for name, mask in masks.items())
    assert report.annotated == {"liver": 1}


def test_a_foreign_segment_keeps_its_color_and_tags(project, folders):
    write_image(folders[0] / "a.nrrd", intensities())
    source = Segmentation.empty(GRID)
    source.put(Structure("other", (0.25, 0.5, 0.75)), random_labels() > 1, Status.FLAGGED)
    source.segments[0].tags["Somebody.Note"] = "check this"
    write_segmentation(folders[1] / "a.seg.nrrd", source)
    run_import(project, *folders)
    stored = project.case("a").read_segmentation().named("other")
    assert (stored.color, stored.status) == ((0.25, 0.5, 0.75), Status.FLAGGED)
    assert stored.tags["Somebody.Note"] == "check this"


def test_only_segments_given_as_annotated_are_completed_the_others_are_predictions(project, folders):
    labels = random_labels(values=2)
    write_image(folders[0] / "a.nrrd", intensities())
    segmentation_file(
        folders[1] / "a.seg.nrrd",
        [("liver", labels == 1, Status.COMPLETED), ("spleen", labels == 2, Status.NOT_STARTED)],
    )
    run_import(project, *folders, annotated=("spleen",))
    assert states(project, "a") == {
        "liver": State.PREDICTED,
        "spleen": State.ANNOTATED,
        "tumor": State.UNTOUCHED,
    }


def test_a_structure_without_terminology_takes_that_of_the_segment(project, folders):
    images, labels = folders
    write_image(images / "a.nrrd", intensities())
    entry = "list~SCT^123037004^Anatomical Structure~SCT^10200004^Liver~^^~regions~^^~^^"
    source = Segmentation.empty(GRID)
    source.put(Structure("liver", (1, 0, 0), entry), np.ones(GRID.shape, bool), Status.COMPLETED)
    write_segmentation(labels / "a.seg.nrrd", source)
    run_import(project, images, labels)
    liver = project.cases()[0].read_segmentation().named("liver")
    assert (liver.terminology, liver.color) == (entry, project.structures.named("liver").color)


def test_a_segment_that_is_left_out_does_not_come_in(project, folders):
    labels = random_labels(values=2)
    write_image(folders[0] / "a.nrrd", intensities())
    entries = [("Leber", labels == 1, Status.NOT_STARTED), ("liver", labels == 2, Status.COMPLETED)]
    segmentation_file(folders[1] / "a.seg.nrrd", entries)
    run_import(project, *folders, ["Leber=liver", "liver="])
    assert [s.name for s in project.case("a").read_segmentation().segments] == ["liver"]
    assert np.array_equal(voxels(project, "a", "liver"), labels == 1)


@pytest.mark.parametrize("order", [("Leber", "liver"), ("liver", "Leber")], ids=["mapped first", "mapped last"])
def test_a_segment_mapped_to_the_name_of_another_is_refused(project, folders, snapshot, order):
    masks = {"Leber": random_labels() == 1, "liver": random_labels() == 2}
    write_image(folders[0] / "a.nrrd", intensities())
    segmentation_file(folders[1] / "a.seg.nrrd", [(n, masks[n], Status.NOT_STARTED) for n in order])
    before = snapshot(project.folder)
    assert '"liver"' in refusal(run_import, project, *folders, ["Leber=liver"])
    assert snapshot(project.folder) == before


def test_a_dicom_folder_becomes_one_case_named_like_the_folder(project, tmp_path):
    write_dicom(tmp_path / "patient 7", intensities())
    labels = random_labels(values=1)
    write_image(tmp_path / "labels.nrrd", labels)
    run_import(project, tmp_path / "patient 7", tmp_path / "labels.nrrd", ["1=liver"])
    case = project.case("patient 7")
    assert np.array_equal(case.read_volume().array, intensities())
    assert case.read_volume().grid.same_as(GRID)
    assert case.info.source == "patient 7"
    assert np.array_equal(voxels(project, "patient 7", "liver"), labels == 1)


def test_the_current_folder_can_be_a_dicom_folder(project, tmp_path, monkeypatch):
    write_dicom(tmp_path / "patient", intensities())
    monkeypatch.chdir(tmp_path / "patient")
    assert run_import(project, Path(".")).added == ["patient"]


def test_a_folder_of_dicom_folders_becomes_a_case_each(project, tmp_path):
    for n, name in enumerate(("p1", "p2")):
        write_dicom(tmp_path / "images" / name, intensities(n), series=f"1.2.3.{n}")
    assert run_import(project, tmp_path / "images").added == ["p1", "p2"]
    assert np.array_equal(project.case("p2").read_volume().array, intensities(1))


def test_several_series_in_one_dicom_folder_become_numbered_cases(project, tmp_path):
    for n in range(2):
        write_dicom(tmp_path / "patient", intensities(n), series=f"1.2.3.{n}")
    assert run_import(project, tmp_path / "patient").added == ["patient_1", "patient_2"]


def test_a_dicom_series_with_a_missing_slice_is_refused(project, tmp_path, snapshot):
    write_dicom(tmp_path / "patient", intensities(shape=(6, 5, 6)), skip=[2])
    before = snapshot(project.folder)
    assert "missing" in refusal(run_import, project, tmp_path / "patient")
    assert snapshot(project.folder) == before


def test_hidden_files_and_files_of_other_kinds_are_left_alone(project, folders):
    put_pair(folders, "a", random_labels(values=1))
    for folder in folders:
        (folder / ".a.nii.gz").write_bytes(b"no image")
        (folder / "notes.txt").write_text("no image")
        (folder / "empty").mkdir()
    assert run_import(project, *folders, ["1=liver"]).added == ["a"]


# Names, subjects, splits


def test_suffixes_are_no_part_of_the_names(project, tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    for name, seed in (("p1", 1), ("p2", 2)):
        write_image(folder / f"{name}_0000.nii.gz", intensities(seed))
        write_image(folder / f"{name}_seg.nii.gz", random_labels(seed, values=1))
        write_image(folder / f"{name}.nii.gz", intensities(seed + 9))  # neither the one nor the other
    run_import(project, folder, folder, ["1=liver"], image_suffix="_0000", label_suffix="_seg")
    assert [c.name for c in project.cases()] == ["p1", "p2"]
    assert np.array_equal(project.case("p2").read_volume().array, intensities(2))
    assert np.array_equal(voxels(project, "p2", "liver"), random_labels(2, values=1) == 1)


def test_the_subject_is_the_part_of_the_name_that_the_pattern_names(project, folders):
    for n, name in enumerate(("ann_scan1", "ann_scan2", "bob_scan1")):
        write_image(folders[0] / f"{name}.nii.gz", intensities(n))
    run_import(project, folders[0], subject_pattern="(.+)_scan")
    assert [c.info.subject for c in project.cases()] == ["ann", "ann", "bob"]


def test_without_a_pattern_every_case_is_a_subject_of_its_own(project, folders):
    for n in range(2):
        write_image(folders[0] / f"case{n}.nii.gz", intensities(n))
    run_import(project, folders[0])
    assert [c.info.subject for c in project.cases()] == ["case0", "case1"]


@pytest.mark.parametrize("pattern", ["(.+)_scan", "a", "(b)?", "("])
def test_a_pattern_that_finds_no_subject_is_refused(project, folders, snapshot, pattern):
    write_image(folders[0] / "a.nii.gz", intensities())
    before = snapshot(project.folder)
    assert f'"{pattern}"' in refusal(run_import, project, folders[0], subject_pattern=pattern)
    assert snapshot(project.folder) == before


@pytest.mark.parametrize("split", ["", "train", "validation", "test"])
def test_the_split_is_stored_with_every_case(project, folders, split):
    write_image(folders[0] / "a.nii.gz", intensities())
    run_import(project, folders[0], split=split)
    assert project.case("a").info.split == split


def test_an_unknown_split_is_refused(project, folders):
    write_image(folders[0] / "a.nii.gz", intensities())
    assert "training" in refusal(run_import, project, folders[0], split="training")


def test_a_case_stores_the_name_of_its_source_but_not_its_path(project, folders):
    write_image(folders[0] / "a.nii.gz", intensities())
    run_import(project, folders[0])
    assert project.case("a").info.source == "a.nii.gz"


# Images without labels, labels without images


def test_labels_for_which_there_is_no_image_are_reported(project, folders):
    put_pair(folders, "a", random_labels(values=1))
    write_image(folders[1] / "b.nii.gz", random_labels(values=1))
    assert run_import(project, *folders, ["1=liver"]).unused_labels == ["b"]


def unlabelled(folders):
    put_pair(folders, "a", random_labels(values=1))
    write_image(folders[0] / "b.nii.gz", intensities(1))


def test_images_without_a_label_are_refused(project, folders, snapshot):
    unlabelled(folders)
    before = snapshot(project.folder)
    message = refusal(run_import, project, *folders, ["1=liver"])
    assert "1 of 2 images" in message and "(b)" in message
    assert snapshot(project.folder) == before


def test_images_without_a_label_can_be_skipped(project, folders):
    unlabelled(folders)
    report = run_import(project, *folders, ["1=liver"], unlabelled="skip")
    assert (report.added, report.skipped) == (["a"], ["b"])
    assert [c.name for c in project.cases()] == ["a"]


def test_images_without_a_label_can_be_kept_to_annotate_later(project, folders):
    unlabelled(folders)
    report = run_import(project, *folders, ["1=liver"], unlabelled="keep")
    assert (report.added, report.skipped) == (["a", "b"], [])
    assert set(states(project, "b").values()) == {State.UNTOUCHED}


def test_an_unknown_way_to_treat_unlabelled_images_is_refused(project, folders):
    unlabelled(folders)
    assert '"drop"' in refusal(run_import, project, *folders, ["1=liver"], unlabelled="drop")


# Several imports into one project


def test_several_imports_with_different_mappings_add_their_cases(project, tmp_path):
    sources = {"hospital": ("1=liver", "liver"), "study": ("1=spleen", "spleen"), "archive": ("1=tumor", "tumor")}
    for n, (name, (mapping, _)) in enumerate(sources.items()):
        source = tmp_path / name / "img", tmp_path / name / "lab"
        for folder in source:
            folder.mkdir(parents=True)
        put_pair(source, name, random_labels(n, values=1), seed=n)
        run_import(project, *source, [mapping])
    matrix = project.presence_matrix()
    annotated = {
        case: s
        for case, row in zip(matrix.cases, matrix.states, strict=True)
        for s, state in zip(matrix.structures, row, strict=True)
        if state is State.ANNOTATED
    }
    assert annotated == {name: structure for name, (_, structure) in sources.items()}
    assert matrix.presence.sum() == 3


def test_the_same_image_with_other_labels_extends_its_case(project, tmp_path):
    liver, spleen = random_labels(1, values=1), random_labels(2, values=7)
    write_image(tmp_path / "a.nii.gz", intensities())
    write_image(tmp_path / "a.mha", intensities())  # the same voxels in another format are the same image
    write_image(tmp_path / "first.nii.gz", liver)
    write_image(tmp_path / "second.nrrd", spleen)
    run_import(project, tmp_path / "a.nii.gz", tmp_path / "first.nii.gz", ["1=liver"])
    report = run_import(
        project, tmp_path / "a.mha", tmp_path / "second.nrrd", ["7=spleen", "1=,2=,3=,4=,5=,6="], absent=("tumor",)
    )
    assert (report.added, report.extended) == ([], ["a"])
    assert [c.name for c in project.cases()] == ["a"]
    assert np.array_equal(voxels(project, "a", "liver"), liver == 1)
    assert np.array_equal(voxels(project, "a", "spleen"), spleen == 7)  # they overlap, and both stay whole
    assert states(project, "a") == {
        "liver": State.ANNOTATED,
        "spleen": State.ANNOTATED,
        "tumor": State.ABSENT,
    }
    assert report.annotated == {"liver": 1, "spleen": 1, "tumor": 1}


def test_extending_a_case_leaves_volume_source_and_foreign_segments_as_they_were(project, tmp_path):
    write_image(tmp_path / "a.nrrd", intensities())
    mask = random_labels() == 2
    segmentation_file(tmp_path / "first.seg.nrrd", [("vessel", mask, Status.FLAGGED)])
    write_image(tmp_path / "second.nrrd", random_labels(values=1))
    run_import(project, tmp_path / "a.nrrd", tmp_path / "first.seg.nrrd", split="test")
    case = project.case("a")
    before = case.volume_path.read_bytes(), case.info
    run_import(project, tmp_path / "a.nrrd", tmp_path / "second.nrrd", ["1=liver"])
    assert (case.volume_path.read_bytes(), case.info) == before
    assert np.array_equal(voxels(project, "a", "vessel"), mask)
    assert statuses(project, "a") == {"vessel": Status.FLAGGED, "liver": Status.COMPLETED}


def test_a_case_whose_segmentation_slicer_cropped_can_be_extended(project, tmp_path):
    labels = random_labels(values=1)
    write_image(tmp_path / "a.nrrd", intensities())
    write_image(tmp_path / "spleen.nrrd", labels)
    run_import(project, tmp_path / "a.nrrd")
    crop = Grid((3, 2, 2), GRID.spacing, (12.0, -18.5, 32.0), IDENTITY)  # from voxel (2, 1, 1) on
    stored = project.case("a").segmentation_path
    segmentation_file(stored, [("liver", np.ones(crop.shape, bool), Status.COMPLETED)], crop)
    run_import(project, tmp_path / "a.nrrd", tmp_path / "spleen.nrrd", ["1=spleen"])
    expected = np.zeros(GRID.shape, bool)
    expected[1:3, 1:3, 2:5] = True
    assert np.array_equal(voxels(project, "a", "liver"), expected)
    assert np.array_equal(voxels(project, "a", "spleen"), labels == 1)


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.IN_PROGRESS, Status.FLAGGED])
@pytest.mark.parametrize("mapping", [["1=liver"], None], ids=["label", "absent"])
def test_what_a_person_worked_on_is_not_overwritten(project, tmp_path, snapshot, status, mapping):
    write_image(tmp_path / "a.nrrd", intensities())
    segmentation_file(tmp_path / "first.seg.nrrd", [("liver", random_labels() == 2, status)])
    write_image(tmp_path / "second.nrrd", random_labels(values=1))
    run_import(project, tmp_path / "a.nrrd", tmp_path / "first.seg.nrrd")
    before = snapshot(project.folder)
    if mapping:
        message = refusal(run_import, project, tmp_path / "a.nrrd", tmp_path / "second.nrrd", mapping)
    else:
        message = refusal(run_import, project, tmp_path / "a.nrrd", absent=("liver",))
    assert '"liver"' in message and 'Case "a"' in message
    assert snapshot(project.folder) == before


def test_a_prediction_gives_way_to_an_imported_label(project, tmp_path):
    labels = random_labels(values=1)
    write_image(tmp_path / "a.nrrd", intensities())
    segmentation_file(tmp_path / "first.seg.nrrd", [("liver", labels == 0, Status.NOT_STARTED)])
    write_image(tmp_path / "second.nrrd", labels)
    run_import(project, tmp_path / "a.nrrd", tmp_path / "first.seg.nrrd")
    run_import(project, tmp_path / "a.nrrd", tmp_path / "second.nrrd", ["1=liver"])
    assert states(project, "a")["liver"] is State.ANNOTATED
    assert np.array_equal(voxels(project, "a", "liver"), labels == 1)


@pytest.mark.parametrize("what", ["voxels", "place"])
def test_another_volume_of_the_same_name_is_refused(project, folders, snapshot, what):
    put_pair(folders, "a", random_labels(values=1))
    run_import(project, *folders, ["1=liver"])
    before = snapshot(project.folder)
    moved = Grid(GRID.size, GRID.spacing, (10.0, -20.0, 31.0), IDENTITY)
    put_pair(folders, "a", random_labels(values=1), seed=int(what == "voxels"), grid=moved if what == "place" else GRID)
    message = refusal(run_import, project, *folders, ["1=spleen"])
    assert 'Case "a"' in message and "another volume" in message
    assert snapshot(project.folder) == before


@pytest.mark.parametrize("options", [{"split": "test"}, {"subject_pattern": "(..)_scan"}], ids=["split", "subject"])
def test_an_import_does_not_change_split_or_subject_of_a_case(project, tmp_path, snapshot, options):
    write_image(tmp_path / "ann_scan.nrrd", intensities())
    run_import(project, tmp_path / "ann_scan.nrrd", split="train", subject_pattern="(.+)_scan")
    before = snapshot(project.folder)
    message = refusal(run_import, project, tmp_path / "ann_scan.nrrd", absent=("tumor",), **options)
    assert "does not change" in message
    assert snapshot(project.folder) == before
    run_import(project, tmp_path / "ann_scan.nrrd", absent=("tumor",), split="train", subject_pattern="(.+)_scan")
    assert states(project, "ann_scan")["tumor"] is State.ABSENT


# All or nothing


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def unnamed(path):
    write_image(path, np.full(GRID.shape, 9, np.uint8))


def elsewhere(path):
    write_image(path, random_labels(values=1), OBLIQUE)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [("images", truncated), ("labels", truncated), ("labels", unnamed), ("labels", elsewhere)],
)
def test_one_bad_file_among_good_ones_leaves_the_project_as_it_was(project, folders, snapshot, kind, spoil):
    for n, name in enumerate("abc"):
        put_pair(folders, name, random_labels(n, values=1), seed=n)
    run_import(project, folders[0] / "a.nii.gz", folders[1] / "a.nii.gz", ["1=liver"])  # would be extended
    spoil(folders[kind == "labels"] / "c.nii.gz")
    before = snapshot(project.folder)
    assert 'Case "c"' in refusal(run_import, project, *folders, ["1=spleen"])
    assert snapshot(project.folder) == before


def test_an_interrupted_import_leaves_the_project_as_it_was(project, folders, snapshot):
    for n, name in enumerate("ab"):
        put_pair(folders, name, random_labels(n, values=1), seed=n)
    before = snapshot(project.folder)

    def interrupt(items, total):
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_cases(project, *folders, ImportOptions(mapping={"1": "liver"}), interrupt)
    assert snapshot(project.folder) == before


# Labels on another grid


def cropped(labels):
    """Labels on every second slice of a part of the image: another spacing, size and origin."""
    grid = Grid((4, 3, 2), (1.0, 1.5, 4.0), (11.0, -18.5, 30.0), IDENTITY)
    return labels[::2, 1:4, 1:5], grid


def test_a_label_on_another_grid_is_refused_with_both_geometries_named(project, folders, snapshot):
    write_image(folders[0] / "a.nii.gz", intensities())
    write_image(folders[1] / "a.nii.gz", *cropped(random_labels(values=1)))
    before = snapshot(project.folder)
    message = refusal(run_import, project, *folders, ["1=liver"])
    assert "4×3×2 voxels of 1×1.5×4 mm, origin (11, -18.5, 30)" in message
    assert "6×5×4 voxels of 1×1.5×2 mm, origin (10, -20, 30)" in message
    assert snapshot(project.folder) == before


def test_a_label_on_another_grid_is_moved_by_nearest_neighbor_when_asked_for(project, folders):
    labels, grid = cropped(random_labels(values=2))
    write_image(folders[0] / "a.nii.gz", intensities())
    write_image(folders[1] / "a.nii.gz", labels, grid)
    run_import(project, *folders, ["1=liver", "2=spleen"], resample=True)
    expected = np.zeros(GRID.shape, np.uint8)
    for k, j, i in np.ndindex(GRID.shape):
        position = np.array(GRID.origin) + np.array([i, j, k]) * GRID.spacing
        index = (position - grid.origin) / grid.spacing
        if abs(index[2] % 1 - 0.5) < 1e-6:
            continue  # halfway between two slices of the label both are as near
        n = np.rint(index).astype(int)
        if (n >= 0).all() and (n < grid.size).all():
            expected[k, j, i] = labels[n[2], n[1], n[0]]
    decided = np.arange(GRID.shape[0]) % 2 == 0
    assert np.array_equal(voxels(project, "a", "liver")[decided], expected[decided] == 1)
    assert np.array_equal(voxels(project, "a", "spleen")[decided], expected[decided] == 2)


def test_a_segmentation_cropped_to_its_content_needs_no_resampling(project, folders):
    labels = random_labels(values=1)
    grid = Grid((3, 2, 2), GRID.spacing, (12.0, -18.5, 32.0), IDENTITY)  # from voxel (2, 1, 1) on
    write_image(folders[0] / "a.nii.gz", intensities())
    segmentation_file(folders[1] / "a.seg.nrrd", [("liver", labels[1:3, 1:3, 2:5] == 1, Status.COMPLETED)], grid)
    run_import(project, *folders)
    expected = np.zeros(GRID.shape, bool)
    expected[1:3, 1:3, 2:5] = labels[1:3, 1:3, 2:5] == 1
    assert np.array_equal(voxels(project, "a", "liver"), expected)


@pytest.mark.parametrize("resample", [False, True])
def test_a_segmentation_on_another_grid_is_refused_unless_resampling_is_asked_for(project, folders, resample):
    mask = np.ones(OBLIQUE.shape, bool)
    grid = Grid((12, 10, 8), (0.5, 0.75, 1.0), (9.75, -20.375, 29.5), IDENTITY)  # each voxel cut in eight
    mask = np.repeat(np.repeat(np.repeat(random_labels(values=1) == 1, 2, 0), 2, 1), 2, 2)
    write_image(folders[0] / "a.nii.gz", intensities())
    segmentation_file(folders[1] / "a.seg.nrrd", [("liver", mask, Status.COMPLETED)], grid)
    if resample:
        run_import(project, *folders, resample=True)
        assert np.array_equal(voxels(project, "a", "liver"), random_labels(values=1) == 1)
    else:
        message = refusal(run_import, project, *folders)
        assert "12×10×8 voxels" in message and "6×5×4 voxels" in message


@pytest.mark.parametrize(("ending", "resample"), [(".nii.gz", True), (".seg.nrrd", True), (".seg.nrrd", False)])
def test_a_label_that_lies_wholly_outside_of_its_image_is_refused(project, folders, snapshot, ending, resample):
    # Taken at its word it would be the claim that the structure is absent, which nobody made.
    far = Grid(GRID.size, GRID.spacing, (500.0, -20.0, 30.0), IDENTITY)
    write_image(folders[0] / "a.nii.gz", intensities())
    if ending == ".nii.gz":
        write_image(folders[1] / "a.nii.gz", random_labels(values=1), far)
    else:
        segmentation_file(folders[1] / "a.seg.nrrd", [("liver", random_labels() > 0, Status.COMPLETED)], far)
    before = snapshot(project.folder)
    mapping = ["1=liver"] if ending == ".nii.gz" else None
    assert "outside" in refusal(run_import, project, *folders, mapping, resample=resample)
    assert snapshot(project.folder) == before


# Refusals


def test_a_label_value_that_the_mapping_does_not_name_is_refused(project, folders, snapshot):
    put_pair(folders, "a", random_labels(values=3))
    before = snapshot(project.folder)
    message = refusal(run_import, project, *folders, ["1=liver"])
    assert "label 2, 3" in message and "a.nii.gz" in message
    assert snapshot(project.folder) == before


def test_a_label_map_without_a_mapping_is_refused(project, folders):
    put_pair(folders, "a", random_labels())
    assert "give a mapping" in refusal(run_import, project, *folders)


def test_a_mapping_or_annotated_structures_without_any_labels_are_refused(project, folders):
    write_image(folders[0] / "a.nii.gz", intensities())
    assert "no labels" in refusal(run_import, project, folders[0], mapping=["1=liver"])
    assert "no labels" in refusal(run_import, project, folders[0], annotated=("liver",))


def test_an_annotated_structure_that_no_label_has_is_refused(project, folders, snapshot):
    write_image(folders[0] / "a.nrrd", intensities())
    segmentation_file(folders[1] / "a.seg.nrrd", [("Leber", random_labels() == 1, Status.COMPLETED)])
    before = snapshot(project.folder)
    assert '"liver"' in refusal(run_import, project, *folders, annotated=("liver",))
    assert snapshot(project.folder) == before


def test_a_structure_of_which_resampling_leaves_nothing_is_refused(project, folders, snapshot):
    # The tumor is one voxel of a label finer than the image, between two of its slices.
    fine = Grid((6, 5, 16), (1.0, 1.5, 0.5), GRID.origin, IDENTITY)
    labels = np.zeros(fine.shape, np.uint8)
    labels[:, :2], labels[2, 4, 4] = 1, 2
    write_image(folders[0] / "a.nrrd", intensities())
    write_image(folders[1] / "a.nrrd", labels, fine)
    before = snapshot(project.folder)
    message = refusal(run_import, project, *folders, ["1=liver", "2=tumor"], resample=True)
    assert '"tumor"' in message
    assert snapshot(project.folder) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mapping": ["1=kidney"]}, "kidney"),
        ({"mapping": ["1=Liver"]}, "Liver"),
        ({"mapping": ["1=liver"], "absent": ("kidney",)}, "kidney"),
        ({"mapping": ["1=liver"], "annotated": ("kidney",)}, "kidney"),
        ({"mapping": ["1=liver"], "annotated": ("spleen",)}, "spleen"),
        ({"mapping": ["1=liver"], "absent": ("liver",)}, "liver"),
    ],
)
def test_options_that_name_unknown_structures_or_contradict_each_other_are_refused(
    project, folders, snapshot, options, named
):
    put_pair(folders, "a", random_labels(values=1))
    before = snapshot(project.folder)
    assert f'"{named}"' in refusal(run_import, project, *folders, **options)
    assert snapshot(project.folder) == before


def test_a_mapping_of_words_for_a_label_map_is_refused(project, folders):
    put_pair(folders, "a", random_labels(values=1))
    assert "no number" in refusal(run_import, project, *folders, ["one=liver"])


def test_a_mapping_of_a_segment_that_a_file_does_not_have_is_refused(project, folders):
    write_image(folders[0] / "a.nii.gz", intensities())
    segmentation_file(folders[1] / "a.seg.nrrd", [("Leber", random_labels() == 1, Status.COMPLETED)])
    message = refusal(run_import, project, *folders, ["Milz=spleen"])
    assert '"Milz"' in message and "Leber" in message


def test_two_images_or_two_labels_of_one_name_are_refused(project, folders):
    put_pair(folders, "a", random_labels(values=1))
    write_image(folders[1] / "a.nrrd", random_labels(values=1))
    assert "Two label files" in refusal(run_import, project, *folders, ["1=liver"])
    write_image(folders[0] / "a.mha", intensities())
    assert "Two images" in refusal(run_import, project, *folders, ["1=liver"])


def test_a_name_that_cannot_be_a_folder_everywhere_is_refused(project, folders):
    write_image(folders[0] / "a&b.nii.gz", intensities())
    assert '"a&b"' in refusal(run_import, project, folders[0])


@pytest.mark.parametrize("which", [0, 1], ids=["images", "labels"])
def test_an_empty_or_missing_folder_is_refused(project, folders, which):
    write_image(folders[1 - which] / "a.nii.gz", random_labels(values=1))
    assert str(folders[which]) in refusal(run_import, project, *folders, ["1=liver"])
    folders[which].rmdir()
    assert str(folders[which]) in refusal(run_import, project, *folders, ["1=liver"])


def test_a_file_of_another_kind_is_refused(project, folders, tmp_path):
    (tmp_path / "notes.txt").write_text("1 liver")
    write_image(folders[0] / "a.nii.gz", intensities())
    message = refusal(run_import, project, folders[0] / "a.nii.gz", tmp_path / "notes.txt", ["1=liver"])
    assert "notes.txt holds no label maps" in message
    assert "notes.txt" in refusal(run_import, project, tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full(GRID.shape, 0.5, np.float32), "not whole numbers"),
        (np.full(GRID.shape, np.nan, np.float32), "NaN"),
        (np.full(GRID.shape, -1, np.int16), "negative"),
    ],
    ids=["fractions", "NaN", "negative"],
)
def test_an_image_that_is_no_label_map_is_refused_as_one(project, folders, array, reason):
    write_image(folders[0] / "a.nii.gz", intensities())
    write_image(folders[1] / "a.nii.gz", array)
    assert reason in refusal(run_import, project, *folders, ["1=liver"])


# Mappings


def test_every_form_of_a_mapping_says_the_same(tmp_path):
    expected = {"1": "liver", "4": "lung", "5": "lung", "3": ""}
    table = [("1", "liver"), ("4+5", "lung"), ("3", ""), ("0", "background")]
    (tmp_path / "map.json").write_text(json.dumps(dict(table)), encoding="utf-8")
    for name, rows in {"bare.csv": table, "headed.csv": [("label", "structure_name"), *table]}.items():
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows(rows)
    assert parse_mapping(["1=liver", "4+5=lung", "3="]) == expected
    assert parse_mapping(["1=liver,4+5=lung", " 3 = "]) == expected
    for name in ("map.json", "bare.csv", "headed.csv"):
        assert parse_mapping([str(tmp_path / name)]) == expected
    assert parse_mapping([str(tmp_path / "map.json"), "9=spleen"]) == expected | {"9": "spleen"}


def test_a_table_of_segment_names_needs_no_header(tmp_path):
    (tmp_path / "map.csv").write_text("Liver,liver\nSpleen,spleen\n")
    assert parse_mapping([str(tmp_path / "map.csv")]) == {"Liver": "liver", "Spleen": "spleen"}


def test_a_json_table_that_names_a_label_twice_is_refused(tmp_path):
    (tmp_path / "map.json").write_text('{"1": "liver", "1": "spleen"}')
    assert "label 1 twice" in refusal(parse_mapping, [str(tmp_path / "map.json")])


names = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)


@given(mapping=st.dictionaries(st.integers(1, 9999), names, min_size=1, max_size=8), data=st.data())
def test_a_mapping_is_read_back_from_text_whatever_the_order_of_its_entries(mapping, data):
    joined = {name: sorted(v for v, n in mapping.items() if n == name) for name in mapping.values()}
    entries = [f"{'+'.join(map(str, values))}={name}" for name, values in joined.items()]
    shuffled = data.draw(st.permutations(entries))
    expected = {str(value): name for value, name in mapping.items()}
    assert parse_mapping(shuffled) == expected
    assert parse_mapping([",".join(shuffled)]) == expected


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        (["1=liver", "2=liver"], '"liver" twice'),
        (["1=liver", "1=spleen"], "label 1 twice"),
        (["1+1=liver"], "label 1 twice"),
        (["liver"], '"liver" is no mapping'),
        (["=liver"], '"=liver" is no mapping'),
        (["missing.csv"], "missing.csv"),
        (["0+1=liver"], "0 is always background"),
    ],
)
def test_a_mapping_that_is_unclear_is_refused(entries, named):
    assert named in refusal(parse_mapping, entries)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "1"], ids=["damaged", "list", "number"])
def test_a_json_file_that_is_no_table_is_refused_as_mapping(tmp_path, content):
    (tmp_path / "map.json").write_text(content)
    assert "map.json" in refusal(parse_mapping, [str(tmp_path / "map.json")])


# Real files


def test_three_files_of_partial_labels_come_together_in_one_dicom_case(shared_folder, tmp_path):
    source = shared_folder("odd/dicom_dcmqi")
    project = new_project(tmp_path / "project", ["spine", "liver", "heart"])
    for name, value in {"liver": 1, "heart": 3, "spine": 2}.items():
        report = run_import(project, source / "ct-3slice", source / f"{name}_seg.nrrd", [f"{value}={name}"])
        assert len(report.annotated) == len(statuses(project, "ct-3slice"))
    assert set(states(project, "ct-3slice").values()) == {State.ANNOTATED}
    for name in ("liver", "heart", "spine"):
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(source / f"{name}_seg.nrrd"))) > 0
        assert np.array_equal(voxels(project, "ct-3slice", name), truth)
    array = project.case("ct-3slice").read_volume().array
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(source / "ct-3slice")))
    assert np.array_equal(array, sitk.GetArrayFromImage(reader.Execute()))


def test_a_real_label_on_another_grid_is_refused_and_comes_in_with_resampling(shared_folder, tmp_path, snapshot):
    source = shared_folder("odd/dicom_dcmqi")
    project = new_project(tmp_path / "project", ["liver"])
    label = sitk.ReadImage(str(source / "liver_seg.nrrd"))
    label = sitk.Resample(
        label, [256, 256, 3], sitk.Transform(), sitk.sitkNearestNeighbor, label.GetOrigin(),
        [2 * label.GetSpacing()[0], 2 * label.GetSpacing()[1], label.GetSpacing()[2]],
    )  # fmt: skip
    sitk.WriteImage(label, str(tmp_path / "label.nrrd"))
    before = snapshot(project.folder)
    message = refusal(run_import, project, source / "ct-3slice", tmp_path / "label.nrrd", ["1=liver"])
    assert "256×256×3 voxels" in message and "512×512×3 voxels" in message
    assert snapshot(project.folder) == before
    run_import(project, source / "ct-3slice", tmp_path / "label.nrrd", ["1=liver"], resample=True)
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(source / "liver_seg.nrrd"))) > 0
    found = voxels(project, "ct-3slice", "liver")
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.97


def test_a_real_dicom_series_comes_in_whole(shared_folder, tmp_path):
    project = new_project(tmp_path / "project")
    run_import(project, shared_folder("odd/dicom_torchio"))
    volume = project.case("dicom_torchio").read_volume()
    assert volume.grid.size == (88, 128, 17)
    assert np.allclose(volume.grid.spacing, 2) and np.allclose(volume.grid.origin, (82.1807, 122.163, -24.707))


def test_real_oblique_labels_come_in_where_they_are(shared_folder, tmp_path):
    source = shared_folder("odd/oblique")
    project = new_project(tmp_path / "project", ["edema", "core"])
    run_import(project, source / "FLAIR.nrrd", source / "lesion.nii.gz", ["2=edema", "1+3=core"])
    truth = sitk.ReadImage(str(source / "lesion.nii.gz"))
    array = sitk.GetArrayFromImage(truth)
    assert np.array_equal(voxels(project, "FLAIR", "edema"), array == 2)
    assert np.array_equal(voxels(project, "FLAIR", "core"), (array == 1) | (array == 3))
    stored = sitk.ReadImage(str(project.case("FLAIR").segmentation_path))
    for corner in ((0, 0, 0), (123, 159, 139)):
        assert np.allclose(
            stored.TransformIndexToPhysicalPoint(corner), truth.TransformIndexToPhysicalPoint(corner), atol=0.02
        )


@pytest.mark.parametrize("name", ["Segmentation", "SegmentationOverlapping"])
def test_real_segmentations_of_slicer_come_in_with_names_and_overlaps(shared_folder, tmp_path, name):
    source = shared_folder("odd/segnrrd")
    project = new_project(tmp_path / "project", ["lungs", "ribs"])
    mapping = ["right lung+left lung=lungs", "ribs=ribs"]
    run_import(project, source / "CTChest4.nrrd", source / f"{name}.seg.nrrd", mapping)
    original = read_segmentation(source / f"{name}.seg.nrrd")
    masks = {s.name: original.mask(s) for s in original.segments}
    assert states(project, "CTChest4") == {"lungs": State.ANNOTATED, "ribs": State.ANNOTATED}
    assert np.array_equal(voxels(project, "CTChest4", "lungs"), masks["right lung"] | masks["left lung"])
    others = set(masks) - {"right lung", "left lung"}
    assert all(np.array_equal(voxels(project, "CTChest4", other), masks[other]) for other in others)
    assert set(statuses(project, "CTChest4")) == others | {"lungs"}


def test_real_mouse_brains_come_in_by_their_own_table(shared_folder, tmp_path):
    source = shared_folder("mouse_brain")
    with open(source / "structures.csv", newline="", encoding="utf-8") as file:
        table = {int(row["label"]): row["structure_name"] for row in csv.DictReader(file) if row["label"] != "0"}
    project = new_project(tmp_path / "project", table.values())
    name = "tg4510_tp3_1_20130520_WT"
    run_import(
        project,
        source / "images" / f"{name}.nii.gz",
        source / "labels" / f"{name}.nii.gz",
        [str(source / "structures.csv")],
    )
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(source / "labels" / f"{name}.nii.gz")))
    segmentation = project.case(name).read_segmentation()
    found = {s.name: int(segmentation.mask(s).sum()) for s in segmentation.segments}
    assert found == {structure: int((labels == value).sum()) for value, structure in table.items()}
    absent = {name for name, state in states(project, name).items() if state is State.ABSENT}
    assert absent == {table[22], table[30], table[37]}  # values that never occur in these files


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fourD/example4d.nii.gz", "4-D"),
        ("slope/functional.nii", "4-D"),
        ("pixeltype/complex.nii.gz", "complex"),
        ("pixeltype/example_nifti2.nii.gz", "cannot be read"),
    ],
)
def test_real_files_that_are_no_volumes_are_refused(shared_folder, tmp_path, snapshot, name, reason):
    project = new_project(tmp_path / "project")
    before = snapshot(project.folder)
    message = refusal(run_import, project, shared_folder("odd") / name)
    assert reason in message and Path(name).name in message
    assert snapshot(project.folder) == before
