"""Prepared cases: what they hold, and when the cache on disk may stand in for the work."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import AXIS_ORDERS, CPU, add_case, grid, make_project, scene

from PresenceSegLib.domain.case import CaseInfo
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.model import Preprocessing
from PresenceSegLib.domain.segmentation import Segmentation, Status
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import Volume
from PresenceSegLib.engine.preprocessing import network_input
from PresenceSegTrainingLib.engine import preparation
from PresenceSegTrainingLib.engine.preparation import prepare_cases

AS_IT_IS = Preprocessing((None, None, None), {"kind": "mr"}, (8, 8, 8))
FINER = Preprocessing((1.0, 0.8, 1.0), {"kind": "mr"}, (8, 8, 8))


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "p")


def prepare(project, preprocessing=AS_IT_IS, structures=None, cache=None):
    structures, cache = structures or project.structures, cache or project.cache_folder
    return prepare_cases(project.cases(), structures, preprocessing, cache)


def same(one, other):
    return (
        torch.equal(one.image, other.image)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.presence, other.presence)
        and one.voxels.keys() == other.voxels.keys()
        and all(torch.equal(one.voxels[c], other.voxels[c]) for c in one.voxels)
        and (one.name, one.spacing) == (other.name, other.spacing)
    )


def test_a_prepared_case_holds_its_completed_structures_and_nothing_else(project):
    statuses = {"rim": Status.IN_PROGRESS, "rod": Status.FLAGGED}
    add_case(project, "c1", ["core"], other=statuses, seed=3)
    add_case(project, "c2", [], absent=["rod"], other={"core": Status.NOT_STARTED}, seed=4)
    add_case(project, "c3", ["rim", "core"], seed=5)
    one, two, three = prepare(project)
    assert [c.name for c in (one, two, three)] == ["c1", "c2", "c3"]
    assert [c.presence.tolist() for c in (one, two, three)] == [
        [True, False, False],
        [False, False, True],
        [True, True, False],
    ]
    core, rim, _ = scene(3, 3)[1]
    np.testing.assert_array_equal(one.labels[0].numpy(), core.astype(int))  # [S, P, L] is [k, j, i] here
    assert not two.labels.any() and two.voxels == {}
    core, rim, _ = scene(3, 5)[1]
    np.testing.assert_array_equal(three.labels[0].numpy(), core + 2 * rim)
    assert three.voxels.keys() == {0, 1}
    np.testing.assert_array_equal(three.voxels[1].numpy(), np.flatnonzero(rim))
    assert three.spacing == (2.0, 1.0, 1.0)


def test_structures_are_found_by_name_and_foreign_segments_are_left_out(project):
    add_case(project, "c", ["core", "rod"])
    structures = StructureSet.from_names(["rod", "elsewhere", "core"])
    prepared = prepare(project, structures=structures)[0]
    core, _, rod = scene(3)[1]
    np.testing.assert_array_equal(prepared.labels[0].numpy(), rod + 3 * core)
    assert prepared.presence.tolist() == [True, False, True]


@pytest.mark.parametrize("direction", AXIS_ORDERS[::7])
def test_image_labels_and_voxels_lie_on_the_same_network_grid(project, direction):
    add_case(project, "c", ["core", "rim", "rod"], on=grid((20, 18, 16), (1.0, 2.0, 1.5), direction))
    case, prepared = project.cases()[0], prepare(project, FINER)[0]
    expected = network_input(case.read_volume(), FINER, CPU)
    assert torch.equal(prepared.image, expected) and prepared.image.is_contiguous()
    assert prepared.labels.shape == (1, *expected.shape)
    lies = case.read_grid()
    for axis in range(3):
        extent = lies.canonical_spacing()[axis] * lies.axis_order().apply(np.zeros(lies.shape)).shape[axis]
        assert prepared.spacing[axis] * prepared.image.shape[axis] == pytest.approx(extent)
    for c, voxels in prepared.voxels.items():
        assert (prepared.labels[0].flatten()[voxels] == c + 1).all()
        assert len(voxels) == (prepared.labels == c + 1).sum()
        # structures are brighter one after another: the labels sit on their boxes
        assert prepared.image.flatten()[voxels].median() > prepared.image[prepared.labels[0] == 0].median() + 0.5


def test_overlapping_structures_are_kept_whole_in_layers(project):
    on = grid()
    array, masks = scene(3, 1)
    masks[1] |= masks[0]
    segmentation = Segmentation.empty(on)
    for structure, mask in zip(project.structures, masks, strict=True):
        segmentation.put(structure, mask, Status.COMPLETED)
    project.add_case("c", Volume(array, on), segmentation, CaseInfo("", "c"))
    prepared = prepare(project)[0]
    for c in range(3):
        np.testing.assert_array_equal((prepared.labels == c + 1).any(dim=0).numpy(), masks[c])
        np.testing.assert_array_equal(prepared.voxels[c].numpy(), np.flatnonzero(masks[c]))


def test_a_segmentation_stored_on_a_crop_of_the_volume_is_put_in_its_place(project):
    on = grid((24, 24, 12), (1.0, 1.0, 2.0))
    array, masks = scene(3, 2)
    crop = replace(on, size=(22, 21, 11), origin=tuple(np.add(on.origin, (2.0, 3.0, 2.0))))
    segmentation = Segmentation.empty(crop)
    masks[:, :1] = masks[:, :, :3] = masks[:, :, :, :2] = False
    segmentation.put(project.structures[1], masks[1][1:, 3:, 2:], Status.COMPLETED)
    project.add_case("c", Volume(array, on), segmentation, CaseInfo("", "c"))
    np.testing.assert_array_equal(prepare(project)[0].labels[0].numpy(), 2 * masks[1])


def test_more_than_255_structures_fit(tmp_path):
    project = make_project(tmp_path / "p", [f"s{n}" for n in range(1, 301)])
    segmentation = Segmentation.empty(grid())
    array, masks = scene(1)
    segmentation.put(project.structures.named("s300"), masks[0], Status.COMPLETED)
    project.add_case("c", Volume(array, grid()), segmentation, CaseInfo("", "c"))
    for _ in range(2):  # computed, then cached
        np.testing.assert_array_equal(prepare(project)[0].labels[0].numpy(), 300 * masks[0])


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared_once(project):
    add_case(project, "c", ["core", "rim"], seed=1)
    return project, prepare(project)[0]


def entries(project):
    return sorted(p.name for p in project.cache_folder.iterdir())


def mark_cache(project):
    """Change the image in the only cache entry, so that its use shows."""
    (path,) = project.cache_folder.iterdir()
    tensors = load_file(path)
    tensors["image"] = torch.full_like(tensors["image"], 7.0)
    save_file(tensors, path)


def used_cache(project, **changes):
    return bool((prepare(project, **changes)[0].image == 7).all())


def test_an_unchanged_case_comes_from_the_cache_and_is_the_same(prepared_once):
    project, computed = prepared_once
    assert same(prepare(project)[0], computed)
    mark_cache(project)
    assert used_cache(project)
    assert used_cache(project, preprocessing=replace(AS_IT_IS, patch=(16, 16, 16)))  # the patch changes nothing in it
    assert len(entries(project)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": replace(AS_IT_IS, spacing=(None, None, 1.5))},
        {"preprocessing": replace(AS_IT_IS, intensity={"kind": "ct", "low": 0, "high": 99, "mean": 5, "std": 2})},
        {"structures": StructureSet.from_names(["rim", "core", "rod"])},
        {"structures": StructureSet.from_names(["core", "rim", "rod", "new"])},
        {"structures": StructureSet.from_names(["core", "rim", "stick"])},
    ],
)
def test_other_structures_or_another_preprocessing_do_not_find_the_entry(prepared_once, changes):
    project, _ = prepared_once
    mark_cache(project)
    assert not used_cache(project, **changes)
    assert used_cache(project), "the old entry is still good for the old request"


def test_a_changed_segmentation_is_prepared_anew(prepared_once):
    project, before = prepared_once
    mark_cache(project)
    case = project.cases()[0]
    segmentation = case.read_segmentation()
    segmentation.named("rim").status = Status.IN_PROGRESS
    case.write_segmentation(segmentation)
    after = prepare(project)[0]
    assert torch.equal(after.image, before.image)
    assert after.presence.tolist() == [True, False, False]
    assert torch.equal(after.labels, before.labels * (before.labels == 1))


def test_a_volume_touched_later_is_prepared_anew(prepared_once):
    project, before = prepared_once
    mark_cache(project)
    path = project.cases()[0].volume_path
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))
    assert same(prepare(project)[0], before)


def test_another_case_with_files_of_the_same_times_has_its_own_entry(prepared_once):
    project, _ = prepared_once
    mark_cache(project)
    first = project.cases()[0]
    second = add_case(project, "d", ["core", "rim"], seed=1)
    for mine, other in ((first.volume_path, second.volume_path), (first.segmentation_path, second.segmentation_path)):
        stamp = mine.stat()
        os.utime(other, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    one, two = prepare(project)
    assert (one.image == 7).all() and not (two.image == 7).all()


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: whole[:3], lambda whole: b"\0" * len(whole)]
)
def test_a_damaged_entry_is_computed_and_written_again(prepared_once, damage):
    project, computed = prepared_once
    (path,) = project.cache_folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(prepare(project)[0], computed)
    assert path.read_bytes() == whole and entries(project) == [path.name]


def test_a_cache_that_cannot_be_written_stops_nothing(prepared_once, tmp_path):
    project, computed = prepared_once
    (tmp_path / "file").write_text("no folder")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        assert same(prepare(project, cache=cache)[0], computed)
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_disk_that_fills_up_stops_nothing_and_leaves_no_part_of_a_file(prepared_once, tmp_path, monkeypatch):
    project, computed = prepared_once

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert same(prepare(project, cache=tmp_path / "cache")[0], computed)
    assert list((tmp_path / "cache").iterdir()) == []


def test_progress_wraps_the_cases(prepared_once):
    project, _ = prepared_once
    seen = []

    def wrap(items, total):
        seen.append(total)
        yield from items

    assert len(prepare_cases(project.cases(), project.structures, AS_IT_IS, project.cache_folder, wrap)) == 1
    assert seen == [1]


@pytest.mark.parametrize("name", ["volume.nrrd", "segmentation.seg.nrrd"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_case_that_lost_or_damaged_a_file_is_refused_by_name(project, name, gone):
    add_case(project, "c one", ["core"])
    path = project.cases()[0].folder / name
    if gone:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match='Case "c one": .*' + name.replace(".", r"\.")):
        prepare(project)


def test_a_segmentation_on_another_grid_is_refused_by_name(project):
    array, _ = scene(3)
    segmentation = Segmentation.empty(grid(spacing=(1.1, 1.0, 2.0)))
    project.add_case("c", Volume(array, grid()), segmentation, CaseInfo("", "c"))
    with pytest.raises(InputError, match='Case "c": .*another grid'):
        prepare(project)


def test_large_structures_are_remembered_by_a_sample_of_their_voxels(project, monkeypatch):
    monkeypatch.setattr(preparation, "_MAX_VOXELS_PER_STRUCTURE", 50)
    add_case(project, "c", ["core", "rim"], seed=1)
    prepared = prepare(project)[0]
    for c in (0, 1):
        assert len(prepared.voxels[c].unique()) == 50
        assert (prepared.labels[0].flatten()[prepared.voxels[c]] == c + 1).all()


def test_a_structure_too_small_for_the_networks_voxels_is_not_taught_as_absent(project):
    coarse = Preprocessing((8.0, 8.0, 8.0), {"kind": "mr"}, (8, 8, 8))
    array, masks = scene(3, 1)
    masks[1] = False
    masks[1, 0, 0, 0] = True
    segmentation = Segmentation.empty(grid())
    for structure, mask in zip(project.structures, masks, strict=True):
        segmentation.put(structure, mask, Status.COMPLETED)
    project.add_case("c", Volume(array, grid()), segmentation, CaseInfo("made up", "c"))
    assert prepare(project)[0].presence.tolist() == [True, True, True]
    assert prepare(project, coarse)[0].presence.tolist() == [True, False, True]
