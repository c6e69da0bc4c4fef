"""The demo with tiny settings: everything it promises to write is there, and it is honest about it."""

import json
import math
import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from PresenceSegTrainingLib.cli.main import main

STRUCTURES = ["cortical bone", "bone marrow", "subcutaneous fat", "quadriceps", "hamstrings", "adductors"]


@pytest.fixture(scope="module")
def demo(one_thread, tmp_path_factory):
    """One run of the demo with three steps of training: its folder, exit code and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **options: printed.append(" ".join(text)))
        code = main(["demo", "--out", str(out), "--iterations", "3"])
    return SimpleNamespace(out=out, code=code, text="\n".join(printed))


def header(path):
    image = sitk.ReadImage(str(path))
    return {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}


def segments(path):
    """Per segment: name, status, terminology and mask [k, j, i], from the file itself."""
    image, fields = sitk.ReadImage(str(path)), header(path)
    array = sitk.GetArrayFromImage(image)
    result = {}
    for n in range(sum(key.endswith("_Name") for key in fields)):
        tags = dict(tag.split(":", 1) for tag in fields[f"Segment{n}_Tags"].strip("|").split("|"))
        mask = array == int(fields[f"Segment{n}_LabelValue"])
        result[fields[f"Segment{n}_Name"]] = SimpleNamespace(tags=tags, mask=mask)
    return result


def test_the_demo_ends_well_and_writes_what_it_promises(demo):
    assert demo.code == 0
    names = [f"unseen {n}.seg.nrrd" for n in (1, 2, 3, 4)]
    assert sorted(p.name for p in (demo.out / "segmentations").iterdir()) == names
    assert sorted(p.name for p in demo.out.iterdir()) == ["overlay.png", "project", "segmentations", "summary.json"]
    assert str(demo.out) in demo.text


def test_the_summary_holds_a_dice_per_structure_and_the_seconds(demo):
    summary = json.loads((demo.out / "summary.json").read_text(encoding="utf-8"))
    assert set(summary) >= {"dice", "seconds"}
    assert list(summary["dice"]) == STRUCTURES
    assert all(0 <= dice <= 1 for dice in summary["dice"].values())
    assert summary["seconds"] > 0


def test_the_dice_of_the_summary_are_those_of_the_files(demo):
    summary = json.loads((demo.out / "summary.json").read_text(encoding="utf-8"))
    scores = {name: [] for name in STRUCTURES}
    for path in (demo.out / "segmentations").iterdir():
        truth = segments(demo.out / "project" / "cases" / path.name.removesuffix(".seg.nrrd") / "segmentation.seg.nrrd")
        found = segments(path)
        for name in STRUCTURES:
            both = (truth[name].mask & found[name].mask).sum()
            scores[name].append(2 * both / (truth[name].mask.sum() + found[name].mask.sum()))
    assert summary["dice"] == pytest.approx({name: np.mean(values) for name, values in scores.items()})


def test_the_dice_are_printed_beside_the_truth(demo):
    summary = json.loads((demo.out / "summary.json").read_text(encoding="utf-8"))
    for name in STRUCTURES:
        row = re.search(rf"^{name} +(\d+) +(\d+) +(\d+) +([\d.]+)$", demo.text, re.MULTILINE)
        annotated_in, truth, _, dice = row.groups()
        assert math.isclose(float(dice), summary["dice"][name], abs_tol=6e-4)
        volumes = []
        for n in (1, 2, 3, 4):
            path = demo.out / "project" / "cases" / f"unseen {n}" / "segmentation.seg.nrrd"
            voxel = np.prod(sitk.ReadImage(str(path)).GetSpacing())
            volumes.append(segments(path)[name].mask.sum() * voxel / 1000)
        assert abs(int(truth) - np.mean(volumes)) <= 0.5
        assert 1 <= int(annotated_in) <= 6


def test_no_training_case_has_more_than_two_structures_annotated_and_they_differ(demo):
    cases = sorted(p for p in (demo.out / "project" / "cases").iterdir() if p.name.startswith("thigh"))
    annotated = {case.name: frozenset(segments(case / "segmentation.seg.nrrd")) for case in cases}
    assert len(annotated) == 13
    assert sorted({len(names) for names in annotated.values()}) == [1, 2]
    assert set().union(*annotated.values()) == set(STRUCTURES)
    assert len(set(annotated.values())) > 6
    for name in sorted(annotated)[:12]:
        assert f"  {name}: {', '.join(sorted(annotated[name]))}\n" in demo.text


def test_the_confirmed_absent_structure_has_no_voxel(demo):
    case = segments(demo.out / "project" / "cases" / "thigh 13" / "segmentation.seg.nrrd")
    assert list(case) == ["adductors"]
    assert case["adductors"].tags["Segmentation.Status"] == "completed"
    assert not case["adductors"].mask.any()


def test_what_is_predicted_is_not_started_and_keeps_names_and_terminology(demo):
    truth = segments(demo.out / "project" / "cases" / "unseen 1" / "segmentation.seg.nrrd")
    found = segments(demo.out / "segmentations" / "unseen 1.seg.nrrd")
    assert list(found) == STRUCTURES
    for name, segment in found.items():
        assert segment.tags["Segmentation.Status"] == "notstarted"
        assert segment.tags["TerminologyEntry"] == truth[name].tags["TerminologyEntry"] != ""
    volume = sitk.ReadImage(str(demo.out / "project" / "cases" / "unseen 1" / "volume.nrrd"))
    image = sitk.ReadImage(str(demo.out / "segmentations" / "unseen 1.seg.nrrd"))
    last = [n - 1 for n in volume.GetSize()]
    assert image.GetSize() == volume.GetSize()
    assert np.allclose(image.TransformIndexToPhysicalPoint(last), volume.TransformIndexToPhysicalPoint(last), atol=1e-3)


def test_unseen_cases_did_not_train(demo):
    card = json.loads((demo.out / "project" / "models" / "v1" / "model.json").read_text(encoding="utf-8"))
    assert sorted(card["cases"]) == [f"thigh {n:02d}" for n in range(1, 14)]
    assert json.loads((demo.out / "project" / "project.json").read_text(encoding="utf-8"))["active_version"] == "v1"


def test_the_overlay_is_an_image_with_colors(demo):
    content = (demo.out / "overlay.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", content[16:26])
    assert (depth, kind) == (8, 2) and width > 100 and height > 100
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(demo.out / "overlay.png")))
    assert pixels.shape == (height, width, 3)
    colored = pixels.max(axis=2).astype(int) - pixels.min(axis=2) > 30
    image, truth, _ = np.split(colored, 3, axis=1)  # the third part is the prediction
    assert not image.any() and truth.mean() > 0.05


def test_the_demo_refuses_a_folder_with_something_in_it(capsys, snapshot, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert main(["demo", "--out", str(tmp_path / "out"), "--iterations", "3"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "out" / "notes.txt"), "--iterations", "3"]) == 2
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "options",
    [["--iterations", "-1"], ["--iterations", "0", "--minutes", "0"], ["--seed", "-1"], ["--device", "abacus"]],
    ids=" ".join,
)
def test_the_demo_refuses_impossible_settings_before_it_makes_anything(capsys, tmp_path, options):
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err.startswith("presenceseg: ")
    assert not list(tmp_path.iterdir())
