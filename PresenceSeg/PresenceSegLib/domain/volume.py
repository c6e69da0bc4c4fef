"""Volumes: reading them from any image file or DICOM folder, refusing what is no 3-D scalar volume, writing NRRD."""

import gzip
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import cannot_write, replaced
from PresenceSegLib.domain.geometry import Grid

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr")
SEGMENTATION_ENDING = ".seg.nrrd"

# Slices of one series may lie off an even grid by this part of the smallest voxel side.
_SLICE_GAP_TOLERANCE = 0.05

_NIFTI_HEADER_SIZE = (348).to_bytes(4, "little")  # the first number of a NIfTI-1 or Analyze file; tells its byte order
_NIFTI_FLOATS = {"16": "f4", "64": "f8"}  # number type by the header's datatype code


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
    if _has_scaling(image):
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
        _check_nifti_voxels(reader, path)
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
    _check_nifti_axes(reader, path)


def _check_scalar(components: int, path: Path) -> None:
    if components > 1:
        raise InputError(
            f"{path} holds {components} values per voxel (colors or vectors); save one scalar channel as a volume."
        )


def _check_nifti_voxels(reader: sitk.ImageFileReader, path: Path) -> None:
    """Refuse what ITK replaces by zeros without a word: missing voxels of a NIfTI or Analyze file, NaN and infinity."""
    if not reader.HasMetaDataKey("vox_offset"):
        return
    dimensions = int(reader.GetMetaData("dim[0]"))
    voxels = math.prod(int(reader.GetMetaData(f"dim[{n}]")) for n in range(1, dimensions + 1))
    start = int(float(reader.GetMetaData("vox_offset")))
    needed = start + voxels * int(reader.GetMetaData("bitpix")) // 8
    try:
        with open(path, "rb") if path.suffix.lower() != ".gz" else gzip.open(path) as file:
            order = "<" if file.read(4) == _NIFTI_HEADER_SIZE else ">"
        kind = _NIFTI_FLOATS.get(reader.GetMetaData("datatype"))
        length, bad = _scan(_voxel_file(path), start, needed, np.dtype(order + kind) if kind else None)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as an image ({error}); it is damaged or cut short.") from error
    if length < needed:
        raise InputError(f"{path} is cut short: {length} of {needed} bytes are there; restore it from a copy.")
    if bad:
        raise _not_finite(path, bad)


def _voxel_file(path: Path) -> Path:
    """The file with the voxels: the second one of a pair `.hdr` and `.img`, else the file itself."""
    if path.suffix.lower() != ".hdr":
        return path
    candidates = (path.with_suffix(ending) for ending in (".img", ".IMG", ".img.gz"))
    return next((c for c in candidates if c.exists()), path.with_suffix(".img"))


def _scan(path: Path, start: int, stop: int, floats: np.dtype | None) -> tuple[int, int]:
    """Bytes in a file that may be compressed, and numbers between two bytes that are NaN or infinite.

    A compressed file is read through, which checks its checksum too.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if not compressed and floats is None:
        return path.stat().st_size, 0
    bad = 0
    with gzip.open(path) if compressed else open(path, "rb") as file:
        length = len(file.read(start))
        while block := file.read(1 << 20):
            if floats is not None:
                count = max(0, min(len(block), stop - length)) // floats.itemsize
                bad += count - int(np.isfinite(np.frombuffer(block, floats, count)).sum())
            length += len(block)
    return length, bad


def _check_nifti_axes(reader: sitk.ImageFileReader, path: Path) -> None:
    """Refuse NIfTI files whose chosen orientation (sform) is sheared: ITK silently falls back to another one."""
    if not reader.HasMetaDataKey("sform_code") or int(float(reader.GetMetaData("sform_code"))) <= 0:
        return
    rows = [[float(v) for v in reader.GetMetaData(f"srow_{axis}").split()] for axis in "xyz"]
    axes = np.array(rows)[:, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if lengths.all():
        _check_perpendicular(axes / lengths, path)


def _check_perpendicular(direction: np.ndarray, path: Path) -> None:
    """Refuse sheared axes, given as unit vectors in the columns of a 3x3 matrix."""
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-3:
        raise InputError(
            f"{path} has sheared axes (gantry tilt); resample it to a grid with perpendicular axes, for example by "
            "loading and hardening it in Slicer."
        )


def _to_volume(image: sitk.Image, path: Path) -> Volume:
    if image.GetDimension() > 3:
        image = image[(slice(None), slice(None), slice(None)) + (0,) * (image.GetDimension() - 3)]
    if min(image.GetSize()) < 2:
        raise InputError(f"{path} is one slice ({'×'.join(map(str, image.GetSize()))} voxels), not a volume.")
    _check_perpendicular(np.array(image.GetDirection()).reshape(3, 3), path)
    array = sitk.GetArrayFromImage(image)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return Volume(array, Grid.from_image(image))


def _check_intensities(array: np.ndarray, path: Path) -> None:
    if array.dtype.kind == "f":
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise _not_finite(path, bad)
    if array.min() == array.max():
        raise InputError(f"{path} has the value {array.flat[0]} everywhere; there is nothing to segment in it.")


def _not_finite(path: Path, count: int) -> InputError:
    return InputError(f"{path} holds {count} voxels that are NaN or infinite; replace them by numbers.")


def _has_scaling(image: sitk.Image) -> bool:
    if not image.HasMetaDataKey("scl_slope"):
        return False
    slope, intercept = float(image.GetMetaData("scl_slope")), float(image.GetMetaData("scl_inter"))
    return slope not in (0.0, 1.0) or intercept != 0.0  # ITK adds the intercept even where the slope is 0, "unused"


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


def repeated(names: list[str]) -> list[str]:
    """Names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)
