"""Varied patches. Three label layers that count voxels along S, P and L show from where each voxel was taken, so that
the transform can be found from the result alone and held against what was promised."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegTrainingLib.engine.augmentation import augment, margin_size
from PresenceSegTrainingLib.engine.presence import IGNORE
from PresenceSegTrainingLib.engine.sampling import Batch

PATCH = (12, 14, 16)


def smooth(shape):
    """A smooth image in 0..2, with no symmetry."""
    s, p, q = np.indices(shape) / np.array(shape)[:, None, None, None]
    return 1 + 0.4 * np.sin(4 * s + 1) + 0.3 * np.cos(5 * p + 2 * q) + 0.3 * np.sin(3 * q + 2 * s)


def tracing_batch(count, shape, spacing=(1.0, 1.0, 1.0)):
    labels = torch.from_numpy(np.indices(shape)).int() + 1
    return Batch(
        torch.from_numpy(smooth(shape)).float()[None, None].repeat(count, 1, 1, 1, 1),
        labels[None].repeat(count, 1, 1, 1, 1),
        torch.ones(count, 3, dtype=torch.bool),
        torch.tensor([spacing] * count, dtype=torch.float64),
    )


def source_transform(labels, patch, shape):
    """Least-squares matrix [3, 3] and shift [3] from centered voxels of the patch to centered voxels of the source."""
    inside = (labels >= 0).all(axis=0)
    target = np.argwhere(inside) - (np.array(patch) - 1) / 2
    source = labels[:, inside].T - 1 - (np.array(shape) - 1) / 2
    fit, *_ = np.linalg.lstsq(np.c_[target, np.ones(len(target))], source, rcond=None)
    return fit[:3].T, fit[3]


def varied(count=24, spacing=(1.0, 1.0, 1.0), mirror=False, slice_axis=None, patch=PATCH, seed=0):
    shape = margin_size(patch, slice_axis)
    result = augment(tracing_batch(count, shape, spacing), patch, mirror, slice_axis, seed)
    labels = result.labels.numpy()
    return result, [source_transform(item, patch, shape) for item in labels]


@pytest.mark.parametrize(("axis", "expected"), [(None, (15, 17, 20)), (0, (12, 17, 20)), (2, (15, 17, 16))])
def test_larger_patches_are_drawn_but_not_across_slices(axis, expected):
    assert margin_size(PATCH, axis) == expected


def test_the_transform_is_a_rotation_and_scaling_in_millimeters_about_the_middle():
    spacing = np.array([2.0, 1.0, 1.25])
    _, transforms = varied(spacing=tuple(spacing))
    angles, scales = [], []
    for matrix, shift in transforms:
        np.testing.assert_allclose(shift, 0, atol=0.1)
        in_mm = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
        left, stretch, right = np.linalg.svd(in_mm)
        turn = left @ right
        assert np.linalg.det(turn) == pytest.approx(1)
        angles.append(math.degrees(math.acos(min(1.0, (np.trace(turn) - 1) / 2))))
        scales += stretch.tolist()
    assert max(angles) < 28 and max(angles) > 12  # three rotations of up to 15 degrees, one after another
    assert np.std(angles) > 2
    assert 0.83 < min(scales) < 0.92 and 1.08 < max(scales) < 1.17


def test_thick_slices_are_only_rotated_in_their_plane():
    for spacing, axis in (((6.0, 1.0, 1.0), 0), ((1.0, 4.0, 1.2), 1), ((0.5, 0.5, 2.0), 2)):
        _, transforms = varied(spacing=spacing)
        turned = 0
        for matrix, _ in transforms:
            others = [a for a in range(3) if a != axis]
            assert np.abs(matrix[axis, others]).max() < 0.02 and np.abs(matrix[others, axis]).max() < 0.02
            turned = max(turned, abs(matrix[others[0], others[1]]))
        assert turned > 0.1


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_slice_patches_stay_in_their_slice(slice_axis):
    patch = tuple(4 if a == slice_axis else 18 for a in range(3))
    result, transforms = varied(slice_axis=slice_axis, patch=patch, mirror=slice_axis != 2, spacing=(1.0, 1.0, 1.0))
    index = np.arange(1, 5).reshape([4 if a == slice_axis else 1 for a in range(3)])
    for labels in result.labels.numpy():
        inside = labels[slice_axis] > 0
        np.testing.assert_array_equal(labels[slice_axis][inside], np.broadcast_to(index, inside.shape)[inside])
        assert inside.mean() > 0.8
    in_plane = [a for a in range(3) if a != slice_axis]
    turns = [abs(matrix[in_plane[0], in_plane[1]]) for matrix, _ in transforms]
    assert max(turns) > 0.1


def test_single_slices_are_varied_too():
    result, _ = varied(slice_axis=0, patch=(1, 24, 24), count=4)
    assert result.images.shape == (4, 1, 1, 24, 24)
    assert result.images.isfinite().all()
    assert (result.labels[:, 0] == 1).float().mean() > 0.8


def test_without_leave_to_mirror_nothing_changes_sides():
    for seed in range(3):
        _, transforms = varied(mirror=False, seed=seed)
        assert all(matrix[2, 2] > 0.7 and np.linalg.det(matrix) > 0 for matrix, _ in transforms)


def test_with_leave_about_half_of_the_patches_swap_left_and_right_and_nothing_else():
    mirrored = []
    for seed in range(4):
        for matrix, _ in varied(mirror=True, seed=seed)[1]:
            assert matrix[0, 0] > 0.7 and matrix[1, 1] > 0.7 and abs(matrix[2, 2]) > 0.7
            mirrored.append(matrix[2, 2] < 0)
    assert 0.3 < np.mean(mirrored) < 0.7  # of 96


def trilinear(image, at):
    """Linear interpolation of `image` at points [n, 3], the edge going on outside; plain numpy."""
    low = np.floor(at).astype(int)
    total = np.zeros(len(at))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, at - low, 1 - (at - low)), axis=1)
        total += weight * image[tuple(np.clip(low + corner, 0, np.array(image.shape) - 1).T)]
    return total


def test_the_image_is_resampled_at_the_very_places_its_labels_come_from():
    shape = margin_size(PATCH, None)
    image = smooth(shape)
    result, transforms = varied(count=32)
    residuals = []
    patches = zip(transforms, result.images.numpy(), result.labels.numpy(), strict=True)
    for (matrix, shift), varied_image, labels in patches:
        inside = (labels >= 0).all(axis=0)
        places = (np.argwhere(inside) - (np.array(PATCH) - 1) / 2) @ matrix.T + shift + (np.array(shape) - 1) / 2
        expected = trilinear(image, places)
        found = varied_image[0][inside]
        # contrast and brightness always change: what is left after the best straight line is the other changes
        line = np.polyfit(expected, found, 1)
        assert 0.6 < line[0] < 1.7
        residuals.append(np.std(found - np.polyval(line, expected)) / np.std(found))
    residuals = np.sort(residuals)
    assert (residuals < 0.02).sum() >= 6  # about a third of the patches get no noise, gamma or bias field
    assert np.median(residuals) < 0.35
    assert residuals[-1] > 0.03, "no patch got noise, gamma or a bias field"


def test_labels_are_those_of_the_nearest_voxel_and_outside_is_ignored():
    shape = margin_size(PATCH, None)
    result, transforms = varied()
    for (matrix, shift), labels in zip(transforms, result.labels.numpy(), strict=True):
        places = np.argwhere(np.ones(PATCH, bool)) - (np.array(PATCH) - 1) / 2
        places = (places @ matrix.T + shift + (np.array(shape) - 1) / 2).reshape(*PATCH, 3)
        certain = (np.abs(places - np.floor(places) - 0.5) > 0.12).all(axis=-1)
        outside = ((places < -0.5) | (places > np.array(shape) - 0.5)).any(axis=-1)
        assert certain.mean() > 0.2
        assert (labels[:, certain & outside] == IGNORE).all()
        kept = certain & ~outside
        np.testing.assert_array_equal(labels[:, kept].T, np.rint(places[kept]) + 1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    values=st.lists(st.integers(0, 300), min_size=1, max_size=5, unique=True),
    layers=st.integers(1, 3),
    mirror=st.booleans(),
    slice_axis=st.sampled_from([None, 0, 1, 2]),
)
def test_no_label_is_invented_and_ignored_voxels_stay_ignored(seed, values, layers, mirror, slice_axis):
    patch = (6, 8, 10)
    rng = np.random.default_rng(seed)
    labels = rng.choice([*values, IGNORE], (2, layers, *margin_size(patch, slice_axis))).astype(np.int32)
    labels[1] = IGNORE
    images = torch.from_numpy(rng.normal(0, 1, (2, 1, *labels.shape[2:])).astype(np.float32))
    spacing = torch.tensor([[3.0, 0.7, 0.7], [1.0, 1.0, 1.0]], dtype=torch.float64)
    presence = torch.tensor([[True], [False]])
    result = augment(Batch(images, torch.from_numpy(labels), presence, spacing), patch, mirror, slice_axis, seed)
    assert result.images.shape == (2, 1, *patch) and result.images.dtype == torch.float32
    assert result.labels.shape == (2, layers, *patch) and result.labels.dtype == torch.int32
    assert result.images.isfinite().all()
    assert set(result.labels[0].unique().tolist()) <= {*values, IGNORE}
    assert (result.labels[1] == IGNORE).all()
    assert torch.equal(result.presence, presence) and torch.equal(result.spacing, spacing)


def test_constant_patches_stay_finite():
    batch = tracing_batch(8, margin_size(PATCH, None))
    flat = Batch(torch.full_like(batch.images, -3.0), batch.labels, batch.presence, batch.spacing)
    assert augment(flat, PATCH, True, None, 0).images.isfinite().all()


def test_the_same_seed_varies_alike_and_another_seed_does_not():
    shape = margin_size(PATCH, None)
    before = tracing_batch(2, shape)
    first, again, other = (augment(tracing_batch(2, shape), PATCH, True, None, seed) for seed in (11, 11, 12))
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images) and not torch.equal(first.labels, other.labels)
    assert not torch.equal(first.images[0], first.images[1])
    drawn = tracing_batch(2, shape)
    augment(drawn, PATCH, True, None, 0)
    assert torch.equal(drawn.images, before.images), "the drawn patches were written to"
