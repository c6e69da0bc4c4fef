"""Patches: centered only on what was annotated in their own case, balanced, repeatable, and honest about the outside.

The images hold the number of the voxel and the case, so that each patch tells where it came from.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegTrainingLib.engine.preparation import PreparedCase
from PresenceSegTrainingLib.engine.presence import IGNORE
from PresenceSegTrainingLib.engine.sampling import PatchSampler

SHAPE = (5, 6, 7)
VOXELS = 5 * 6 * 7


def case(number, presence, labels=None, shape=SHAPE):
    """A case whose image counts its voxels from number * 1000; structure c is the set of voxels labeled c + 1."""
    image = torch.arange(np.prod(shape), dtype=torch.float32).view(shape) + 1000 * number
    labels = torch.zeros(1, *shape, dtype=torch.uint8) if labels is None else labels
    presence = torch.tensor(presence, dtype=torch.bool)
    voxels = {}
    for c in torch.nonzero(presence)[:, 0].tolist():
        found = torch.nonzero((labels == c + 1).any(dim=0).flatten())[:, 0]
        if len(found):
            voxels[c] = found
    return PreparedCase(f"case {number}", image, labels, presence, voxels, (2.0, 1.0, 0.5 + number))


def striped(shape=SHAPE, count=3):
    """One layer of labels: structure n fills the planes of S with index n, n + count + 1, ..."""
    return (torch.arange(shape[0]) % (count + 1))[:, None, None].expand(shape)[None].to(torch.uint8)


def single_voxels(sampler, draws):
    """Case number and label of `draws` patches of a single voxel, which are the centers themselves."""
    batches = [sampler.draw(n, 8) for n in range(draws // 8)]
    images = torch.cat([b.images.flatten() for b in batches]).numpy()
    labels = torch.cat([b.labels.flatten() for b in batches]).numpy()
    return (images // 1000).astype(int), (images % 1000).astype(int), labels


def test_foreground_centers_lie_only_in_structures_annotated_in_their_own_case():
    cases = [
        case(0, [1, 0, 0], striped() * (striped() == 1)),
        case(1, [0, 1, 1], striped() * (striped() >= 2)),
        case(2, [0, 0, 0], striped()),
    ]
    numbers, voxels, labels = single_voxels(PatchSampler(cases, (1, 1, 1), 0.9999, 0), 1600)
    foreground = labels > 0
    assert foreground.mean() > 0.99
    assert set(zip(numbers[foreground], labels[foreground], strict=True)) == {(0, 1), (1, 2), (1, 3)}
    assert set(numbers) == {0, 1}
    expected = np.stack([c.labels[0].flatten().numpy() for c in cases])[numbers, voxels]
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9])
def test_cases_in_which_nothing_is_annotated_are_never_drawn(fraction):
    cases = [case(0, [0, 0, 0], striped()), case(1, [0, 1, 0], striped()), case(2, [0, 0, 0], striped())]
    numbers, _, _ = single_voxels(PatchSampler(cases, (1, 1, 1), fraction, 3), 400)
    assert set(numbers) == {1}


def test_the_rest_of_the_patches_come_from_anywhere_in_the_annotated_cases():
    cases = [case(0, [1, 0, 0], striped()), case(1, [0, 1, 0], striped())]
    numbers, voxels, _ = single_voxels(PatchSampler(cases, (1, 1, 1), 0.0, 1), 8000)
    for number in (0, 1):
        counts = np.bincount(voxels[numbers == number], minlength=VOXELS)
        assert counts.min() > 0  # 4000 draws over 210 voxels
        assert counts.sum() == pytest.approx(4000, rel=0.1)


def test_confirmed_absent_cases_are_visited_like_others_by_patches_from_anywhere():
    cases = [case(0, [1, 0, 0], striped()), case(1, [1, 1, 1], torch.zeros(1, *SHAPE, dtype=torch.uint8))]
    sampler = PatchSampler(cases, (1, 1, 1), 2 / 3, 0)
    numbers, _, labels = single_voxels(sampler, 2400)
    assert (numbers == 1).mean() == pytest.approx(1 / 6, abs=0.04)  # half of the third that comes from anywhere
    assert (labels[numbers == 1] == 0).all()
    presence = torch.cat([sampler.draw(n, 8).presence for n in range(20)])
    assert {tuple(p) for p in presence.tolist()} == {(True, False, False), (True, True, True)}


def test_only_confirmed_absent_structures_still_teach():
    cases = [case(0, [1, 0, 0], torch.zeros(1, *SHAPE, dtype=torch.uint8)), case(1, [0, 0, 0], striped())]
    numbers, _, labels = single_voxels(PatchSampler(cases, (1, 1, 1), 0.9, 0), 160)
    assert set(numbers) == {0} and set(labels) == {0}


def test_pairs_of_case_and_structure_are_balanced_by_the_square_root_of_how_often_the_structure_is_annotated():
    # structure 1 is annotated in one case, structure 2 in nine; big and small structures alike
    rare = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    rare[0, 0, 0, :2] = 1
    cases = [case(0, [1, 0], rare), *(case(n, [0, 1], (striped(count=1) * 2).byte()) for n in range(1, 10))]
    numbers, _, labels = single_voxels(PatchSampler(cases, (1, 1, 1), 0.9999, 7), 8000)
    # chances 1 : 9 / sqrt(9), and the same for each of the nine
    assert (labels == 1).mean() == pytest.approx(1 / 4, abs=0.02)
    for number in range(1, 10):
        assert (numbers == number).mean() == pytest.approx(1 / 12, abs=0.015)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 16), fraction=st.floats(0, 0.99), iteration=st.integers(0, 1000))
def test_every_batch_has_its_share_of_foreground(batch, fraction, iteration):
    labels = torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    labels[0, 3, 3, 3] = 1  # a patch from anywhere meets this voxel once in 8000
    sampler = PatchSampler([case(0, [1], labels, (20, 20, 20))], (1, 1, 1), fraction, 0)
    count = int((sampler.draw(iteration, batch).labels == 1).sum())
    assert abs(count - fraction * batch) <= 1.0001 or count == int(fraction * batch) + 2


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 12)] * 3),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 99),
    fraction=st.sampled_from([0.0, 0.99]),
)
def test_patches_are_windows_of_image_and_labels_and_ignore_what_lies_outside(size, shape, seed, fraction):
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (2, *shape)).astype(np.uint8))
    source = case(0, [1, 1], labels, shape)
    batch = PatchSampler([source], size, fraction, seed).draw(seed, 3)
    assert batch.images.shape == (3, 1, *size) and batch.images.dtype == torch.float32
    assert batch.labels.shape == (3, 2, *size) and batch.labels.dtype == torch.int32
    assert batch.presence.tolist() == [[True, True]] * 3
    assert batch.spacing.tolist() == [[2.0, 1.0, 0.5]] * 3
    for image, patch in zip(batch.images[:, 0].numpy(), batch.labels.numpy(), strict=True):
        inside = (patch >= 0).all(axis=0)
        assert (patch[:, ~inside] == IGNORE).all()
        # along each axis: the whole volume where the patch is larger, else the whole patch
        assert inside.sum() == np.prod([min(n, m) for n, m in zip(size, shape, strict=True)])
        where = image[inside].astype(int)
        assert len(set(where)) == len(where)
        np.testing.assert_array_equal(patch[:, inside], labels.flatten(1).numpy()[:, where])
        corner = np.array(np.unravel_index(where[0], shape))
        first = np.argwhere(inside)[0]
        for index in np.ndindex(*size):  # beyond the volume the nearest voxel goes on
            at = np.clip(corner - first + index, 0, np.array(shape) - 1)
            assert image[index] == np.ravel_multi_index(at, shape)


def test_the_center_of_a_patch_is_moved_by_up_to_a_quarter_but_keeps_the_structure_inside():
    labels = torch.zeros(1, 40, 40, 40, dtype=torch.uint8)
    labels[0, 20, 20, 20] = 1
    sampler = PatchSampler([case(0, [1], labels, (40, 40, 40))], (8, 8, 16), 0.9999, 0)
    places = torch.cat([torch.nonzero(sampler.draw(n, 8).labels == 1) for n in range(60)]).numpy()
    assert len(places) > 470  # nearly all 480 patches hold the voxel
    for axis, size in zip((2, 3, 4), (8, 8, 16), strict=True):
        np.testing.assert_array_equal(np.unique(places[:, axis]), np.arange(size // 4, 3 * size // 4 + 1))


def test_draws_depend_on_seed_and_iteration_and_on_nothing_else():
    cases = [case(n, [1, 1, n % 2], striped()) for n in range(3)]

    def drawn(seed, iteration, before=()):
        sampler = PatchSampler(cases, (3, 3, 3), 0.6, seed)
        for n in before:
            sampler.draw(n, 2)
        torch.rand(3), np.random.rand(3)
        return sampler.draw(iteration, 4)

    def same(a, b):
        return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("images", "labels", "presence"))

    assert same(drawn(5, 17), drawn(5, 17, before=(0, 1, 99)))
    assert not same(drawn(5, 17), drawn(5, 18))
    assert not same(drawn(5, 17), drawn(6, 17))


def test_cases_of_different_layers_share_a_batch_without_new_labels():
    one = case(0, [1, 1], striped(count=2))
    two_layers = torch.cat([striped(count=2), torch.zeros(1, *SHAPE, dtype=torch.uint8)])
    two_layers[1, 0, 0, 0] = 2
    batch = PatchSampler([one, case(1, [1, 1], two_layers)], (9, 4, 4), 0.5, 0).draw(0, 16)
    assert batch.labels.shape[1] == 2
    from_one = batch.images[:, 0, 4, 0, 0] < 1000
    assert 0 < from_one.sum() < 16
    added = batch.labels[from_one][:, 1]
    assert set(added.unique().tolist()) == {0, IGNORE}
    assert torch.equal(added == IGNORE, batch.labels[from_one][:, 0] == IGNORE)


def test_a_batch_moves_to_a_device_as_a_whole():
    batch = PatchSampler([case(0, [1], striped())], (2, 2, 2), 0.5, 0).draw(0, 2)
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.images, moved.labels, moved.presence)} == {"meta"}
