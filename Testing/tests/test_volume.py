"""Volumes and label maps: what is read from each format is exact, and what is no 3-D scalar volume is refused."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.volume import (
    Volume,
    dicom_series,
    image_stem,
    is_image_file,
    is_segmentation_file,
    read_dicom_series,
    read_grid,
    read_label_map,
    read_volume,
    write_volume,
)

COS, SIN = np.cos(0.3), np.sin(0.3)
OBLIQUE = Grid((7, 8, 9), (0.7, 1.5, 3.0), (-31.5, 12.25, 400.0), (COS, 0, -SIN, 0, -1, 0, SIN, 0, COS))
SINGLE_FILES = ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"]
# Offsets in the header of a NIfTI-1 file.
NIFTI_1 = {"scl_slope": 112, "sform_code": 254, "srow": 280}


def voxels(dtype=np.int16, shape=OBLIQUE.shape):
    return np.random.default_rng(1).integers(0, 1000, shape).astype(dtype)


def write(path, array, compressed=True, grid=None, **options):
    image = sitk.GetImageFromArray(array, **options)
    if grid is not None:
        image = grid.to_image(array)
    sitk.WriteImage(image, str(path), useCompression=compressed)
    return path


def patch(path, *changes):
    """Overwrite values in a little-endian file: (offset, struct format, values...)."""
    data = bytearray(path.read_bytes())
    for offset, form, *values in changes:
        struct.pack_into("<" + form, data, offset, *values)
    path.write_bytes(data)
    return path


def write_dicom(folder, positions, rgb=False, series="1.2.3.4", first=0, shear=0.0):
    """A DICOM series of 6x5 slices at these z positions, shifted along y by `shear` per mm of z (gantry tilt).

    Each slice's voxels hold its number.
    """
    folder.mkdir(exist_ok=True)
    for number, z in enumerate(positions, start=first):
        shape = (1, 5, 6, 3) if rgb else (1, 5, 6)
        slice_ = sitk.GetImageFromArray(np.full(shape, number, np.uint8 if rgb else np.int16), isVector=rgb)
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.7" if rgb else "1.2.840.10008.5.1.4.1.1.2",
            "0008|0060": "OT" if rgb else "CT",
            "0010|0010": "DOE^JANE",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0013": str(number),
            "0020|0032": f"0\\{shear * z}\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        slice_.SetOrigin((0.0, 0.0, float(z)))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{series}-{number}.dcm"))
        writer.Execute(slice_)
    return folder


def refusal(path, read=read_volume):
    """The sentence with which a file is refused; it names the file and holds nothing of a traceback."""
    with pytest.raises(InputError) as caught:
        read(path)
    text = str(caught.value)
    assert Path(path).name in text
    assert "\n" not in text and "itk::" not in text and "0x" not in text
    return text


@pytest.mark.parametrize("name", [*SINGLE_FILES, "a.nhdr", "a.mhd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_a_volume_is_read_as_it_was_written(tmp_path, name, dtype):
    volume = Volume(voxels(dtype), OBLIQUE)
    write_volume(tmp_path / name, volume) if name in SINGLE_FILES else write(
        tmp_path / name, volume.array, grid=OBLIQUE
    )
    again = read_volume(tmp_path / name)
    assert again.array.dtype == dtype
    np.testing.assert_array_equal(again.array, volume.array)
    assert again.grid.same_as(OBLIQUE)
    assert read_grid(tmp_path / name).same_as(OBLIQUE)


def test_doubles_become_floats(tmp_path):
    array = voxels(np.float64) + 0.1
    again = read_volume(write(tmp_path / "a.nrrd", array))
    assert again.array.dtype == np.float32
    np.testing.assert_array_equal(again.array, array.astype(np.float32))


def test_writing_replaces_the_old_file_and_leaves_no_other(tmp_path):
    write_volume(tmp_path / "a.nrrd", Volume(voxels() + 1, OBLIQUE))
    write_volume(tmp_path / "a.nrrd", Volume(voxels(), OBLIQUE))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nrrd").array, voxels())
    assert [p.name for p in tmp_path.iterdir()] == ["a.nrrd"]


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, 0), (2, -1024), (1, 10), (-1, 0)])
def test_slope_and_intercept_are_applied_to_intensities_and_refused_for_labels(tmp_path, slope, intercept):
    path = write(tmp_path / "a.nii", voxels())
    patch(path, (NIFTI_1["scl_slope"], "ff", slope, intercept))
    np.testing.assert_allclose(read_volume(path).array, voxels() * slope + intercept, rtol=1e-6)
    assert "slope and an intercept" in refusal(path, read_label_map)


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0, 0)])
def test_a_slope_that_means_nothing_is_no_obstacle_for_labels(tmp_path, slope, intercept):
    path = write(tmp_path / "a.nii", voxels())
    patch(path, (NIFTI_1["scl_slope"], "ff", slope, intercept))
    np.testing.assert_array_equal(read_label_map(path).array, voxels())


def test_labels_with_an_intercept_but_no_slope_are_refused(tmp_path):
    # ITK reads this as labels plus 5, the NIfTI standard as the bare labels.
    path = patch(write(tmp_path / "a.nii", voxels()), (NIFTI_1["scl_slope"], "ff", 0, 5))
    assert "slope and an intercept" in refusal(path, read_label_map)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_whole_numbers_of_any_type_are_labels(tmp_path, dtype):
    array = voxels(np.uint8).astype(dtype)
    labels = read_label_map(write(tmp_path / "a.nrrd", array, grid=OBLIQUE))
    assert labels.array.dtype.kind in "iu"
    np.testing.assert_array_equal(labels.array, array)
    assert labels.grid.same_as(OBLIQUE)


def test_an_empty_label_map_is_one(tmp_path):
    assert not read_label_map(write(tmp_path / "a.nrrd", np.zeros((3, 4, 5), np.uint8))).array.any()


@pytest.mark.parametrize(
    ("value", "complaint"),
    [(0.5, "not whole numbers"), (np.nan, "not whole numbers"), (np.inf, "not whole numbers"), (-1, "negative values")],
)
def test_other_numbers_are_no_labels(tmp_path, value, complaint):
    array = voxels(np.float32)
    array[1, 2, 3] = value
    assert complaint in refusal(write(tmp_path / "a.nrrd", array), read_label_map)


def test_negative_integers_are_no_labels(tmp_path):
    assert "down to -7" in refusal(write(tmp_path / "a.nrrd", voxels() * 0 - 7), read_label_map)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*SINGLE_FILES, "a.hdr"])
def test_a_volume_with_voxels_that_are_no_numbers_is_refused(tmp_path, bad, name):
    array = voxels(np.float32)
    array[0, 0, :2] = array[-1, -1, -1] = bad
    assert "3 voxels that are NaN or infinite" in refusal(write(tmp_path / name, array))


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_constant_volume_is_refused(tmp_path, dtype):
    assert "value 7" in refusal(write(tmp_path / "a.nrrd", np.full((3, 4, 5), 7, dtype)))


@pytest.mark.parametrize("shape", [(1, 4, 5), (4, 1, 5), (4, 5, 1), (4, 5)])
@pytest.mark.parametrize("read", [read_volume, read_label_map])
def test_one_slice_is_no_volume(tmp_path, shape, read):
    assert "is one slice" in refusal(write(tmp_path / "a.nrrd", voxels(shape=shape)), read)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("read", [read_volume, read_label_map])
def test_a_time_series_colors_and_vectors_are_no_volume(tmp_path, name, read):
    series = write(tmp_path / name, voxels(shape=(3, 4, 5, 6)), isVector=False)
    assert "4-D image (6×5×4×3)" in refusal(series, read)
    colors = write(tmp_path / name, voxels(np.uint8, (4, 5, 6, 3)), isVector=True)
    assert "3 values per voxel" in refusal(colors, read)
    pairs = write(tmp_path / name, voxels(np.float32, (4, 5, 6, 2)), isVector=True)
    assert "2 values per voxel" in refusal(pairs, read)


def test_complex_numbers_are_no_volume(tmp_path):
    complex_numbers = voxels(np.float32) * (1 + 1j)
    assert "complex numbers" in refusal(write(tmp_path / "a.nii", complex_numbers.astype(np.complex64)))


def test_a_series_of_one_time_point_is_a_volume(tmp_path):
    array = voxels(shape=(1, 4, 5, 6))
    volume = read_volume(write(tmp_path / "a.nii.gz", array, isVector=False))
    np.testing.assert_array_equal(volume.array, array[0])
    assert volume.grid.size == (6, 5, 4)


def test_sheared_axes_are_refused_in_every_format(tmp_path):
    nifti = write(tmp_path / "a.nii", voxels())
    rows = (1, 0, 0, 0, 0, 1, 0.4, 0, 0, 0, 1, 0)
    patch(nifti, (NIFTI_1["sform_code"], "h", 1), (NIFTI_1["srow"], "12f", *rows))
    header = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 7 8 9\nencoding: raw\n"
    header += "endian: little\nspace directions: (1,0,0) (0,1,0) (0,0.4,1)\nspace origin: (0,0,0)\n\n"
    nrrd = tmp_path / "a.nrrd"
    nrrd.write_bytes(header.encode() + voxels().tobytes())
    header = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nDimSize = 7 8 9\n"
    header += "TransformMatrix = 1 0 0 0 1 0 0 0.4 1\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    meta = tmp_path / "a.mha"
    meta.write_bytes(header.encode() + voxels().tobytes())
    for path in (nifti, nrrd, meta):
        assert "sheared axes" in refusal(path)
        assert "sheared axes" in refusal(path, read_label_map)


def test_what_is_no_image_is_refused(tmp_path):
    assert "no file" in refusal(tmp_path / "nowhere.nii.gz")
    assert "no file" in refusal(tmp_path / "nowhere.nii.gz", read_label_map)
    for name in ("a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.txt", "a"):
        for content in (b"", b"hello", bytes(1000)):
            (tmp_path / name).write_bytes(content)
            for read in (read_volume, read_label_map, read_grid):
                assert "cannot be read as an image" in refusal(tmp_path / name, read)


PARTS = [
    # name of the image, of its file that is cut short, whether it is compressed
    ("a.nii", "a.nii", False),
    ("a.nii.gz", "a.nii.gz", True),
    ("a.hdr", "a.img", False),
    ("a.hdr", "a.hdr", False),
    ("a.nrrd", "a.nrrd", False),
    ("a.nrrd", "a.nrrd", True),
    ("a.nhdr", "a.raw", False),
    ("a.nhdr", "a.raw.gz", True),
    ("a.mha", "a.mha", False),
    ("a.mha", "a.mha", True),
    ("a.mhd", "a.raw", False),
    ("a.mhd", "a.zraw", True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize(("image", "part", "compressed"), PARTS)
@pytest.mark.parametrize("read", [read_volume, read_label_map])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_file_that_is_cut_short_is_refused_or_complete(folder, image, part, compressed, read, data):
    whole = folder / f"{image}-{part}-{compressed}"
    if not whole.exists():
        whole.mkdir()
        write(whole / image, voxels(), compressed, OBLIQUE)
    content = (whole / part).read_bytes()
    # A few bytes from either end as often as anywhere else.
    length = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 20).map(lambda n: len(content) - 1 - n))
    try:
        (whole / part).write_bytes(content[:length])
        try:
            again = read(whole / image)
        except InputError as error:
            assert image in str(error)
        else:
            # The checksum at the end of a compressed file, or a line end, may be missing; a voxel may not.
            assert length > len(content) - 16
            np.testing.assert_array_equal(again.array, voxels())
    finally:
        (whole / part).write_bytes(content)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("missing", [1, 100, 900])
def test_nifti_without_its_last_voxels_is_refused(tmp_path, name, missing):
    whole = write(tmp_path / "whole.nii", voxels(), False).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(whole[:-missing]) if name.endswith("gz") else whole[:-missing])
    assert "cut short" in refusal(tmp_path / name)


def test_nifti_with_bytes_after_its_voxels_is_read(tmp_path):
    whole = write(tmp_path / "whole.nii", voxels(), False).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(whole[:700]) + gzip.compress(whole[700:] + b"more"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array, voxels())


def test_compressed_nifti_with_a_wrong_checksum_is_refused(tmp_path):
    path = write(tmp_path / "a.nii.gz", voxels())
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    assert "cannot be read" in refusal(path)


def test_a_dicom_series_is_sorted_by_position(tmp_path):
    folder = write_dicom(tmp_path / "series", [8, 2, 6, 4])
    volume = read_volume(folder)
    assert volume.array[:, 0, 0].tolist() == [1, 3, 2, 0]
    assert volume.grid.origin == (0, 0, 2)
    assert volume.grid.spacing == (1, 1, 2)


def test_two_series_in_one_folder_are_told_apart(tmp_path):
    folder = write_dicom(tmp_path / "both", [0, 2, 4], series="1.2.9")
    write_dicom(folder, [10, 11, 12, 13], series="1.2.5", first=20)
    assert "2 DICOM series" in refusal(folder)
    assert dicom_series(folder) == ("1.2.5", "1.2.9")
    assert read_dicom_series(folder, "1.2.9").array[:, 0, 0].tolist() == [0, 1, 2]
    assert read_dicom_series(folder, "1.2.5").array[:, 0, 0].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("positions", [[0, 2, 4, 8], [0, 2, 2, 4], [0, 1, 2.5]])
def test_a_series_with_a_gap_or_a_double_slice_is_refused(tmp_path, positions):
    assert "unevenly spaced" in refusal(write_dicom(tmp_path / "series", positions))


def test_a_dicom_series_with_a_tilted_gantry_is_refused(tmp_path):
    assert "sheared slices" in refusal(write_dicom(tmp_path / "series", [0, 3, 6, 9], shear=0.3))


def test_a_segmentation_is_no_volume(tmp_path):
    path = tmp_path / "a.seg.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(8, dtype=np.uint8).reshape(2, 2, 2)), str(path))
    assert "is a segmentation" in refusal(path)


def test_dicom_of_colors_one_slice_or_one_value_is_refused(tmp_path):
    assert "3 values per voxel" in refusal(write_dicom(tmp_path / "colors", [0, 1, 2], rgb=True))
    assert "is one slice" in refusal(write_dicom(tmp_path / "slice", [0]))
    (tmp_path / "empty").mkdir()
    assert "no DICOM series" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "readme.txt").write_text("nothing")
    assert "no DICOM series" in refusal(tmp_path / "empty")


def test_a_stored_volume_says_nothing_about_the_person(tmp_path):
    folder = write_dicom(tmp_path / "series", [0, 1, 2])
    assert all(b"DOE^JANE" in path.read_bytes() for path in folder.iterdir())
    write_volume(tmp_path / "volume.nrrd", read_volume(folder))
    header = (tmp_path / "volume.nrrd").read_bytes().split(b"\n\n")[0]
    assert b":=" not in header and b"content" not in header
    assert header.count(b"space directions: ") == 1


@pytest.mark.parametrize(
    ("name", "stem", "image", "segmentation"),
    [
        ("a.b.nii.gz", "a.b", True, False),
        ("A.NII.GZ", "A", True, False),
        ("a.nii", "a", True, False),
        ("a.seg.nrrd", "a", True, True),
        ("a.nrrd", "a", True, False),
        ("case 1.mha", "case 1", True, False),
        ("a.txt", "a.txt", False, False),
        ("nrrd", "nrrd", False, False),
    ],
)
def test_names_tell_what_a_file_is(name, stem, image, segmentation):
    path = Path("folder.nii") / name
    assert (image_stem(path), is_image_file(path), is_segmentation_file(path)) == (stem, image, segmentation)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("fourD/example4d.nii.gz", "4-D image (128×96×24×2)"),
        ("fourD/pcasl.nii.gz", "4-D image"),
        ("slope/functional.nii", "4-D image"),
        ("pixeltype/complex.nii.gz", "complex numbers"),
        ("pixeltype/example_nifti2.nii.gz", "cannot be read as an image"),
        ("shear/shear.nii.gz", "sheared axes"),
        ("dicom_dcmqi", "2 DICOM series"),
    ],
)
def test_real_files_that_are_no_volume_are_refused(shared_folder, name, complaint):
    assert complaint in refusal(shared_folder("odd") / name)


@pytest.mark.parametrize(
    ("name", "size", "spacing", "kind"),
    [
        ("tiny/low_res.nii.gz", (7, 5, 3), (2, 2, 2), "u"),
        ("tiny/standard.nii.gz", (4, 5, 7), (1, 3, 2), "u"),
        ("slope/anatomical.nii", (33, 41, 25), (2, 2, 2), "i"),
        ("pixeltype/minimal.nii.gz", (64, 64, 10), (3, 3, 3), "u"),
        ("pixeltype/ras.hdr", (62, 41, 34), (2.3849, 2.3902, 2.3658), "u"),
        ("oblique/someones_epi.nii.gz", (53, 61, 33), (3, 3, 3), "f"),
        ("segnrrd/CTChest4.nrrd", (128, 128, 34), (3.0469, 3.0469, 10), "i"),
        ("dicom_torchio", (88, 128, 17), (2, 2, 2), "i"),
    ],
)
def test_real_volumes_are_read(shared_folder, name, size, spacing, kind):
    volume = read_volume(shared_folder("odd") / name)
    assert volume.grid.size == size
    assert volume.array.shape == size[::-1]
    assert volume.grid.spacing == pytest.approx(spacing, abs=1e-3)
    assert volume.array.dtype.kind == kind


def test_one_real_oblique_volume_in_two_formats_is_one_volume(shared_folder):
    folder = shared_folder("odd/oblique")
    nifti, nrrd = read_volume(folder / "FLAIR.nii.gz"), read_volume(folder / "FLAIR.nrrd")
    assert nifti.grid.same_as(nrrd.grid)
    np.testing.assert_array_equal(nifti.array, nrrd.array)
    lesion = read_label_map(folder / "lesion.nii.gz")
    assert lesion.grid.same_as(nifti.grid)
    assert 0 < lesion.array.astype(bool).sum() < lesion.array.size / 10


def test_real_label_values_with_gaps_are_kept(shared_folder):
    labels = read_label_map(shared_folder("odd/nrrd") / "prostate_phantom_subvolume-label.nrrd")
    assert np.unique(labels.array).tolist() == [0, 1, 7, 8, 9]
