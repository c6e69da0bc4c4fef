"""The command line `presenceseg`: what each command does, says, writes and refuses, with its exit codes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import slicerio

from PresenceSegTrainingLib.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
PROGRAM = [sys.executable, "-m", "PresenceSegTrainingLib.cli.main"]
# Tilted by 12 degrees and with one axis reversed, so that nothing works by luck on upright volumes only.
COS, SIN = float(np.cos(np.radians(12))), float(np.sin(np.radians(12)))
GRID = SimpleNamespace(
    spacing=(5.0, 5.0, 5.5), origin=(-40.0, 25.0, 130.0), direction=(1.0, 0.0, 0.0, 0.0, -COS, SIN, 0.0, SIN, COS)
)
SHAPE = (20, 24, 22)

OPTIONS = {
    "new": {"--name", "--structures", "--structures-from"},
    "import": {
        "--images",
        "--labels",
        "--map",
        "--annotated",
        "--absent",
        "--image-suffix",
        "--label-suffix",
        "--subject-pattern",
        "--split",
        "--unlabelled",
        "--resample-labels",
    },
    "info": set(),
    "train": {
        "--resume",
        "--no-activate",
        "--device",
        "--iterations",
        "--minutes",
        "--from",
        "--network",
        "--plane",
        "--intensity",
        "--voxel",
        "--no-mirror",
        "--patch",
        "--presence-mask",
        "--loss",
        "--batch",
        "--learning-rate",
        "--validation-fraction",
        "--seed",
    },
    "segment": {"--project", "--model", "--version", "--out", "--overwrite", "--device"},
    "evaluate": {"--version", "--model", "--split", "--device"},
    "demo": {"--out", "--minutes", "--iterations", "--seed", "--device"},
}


# Making things, without any code of the product that writes


def write_image(path, array, grid=GRID):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, sitk.Image) else sitk.GetImageFromArray(array)
    if image.GetDimension() == 3:
        image.SetSpacing(grid.spacing)
        image.SetOrigin(grid.origin)
        image.SetDirection(grid.direction)
    sitk.WriteImage(image, str(path))
    return path


def blobs(seed, shape=SHAPE):
    """A smooth random volume, and labels of what is bright (1) and gray (2) in it."""
    field = np.random.default_rng(seed).normal(size=(4, 5, 5))
    for axis, size in enumerate(shape):
        at = np.linspace(0, field.shape[axis] - 1, size)
        field = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, field)
    middle, high = np.quantile(field, (0.5, 0.8))
    labels = np.select([field > high, field > middle], [1, 2], 0).astype(np.uint8)
    return (1000 + 300 * field).astype(np.float32), labels


def with_slope(path, slope=0.5, intercept=100.0):
    """Give an uncompressed NIfTI-1 file a slope and an intercept (scl_slope and scl_inter of its header)."""
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(content)
    return path


def metadata(path):
    image = sitk.ReadImage(str(path))
    return {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}


# Running commands


def run(capsys, *arguments):
    """Run a command in this process; returns its exit code, what it printed and its messages on stderr."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def run_ok(capsys, *arguments):
    done = run(capsys, *arguments)
    assert done.code == 0, done.err
    return done.out


def result(capsys, *arguments):
    """The last JSON line of a command that succeeds."""
    lines = json_lines(run_ok(capsys, *arguments, "--json"))
    assert lines[-1]["type"] == "result"
    return lines[-1]


def json_lines(text):
    """The JSON objects of a command's output; strict: NaN and infinity are no JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def refusal(capsys, *arguments):
    """The one sentence, in a line of its own, with which a command refuses."""
    done = run(capsys, *arguments)
    assert done.code == 2, (done.code, done.out, done.err)
    return the_message(done.err)


def the_message(err):
    assert "Traceback" not in err
    said = [line for line in err.split("\n") if line.strip() and not is_bar(line)]
    assert len(said) == 1, said
    assert said[0].startswith("presenceseg: ") and said[0].endswith("."), said
    return said[0].removeprefix("presenceseg: ")


def is_bar(line):
    """A progress bar overwrites itself by carriage returns."""
    return re.fullmatch(r"(\r[^\r]*\d+%\|[^\r]*)+\s*", line) is not None


@pytest.fixture(scope="module")
def world(one_thread, tmp_path_factory):
    """A project with partial labels and a model version, made by the commands alone, and the images behind it."""
    folder = tmp_path_factory.mktemp("world")
    project = folder / "project"
    truth = {}
    for n, (name, source) in enumerate(
        [("a", "one"), ("b", "one"), ("c", "two"), ("d", "two"), ("t1", "test"), ("t2", "test")]
    ):
        array, truth[name] = blobs(n)
        write_image(folder / source / "images" / f"{name}.nii.gz", array)
        write_image(folder / source / "labels" / f"{name}.nii.gz", truth[name])
    assert main(["new", str(project), "--structures", "bright,gray"]) == 0
    for source, *options in (
        ("one", "--map", "1=bright", "2="),
        ("two", "--map", "2=gray", "1="),
        ("test", "--map", "1=bright", "2=gray", "--split", "test"),
    ):
        where = ["--images", str(folder / source / "images"), "--labels", str(folder / source / "labels")]
        assert main(["import", str(project), *where, *options]) == 0
    assert main(["train", str(project), "--iterations", "40", "--batch", "2", "--learning-rate", "0.01"]) == 0
    image = folder / "test" / "images" / "t1.nii.gz"
    return SimpleNamespace(folder=folder, project=project, truth=truth, image=image, model=project / "models" / "v1")


@pytest.fixture
def project(world, tmp_path):
    """A copy of that project, to change."""
    return shutil.copytree(world.project, tmp_path / "project")


# Help


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_of_a_command_names_every_option_and_explains_it(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    text = run_ok(capsys, command, "--help")
    usage, _, rest = text.partition("\n\n")
    assert set(re.findall(r"--[a-z-]+", usage)) == OPTIONS[command] | {"--json"}
    explanations = dict(re.findall(r"^  (--[a-z-]+)[^\n]*?(?:  |\n {20,})(\S[^\n]*)", rest, re.MULTILINE))
    assert set(explanations) == OPTIONS[command] | {"--json"}
    assert all(len(words.split()) >= 2 or command == "train" for words in explanations.values()), explanations
    assert rest.split("\n\n")[0].count(" ") > 5  # and says what the command is for


def test_the_help_of_the_program_lists_its_commands_in_order(capsys):
    text = run_ok(capsys, "--help")
    places = [text.index(f"\n    {command} ") for command in OPTIONS]
    assert places == sorted(places)


def test_a_command_that_does_not_exist_ends_with_exit_code_2(capsys):
    assert run(capsys, "trian").code == 2
    assert run(capsys).code == 2


def subprocess_environment():
    paths = [str(REPOSITORY / "PresenceSeg"), str(REPOSITORY / "PresenceSegTraining")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def test_the_module_runs_as_a_program_with_its_exit_codes(tmp_path):
    options = dict(capture_output=True, encoding="utf-8", env=subprocess_environment())
    made = subprocess.run([*PROGRAM, "new", tmp_path / "p", "--structures", "liver"], **options)
    assert (made.returncode, made.stderr) == (0, "")
    again = subprocess.run([*PROGRAM, "new", tmp_path / "p", "--structures", "liver"], **options)
    assert again.returncode == 2 and "exists already" in the_message(again.stderr)


def test_the_installed_command_runs():
    script = shutil.which("presenceseg", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the command presenceseg is not installed beside this Python")
    done = subprocess.run([script, "--version"], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "presenceseg", "")


def test_commands_on_projects_answer_without_loading_torch(tmp_path):
    write_image(tmp_path / "a.nii.gz", blobs(0)[0])
    program = f"""if True:
        import sys
        from PresenceSegTrainingLib.cli.main import main
        codes = [main(["new", r"{tmp_path / "p"}", "--structures", "liver"]),
                 main(["import", r"{tmp_path / "p"}", "--images", r"{tmp_path / "a.nii.gz"}"]),
                 main(["info", r"{tmp_path / "p"}"])]
        print(codes, "torch" in sys.modules)"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", env=subprocess_environment()
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0] False"


def test_names_outside_of_the_encoding_of_the_console_stop_nothing(tmp_path):
    (tmp_path / "s.csv").write_text("name\n肝臓\n", encoding="utf-8")
    options = dict(capture_output=True, env=subprocess_environment() | {"PYTHONIOENCODING": "ascii"})
    new = [*PROGRAM, "new", tmp_path / "p", "--structures-from", tmp_path / "s.csv"]
    for command in (new, [*PROGRAM, "info", tmp_path / "p"]):
        said = subprocess.run(command, **options)
        assert (said.returncode, said.stderr) == (0, b"") and b"??" in said.stdout
    said = subprocess.run([*PROGRAM, "info", tmp_path / "p", "--json"], **options)
    assert json.loads(said.stdout)["structures"] == ["肝臓"]


# JSON


def test_every_json_line_parses_and_the_last_one_is_the_result(capsys, world, tmp_path):
    image, labels = world.image, world.folder / "test" / "labels" / "t1.nii.gz"
    new, out = tmp_path / "new", tmp_path / "out"
    for arguments in (
        ["new", new, "--structures", "bright,gray"],
        ["import", new, "--images", image, "--labels", labels, "--map", "1=bright,2="],
        ["train", new, "--iterations", "1", "--batch", "1"],
        ["info", new],
        ["info", new / "models" / "v1"],
        ["segment", image, "--project", new, "--out", out],
        ["evaluate", new, "--split", "all"],
    ):  # fmt: skip
        done = run(capsys, *arguments, "--json")
        kinds = [line["type"] for line in json_lines(done.out)]
        assert (done.code, kinds[-1]) == (0, "result"), (arguments, done.err)
        assert set(kinds[:-1]) <= {"progress"}
        assert done.err == ""


def test_a_refusal_as_json_is_one_error_line_on_stdout(capsys, tmp_path):
    done = run(capsys, "info", tmp_path / "nothing", "--json")
    (line,) = json_lines(done.out)
    assert (done.code, line["type"], done.err) == (2, "error", "")
    assert str(tmp_path / "nothing") in line["message"]


def test_progress_as_json_rises_to_the_end(capsys, world, tmp_path):
    out = run_ok(capsys, "segment", world.image, "--project", world.project, "--out", tmp_path, "--json")
    fractions = [line["fraction"] for line in json_lines(out) if line["type"] == "progress"]
    assert fractions == sorted(fractions) and fractions[-1] == 1


# new


def test_new_makes_a_project_of_the_named_structures(capsys, tmp_path):
    text = run_ok(capsys, "new", tmp_path / "thigh", "--structures", "femur, marrow ,fat")
    assert "3 structures: femur, marrow, fat" in text
    data = json.loads((tmp_path / "thigh" / "project.json").read_text(encoding="utf-8"))
    assert data["name"] == "thigh"
    assert [s["name"] for s in data["structures"]] == ["femur", "marrow", "fat"]
    assert len({tuple(s["color"]) for s in data["structures"]}) == 3


def test_new_takes_the_name_that_is_given(capsys, tmp_path):
    run_ok(capsys, "new", tmp_path / "p", "--structures", "femur", "--name", "Right thighs")
    assert json.loads((tmp_path / "p" / "project.json").read_text(encoding="utf-8"))["name"] == "Right thighs"


def structures_of(capsys, folder, source):
    run_ok(capsys, "new", folder, "--structures-from", source)
    data = json.loads((folder / "project.json").read_text(encoding="utf-8"))["structures"]
    return [(s["name"], tuple(round(c, 3) for c in s["color"]), s["terminology"]) for s in data]


TERMINOLOGY = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
    "~SCT^10200004^Liver~^^~Anatomic codes - DICOM master list~^^~^^"
)


def test_new_takes_names_colors_and_terminology_from_a_table_and_from_json(capsys, tmp_path):
    (tmp_path / "s.csv").write_text(f"name,color,terminology\nliver,#ff8000,{TERMINOLOGY}\nspleen,#0000ff,\n")
    expected = [("liver", (1.0, 0.502, 0.0), TERMINOLOGY), ("spleen", (0.0, 0.0, 1.0), "")]
    assert structures_of(capsys, tmp_path / "from csv", tmp_path / "s.csv") == expected
    assert structures_of(capsys, tmp_path / "again", tmp_path / "from csv" / "project.json") == expected
    bare = [{"name": name, "color": color, "terminology": code} for name, color, code in expected]
    (tmp_path / "s.json").write_text(json.dumps(bare))
    assert structures_of(capsys, tmp_path / "from json", tmp_path / "s.json") == expected


def test_new_takes_the_structures_of_a_model_and_of_its_segmentations(capsys, world, tmp_path):
    run_ok(capsys, "segment", world.image, "--project", world.project, "--out", tmp_path / "a.seg.nrrd")
    from_model = structures_of(capsys, tmp_path / "m", world.model / "model.json")
    assert [name for name, _, _ in from_model] == ["bright", "gray"]
    assert structures_of(capsys, tmp_path / "s", tmp_path / "a.seg.nrrd") == from_model


def test_new_takes_the_structures_of_a_real_segmentation_of_slicer(capsys, shared_folder, tmp_path):
    found = structures_of(capsys, tmp_path / "p", shared_folder("odd/segnrrd") / "Segmentation.seg.nrrd")
    assert [name for name, _, _ in found][:2] == ["ribs", "cervical vertebral column"] and len(found) == 7
    assert all("SCT^" in terminology or "SRT^" in terminology for _, _, terminology in found[:6])


def test_new_refuses_a_folder_with_something_in_it(capsys, snapshot, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert "not empty" in refusal(capsys, "new", tmp_path / "p", "--structures", "liver")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("structures", ["liver,liver", "liver,Liver", "", "liver,,spleen", "a|b"])
def test_new_refuses_structures_named_twice_or_not_at_all(capsys, tmp_path, structures):
    refusal(capsys, "new", tmp_path / "p", "--structures", structures)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.csv", "name\nliver\nliver\n"),
        ("s.csv", "structure\nliver\n"),
        ("s.csv", "name,color\nliver,orange\n"),
        ("s.csv", ""),
        ("s.json", "["),
        ("s.json", '[{"name": "liver"}]'),
        ("s.json", "3"),
        ("s.seg.nrrd", "NRRD0004"),
    ],
)
def test_new_refuses_a_file_that_lists_no_structures(capsys, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refusal(capsys, "new", tmp_path / "p", "--structures-from", tmp_path / name)
    refusal(capsys, "new", tmp_path / "p", "--structures-from", tmp_path / f"missing-{name}")
    assert not (tmp_path / "p").exists()


# import


@pytest.fixture
def source(tmp_path):
    """A new project, and a function that writes an image and its label map into the folders beside it."""
    assert main(["new", str(tmp_path / "p"), "--structures", "liver,spleen,tumor"]) == 0

    def put(name, labels, image_ending=".nii.gz", label_ending=".nii.gz"):
        write_image(tmp_path / "img" / f"{name}{image_ending}", blobs(len(name))[0])
        write_image(tmp_path / "lab" / f"{name}{label_ending}", labels)

    return SimpleNamespace(
        put=put,
        project=tmp_path / "p",
        images=tmp_path / "img",
        labels=tmp_path / "lab",
        arguments=["import", tmp_path / "p", "--images", tmp_path / "img", "--labels", tmp_path / "lab"],
    )


def states(capsys, project):
    return result(capsys, "info", project)["cases"]


def test_import_says_what_is_annotated_now(capsys, source):
    source.put("a", blobs(0)[1])
    source.put("b", (blobs(1)[1] == 1).astype(np.uint8))
    text = run_ok(capsys, *source.arguments, "--map", "1=liver", "2=spleen")
    assert "2 cases added, 0 extended, 0 skipped." in text
    assert "liver: annotated in 2\n" in text
    assert "spleen: annotated in 2, confirmed absent in 1 of them" in text


def test_import_passes_every_option_on(capsys, source):
    for name in ("ann_1", "bob_1"):
        source.put(f"{name}_0000", blobs(0)[1])
        (source.labels / f"{name}_0000.nii.gz").rename(source.labels / f"{name}_seg.nii.gz")
    write_image(source.images / "cid_1_0000.nii.gz", blobs(3)[0])
    table = source.project.parent / "map.csv"
    table.write_text("label,name\n0,nothing\n1,liver\n2,spleen\n")
    said = result(
        capsys,
        *source.arguments,
        *("--map", table, "--annotated", "liver", "--absent", "tumor", "--split", "validation"),
        *("--image-suffix", "_0000", "--label-suffix", "_seg", "--subject-pattern", "(.+)_", "--unlabelled", "skip"),
    )
    assert (said["added"], said["skipped"]) == (["ann_1", "bob_1"], ["cid_1"])
    assert (said["annotated"], said["confirmed_absent"]) == ({"liver": 2, "tumor": 2}, {"tumor": 2})
    assert states(capsys, source.project)["bob_1"] == ["annotated", "predicted only", "confirmed absent"]
    info = json.loads((source.project / "cases" / "bob_1" / "case.json").read_text(encoding="utf-8"))
    assert (info["subject"], info["split"]) == ("bob", "validation")


def test_import_says_so_when_nothing_is_annotated(capsys, source):
    source.put("a", blobs(0)[1])
    assert "No structure is annotated" in run_ok(capsys, "import", source.project, "--images", source.images)


def test_import_resamples_labels_only_when_asked_to(capsys, source, snapshot):
    source.put("a", blobs(0)[1])
    image = sitk.ReadImage(str(source.labels / "a.nii.gz"))
    sitk.WriteImage(image[2:18, 3:20, 1:15][::2, :, :], str(source.labels / "a.nii.gz"))
    arguments = [*source.arguments, "--map", "1=liver,2=spleen"]
    before = snapshot(source.project)
    message = refusal(capsys, *arguments)
    assert "8×17×14 voxels of 10×5×5.5 mm" in message and "22×24×20 voxels of 5×5×5.5 mm" in message
    assert snapshot(source.project) == before
    run_ok(capsys, *arguments, "--resample-labels")
    assert states(capsys, source.project)["a"] == ["annotated", "annotated", "untouched"]


# info


def test_info_shows_what_is_annotated_where_and_the_versions(capsys, world):
    text = run_ok(capsys, "info", world.project)
    assert '"project": 6 cases, 2 structures' in text
    lines = [line.split() for line in text.splitlines()]
    assert ["bright", "4", "0", "0", "0", "0"] in lines
    assert ["a", "●", "·"] in lines and ["c", "·", "●"] in lines and ["t1", "●", "●"] in lines
    assert any(line[:2] == ["v1", "(active)"] for line in lines)


def test_info_as_json_tells_the_same(capsys, world):
    said = result(capsys, "info", world.project)
    assert said["cases"]["a"] == ["annotated", "untouched"]
    assert said["cases"]["c"] == ["untouched", "annotated"]
    assert (said["structures"], said["active_version"], list(said["versions"])) == (["bright", "gray"], "v1", ["v1"])


def test_info_shows_the_card_of_a_model_version(capsys, world):
    text = run_ok(capsys, "info", world.model)
    assert "Model version v1 (unet, 5×5×5.5 mm)" in text
    said = result(capsys, "info", world.model)
    trained = {case: names for case, names in said["cases"].items()}
    assert set(trained) < {"a", "b", "c", "d"} and len(trained) == 3  # one of them validates
    assert all(names == (["bright"] if case in "ab" else ["gray"]) for case, names in trained.items())


def test_info_of_a_project_without_versions_says_so(capsys, tmp_path):
    run_ok(capsys, "new", tmp_path / "p", "--structures", "liver")
    assert "No model version yet." in run_ok(capsys, "info", tmp_path / "p")


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_info_refuses_a_folder_that_is_no_project(capsys, tmp_path, make):
    if make:
        (tmp_path / "p").mkdir()
    assert str(tmp_path / "p") in refusal(capsys, "info", tmp_path / "p")


# train


def test_train_reports_scores_and_activates_the_version(capsys, project):
    said = result(capsys, "train", project, "--iterations", "2", "--batch", "1")
    assert said["version"] == "v2" and Path(said["folder"]) == project / "models" / "v2"
    assert set(said["scores"]) == {"bright", "gray"} and said["scored_on"] == "validation cases"
    assert result(capsys, "info", project)["active_version"] == "v2"


def test_train_tells_its_progress_step_by_step(capsys, project):
    lines = json_lines(run_ok(capsys, "train", project, "--iterations", "3", "--batch", "1", "--json"))
    steps = [line for line in lines if line.get("task") == "train"]
    assert [s["iteration"] for s in steps] == [1, 2, 3]
    assert [round(s["fraction"], 4) for s in steps] == [0.3333, 0.6667, 1]
    assert all(s["seconds_left"] >= 0 and s["loss"] > 0 for s in steps)
    assert steps[-1]["dice"] is not None


def test_train_shows_a_bar_and_a_table_to_people(capsys, project):
    done = run(capsys, "train", project, "--iterations", "2", "--batch", "1", "--no-activate")
    assert done.code == 0
    assert re.search(r"Training: 100%\|.*loss=\d", done.err)
    assert re.search(r"^bright +[\d.-]+ +\d+$", done.out, re.MULTILINE)
    assert result(capsys, "info", project)["active_version"] == "v1"


def test_train_goes_on_from_a_parent_and_by_the_clock(capsys, project):
    run_ok(capsys, "train", project, "--from", "v1", "--minutes", "0.01", "--batch", "1")
    card = result(capsys, "info", project / "models" / "v2")
    assert card["parent"] == "v1"
    parent = result(capsys, "info", project / "models" / "v1")
    assert card["network"] == parent["network"] and card["preprocessing"] == parent["preprocessing"]


def test_train_takes_voxels_and_patch_as_left_right_front_back_up_down(capsys, project):
    run_ok(
        capsys,
        *("train", project, "--iterations", "1", "--batch", "1", "--plane", "axial", "--network", "segresnet"),
        *("--voxel", "6", "7", "8", "--patch", "16", "24", "1", "--intensity", "mr", "--presence-mask", "plus"),
        "--no-mirror",
    )
    card = result(capsys, "info", project / "models" / "v2")
    assert card["preprocessing"]["spacing"] == [None, 7, 6]
    assert card["preprocessing"]["patch"] == [1, 24, 16]
    assert (card["network"]["name"], card["network"]["plane"]) == ("segresnet", "axial")
    assert (card["settings"]["presence_mask"], card["settings"]["mirror"]) == ("plus", False)


@pytest.mark.parametrize(
    "options",
    [
        ["--iterations", "0"],
        ["--iterations", "-1"],
        ["--learning-rate", "0"],
        ["--validation-fraction", "1"],
        ["--loss", "hinge"],
        ["--from", "v9"],
        ["--device", "abacus"],
        ["--resume"],
        ["--resume", "--iterations", "5"],
        ["--from", "v1", "--network", "dynunet"],
        ["--from", "v1", "--voxel", "1", "1", "1"],
        ["--voxel", "-1", "1", "1"],
        ["--patch", "-4", "4", "4"],
        ["--batch", "-1"],
        ["--seed", "-1"],
    ],
    ids=" ".join,
)
def test_train_refuses_impossible_settings(capsys, snapshot, project, options):
    before = snapshot(project)
    refusal(capsys, "train", project, *options)
    assert snapshot(project) == before


def test_train_refuses_a_project_in_which_nothing_is_annotated(capsys, snapshot, source):
    source.put("a", blobs(0)[1])
    run_ok(capsys, "import", source.project, "--images", source.images)
    before = snapshot(source.project)
    assert "only Completed segments train" in refusal(capsys, "train", source.project)
    assert snapshot(source.project) == before


def test_train_refuses_a_damaged_case_and_leaves_nothing_to_resume(capsys, snapshot, project):
    damaged = project / "cases" / "b" / "segmentation.seg.nrrd"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    before = files(snapshot(project))
    assert "segmentation.seg.nrrd" in refusal(capsys, "train", project, "--iterations", "2", "--intensity", "mr")
    assert files(snapshot(project)) == before
    assert "no unfinished training" in refusal(capsys, "train", project, "--resume")


def files(content):
    """The files of a snapshot, without the cache of prepared cases, which may be deleted at any time."""
    return {path: data for path, data in content.items() if data is not None and "cache" not in path.split("/")}


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a single process")
def test_ctrl_c_stops_a_training_with_exit_code_130_and_resume_finishes_it(capsys, project):
    command = [*PROGRAM, "train", str(project), "--iterations", "25", "--batch", "1", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=subprocess_environment()
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(json.loads(line))
            if lines[-1].get("iteration") == 2:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, process.stderr.read()
    assert lines[-1]["type"] == "error" and "--resume" in lines[-1]["message"]
    assert not (project / "models" / "v2").exists()

    resumed = json_lines(run_ok(capsys, "train", project, "--resume", "--json"))
    stopped_at = max(line.get("iteration", 0) for line in lines)
    assert 2 <= stopped_at < 25
    assert [s["iteration"] for s in resumed if s.get("task") == "train"] == list(range(stopped_at + 1, 26))
    with open(project / "models" / "v2" / "history.csv", newline="", encoding="utf-8") as file:
        assert [int(row["iteration"]) for row in csv.DictReader(file)] == list(range(1, 26))
    assert "no unfinished training" in refusal(capsys, "train", project, "--resume")


# segment


def segment(capsys, world, *arguments):
    return run(capsys, "segment", *arguments, "--project", world.project)


def test_segment_writes_every_structure_as_not_started_on_the_volumes_own_grid(capsys, world, tmp_path):
    out = tmp_path / "new folder" / "t1.seg.nrrd"
    assert segment(capsys, world, world.image, "--out", out).code == 0
    written, volume = sitk.ReadImage(str(out)), sitk.ReadImage(str(world.image))
    assert written.GetSize() == volume.GetSize()
    for corner in ((0, 0, 0), (21, 23, 19)):
        assert np.allclose(
            written.TransformIndexToPhysicalPoint(corner), volume.TransformIndexToPhysicalPoint(corner), atol=1e-3
        )
    data = slicerio.read_segmentation(str(out))
    assert [s["name"] for s in data["segments"]] == ["bright", "gray"]
    assert [s["status"] for s in data["segments"]] == ["notstarted"] * 2
    colors = [s["color"] for s in json.loads((world.model / "model.json").read_text(encoding="utf-8"))["structures"]]
    assert np.allclose([s["color"] for s in data["segments"]], colors, atol=1e-4)


def labels_of(path):
    """Array [k, j, i] and name by value of a `.seg.nrrd` file with one layer."""
    header = metadata(path)
    count = sum(key.endswith("_Name") for key in header)
    names = {int(header[f"Segment{n}_LabelValue"]): header[f"Segment{n}_Name"] for n in range(count)}
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))), names


def dice(truth, found):
    return 2 * (truth & found).sum() / (truth.sum() + found.sum())


def test_segment_finds_what_the_partial_labels_taught(capsys, world, tmp_path):
    segment(capsys, world, world.image, "--out", tmp_path / "t1.seg.nrrd")
    array, names = labels_of(tmp_path / "t1.seg.nrrd")
    for value, name in names.items():
        truth = world.truth["t1"] == {"bright": 1, "gray": 2}[name]
        assert dice(truth, array == value) > 0.5, name


def test_segment_writes_many_results_into_a_folder_by_the_names_of_the_volumes(capsys, world, tmp_path):
    volumes = sorted((world.folder / "test" / "images").iterdir())
    done = segment(capsys, world, *volumes, "--out", tmp_path / "out", "--json")
    expected = [str(tmp_path / "out" / f"{name}.seg.nrrd") for name in ("t1", "t2")]
    assert json_lines(done.out)[-1]["segmentations"] == expected
    assert sorted(str(p) for p in (tmp_path / "out").iterdir()) == expected


def test_segment_replaces_a_result_only_with_overwrite(capsys, snapshot, world, tmp_path):
    out = tmp_path / "t1.seg.nrrd"
    out.write_bytes(b"precious")
    done = segment(capsys, world, world.image, "--out", out)
    assert done.code == 2 and "--overwrite" in the_message(done.err)
    assert snapshot(tmp_path) == {"t1.seg.nrrd": b"precious"}
    assert segment(capsys, world, world.image, "--out", out, "--overwrite").code == 0
    assert labels_of(out)[1] == {1: "bright", 2: "gray"}


def test_segment_refuses_two_volumes_of_one_name(capsys, world, tmp_path):
    first = write_image(tmp_path / "x" / "scan.nii.gz", blobs(1)[0])
    second = write_image(tmp_path / "y" / "scan.nrrd", blobs(2)[0])
    done = segment(capsys, world, first, second, "--out", tmp_path / "out")
    assert done.code == 2 and '"scan"' in the_message(done.err)
    assert not (tmp_path / "out").exists()


def test_segment_refuses_one_file_for_several_volumes(capsys, world, tmp_path):
    volumes = sorted((world.folder / "test" / "images").iterdir())
    assert segment(capsys, world, *volumes, "--out", tmp_path / "one.seg.nrrd").code == 2
    assert not list(tmp_path.iterdir())


def test_segment_refuses_to_write_another_format(capsys, world, tmp_path):
    done = segment(capsys, world, world.image, "--out", tmp_path / "labels.nii.gz")
    assert done.code == 2 and ".seg.nrrd" in the_message(done.err)
    assert not list(tmp_path.iterdir())


def test_segment_writes_nothing_when_one_of_several_volumes_is_bad(capsys, world, tmp_path):
    bad = write_image(tmp_path / "bad.nii.gz", np.zeros(SHAPE, np.int16))
    assert segment(capsys, world, world.image, bad, "--out", tmp_path / "out").code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_segment_names_the_result_like_the_link_it_was_given(capsys, world, tmp_path):
    (tmp_path / "sub-01.nii.gz").symlink_to(world.image)
    assert segment(capsys, world, tmp_path / "sub-01.nii.gz", "--out", tmp_path / "out").code == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sub-01.seg.nrrd"]


def test_segment_takes_a_model_folder_or_a_version_of_a_project(capsys, world, project, tmp_path):
    shutil.copytree(project / "models" / "v1", tmp_path / "elsewhere" / "v1")
    results = []
    for n, where in enumerate(
        [["--model", tmp_path / "elsewhere" / "v1"], ["--project", project], ["--project", project, "--version", "v1"]]
    ):
        run_ok(capsys, "segment", world.image, *where, "--out", tmp_path / f"{n}.seg.nrrd")
        results.append(labels_of(tmp_path / f"{n}.seg.nrrd")[0])
    assert all(np.array_equal(results[0], r) for r in results[1:])
    assert "v7" in refusal(capsys, "segment", world.image, "--project", project, "--version", "v7", "--out", tmp_path)
    assert "--version" in refusal(
        capsys, "segment", world.image, "--model", project / "models" / "v1", "--version", "v1", "--out", tmp_path
    )
    assert "model.json" in refusal(capsys, "segment", world.image, "--model", tmp_path, "--out", tmp_path / "o")


def test_segment_refuses_a_project_without_a_model(capsys, world, source, tmp_path):
    message = refusal(capsys, "segment", world.image, "--project", source.project, "--out", tmp_path / "out")
    assert "train one first" in message


# evaluate


def test_evaluate_gives_the_dice_of_what_segment_writes(capsys, world, tmp_path):
    said = result(capsys, "evaluate", world.project)
    expected = {"bright": [], "gray": []}
    for name in ("t1", "t2"):
        image = world.folder / "test" / "images" / f"{name}.nii.gz"
        segment(capsys, world, image, "--out", tmp_path / f"{name}.seg.nrrd")
        array, names = labels_of(tmp_path / f"{name}.seg.nrrd")
        for value, structure in names.items():
            truth = world.truth[name] == {"bright": 1, "gray": 2}[structure]
            expected[structure].append(dice(truth, array == value))
    for structure, scores in expected.items():
        found = said["structures"][structure]
        assert found["dice"] == pytest.approx(np.mean(scores))
        assert found["cases"] == 2
        assert min(scores) - 1e-9 <= found["interval"][0] <= found["interval"][1] <= max(scores) + 1e-9
    assert said["mean_dice"] == pytest.approx(np.mean([np.mean(s) for s in expected.values()]))


def test_evaluate_counts_only_annotated_cases(capsys, world):
    said = result(capsys, "evaluate", world.project, "--split", "all")
    assert {name: s["cases"] for name, s in said["structures"].items()} == {"bright": 4, "gray": 4}


def test_evaluate_shows_a_table_and_structures_found_though_absent(capsys, world, project):
    run_ok(capsys, "new", project.parent / "absent", "--structures", "bright,gray")
    arguments = ["--images", world.image, "--absent", "gray", "--split", "test"]
    run_ok(capsys, "import", project.parent / "absent", *arguments)
    text = run_ok(capsys, "evaluate", project.parent / "absent", "--model", world.model)
    assert re.search(r"^gray +- +- +0 +1 of 1$", text, re.MULTILINE), text
    assert re.search(r"^bright +- +- +0 +-$", text, re.MULTILINE), text


def test_evaluate_refuses_a_split_without_cases(capsys, world):
    assert "--split validation" in refusal(capsys, "evaluate", world.project, "--split", "validation")


# Bad volumes, refused by import and by segment


def four_d():
    return sitk.JoinSeries([sitk.GetImageFromArray(blobs(n)[0]) for n in range(2)])


def with_value(value):
    array = blobs(0)[0]
    array[3, 4, 5] = value
    return array


BAD_VOLUMES = {
    "4D": (".nii.gz", four_d, "4-D"),
    "complex": (".nii.gz", lambda: sitk.GetImageFromArray(blobs(0)[0].astype(np.complex64)), "complex"),
    "RGB": (".nrrd", lambda: sitk.GetImageFromArray(np.ones((*SHAPE, 3), np.uint8), isVector=True), "colors"),
    "NaN in NIfTI": (".nii.gz", lambda: with_value(np.nan), "NaN"),
    "NaN in NRRD": (".nrrd", lambda: with_value(np.nan), "NaN"),
    "infinity in NIfTI": (".nii", lambda: with_value(-np.inf), "infinite"),
    "infinity in MHA": (".mha", lambda: with_value(np.inf), "infinite"),
    "constant": (".nii.gz", lambda: np.full(SHAPE, 7, np.int16), "everywhere"),
    "one slice": (".nii.gz", lambda: blobs(0)[0][:1], "one slice"),
    "2D": (".mha", lambda: blobs(0)[0][0], "one slice"),
}


@pytest.mark.parametrize("kind", BAD_VOLUMES)
def test_a_volume_that_cannot_be_used_is_refused_by_import_and_segment(
    capsys, snapshot, world, project, tmp_path, kind
):
    ending, make, reason = BAD_VOLUMES[kind]
    bad = write_image(tmp_path / f"bad{ending}", make())
    before = snapshot(tmp_path)
    for arguments in (
        ["import", project, "--images", bad],
        ["segment", bad, "--project", project, "--out", tmp_path / "out"],
        ["segment", bad, "--project", project, "--out", tmp_path / "out.seg.nrrd"],
    ):
        message = refusal(capsys, *arguments)
        assert reason in message and bad.name in message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("part", [0.5, 0.97], ids=["half", "nearly all"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_truncated_file_is_refused_as_image_and_as_label(capsys, snapshot, world, source, ending, part):
    source.put("a", blobs(0)[1], ending, ending)
    original = {path: path.read_bytes() for path in (source.images / f"a{ending}", source.labels / f"a{ending}")}
    before = snapshot(source.project)
    for path, content in original.items():
        path.write_bytes(content[: int(len(content) * part)])
        assert path.name in refusal(capsys, *source.arguments, "--map", "1=liver,2=spleen")
        path.write_bytes(content)
    cut = source.images / f"a{ending}"
    cut.write_bytes(original[cut][: int(len(original[cut]) * part)])
    refusal(capsys, "segment", cut, "--project", world.project, "--out", source.project / "out")
    assert snapshot(source.project) == before


def test_a_truncated_segmentation_is_refused(capsys, snapshot, world, source):
    write_image(source.images / "a.nii.gz", blobs(4)[0])
    source.labels.mkdir()
    label = source.labels / "a.seg.nrrd"
    segment(capsys, world, source.images / "a.nii.gz", "--out", label)
    label.write_bytes(label.read_bytes()[:-60])
    before = snapshot(source.project)
    assert label.name in refusal(capsys, *source.arguments)
    assert snapshot(source.project) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fourD/example4d.nii.gz", "4-D"),
        ("fourD/pcasl.nii.gz", "4-D"),
        ("slope/functional.nii", "4-D"),
        ("pixeltype/complex.nii.gz", "complex"),
        ("pixeltype/example_nifti2.nii.gz", "cannot be read"),
        ("shear/shear.nii.gz", "sheared"),
        ("tiny/low_res.nii.gz", "too small"),
        ("tiny/standard.nii.gz", "too small"),
    ],
)
def test_a_real_file_that_cannot_be_segmented_is_refused(capsys, world, shared_folder, tmp_path, name, reason):
    path = shared_folder("odd") / name
    done = segment(capsys, world, path, "--out", tmp_path / "out")
    assert done.code == 2
    assert reason in the_message(done.err) and path.name in the_message(done.err)
    assert not list(tmp_path.iterdir())


def test_a_volume_smaller_than_the_stride_of_the_network_is_refused(capsys, snapshot, world, project, tmp_path):
    thin = write_image(tmp_path / "thin.nii.gz", blobs(0)[0][:3])
    label = write_image(tmp_path / "label.nii.gz", blobs(0)[1][:3])
    done = segment(capsys, world, thin, "--out", tmp_path / "out")
    assert done.code == 2 and "22×24×3 voxels" in the_message(done.err)
    assert not (tmp_path / "out").exists()

    # Found before the training, not after it when the case is to be scored.
    run_ok(capsys, "import", project, "--images", thin, "--labels", label, "--map", "1=bright,2=gray")
    before = snapshot(project)
    message = refusal(capsys, "train", project, "--iterations", "2")
    assert '"thin"' in message and "22×24×3 voxels" in message
    assert snapshot(project) == before


# Bad labels, names and folders


def test_an_image_with_slope_and_intercept_is_read_scaled_and_a_label_with_them_is_refused(capsys, snapshot, source):
    stored = (blobs(0)[0] / 10).astype(np.int16)
    with_slope(write_image(source.images / "a.nii", stored))
    run_ok(capsys, "import", source.project, "--images", source.images)
    volume = sitk.ReadImage(str(source.project / "cases" / "a" / "volume.nrrd"))
    assert np.allclose(sitk.GetArrayFromImage(volume), stored * 0.5 + 100)

    with_slope(write_image(source.labels / "a.nii", blobs(0)[1].astype(np.int16)), 1.0, 1.0)
    before = snapshot(source.project)
    message = refusal(capsys, *source.arguments, "--map", "1=liver,2=spleen,3=tumor")
    assert "a.nii" in message and "slope" in message
    assert snapshot(source.project) == before


BAD_IMPORTS = {
    "a label value that no mapping names": (["--map", "1=liver"], "label 2"),
    "a structure named twice": (["--map", "1=liver", "2=liver"], '"liver" twice'),
    "a label named twice": (["--map", "1=liver", "1=spleen"], "label 1 twice"),
    "a structure that the project does not have": (["--map", "1=heart,2=liver"], '"heart"'),
    "no mapping": ([], "mapping"),
    "a mapping file that is not there": (["--map", "nowhere.csv"], "nowhere.csv"),
    "an absent structure that is mapped": (
        ["--map", "1=liver,2=spleen", "--absent", "liver"],
        "absent and as annotated",
    ),
    "a pattern that matches nothing": (["--map", "1=liver,2=", "--subject-pattern", "(x)"], '"(x)"'),
}


@pytest.mark.parametrize("what", BAD_IMPORTS)
def test_import_refuses(capsys, snapshot, source, what):
    options, reason = BAD_IMPORTS[what]
    source.put("a", blobs(0)[1])
    before = snapshot(source.project)
    assert reason in refusal(capsys, *source.arguments, *options)
    assert snapshot(source.project) == before


def test_two_images_or_two_segments_of_one_name_are_refused(capsys, snapshot, world, source):
    source.put("a", blobs(0)[1])
    write_image(source.images / "a.nrrd", blobs(0)[0])
    before = snapshot(source.project)
    assert 'the name "a"' in refusal(capsys, *source.arguments, "--map", "1=liver,2=")

    label = source.project.parent / "twice.seg.nrrd"
    segment(capsys, world, source.images / "a.nrrd", "--out", label)
    label.write_bytes(label.read_bytes().replace(b"Segment1_Name:=gray", b"Segment1_Name:=bright"))
    arguments = ["import", source.project, "--images", source.images / "a.nrrd", "--labels", label]
    assert '"bright"' in refusal(capsys, *arguments, "--map", "bright=liver")
    assert '"bright"' in refusal(capsys, *arguments)
    assert snapshot(source.project) == before


def test_an_empty_or_missing_folder_is_refused(capsys, snapshot, world, source, tmp_path):
    source.put("a", blobs(0)[1])
    (tmp_path / "empty").mkdir()
    before = snapshot(source.project)
    for bad in (tmp_path / "empty", tmp_path / "missing"):
        for arguments in (
            ["import", source.project, "--images", bad],
            ["import", source.project, "--images", source.images, "--labels", bad, "--map", "1=liver"],
            ["segment", bad, "--project", world.project, "--out", tmp_path / "out"],
            ["train", bad],
            ["evaluate", bad],
        ):
            assert str(bad) in refusal(capsys, *arguments)
    assert snapshot(source.project) == before
    assert not (tmp_path / "out").exists()


# Bad models and projects


def spoil_weights(model):
    content = bytearray((model / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "weights.safetensors").write_bytes(content)


def swap_weights(model):
    shutil.copy(model / "last.safetensors", model / "weights.safetensors")


def change_network(model):
    change_card(model, lambda card: card["network"].update(channels=[8, 16, 32, 64]))


def add_structure(model):
    def add(card):
        card["structures"].append({"name": "new", "color": [0, 0, 1], "terminology": ""})
        card["label_layers"][0].append("new")

    change_card(model, add)


def newer_card(model):
    change_card(model, lambda card: card.update(format=99))


def cut_card(model):
    (model / "model.json").write_text((model / "model.json").read_text(encoding="utf-8")[:200], encoding="utf-8")


def change_card(model, change):
    card = json.loads((model / "model.json").read_text(encoding="utf-8"))
    change(card)
    (model / "model.json").write_text(json.dumps(card), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_weights, "do not match their card"),
        (swap_weights, "do not match their card"),
        (change_network, "do not match their card"),
        (add_structure, "do not match their card"),
        (newer_card, "newer PresenceSeg"),
        (cut_card, "cannot be read"),
    ],
)
def test_weights_that_do_not_match_their_card_or_a_newer_card_are_refused(
    capsys, snapshot, world, project, spoil, reason
):
    spoil(project / "models" / "v1")
    before = snapshot(project.parent)
    for arguments in (
        ["segment", world.image, "--project", project, "--out", project.parent / "out"],
        ["evaluate", project],
        ["train", project, "--from", "v1", "--iterations", "2"],
    ):
        assert reason in refusal(capsys, *arguments)
        assert files(snapshot(project.parent)) == files(before), arguments
    if spoil in (newer_card, cut_card):
        assert reason in refusal(capsys, "info", project)


def test_a_newer_or_damaged_project_is_refused(capsys, snapshot, world, project):
    path = project / "project.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for content, reason in ((json.dumps(data | {"format": 99}), "newer PresenceSeg"), ("{", "cannot be read")):
        path.write_text(content)
        before = snapshot(project.parent)
        for arguments in (
            ["info", project],
            ["import", project, "--images", world.image],
            ["train", project],
            ["evaluate", project],
            ["segment", world.image, "--project", project, "--out", project.parent / "out"],
        ):
            assert reason in refusal(capsys, *arguments)
        assert snapshot(project.parent) == before


# Full and read-only disks


@pytest.fixture
def disk(tmp_path):
    """A disk of 24 MiB of its own, with functions that fill it or make it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs Linux and administrator rights")

    def fill():
        with open(folder / "filler", "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 10, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    continue

    def protect():
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)

    yield SimpleNamespace(folder=folder, spoil={"full": fill, "read-only": protect})
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_full_or_read_only_disk_is_refused_with_everything_as_it_was(capsys, snapshot, world, disk, kind):
    project = shutil.copytree(world.project, disk.folder / "project", ignore=shutil.ignore_patterns("cache"))
    kept = disk.folder / "kept.seg.nrrd"
    segment(capsys, world, world.image, "--out", kept)
    image = write_image(disk.folder.parent / "z.nii.gz", blobs(9)[0])
    disk.spoil[kind]()
    before = snapshot(disk.folder)
    for arguments in (
        ["new", disk.folder / "new", "--structures", "liver"],
        ["import", project, "--images", image],
        ["import", project, "--images", world.folder / "one" / "images" / "a.nii.gz", "--absent", "gray"],
        ["segment", image, "--project", world.project, "--out", disk.folder / "out"],
        ["segment", image, "--project", world.project, "--out", kept, "--overwrite"],
        ["train", project, "--iterations", "2", "--batch", "1"],
    ):
        refusal(capsys, *arguments)
        assert files(snapshot(disk.folder)) == files(before), arguments
    assert result(capsys, "info", project) == result(capsys, "info", project)


# Real volumes


def world_labels(path, reference):
    """Labels of a `.seg.nrrd` in the order of a reference volume's voxels, matched by their place in the world."""
    labels = sitk.ReadImage(str(path))
    filled = sitk.Resample(labels, reference, sitk.Transform(), sitk.sitkNearestNeighbor, 99)
    return sitk.GetArrayFromImage(filled)


def test_one_brain_in_every_axis_order_gets_the_same_labels_in_the_world(capsys, world, shared_folder, tmp_path):
    volumes = sorted(shared_folder("odd/nifti_space").glob("*.nii.gz"))
    assert len(volumes) == 16
    assert segment(capsys, world, *volumes, "--out", tmp_path).code == 0
    reference = sitk.ReadImage(str(volumes[0]))
    first = world_labels(tmp_path / "AIL.seg.nrrd", reference)
    counts = np.bincount(first.ravel(), minlength=3)
    assert len(counts) == 3 and counts.min() > 0.02 * first.size, counts  # both structures and background
    for volume in volumes[1:]:
        labels = world_labels(tmp_path / f"{volume.name.removesuffix('.nii.gz')}.seg.nrrd", reference)
        assert np.array_equal(labels, first), volume.name


@pytest.mark.parametrize("name", ["odd/oblique/FLAIR.nii.gz", "totalseg/example_ct.nii.gz", "odd/pixeltype/ras.hdr"])
def test_a_real_volume_gets_its_labels_in_its_own_place(capsys, world, shared_data, tmp_path, name):
    if not (shared_data / name).is_file():
        pytest.skip(f"no real image {shared_data / name}")
    assert segment(capsys, world, shared_data / name, "--out", tmp_path / "out.seg.nrrd").code == 0
    volume, found = (sitk.ReadImage(str(path)) for path in (shared_data / name, tmp_path / "out.seg.nrrd"))
    assert found.GetSize() == volume.GetSize()
    last = [n - 1 for n in volume.GetSize()]
    for corner in ([0, 0, 0], last, [last[0], 0, 0], [0, last[1], 0]):
        assert np.allclose(
            found.TransformIndexToPhysicalPoint(corner), volume.TransformIndexToPhysicalPoint(corner), atol=0.01
        )
    counts = np.bincount(sitk.GetArrayFromImage(found).ravel(), minlength=3)
    assert len(counts) == 3 and counts.min() > 0.005 * sum(counts), counts


def test_one_volume_in_two_formats_gets_the_same_labels(capsys, world, shared_folder, tmp_path):
    source = shared_folder("odd/oblique")
    results = []
    for ending in (".nii.gz", ".nrrd"):
        segment(capsys, world, source / f"FLAIR{ending}", "--out", tmp_path / f"{ending[1:4]}.seg.nrrd")
        results.append(labels_of(tmp_path / f"{ending[1:4]}.seg.nrrd")[0])
    assert np.array_equal(*results)


def test_a_real_dicom_folder_is_segmented_under_its_name(capsys, world, shared_folder, tmp_path):
    folder = shared_folder("odd/dicom_torchio")
    assert segment(capsys, world, folder, "--out", tmp_path).code == 0
    array, _ = labels_of(tmp_path / "dicom_torchio.seg.nrrd")
    assert array.shape == (17, 128, 88) and set(np.unique(array)) == {0, 1, 2}
