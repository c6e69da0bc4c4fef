"""The commands `train`, `segment` and `evaluate`: model versions at work."""

import argparse
import os
import signal
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import make_folder
from PresenceSegLib.domain.model import PLANES, ModelVersion
from PresenceSegLib.domain.names import repeated
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.segmentation import write_segmentation
from PresenceSegLib.domain.volume import SEGMENTATION_ENDING, image_stem, is_image_file, read_volume
from PresenceSegTrainingLib.cli.output import Output
from PresenceSegTrainingLib.cli.projects import open_model
from PresenceSegTrainingLib.domain.settings import TrainingSettings

# torch takes seconds to import: the functions below import what needs it, so that `--help` and the project commands
# answer at once.

_DEFAULTS = {f.name: f.default for f in fields(TrainingSettings)}


class Interrupted(Exception):
    """The user stopped the command; the message says how to go on."""


def add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train one network for all structures from the partial labels",
        description="Train one network for all structures from the Completed segments of the project's cases, and "
        "store it as a new model version. Ctrl+C stops and keeps a checkpoint; --resume goes on from there.",
        epilog="Example: presenceseg train thigh --minutes 30",
    )
    parser.add_argument("project", type=Path, help="project folder")
    parser.add_argument("--resume", action="store_true", help="go on with the training that was stopped last")
    parser.add_argument("--no-activate", action="store_true", help="do not make the new version the active one")
    _add_device(parser)
    length = parser.add_argument_group("length")
    default = _DEFAULTS["iterations"]
    length.add_argument("--iterations", type=int, help=f"steps of the training (default: {default}, or as time allows)")
    _add_setting(length, "minutes", float, "time budget of the steps; with --iterations too, what ends first counts")
    start = parser.add_argument_group("start and network")
    _add_setting(start, "parent", str, "model version to start from, whose network is then used", flag="--from")
    _add_setting(start, "network", str, "network", choices=["unet", "segresnet", "dynunet"])
    _add_setting(start, "plane", str, "work slice by slice in this plane, for thick slices", choices=list(PLANES))
    _add_setting(start, "intensity", str, "kind of intensities", choices=["auto", "mr", "ct"])
    expert = parser.add_argument_group("for experts")
    expert.add_argument(
        "--voxel", type=float, nargs=3, metavar=("LR", "AP", "IS"), help="voxel size of the network, mm"
    )
    expert.add_argument("--patch", type=int, nargs=3, metavar=("LR", "AP", "IS"), help="training patch, voxels")
    _add_setting(
        expert,
        "presence_mask",
        str,
        "what becomes of un-annotated structures in the loss",
        choices=["merged", "base", "or", "plus", "independent"],
    )
    _add_setting(expert, "loss", str, "loss of the presence mask, for example xent+0.1*softdice with plus")
    _add_setting(expert, "batch", int, "patches per step, 0 for automatic")
    _add_setting(expert, "learning_rate", float, "peak learning rate")
    _add_setting(expert, "validation_fraction", float, "part of the subjects held out to validate on")
    expert.add_argument(
        "--no-mirror",
        dest="mirror",
        action="store_false",
        help="never swap left and right in training; for structures with a side that neither their terminology nor "
        "words such as left or right tell",
    )
    _add_setting(expert, "seed", int, "of everything random")
    parser.set_defaults(command=run_train)


def run_train(arguments: argparse.Namespace, output: Output) -> None:
    from PresenceSegLib.engine.device import choose_device, describe_device
    from PresenceSegTrainingLib.engine.training import Training

    project, device = Project.open(arguments.project), choose_device(arguments.device)
    if arguments.resume and _settings(arguments) != TrainingSettings():
        raise InputError("--resume goes on with the settings that the training was begun with; leave the others out.")
    if arguments.resume:
        training = Training.reopen(project)
    else:
        training = Training.begin(project, _settings(arguments), device)
    output.text(
        f"Training {training.card.version} on {len(training.train_names)} cases, validating on "
        f"{len(training.validation_names)}, {describe_device(device)}"
    )
    version = train_and_report(training, device, output)
    if not arguments.no_activate:
        project.activate(version.name)
    card = version.read_card()
    output.text(f"Model version {version.name} is in {version.folder}")
    where = "validation" if training.validation_names else "training"
    rows = [[name, score["dice"], score["cases"]] for name, score in card.scores.items()]
    output.table(["structure", "Dice", f"{where} cases"], rows)
    output.result(version=version.name, folder=str(version.folder), scores=card.scores, scored_on=f"{where} cases")


def train_and_report(training, device, output: Output) -> ModelVersion:
    """Run a training with a progress bar; Ctrl+C stops it with a checkpoint and raises Interrupted."""
    stopped = Interrupted(f"stopped; go on with: presenceseg train {training.project.folder} --resume")

    def cases_until_interrupted(items, total):
        for item in output.loop("Cases")(items, total):
            if interrupted:
                raise stopped
            yield item

    with _stop_on_interrupt() as interrupted, output.bar("Training", 100, bar_format=_TRAINING_BAR) as bar:
        report = _report_to(bar, output)
        version = training.run(device, report, should_stop=lambda: bool(interrupted), wrap=cases_until_interrupted)
    if version is None:
        raise stopped
    return version


_TRAINING_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


def add_segment(commands) -> None:
    parser = commands.add_parser(
        "segment",
        help="segment volumes in all structures",
        description="Segment volumes in all structures of a model in one pass. Each result is a Slicer segmentation "
        "(.seg.nrrd) on the volume's own grid, with names, colors and terminology; every segment is Not started, "
        "since nobody has looked at it yet.",
        epilog="Example: presenceseg segment scan.nii.gz --project thigh --out scan.seg.nrrd",
    )
    parser.add_argument("volumes", type=Path, nargs="+", help="image files (NIfTI, NRRD, MHA) or DICOM folders")
    _add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="a .seg.nrrd file for one volume, or a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist already")
    _add_device(parser)
    parser.set_defaults(command=run_segment)


def run_segment(arguments: argparse.Namespace, output: Output) -> None:
    targets = _targets(arguments.volumes, arguments.out, arguments.overwrite)
    version = open_model(arguments)

    from PresenceSegLib.engine.device import choose_device, describe_device
    from PresenceSegLib.engine.inference import Model

    model = Model.load(version, choose_device(arguments.device))
    for path in targets:  # all of them before the first result, so that a bad one stops nothing half way
        _naming(path, lambda volume: model.check(volume))
    output.text(f"Segmenting with model version {version.name} on {describe_device(model.device)}")
    for path, target in targets.items():
        with output.bar(path.name, 1.0, bar_format=_SEGMENT_BAR) as bar:

            def show(fraction: float, path=path, bar=bar) -> None:
                bar.update(fraction - bar.n)
                output.progress(task=str(path), fraction=fraction)

            segmentation = _naming(path, lambda volume, show=show: model.segmentation(volume, show))
        make_folder(target.parent)
        write_segmentation(target, segmentation)
        output.text(f"{target}")
    output.result(segmentations=[str(t) for t in targets.values()])


_SEGMENT_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def add_evaluate(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a model version against annotated cases",
        description="Segment cases of a project and compare with their Completed segments: Dice per structure, "
        "counted only where the structure is annotated, with the number of cases and a 95 %% bootstrap interval.",
    )
    parser.add_argument("project", type=Path, help="project folder")
    parser.add_argument("--version", help="model version (default: the active one)")
    parser.add_argument("--model", type=Path, help="folder of a model version of another project instead")
    parser.add_argument(
        "--split",
        default="test",
        choices=["test", "validation", "train", "all"],
        help="which cases, by what they were imported for (default: test)",
    )
    _add_device(parser)
    parser.set_defaults(command=run_evaluate)


def run_evaluate(arguments: argparse.Namespace, output: Output) -> None:
    from PresenceSegLib.engine.device import choose_device
    from PresenceSegLib.engine.inference import Model
    from PresenceSegTrainingLib.engine.evaluation import evaluate

    project = Project.open(arguments.project)
    model = Model.load(open_model(arguments), choose_device(arguments.device))
    cases = [c for c in project.cases() if arguments.split in ("all", c.info.split)]
    if not cases:
        raise InputError(
            f'The project {project.folder} has no cases of the split "{arguments.split}"; import some with '
            f"--split {arguments.split}, or choose another split."
        )
    evaluation = evaluate(model, cases, output.loop("Evaluating"))
    rows, data = [], {}
    for name in evaluation.structures:
        low, high = evaluation.interval(name) or (None, None)
        column = evaluation.structures.index(name)
        absent, wrong = int(evaluation.absent[:, column].sum()), int(evaluation.false_positive[:, column].sum())
        count, mean = evaluation.count(name), evaluation.mean(name)
        between = None if low is None else f"{low:.3f} - {high:.3f}"
        rows.append([name, mean, between, count, f"{wrong} of {absent}" if absent else None])
        data[name] = {"dice": mean, "interval": [low, high], "cases": count, "absent": absent, "false_positive": wrong}
    trained_on = sum(case.name in model.card.cases for case in cases)
    also = f", {trained_on} of which have names of cases it was trained on" if trained_on else ""
    output.text(f"Model version {model.card.version} on {len(cases)} cases{also}")
    output.table(["structure", "Dice", "95 % interval", "cases", "found though absent"], rows)
    output.result(version=model.card.version, mean_dice=evaluation.overall(), structures=data, trained_on=trained_on)


def _add_device(parser) -> None:
    parser.add_argument("--device", default="auto", help="auto (the fastest there is), cpu, cuda, cuda:1, mps")


def _add_model(parser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--project", type=Path, help="project whose model to use")
    source.add_argument("--model", type=Path, help="folder of a model version")
    parser.add_argument("--version", help="model version of the project (default: the active one)")


def _add_setting(group, name: str, kind: type, text: str, flag: str = "", choices=None) -> None:
    """An option for a training setting; its default is the setting's own."""
    default = _DEFAULTS[name]
    shown = f" (default: {default})" if default not in ("", 0, 0.0) else ""
    flag = flag or "--" + name.replace("_", "-")
    group.add_argument(flag, dest=name, type=kind, choices=choices, default=default, help=text + shown)


def _settings(arguments: argparse.Namespace) -> TrainingSettings:
    values = {name: getattr(arguments, name) for name in _DEFAULTS if hasattr(arguments, name)}
    if arguments.iterations is None:
        values["iterations"] = 0 if arguments.minutes else _DEFAULTS["iterations"]
    # People give sizes as left-right, front-back, up-down; arrays have the opposite order.
    values["spacing"] = tuple(reversed(arguments.voxel or (0.0, 0.0, 0.0)))
    values["patch"] = tuple(reversed(arguments.patch or (0, 0, 0)))
    settings = TrainingSettings(**values)
    inherited = ("network", "plane", "spacing", "patch", "intensity")
    if settings.parent and any(getattr(settings, name) != _DEFAULTS[name] for name in inherited):
        raise InputError(
            "--from takes network, plane, voxel size, patch and intensity from its version; leave them out."
        )
    return settings


def _report_to(bar, output: Output):
    def report(progress) -> None:
        bar.n = round(100 * progress.fraction)
        minutes, seconds = divmod(int(progress.seconds_left), 60)
        shown = {"left": f"{minutes}:{seconds:02d}", "loss": f"{progress.loss:.3f}"}
        if progress.dice is not None:
            report.dice = sum(progress.dice.values()) / max(len(progress.dice), 1)
        if report.dice is not None:
            shown["Dice"] = f"{report.dice:.3f}"
        bar.set_postfix(shown, refresh=False)
        bar.update(0)
        output.progress(
            task="train",
            iteration=progress.iteration,
            fraction=progress.fraction,
            seconds_left=progress.seconds_left,
            loss=progress.loss,
            learning_rate=progress.learning_rate,
            dice=progress.dice,
        )

    report.dice = None
    return report


@contextmanager
def _stop_on_interrupt():
    """A list that is empty until the user presses Ctrl+C; a second Ctrl+C ends the program at once."""
    interrupted: list[int] = []

    def stop(number, frame) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _targets(volumes: list[Path], out: Path, overwrite: bool) -> dict[Path, Path]:
    """Result file by volume."""
    if out.name.endswith(SEGMENTATION_ENDING):
        if len(volumes) > 1:
            raise InputError(f"{out} is one file, but there are {len(volumes)} volumes; give a folder to --out.")
        targets = {volumes[0]: out}
    elif is_image_file(out):
        raise InputError(f"{out} would be an image file; segmentations are written as .seg.nrrd, or into a folder.")
    else:
        names = [image_stem(os.path.abspath(v)) for v in volumes]  # "." has no name of its own
        twice = repeated(names)
        if twice:
            raise InputError(f'Two volumes have the name "{twice[0]}", so their results would too; rename one.')
        targets = {v: out / f"{name}{SEGMENTATION_ENDING}" for v, name in zip(volumes, names, strict=True)}
    replaced_inputs = {t.resolve() for t in targets.values()} & {v.resolve() for v in volumes}
    if replaced_inputs:
        raise InputError(f"{replaced_inputs.pop()} would replace the volume itself; choose another --out.")
    existing = [t for t in targets.values() if t.exists()]
    if existing and not overwrite:
        raise InputError(f"{existing[0]} exists already; add --overwrite to replace it.")
    return targets


def _naming(path: Path, work):
    """What `work` makes of the volume at `path`; its refusals name the file."""
    volume = read_volume(path)
    try:
        return work(volume)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
