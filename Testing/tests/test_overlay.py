"""Overlay pictures, read back from the PNG."""

import numpy as np
import pytest
import SimpleITK as sitk

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.overlay import write_overlay_png

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


@pytest.fixture
def volume():
    """Two slices, 10 x 12 voxels: gray 100 with one black and one white voxel to fix the gray window at 0..200."""
    array = np.full((2, 10, 12), 100, np.float32)
    array[:, 0, 0] = 0
    array[:, 9, 8:] = 200
    labels = np.zeros(array.shape, np.uint8)
    labels[:, 3:8, 2:7] = 1
    return array, labels


def read(path):
    picture = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    return picture


def test_rows_are_slices_and_columns_are_the_image_and_each_label_map(tmp_path, volume):
    array, labels = volume
    write_overlay_png(tmp_path / "a.png", array, [labels, labels], [RED], slices=[1], scale=3)
    assert read(tmp_path / "a.png").shape[:2] == (30, 3 * 36)
    write_overlay_png(tmp_path / "a.png", array, [labels], [RED], slices=None, scale=3)
    assert read(tmp_path / "a.png").shape[:2] == (2 * 30, 2 * 36)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_fill_is_a_mixture_outline_is_full_and_outside_is_unchanged(tmp_path, volume):
    array, labels = volume
    labels[:, 4, 9] = 2
    write_overlay_png(tmp_path / "a.png", array, [labels], [RED, BLUE], slices=[0], scale=1)
    picture = read(tmp_path / "a.png")
    plain, drawn = picture[:, :12], picture[:, 12:]
    np.testing.assert_array_equal(plain[5, 4], [128, 128, 128])
    # 45 % red over half gray: 0.45 + 0.55 / 2 and 0.55 / 2 of 255
    np.testing.assert_allclose(drawn[5, 4], [184.9, 70.1, 70.1], atol=1)
    for j, i in ((3, 2), (3, 4), (7, 6), (5, 2)):
        np.testing.assert_array_equal(drawn[j, i], [255, 0, 0])
    np.testing.assert_array_equal(drawn[4, 9], [0, 0, 255])
    outside = labels[0] == 0
    np.testing.assert_array_equal(drawn[outside], plain[outside])
    np.testing.assert_array_equal(drawn[0, 0], [0, 0, 0])
    np.testing.assert_array_equal(drawn[9, 11], [255, 255, 255])


def test_pixels_are_square_in_millimeters(tmp_path, volume):
    array, labels = volume
    write_overlay_png(tmp_path / "a.png", array, [labels], [RED], slices=[0], scale=2, spacing=(1.0, 2.5))
    picture = read(tmp_path / "a.png")
    assert picture.shape[:2] == (50, 48)
    red = (picture[:, 24:] == [255, 0, 0]).all(axis=2)
    assert np.flatnonzero(red.any(axis=1))[[0, -1]].tolist() == [15, 39]  # rows 3..7, 5 pixels each
    assert np.flatnonzero(red.any(axis=0))[[0, -1]].tolist() == [4, 13]  # columns 2..6, 2 pixels each


def test_chosen_slices_come_in_the_given_order(tmp_path, volume):
    array, labels = volume
    array[1, 5, 10] = 200
    write_overlay_png(tmp_path / "a.png", array, [], [RED], slices=[1, 0], scale=1)
    picture = read(tmp_path / "a.png")
    assert picture[5, 10, 0] == 255 and picture[15, 10, 0] == 128


def test_a_flat_image_is_black(tmp_path):
    write_overlay_png(tmp_path / "a.png", np.full((1, 4, 4), 7.0), [], [RED], scale=1)
    assert not read(tmp_path / "a.png").any()


def test_a_missing_folder_is_refused(tmp_path, volume):
    with pytest.raises(InputError):
        write_overlay_png(tmp_path / "nowhere" / "a.png", volume[0], [volume[1]], [RED])
