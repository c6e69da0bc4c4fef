"""NRRD files with all the text of their headers, for the segmentations that keep their segments' names and tags there.

pynrrd decodes the voxels. It drops every character of a header that is not ASCII, refuses to write one and strips
blanks, so the header's text is read and written here. The format: https://teem.sourceforge.net/nrrd/format.html
"""

import gzip
import re
import zlib
from pathlib import Path

import nrrd
import numpy as np

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import replaced

# Fields that describe the file as a whole and pass through; all other fields describe the voxels or the axes.
_DESCRIPTIONS = ("content", "sample units", "space units")
_TO_LPS = {"left-posterior-superior": (1, 1, 1), "right-anterior-superior": (-1, -1, 1)}
_SPATIAL_KINDS = ["domain", "domain", "domain"]
_DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, zlib.error)


def read_nrrd(path: Path, skip_voxels: bool) -> tuple[dict[str, str], np.ndarray, np.ndarray | None]:
    """Read a NRRD file with three spatial axes, and perhaps a list axis before them.

    Returns:
        The texts of the header (key/value pairs and descriptions, any character), the 4x4 matrix from voxel indices
        to LPS millimeters, and the voxels [L, k, j, i], or None with `skip_voxels`.

    Raises:
        InputError: the file is missing, damaged or of another shape.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}; check the path.")
    try:
        with open(path, "rb") as file:
            lines, texts = _read_header(file)
            fields = nrrd.read_header(lines)
            matrix = _ijk_to_lps(fields)
            voxels = None if skip_voxels else nrrd.read_data(fields, file, str(path), index_order="C")
    except (*_DAMAGE, nrrd.NRRDError) as error:
        raise InputError(f"{path} cannot be read as a segmentation ({error}); it may be cut short.") from error
    if voxels is not None:
        voxels = np.ascontiguousarray(np.moveaxis(voxels, -1, 0)) if voxels.ndim == 4 else voxels[np.newaxis]
    return texts, matrix, voxels


def write_nrrd(path: str | Path, texts: dict[str, str], ijk_to_lps: np.ndarray, voxels: np.ndarray) -> None:
    """Write integer voxels [L, k, j, i] as compressed NRRD file, all or nothing; one layer makes no list axis."""
    if len(voxels) == 1:
        array, sizes, directions, kinds = voxels[0], [], [], []
    else:
        array, sizes, directions, kinds = np.moveaxis(voxels, 0, -1), [str(len(voxels))], ["none"], ["list"]
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    fields = {
        "type": f"{array.dtype.name}",
        "dimension": str(array.ndim),
        "space": "left-posterior-superior",
        "sizes": " ".join([*sizes, *(str(n) for n in voxels.shape[:0:-1])]),
        "space directions": " ".join([*directions, *(_vector(axis) for axis in ijk_to_lps[:3, :3].T)]),
        "kinds": " ".join([*kinds, *_SPATIAL_KINDS]),
        "endian": "little",
        "encoding": "gzip",
        "space origin": _vector(ijk_to_lps[:3, 3]),
    }
    lines = ["NRRD0004", *(f"{name}: {value}" for name, value in fields.items())]
    lines += [f"{key}: {value}" if key in _DESCRIPTIONS else f"{key}:={_escape(value)}" for key, value in texts.items()]
    with replaced(path) as temporary, open(temporary, "wb") as file:
        file.write("\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape"))
        with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as compressed:
            compressed.write(array)


def _read_header(file) -> tuple[list[str], dict[str, str]]:
    """The lines of the header that describe voxels and axes, and its texts; the file then stands at its voxels."""
    lines, texts = [], {}
    while line := file.readline():
        # Bytes that are no UTF-8 come back as they were when the header is written.
        text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        if not lines and not text.startswith("NRRD"):
            raise ValueError("it is no NRRD file")
        if not text:
            return lines, texts
        name, _, value = text.partition(":")
        if value.startswith("="):
            texts[name] = _unescape(value[1:])
        elif name in _DESCRIPTIONS:
            texts[name] = value.strip()
        else:
            lines.append(text)
    raise EOFError("the header has no end")


def _ijk_to_lps(fields: dict) -> np.ndarray:
    if fields.get("kinds", _SPATIAL_KINDS)[-3:] != _SPATIAL_KINDS or fields["dimension"] not in (3, 4):
        raise ValueError("the file does not have three spatial axes, the last ones")
    if "space" not in fields or fields["space"] not in _TO_LPS:
        raise ValueError("its space must be left-posterior-superior or right-anterior-superior")
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(fields["space directions"], float)[-3:].T
    matrix[:3, 3] = fields["space origin"]
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise ValueError("its axes span no space")
    return np.diag([*_TO_LPS[fields["space"]], 1]) @ matrix


def _vector(values: np.ndarray) -> str:
    return f"({','.join(repr(float(v)) for v in values)})"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _unescape(text: str) -> str:
    return re.sub(r"\\([n\\])", lambda match: "\n" if match[1] == "n" else "\\", text)
