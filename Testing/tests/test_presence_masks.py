"""Presence masks: which labels survive, how un-annotated structures join the background, what a voxel weighs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegTrainingLib.engine.presence import IGNORE, merge_unannotated, present_labels, voxel_mask


def test_labels_of_unannotated_structures_become_background():
    labels = torch.tensor([[[[0, 1, 2, 3]]], [[[0, 1, 2, 3]]]], dtype=torch.uint8)
    presence = torch.tensor([[1, 0, 1], [0, 0, 0]])
    kept = present_labels(labels, presence)
    assert kept.tolist() == [[[[0, 1, 0, 3]]], [[[0, 0, 0, 0]]]]


def test_an_unannotated_layer_does_not_hide_the_annotated_structure_below_it():
    labels = torch.tensor([1, 3]).view(1, 2, 1, 1)
    kept = present_labels(labels, torch.tensor([[True, True, False]]))
    assert kept.amax(dim=1).item() == 1


def test_a_voxel_ignored_in_one_layer_is_ignored_in_all():
    labels = torch.tensor([[2, IGNORE], [0, 1]]).T.reshape(1, 2, 1, 2)  # voxel 0: layers 2, -1; voxel 1: layers 0, 1
    kept = present_labels(labels, torch.ones(1, 2))
    assert kept[0, :, 0, 0].tolist() == [IGNORE, IGNORE]
    assert kept[0, :, 0, 1].tolist() == [0, 1]


@settings(max_examples=40, deadline=None)
@given(
    presence=st.integers(1, 4).flatmap(
        lambda count: st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=1, max_size=3)
    ),
    shape=st.one_of(st.tuples(*[st.integers(1, 3)] * 2), st.tuples(*[st.integers(1, 3)] * 3)),
    seed=st.integers(0, 2**16),
)
def test_merged_probabilities_are_the_sums_of_the_softmax(presence, shape, seed):
    presence = np.array(presence)
    logits = np.random.default_rng(seed).normal(0, 4, (len(presence), 1 + presence.shape[1], *shape))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for item, annotated in enumerate(presence):
        for channel in range(1, len(annotated) + 1):
            if not annotated[channel - 1]:
                expected[item, 0] += expected[item, channel]
                expected[item, channel] = 0

    log_q = merge_unannotated(torch.tensor(logits), torch.tensor(presence))

    assert log_q.dtype == torch.float32
    assert log_q.isfinite().all()
    np.testing.assert_allclose(log_q.exp().numpy(), expected, atol=2e-6)


def test_background_is_certain_where_nothing_is_annotated():
    logits = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0)) * 30
    log_q = merge_unannotated(logits, torch.zeros(2, 5))
    assert (log_q[:, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_large_half_precision_logits_is_finite(dtype):
    logits = torch.tensor([60.0, -60.0, 60.0, -60.0], dtype=dtype).view(1, 4, 1, 1).requires_grad_()
    log_q = merge_unannotated(logits, torch.tensor([[1, 0, 1]]))
    log_q.sum().backward()
    rare = -120 - np.log(2)  # background and structure 2 share the probability that their two logits of 60 stand for
    assert log_q[0, [0, 1, 3]].flatten().tolist() == pytest.approx([0, rare, rare], abs=1e-4)
    assert logits.grad.isfinite().all()


# Structure 1 is annotated, structure 2 is not. Columns: label, argmax, base, or, plus; by hand from the formulas.
MASK_TABLE = [
    (0, 0, 0, 0, 0),
    (0, 1, 0, 1, 1),
    (0, 2, 0, 0, 0),
    (1, 0, 1, 1, 1),
    (1, 1, 1, 1, 2),
    (1, 2, 1, 1, 1),
    (IGNORE, 1, 0, 0, 0),
    (IGNORE, 0, 0, 0, 0),
]


def mask_of(mode, label, argmax, presence, class_weights):
    logits = torch.zeros(1, 3, 1, 1)
    logits[0, argmax] = 5
    mask = voxel_mask(mode, torch.full((1, 1, 1), label), logits, torch.tensor([presence]), torch.tensor(class_weights))
    assert mask.shape == (1, 1, 1)
    return mask.item()


@pytest.mark.parametrize(("label", "argmax", "base", "either", "both"), MASK_TABLE)
def test_voxel_masks_of_the_paper(label, argmax, base, either, both):
    for mode, expected in (("base", base), ("or", either), ("plus", both)):
        assert mask_of(mode, label, argmax, [1, 0], [0.0, 1.0, 1.0]) == expected


def test_voxel_masks_follow_class_weights_and_count_the_background_as_present():
    weights = [0.5, 2.0, 4.0]
    assert mask_of("base", 0, 1, [1, 1], weights) == 0.5
    assert mask_of("or", 0, 1, [1, 1], weights) == 2.5
    assert mask_of("or", 2, 1, [1, 1], weights) == 6
    assert mask_of("or", 2, 2, [1, 1], weights) == 4
    assert mask_of("plus", 2, 2, [1, 1], weights) == 8
    assert mask_of("plus", 0, 0, [0, 0], weights) == 1


def test_each_item_is_masked_by_its_own_presence():
    logits = torch.zeros(2, 2, 1, 2)
    logits[:, 1] = 1
    mask = voxel_mask("plus", torch.ones(2, 1, 2), logits, torch.tensor([[1], [0]]), torch.tensor([0.0, 1.0]))
    assert mask.tolist() == [[[2, 2]], [[0, 0]]]


def test_unknown_mask_mode_is_refused():
    with pytest.raises(ValueError, match="base, or, plus"):
        mask_of("merged", 0, 0, [1, 1], [0.0, 1.0, 1.0])
