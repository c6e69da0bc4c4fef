"""Scores: Dice against MONAI and plain counting, only where annotated, with overlap, absence and intervals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice
from synthetic import add_case, grid, make_project, scene

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.segmentation import Status
from PresenceSegTrainingLib.engine.evaluation import (
    Evaluation,
    bootstrap_interval,
    dice_scores,
    evaluate,
    overlap_counts,
)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 6),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 9999),
)
def test_dice_agrees_with_monai_and_with_counting_voxels_in_any_layers(count, shape, layers, seed):
    rng = np.random.default_rng(seed)
    masks = [rng.random((count, *shape)) < rng.choice([0, 0.1, 0.6]) for _ in range(2)]
    stacks = []
    for own, number in zip(masks, layers, strict=True):
        # each structure as a whole in one layer; where a later one covers it, it loses the voxel
        stack = np.zeros((number, *shape), np.uint8)
        for c in range(count):
            stack[c % number][own[c]] = c + 1
        for c in range(count):
            own[c] = stack[c % number] == c + 1
        stacks.append(stack)
    truth, predicted = masks
    presence = rng.random(count) < 0.7

    intersection, in_truth, in_prediction = overlap_counts(*stacks, count)
    for c in range(count):
        assert intersection[c] == sum(truth[c][i] and predicted[c][i] for i in np.ndindex(shape))
    np.testing.assert_array_equal(in_truth, truth.sum(axis=(1, 2, 3)))
    np.testing.assert_array_equal(in_prediction, predicted.sum(axis=(1, 2, 3)))

    expected = compute_dice(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None]).numpy()[0]
    expected = np.where(presence, expected, np.nan)  # MONAI too says NaN where the truth is empty
    np.testing.assert_allclose(dice_scores(*stacks, presence), expected, atol=1e-6)


def test_wide_labels_are_counted_as_well():
    truth, predicted = np.array([[300, 300, 1, 0]], np.uint16), np.array([[300, 0, 1, 1]], np.int32)
    dice = dice_scores(truth, predicted, np.ones(300, bool))
    assert dice[299] == pytest.approx(2 / 3) and dice[0] == pytest.approx(2 / 3)
    assert np.isnan(dice[1:299]).all()


class Answering:
    """A model that answers with prepared labels, by the first voxel of the volume."""

    def __init__(self, structures):
        self.card, self.answers = SimpleNamespace(structures=structures), {}

    def segment(self, volume):
        answer = self.answers[float(volume.array.flat[0])]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "p")


def labels_of(masks):
    return np.sum([(n + 1) * m for n, m in enumerate(masks)], axis=0).astype(np.uint8)[None]


def answer(model, case, labels):
    model.answers[float(case.read_volume().array.flat[0])] = labels


def test_structures_are_scored_only_where_they_are_annotated(project):
    model = Answering(project.structures)
    first = add_case(project, "c1", ["core"], other={"rim": Status.IN_PROGRESS, "rod": Status.FLAGGED}, seed=1)
    second = add_case(project, "c2", ["core", "rod"], other={"rim": Status.NOT_STARTED}, seed=2)
    _, masks = scene(3, 1)
    answer(model, first, labels_of(masks))  # all right
    _, masks = scene(3, 2)
    half = masks.copy()
    half[0, :, :, ::2] = False
    answer(model, second, labels_of([half[0], masks[1], np.zeros_like(masks[2])]))

    result = evaluate(model, [first, second])

    kept = half[0].sum() / masks[0].sum()
    core = 2 * kept / (1 + kept)
    np.testing.assert_allclose(result.dice, [[1, np.nan, np.nan], [core, np.nan, 0]])
    assert (result.cases, result.structures) == (("c1", "c2"), ("core", "rim", "rod"))
    assert [result.count(s) for s in result.structures] == [2, 0, 1]
    assert result.mean("core") == pytest.approx((1 + core) / 2)
    assert result.mean("rim") is None and result.mean("rod") == 0
    assert result.overall() == pytest.approx((1 + core) / 4)
    assert result.scores() == {
        "core": {"dice": result.mean("core"), "cases": 2},
        "rim": {"dice": None, "cases": 0},
        "rod": {"dice": 0.0, "cases": 1},
    }
    assert not result.absent.any() and not result.false_positive.any()


def test_what_is_found_of_a_confirmed_absent_structure_is_a_false_positive_and_no_dice(project):
    model = Answering(project.structures)
    found = add_case(project, "c1", ["core"], absent=["rod"], seed=1)
    clean = add_case(project, "c2", ["core"], absent=["rod"], other={"rim": Status.IN_PROGRESS}, seed=2)
    _, masks = scene(3, 1)
    answer(model, found, labels_of(masks))
    _, masks = scene(3, 2)
    answer(model, clean, labels_of([masks[0], masks[1], np.zeros_like(masks[2])]))
    result = evaluate(model, [found, clean])
    assert result.absent.tolist() == [[False, False, True], [False, False, True]]
    assert result.false_positive.tolist() == [[False, False, True], [False, False, False]]
    assert np.isnan(result.dice[:, 2]).all() and result.mean("rod") is None
    assert result.interval("rod") is None


def test_a_structure_of_the_model_that_no_case_has_is_not_scored(project):
    model = Answering(make_project(project.folder.parent / "other", ("core", "foreign")).structures)
    case = add_case(project, "c", ["core", "rim"], seed=1)
    _, masks = scene(3, 1)
    answer(model, case, labels_of([masks[0], masks[1]]))
    result = evaluate(model, [case])
    assert result.mean("core") == 1 and result.mean("foreign") is None


def test_no_case_at_all_and_cases_that_cannot_be_segmented_are_refused(project):
    model = Answering(project.structures)
    with pytest.raises(InputError, match="no cases to evaluate"):
        evaluate(model, [])
    case = add_case(project, "c seven", ["core"])
    answer(model, case, InputError("The volume is too small."))
    with pytest.raises(InputError, match='Case "c seven": The volume is too small'):
        evaluate(model, [case])


def test_the_bar_wraps_the_cases(project):
    model, seen = Answering(project.structures), []
    case = add_case(project, "c", ["core"], on=grid())
    answer(model, case, labels_of(scene(3)[1]))
    evaluate(model, [case], lambda items, total: seen.append(total) or items)
    assert seen == [1]


def scores(values):
    column = np.array(values, float)[:, None]
    none = np.zeros(column.shape, bool)
    return Evaluation(tuple(f"c{n}" for n in range(len(values))), ("core",), column, none, none)


def test_intervals_are_those_of_the_mean_over_the_scored_cases():
    values = np.random.default_rng(0).normal(0.8, 0.1, 200)
    low, high = bootstrap_interval(values)
    # large numbers: the mean is normal, plus and minus 1.96 standard errors
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert scores([*values, np.nan, np.nan]).interval("core") == (low, high)


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30), seed=st.integers(0, 5))
def test_intervals_hold_the_mean_stay_within_the_values_and_are_repeatable(values, seed):
    low, high = scores(values).interval("core", seed)
    assert min(values) - 1e-12 <= low <= np.mean(values) + 1e-12
    assert np.mean(values) - 1e-12 <= high <= max(values) + 1e-12
    assert scores(values).interval("core", seed) == (low, high)
    if len(values) == 1:
        assert low == high == values[0]


def test_the_interval_of_a_few_cases_is_that_of_all_their_drawings():
    values = [0.2, 0.6, 1.0]
    # all 27 drawings with replacement: the extreme means 0.2 and 1.0 have a chance of 1 / 27 each, above 2.5 %
    assert scores(values).interval("core") == pytest.approx((0.2, 1.0))
