"""Losses from partial labels: exact against plain float64 arithmetic; what they never teach, proved by gradients."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegLib.domain.errors import InputError
from PresenceSegTrainingLib.engine.losses import MODES, PAPER_LOSSES, make_loss
from PresenceSegTrainingLib.engine.presence import IGNORE

PAPER_MODES = ("base", "or", "plus")
COMBINATIONS = [
    ("merged", "ce+dice"),
    ("independent", "bce+dice"),
    *((mode, loss) for mode in PAPER_MODES for loss in PAPER_LOSSES),
]
every_loss = pytest.mark.parametrize(("mode", "name"), COMBINATIONS)
quick = settings(max_examples=25, deadline=None)


# --- problems ---------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    logits: np.ndarray  # float64 [B, 1+C, *spatial]
    labels: np.ndarray  # int64 [B, L, *spatial]
    presence: np.ndarray  # bool [B, C]

    def run(self, mode, name=None, dtype=torch.float32):
        """The loss and its gradient with respect to the logits, as (float, float32 array)."""
        logits = torch.tensor(self.logits).to(dtype).requires_grad_()
        loss = make_loss(mode, name)(logits, torch.tensor(self.labels), torch.tensor(self.presence))
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()
        return loss.item(), logits.grad.float().numpy()

    def visible(self):
        """[B, L, *spatial] labels after un-annotated structures were taken out."""
        labels = self.labels.copy()
        for item, structure in zip(*np.nonzero(~self.presence), strict=True):
            labels[item][labels[item] == structure + 1] = 0
        labels[np.broadcast_to((self.labels == IGNORE).any(axis=1, keepdims=True), labels.shape)] = IGNORE
        return labels

    def joined(self):
        """[B, *spatial] one label per voxel."""
        return self.visible().max(axis=1)


def make_problem(seed, presence, shape, layers=1, ignored=0.0, scale=3.0):
    rng = np.random.default_rng(seed)
    presence = np.array(presence, dtype=bool)
    batch, structures = presence.shape
    labels = rng.integers(0, structures + 1, (batch, layers, *shape)) * (rng.random((batch, layers, *shape)) < 0.6)
    labels[np.broadcast_to(rng.random((batch, 1, *shape)) < ignored, labels.shape)] = IGNORE
    return Problem(rng.normal(0, scale, (batch, 1 + structures, *shape)), labels, presence)


@st.composite
def problems(draw, max_layers=2):
    structures = draw(st.integers(1, 4))
    item = st.lists(st.booleans(), min_size=structures, max_size=structures)
    return make_problem(
        seed=draw(st.integers(0, 2**16)),
        presence=draw(st.lists(item, min_size=1, max_size=3)),
        shape=draw(st.one_of(st.tuples(*[st.integers(1, 4)] * 2), st.tuples(*[st.integers(1, 3)] * 3))),
        layers=draw(st.integers(1, max_layers)),
        ignored=draw(st.sampled_from([0.0, 0.2])),
    )


# --- the same losses in plain float64 arithmetic, voxel by voxel ------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def voxels(problem):
    """(item, layer labels of the visible structures, logits) of every voxel that is not ignored."""
    visible = problem.visible()
    for index in np.ndindex(problem.logits.shape[:1] + problem.logits.shape[2:]):
        item, position = index[0], index[1:]
        layers = visible[(item, slice(None), *position)]
        if layers.min() >= 0:
            yield item, layers, problem.logits[(item, slice(None), *position)]


def pooled_dice(problem, probability, truth):
    """Dice loss of each structure annotated somewhere; probability and truth: lists of (item, [C])."""
    losses = {}
    for c in range(problem.presence.shape[1]):
        if not problem.presence[:, c].any():
            continue
        inter = predicted = labeled = 0.0
        for (item, p), (_, y) in zip(probability, truth, strict=True):
            if problem.presence[item, c]:
                inter += p[c] * y[c]
                predicted += p[c]
                labeled += y[c]
        losses[c] = 1 - (2 * inter + 1e-5) / (predicted + labeled + 1e-5)
    return losses


def reference_merged(problem):
    cross_entropies, probability, truth = [], [], []
    for item, layers, z in voxels(problem):
        p, y = softmax(z), layers.max()
        q = np.where(np.r_[True, problem.presence[item]], p, 0)
        q[0] += p[1:][~problem.presence[item]].sum()
        cross_entropies.append(-np.log(q[y]))
        probability.append((item, q[1:]))
        truth.append((item, np.eye(len(z))[y][1:]))
    dice = pooled_dice(problem, probability, truth)
    return np.mean(cross_entropies or [0]) + np.mean(list(dice.values()) or [0])


def reference_independent(problem):
    total, probability, truth = 0.0, [], []
    structures = problem.presence.shape[1]
    for item, layers, z in voxels(problem):
        s = 1 / (1 + np.exp(-z[1:]))
        y = np.array([float(c + 1 in layers) for c in range(structures)])
        total += (-(y * np.log(s) + (1 - y) * np.log(1 - s)))[problem.presence[item]].sum()
        probability.append((item, s))
        truth.append((item, y))
    dice = pooled_dice(problem, probability, truth)
    return total / problem.logits[:, 1:].size + sum(dice.values()) / structures


def reference_paper(problem, mode, name):
    batch, channels = problem.logits.shape[:2]
    weights = np.concatenate([np.zeros((batch, 1)), problem.presence], axis=1)
    weighted, counted = 0.0, 0
    inter, predicted, labeled = (np.zeros((batch, channels)) for _ in range(3))
    for item, layers, z in voxels(problem):
        p, y, h = softmax(z), np.eye(channels)[layers.max()], np.eye(channels)[z.argmax()]
        m = {"base": y, "or": np.maximum(y, h), "plus": y + h}[mode] @ weights[item]
        weighted += m * -np.log(p @ y)
        counted += m > 0
        inter[item] += p * y
        predicted[item] += p
        labeled[item] += y
    loss = weighted / counted if counted else 0.0
    if name != "xent" and weights.sum():
        size, overlap = predicted + labeled + 1e-10, 2 * inter + 1e-10
        terms = 1 - overlap / size if name.endswith("softdice") else np.log(size) - np.log(overlap)
        loss += 0.1 * (weights * terms).sum() / weights.sum()
    return loss


def reference(problem, mode, name):
    if mode == "merged":
        return reference_merged(problem)
    if mode == "independent":
        return reference_independent(problem)
    return reference_paper(problem, mode, name)


# --- exact values -----------------------------------------------------------------------------------------------------


@every_loss
@quick
@given(problem=problems())
def test_equals_plain_arithmetic(mode, name, problem):
    loss, _ = problem.run(mode, name)
    assert loss == pytest.approx(reference(problem, mode, name), rel=2e-5, abs=2e-6)


@every_loss
@pytest.mark.parametrize("layers", [1, 2])
def test_gradient_equals_the_slope_of_plain_arithmetic(mode, name, layers):
    problem = make_problem(3, [[1, 0, 1], [0, 0, 1]], (3, 4), layers=layers, ignored=0.1)
    _, gradient = problem.run(mode, name)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = rng.normal(size=problem.logits.shape)
        step = 1e-5
        ahead = Problem(problem.logits + step * direction, problem.labels, problem.presence)
        behind = Problem(problem.logits - step * direction, problem.labels, problem.presence)
        slope = (reference(ahead, mode, name) - reference(behind, mode, name)) / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-5)


@every_loss
@pytest.mark.parametrize("structures", [1, 120])
def test_one_and_many_structures(mode, name, structures):
    presence = np.random.default_rng(1).random((2, structures)) < 0.5
    presence[0, 0] = True
    problem = make_problem(2, presence, (4, 4, 4))
    loss, _ = problem.run(mode, name)
    assert loss == pytest.approx(reference(problem, mode, name), rel=2e-5)


@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 4)])
@pytest.mark.parametrize("structures", [1, 5])
def test_merged_is_monai_dice_ce_when_everything_is_annotated(shape, structures):
    from monai.losses import DiceCELoss

    problem = make_problem(4, np.ones((2, structures)), shape)
    monai_logits = torch.tensor(problem.logits).float().requires_grad_()
    monai = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )(monai_logits, torch.tensor(problem.labels))
    monai.backward()
    loss, gradient = problem.run("merged")
    assert loss == pytest.approx(monai.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, monai_logits.grad.numpy(), atol=1e-7)


def test_sums_stay_exact_over_a_million_voxels():
    probability = 0.9
    logits = torch.zeros(1, 2, 128, 128, 64)
    logits[:, 1] = np.log(probability / (1 - probability))
    labels = torch.ones(1, 1, 128, 128, 64, dtype=torch.uint8)
    loss = make_loss("merged")(logits, labels, torch.ones(1, 1)).item()
    assert loss == pytest.approx(-np.log(probability) + 1 - 2 * probability / (probability + 1), rel=1e-5)


# --- a structure nobody annotated is taught nothing wrong -------------------------------------------------------------


def gradient_of_unannotated(problem, gradient):
    """Yields (item, [*spatial] gradient of one un-annotated structure, [*spatial] whether it could really be there)."""
    joined = problem.joined()
    for item, structure in zip(*np.nonzero(~problem.presence), strict=True):
        yield item, gradient[item, structure + 1], joined[item] <= 0


@quick
@given(problem=problems())
def test_merged_never_pushes_an_unannotated_structure_down(problem):
    _, gradient = problem.run("merged")
    for _, slope, possible in gradient_of_unannotated(problem, gradient):
        assert (slope[possible] <= 1e-7).all()


@quick
@given(problem=problems())
def test_independent_never_touches_an_unannotated_structure(problem):
    _, gradient = problem.run("independent")
    assert (gradient[:, 0] == 0).all()
    for _, slope, _ in gradient_of_unannotated(problem, gradient):
        assert (slope == 0).all()


@quick
@given(problem=problems())
def test_base_cross_entropy_is_silent_outside_annotated_structures(problem):
    _, gradient = problem.run("base", "xent")
    for _, slope, possible in gradient_of_unannotated(problem, gradient):
        assert (slope[possible] == 0).all()


@pytest.mark.parametrize("mode", ["or", "plus"])
@quick
@given(problem=problems())
def test_or_and_plus_cross_entropy_is_silent_unless_an_annotated_structure_is_claimed(mode, problem):
    _, gradient = problem.run(mode, "xent")
    claimed = problem.logits.argmax(axis=1)
    for item, slope, possible in gradient_of_unannotated(problem, gradient):
        claims_annotated = np.isin(claimed[item], 1 + np.flatnonzero(problem.presence[item]))
        assert (slope[possible & ~claims_annotated] == 0).all()


@pytest.mark.parametrize("mode", ["or", "plus"])
@pytest.mark.parametrize("name", PAPER_LOSSES)
def test_known_violation_or_and_plus_push_down_where_an_annotated_structure_is_claimed(mode, name):
    """The paper's masks break the rule here; this pins the fact that the documentation states."""
    logits = np.array([0.0, 2.0, 1.0]).reshape(1, 3, 1, 1)  # the argmax is structure 1; structure 2 might be the truth
    problem = Problem(np.tile(logits, (1, 1, 4, 4)), np.zeros((1, 1, 4, 4), dtype=np.int64), np.array([[True, False]]))
    _, gradient = problem.run(mode, name)
    assert (gradient[0, 2] > 0).all()
    assert (problem.run("merged")[1][0, 2] < 0).all()


@pytest.mark.parametrize("name", ["xent+0.1*softdice", "xent+0.1*logdice"])
@quick
@given(problem=problems())
def test_paper_dice_never_pushes_an_unannotated_structure_down(name, problem):
    _, gradient = problem.run("base", name)  # at these voxels base leaves nothing but the Dice term
    for _, slope, possible in gradient_of_unannotated(problem, gradient):
        assert (slope[possible] <= 0).all()


@every_loss
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_nothing_annotated_costs_nothing_and_teaches_nothing(mode, name, shape):
    problem = make_problem(5, np.zeros((2, 3)), shape, layers=2)
    loss, gradient = problem.run(mode, name)
    assert loss == 0
    assert (gradient == 0).all()


@every_loss
def test_an_item_without_annotations_learns_nothing_beside_one_that_has_some(mode, name):
    problem = make_problem(6, [[1, 1, 0], [0, 0, 0]], (4, 4, 4))
    _, gradient = problem.run(mode, name)
    assert (gradient[0] != 0).any()
    assert (gradient[1] == 0).all()


@every_loss
def test_labels_of_unannotated_structures_are_as_good_as_absent(mode, name):
    problem = make_problem(7, [[1, 0, 1], [0, 1, 0]], (5, 5))
    cleaned = Problem(problem.logits, problem.visible(), problem.presence)
    assert (cleaned.labels != problem.labels).any()
    loss, gradient = problem.run(mode, name)
    expected_loss, expected_gradient = cleaned.run(mode, name)
    assert loss == expected_loss
    assert (gradient == expected_gradient).all()


# --- what is annotated is learned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["merged", "independent"])
def test_confirmed_absent_pushes_the_structure_down_everywhere(mode):
    problem = make_problem(8, [[1, 0, 0]], (4, 4, 4))
    problem.labels[:] = 0
    _, gradient = problem.run(mode)
    assert (gradient[0, 1] > 0).all()


def test_merged_raises_background_and_unannotated_structures_where_an_annotated_one_is_wrongly_claimed():
    problem = make_problem(9, [[1, 0, 0]], (4, 4))
    problem.labels[:] = 0
    _, gradient = problem.run("merged")
    assert (gradient[0, [0, 2, 3]] < 0).all()


@every_loss
def test_a_patch_without_an_annotated_structure_is_finite_and_exact(mode, name):
    problem = make_problem(10, [[1, 1], [1, 1]], (4, 4, 4))
    problem.labels[0][problem.labels[0] == 2] = 0
    problem.labels[1] = 0
    loss, _ = problem.run(mode, name)
    assert loss == pytest.approx(reference(problem, mode, name), rel=2e-5)


def test_independent_gradient_does_not_depend_on_how_many_others_are_annotated():
    alone = make_problem(11, [[1, 0, 0]], (4, 4), layers=1)
    together = Problem(alone.logits, alone.labels, np.array([[True, True, True]]))
    np.testing.assert_array_equal(alone.run("independent")[1][0, 1], together.run("independent")[1][0, 1])


def overlapping():
    """Structure 1 everywhere, structure 2 (in the second layer) on the left half."""
    labels = np.ones((1, 2, 4, 4), dtype=np.int64)
    labels[0, 1] = [2, 2, 0, 0]
    return labels


def test_independent_learns_both_of_two_overlapping_structures():
    problem = Problem(np.zeros((1, 3, 4, 4)), overlapping(), np.array([[True, True]]))
    _, gradient = problem.run("independent")
    assert (gradient[0, 1] < 0).all()
    assert (gradient[0, 2, :, :2] < 0).all()
    assert (gradient[0, 2, :, 2:] > 0).all()


def test_a_structure_drawn_in_two_layers_counts_once():
    once = make_problem(12, [[1, 1]], (4, 4))
    twice = Problem(once.logits, np.repeat(once.labels, 2, axis=1), once.presence)
    assert once.run("independent")[0] == twice.run("independent")[0]


@pytest.mark.parametrize("mode", ["merged", *PAPER_MODES])
def test_where_layers_overlap_a_softmax_learns_the_later_structure(mode):
    logits = np.random.default_rng(0).normal(size=(1, 3, 4, 4))
    flat = np.broadcast_to([2, 2, 1, 1], (1, 1, 4, 4)).copy()
    presence = np.array([[True, True]])
    for labels in (overlapping(), overlapping()[:, ::-1].copy()):
        assert Problem(logits, labels, presence).run(mode)[0] == Problem(logits, flat, presence).run(mode)[0]


# --- ignored voxels ---------------------------------------------------------------------------------------------------


@every_loss
def test_ignored_voxels_neither_matter_nor_learn(mode, name):
    problem = make_problem(13, [[1, 0, 1], [1, 1, 0]], (4, 4, 4), ignored=0.3)
    ignored = problem.labels[:, 0] == IGNORE
    assert 0 < ignored.mean() < 1
    loss, gradient = problem.run(mode, name)
    assert (gradient.swapaxes(0, 1)[:, ignored] == 0).all()

    changed = problem.logits.copy()
    changed.swapaxes(0, 1)[:, ignored] += np.random.default_rng(0).normal(0, 5, (4, ignored.sum()))
    assert Problem(changed, problem.labels, problem.presence).run(mode, name)[0] == pytest.approx(loss, rel=1e-6)


@every_loss
def test_a_patch_of_ignored_voxels_costs_nothing(mode, name):
    problem = make_problem(14, [[1, 0, 1]], (3, 3, 3), ignored=1.0)
    loss, gradient = problem.run(mode, name)
    assert loss == 0
    assert (gradient == 0).all()


# --- numbers ----------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_float32_loss(mode, name, dtype):
    problem = make_problem(15, [[1, 0, 1], [1, 1, 0]], (4, 4))
    problem.logits = np.sign(problem.logits) * 60.0
    problem.logits[1] = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype).double().numpy()
    loss, gradient = problem.run(mode, name, dtype=dtype)
    expected_loss, expected_gradient = problem.run(mode, name)
    assert loss == expected_loss
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0.01, atol=1e-6)


@every_loss
def test_autocast_does_not_change_the_loss(mode, name):
    problem = make_problem(16, [[1, 0, 1]], (8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = problem.run(mode, name)
    expected_loss, expected_gradient = problem.run(mode, name)
    assert loss == expected_loss
    assert (gradient == expected_gradient).all()


@every_loss
@quick
@given(problem=problems(max_layers=1), seed=st.integers(0, 2**16))
def test_the_order_of_structures_does_not_matter(mode, name, problem, seed):
    order = np.random.default_rng(seed).permutation(problem.presence.shape[1])  # new structure k was structure order[k]
    new_label = np.zeros(len(order) + 2, dtype=np.int64)  # the last entry is read by IGNORE
    new_label[1 + order] = 1 + np.arange(len(order))
    new_label[IGNORE] = IGNORE
    permuted = Problem(problem.logits[:, np.r_[0, 1 + order]], new_label[problem.labels], problem.presence[:, order])
    assert permuted.run(mode, name)[0] == pytest.approx(problem.run(mode, name)[0], rel=1e-5, abs=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_default_losses_of_the_modes():
    problem = make_problem(17, [[1, 0]], (3, 3))
    for mode in MODES:
        default = {"merged": "ce+dice", "independent": "bce+dice"}.get(mode, "xent+0.1*logdice")
        assert problem.run(mode)[0] == problem.run(mode, default)[0]


@pytest.mark.parametrize(
    ("mode", "name", "advice"),
    [
        ("average", None, "merged, base, or, plus, independent"),
        ("merged", "xent", r"ce\+dice"),
        ("independent", "ce+dice", r"bce\+dice"),
        ("plus", "ce+dice", r"xent or xent\+0\.1\*softdice or xent\+0\.1\*logdice"),
    ],
)
def test_wrong_combinations_are_refused_with_the_allowed_ones(mode, name, advice):
    with pytest.raises(InputError, match=advice):
        make_loss(mode, name)


@pytest.mark.parametrize(
    ("logits", "labels", "presence"),
    [
        ((2, 4, 5, 5), (2, 5, 5), (2, 3)),
        ((2, 4, 5, 5), (2, 1, 5, 4), (2, 3)),
        ((2, 4, 5, 5), (2, 1, 5, 5), (2, 4)),
        ((2, 4, 5, 5), (2, 1, 5, 5), (1, 3)),
        ((2, 1, 5, 5), (2, 1, 5, 5), (2, 0)),
        ((2, 4, 5), (2, 1, 5), (2, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, labels, presence):
    with pytest.raises(ValueError, match="is needed"):
        make_loss("merged")(torch.zeros(logits), torch.zeros(labels, dtype=torch.long), torch.ones(presence))
