"""Phantoms of a right thigh in T1-weighted MR: small made-up cases for the demo, the sample data and the tests.

The anatomy is a set of formulas in limb coordinates (mm): x medial, y posterior, z proximal, 0 in the middle of the
volume. It is evaluated on a grid finer than the voxels and averaged down, so voxels on a border are mixtures as in a
real image; then come the coil's bias field, Rician noise and an arbitrary intensity scale. The scanner's axes are the
limb's, tilted as a whole in patient space, in any order within the slice and with any sign.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.structure import Structure

_TYPES = "Segmentation category and type - 3D Slicer General Anatomy list"
_REGIONS = "Anatomic codes - DICOM master list"
_RIGHT = "SCT^24028007^Right"
_TISSUE = "SCT^85756007^Tissue"
_ANATOMY = "SCT^123037004^Anatomical Structure"
_FEMUR = f"SCT^71341001^Femur~{_RIGHT}"
_THIGH = f"SCT^68367000^Thigh~{_RIGHT}"
_NOWHERE = "^^~^^"


def _entry(category: str, kind: str, modifier: str = "^^", region: str = _NOWHERE) -> str:
    """Slicer's serialized terminology entry."""
    return f"{_TYPES}~{category}~{kind}~{modifier}~{_REGIONS}~{region}"


STRUCTURES = (
    Structure("cortical bone", (0.945, 0.839, 0.569), _entry(_TISSUE, "SCT^272673000^Bone", region=_FEMUR)),
    Structure("bone marrow", (0.565, 0.933, 0.565), _entry(_ANATOMY, "SCT^14016003^Bone marrow", region=_FEMUR)),
    Structure(
        "subcutaneous fat",
        (0.902, 0.863, 0.275),
        _entry(_TISSUE, "SCT^67769002^Subcutaneous fatty tissue", region=_THIGH),
    ),
    Structure("quadriceps", (0.753, 0.408, 0.345), _entry(_ANATOMY, "SCT^21989003^Quadriceps femoris muscle", _RIGHT)),
    Structure(
        "hamstrings",
        (0.435, 0.722, 0.824),
        _entry(_ANATOMY, "SCT^128511007^Posterior muscle of thigh structure", _RIGHT),
    ),
    Structure(
        "adductors",
        (0.718, 0.612, 0.863),
        _entry(_ANATOMY, "SCT^1179657002^Structure of medial muscle of thigh", _RIGHT),
    ),
)
_NAMES = tuple(s.name for s in STRUCTURES)
_BACKGROUND = 0
_CORTEX, _MARROW, _FAT, _QUADRICEPS, _HAMSTRINGS, _ADDUCTORS = range(1, 7)

# "large" has twice as many voxels along every axis; the anatomy of a seed is the same in both.
_REFINEMENT = {"small": 1, "large": 2}
_SAMPLES = 3  # samples per voxel along i and along j

_Pair = tuple[float, float]
_Triple = tuple[float, float, float]

# Signal relative to fat in a T1-weighted spin echo image without fat suppression.
_SIGNAL_CORTEX = 0.05
_SIGNAL_MARROW = 0.93
_SIGNAL_SKIN = 0.45
_SIGNAL_NERVE = 0.5
_FAT_OF_LOST_MUSCLE = 0.85  # the rest is scar, as dark as muscle
_FASCIA_DARKNESS = 0.4  # the fascia lata is dark, and thinner than a voxel
_SIGNAL_VESSEL = 0.1  # flowing blood has left the slice before the echo


@dataclass(frozen=True)
class PhantomCase:
    """One made-up volume with the true structures in it.

    Attributes:
        array: float32 [k, j, i], MR signal in arbitrary units, about 0 in air.
        labels: uint8 [k, j, i]; n is the n-th of STRUCTURES, counted from 1; 0 is air and tissue of no structure.
        spacing: mm between voxel centers along i, j, k.
        origin: LPS position (mm) of the center of voxel (0, 0, 0).
        direction: 3x3 row-major direction cosines; column n is the LPS direction of voxel axis n. Its determinant is
            -1 in cases with an odd number of reversed axes.
    """

    array: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    @property
    def grid(self) -> Grid:
        return Grid(self.array.shape[::-1], self.spacing, self.origin, self.direction)


@dataclass(frozen=True)
class _Limb:
    """What differs between two people's thighs. Lengths in mm, angles in radians; angle 0 is medial, pi/2 posterior.

    All plain floats: a numpy double would turn the single precision arrays it meets into double, at half the speed.
    The borders are those between quadriceps and adductors, adductors and hamstrings, hamstrings and quadriceps.
    """

    radius: float
    taper: float
    ellipticity: float
    lobes: _Pair  # relative size of the third and fourth harmonic of the outline
    lobe_angles: _Pair
    skin: float
    fat: float
    fat_bulge: float  # how much thicker the fat is on its thick side than on average, relative
    fat_bulge_angle: float
    rotation: float
    center: _Pair  # x and y
    lean: _Pair  # mm in x and y over the length of the volume
    bow: _Pair  # mm in x and y between the middle and the ends
    femur: _Pair  # x and y from the limb's center, relative to its radius
    femur_radius: float
    cortex: float
    borders: _Triple  # angles around the femur, mid-thigh
    twist: _Triple  # change of those angles over the length of the volume
    curl: _Triple  # change of those angles from the femur out to the fascia
    bend: _Triple  # their bulge halfway between femur and fascia
    septum: float  # half the thickness of the fat between muscle groups
    muscle_signal: _Triple  # quadriceps, hamstrings, adductors
    marbling: float  # part of the muscle that fat has infiltrated


def make_case(seed: int, *, size: str = "small", missing: Iterable[str] = frozenset()) -> PhantomCase:
    """Make the thigh of one person, the same for the same arguments.

    Args:
        seed: 0 or more; which person, scanner setting and noise.
        size: "small" (some 74 x 74 voxels of 2.5 mm, 14 to 20 slices of 7 to 10 mm) or "large" (twice as fine).
        missing: names of structures that this person lacks. A missing muscle is replaced by unlabeled fat, as after
            resection; without subcutaneous fat the skin lies on the muscles; without marrow the femur is solid; without
            cortical bone the whole shaft, marrow too, is replaced by fat.

    Raises:
        InputError: unknown size or structure name.
    """
    missing = frozenset(missing)
    if size not in _REFINEMENT:
        raise InputError(f'"{size}" is no phantom size; choose one of {", ".join(_REFINEMENT)}.')
    if not missing <= set(_NAMES):
        raise InputError(
            f"The phantom has no structure {', '.join(sorted(missing - set(_NAMES)))}; choose from {', '.join(_NAMES)}."
        )
    anatomy_rng, grid_rng, image_rng = (np.random.default_rng([seed, stream]) for stream in range(3))
    limb = _draw_limb(anatomy_rng)
    shape, spacing = _draw_grid(grid_rng, _REFINEMENT[size])
    fine_signal, fine_labels = _render(limb, shape, spacing, missing, anatomy_rng)
    array = _acquire(_average(fine_signal), image_rng)
    return _orient(array, _majority(fine_labels), spacing, grid_rng)


def _draw_limb(rng: np.random.Generator) -> _Limb:
    degrees = np.pi / 180
    return _Limb(
        radius=rng.uniform(58, 69),
        taper=rng.uniform(0.1, 0.28),
        ellipticity=rng.uniform(-0.07, 0.07),
        lobes=_floats(rng.normal(0, 0.015, 2)),
        lobe_angles=_floats(rng.uniform(0, 2 * np.pi, 2)),
        skin=rng.uniform(1.4, 2.2),
        fat=rng.uniform(6, 18),
        fat_bulge=rng.uniform(0.1, 0.5),
        fat_bulge_angle=rng.normal(60, 35) * degrees,
        rotation=rng.uniform(-25, 25) * degrees,
        center=_floats(rng.uniform(-4, 4, 2)),
        lean=_floats(rng.uniform(-10, 10, 2)),
        bow=_floats(rng.uniform(-4, 4, 2)),
        femur=_floats(rng.normal(-0.12, 0.035, 2)),
        femur_radius=rng.uniform(13, 16.5),
        cortex=rng.uniform(5, 7.5),
        borders=_floats((np.array([-28, 52, 137]) + rng.uniform(-9, 9, 3)) * degrees),
        twist=_floats((np.array([-20, 24, -8]) + rng.uniform(-10, 10, 3)) * degrees),
        curl=_floats(rng.uniform(-14, 14, 3) * degrees),
        bend=_floats(rng.uniform(-12, 12, 3) * degrees),
        septum=rng.uniform(0.3, 0.7),
        muscle_signal=_floats(rng.uniform(0.3, 0.42) + rng.normal(0, 0.008, 3)),
        marbling=rng.uniform(0, 0.08),
    )


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())


def _draw_grid(rng: np.random.Generator, refinement: int) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Shape [k, j, i] and spacing (mm, in i, j, k order); the field of view all but always holds the whole limb."""
    in_plane, thickness = rng.uniform(2.45, 2.65), rng.uniform(7, 10)
    shape = (rng.integers(14, 21), *rng.integers(70, 79, 2))
    return (
        tuple(int(n) * refinement for n in shape),
        (in_plane / refinement, in_plane / refinement, thickness / refinement),
    )


def _render(
    limb: _Limb,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    missing: frozenset[str],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Signal (fat = 1, float32) and labels (uint8) [k, j, i] on a grid `_SAMPLES` times finer within the slice."""
    step = spacing[0] / _SAMPLES
    count = (shape[0], shape[1] * _SAMPLES, shape[2] * _SAMPLES)
    z, y, x = np.ogrid[tuple(slice(-(n - 1) / 2, n / 2) for n in count)]
    t = (z / (shape[0] - 1)).astype(np.float32)  # -0.5 distal, 0.5 proximal
    x, y = _limb_coordinates(limb, x * step, y * step, t)

    angle = np.arctan2(y, x)
    scale = limb.radius * (1 + limb.taper * t)
    depth = scale * _outline(limb, angle) - np.hypot(x, y)  # below the skin's surface
    fat = 0 if "subcutaneous fat" in missing else limb.fat * (1 + limb.fat_bulge * np.cos(angle - limb.fat_bulge_angle))
    fascia = depth - limb.skin - fat  # below the fascia

    coarse, fine, strands = (_smooth_noise(rng, count, cells) for cells in ((6, 14, 14), (6, 40, 40), (5, 24, 24)))
    fat_signal = 1 - 0.12 * np.exp(-((strands / 0.12) ** 2)) + 0.03 * coarse
    signal, labels = fat_signal.copy(), np.zeros(count, np.uint8)
    labels[fascia < 0] = _FAT

    dx, dy = x - limb.femur[0] * scale, y - limb.femur[1] * scale
    inside = fascia >= 0
    signal[inside], labels[inside] = _muscles(
        limb,
        *(np.broadcast_to(field, count)[inside] for field in (dx, dy, scale, t, fascia, fat_signal, coarse, fine)),
        lost=[label for label in (_QUADRICEPS, _HAMSTRINGS, _ADDUCTORS) if _NAMES[label - 1] in missing],
    )
    signal *= 1 - _FASCIA_DARKNESS * np.exp(-(fascia**2))

    _add_sartorius(signal, labels, fascia, angle, scale, t, limb, fat_signal, fine)
    _add_bundles(signal, labels, dx, dy, scale, t, limb, fat_signal)
    _add_femur(signal, labels, dx, dy, limb, missing, fat_signal, coarse)
    _add_skin(signal, labels, depth, angle, scale, limb, fat)
    for name in missing:
        labels[labels == _NAMES.index(name) + 1] = _BACKGROUND
    return signal.astype(np.float32), labels


def _limb_coordinates(limb: _Limb, x: np.ndarray, y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (mm) around the limb's leaning, bowed center line, turned with the limb."""
    bowing = 1 - 8 * t**2
    x = x - limb.center[0] - limb.lean[0] * t - limb.bow[0] * bowing
    y = y - limb.center[1] - limb.lean[1] * t - limb.bow[1] * bowing
    cos, sin = np.cos(limb.rotation), np.sin(limb.rotation)
    return (cos * x + sin * y).astype(np.float32), (cos * y - sin * x).astype(np.float32)


def _outline(limb: _Limb, angle: np.ndarray) -> np.ndarray:
    """Distance of the skin from the limb's center, relative to the limb's radius."""
    outline = 1 + limb.ellipticity * np.cos(2 * angle)
    for harmonic, size, phase in zip((3, 4), limb.lobes, limb.lobe_angles, strict=True):
        outline += size * np.cos(harmonic * angle - phase)
    return outline


def _border(limb: _Limb, n: int, t: np.ndarray, reach: np.ndarray | float) -> np.ndarray:
    """Angle around the femur of border n, `reach` limb radii away from the femur's center."""
    return limb.borders[n] + limb.twist[n] * t + limb.curl[n] * reach + limb.bend[n] * np.sin(np.pi * reach)


def _muscles(
    limb: _Limb,
    dx: np.ndarray,
    dy: np.ndarray,
    scale: np.ndarray,
    t: np.ndarray,
    fascia: np.ndarray,
    fat_signal: np.ndarray,
    coarse: np.ndarray,
    fine: np.ndarray,
    lost: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Signal and labels [n] of n samples below the fascia, `dx`, `dy` (mm) off the femur; `lost` groups are fat."""
    group, septum = _muscle_groups(limb, dx, dy, scale, t, fascia)
    septum *= np.clip(0.75 + 0.35 * coarse, 0.2, 1)  # in places a septum is too thin to be seen
    streaks = np.clip(2 * fine - 2.2, 0, 1) + limb.marbling * (1 + coarse)
    fat_part = np.clip(septum + 0.35 * streaks, 0, 1)
    for label in lost:
        fat_part[group == label] = _FAT_OF_LOST_MUSCLE
    muscle_signal = np.zeros(len(STRUCTURES) + 1, np.float32)
    muscle_signal[_QUADRICEPS : _ADDUCTORS + 1] = limb.muscle_signal
    muscle = muscle_signal[group] * (1 + 0.06 * coarse + 0.05 * fine)
    return muscle + fat_part * (fat_signal - muscle), np.where(septum < 0.5, group, _BACKGROUND)


def _muscle_groups(
    limb: _Limb, dx: np.ndarray, dy: np.ndarray, scale: np.ndarray, t: np.ndarray, fascia: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which muscle group is here (label), and which part of the sample is a septum's fat (0..1)."""
    distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    reach = distance / scale
    past = [_wrap(angle - _border(limb, n, t, reach)) for n in range(3)]
    group = np.full(distance.shape, _QUADRICEPS, np.uint8)
    group[(past[0] >= 0) & (past[1] < 0)] = _ADDUCTORS
    group[(past[1] >= 0) & (past[2] < 0)] = _HAMSTRINGS

    # Septa between groups widen to wedges of intermuscular fat under the fascia.
    width = limb.septum + 3.5 * np.exp(-fascia / 6)
    septum = np.zeros_like(distance)
    for angle_past in past:
        septum = np.maximum(septum, _soft(width - distance * np.abs(angle_past)))
    # Within a group, thinner and fainter septa part its muscles: they look like borders and are none.
    for between, offset in ((2, 0.9), (2, 1.9), (1, 0.75), (0, 0.6)):
        gap = distance * np.abs(_wrap(past[between] - offset)) + 4 * (reach < 0.4)
        septum = np.maximum(septum, 0.45 * _soft(0.5 * limb.septum - gap))
    intermedius = np.abs(reach - 0.43 - 0.05 * np.cos(2 * angle)) * scale
    septum = np.maximum(septum, 0.35 * _soft(0.5 * limb.septum - intermedius) * (group == _QUADRICEPS))
    return group, septum


def _add_sartorius(signal, labels, fascia, angle, scale, t, limb, fat_signal, fine) -> None:
    """A strap muscle of no group, winding below the fascia from the front (proximal) to the medial side (distal)."""
    along = scale * _wrap(angle - (-0.75 - 0.9 * t)) * 0.85
    off = np.hypot(along / 14, (fascia - 7.5) / 6.5)
    sheath = (off < 1.2) & (fascia >= 0)
    signal[sheath] = fat_signal[sheath]
    labels[sheath] = _BACKGROUND
    belly = off < 1
    signal[belly] = sum(limb.muscle_signal) / 3 * (1 + 0.06 * fine[belly])


def _add_bundles(signal, labels, dx, dy, scale, t, limb, fat_signal) -> None:
    """The femoral vessels between quadriceps and adductors, the sciatic nerve between adductors and hamstrings."""
    for n, reach, sheath, contents in (
        (0, 0.5, 7.5, ((-2.6, 0.5, 2.9, _SIGNAL_VESSEL), (3.0, -0.5, 3.4, _SIGNAL_VESSEL))),
        (1, 0.44, 6.5, ((0.0, 0.0, 4.2, _SIGNAL_NERVE),)),
    ):
        direction = _border(limb, n, t, reach)
        x, y = dx - reach * scale * np.cos(direction), dy - reach * scale * np.sin(direction)
        inside = x * x + y * y < sheath**2
        signal[inside] = fat_signal[inside]
        labels[inside] = _BACKGROUND
        for x0, y0, radius, value in contents:
            signal[(x - x0) ** 2 + (y - y0) ** 2 < radius**2] = value


def _add_femur(signal, labels, dx, dy, limb, missing, fat_signal, coarse) -> None:
    """A round shaft with a ridge at its back, the linea aspera, where the muscles attach."""
    distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    ridge = 2.5 * np.exp(-((_wrap(angle - 1.75) / 0.3) ** 2))
    shaft = distance < limb.femur_radius + ridge
    if "cortical bone" in missing:
        signal[shaft] = fat_signal[shaft]
        labels[shaft] = _BACKGROUND
        return
    signal[shaft] = _SIGNAL_CORTEX
    labels[shaft] = _CORTEX
    if "bone marrow" not in missing:
        canal = distance < limb.femur_radius - limb.cortex
        signal[canal] = _SIGNAL_MARROW * (1 + 0.05 * coarse[canal])
        labels[canal] = _MARROW


def _add_skin(signal, labels, depth, angle, scale, limb, fat) -> None:
    """The skin, the air around it, and the great saphenous vein in the medial fat."""
    away = np.hypot(scale * _wrap(angle - 0.35), depth - limb.skin - fat / 2)
    vein = (away < 2.2) & (depth > limb.skin)
    signal[vein] = _SIGNAL_VESSEL
    labels[vein] = _BACKGROUND
    skin = depth < limb.skin
    signal[skin] = _SIGNAL_SKIN
    signal[depth < 0] = 0
    labels[skin] = _BACKGROUND


def _wrap(angle: np.ndarray) -> np.ndarray:
    """The same angle in -pi..pi."""
    return angle - 2 * np.pi * np.round(angle / (2 * np.pi))


def _soft(depth: np.ndarray) -> np.ndarray:
    """0 well outside (mm < 0), 1 well inside, 0.5 on the border: the sampling is too coarse for sharp thin sheets."""
    return np.clip(depth / 1.2 + 0.5, 0, 1)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], cells: tuple[int, ...]) -> np.ndarray:
    """Noise [k, j, i] of about unit variance that changes smoothly over 1 / cells of each axis (value noise)."""
    noise = rng.standard_normal([n + 1 for n in cells], dtype=np.float32)
    along_k, along_j, along_i = (_interpolation(n, count) for n, count in zip(shape, cells, strict=True))
    noise = along_j @ np.tensordot(along_k, noise, 1) @ along_i.T
    return noise / noise.std()


def _interpolation(length: int, cells: int) -> np.ndarray:
    """Matrix [length, cells + 1] that blends values at the ends of `cells` cells into `length` samples."""
    position = np.linspace(0, cells, length, endpoint=False)
    low = position.astype(int)
    part = position - low
    part = part * part * (3 - 2 * part)  # no kinks at the ends
    weights = np.zeros((length, cells + 1), np.float32)
    weights[np.arange(length), low] = 1 - part
    weights[np.arange(length), low + 1] = part
    return weights


def _blocks(fine: np.ndarray) -> np.ndarray:
    """View of the fine samples as [k, j, sample, i, sample]."""
    k, j, i = fine.shape
    return fine.reshape(k, j // _SAMPLES, _SAMPLES, i // _SAMPLES, _SAMPLES)


def _average(fine: np.ndarray) -> np.ndarray:
    return _blocks(fine).mean(axis=(2, 4))


def _majority(fine: np.ndarray) -> np.ndarray:
    """The label of most samples in each voxel; of equals, the lowest."""
    counts = [_blocks(fine == value).sum(axis=(2, 4), dtype=np.uint8) for value in range(len(STRUCTURES) + 1)]
    return np.argmax(counts, axis=0).astype(np.uint8)


def _acquire(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The magnitude image of a scanner: uneven coil, noise in both quadrature channels (Rician), arbitrary units."""
    bias = np.exp(rng.uniform(0.05, 0.18) * _smooth_noise(rng, signal.shape, (1, 2, 2)))
    sigma = rng.uniform(0.012, 0.035)
    real, imaginary = rng.normal(0, sigma, (2, *signal.shape))
    units = 100 * 20 ** rng.uniform(0, 1)
    return (units * np.hypot(signal * bias + real, imaginary)).astype(np.float32)


def _orient(
    array: np.ndarray, labels: np.ndarray, spacing: tuple[float, float, float], rng: np.random.Generator
) -> PhantomCase:
    """Tilt the limb's axes in patient space and store the voxels in any in-plane order and direction.

    The limb stays a right one: wherever an axis of the array is swapped or reversed, so is its direction.
    """
    # Before any reordering, i runs to the patient's left (medial in a right thigh), j to the back, k to the head.
    direction = _tilt(rng)
    center = np.array([-90.0, 0.0, -300.0]) + rng.uniform(-40, 40, 3)
    if rng.random() < 0.3:
        array, labels, direction = array.swapaxes(1, 2), labels.swapaxes(1, 2), direction[:, [1, 0, 2]]
    reversed_axes = [axis for axis in range(3) if rng.random() < 0.4]
    for axis in reversed_axes:
        array, labels = np.flip(array, 2 - axis), np.flip(labels, 2 - axis)
        direction[:, axis] *= -1
    half = (np.array(array.shape[::-1]) - 1) / 2 * spacing
    return PhantomCase(
        np.ascontiguousarray(array),
        np.ascontiguousarray(labels),
        tuple(float(s) for s in spacing),
        tuple((center - direction @ half).tolist()),
        tuple(direction.ravel().tolist()),
    )


def _tilt(rng: np.random.Generator) -> np.ndarray:
    """Rotation matrix [3, 3] of up to 20 degrees around any axis (Rodrigues' formula)."""
    axis = rng.normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    angle = np.radians(rng.uniform(3, 20))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
