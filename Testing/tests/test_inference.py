"""Single-pass inference against a plain reference: every logit of the whole volume at once, in numpy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from synthetic import AXIS_ORDERS, CPU, TINY, grid, model_card, random_network, write_version
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.model import PLANES, NetworkSpec
from PresenceSegLib.domain.segmentation import Status
from PresenceSegLib.domain.volume import Volume
from PresenceSegLib.engine import device as devices
from PresenceSegLib.engine.inference import (
    Model,
    check_size,
    decide,
    logit_slabs,
    predict,
    resampled_slabs,
    tile_importance,
    tile_shape,
    tile_starts,
)
from PresenceSegLib.engine.networks import SegmentationNetwork, stride
from PresenceSegLib.engine.preprocessing import network_input

SPECS = {"": TINY} | {
    plane: NetworkSpec("unet", (4, 8), (tuple(1 if a == axis else 2 for a in range(3)),), plane)
    for axis, plane in enumerate(PLANES)
}
# Logits of the two ways of computing differ by rounding: where the best two are closer than this, either may win.
TIE = 1e-3


@pytest.fixture(autouse=True, scope="module")
def float32():
    """Half precision rounds a difference of 1e-7 up to 1e-2: the reference is compared in float32 everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "half_precision", lambda device: None)
        yield


def random_volume(lies, seed=0):
    return Volume(np.random.default_rng(seed).normal(100, 30, lies.shape).astype(np.float32), lies)


# --- the reference ---------------------------------------------------------------------------------------------------


def reference_starts(size, tile, overlap):
    """Least number of tiles whose step is at most (1 - overlap) of a tile, spread evenly."""
    if size <= tile:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    count = next(n for n in itertools.count(2) if (n - 1) * step >= size - tile)
    return [round(n * (size - tile) / (count - 1)) for n in range(count)]


def reference_logits(network, x, tile):
    """Gaussian-weighted mean of the tiles' logits, accumulated over the whole volume: float64 [1 + C, S, P, L]."""
    axis = network.slice_axis
    size = x.shape
    x = np.pad(x, [(0, max(0, t - n)) for t, n in zip(tile, size, strict=True)], mode="edge")
    weight = np.ones(tile)
    for index in np.ndindex(*tile):
        for a in range(3):
            if a != axis:
                weight[index] *= np.exp(-0.5 * (((index[a] + 0.5) / tile[a] - 0.5) / 0.125) ** 2)
    weight = weight.clip(1e-3)
    total, weights = 0.0, np.zeros(x.shape)
    sizes = enumerate(zip(x.shape, tile, strict=True))
    starts = [reference_starts(n, t, 0 if a == axis else 0.25) for a, (n, t) in sizes]
    for start in itertools.product(*starts):
        part = tuple(slice(b, b + t) for b, t in zip(start, tile, strict=True))
        with torch.inference_mode():
            logits = network(torch.from_numpy(np.ascontiguousarray(x[part]))[None, None])[0].double().numpy()
        if np.isscalar(total):
            total = np.zeros((len(logits), *x.shape))
        total[(slice(None), *part)] += logits * weight
        weights[part] += weight
    return (total / weights)[:, : size[0], : size[1], : size[2]]


def reference_resampled(logits, shape):
    """Linear interpolation of [1 + C, ...] along each axis in turn, voxel centers at (n + 1/2) / size."""
    for axis, n in enumerate(shape, start=1):
        old, new = ((np.arange(m) + 0.5) / m for m in (logits.shape[axis], n))
        weights = np.stack([np.interp(new, old, one_voxel) for one_voxel in np.eye(len(old))])
        logits = np.moveaxis(np.moveaxis(logits, axis, -1) @ weights, -1, axis)
    return logits


def reference_scores(model, volume):
    """Logits [1 + C, k, j, i] on the volume's grid."""
    card = model.card
    x = network_input(volume, card.preprocessing, CPU).numpy()  # tested by itself
    order = volume.grid.axis_order()
    canonical = [volume.grid.shape[a] for a in order.permutation]
    logits = reference_resampled(reference_logits(model.network, x, tile_shape(x.shape, card)), canonical)
    return np.stack([order.invert(channel) for channel in logits])


def assert_decided(labels, logits, card):
    """Each layer holds the best of its structures, or one that is less than TIE worse."""
    assert len(labels) == len(card.label_layers)
    for layer, names in zip(labels, card.label_layers, strict=True):
        channels = [card.structures.names.index(name) + 1 for name in names]
        background = logits[0] if card.activation == "softmax" else np.zeros(layer.shape)
        scores = np.stack([background, *(logits[c] for c in channels)])
        values = np.array([0, *channels])
        assert np.isin(layer, values).all()
        chosen = np.take_along_axis(scores, np.searchsorted(values, layer)[None], axis=0)[0]
        assert (scores.max(axis=0) - chosen).max() < TIE
        second, best = np.sort(scores, axis=0)[-2:]
        clear = best - second > TIE
        assert clear.mean() > 0.9, "the comparison must not be void"
        np.testing.assert_array_equal(layer[clear], values[scores.argmax(axis=0)][clear])


# --- the whole pipeline ----------------------------------------------------------------------------------------------


@st.composite
def situations(draw):
    plane = draw(st.sampled_from(["", *PLANES]))
    names = [f"s{n}" for n in range(draw(st.integers(1, 8)))]
    layers = (tuple(names),)
    activation = draw(st.sampled_from(["softmax", "sigmoid"]))
    if activation == "sigmoid" and len(names) > 1:
        shuffled = draw(st.permutations(names))
        cut = draw(st.integers(1, len(names) - 1))
        layers = tuple(tuple(sorted(part)) for part in (shuffled[:cut], shuffled[cut:]))
    card = model_card(
        names,
        SPECS[plane],
        spacing=draw(st.tuples(*[st.sampled_from([None, 0.6, 1.0, 1.7, 4.0])] * 3)),
        patch=draw(st.tuples(*[st.sampled_from([4, 6, 8, 12])] * 3)),
        activation=activation,
        label_layers=layers,
    )
    tilt = draw(st.sampled_from([np.eye(3), rotation(0.2, 0.1)]))
    lies = grid(
        draw(st.tuples(*[st.integers(2, 15)] * 3)),
        draw(st.tuples(*[st.sampled_from([0.5, 1.0, 1.3, 2.0])] * 3)),
        tilt @ draw(st.sampled_from(AXIS_ORDERS)),
    )
    return card, lies, draw(st.integers(0, 10**6))


def rotation(a, b):
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return turn_z @ turn_x


@settings(max_examples=150, deadline=None)
@given(situations())
def test_the_slab_wise_pipeline_gives_the_labels_of_the_plain_reference(situation):
    card, lies, seed = situation
    model, volume = Model(card, random_network(card, seed), CPU), random_volume(lies, seed)
    try:
        check_size(lies, card)
    except InputError:
        with pytest.raises(InputError, match="too small"):
            model.segment(volume)
        return
    labels = model.segment(volume)
    assert labels.shape == (len(card.label_layers), *lies.shape)
    assert labels.dtype == np.uint8
    assert_decided(labels, reference_scores(model, volume), card)


@pytest.mark.parametrize("plane", ["", *PLANES])
def test_a_volume_many_times_finer_or_coarser_than_the_network_is_segmented_right(plane):
    for spacing in ((0.4, 0.5, 0.45), (5.0, 1.0, 5.0)):
        card = model_card(["a", "b"], SPECS[plane], spacing=spacing, patch=(8, 8, 8))
        lies = grid((12, 10, 11) if spacing[0] < 1 else (30, 12, 40), (2.0, 1.5, 2.5) if spacing[0] < 1 else (1, 1, 1))
        model, volume = Model(card, random_network(card), CPU), random_volume(lies)
        assert_decided(model.segment(volume), reference_scores(model, volume), card)


@pytest.mark.parametrize("plane", ["", "coronal"])
def test_the_same_body_in_every_axis_order_gets_the_same_labels_voxel_for_voxel(plane):
    card = model_card(["a", "b", "c"], SPECS[plane], spacing=(1.6, 1.2, 0.9), patch=(8, 8, 8))
    model = Model(card, random_network(card), CPU)
    body, physical = np.random.default_rng(0).normal(0, 1, (11, 13, 14)).astype(np.float32), (2.0, 1.0, 1.5)
    expected = None
    for direction in AXIS_ORDERS:
        body_axis = np.abs(direction).argmax(axis=0)
        lies = grid([body.shape[2 - a] for a in body_axis], [physical[2 - a] for a in body_axis], direction)
        array = body.transpose([2 - a for a in body_axis[::-1]])  # [k, j, i] from [S, P, L]
        flips = [2 - n for n in range(3) if direction[body_axis[n], n] < 0]
        labels = model.segment(Volume(np.ascontiguousarray(np.flip(array, flips)), lies))[0]
        in_body = np.flip(labels, flips).transpose(np.argsort([2 - a for a in body_axis[::-1]]))
        expected = in_body if expected is None else expected
        np.testing.assert_array_equal(in_body, expected)
    assert len(np.unique(expected)) > 1


def test_half_precision_moves_logits_by_no_more_than_it_rounds(monkeypatch):
    card = model_card(["a", "b", "c"], patch=(8, 8, 8))
    model, volume = Model(card, random_network(card), CPU), random_volume(grid((20, 18, 16)))
    exact = model.segment(volume)[0]
    logits = reference_scores(model, volume)
    monkeypatch.setattr(devices, "half_precision", lambda device: torch.bfloat16)
    rounded = model.segment(volume)[0]
    second, best = np.sort(logits, axis=0)[-2:]
    clear = best - second > 0.1 * logits.std()
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(rounded[clear], exact[clear])


# --- the steps -------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 400), tile=st.integers(1, 100), overlap=st.sampled_from([0.0, 0.25, 0.5]))
def test_tiles_cover_everything_evenly_and_overlap_enough(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0
    if size <= tile:
        assert starts == [0]
        return
    assert starts[-1] == size - tile
    steps = np.diff(starts)
    assert steps.min() >= 1 or size - tile < len(starts) - 1
    assert steps.max() - steps.min() <= 1
    assert steps.max() <= max(1, int(tile * (1 - overlap)))
    assert starts == reference_starts(size, tile, overlap)


@settings(deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 300)] * 3),
    patch=st.tuples(*[st.integers(1, 96)] * 3),
    plane=st.sampled_from(["", *PLANES]),
)
def test_tiles_are_multiples_of_the_stride_and_about_the_patch(shape, patch, plane):
    card = model_card(["a"], SPECS[plane], patch=patch)
    step = stride(card.network)
    for axis, (tile, n, p) in enumerate(zip(tile_shape(shape, card), shape, patch, strict=True)):
        assert tile % step[axis] == 0
        if plane and axis == PLANES.index(plane):
            assert tile == min(n, 32)
        else:
            assert min(n, p) <= tile < max(min(n, p) + step[axis], 2 * step[axis] + 1)


@pytest.mark.parametrize("slice_axis", [None, 0, 1, 2])
def test_a_tile_counts_most_in_its_middle_and_least_at_its_edges(slice_axis):
    weights = tile_importance((4, 6, 8), slice_axis).numpy()
    assert weights.shape == (4, 6, 8)
    assert weights.min() >= 1e-3 - 1e-9
    np.testing.assert_allclose(weights, weights[::-1, ::-1, ::-1], rtol=1e-5)
    # voxel 2 of 8 lies 1.5 voxels off the middle, a sigma is one voxel
    middle, off = weights[2, 3, 4], weights[2, 3, 2]
    if slice_axis == 2:
        assert off == middle
    else:
        assert off / middle == pytest.approx(np.exp(-0.5 * (1.5**2 - 0.5**2)), rel=1e-5)


class Pointwise(nn.Module):
    """A backbone that looks at one voxel only, so that any tiling must give the same."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, 4, 1)

    def forward(self, x):
        return torch.sin(self.layer(x))


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(*[st.integers(1, 20)] * 3), tile=st.tuples(*[st.integers(1, 9)] * 3))
def test_slabs_join_to_all_planes_once_whatever_the_tiles(size, tile):
    torch.manual_seed(0)
    network = SegmentationNetwork(Pointwise(), 4, 3, None).eval()
    x = torch.randn(size)
    with torch.inference_mode():
        slabs = list(logit_slabs(network, x, tile))
        whole = network(x[None, None])[0]
    firsts = np.cumsum([0] + [s.shape[1] for _, s in slabs])
    assert [first for first, _ in slabs] == firsts[:-1].tolist()
    torch.testing.assert_close(torch.cat([s for _, s in slabs], dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 8, 8), (20, 8, 14), (26, 14, 20)])  # a tile, and whole steps of 6 more
def test_blending_agrees_with_the_sliding_windows_of_monai(size):
    network, tile = random_network(model_card(["a", "b"])), (8, 8, 8)
    x = torch.randn(size)
    with torch.inference_mode():
        expected = sliding_window_inference(
            x[None, None], tile, 1, network, overlap=0.25, roi_weight_map=tile_importance(tile, None)[None, None]
        )[0]
        blended = torch.cat([slab for _, slab in logit_slabs(network, x, tile)], dim=1)
    torch.testing.assert_close(blended, expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=120, deadline=None)
@given(
    depth=st.integers(1, 24),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 5), st.integers(1, 5)),
    plane=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cuts=st.lists(st.integers(1, 23), max_size=5, unique=True),
    seed=st.integers(0, 999),
)
def test_logits_resampled_slab_by_slab_are_those_of_the_whole(depth, shape, plane, cuts, seed):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (3, depth, *plane)).astype(np.float32))
    edges = [0, *sorted(c for c in cuts if c < depth), depth]
    slabs = ((a, logits[:, a:b]) for a, b in itertools.pairwise(edges))
    parts = list(resampled_slabs(slabs, depth, shape))
    assert [first for first, _ in parts] == np.cumsum([0] + [p.shape[1] for _, p in parts])[:-1].tolist()
    result = torch.cat([p for _, p in parts], dim=1).numpy()
    np.testing.assert_allclose(result, reference_resampled(logits.double().numpy(), shape), atol=1e-5)


def test_decisions_take_the_best_structure_of_the_layer_or_none():
    # one row per voxel: background, three structures; a sigmoid is above one half where its logit is above 0
    logits = torch.tensor([[1.0, 0, -1, -5], [0, 3, 2, 4], [2, 2.5, -0.5, 2.2], [0.5, -1, 0.2, 0.1], [1, 1, 0, 0]]).T
    every, two = torch.tensor([1, 2, 3]), torch.tensor([1, 3])
    assert decide(logits, every, "softmax").tolist() == [0, 3, 1, 0, 0]
    assert decide(logits, every, "sigmoid").tolist() == [0, 3, 1, 2, 1]
    assert decide(logits, two, "softmax").tolist() == [0, 3, 1, 0, 0]
    assert decide(logits, two, "sigmoid").tolist() == [0, 3, 1, 3, 1]
    assert decide(logits.view(4, 5, 1), torch.tensor([2]), "softmax").tolist() == [[0], [2], [0], [0], [0]]


# --- what people rely on ---------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_logits_never_exist_for_the_whole_volume():
    card = model_card([f"s{n}" for n in range(40)], patch=(8, 8, 8), spacing=(1.0, 1.0, 1.0))
    model = Model(card, random_network(card), CPU)
    largest = []
    for depth in (40, 160):
        with LargestTensor() as made:
            model.segment(random_volume(grid((12, 12, depth), (1.0, 1.0, 1.0))))
        largest.append(made.elements)
    plane = 41 * 12 * 12
    assert largest[0] >= 8 * plane, "the count saw no slab of logits"
    assert largest[1] <= 20 * plane  # two tiles and a few planes, of 160
    assert largest[1] <= 1.3 * largest[0]


def test_cancelling_leaves_a_model_that_works_as_before():
    card = model_card(["a", "b"])
    model, volume = Model(card, random_network(card), CPU), random_volume(grid((20, 20, 20)))
    expected = model.segment(volume)
    weights = {k: v.clone() for k, v in model.network.state_dict().items()}
    for limit in (0.0, 0.5, 0.999):
        seen = []

        def stop(fraction, limit=limit, seen=seen):
            seen.append(fraction)
            if fraction > limit:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.segment(volume, stop)
        assert seen[-1] > limit and all(f <= limit for f in seen[:-1])
    np.testing.assert_array_equal(model.segment(volume), expected)
    assert all(torch.equal(v, weights[k]) for k, v in model.network.state_dict().items())


def test_progress_rises_in_even_steps_to_one():
    card = model_card(["a"])
    seen = []
    Model(card, random_network(card), CPU).segment(random_volume(grid((20, 9, 14))), seen.append)
    # tiles of 8 at steps of at most 6: 3 x 2 x 2
    np.testing.assert_allclose(seen, np.arange(1, 13) / 12)


def test_independent_slices_are_computed_once_each():
    card = model_card(["a"], SPECS["axial"])
    seen = []
    Model(card, random_network(card), CPU).segment(random_volume(grid((8, 8, 64))), seen.append)
    assert seen == [0.5, 1]  # 64 slices, 32 at a time


def test_more_structures_than_a_byte_counts_become_sixteen_bit_labels():
    card = model_card([f"s{n}" for n in range(1, 301)])
    network = random_network(card)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.fill_(0)
        network.head.bias[300] = 1
    labels = Model(card, network, CPU).segment(random_volume(grid((9, 8, 8))))
    assert labels.dtype == np.uint16
    assert (labels == 300).all()


def test_the_last_structure_that_a_byte_counts_is_not_lost():
    card = model_card([f"s{n}" for n in range(1, 256)])
    network = random_network(card)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.fill_(0)
        network.head.bias[255] = 1
    labels = Model(card, network, CPU).segment(random_volume(grid((9, 8, 8))))
    assert labels.dtype == np.uint8
    assert (labels == 255).all()


def test_a_stored_model_segments_into_named_segments_that_nobody_started(tmp_path):
    layers = (("liver", "spleen"), ("tumor",))
    card = model_card(["liver", "tumor", "spleen"], activation="sigmoid", label_layers=layers)
    network = random_network(card, 4)
    version = write_version(tmp_path / "v1", card, network)
    volume = random_volume(grid((14, 12, 10), direction=AXIS_ORDERS[21]))
    segmentation = Model.load(version, CPU).segmentation(volume)
    assert [s.name for s in segmentation.segments] == ["liver", "tumor", "spleen"]
    assert {s.status for s in segmentation.segments} == {Status.NOT_STARTED}
    assert segmentation.grid == volume.grid
    labels = Model(card, network, CPU).segment(volume)
    for n, segment in enumerate(segmentation.segments, start=1):
        np.testing.assert_array_equal(segmentation.mask(segment), (labels == n).any(axis=0))
        assert segment.color == card.structures.named(segment.name).color


def test_overlapping_structures_are_both_found():
    card = model_card(["organ", "lesion"], activation="sigmoid", label_layers=(("organ",), ("lesion",)))
    network = random_network(card)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([9.0, 1.0, 0.5]))
    labels = Model(card, network, CPU).segment(random_volume(grid((8, 8, 8))))
    assert (labels[0] == 1).all() and (labels[1] == 2).all()


@pytest.mark.parametrize(
    ("size", "fits"), [((8, 8, 8), True), ((2, 2, 2), True), ((8, 1, 8), False), ((1, 8, 8), False)]
)
def test_volumes_smaller_than_the_stride_are_refused_with_both_sizes(size, fits):
    card = model_card(["a"])
    model, volume = Model(card, random_network(card), CPU), random_volume(grid(size))
    if fits:
        assert model.segment(volume).shape[1:] == size[::-1]
        return
    with pytest.raises(InputError, match=f"{'×'.join(map(str, size))}.*at least 2×2×2"):
        model.segment(volume)
    with pytest.raises(InputError, match="too small"):
        model.check(volume)


def test_prediction_on_the_network_grid_itself_needs_no_volume():
    card = model_card(["a", "b"], patch=(6, 6, 6))
    network, x = random_network(card), torch.randn(10, 9, 13)
    labels = predict(network, x, card, x.shape).numpy()
    assert_decided(labels, reference_logits(network, x.numpy(), tile_shape(x.shape, card)), card)
