"""What one network learns from partial labels, beside single-structure networks, full labels and the naive way.

    python Testing/benchmarks/partial_labels.py --data ../shared/data/hippocampus

`--data` holds `images` and `labels` with the values 1 (anterior) and 2 (posterior). The cases are split by a fixed seed
into training and test cases; `posterior` is hidden in one half of the training cases and `anterior` in the other. Every
network is trained for the same number of steps on patches of the same size, and nothing is selected on the test cases.

    partial  one network, merged presence mask, from the partial labels
    paper    one network, presence mask `plus` with xent+0.1*logdice, from the partial labels
    single   two networks, one per structure, each from its own half
    full     one network from full labels of all training cases: what partial labels can at most reach
    naive    one network from the partial labels, what is missing taken as background (as confirmed absent)

Prints Markdown tables and, as its last line, one JSON object; `--work` keeps everything and makes a stopped run go on.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from PresenceSegLib.domain.files import make_folder, read_json, write_json
from PresenceSegLib.domain.importing import ImportOptions, import_cases
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import image_stem, is_image_file
from PresenceSegLib.engine.device import choose_device, describe_device
from PresenceSegLib.engine.inference import Model
from PresenceSegTrainingLib.domain.settings import TrainingSettings
from PresenceSegTrainingLib.engine.evaluation import bootstrap_interval, evaluate
from PresenceSegTrainingLib.engine.training import Training

STRUCTURES = {"anterior": "1", "posterior": "2"}
TEST_CASES = 40
PAPER = {"presence_mask": "plus", "loss": "xent+0.1*logdice"}


@dataclass(frozen=True)
class Network:
    """One network of the comparison: which project it is trained in, and how."""

    name: str
    project: str
    settings: dict


NETWORKS = (
    Network("partial", "partial", {}),
    Network("paper", "partial", PAPER),
    Network("single anterior", "only anterior", {}),
    Network("single posterior", "only posterior", {}),
    Network("full", "full", {}),
    Network("naive", "naive", {}),
)


def main() -> None:
    arguments = parse_arguments()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="partial_labels_"))
    make_folder(work)
    check_same_run(work / "arguments.json", arguments)
    device = choose_device(arguments.device)
    halves, test = split(arguments.data, arguments.seed, arguments.training_cases, arguments.test_cases)
    print(f"{sum(map(len, halves))} training cases, {len(test)} test cases, {describe_device(device)}", flush=True)
    folders = [
        copy_cases(arguments.data, names, work / "data" / label)
        for label, names in zip(("anterior", "posterior", "test"), (*halves, test), strict=True)
    ]
    results = {}
    for network in NETWORKS:
        path = work / f"{network.name}.json"
        if not path.exists():
            project = make_project(work / "projects" / network.project, network.project, folders)
            settings = TrainingSettings(
                iterations=arguments.iterations, validation_fraction=0, seed=arguments.seed, **network.settings
            )
            write_json(path, train_and_test(project, settings, device))
        results[network.name] = read_json(path, "result")
        print(f"{network.name}: {summary(results[network.name])}", flush=True)
    report(results, work)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--work", type=Path, help="folder for projects and results (default: a temporary one)")
    parser.add_argument("--iterations", type=int, default=1200, help="steps of each network (default: 1200)")
    parser.add_argument("--training-cases", type=int, help="use only so many training cases (default: all)")
    parser.add_argument("--test-cases", type=int, default=TEST_CASES, help=f"test cases (default: {TEST_CASES})")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the trainings (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--quick", action="store_true", help="a smoke figure in under 3 minutes: says nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.iterations, arguments.training_cases, arguments.test_cases = 60, 24, 10
    return arguments


def check_same_run(path: Path, arguments: argparse.Namespace) -> None:
    """A work folder holds the results of one set of arguments; others would mix."""
    wanted = {name: str(value) for name, value in vars(arguments).items() if name not in ("work", "device")}
    if path.exists() and read_json(path, "arguments") != wanted:
        raise SystemExit(f"{path.parent} holds a run with other arguments; choose another --work.")
    write_json(path, wanted)


def split(data: Path, seed: int, training_cases: int | None, test_cases: int):
    """Case names: (those in which only anterior is annotated, those with posterior only), and the test cases."""
    names = sorted(image_stem(p) for p in (data / "images").iterdir() if is_image_file(p))
    shuffled = np.random.default_rng(seed).permutation(names).tolist()
    test, training = shuffled[:test_cases], shuffled[test_cases:][:training_cases]
    half = len(training) // 2
    return (training[:half], training[half:]), test


def copy_cases(data: Path, names: list[str], target: Path) -> Path:
    """The cases as a folder with images/ and labels/, as a user would have them."""
    for kind in ("images", "labels"):
        folder = make_folder(target / kind)
        for path in (data / kind).iterdir():
            if is_image_file(path) and image_stem(path) in names:
                shutil.copy(path, folder)
    return target


def make_project(folder: Path, kind: str, sources: list[Path]) -> Project:
    """The project of one kind of labels; test cases are annotated in all of its structures."""
    if (folder / "project.json").exists():
        return Project.open(folder)
    half_anterior, half_posterior, test = sources
    names = [kind.removeprefix("only ")] if kind.startswith("only ") else list(STRUCTURES)
    project = Project.create(folder, kind, StructureSet.from_names(names))
    if kind == "full":
        add(project, half_anterior, names)
        add(project, half_posterior, names)
    else:
        for source, name in ((half_anterior, "anterior"), (half_posterior, "posterior")):
            if name in names:
                add(project, source, [name], absent=[n for n in names if n != name] if kind == "naive" else [])
    add(project, test, names, split="test")
    return project


def add(project: Project, source: Path, names: list[str], absent=(), split: str = "") -> None:
    mapping = {value: name if name in names else "" for name, value in STRUCTURES.items()}
    options = ImportOptions(mapping=mapping, absent=tuple(absent), split=split)
    import_cases(project, source / "images", source / "labels", options)


def train_and_test(project: Project, settings: TrainingSettings, device) -> dict:
    version = Training.begin(project, settings, device).run(device)
    tests = [c for c in project.cases() if c.info.split == "test"]
    evaluation = evaluate(Model.load(version, device), tests)
    dice = {name: evaluation.dice[:, n].tolist() for n, name in enumerate(evaluation.structures)}
    return {"seconds": read_json(version.folder / "report.json", "report")["seconds"], "dice": dice}


def summary(result: dict) -> str:
    scores = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in result["dice"].items())
    return f"{scores}, {result['seconds']:.0f} s"


def report(results: dict[str, dict], work: Path) -> None:
    """Print the tables and the figures; write the figures to figures.json."""
    results = dict(results)
    singles = [results.pop("single anterior"), results.pop("single posterior")]
    results["single"] = {
        "seconds": sum(s["seconds"] for s in singles),
        "dice": {k: v for s in singles for k, v in s["dice"].items()},
    }
    print("\n| network | anterior | posterior | mean | mean minus single | training s |")
    print("|---|---|---|---|---|---|")
    for name in ("partial", "paper", "single", "full", "naive"):
        dice = results[name]["dice"]
        columns = [with_interval(np.array(dice[s])) for s in STRUCTURES]
        mean = np.mean([dice[s] for s in STRUCTURES], axis=0)
        difference = mean - np.mean([results["single"]["dice"][s] for s in STRUCTURES], axis=0)
        columns += [with_interval(mean), "" if name == "single" else with_interval(difference, sign="+")]
        print(f"| {name} | {' | '.join(columns)} | {results[name]['seconds']:.0f} |")
    figures = {
        f"dice_{name}": round(float(np.mean([results[name]["dice"][s] for s in STRUCTURES])), 4)
        for name in ("partial", "paper", "single", "full", "naive")
    }
    figures["time_partial_over_single"] = round(results["partial"]["seconds"] / results["single"]["seconds"], 3)
    write_json(work / "figures.json", figures)
    print(f"\nPer-case results are in {work}.")
    print(json.dumps(figures))


def with_interval(values: np.ndarray, sign: str = "") -> str:
    """Mean over cases with its 95 % bootstrap interval."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


if __name__ == "__main__":
    main()
