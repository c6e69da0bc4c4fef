"""The commands `new`, `import` and `info`: projects and what is in them."""

import argparse
from pathlib import Path

from PresenceSegLib.domain.case import State
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.importing import UNLABELLED, ImportOptions, import_cases, parse_mapping
from PresenceSegLib.domain.model import ModelCard, ModelVersion
from PresenceSegLib.domain.project import PresenceMatrix, Project
from PresenceSegLib.domain.segmentation import read_segmentation
from PresenceSegLib.domain.structure import Structure, StructureSet, read_structures
from PresenceSegLib.domain.volume import is_segmentation_file
from PresenceSegTrainingLib.cli.output import Output

_MARKS = {
    State.ANNOTATED: "●",
    State.ABSENT: "○",
    State.PREDICTED: "p",
    State.IN_PROGRESS: "~",
    State.FLAGGED: "!",
    State.UNTOUCHED: "·",
}
_MAX_LISTED_CASES = 40


def add_new(commands) -> None:
    parser = commands.add_parser(
        "new",
        help="make a project",
        description="Make a project: a folder with the list of structures, to which cases are then added by `import`.",
        epilog='Example: presenceseg new thigh --structures "quadriceps,hamstrings,femur"',
    )
    parser.add_argument("project", type=Path, help="folder to make; it must not exist yet or be empty")
    parser.add_argument("--name", help="name of the project (default: the folder's name)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--structures", metavar="NAME,NAME,...", help="names of the structures, in order")
    source.add_argument(
        "--structures-from",
        type=Path,
        metavar="FILE",
        help="take the structures, with colors and terminology, from a .csv (columns name, color as #rrggbb, "
        "terminology), a .json (a list, a project.json or a model.json) or a Slicer segmentation (.seg.nrrd)",
    )
    parser.set_defaults(command=run_new)


def run_new(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.structures is not None:
        structures = StructureSet.from_names(n.strip() for n in arguments.structures.split(","))
    elif is_segmentation_file(arguments.structures_from):
        segments = read_segmentation(arguments.structures_from).segments
        structures = StructureSet(Structure(s.name, s.color, s.terminology) for s in segments)
    else:
        structures = read_structures(arguments.structures_from)
    project = Project.create(arguments.project, arguments.name or arguments.project.resolve().name, structures)
    output.text(f'Project "{project.name}" with {len(structures)} structures: {", ".join(structures.names)}.')
    output.text(f"Next: presenceseg import {project.folder} --images ... --labels ... --map 1={structures.names[0]}")
    output.result(project=str(project.folder), structures=list(structures.names))


def add_import(commands) -> None:
    parser = commands.add_parser(
        "import",
        help="add images with partial labels to a project",
        description="Add images, with whatever labels they have, as cases. Labels may name only some of the "
        "structures: those become Completed in these cases and will be trained; all others stay un-annotated, and "
        "cost and teach nothing. Import again with another mapping for images from another source. Images that are "
        "in the project already, by name and voxels, get the new labels added. If anything is wrong with any file, "
        "nothing is imported.",
        epilog="Example: presenceseg import abdomen --images liver/img --labels liver/lab --map 1=liver,2=tumor",
    )
    parser.add_argument("project", type=Path, help="project folder")
    parser.add_argument(
        "--images", type=Path, required=True, help="image file, folder of images (NIfTI, NRRD, MHA), or DICOM folder(s)"
    )
    parser.add_argument("--labels", type=Path, help="label map or .seg.nrrd, or a folder of them named like the images")
    parser.add_argument(
        "--map",
        nargs="+",
        metavar="LABEL=NAME",
        help="which label is which structure: 1=liver 2=spleen, 4+5=lung to join labels, 3= to leave one out; for "
        ".seg.nrrd files segment names instead of numbers; or a .json or .csv file with that table",
    )
    parser.add_argument(
        "--annotated", metavar="NAME,...", help="only these are annotated; the other labels are guesses"
    )
    parser.add_argument("--absent", metavar="NAME,...", help="these are confirmed absent in every image of this import")
    parser.add_argument("--image-suffix", default="", help="ending of image names to ignore, for example _0000")
    parser.add_argument("--label-suffix", default="", help="ending of label names to ignore, for example _seg")
    parser.add_argument(
        "--subject-pattern",
        default="",
        metavar="REGEX",
        help="what in a name is the person, in ( ), so that scans of one person stay together: '(.+)_scan'",
    )
    parser.add_argument(
        "--split",
        default="",
        choices=["train", "validation", "test"],
        help="what the cases are for (default: training chooses some to validate on); test cases never train",
    )
    parser.add_argument(
        "--unlabelled",
        default="refuse",
        choices=UNLABELLED,
        help="images that have no label: refuse them all, skip these, or keep these to annotate later",
    )
    parser.add_argument(
        "--resample-labels", action="store_true", help="move labels on another grid to the image's by nearest neighbor"
    )
    parser.set_defaults(command=run_import)


def run_import(arguments: argparse.Namespace, output: Output) -> None:
    project = Project.open(arguments.project)
    options = ImportOptions(
        mapping=parse_mapping(arguments.map) if arguments.map else None,
        annotated=_names(arguments.annotated),
        absent=_names(arguments.absent) or (),
        image_suffix=arguments.image_suffix,
        label_suffix=arguments.label_suffix,
        subject_pattern=arguments.subject_pattern,
        split=arguments.split,
        resample=arguments.resample_labels,
        unlabelled=arguments.unlabelled,
    )
    report = import_cases(project, arguments.images, arguments.labels, options, output.loop("Reading"))
    if report.unused_labels:
        output.text(f"{len(report.unused_labels)} label files had no image: {', '.join(report.unused_labels[:5])} ...")
    output.text(f"{len(report.added)} cases added, {len(report.extended)} extended, {len(report.skipped)} skipped.")
    for name, count in report.annotated.items():
        empty = report.empty.get(name, 0)
        output.text(f"  {name}: annotated in {count}" + (f", confirmed absent in {empty} of them" if empty else ""))
    if not report.annotated:
        output.text(
            "  No structure is annotated in these cases, so they train nothing; --map or --annotated say which."
        )
    output.result(
        added=report.added,
        extended=report.extended,
        skipped=report.skipped,
        unused_labels=report.unused_labels,
        annotated=report.annotated,
        confirmed_absent=report.empty,
    )


def add_info(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="show a project or a model version",
        description="Show which structures are annotated in which cases of a project, and its model versions; or the "
        "card of one model version.",
    )
    parser.add_argument("folder", type=Path, help="project folder or model version folder")
    parser.set_defaults(command=run_info)


def run_info(arguments: argparse.Namespace, output: Output) -> None:
    model = ModelVersion(arguments.folder)
    if model.card_path.is_file():
        card = model.read_card()
        _show_card(card, output)
        output.result(**card.to_json())
        return
    project = Project.open(arguments.folder)
    matrix = project.presence_matrix()
    _show_matrix(project, matrix, output)
    versions = [m.read_card() for m in project.models()]
    _show_versions(project, versions, output)
    output.result(
        name=project.name,
        structures=list(project.structures.names),
        cases={c: [s.value for s in row] for c, row in zip(matrix.cases, matrix.states, strict=True)},
        versions={card.version: card.scores for card in versions},
        active_version=project.active_version,
    )


def open_model(arguments: argparse.Namespace) -> ModelVersion:
    """The model version that the options `--model` or `--project` and `--version` name."""
    if arguments.model is None:
        return Project.open(arguments.project).model(arguments.version or "")
    if arguments.version:
        raise InputError("--version belongs to --project; --model names the folder of one version by itself.")
    model = ModelVersion(arguments.model)
    if not model.card_path.is_file():
        raise InputError(f"{arguments.model} is no model version: it has no model.json.")
    return model


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(n.strip() for n in text.split(",") if n.strip())


def _show_matrix(project: Project, matrix: PresenceMatrix, output: Output) -> None:
    output.text(f'Project "{project.name}": {len(matrix.cases)} cases, {len(matrix.structures)} structures')
    output.text()
    states = (State.ANNOTATED, State.ABSENT, State.IN_PROGRESS, State.FLAGGED, State.PREDICTED)
    rows = [[name, *(matrix.count(name, s) for s in states)] for name in matrix.structures]
    output.table(["structure", *(s.value for s in states)], rows)
    if 0 < len(matrix.cases) <= _MAX_LISTED_CASES:
        output.text()
        output.text("  ".join(f"{mark} {state.value}" for state, mark in _MARKS.items()))
        width = max(map(len, matrix.cases))
        for case, row in zip(matrix.cases, matrix.states, strict=True):
            output.text(f"{case.ljust(width)}  {' '.join(_MARKS[s] for s in row)}")


def _show_versions(project: Project, cards: list[ModelCard], output: Output) -> None:
    output.text()
    if not cards:
        output.text("No model version yet.")
        return
    rows = [
        [
            card.version + (" (active)" if card.version == project.active_version else ""),
            card.parent or "-",
            card.created,
            len(card.cases),
            _mean_dice(card),
        ]
        for card in cards
    ]
    output.table(["version", "parent", "made", "cases", "mean Dice"], rows)


def _mean_dice(card: ModelCard) -> float | None:
    known = [s["dice"] for s in card.scores.values() if s["dice"] is not None]
    return sum(known) / len(known) if known else None


def _show_card(card: ModelCard, output: Output) -> None:
    plane = f", {card.network.plane} slices" if card.network.plane else ""
    spacing = "×".join("own" if s is None else f"{s:.4g}" for s in reversed(card.preprocessing.spacing))
    output.text(f"Model version {card.version} ({card.network.name}{plane}, {spacing} mm), made {card.created}")
    output.text(f"trained on {len(card.cases)} cases" + (f", from version {card.parent}" if card.parent else ""))
    output.text()
    trained = {s: sum(s in names for names in card.cases.values()) for s in card.structures.names}
    rows = [[s, trained[s], card.scores.get(s, {}).get("dice"), card.scores.get(s, {}).get("cases")] for s in trained]
    output.table(["structure", "annotated in", "Dice", "scored in"], rows)
