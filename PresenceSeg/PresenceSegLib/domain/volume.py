"""Volumes: reading them from any image file or DICOM folder, refusing what is no 3-D scalar volume, writing NRRD."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import cannot_write, replaced
from PresenceSegLib.domain.geometry import Grid, check_perpendicular
from PresenceSegLib.domain.nifti import check_nifti_axes, check_nifti_voxels, has_scaling, not_finite

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr")
SEGMENTATION_ENDING = ".seg.nrrd"

# Slices of one series may lie off an even grid by this part of the smallest voxel side.
_SLICE_GAP_TOLERANCE = 0.05


@dataclass(frozen=True)
class Volume:
    """A 3-D scalar image: `array` [k, j, i], integer or float32, finite, on `grid`."""

    array: np.ndarray
    grid: Grid


def read_volume(path: str | Path) -> Volume:
    """Read an intensity volume from an image file or from a folder with one DICOM series.

    NIfTI slope and intercept are applied, so the array holds the intensities that Slicer shows.

    Raises:
        InputError: the file is missing, damaged or no 3-D scalar volume; its axes are sheared; it is one slice only;
            it holds NaN or infinity, or the same value everywhere.
    """
    path = Path(path)
    if is_segmentation_file(path):
        raise InputError(f"{path} is a segmentation; give the volume that it belongs to.")
    image = _read_dicom(path, _the_only_series(path)) if path.is_dir() else _read_file(path)
    volume = _to_volume(image, path)
    _check_intensities(volume.array, path)
    return volume


def read_dicom_series(folder: str | Path, series: str) -> Volume:
    """Read one DICOM series of a folder by its series instance UID. Raises as `read_volume` does."""
    volume = _to_volume(_read_dicom(Path(folder), series), Path(folder))
    _check_intensities(volume.array, Path(folder))
    return volume


def read_label_map(path: str | Path) -> Volume:
    """Read a label map: whole numbers from 0 up, as int array [k, j, i].

    Raises InputError as `read_volume` does, and for values that are no labels: fractions, negative numbers, or numbers
    behind a NIfTI slope and intercept (stored and scaled values differ: which one is the label would be a guess).
    """
    path = Path(path)
    image = _read_file(path)
    if has_scaling(image):
        raise InputError(
            f"{path} is no label map: it stores its numbers with a slope and an intercept, so what counts as the label "
            "is unclear; save it again as plain integers."
        )
    array, grid = _to_volume(image, path).array, Grid.from_image(image)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or (array != np.rint(array)).any():
            raise InputError(f"{path} is no label map: it holds values that are not whole numbers.")
        array = array.astype(np.int32)
    if array.min() < 0:
        raise InputError(f"{path} is no label map: it holds negative values (down to {array.min()}).")
    return Volume(array, grid)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write a volume as compressed image file, all or nothing; no metadata but the geometry is stored."""
    path = Path(path)
    image = volume.grid.to_image(volume.array)
    with replaced(path) as temporary:
        temporary.touch()  # ITK does not always say why it cannot write; the system does
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise cannot_write(path, error) from error
        _check_written(temporary, image, path)


def image_stem(path: str | Path) -> str:
    """File name without its image ending: `a.b.nii.gz` -> `a.b`, `a.seg.nrrd` -> `a`."""
    name = Path(path).name
    for ending in (SEGMENTATION_ENDING, *IMAGE_ENDINGS):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def is_image_file(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_ENDINGS)


def is_segmentation_file(path: Path) -> bool:
    return path.name.lower().endswith(SEGMENTATION_ENDING)


def dicom_series(folder: Path) -> tuple[str, ...]:
    """Series instance UIDs of the DICOM files directly in a folder, sorted."""
    warned = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # a folder without DICOM files is no reason for a warning
    try:
        return tuple(sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))))
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warned)


def _the_only_series(folder: Path) -> str:
    series = dicom_series(folder)
    if not series:
        raise InputError(f"The folder {folder} holds no DICOM series; give an image file or a DICOM folder.")
    if len(series) > 1:
        raise InputError(f"The folder {folder} holds {len(series)} DICOM series; put the one you mean into its own.")
    return series[0]


def read_grid(path: str | Path) -> Grid:
    """The grid of a stored 3-D volume, from its header alone."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as an image ({_itk_reason(error)}).") from error
    return Grid(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def _read_file(path: Path) -> sitk.Image:
    if not path.exists():
        raise InputError(f"There is no file {path}; check the path.")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_kind(reader, path)
        check_nifti_voxels(reader, path)
        return reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{path} cannot be read as an image ({_itk_reason(error)}); it may be damaged, cut short or of an unknown "
            "format."
        ) from error


def _read_dicom(folder: Path, series: str) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"The DICOM series in {folder} cannot be read ({_itk_reason(error)}).") from error
    _check_scalar(image.GetNumberOfComponentsPerPixel(), folder)
    _check_slice_positions(reader, image, folder)
    return image


def _check_slice_positions(reader: sitk.ImageSeriesReader, image: sitk.Image, folder: Path) -> None:
    """Refuse a series whose slices are not where ITK puts them: missing, unevenly spaced or sheared (gantry tilt)."""
    for n in range(len(reader.GetFileNames())):
        if not reader.HasMetaDataKey(n, "0020|0032"):
            return
        position = [float(v) for v in reader.GetMetaData(n, "0020|0032").split("\\")]
        off = np.linalg.norm(np.subtract(position, image.TransformIndexToPhysicalPoint((0, 0, n))))
        if off > _SLICE_GAP_TOLERANCE * min(image.GetSpacing()):
            raise InputError(
                f"The DICOM series in {folder} has missing, unevenly spaced or sheared slices (slice {n + 1} is "
                f"{off:.3g} mm off); load it in Slicer, resample it to an even grid and save it as NRRD."
            )


def _check_kind(reader: sitk.ImageFileReader, path: Path) -> None:
    """Refuse by the header alone what is no 3-D scalar volume."""
    size = reader.GetSize()
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind:
        raise InputError(f"{path} holds complex numbers; save its magnitude as a volume.")
    _check_scalar(reader.GetNumberOfComponents(), path)
    if len(size) > 3 and any(n > 1 for n in size[3:]):
        raise InputError(
            f"{path} is a {len(size)}-D image ({'×'.join(map(str, size))}); save one 3-D volume of it, for example one "
            "time point."
        )
    if len(size) < 3 or min(size[:3]) < 2:
        raise InputError(f"{path} is one slice ({'×'.join(map(str, size))} voxels), not a volume.")
    check_nifti_axes(reader, path)


def _check_scalar(components: int, path: Path) -> None:
    if components > 1:
        raise InputError(
            f"{path} holds {components} values per voxel (colors or vectors); save one scalar channel as a volume."
        )


def _to_volume(image: sitk.Image, path: Path) -> Volume:
    if image.GetDimension() > 3:
        image = image[(slice(None), slice(None), slice(None)) + (0,) * (image.GetDimension() - 3)]
    if min(image.GetSize()) < 2:
        raise InputError(f"{path} is one slice ({'×'.join(map(str, image.GetSize()))} voxels), not a volume.")
    check_perpendicular(np.array(image.GetDirection()).reshape(3, 3), path)
    array = sitk.GetArrayFromImage(image)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return Volume(array, Grid.from_image(image))


def _check_intensities(array: np.ndarray, path: Path) -> None:
    if array.dtype.kind == "f":
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise not_finite(path, bad)
    if array.min() == array.max():
        raise InputError(f"{path} has the value {array.flat[0]} everywhere; there is nothing to segment in it.")


def _check_written(temporary: Path, image: sitk.Image, path: Path) -> None:
    """ITK can end without an error on a full disk: the file counts only when it reads back."""
    try:
        readable = sitk.Hash(sitk.ReadImage(str(temporary))) == sitk.Hash(image)
    except RuntimeError as error:
        raise cannot_write(path, error) from error
    if not readable:
        raise cannot_write(path, OSError("the file does not read back as it was written"))


def _itk_reason(error: RuntimeError) -> str:
    """The telling line of an ITK error, without file names of ITK's sources and addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else "unknown error"
    return re.sub(r"^(sitk::)?(ITK )?ERROR:\s*|\(0x[0-9a-f]+\):?\s*", "", reason)[:200]
