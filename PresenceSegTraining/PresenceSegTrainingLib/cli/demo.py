"""The command `demo`: the whole product on made-up thighs, with no data and no network connection."""

import argparse
import time
from pathlib import Path

import numpy as np

from PresenceSegLib.domain.case import Case, CaseInfo
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import make_folder, write_json
from PresenceSegLib.domain.overlay import write_overlay_png
from PresenceSegLib.domain.phantom import STRUCTURES, PhantomCase, make_case
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.segmentation import Segmentation, Status, write_segmentation
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import Volume
from PresenceSegTrainingLib.cli.output import Output
from PresenceSegTrainingLib.domain.settings import TrainingSettings

_TRAIN_CASES = 12
_TEST_CASES = 4
_ABSENT = "adductors"  # missing in one more training case, and confirmed absent there
_SLICES_SHOWN = 3


def add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="see it work on made-up data, in a few minutes",
        description="Make phantoms of thigh MR scans, annotate two of six structures in each (different ones in "
        "different cases), train one network from that, and segment unseen phantoms in all six structures. Needs no "
        "data and no network connection.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make for everything the demo writes")
    parser.add_argument("--minutes", type=float, default=2.5, help="time budget of the training (default: 2.5)")
    parser.add_argument("--iterations", type=int, default=600, help="steps of the training at most (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds make other thighs")
    parser.add_argument("--device", default="auto", help="auto (the fastest there is), cpu, cuda, cuda:1, mps")
    parser.set_defaults(command=run_demo)


def run_demo(arguments: argparse.Namespace, output: Output) -> None:
    from PresenceSegLib.engine.device import choose_device, describe_device
    from PresenceSegLib.engine.inference import Model
    from PresenceSegTrainingLib.cli.models import train_and_report
    from PresenceSegTrainingLib.engine.evaluation import evaluate
    from PresenceSegTrainingLib.engine.training import Training

    started, out = time.monotonic(), arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already and is not empty; choose a new folder with --out.")
    device = choose_device(arguments.device)
    settings = TrainingSettings(
        iterations=arguments.iterations, minutes=arguments.minutes, validation_fraction=0, seed=arguments.seed
    )
    project = make_project(out / "project", arguments.seed, output)

    output.text(f"Training one network for all {len(STRUCTURES)} structures on {describe_device(device)}")
    version = train_and_report(Training.begin(project, settings, device), device, output)
    project.activate(version.name)

    model = Model.load(version, device)
    tests = [c for c in project.cases() if c.info.split == "test"]
    predicted = _segment(model, tests, out / "segmentations", output)
    evaluation = evaluate(model, tests, output.loop("Scoring"))
    _write_overlay(out / "overlay.png", tests[0], predicted[tests[0].name])

    dice = {name: evaluation.mean(name) for name in evaluation.structures}
    seconds = round(time.monotonic() - started, 1)
    write_json(out / "summary.json", {"dice": dice, "seconds": seconds, "device": describe_device(device)})
    _show(project, tests, predicted, dice, output)
    output.text(f"\n{seconds:.0f} seconds in all. Everything is in {out}: the project, segmentations/*.seg.nrrd,")
    output.text("overlay.png (image, truth, prediction) and summary.json.")
    output.result(out=str(out), dice=dice, seconds=seconds)


def make_project(folder: Path, seed: int, output: Output) -> Project:
    """A project of partly annotated phantoms to train on, and fully annotated ones of the split "test"."""
    structures = StructureSet(STRUCTURES)
    project = Project.create(folder, "Thigh phantoms", structures)
    output.text(f"Annotating 2 of {len(structures)} structures in each of {_TRAIN_CASES} phantoms:")
    for n in range(_TRAIN_CASES):
        first, second = n % len(structures), (n + 1 + n // len(structures)) % len(structures)
        annotated = {structures[first].name, structures[second].name}
        _add_case(project, f"thigh {n + 1:02d}", make_case(1000 * seed + n), annotated)
        output.text(f"  thigh {n + 1:02d}: {', '.join(sorted(annotated))}")
    name = f"thigh {_TRAIN_CASES + 1:02d}"
    _add_case(project, name, make_case(1000 * seed + _TRAIN_CASES, missing={_ABSENT}), {_ABSENT})
    output.text(f"  {name}: {_ABSENT} confirmed absent")
    for n in range(_TEST_CASES):
        phantom = make_case(1000 * seed + 500 + n)
        _add_case(project, f"unseen {n + 1}", phantom, set(structures.names), split="test")
    return project


def _add_case(project: Project, name: str, phantom: PhantomCase, annotated: set[str], split: str = "") -> None:
    segmentation = Segmentation.empty(phantom.grid)
    for value, structure in enumerate(STRUCTURES, start=1):
        if structure.name in annotated:
            segmentation.put(structure, phantom.labels == value, Status.COMPLETED)
    project.add_case(name, Volume(phantom.array, phantom.grid), segmentation, CaseInfo("phantom", name, split))


def _segment(model, cases: list[Case], folder: Path, output: Output) -> dict[str, Segmentation]:
    make_folder(folder)
    result = {}
    for case in output.loop("Segmenting")(cases, len(cases)):
        result[case.name] = model.segmentation(case.read_volume())
        write_segmentation(folder / f"{case.name}.seg.nrrd", result[case.name])
    return result


def _write_overlay(path: Path, case: Case, predicted: Segmentation) -> None:
    """Some slices of a case, upright: image, truth, prediction."""
    volume, structures = case.read_volume(), StructureSet(STRUCTURES)
    order = volume.grid.axis_order()
    truth = case.read_segmentation().label_layers(structures, [Status.COMPLETED])[0]
    array, *labels = (order.apply(a) for a in (volume.array, truth, predicted.layers[0]))
    slices = np.linspace(0, len(array) - 1, _SLICES_SHOWN + 2).round().astype(int)[1:-1].tolist()
    _, along_p, along_l = volume.grid.canonical_spacing()
    write_overlay_png(path, array, labels, [s.color for s in structures], slices, spacing=(along_l, along_p))


def _show(project: Project, tests: list[Case], predicted: dict, dice: dict, output: Output) -> None:
    """The Dice table, beside the true and predicted volumes."""
    matrix = project.presence_matrix()
    training = [n for n, name in enumerate(matrix.cases) if name not in predicted]
    counts = dict(zip(matrix.structures, matrix.presence[training].sum(axis=0).tolist(), strict=True))
    rows = []
    for name in matrix.structures:
        true = np.mean([_milliliters(case.read_segmentation(), name) for case in tests])
        found = np.mean([_milliliters(segmentation, name) for segmentation in predicted.values()])
        rows.append([name, counts[name], f"{true:.0f}", f"{found:.0f}", dice[name]])
    output.text(f"\nOn {len(tests)} unseen phantoms:")
    output.table(["structure", f"annotated in (of {len(training)})", "truth ml", "predicted ml", "Dice"], rows)


def _milliliters(segmentation: Segmentation, name: str) -> float:
    voxels = segmentation.mask(segmentation.named(name)).sum()
    return float(voxels * np.prod(segmentation.grid.spacing) / 1000)
