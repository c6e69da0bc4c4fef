"""Importing images with partial labels into a project: everything is read and checked first, then stored.

Each import has one mapping from label values (or segment names) to structures; several imports with different mappings
into one project are how partial labels from different sources come together.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from PresenceSegLib.domain.case import Case, CaseInfo
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import make_folder, move, staging_folder
from PresenceSegLib.domain.names import check_case_name, repeated
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.segmentation import Segment, Segmentation, Status, read_segmentation
from PresenceSegLib.domain.structure import Structure
from PresenceSegLib.domain.volume import (
    Volume,
    dicom_series,
    image_stem,
    is_image_file,
    is_segmentation_file,
    read_dicom_series,
    read_label_map,
    read_volume,
)

UNLABELLED = ("refuse", "skip", "keep")
_HEADER_WORDS = ("label", "labels", "value", "id", "index", "segment", "name", "number")  # of a table's first column
IGNORED = ""  # the structure name that a mapping gives to label values which are to be left out


@dataclass(frozen=True)
class ImportOptions:
    """How one import reads its files.

    Attributes:
        mapping: label value (as text) or segment name -> structure name, or IGNORED. Without a mapping, segments of
            `.seg.nrrd` files are matched by name and keep their statuses.
        annotated: structures that become Completed; None means every mapped one. The others come in as predictions.
        absent: structures confirmed absent in every case of this import.
        image_suffix, label_suffix: endings of the file names (before .nii.gz and the like) that are no part of the
            case's name, for example `_0000` and `_seg`.
        subject_pattern: regular expression whose first group, searched in the case name, is the subject.
        split: "train", "validation", "test" or "".
        resample: move labels on another grid to the volume's grid by nearest neighbor instead of refusing them.
        unlabelled: what to do with images that have no label: "refuse", "skip" or "keep" (without annotation).
    """

    mapping: dict[str, str] | None = None
    annotated: tuple[str, ...] | None = None
    absent: tuple[str, ...] = ()
    image_suffix: str = ""
    label_suffix: str = ""
    subject_pattern: str = ""
    split: str = ""
    resample: bool = False
    unlabelled: str = "refuse"


@dataclass
class ImportReport:
    """What an import did: names of the cases, and per structure in how many of them it is now annotated.

    `unused_labels` are label files for which there was no image; `empty` counts the cases of `annotated` in which the
    structure is confirmed absent.
    """

    added: list[str] = field(default_factory=list)
    extended: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unused_labels: list[str] = field(default_factory=list)
    annotated: dict[str, int] = field(default_factory=dict)
    empty: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Image:
    name: str
    path: Path
    series: str = ""

    def read(self) -> Volume:
        return read_dicom_series(self.path, self.series) if self.series else read_volume(self.path)


def import_cases(
    project: Project,
    images: str | Path,
    labels: str | Path | None,
    options: ImportOptions,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> ImportReport:
    """Import images, with labels of the same names, as cases of a project.

    Args:
        images: an image file, a folder of image files, a DICOM folder, or a folder of DICOM folders.
        labels: a label file for one image, or a folder of them; None for images without labels.
        progress: wraps the loop over the images, for a progress bar.

    An image that is a case of the project already (same name, same voxels) gets the new segments added to it.

    Raises:
        InputError: anything at all is wrong with any file; the project is then as it was.
    """
    _check_names(project, options)
    if labels is None and (options.mapping is not None or options.annotated):
        raise InputError("There is a mapping or a list of annotated structures, but there are no labels; give both.")
    pairs, unused = _pairs(Path(images), Path(labels) if labels else None, options)
    report = ImportReport(unused_labels=unused)
    if labels and options.unlabelled == "skip":
        report.skipped = [image.name for image, label in pairs if label is None]
        pairs = [(image, label) for image, label in pairs if label is not None]
    with staging_folder(project.folder) as staging:
        for image, label in progress(pairs, len(pairs)):
            try:
                segmentation = _stage(project, staging, image, label, options)
            except InputError as error:
                raise InputError(f'Case "{image.name}": {error}') from error
            _count(report, segmentation, project)
        missing = [name for name in options.annotated or () if name not in report.annotated]
        if missing:
            raise InputError(f'"{missing[0]}" is given as annotated but is in none of the labels; check the name.')
        _commit(project, staging, report)
    return report


def parse_mapping(entries: Iterable[str]) -> dict[str, str]:
    """Mapping from texts like `1=liver`, `2=spleen`, `3=` (left out) and `4+5=lung` (joined), or from one file.

    A `.json` file holds an object {"1": "liver"}; a `.csv` file has the label value in its first column and the
    structure in its second, with or without a header; value 0 is always background.

    Raises InputError for a value given twice, or a structure named twice other than by joining with `+`.
    """
    pairs: list[tuple[str, str]] = []
    for entry in entries:
        if "=" not in entry and Path(entry).suffix.lower() in (".json", ".csv"):
            pairs += _read_mapping(Path(entry))
        else:
            pairs += [_parse_pair(text) for text in entry.split(",") if text.strip()]
    pairs = [(values, name) for values, name in pairs if values != "0"]
    with_background = [name for values, name in pairs if "0" in (v.strip() for v in values.split("+"))]
    if with_background:
        raise InputError(f'The mapping joins label 0 to "{with_background[0]}", but 0 is always background.')
    named_twice = repeated([name for _, name in pairs if name != IGNORED])
    if named_twice:
        raise InputError(
            f'The mapping names the structure "{named_twice[0]}" twice; to join two labels write, for example, '
            f"4+5={named_twice[0]}."
        )
    mapping = [(value.strip(), name) for values, name in pairs for value in values.split("+")]
    given_twice = repeated([value for value, _ in mapping])
    if given_twice:
        raise InputError(f"The mapping gives the label {given_twice[0]} twice; give each label one structure.")
    return dict(mapping)


def _parse_pair(text: str) -> tuple[str, str]:
    values, separator, name = text.partition("=")
    if not separator or not values.strip():
        raise InputError(f'"{text}" is no mapping; write LABEL=STRUCTURE, for example 1=liver.')
    return values.strip(), name.strip()


def _read_mapping(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            # As pairs, since a dict would silently keep only the last of two equal labels.
            return [(str(value), str(name)) for value, name in json.loads(text, object_pairs_hook=list)]
        rows = [row for row in csv.reader(text.splitlines()) if len(row) >= 2]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"The mapping {path} cannot be read ({error}).") from error
    if rows and rows[0][0].strip().casefold() in _HEADER_WORDS:
        rows = rows[1:]
    return [(row[0].strip(), row[1].strip()) for row in rows]


def _check_names(project: Project, options: ImportOptions) -> None:
    """Refuse options that name structures which the project does not have, or that contradict each other."""
    mapped = [name for name in (options.mapping or {}).values() if name != IGNORED]
    annotated = list(options.annotated or ())
    for name in [*mapped, *annotated, *options.absent]:
        project.structures.channel(name)
    both = set(options.absent) & {*mapped, *annotated}
    if both:
        raise InputError(f'"{sorted(both)[0]}" is given as absent and as annotated; decide for one.')
    unmapped = set(annotated) - set(mapped) if options.mapping is not None else set()
    if unmapped:
        raise InputError(f'"{sorted(unmapped)[0]}" is given as annotated but no label is mapped to it.')
    if options.unlabelled not in UNLABELLED:
        raise InputError(f'"{options.unlabelled}" is no way to treat unlabelled images; use {", ".join(UNLABELLED)}.')


def _pairs(
    images: Path, labels: Path | None, options: ImportOptions
) -> tuple[list[tuple[_Image, Path | None]], list[str]]:
    """Images with their label files, matched by name, and the names of label files that match no image."""
    found = _find_images(images, options.image_suffix)
    twice = repeated([image.name.casefold() for image in found])  # some file systems do not tell A from a
    if twice:
        raise InputError(f'Two images in {images} have the name "{twice[0]}"; rename one, names tell cases apart.')
    for image in found:
        check_case_name(image.name)
    label_of = _find_labels(labels, options.label_suffix) if labels else {}
    if len(found) == 1 and labels and labels.is_file():
        label_of = {found[0].name: labels}
    missing = [image.name for image in found if image.name not in label_of]
    if labels and missing and options.unlabelled == "refuse":
        raise InputError(
            f"{len(missing)} of {len(found)} images have no label of the same name in {labels} ({_some(missing)}); "
            "check the suffixes, or choose to skip or keep unlabelled images."
        )
    unused = sorted(set(label_of) - {image.name for image in found})
    return [(image, label_of.get(image.name)) for image in found], unused


def _find_images(source: Path, suffix: str) -> list[_Image]:
    if source.is_file():
        return [_Image(_strip(image_stem(source), suffix), source)]
    if not source.is_dir():
        raise InputError(f"There is no file or folder {source}; check the path.")
    own = _series(source)
    if own:
        return own
    found = []
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += _series(path)
        elif is_image_file(path) and not is_segmentation_file(path) and image_stem(path).endswith(suffix):
            found.append(_Image(_strip(image_stem(path), suffix), path))
    if not found:
        raise InputError(f"The folder {source} holds no images (NIfTI, NRRD, MHA or DICOM folders).")
    return found


def _series(folder: Path) -> list[_Image]:
    series, name = dicom_series(folder), Path(os.path.abspath(folder)).name  # "." has no name of its own
    if len(series) == 1:
        return [_Image(name, folder, series[0])]
    return [_Image(f"{name}_{n}", folder, uid) for n, uid in enumerate(series, start=1)]


def _find_labels(labels: Path, suffix: str) -> dict[str, Path]:
    if not labels.exists():
        raise InputError(f"There is no file or folder {labels}; check the path.")
    files = [labels] if labels.is_file() else sorted(labels.iterdir())
    files = [f for f in files if is_image_file(f) and not f.name.startswith(".") and image_stem(f).endswith(suffix)]
    if not files:
        raise InputError(f"{labels} holds no label maps or .seg.nrrd files; check the path and the suffix.")
    names = [_strip(image_stem(f), suffix) for f in files]
    twice = repeated(names)
    if twice:
        raise InputError(f'Two label files in {labels} have the name "{twice[0]}"; keep one of them.')
    return dict(zip(names, files, strict=True))


def _strip(stem: str, suffix: str) -> str:
    return stem[: -len(suffix)] if suffix and stem.endswith(suffix) else stem


def _stage(project: Project, staging: Path, image: _Image, label: Path | None, options: ImportOptions) -> Segmentation:
    """Read and check one image with its label and write what will be stored into the staging folder."""
    volume = image.read()
    existing = Case(project.folder / "cases" / image.name)
    segmentation = Segmentation.empty(volume.grid)
    if existing.folder.is_dir():
        _check_same_case(existing, volume, options)
        segmentation = _stored_segmentation(existing, volume)
    if label is not None:
        if is_segmentation_file(label):
            _add_segments(segmentation, read_segmentation(label), label, volume, project, options)
        else:
            _add_label_map(segmentation, read_label_map(label), label, volume, project, options)
    for name in options.absent:
        _annotate(segmentation, project.structures.named(name), np.zeros(volume.grid.shape, bool), Status.COMPLETED)

    staged = Case(staging / image.name)
    make_folder(staged.folder)
    if existing.folder.is_dir():
        staged.write_segmentation(segmentation)
    else:
        info = CaseInfo(image.path.name, _subject(image.name, options.subject_pattern), options.split)
        staged.write(volume, segmentation, info)
    return segmentation


def _stored_segmentation(case: Case, volume: Volume) -> Segmentation:
    """The case's segmentation on the grid of its volume; it will be stored again, so nothing of it may be lost."""
    stored = case.read_segmentation()
    segmentation = stored.on_grid(volume.grid)
    if np.count_nonzero(segmentation.layers) != np.count_nonzero(stored.layers):
        raise InputError("its segmentation in the project reaches beyond the volume; crop it in Slicer first.")
    return segmentation


def _check_same_case(case: Case, volume: Volume, options: ImportOptions) -> None:
    """Refuse to add to a case of the same name that is another one, or that is used for something else."""
    info = case.info
    if options.split and options.split != info.split:
        raise InputError(f'the project has it with the split "{info.split}", which an import does not change.')
    if options.subject_pattern and _subject(case.name, options.subject_pattern) != info.subject:
        raise InputError(f'the project has it with the subject "{info.subject}", which an import does not change.')
    stored = case.read_volume()
    if not stored.grid.same_as(volume.grid) or not np.array_equal(stored.array, volume.array):
        raise InputError("the project has a case of this name with another volume; rename the image.")


def _add_label_map(segmentation, label_map, path, volume, project, options) -> None:
    """Add the structures of a label map to a segmentation, by the mapping of the import."""
    if options.mapping is None:
        raise InputError(f"{path} is a label map, which holds numbers only: give a mapping, for example 1=liver.")
    try:
        values_of = _values_by_structure(options.mapping)
    except ValueError as error:
        raise InputError(f"{path} is a label map, but the mapping has a label that is no number ({error}).") from error
    unnamed = [int(v) for v in np.unique(label_map.array) if v != 0 and str(int(v)) not in options.mapping]
    if unnamed:
        raise InputError(
            f"{path} holds the label {_some(unnamed)} that the mapping does not name; add it to the mapping, or write "
            f"{unnamed[0]}= to leave it out."
        )
    array = _label_array_on_grid(label_map, path, volume, options.resample)
    for name, values in values_of.items():
        mask = np.isin(array, values)
        if not mask.any() and np.isin(label_map.array, values).any():
            raise InputError(
                f'Nothing of "{name}" in {path} is left on the grid of the image, it lies outside of it or is too '
                f"small: the label has {label_map.grid.describe()}; the image has {volume.grid.describe()}."
            )
        status = Status.COMPLETED if options.annotated is None or name in options.annotated else Status.NOT_STARTED
        _annotate(segmentation, project.structures.named(name), mask, status)


def _values_by_structure(mapping: dict[str, str]) -> dict[str, list[int]]:
    result: dict[str, list[int]] = {}
    for value, name in mapping.items():
        number = int(value)
        if name != IGNORED:
            result.setdefault(name, []).append(number)
    return result


def _label_array_on_grid(label_map: Volume, path: Path, volume: Volume, resample: bool) -> np.ndarray:
    if label_map.grid.same_as(volume.grid):
        return label_map.array
    if not resample:
        raise InputError(
            f"{path} lies on another grid than its image: the label has {label_map.grid.describe()}; the image has "
            f"{volume.grid.describe()}; ask for resampling if both show the same patient in the same place."
        )
    return Segmentation(label_map.array[np.newaxis], label_map.grid).resampled(volume.grid).layers[0]


def _add_segments(segmentation, source, path, volume, project, options) -> None:
    """Add the segments of a `.seg.nrrd` file: mapped ones as structures, all others as they are."""
    mapping = options.mapping or {}
    unknown = [name for name in mapping if source.named(name) is None]
    if unknown:
        names = _some([s.name for s in source.segments])
        raise InputError(f'{path} has no segment named "{unknown[0]}"; it has: {names}.')
    try:
        moved = source.resampled(volume.grid) if options.resample else source.on_grid(volume.grid)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for name, segments in _segments_by_name(moved, path, mapping).items():
        if name == IGNORED:
            continue
        if name not in project.structures:
            segmentation.add(segments[0], moved.mask(segments[0]))
            continue
        mask = np.any([moved.mask(s) for s in segments], axis=0)
        status = segments[0].status if segments[0].name not in mapping else Status.COMPLETED
        if options.annotated is not None:
            status = Status.COMPLETED if name in options.annotated else Status.NOT_STARTED
        structure = project.structures.named(name)
        # The project's colors and terminology are what a structure looks like; a file fills in what the project lacks.
        structure = replace(structure, terminology=structure.terminology or segments[0].terminology)
        _annotate(segmentation, structure, mask, status)
        for segment in segments:
            segmentation.named(name).tags.update(segment.tags)


def _segments_by_name(source: Segmentation, path: Path, mapping: dict[str, str]) -> dict[str, list[Segment]]:
    """The segments of a file by the name that they get; only a mapping joins several under one name."""
    result: dict[str, list[Segment]] = {}
    for segment in source.segments:
        result.setdefault(mapping.get(segment.name, segment.name), []).append(segment)
    for name, segments in result.items():
        unmapped = any(s.name not in mapping for s in segments)
        if len(segments) > 1 and (unmapped or len({s.name for s in segments}) < len(segments)):
            raise InputError(
                f'{path} has {len(segments)} segments that would be "{name}"; rename them in Slicer, join them in the '
                f'mapping, or leave one out, for example with "{segments[0].name}=".'
            )
    return result


def _annotate(segmentation: Segmentation, structure: Structure, mask: np.ndarray, status: Status) -> None:
    """Put a structure into a segmentation; what a person has worked on there is not overwritten."""
    present = segmentation.named(structure.name)
    if present is not None and present.status is not Status.NOT_STARTED:
        raise InputError(f'"{structure.name}" is in this case already ({present.status.value}); it is not overwritten.')
    segmentation.put(structure, mask, status)


def _subject(name: str, pattern: str) -> str:
    if not pattern:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise InputError(f'The subject pattern "{pattern}" is no regular expression ({error}).') from error
    if not match or not match.groups() or not match.group(1):
        raise InputError(f'the subject pattern "{pattern}" finds no subject in "{name}"; it needs one group in ( ).')
    return match.group(1)


def _count(report: ImportReport, segmentation: Segmentation, project: Project) -> None:
    for segment in segmentation.segments:
        if segment.status is Status.COMPLETED and segment.name in project.structures:
            report.annotated[segment.name] = report.annotated.get(segment.name, 0) + 1
            if not segmentation.mask(segment).any():
                report.empty[segment.name] = report.empty.get(segment.name, 0) + 1


def _commit(project: Project, staging: Path, report: ImportReport) -> None:
    """Move the staged cases into the project: renames only, so that little can go wrong any more."""
    for folder in sorted(staging.iterdir()):
        case = Case(project.folder / "cases" / folder.name)
        if case.folder.is_dir():
            move(Case(folder).segmentation_path, case.segmentation_path)
            report.extended.append(case.name)
        else:
            move(folder, case.folder)
            report.added.append(case.name)


def _some(names: list) -> str:
    return ", ".join(str(n) for n in names[:5]) + (" ..." if len(names) > 5 else "")
