"""Pictures of segmentations: slices of a volume beside the same slices with structures drawn over them, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from PresenceSegLib.domain.files import cannot_write, replaced

_FILL = 0.45
_SHOWN_SLICES = 4
_BRIGHTEST = 99.5  # percentile of the volume shown as white


def write_overlay_png(
    path: str | Path,
    array: np.ndarray,
    label_maps: Sequence[np.ndarray],
    colors: np.ndarray,
    slices: Sequence[int] | None = None,
    scale: int = 4,
    spacing: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Write a montage: a row per slice; the plain image first, then each label map over it (45 % fill, full outline).

    The gray window runs from the volume's minimum to its 99.5th percentile. Outlines are one voxel wide and lie inside
    their structure, so no voxel outside every structure changes.

    Args:
        path: the PNG file.
        array: [k, j, i] image.
        label_maps: each [k, j, i], unsigned; n is the n-th of `colors`, counted from 1; 0 is left as it is.
        colors: [n, 3] in 0..1.
        slices: k of each row; None takes four, evenly spread.
        scale: pixels per voxel along the in-plane axis with the smaller spacing.
        spacing: mm between voxels along i and j; pixels of the picture are square in mm.

    Raises:
        InputError: the file cannot be written.
    """
    if slices is None:
        slices = np.unique(np.linspace(0, len(array) - 1, _SHOWN_SLICES + 2).round().astype(int)[1:-1])
    low, high = float(array.min()), float(np.percentile(array, _BRIGHTEST))
    palette = np.concatenate([np.zeros((1, 3)), np.asarray(colors, dtype=float)])
    columns, rows = (_nearest(n, scale * s / min(spacing)) for n, s in zip(array.shape[:0:-1], spacing, strict=True))
    montage = []
    for k in slices:
        gray = np.clip((array[k].astype(float) - low) / max(high - low, np.finfo(float).tiny), 0, 1)
        image = np.repeat(gray[..., None], 3, axis=2)
        tiles = [image, *(_draw(image, labels[k], palette) for labels in label_maps)]
        montage.append(np.concatenate([tile[rows][:, columns] for tile in tiles], axis=1))
    picture = np.rint(np.concatenate(montage) * 255).astype(np.uint8)
    with replaced(path) as temporary:
        try:
            sitk.WriteImage(sitk.GetImageFromArray(picture, isVector=True), str(temporary))
        except RuntimeError as error:  # SimpleITK's only way to say that the file or the disk refused
            raise cannot_write(Path(path), error) from error


def _draw(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """`image` [j, i, 3] with the structures of `labels` [j, i] drawn over it."""
    opacity = np.where(_outline(labels), 1.0, _FILL) * (labels > 0)
    return image + opacity[..., None] * (palette[labels] - image)


def _outline(labels: np.ndarray) -> np.ndarray:
    """Whether a voxel [j, i] has another label above, below, left or right of it."""
    outline = np.zeros(labels.shape, bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        different = labels[a] != labels[b]
        outline[a] |= different
        outline[b] |= different
    return outline


def _nearest(count: int, pixels_per_voxel: float) -> np.ndarray:
    """Index of the voxel that each pixel along an axis shows."""
    return (np.arange(round(count * pixels_per_voxel)) * count / round(count * pixels_per_voxel)).astype(int)
