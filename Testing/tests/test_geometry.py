"""Voxel grids: positions in patient space, canonical axes, and when two grids share their voxels."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given
from hypothesis import strategies as st

from PresenceSegLib.domain.geometry import Grid

SIGNED_AXES = [
    np.eye(3)[:, list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
SPACINGS = st.tuples(*[st.floats(0.1, 8)] * 3)
ORIGINS = st.tuples(*[st.floats(-500, 500)] * 3)
SIZES = st.tuples(*[st.integers(2, 9)] * 3)


def rotation(angles):
    """Rotation matrix from three angles in radians."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        step = np.eye(3)
        a, b = (n for n in range(3) if n != axis)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ step
    return matrix


@st.composite
def grids(draw, tilt=np.pi):
    axes = draw(st.sampled_from(SIGNED_AXES))
    turned = rotation(draw(st.tuples(*[st.floats(-tilt, tilt)] * 3))) @ axes
    return Grid(draw(SIZES), draw(SPACINGS), draw(ORIGINS), tuple(turned.ravel()))


def grid(size=(4, 5, 6), spacing=(1.0, 2.0, 3.0), origin=(10.0, -20.0, 30.0), axes=None):
    axes = np.eye(3) if axes is None else axes
    return Grid(size, spacing, origin, tuple(np.asarray(axes, float).ravel()))


def world(some):
    """LPS positions of all voxel centers [k, j, i, 3], by the definition of origin, spacing and direction."""
    k, j, i = np.meshgrid(*(np.arange(n) for n in some.shape), indexing="ij")
    columns = np.array(some.direction).reshape(3, 3).T
    return sum(
        index[..., None] * step * column for index, step, column in zip((i, j, k), some.spacing, columns, strict=True)
    ) + np.array(some.origin)


@given(grids())
def test_matrix_gives_the_positions_that_simpleitk_gives(some):
    image = sitk.Image(some.size, sitk.sitkUInt8)
    image.SetSpacing(some.spacing)
    image.SetOrigin(some.origin)
    image.SetDirection(some.direction)
    for corner in itertools.product(*((0, n - 1) for n in some.size)):
        expected = image.TransformIndexToPhysicalPoint(corner)
        np.testing.assert_allclose((some.ijk_to_lps @ [*corner, 1])[:3], expected, atol=1e-9)


@given(grids())
def test_matrix_and_image_give_back_the_grid(some):
    again = Grid.from_matrix(some.size, some.ijk_to_lps)
    np.testing.assert_allclose(again.spacing, some.spacing, rtol=1e-12)
    np.testing.assert_allclose(again.direction, some.direction, atol=1e-12)
    assert (again.size, again.origin) == (some.size, some.origin)
    array = np.arange(np.prod(some.size), dtype=np.int32).reshape(some.shape)
    image = some.to_image(array)
    assert Grid.from_image(image).same_as(some)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)


@pytest.mark.parametrize("axes", SIGNED_AXES, ids=lambda axes: "".join("xyzXYZ"[int(i)] for i in axes.argmax(0)))
def test_canonical_axes_run_to_superior_posterior_and_left(axes):
    some = grid(axes=axes)
    canonical = [some.axis_order().apply(coordinate) for coordinate in np.moveaxis(world(some), -1, 0)]
    left, posterior, superior = canonical
    assert (np.diff(superior, axis=0) > 0).all() and not np.diff(superior, axis=1).any()
    assert (np.diff(posterior, axis=1) > 0).all() and not np.diff(posterior, axis=2).any()
    assert (np.diff(left, axis=2) > 0).all() and not np.diff(left, axis=0).any()
    expected = [abs(np.diff(c, axis=n).flat[0]) for n, c in enumerate((superior, posterior, left))]
    np.testing.assert_allclose(some.canonical_spacing(), expected)


@given(grids())
def test_going_to_canonical_axes_and_back_changes_nothing(some):
    array = np.arange(np.prod(some.size)).reshape(some.shape)
    order = some.axis_order()
    np.testing.assert_array_equal(order.invert(order.apply(array)), array)
    canonical = order.apply(array)
    np.testing.assert_array_equal(order.apply(order.invert(canonical)), canonical)


@given(grids())
def test_oblique_axes_go_to_the_nearest_canonical_ones(some):
    order = some.axis_order()
    directions = np.array(some.direction).reshape(3, 3).T[::-1]  # LPS directions of array axes k, j, i
    turned = [directions[axis] * (-1 if n in order.flips else 1) for n, axis in enumerate(order.permutation)]
    chosen = sum(turned[n][2 - n] for n in range(3))
    others = [
        sum(sign * directions[axis][2 - n] for n, (axis, sign) in enumerate(zip(axes, signs, strict=True)))
        for axes in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    assert chosen >= max(others) - 1e-5


@given(grids(), st.data())
def test_a_crop_is_found_where_it_was_cut(some, data):
    start = [data.draw(st.integers(0, n - 2)) for n in some.size]
    size = [data.draw(st.integers(2, n - s)) for n, s in zip(some.size, start, strict=True)]
    origin = tuple((some.ijk_to_lps @ [*start, 1])[:3])
    crop = Grid(tuple(size), some.spacing, origin, some.direction)
    assert crop.offset_in(some) == tuple(start)
    assert some.offset_in(crop) == tuple(-s for s in start)
    assert crop.same_as(some) == (tuple(size) == some.size)


@given(grids(), st.integers(0, 2), st.floats(0.1, 0.9))
def test_a_grid_moved_by_part_of_a_voxel_shares_none(some, axis, part):
    step = np.zeros(3)
    # The tolerance is a part of the smallest side, so that is what the shift is measured in.
    step[axis] = part * min(some.spacing) / some.spacing[axis]
    assume(abs(step[axis] - round(step[axis])) * some.spacing[axis] > 0.06 * min(some.spacing))
    moved = Grid(some.size, some.spacing, tuple((some.ijk_to_lps @ [*step, 1])[:3]), some.direction)
    assert moved.offset_in(some) is None
    assert not moved.same_as(some)


def test_grids_of_other_spacing_turn_or_mirroring_share_no_voxels():
    size = (64, 64, 64)
    some = grid(size, (1.0, 1.0, 1.0))
    assert grid(size, (1.0, 1.0, 1.01)).offset_in(some) is None
    assert grid(size, (1.0, 1.0, 1.0), axes=rotation((0.01, 0, 0))).offset_in(some) is None
    assert grid(size, (1.0, 1.0, 1.0), axes=np.diag([-1, 1, 1])).offset_in(some) is None
    assert grid(size, (1.0, 1.0, 1.0), axes=np.eye(3)[:, [1, 0, 2]]).offset_in(some) is None


@given(grids(tilt=0.4), st.integers(100, 400))
def test_the_rounding_of_nifti_leaves_a_large_grid_the_same(tmp_path_factory, some, length):
    # Only the header matters, so one long axis stands for a large volume.
    some = Grid((length, 2, 2), (0.7, 0.7, 2.5), some.origin, some.direction)
    path = tmp_path_factory.mktemp("nifti") / "a.nii"
    sitk.WriteImage(some.to_image(np.zeros(some.shape, np.uint8)), str(path))
    assert Grid.from_image(sitk.ReadImage(str(path))).same_as(some)


def test_the_description_names_size_spacing_origin_and_axes():
    text = grid((4, 5, 6), (1.0, 0.5, 3.25), (10.0, -20.5, 30.0), np.diag([-1, 1, 1])).describe()
    assert text == "4×5×6 voxels of 1×0.5×3.25 mm, origin (10, -20.5, 30), axes (-1, 0, 0, 0, 1, 0, 0, 0, 1)"


def test_one_brain_in_every_axis_order_is_one_brain_in_canonical_axes(shared_folder):
    paths = sorted(shared_folder("odd/nifti_space").glob("*.nii.gz"))
    assert len(paths) == 16
    brains = []
    for path in paths:
        image = sitk.ReadImage(str(path))
        some = Grid.from_image(image)
        brains.append(some.axis_order().apply(sitk.GetArrayFromImage(image)))
        assert some.canonical_spacing() == pytest.approx(
            Grid.from_image(sitk.ReadImage(str(paths[0]))).canonical_spacing()
        )
    assert len({brain.shape for brain in brains}) == 1
    for brain in brains[1:]:
        np.testing.assert_array_equal(brain, brains[0])
