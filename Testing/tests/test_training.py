"""Training end to end on tiny made-up cases: repeatable, resumable, safe from accidents, taught by Completed only."""

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthetic import CPU, add_case, grid, make_project, scene

from PresenceSegLib.domain.case import CaseInfo
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.segmentation import Segmentation, Status
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import Volume
from PresenceSegLib.engine.inference import Model
from PresenceSegTrainingLib.domain.settings import TrainingSettings
from PresenceSegTrainingLib.engine import training as module
from PresenceSegTrainingLib.engine.evaluation import evaluate
from PresenceSegTrainingLib.engine.training import Training

SHORT = TrainingSettings(iterations=6, batch=2, patch=(8, 16, 16), learning_rate=5e-3, ema_decay=0.9)


# Patches this small gain nothing from a second thread, and lose much where another process wants the core.
pytestmark = pytest.mark.usefixtures("one_thread")


def partly_annotated(folder, structures=("core", "rim", "rod"), test_case=True):
    """Six cases of three structures with one or two annotated in each, and a test case."""
    project = make_project(folder, structures)
    one, two, three = project.structures.names[:3]
    add_case(project, "c1", [one, two], seed=1)
    add_case(project, "c2", [two], absent=[three], seed=2)
    add_case(project, "c3", [three], seed=3)
    add_case(project, "c4", [one, three], seed=4)
    add_case(project, "v1", [one], absent=[three], subject="v", split="validation", seed=5)
    add_case(project, "v2", [one, three], subject="v", seed=6)
    if test_case:
        add_case(project, "t1", [one, two, three], split="test", seed=7)
    return project


@pytest.fixture
def project(tmp_path):
    return partly_annotated(tmp_path / "p")


def train(project, settings=SHORT, **options):
    return Training.begin(project, settings, CPU).run(CPU, **options)


def stop_after(count):
    """For `should_stop`: true once, after so many steps."""
    calls = iter([False] * (count - 1) + [True])
    return lambda: next(calls, False)


def weights_of(version, name="weights.safetensors"):
    return load_file(version.folder / name)


def same_weights(one, other):
    return all(
        weights_of(one, name).keys() == weights_of(other, name).keys()
        and all(torch.equal(v, weights_of(other, name)[k]) for k, v in weights_of(one, name).items())
        for name in ("weights.safetensors", "last.safetensors")
    )


def history(version):
    with open(version.folder / "history.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def report(version):
    return json.loads((version.folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(one_thread, tmp_path_factory):
    """A project with one finished training of 60 steps, for the tests that only look at it."""
    project = partly_annotated(tmp_path_factory.mktemp("trained") / "p")
    seen = []
    version = train(project, replace(SHORT, iterations=60), on_progress=seen.append)
    return project, version, seen


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_structures_are_found(trained):
    _, version, _ = trained
    losses = [float(row["loss"]) for row in history(version)]
    assert np.mean(losses[-6:]) < 0.6 * np.mean(losses[:3])
    scores = version.read_card().scores
    assert np.mean([scores["core"]["dice"], scores["rod"]["dice"]]) > 0.25


def test_a_version_holds_its_card_weights_history_and_report_and_nothing_else_is_left(trained):
    project, version, _ = trained
    assert [m.name for m in project.models()] == ["v1"]
    assert sorted(p.name for p in version.folder.iterdir()) == [
        "history.csv",
        "last.safetensors",
        "model.json",
        "report.json",
        "weights.safetensors",
    ]
    assert project.unfinished_trainings() == []
    assert not [p for p in project.folder.rglob(".partial-*")]
    card = version.read_card()
    version.check_weights(card)
    assert card.structures == project.structures and card.created.endswith("+00:00")
    assert TrainingSettings.from_json(card.settings) == replace(SHORT, iterations=60)


def test_the_history_has_a_row_per_step_and_dice_where_it_was_validated(trained):
    _, version, _ = trained
    rows = history(version)
    assert list(rows[0]) == ["iteration", "seconds", "loss", "lr", "dice core", "dice rod"]
    assert [int(r["iteration"]) for r in rows] == list(range(1, 61))
    assert [int(r["iteration"]) for r in rows if r["dice core"]] == list(range(6, 61, 6))  # ten times
    assert all(0 <= float(r[c]) <= 1 for r in rows for c in ("dice core", "dice rod") if r[c])
    rates = [float(r["lr"]) for r in rows]
    assert max(rates) == pytest.approx(SHORT.learning_rate) and rates.index(max(rates)) == 3
    assert rates[:4] == sorted(rates[:4]) and rates[3:] == sorted(rates[3:], reverse=True)
    # half a cosine over the 95 % after the warm-up
    assert rates[30] == pytest.approx(SHORT.learning_rate * 0.5 * (1 + math.cos(math.pi * (0.5 - 0.05) / 0.95)))


def test_progress_tells_every_step_with_the_time_left(trained):
    _, _, seen = trained
    assert [p.iteration for p in seen] == list(range(1, 61))
    assert [p.fraction for p in seen] == pytest.approx([n / 60 for n in range(1, 61)])
    assert seen[-1].seconds_left == 0 and all(p.seconds_left > 0 for p in seen[:-1])
    assert [p.iteration for p in seen if p.dice is not None] == list(range(6, 61, 6))
    assert all(set(p.dice) == {"core", "rod"} for p in seen if p.dice)


def test_the_report_gives_the_scores_of_each_validation_case_only_where_it_is_annotated(trained):
    project, version, _ = trained
    written = report(version)
    assert written["scored_on"] == "validation cases" and written["iterations"] == 60
    assert {"seconds", "device", "torch", "monai"} <= written.keys()
    assert list(written["cases"]) == ["v1", "v2"]
    assert written["cases"]["v1"]["rim"] is None and written["cases"]["v1"]["rod"] is None  # un-annotated, absent
    assert written["cases"]["v2"]["rim"] is None and written["cases"]["v2"]["rod"] is not None
    evaluation = evaluate(Model.load(version, CPU), [project.case("v1"), project.case("v2")])
    assert version.read_card().scores == evaluation.scores()
    assert evaluation.scores()["core"]["cases"] == 2 and evaluation.scores()["rim"] == {"dice": None, "cases": 0}


def test_the_best_averaged_weights_are_kept_beside_the_last(tmp_path, monkeypatch):
    settings = replace(SHORT, iterations=5, validate_every=1)

    def trained_with_scores(name, **options):
        scores = iter(np.repeat([0.1, 0.3, 0.8, 0.2, 0.7], 2))  # of two cases each
        monkeypatch.setattr(module, "dice_scores", lambda *arguments: np.array([next(scores), np.nan, np.nan]))
        return train(partly_annotated(tmp_path / name), settings, **options)

    version = trained_with_scores("best")
    assert [float(row["dice core"]) for row in history(version)] == [0.1, 0.3, 0.8, 0.2, 0.7]
    trained_with_scores("stopped", should_stop=stop_after(3))
    average = torch.load(tmp_path / "stopped" / "training" / "v1" / "checkpoint.pt", weights_only=True)["ema"]
    best, last = weights_of(version), weights_of(version, "last.safetensors")
    assert best.keys() == last.keys() == average.keys()
    assert all(torch.equal(best[key], average[key]) for key in best)
    assert not any(torch.equal(best[key], last[key]) for key in ("head.weight", "head.bias"))


def test_the_card_tells_which_case_taught_which_structure_and_test_cases_are_not_among_them(trained):
    _, version, _ = trained
    assert version.read_card().cases == {
        "c1": ["core", "rim"],
        "c2": ["rim", "rod"],
        "c3": ["rod"],
        "c4": ["core", "rod"],
    }


def test_repeat_scans_of_a_validation_subject_validate_too(project):
    training = Training.begin(project, SHORT, CPU)
    assert (training.train_names, training.validation_names) == (("c1", "c2", "c3", "c4"), ("v1", "v2"))


def test_without_validation_cases_the_training_cases_are_scored_and_the_last_weights_are_kept(tmp_path):
    project = make_project(tmp_path / "p", ("core", "rim"))
    add_case(project, "only", ["core"])
    version = train(project, replace(SHORT, iterations=2))
    assert report(version)["scored_on"] == "training cases" and list(report(version)["cases"]) == ["only"]
    assert list(history(version)[0]) == ["iteration", "seconds", "loss", "lr"]
    best, last = weights_of(version), weights_of(version, "last.safetensors")
    assert all(torch.equal(best[k], last[k]) for k in best)


# --- what teaches ----------------------------------------------------------------------------------------------------


def test_segments_that_are_not_completed_and_test_cases_change_nothing_bit_for_bit(tmp_path):
    plain = partly_annotated(tmp_path / "plain", test_case=False)
    misled = partly_annotated(tmp_path / "misled")
    rng = np.random.default_rng(0)
    for case in misled.cases():
        segmentation = case.read_segmentation()
        for structure, status in zip(
            misled.structures, (Status.IN_PROGRESS, Status.FLAGGED, Status.NOT_STARTED), strict=True
        ):
            if segmentation.named(structure.name) is None:
                segmentation.put(structure, rng.random(segmentation.grid.shape) < 0.5, status)
        case.write_segmentation(segmentation)
    one, other = train(plain), train(misled)
    assert same_weights(one, other)
    assert one.read_card().scores == other.read_card().scores


@pytest.mark.parametrize(("names", "mirrors"), [(("core", "rim", "rod"), True), (("core", "rim", "left rod"), False)])
def test_patches_are_mirrored_only_if_no_structure_has_a_side(tmp_path, monkeypatch, names, mirrors):
    asked = []

    def spy(batch, patch, mirror, *others):
        asked.append(mirror)
        return augment(batch, patch, mirror, *others)

    augment = module.augment
    monkeypatch.setattr(module, "augment", spy)
    train(partly_annotated(tmp_path / "p", names), replace(SHORT, iterations=2))
    assert asked == [mirrors] * 2


def test_without_augmentation_patches_are_taken_as_they_are(project, monkeypatch):
    monkeypatch.setattr(module, "augment", lambda *arguments: pytest.fail("augmented"))
    assert train(project, replace(SHORT, iterations=2, augment=False)).read_card().version == "v1"


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slice_networks_train_in_every_plane(project, plane):
    version = train(project, replace(SHORT, iterations=2, plane=plane, patch=(0, 0, 0), batch=2))
    assert version.read_card().network.plane == plane
    assert Model.load(version, CPU).segment(project.case("t1").read_volume()).shape == (1, 12, 24, 24)


@pytest.mark.parametrize("mode", ["base", "or", "plus", "independent"])
def test_every_presence_mask_trains(project, mode):
    version = train(project, replace(SHORT, iterations=2, presence_mask=mode))
    assert version.read_card().activation == ("sigmoid" if mode == "independent" else "softmax")
    assert all(math.isfinite(float(row["loss"])) for row in history(version))


def test_structures_that_overlap_in_a_case_get_output_layers_of_their_own(tmp_path):
    project = make_project(tmp_path / "p")
    array, masks = scene(3)
    segmentation = Segmentation.empty(grid())
    segmentation.put(project.structures[0], masks[0] | masks[2], Status.COMPLETED)
    segmentation.put(project.structures[1], masks[1], Status.COMPLETED)
    segmentation.put(project.structures[2], masks[2], Status.COMPLETED)
    project.add_case("c", Volume(array, grid()), segmentation, CaseInfo("", "c"))
    layers = train(project, replace(SHORT, iterations=1, presence_mask="independent")).read_card().label_layers
    assert layers == (("core", "rim"), ("rod",))
    layers = train(project, replace(SHORT, iterations=1)).read_card().label_layers
    assert layers == (("core", "rim", "rod"),)


def test_a_child_keeps_learned_channels_by_name_and_gives_a_new_structure_a_fresh_one(trained, tmp_path):
    project, parent, _ = trained
    learned = weights_of(parent)
    names = ("rod", "new", "core", "rim")
    grown = replace(project, structures=StructureSet.from_names(names))
    # so small a step that what comes out is what training started from
    settings = replace(SHORT, iterations=1, parent="v1", learning_rate=1e-12, weight_decay=0.0, network="dynunet")
    child = train(grown, settings)
    card, start = child.read_card(), weights_of(child)
    assert (card.version, card.parent, card.structures.names) == ("v2", "v1", names)
    assert card.network == parent.read_card().network
    assert card.preprocessing == parent.read_card().preprocessing
    assert start["head.weight"].shape[0] == 5
    for key in learned:
        if not key.startswith("head."):
            torch.testing.assert_close(start[key], learned[key], atol=1e-8, rtol=0)
    for key in ("head.weight", "head.bias"):
        torch.testing.assert_close(start[key][[0, 3, 4, 1]], learned[key], atol=1e-8, rtol=0)
        assert (start[key][2] - learned[key]).abs().flatten(1 if start[key].ndim > 1 else 0).max() > 1e-3
    labels = Model.load(child, CPU).segment(project.case("t1").read_volume())
    was = Model.load(parent, CPU).segment(project.case("t1").read_volume())
    old = np.isin(labels, [0, 1, 3, 4])
    agree = np.array([0, 3, 0, 1, 2])[labels] == was  # rod 1 -> 3, core 3 -> 1, rim 4 -> 2
    assert agree[old].mean() > 0.999


# --- refusals --------------------------------------------------------------------------------------------------------


def test_nothing_annotated_is_refused_and_leaves_no_training(tmp_path, snapshot):
    project = make_project(tmp_path / "p")
    add_case(project, "c", [], other={"core": Status.IN_PROGRESS, "rim": Status.FLAGGED})
    add_case(project, "t", ["core"], split="test")
    before = snapshot(project.folder)
    with pytest.raises(InputError, match="only Completed segments train"):
        Training.begin(project, SHORT, CPU)
    assert snapshot(project.folder) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"presence_mask": "naive"},
        {"loss": "focal"},
        {"network": "vnet"},
        {"plane": "oblique"},
        {"parent": "v9"},
    ],
)
def test_impossible_settings_are_refused_and_leave_no_training(project, snapshot, wrong):
    before = snapshot(project.folder)
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        Training.begin(project, replace(SHORT, **wrong), CPU)
    assert snapshot(project.folder) == before


@pytest.mark.parametrize("split", ["", "validation"])
def test_a_case_too_small_for_the_network_is_refused_by_name_before_the_training(project, snapshot, split):
    add_case(project, "tiny one", ["core"], on=grid((24, 3, 12)), split=split)
    before = snapshot(project.folder)
    with pytest.raises(InputError, match='Case "tiny one": .*too small'):
        Training.begin(project, SHORT, CPU)
    assert snapshot(project.folder) == before


def test_there_is_nothing_to_resume_in_a_project_without_a_stopped_training(trained):
    project, _, _ = trained
    for version in ("", "v1", "v7"):
        with pytest.raises(InputError, match="no unfinished training"):
            Training.reopen(project, version)


def test_a_training_whose_case_is_gone_cannot_go_on(project):
    Training.begin(project, SHORT, CPU).run(CPU, should_stop=stop_after(1))
    project.case("c3").folder.rename(project.folder / "elsewhere")
    with pytest.raises(InputError, match='"c3" of this training is gone'):
        Training.reopen(project).run(CPU)


# --- stop, resume, repeat --------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(tmp_path):
    versions = [
        train(partly_annotated(tmp_path / str(n)), replace(SHORT, seed=seed)) for n, seed in enumerate((3, 3, 4))
    ]
    assert same_weights(versions[0], versions[1])
    assert not same_weights(versions[0], versions[2])


@pytest.mark.parametrize("mode", ["merged", "independent"])
def test_a_training_stopped_and_resumed_gives_the_weights_of_one_that_ran_through(tmp_path, mode):
    settings = replace(SHORT, presence_mask=mode, validate_every=2)
    through = train(partly_annotated(tmp_path / "through"), settings)
    project = partly_annotated(tmp_path / "stopped")
    assert Training.begin(project, settings, CPU).run(CPU, should_stop=stop_after(1)) is None
    assert project.models() == []
    for steps in (2, 1):
        torch.rand(3)  # whatever else happened in between
        opened = Project.open(project.folder)
        assert Training.reopen(opened).run(CPU, should_stop=stop_after(steps)) is None
    resumed = Training.reopen(Project.open(project.folder), "v1").run(CPU)
    assert same_weights(through, resumed)
    for one, other in zip(history(through), history(resumed), strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert through.read_card().scores == resumed.read_card().scores
    assert project.unfinished_trainings() == []


def test_two_stopped_trainings_have_versions_of_their_own_and_the_latest_is_resumed_first(project):
    first = Training.begin(project, SHORT, CPU)
    second = Training.begin(project, replace(SHORT, iterations=2), CPU)
    assert (first.card.version, second.card.version) == ("v1", "v2")
    assert Training.reopen(project).run(CPU).name == "v2"
    assert Training.reopen(project).run(CPU).name == "v1"
    assert [m.name for m in project.models()] == ["v1", "v2"]


def test_a_time_budget_ends_the_training_and_shapes_its_learning_rate(project):
    seen = []
    version = train(project, replace(SHORT, iterations=0, minutes=0.03, validate_every=0), on_progress=seen.append)
    rates = [float(row["lr"]) for row in history(version)]
    assert 1.8 <= report(version)["seconds"] < 1.8 + 10  # the last step and validation may take their time
    assert seen[-1].fraction == 1 and [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    assert all(p.seconds_left <= 60 for p in seen[len(seen) // 2 :])
    assert rates[-1] < max(rates)


def test_what_ends_first_ends_the_training(project):
    assert report(train(project, replace(SHORT, iterations=2, minutes=30)))["iterations"] == 2
    assert report(train(project, replace(SHORT, iterations=10**6, minutes=0.005)))["iterations"] < 100


# --- accidents -------------------------------------------------------------------------------------------------------

_CHILD = """
import sys
sys.path[:0] = {path!r}
import torch
from PresenceSegLib.domain.project import Project
from PresenceSegTrainingLib.engine import training
torch.set_num_threads(1)
training._CHECKPOINT_SECONDS = 0
project = Project.open({folder!r})
run = training.Training.reopen(project)
run.run(torch.device("cpu"), on_progress=lambda progress: print(progress.iteration, flush=True))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_training_killed_in_the_middle_leaves_a_project_that_opens_and_goes_on_to_the_same_weights(tmp_path):
    settings = replace(SHORT, iterations=20)
    through = train(partly_annotated(tmp_path / "through"), settings)
    project = partly_annotated(tmp_path / "killed")
    Training.begin(project, settings, CPU)
    code = _CHILD.format(path=sys.path, folder=str(project.folder))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        reached = 0
        while reached < 4:
            reached = int(process.stdout.readline() or pytest.fail("the training ended by itself"))
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    opened = Project.open(project.folder)
    assert len(opened.cases()) == 7 and opened.models() == []
    first = []
    version = Training.reopen(opened).run(CPU, on_progress=lambda p: first.append(p.iteration))
    assert first[0] > 1, "nothing of the killed training was kept"
    assert same_weights(through, version)
    assert Project.open(project.folder).unfinished_trainings() == []


@contextlib.contextmanager
def files_limited_to(count):
    """No file may grow beyond so many bytes: to the process that is a disk running full."""
    resource = pytest.importorskip("resource", reason="file size limits exist on Linux and macOS only")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_checkpointing_leaves_the_last_checkpoint(tmp_path, project, snapshot):
    through = train(partly_annotated(tmp_path / "through"))
    Training.begin(project, SHORT, CPU).run(CPU, should_stop=stop_after(2))
    before = snapshot(project.training_folder)
    assert len(before["v1/checkpoint.pt"]) > 500_000
    with files_limited_to(500_000), pytest.raises(InputError, match="checkpoint.pt cannot be written"):
        Training.reopen(project).run(CPU, should_stop=stop_after(2))
    assert snapshot(project.training_folder) == before
    assert same_weights(through, Training.reopen(project).run(CPU))


def test_a_version_that_cannot_be_written_can_be_written_later(tmp_path, project):
    through = train(partly_annotated(tmp_path / "through"))
    (project.folder / "models").write_text("in the way")
    with pytest.raises(InputError, match="models"):
        train(project)
    assert not list(project.folder.glob(".partial-*"))
    (project.folder / "models").unlink()
    steps = []
    version = Training.reopen(project).run(CPU, on_progress=steps.append)
    assert steps == [], "the finished training was done again"
    assert same_weights(through, version)


def test_a_training_that_died_after_it_made_its_version_is_over(trained):
    project, version, _ = trained
    left = project.training_folder / "v1"
    left.mkdir(parents=True)
    try:
        (left / "run.json").write_text("{}")
        assert project.unfinished_trainings() == []
        with pytest.raises(InputError, match="no unfinished training"):
            Training.reopen(project)
        assert project.next_version() == "v2" or len(project.models()) > 1
    finally:
        (left / "run.json").unlink()
        left.rmdir()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no checkpoint", "half"])
def test_a_damaged_checkpoint_is_refused(project, content):
    Training.begin(project, SHORT, CPU).run(CPU, should_stop=stop_after(1))
    path = project.training_folder / "v1" / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(InputError, match=r"checkpoint\.pt cannot be read"):
        Training.reopen(project).run(CPU)


def test_a_damaged_description_of_a_training_is_refused(project):
    Training.begin(project, SHORT, CPU)
    path = project.training_folder / "v1" / "run.json"
    for text in ("{", "[]", "{}", '{"card": {"format": 1}, "train": [], "validation": []}'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"run\.json"):
            Training.reopen(project)


def test_a_training_that_diverges_says_so_and_makes_no_version(project):
    settings = replace(SHORT, learning_rate=1e30, gradient_clip=1e30, iterations=30)
    with pytest.raises(InputError, match="diverged at step .* smaller learning rate"):
        train(project, settings)
    assert project.models() == []


@pytest.mark.parametrize(("structures", "swapped"), [(("core", "rim", "rod"), True), (("core", "left", "rod"), False)])
def test_left_and_right_are_swapped_only_with_leave_and_where_no_structure_has_a_side(tmp_path, structures, swapped):
    one, other = (
        train(partly_annotated(tmp_path / str(mirror), structures), replace(SHORT, mirror=mirror))
        for mirror in (True, False)
    )
    assert same_weights(one, other) is not swapped
