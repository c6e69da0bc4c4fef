"""What ITK gets wrong about NIfTI files without saying so: such files are refused before their voxels are used."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.geometry import check_perpendicular

_NIFTI_HEADER_SIZE = (348).to_bytes(4, "little")  # the first number of a NIfTI-1 or Analyze file; tells its byte order
_NIFTI_FLOATS = {"16": "f4", "64": "f8"}  # number type by the header's datatype code


def check_nifti_voxels(reader: sitk.ImageFileReader, path: Path) -> None:
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
        raise not_finite(path, bad)


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


def check_nifti_axes(reader: sitk.ImageFileReader, path: Path) -> None:
    """Refuse NIfTI files whose chosen orientation (sform) is sheared: ITK silently falls back to another one."""
    if not reader.HasMetaDataKey("sform_code") or int(float(reader.GetMetaData("sform_code"))) <= 0:
        return
    rows = [[float(v) for v in reader.GetMetaData(f"srow_{axis}").split()] for axis in "xyz"]
    axes = np.array(rows)[:, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if lengths.all():
        check_perpendicular(axes / lengths, path)


def has_scaling(image: sitk.Image) -> bool:
    """Whether a NIfTI image stores its numbers with a slope and an intercept."""
    if not image.HasMetaDataKey("scl_slope"):
        return False
    slope, intercept = float(image.GetMetaData("scl_slope")), float(image.GetMetaData("scl_inter"))
    return slope not in (0.0, 1.0) or intercept != 0.0  # ITK adds the intercept even where the slope is 0, "unused"


def not_finite(path: Path, count: int) -> InputError:
    return InputError(f"{path} holds {count} voxels that are NaN or infinite; replace them by numbers.")
