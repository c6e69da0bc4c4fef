"""Voxel grids in patient space: where the voxels of a volume lie, and how its axes map to the canonical ones.

Coordinates are LPS millimeters (DICOM, ITK). Sizes, spacings and origins are in i, j, k order as ITK and Slicer give
them; arrays are indexed [k, j, i].
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from PresenceSegLib.domain.errors import InputError

# Two grids are the same when no voxel center is further off than this part of the smallest voxel side. NIfTI stores
# rotations as float32 quaternions, which alone moves the far corner of a large volume by some thousandths of a voxel.
SAME_GRID_TOLERANCE = 0.05


@dataclass(frozen=True)
class AxisOrder:
    """How to turn an array [k, j, i] into canonical axes [S, P, L] (superior, posterior, left increasing).

    First transpose by `permutation`, then flip the axes in `flips`: lossless, so the inverse is exact.
    """

    permutation: tuple[int, int, int]
    flips: tuple[int, ...]

    def apply(self, array: np.ndarray) -> np.ndarray:
        """View of `array` [k, j, i] in canonical axes [S, P, L]."""
        return np.flip(array.transpose(self.permutation), self.flips)

    def invert(self, array: np.ndarray) -> np.ndarray:
        """View of a canonical `array` [S, P, L] in the volume's own axes [k, j, i]."""
        return np.flip(array, self.flips).transpose(np.argsort(self.permutation))


@dataclass(frozen=True)
class Grid:
    """The voxel grid of a volume.

    Attributes:
        size: voxels along i, j, k.
        spacing: mm between voxel centers along i, j, k.
        origin: LPS position (mm) of the center of voxel (0, 0, 0).
        direction: 3x3 row-major direction cosines; column n is the LPS direction of voxel axis n.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    @staticmethod
    def from_image(image: sitk.Image) -> "Grid":
        return Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @staticmethod
    def from_matrix(size: tuple[int, int, int], ijk_to_lps: np.ndarray) -> "Grid":
        """Grid from a 4x4 voxel-to-LPS matrix."""
        axes = np.asarray(ijk_to_lps, dtype=float)[:3, :3]
        spacing = np.linalg.norm(axes, axis=0)
        origin = np.asarray(ijk_to_lps, dtype=float)[:3, 3]
        return Grid(
            tuple(int(n) for n in size),
            tuple(spacing.tolist()),
            tuple(origin.tolist()),
            tuple((axes / spacing).ravel().tolist()),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Array shape [k, j, i]."""
        return self.size[::-1]

    @property
    def ijk_to_lps(self) -> np.ndarray:
        """4x4 matrix from voxel indices (i, j, k) to LPS millimeters."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.array(self.direction).reshape(3, 3) * np.array(self.spacing)
        matrix[:3, 3] = self.origin
        return matrix

    def to_image(self, array: np.ndarray) -> sitk.Image:
        """SimpleITK image of `array` [k, j, i] on this grid."""
        image = sitk.GetImageFromArray(np.ascontiguousarray(array))
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image

    def same_as(self, other: "Grid") -> bool:
        return self.size == other.size and self.offset_in(other) == (0, 0, 0)

    def offset_in(self, other: "Grid") -> tuple[int, int, int] | None:
        """Index (i, j, k) in `other` of this grid's first voxel, or None if the voxels do not coincide."""
        to_other = np.linalg.inv(other.ijk_to_lps) @ self.ijk_to_lps
        first = to_other[:3, 3]
        offset = np.rint(first)
        corners = np.array(list(itertools.product(*((0, n - 1) for n in self.size))))
        error = corners @ to_other[:3, :3].T + first - (corners + offset)
        error_mm = np.linalg.norm(error * np.array(other.spacing), axis=1).max()
        if error_mm > SAME_GRID_TOLERANCE * min(other.spacing):
            return None
        return tuple(int(n) for n in offset)

    def axis_order(self) -> AxisOrder:
        """The transposition and flips that bring the array axes closest to the canonical [S, P, L].

        Volumes are never rotated: an oblique one keeps its own axes and only changes their order and sign.
        """
        direction = np.array(self.direction).reshape(3, 3)
        closeness = np.abs(direction)[::-1, ::-1]  # rows: canonical S, P, L; columns: array axes k, j, i
        permutation = max(
            itertools.permutations(range(3)), key=lambda p: round(sum(closeness[n, p[n]] for n in range(3)), 6)
        )
        signed = direction[::-1, ::-1]
        flips = tuple(n for n in range(3) if signed[n, permutation[n]] < 0)
        return AxisOrder(permutation, flips)

    def canonical_spacing(self) -> tuple[float, float, float]:
        """Spacing (mm) along the canonical axes [S, P, L]."""
        return tuple(self.spacing[::-1][axis] for axis in self.axis_order().permutation)

    def describe(self) -> str:
        """The geometry in one line, for messages."""
        size = "×".join(str(n) for n in self.size)
        spacing = "×".join(f"{s:.4g}" for s in self.spacing)
        origin = ", ".join(f"{o:.5g}" for o in self.origin)
        axes = ", ".join(f"{d:.3g}" for d in self.direction)
        return f"{size} voxels of {spacing} mm, origin ({origin}), axes ({axes})"


def check_perpendicular(direction: np.ndarray, path: Path) -> None:
    """Raise InputError for a file with sheared axes, given as unit vectors in the columns of a 3x3 matrix."""
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-3:
        raise InputError(
            f"{path} has sheared axes (gantry tilt); resample it to a grid with perpendicular axes, for example by "
            "loading and hardening it in Slicer."
        )
