"""Projects, cases and model cards: what the files hold, and that neither damage, a full disk nor a kill loses one."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegLib.domain.case import Case, CaseInfo, State
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import staging_folder, write_json
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.model import ModelCard, ModelVersion, NetworkSpec, Preprocessing, file_sha256
from PresenceSegLib.domain.project import PresenceMatrix, Project, check_case_name
from PresenceSegLib.domain.segmentation import Segment, Segmentation, Status, read_segmentation, write_segmentation
from PresenceSegLib.domain.structure import Structure, StructureSet
from PresenceSegLib.domain.volume import Volume, write_volume

STRUCTURES = StructureSet([Structure("liver", (0.5, 0.25, 1.0)), Structure("Größe", (0.0, 1.0, 0.0))])
GRID = Grid((5, 4, 3), (0.7, 1.5, 3.0), (-31.5, 12.25, 400.0), (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
VOLUME = Volume(np.arange(60, dtype=np.int16).reshape(GRID.shape), GRID)
INFO = CaseInfo("scan 7.nii.gz", "subject 7", "test")
CARD = ModelCard(
    version="v1",
    structures=STRUCTURES,
    network=NetworkSpec("unet", (8, 16), ((1, 2, 2), (2, 2, 2)), "axial"),
    preprocessing=Preprocessing((None, 1.5, 1.5), {"kind": "ct", "low": -100.0}, (32, 64, 64)),
    activation="softmax",
    label_layers=(("liver",), ("Größe",)),
    parent="v0",
    created="2024-05-06T07:08:09+00:00",
    settings={"iterations": 5},
    cases={"case 1": ["liver"]},
    scores={"liver": {"dice": None, "cases": 0}},
    weights_sha256="00",
)
JUNK = st.sampled_from([None, True, -1, 5, 1.5, "", "x", [], [[]], [5], ["x", 5], {}, {"name": 5}, [None]])


def box(*slices):
    mask = np.zeros(GRID.shape, bool)
    mask[slices] = True
    return mask


def segmentation_with(*entries):
    """A segmentation of (name, mask, status)."""
    segmentation = Segmentation.empty(GRID)
    for name, mask, status in entries:
        structure = STRUCTURES.named(name) if name in STRUCTURES else Structure(name, (1.0, 0.0, 0.0))
        segmentation.put(structure, mask, status)
    return segmentation


@pytest.fixture
def project(tmp_path):
    """A project with one case: liver annotated, and a segment that is no structure of the project."""
    project = Project.create(tmp_path / "abdomen", "Abdomen β", STRUCTURES)
    entries = [("liver", box(0), Status.COMPLETED), ("vessel", box(1), Status.FLAGGED)]
    project.add_case("case 1", VOLUME, segmentation_with(*entries), INFO)
    return project


def damaged(data, draw):
    """A copy of JSON data in which one value, at any depth, is replaced or missing."""
    data = copy.deepcopy(data)
    inside = data
    while True:
        key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if isinstance(inside[key], (dict, list)) and inside[key] and draw(st.booleans()):
            inside = inside[key]
        elif draw(st.booleans()):
            inside[key] = draw(JUNK)
            return data
        else:
            del inside[key]
            return data


# --- projects ---


def test_an_opened_project_is_the_one_that_was_made(tmp_path):
    made = Project.create(tmp_path / "new" / "abdomen", "Abdomen β", STRUCTURES)
    assert Project.open(tmp_path / "new" / "abdomen") == made
    assert made.cases() == [] and made.models() == [] and made.presence_matrix().presence.shape == (0, 2)
    data = json.loads((made.folder / "project.json").read_text(encoding="utf-8"))
    assert data["format"] == 1
    assert [s["name"] for s in data["structures"]] == ["liver", "Größe"]
    assert [p.name for p in made.folder.iterdir()] == ["project.json"]


def test_a_project_is_made_only_where_there_is_nothing(tmp_path, snapshot):
    (tmp_path / "empty").mkdir()
    Project.create(tmp_path / "empty", "a", STRUCTURES)
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    for taken in (tmp_path, tmp_path / "empty", tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(InputError):
            Project.create(taken, "b", STRUCTURES)
    assert snapshot(tmp_path) == before


def test_what_is_no_project_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no project"):
        Project.open(tmp_path)
    with pytest.raises(InputError, match="no project at"):
        Project.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot be read"),
        ('{"format": 1, "name": "a", "struct', "cannot be read"),
        ("[]", "does not hold a JSON object"),
        ("null", "does not hold a JSON object"),
        ("{}", "no format number"),
        ('{"format": "1"}', "no format number"),
        ('{"format": 1}', "'structures' is missing"),
        ('{"format": 1, "structures": [{"name": "a", "color": [0, 0, 0]}]}', "'name' is missing"),
        ('{"format": 1, "name": "a", "structures": [5]}', "damaged"),
        ('{"format": 2, "new": true}', "newer PresenceSeg .*format 2, this one reads up to 1"),
    ],
)
def test_a_damaged_or_newer_project_is_refused(project, text, complaint):
    path = project.folder / "project.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=complaint) as caught:
        Project.open(project.folder)
    assert str(path) in str(caught.value)


def test_a_project_file_in_another_encoding_is_refused(project):
    (project.folder / "project.json").write_bytes('{"format": 1, "name": "Größe"}'.encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        Project.open(project.folder)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_damage_to_project_or_card_is_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    project = {"format": 1, "name": "a", "structures": STRUCTURES.to_json(), "active_version": "v1"}
    write_json(folder / "project.json", damaged(project, data.draw))
    write_json(folder / "model.json", damaged(CARD.to_json(), data.draw))
    for read in (lambda: Project.open(folder), ModelVersion(folder).read_card):
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error)


# --- cases ---


def test_a_case_is_plain_files_with_the_statuses_in_the_segmentation_alone(project):
    folder = project.folder / "cases" / "case 1"
    assert sorted(p.name for p in folder.iterdir()) == ["case.json", "segmentation.seg.nrrd", "volume.nrrd"]
    assert "completed" not in (folder / "case.json").read_text(encoding="utf-8").casefold()
    assert read_segmentation(folder / "segmentation.seg.nrrd").named("liver").status is Status.COMPLETED
    assert sorted(p.name for p in project.folder.iterdir()) == ["cases", "project.json"]


def test_a_case_gives_back_volume_segmentation_and_info(project):
    case = project.case("case 1")
    np.testing.assert_array_equal(case.read_volume().array, VOLUME.array)
    assert case.read_grid().same_as(GRID) and case.read_segmentation().grid.same_as(GRID)
    assert replace(case.info, created="") == INFO
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(case.info.created)).total_seconds()) < 60
    assert [(s.name, s.status) for s in case.read_segmentation().segments] == [
        ("liver", Status.COMPLETED),
        ("vessel", Status.FLAGGED),
    ]


def test_saving_a_case_keeps_segments_that_the_project_does_not_know(project):
    case = project.case("case 1")
    segmentation = case.read_segmentation()
    foreign = Segment("theirs", "their ID", 0, 1, (0.5, 0.5, 0.5), Status.IN_PROGRESS, "", {"tag": "ü\n"})
    segmentation.add(foreign, box(2, 1))
    segmentation.put(STRUCTURES.named("Größe"), box(slice(None)), Status.COMPLETED)
    case.write_segmentation(segmentation)
    again = case.read_segmentation()
    assert [s.name for s in again.segments] == ["liver", "vessel", "theirs", "Größe"]
    for name, mask in (("liver", box(0)), ("vessel", box(1)), ("theirs", box(2, 1)), ("Größe", box(slice(None)))):
        np.testing.assert_array_equal(again.mask(again.named(name)), mask)
    assert again.named("theirs").tags == {"tag": "ü\n"}


def test_a_case_name_is_used_once(project, snapshot):
    before = snapshot(project.folder)
    with pytest.raises(InputError, match="exists already"):
        project.add_case("case 1", VOLUME, Segmentation.empty(GRID), CaseInfo("other", "other"))
    assert snapshot(project.folder) == before


@pytest.mark.parametrize("name", ["a", "case 1", "Fall_ä-3.2, (b)+", "001", "console", "x" * 100])
def test_names_that_can_be_folders_everywhere_are_case_names(name):
    check_case_name(name)


@pytest.mark.parametrize(
    "name", ["", " a", "a ", ".", "..", ".hidden", "a.", "a/b", "a\\b", "a:b", "a\n", "a*", "CON", "nul.x", "Com1"]
)
def test_other_names_are_refused_before_anything_is_written(project, snapshot, name):
    before = snapshot(project.folder)
    with pytest.raises(InputError, match="cannot be a case name"):
        project.add_case(name, VOLUME, Segmentation.empty(GRID), INFO)
    assert snapshot(project.folder) == before


def test_cases_are_listed_in_natural_order_without_unfinished_ones(project):
    for name in ("case 10", "case 2", "b"):
        project.add_case(name, VOLUME, Segmentation.empty(GRID), INFO)
    (project.folder / "cases" / ".partial-12345678").mkdir()
    (project.folder / "cases" / "notes.txt").write_text("mine")
    assert [case.name for case in project.cases()] == ["b", "case 1", "case 2", "case 10"]
    with pytest.raises(InputError, match='no case "case 3"'):
        project.case("case 3")


def test_a_case_file_may_lack_keys_or_hold_unknown_ones_but_no_unknown_split(project):
    path = project.folder / "cases" / "case 1" / "case.json"
    path.write_text('{"split": "train", "scanner": "x"}', encoding="utf-8")
    assert project.case("case 1").info == CaseInfo("", "case 1", "train")
    for text in ('{"split": "maybe"}', '{"split": []}', "", "[]", '{"split"'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError):
            _ = project.case("case 1").info
    path.unlink()
    with pytest.raises(InputError, match="no case file"):
        _ = project.case("case 1").info


@pytest.mark.parametrize("lost", ["volume.nrrd", "segmentation.seg.nrrd"])
def test_a_case_without_one_of_its_files_is_refused_when_that_file_is_read(project, lost):
    case = project.case("case 1")
    (case.folder / lost).unlink()
    reads = (
        (case.read_volume, case.read_grid)
        if lost == "volume.nrrd"
        else (
            case.read_segmentation,
            lambda: case.presence(project.structures),
        )
    )
    for read in reads:
        with pytest.raises(InputError, match=lost):
            read()


# --- presence ---


@given(
    st.lists(st.sampled_from([None, *Status]), min_size=4, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4)
)
@settings(deadline=None, max_examples=40)
def test_presence_and_state_follow_from_status_and_voxels(tmp_path_factory, statuses, filled):
    structures = StructureSet.from_names(["a", "b", "c", "d"])
    case = Case(tmp_path_factory.mktemp("case"))
    segmentation = Segmentation.empty(GRID)
    for n in (2, 0, 3, 1):  # the order of segments must not matter
        if statuses[n] is not None:
            segmentation.put(structures[n], box(slice(None), n) if filled[n] else box(0, 0, 0) & False, statuses[n])
    case.write(VOLUME, segmentation, INFO)
    assert case.presence(structures).tolist() == [status is Status.COMPLETED for status in statuses]
    words = {None: "untouched", Status.NOT_STARTED: "predicted only", Status.IN_PROGRESS: "in progress"}
    words |= {Status.FLAGGED: "flagged", Status.COMPLETED: "annotated"}
    expected = [
        "confirmed absent" if status is Status.COMPLETED and not voxels else words[status]
        for status, voxels in zip(statuses, filled, strict=True)
    ]
    assert [state.value for state in case.states(structures)] == expected


def test_the_presence_matrix_has_a_row_per_case_and_a_column_per_structure(project):
    entries = [("Größe", box(0) & False, Status.COMPLETED), ("liver", box(1), Status.NOT_STARTED)]
    project.add_case("case 10", VOLUME, segmentation_with(*entries), INFO)
    project.add_case("case 2", VOLUME, segmentation_with(("Größe", box(0), Status.COMPLETED)), INFO)
    matrix = project.presence_matrix()
    assert matrix == PresenceMatrix(
        ("case 1", "case 2", "case 10"),
        ("liver", "Größe"),
        (
            (State.ANNOTATED, State.UNTOUCHED),
            (State.UNTOUCHED, State.ANNOTATED),
            (State.PREDICTED, State.ABSENT),
        ),
    )
    assert matrix.presence.tolist() == [[True, False], [False, True], [False, True]]
    assert matrix.count("Größe", State.ANNOTATED) == 1
    assert matrix.count("liver", State.UNTOUCHED) == 1
    assert matrix.count("liver", State.FLAGGED) == 0


def test_two_segments_of_one_structure_are_refused_not_guessed(project):
    segmentation = project.case("case 1").read_segmentation()
    segmentation.segments[1].name = "liver"
    project.case("case 1").write_segmentation(segmentation)
    with pytest.raises(InputError, match='2 segments are named "liver"'):
        project.presence_matrix()


# --- model versions ---


def add_model(project, name):
    folder = project.folder / "models" / name
    folder.mkdir(parents=True)
    ModelVersion(folder).write_card(replace(CARD, version=name))
    return ModelVersion(folder)


def test_a_card_is_read_as_it_was_written(tmp_path):
    ModelVersion(tmp_path).write_card(CARD)
    assert ModelVersion(tmp_path).read_card() == CARD


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "newer PresenceSeg .*format 2, this one reads up to 1"),
        ({"format": None}, "no format number"),
        ({"structures": []}, "at least one structure"),
        ({"network": None}, "damaged"),
        ({"network": []}, "damaged"),
        ({"preprocessing": {}}, "damaged"),
        ({"label_layers": [["liver"]]}, "label layers are not its structures"),
        ({"label_layers": [["liver", "Größe", "liver"]]}, "label layers are not its structures"),
        ({"label_layers": [["liver", 5]]}, "label layers are not its structures"),
        ({"label_layers": 5}, "damaged"),
    ],
)
def test_a_newer_or_damaged_card_is_refused(tmp_path, change, complaint):
    version = ModelVersion(tmp_path)
    write_json(version.card_path, CARD.to_json() | change)
    with pytest.raises(InputError, match=complaint):
        version.read_card()


@pytest.mark.parametrize("key", sorted(set(CARD.to_json()) - {"format"}))
def test_a_card_without_one_of_its_entries_is_refused(tmp_path, key):
    data = CARD.to_json()
    del data[key]
    write_json(tmp_path / "model.json", data)
    with pytest.raises(InputError, match=f"damaged .*{key}"):
        ModelVersion(tmp_path).read_card()


def test_only_the_weights_that_the_card_was_written_with_are_accepted(tmp_path):
    version = ModelVersion(tmp_path)
    with pytest.raises(InputError, match="no weights at"):
        version.check_weights(CARD)
    version.weights_path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(version.weights_path) == digest
    version.check_weights(replace(CARD, weights_sha256=digest))
    version.weights_path.write_bytes(b"abd")
    with pytest.raises(InputError, match="do not match their card"):
        version.check_weights(replace(CARD, weights_sha256=digest))


def test_versions_are_listed_oldest_first_and_one_can_be_activated(project):
    with pytest.raises(InputError, match="no active model version"):
        project.model()
    for name in ("v10", "v2", "v1"):
        add_model(project, name)
    (project.folder / "models" / ".partial-12345678").mkdir()
    assert [m.name for m in project.models()] == ["v1", "v2", "v10"]
    active = project.activate("v2")
    assert Project.open(project.folder) == active
    assert active.model().name == "v2" and active.model("v10").read_card().version == "v10"
    with pytest.raises(InputError, match='no model version "v3"; it has: v1, v2, v10'):
        active.activate("v3")
    assert Project.open(project.folder).active_version == "v2"


def test_a_new_version_gets_a_name_that_no_model_and_no_training_has(project):
    assert project.next_version() == "v1"
    add_model(project, "v9")
    add_model(project, "imported from elsewhere 50")
    assert project.next_version() == "v10"
    (project.training_folder / "v10").mkdir(parents=True)
    assert project.next_version() == "v11"
    assert [f.name for f in project.unfinished_trainings()] == ["v10"]


# --- faults ---


def test_a_block_that_fails_leaves_no_staging_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), staging_folder(tmp_path) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_and_a_folder_in_the_way_are_refused(tmp_path, snapshot):
    (tmp_path / "a.nrrd").mkdir()
    (tmp_path / "a.seg.nrrd").mkdir()
    (tmp_path / "a.json").mkdir()
    before = snapshot(tmp_path)
    segmentation = Segmentation.empty(GRID)
    for folder, name in ((tmp_path, "a"), (tmp_path / "nowhere", "b")):
        for write in (
            lambda path: write_volume(path.with_suffix(".nrrd"), VOLUME),
            lambda path: write_segmentation(path.with_suffix(".seg.nrrd"), segmentation),
            lambda path: write_json(path.with_suffix(".json"), {}),
        ):
            with pytest.raises(InputError, match="cannot be written"):
                write(folder / name)
    assert snapshot(tmp_path) == before


def test_data_that_is_no_json_leaves_the_old_file(tmp_path, snapshot):
    write_json(tmp_path / "a.json", {"a": 1})
    before = snapshot(tmp_path)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert snapshot(tmp_path) == before


# Runs where the disk is full or read-only: tries every way of writing and prints, as JSON, for each how it ended and
# whether the folder was left as it was.
WRITE_EVERYTHING = """
import json, sys
from pathlib import Path
import numpy as np
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import write_json
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.project import CaseInfo, Project
from PresenceSegLib.domain.segmentation import Segment, Segmentation, write_segmentation
from PresenceSegLib.domain.volume import Volume, write_volume

folder = Path(sys.argv[1])
project = Project.open(folder)
case = project.cases()[0]
grid = Grid((128, 64, 64), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
noise = np.random.default_rng(0).integers(0, 60000, grid.shape).astype(np.uint16)
volume = Volume(noise, grid)
segmentation = Segmentation(noise[None], grid, [Segment("liver", "a", 0, 1, (1, 0, 0))])
info = CaseInfo("a", "a")
new = folder / "new"
writes = {
    "volume over the old one": lambda: write_volume(case.volume_path, volume),
    "new volume, nrrd": lambda: write_volume(folder / "new.nrrd", volume),
    "new volume, nifti": lambda: write_volume(folder / "new.nii.gz", volume),
    "new volume, plain nifti": lambda: write_volume(folder / "new.nii", volume),
    "new volume, mha": lambda: write_volume(folder / "new.mha", volume),
    "segmentation over the old one": lambda: case.write_segmentation(segmentation),
    "new segmentation": lambda: write_segmentation(folder / "new.seg.nrrd", segmentation),
    "json over the old one": lambda: write_json(folder / "project.json", noise[:16].tolist()),
    "new json": lambda: write_json(folder / "new.json", noise[:16].tolist()),
    "new case": lambda: project.add_case("new", volume, segmentation, info),
}

def content():
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}

result = {}
for name, write in writes.items():
    before = content()
    try:
        write()
        ending = ["written", ""]
    except InputError as error:
        ending = ["refused", str(error)]
    except BaseException as error:
        ending = ["escaped", repr(error)]
    result[name] = [*ending, content() == before]
try:
    write_json(folder / "small.json", {})
    result["small"] = ["written", "", True]
except InputError as error:
    result["small"] = ["refused", str(error), True]
print(json.dumps(result))
"""
WRITES = [
    "volume over the old one",
    "new volume, nrrd",
    "new volume, nifti",
    "new volume, plain nifti",
    "new volume, mha",
    "segmentation over the old one",
    "new segmentation",
    "json over the old one",
    "new json",
    "new case",
]
# $1 is the project, $2 an empty folder; what they leave in $2 is the project on a disk of the kind.
DISKS = {
    "full": 'mount -t tmpfs -o size=256k none "$2" && cp -r "$1/." "$2"',
    "limited": 'cp -r "$1/." "$2" && ulimit -f 128',
    "read-only": 'mount --bind "$1" "$2" && mount -o remount,bind,ro "$2"',
}


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Function from a kind of disk to what WRITE_EVERYTHING prints there; skips where no such disk can be made."""
    known = {}

    def run(kind):
        if kind not in known:
            known[kind] = write_everything(kind, tmp_path_factory.mktemp(kind))
        if known[kind] is None:
            pytest.skip(f"cannot make a {kind} disk here: needs Linux and the right to mount (unshare --mount)")
        return known[kind]

    return run


def write_everything(kind, folder):
    project = Project.create(folder / "project", "a", STRUCTURES)
    project.add_case("case 1", VOLUME, segmentation_with(("liver", box(0), Status.COMPLETED)), INFO)
    (folder / "disk").mkdir()
    shell = ["sh", "-c"] if kind == "limited" else ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if os.name == "nt" or shutil.which(shell[0]) is None:
        return None
    marker = "the disk is ready"
    script = f'{DISKS[kind]} && echo {marker} >&2 && exec "$3" -c "$4" "$2"'
    arguments = [str(project.folder), str(folder / "disk"), sys.executable, WRITE_EVERYTHING]
    done = subprocess.run([*shell, script, "sh", *arguments], capture_output=True, text=True, env=environment())
    if marker not in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def environment():
    """The environment of a Python process that finds the project's packages."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root / "PresenceSeg"), str(root / "PresenceSegTraining")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", DISKS)
def test_a_write_that_the_disk_refuses_changes_nothing_and_says_so(on_disk, kind, write):
    ending, message, unchanged = on_disk(kind)[write]
    assert ending == "refused", message
    assert unchanged
    assert "cannot be " in message
    assert "\n" not in message and "0x" not in message
    if kind == "read-only":
        assert "Read-only" in message


@pytest.mark.parametrize("kind", DISKS)
def test_the_disk_is_as_free_as_before_when_a_write_was_refused(on_disk, kind):
    assert on_disk(kind)["small"][0] == ("refused" if kind == "read-only" else "written")


# Stops for good when a file is about to be moved into place for the n-th time.
STOP_AT_MOVE = """
import os, sys, time
import numpy as np
from pathlib import Path
from PresenceSegLib.domain.project import CaseInfo, Project
from PresenceSegLib.domain.segmentation import Status

project, action, stop_at = Project.open(sys.argv[1]), sys.argv[2], int(sys.argv[3])
really_replace, moves = os.replace, []

def replace(source, target):
    moves.append(target)
    if len(moves) == stop_at:
        print("stopped", flush=True)
        time.sleep(600)
    really_replace(source, target)

os.replace = replace
case = project.cases()[0]
volume, segmentation = case.read_volume(), case.read_segmentation()
segmentation.put(project.structures[1], volume.array > 30, Status.COMPLETED)
if action == "add":
    project.add_case("case 2", volume, segmentation, CaseInfo("b", "b"))
elif action == "segmentation":
    case.write_segmentation(segmentation)
else:
    project.activate("v1")
"""


def kill_at_move(project, action, number):
    command = [sys.executable, "-c", STOP_AT_MOVE, str(project.folder), action, str(number)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout.readline().strip() == "stopped"
    finally:
        process.kill()
        process.communicate()
    if os.name != "nt":
        assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("action", "number"),
    [("add", 1), ("add", 2), ("add", 3), ("add", 4), ("segmentation", 1), ("activate", 1)],
)
def test_a_process_killed_while_it_writes_loses_nothing(project, snapshot, action, number):
    add_model(project, "v1")
    before = snapshot(project.folder)
    kill_at_move(project, action, number)
    after = snapshot(project.folder)
    assert {name: after.get(name) for name in before} == before
    added = [name for name in after if name not in before]
    assert added and all(".partial-" in name for name in added if name != "cases")

    opened = Project.open(project.folder)
    assert opened == project
    assert [c.name for c in opened.cases()] == ["case 1"]
    assert opened.presence_matrix().states == ((State.ANNOTATED, State.UNTOUCHED),)
    # The work can be done again in spite of what was left.
    case = opened.cases()[0]
    opened.add_case("case 2", case.read_volume(), case.read_segmentation(), CaseInfo("b", "b"))
    case.write_segmentation(segmentation_with(("Größe", box(0), Status.COMPLETED)))
    opened.activate("v1")
    assert [c.name for c in Project.open(project.folder).cases()] == ["case 1", "case 2"]
    assert case.presence(STRUCTURES).tolist() == [False, True]
