"""Made-up volumes, projects and model versions for the tests: bright boxes on noise, trained on in seconds."""

import itertools

import numpy as np
import torch

from PresenceSegLib.domain.case import CaseInfo
from PresenceSegLib.domain.geometry import Grid
from PresenceSegLib.domain.model import ModelCard, ModelVersion, NetworkSpec, Preprocessing, file_sha256
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.segmentation import Segmentation, Status
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.domain.volume import Volume
from PresenceSegLib.engine.networks import build_network
from PresenceSegLib.engine.weights import save_weights

CPU = torch.device("cpu")

# All 48 ways to lay voxel axes along body axes, as 3x3 direction matrices; half of them are left-handed.
AXIS_ORDERS = [
    np.eye(3)[list(order)] * np.array(signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]

TINY = NetworkSpec("unet", (4, 8), ((2, 2, 2),))


def grid(size=(24, 24, 12), spacing=(1.0, 1.0, 2.0), direction=AXIS_ORDERS[0], origin=(-7.0, 11.5, 3.25)):
    return Grid(tuple(size), tuple(spacing), tuple(origin), tuple(np.asarray(direction, float).ravel().tolist()))


def scene(count, seed=0, shape=(12, 24, 24), without=()):
    """Noise with one bright box per structure: float32 array [k, j, i] and one mask per structure, apart from another.

    Structures whose number (0..count-1) is in `without` are not there.
    """
    rng = np.random.default_rng(seed)
    array = rng.normal(0, 5, shape).astype(np.float32)
    masks = np.zeros((count, *shape), bool)
    width = shape[2] // count
    for n in range(count):
        k, j = (int(rng.integers(1, max(2, size // 3))) for size in shape[:2])
        box = (slice(k, k + shape[0] // 2), slice(j, j + shape[1] // 2), slice(n * width + 1, (n + 1) * width - 1))
        if n not in without:
            masks[n][box] = True
            array[box] += 60 + 60 * n
    return array, masks


def add_case(project, name, annotated, *, absent=(), other=None, subject=None, split="", seed=0, on=None):
    """A case with a scene in it: `annotated` and `absent` are Completed, `other` maps further names to their status."""
    on = on or grid()
    names = project.structures.names
    without = [n for n, structure in enumerate(names) if structure in absent]
    array, masks = scene(len(names), seed, on.shape, without)
    segmentation = Segmentation.empty(on)
    for structure, mask in zip(project.structures, masks, strict=True):
        if structure.name in annotated or structure.name in absent:
            segmentation.put(structure, mask, Status.COMPLETED)
        elif other and structure.name in other:
            segmentation.put(structure, mask, other[structure.name])
    return project.add_case(name, Volume(array, on), segmentation, CaseInfo("made up", subject or name, split))


def make_project(folder, structures=("core", "rim", "rod")):
    return Project.create(folder, "made up", StructureSet.from_names(structures))


def model_card(structures, network=TINY, spacing=(None, None, None), patch=(8, 8, 8), **changes):
    """A card for `structures` (names), normalizing as for MR unless told otherwise."""
    names = StructureSet.from_names(structures)
    values = {"activation": "softmax", "label_layers": (names.names,), "intensity": {"kind": "mr"}} | changes
    preprocessing = Preprocessing(tuple(spacing), values.pop("intensity"), tuple(patch))
    return ModelCard("v1", names, network, preprocessing, **values)


def random_network(card, seed=0):
    torch.manual_seed(seed)
    return build_network(card.network, card.structures).eval()


def write_version(folder, card, network):
    """A stored model version with the weights of `network`; the card gets their digest."""
    folder.mkdir(parents=True)
    version = ModelVersion(folder)
    save_weights(version.weights_path, network.state_dict())
    version.write_card(ModelCard(**vars(card) | {"weights_sha256": file_sha256(version.weights_path)}))
    return version
