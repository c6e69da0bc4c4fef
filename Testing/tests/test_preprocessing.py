"""From a volume to network input, each step against plain numpy, SimpleITK or another library's resampling."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import AXIS_ORDERS, CPU, grid

from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.model import Preprocessing
from PresenceSegLib.domain.volume import Volume
from PresenceSegLib.engine.preprocessing import (
    interpolation_matrix,
    network_input,
    network_shape,
    normalize,
    resample,
    resample_labels,
    to_canonical,
)

MR = {"kind": "mr"}


def random_array(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 100, shape).astype(np.float32)


@pytest.mark.parametrize("direction", AXIS_ORDERS)
def test_every_axis_order_becomes_superior_posterior_left_as_itk_orients_it(direction):
    lies = grid((5, 4, 3), (1.0, 2.0, 3.0), direction)
    array = random_array(lies.shape)
    oriented = sitk.DICOMOrient(lies.to_image(array), "LPS")
    canonical = to_canonical(array, lies.axis_order(), CPU).numpy()
    np.testing.assert_array_equal(canonical, sitk.GetArrayFromImage(oriented))
    assert lies.canonical_spacing() == oriented.GetSpacing()[::-1]
    np.testing.assert_array_equal(lies.axis_order().invert(canonical), array)


def test_tilted_volumes_keep_their_voxels_and_only_change_order_and_sign():
    tilt = sitk.Euler3DTransform((0, 0, 0), 0.2, -0.3, 0.25).GetMatrix()
    for direction in AXIS_ORDERS[::5]:
        lies = grid((5, 4, 3), direction=np.array(tilt).reshape(3, 3) @ direction)
        array = random_array(lies.shape)
        oriented = sitk.DICOMOrient(lies.to_image(array), "LPS")
        canonical = to_canonical(array, lies.axis_order(), CPU).numpy()
        np.testing.assert_array_equal(canonical, sitk.GetArrayFromImage(oriented))


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32]
)
def test_all_number_types_of_images_keep_their_values(dtype):
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    array[0, 0, 0] = min(np.iinfo(dtype).max if np.dtype(dtype).kind != "f" else 2.5, 60_000)
    lies = grid((4, 3, 2), direction=np.diag([-1.0, 1.0, -1.0]))
    x = to_canonical(array, lies.axis_order(), CPU)
    np.testing.assert_array_equal(x.numpy().astype(np.float64), array[::-1, :, ::-1].astype(np.float64))


def test_the_caller_keeps_an_unchanged_volume():
    lies = grid((12, 12, 12), direction=AXIS_ORDERS[7])
    array = random_array(lies.shape)
    before = array.copy()
    network_input(Volume(array, lies), Preprocessing((1.5, None, 0.7), MR, (8, 8, 8)), CPU)
    np.testing.assert_array_equal(array, before)


sizes = st.integers(1, 17)


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(sizes, sizes, sizes), grow=st.tuples(*[st.integers(0, 15)] * 3), seed=st.integers(0, 99))
def test_enlarging_is_linear_interpolation_from_edge_to_edge(shape, grow, seed):
    array = random_array(shape, seed)
    new_shape = [n + g for n, g in zip(shape, grow, strict=True)]
    expected = array.astype(np.float64)
    for axis, n in enumerate(new_shape):  # voxel centers at (index + 1/2) / size of the extent
        old_centers, new_centers = ((np.arange(m) + 0.5) / m for m in (shape[axis], n))
        expected = np.apply_along_axis(lambda line, t=new_centers, o=old_centers: np.interp(t, o, line), axis, expected)
    np.testing.assert_allclose(resample(torch.from_numpy(array), new_shape).numpy(), expected, atol=1e-3)


# from two voxels on: torch mistakes pictures of one column for rows of channels
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 17)] * 3),
    new_shape=st.tuples(*[st.integers(2, 17)] * 3),
    seed=st.integers(0, 99),
)
def test_resampling_agrees_with_the_antialiased_interpolation_of_torch(shape, new_shape, seed):
    x = torch.from_numpy(random_array(shape, seed))
    expected = F.interpolate(x[:, None], new_shape[1:], mode="bilinear", antialias=True, align_corners=False)[:, 0]
    expected = expected.movedim(0, -1)  # the same for the first axis, as rows of a picture
    size = (expected.shape[1], new_shape[0])
    expected = F.interpolate(expected[:, None], size, mode="bilinear", antialias=True, align_corners=False)[:, 0]
    torch.testing.assert_close(resample(x, new_shape), expected.movedim(-1, 0), atol=2e-3, rtol=1e-4)


@given(size=st.integers(1, 60), new_size=st.integers(1, 60))
def test_interpolation_weights_are_means_of_near_voxels(size, new_size):
    weights = interpolation_matrix(size, new_size)
    assert weights.shape == (new_size, size)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(new_size))
    torch.testing.assert_close(weights, weights.flip(0, 1))  # left and right are treated alike
    for n, row in enumerate(weights):
        at = np.flatnonzero(row > 1e-6)
        assert np.abs(at + 0.5 - (n + 0.5) * size / new_size).max() <= max(1, size / new_size) + 1e-6


def test_halving_averages_over_what_lies_under_the_wider_kernel():
    # by hand: the triangle reaches two voxels to each side of a border between two, 1:3:3:1, cut off at the ends
    expected = torch.tensor([[3, 3, 1, 0, 0, 0], [0, 1, 3, 3, 1, 0], [0, 0, 0, 1, 3, 3]]).float()
    torch.testing.assert_close(interpolation_matrix(6, 3), expected / expected.sum(dim=1, keepdim=True))


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(sizes, sizes, sizes), new_shape=st.tuples(sizes, sizes, sizes), seed=st.integers(0, 99))
def test_labels_are_those_of_the_voxel_in_which_the_new_center_lies(shape, new_shape, seed):
    labels = np.random.default_rng(seed).integers(0, 9, shape).astype(np.uint8)
    expected = np.zeros(new_shape, np.uint8)
    for index in np.ndindex(*new_shape):
        # in whole numbers: the center (i + 1/2) m / n lies in voxel floor((2 i + 1) m / 2 n)
        source = tuple((2 * i + 1) * m // (2 * n) for i, m, n in zip(index, shape, new_shape, strict=True))
        expected[index] = labels[source]
    resampled = resample_labels(torch.from_numpy(labels), new_shape)
    assert resampled.dtype == torch.uint8
    np.testing.assert_array_equal(resampled.numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(*[st.integers(2, 60)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 9)] * 3),
    wanted=st.tuples(*[st.one_of(st.none(), st.floats(0.2, 9))] * 3),
    direction=st.sampled_from(AXIS_ORDERS),
)
def test_the_network_grid_spans_the_volume_with_the_wanted_spacing_to_half_a_voxel(size, spacing, wanted, direction):
    lies = grid(size, spacing, direction)
    shape = network_shape(lies, Preprocessing(wanted, MR, (8, 8, 8)))
    body_axis = np.abs(direction).argmax(axis=0)  # of voxel axis i, j, k: 0 L, 1 P, 2 S
    for voxel_axis in range(3):
        canonical = 2 - body_axis[voxel_axis]
        length, target = size[voxel_axis] * spacing[voxel_axis], wanted[canonical]
        if target is None:
            assert shape[canonical] == size[voxel_axis]
        else:
            assert shape[canonical] >= 1
            assert abs(shape[canonical] * target - length) <= target * (0.5 + 1e-6) or shape[canonical] == 1


def reference_normalized(x):
    """MR intensities in numpy: the least value does not count, the rest gives percentiles, mean and deviation."""
    x = x.astype(np.float64)
    counted = x[x > x.min()]
    low, high = np.percentile(counted, (0.5, 99.5))
    counted = np.clip(counted, low, high)
    return (np.clip(x, low, high) - counted.mean()) / counted.std()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 100), shift=st.floats(-1000, 1000), air=st.floats(0, 0.8))
def test_mr_intensities_are_normalized_by_their_own_body_whatever_their_scale(seed, scale, shift, air):
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, 50, (6, 7, 8)).astype(np.float32) + 1
    x[rng.random(x.shape) < air] = 0
    normalized = normalize(torch.from_numpy(x), MR).numpy()
    np.testing.assert_allclose(normalized, reference_normalized(x), atol=1e-4)
    scaled = normalize(torch.from_numpy((x * scale + shift).astype(np.float32)), MR).numpy()
    np.testing.assert_allclose(scaled, normalized, atol=2e-4 * (1 + abs(shift) / scale))


def test_ct_intensities_are_clipped_and_scaled_by_the_constants_of_the_card():
    x = torch.tensor([-2000.0, -100, 0, 50, 300, 3000])
    card = {"kind": "ct", "low": -100.0, "high": 300.0, "mean": 50.0, "std": 25.0}
    assert normalize(x, card).tolist() == [-6, -6, -2, 0, 10, 10]


def test_percentiles_of_a_large_volume_are_estimated_well_from_a_part_of_it():
    x = np.random.default_rng(1).normal(0, 1, (140, 128, 128)).astype(np.float32)  # twice what is sampled
    np.testing.assert_allclose(normalize(torch.from_numpy(x), MR).numpy(), reference_normalized(x), atol=0.05)


@pytest.mark.parametrize(
    "array",
    [
        np.indices((8, 8, 8)).sum(axis=0) % 2,  # a checkerboard, all gray after halving
        np.where(np.arange(512).reshape(8, 8, 8) == 77, 2**24 + 1, 2**24),  # equal in float32
        np.where(np.arange(512).reshape(8, 8, 8) == 77, 1, 0),
    ],
)
def test_volumes_that_turn_constant_give_finite_input(array):
    card = Preprocessing((2.0, 2.0, 2.0), MR, (8, 8, 8))
    x = network_input(Volume(array.astype(np.int32), grid((8, 8, 8), (1, 1, 1))), card, CPU)
    assert x.shape == (4, 4, 4)
    assert x.isfinite().all()


def test_the_whole_input_is_the_steps_in_their_order():
    lies = Grid((14, 9, 11), (0.9, 2.0, 1.3), (3.0, -4.0, 5.0), tuple(AXIS_ORDERS[13].ravel()))
    array = np.random.default_rng(3).integers(-500, 900, lies.shape).astype(np.int16)
    oriented = sitk.DICOMOrient(lies.to_image(array.astype(np.float32)), "LPS")
    expected = torch.from_numpy(sitk.GetArrayFromImage(oriented))
    wanted = (1.5, None, 0.8)
    size = [
        n if w is None else int(n * s / w + 0.5)
        for n, s, w in zip(oriented.GetSize()[::-1], oriented.GetSpacing()[::-1], wanted, strict=True)
    ]
    for axis, n in enumerate(size):
        line = expected.movedim(axis, -1).flatten(0, 1)[:, None, None]
        kept = expected.movedim(axis, -1).shape[:2]
        line = F.interpolate(line, (1, n), mode="bilinear", antialias=True, align_corners=False)
        expected = line.view(*kept, n).movedim(-1, axis)
    x = network_input(Volume(array, lies), Preprocessing(wanted, MR, (8, 8, 8)), CPU)
    assert x.dtype == torch.float32 and x.shape == tuple(size)
    np.testing.assert_allclose(x.numpy(), reference_normalized(expected.numpy()), atol=1e-4)


@pytest.mark.parametrize("spacing", [(None, None, None), (1.1, 0.7, 2.2), (4.0, 2.5, 0.4)])
def test_the_same_body_in_every_axis_order_gives_the_same_input_bit_for_bit(spacing):
    body = random_array((13, 16, 17))  # [S, P, L]
    physical = (2.0, 1.0, 1.5)
    card = Preprocessing(spacing, MR, (8, 8, 8))
    expected = None
    for direction in AXIS_ORDERS:
        body_axis = np.abs(direction).argmax(axis=0)  # of i, j, k
        size = [body.shape[2 - a] for a in body_axis]
        lies = grid(size, [physical[2 - a] for a in body_axis], direction)
        array = np.ascontiguousarray(lies.axis_order().invert(body))
        x = network_input(Volume(array, lies), card, CPU)
        expected = x if expected is None else expected
        assert torch.equal(x, expected)
