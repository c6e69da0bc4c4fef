"""Model versions: weights and the card that says what they are. Plain data; the network itself is engine business.

model.json            the card
weights.safetensors   the weights, whose SHA-256 the card holds: the best ones, where something validates
last.safetensors      the weights at the end of the training
history.csv           loss, learning rate and validation scores over the training
report.json           scores of the finished version
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import check_format, read_json, write_json
from PresenceSegLib.domain.structure import StructureSet

CARD_FORMAT = 1
PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Preprocessing:
    """How a volume becomes network input.

    Attributes:
        spacing: mm along the canonical axes [S, P, L]; None keeps the volume's own spacing along that axis.
        intensity: `{"kind": "mr"}` (each volume by its own percentiles, mean and deviation) or `{"kind": "ct", "low",
            "high", "mean", "std"}` (Hounsfield units, clipped and scaled by constants of the training cases).
        patch: voxels [S, P, L] the network was trained on; inference tiles have about this size.
    """

    spacing: tuple[float | None, float | None, float | None]
    intensity: dict
    patch: tuple[int, int, int]


@dataclass(frozen=True)
class NetworkSpec:
    """Which network: a `name` of `PresenceSegLib.engine.networks`, its options, and the plane of a 2-D slice network.

    Attributes:
        strides: down-sampling factors [S, P, L] of each level; their product is what tile sizes must divide by.
        plane: "axial", "coronal" or "sagittal" for a network that works slice by slice, "" for a 3-D one.
    """

    name: str
    channels: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]
    plane: str = ""


@dataclass(frozen=True)
class ModelCard:
    """Everything about a model version but its weights.

    Attributes:
        version: name of the version, unique in its project.
        activation: "softmax" (structures exclude each other) or "sigmoid" (structures may overlap).
        label_layers: structure names by output label layer; more than one only for structures that overlap.
        parent: version the training started from, or "".
        settings: the training settings, as data.
        cases: names of the cases it was trained on, with the structures annotated in each.
        scores: per structure {"dice": mean or None, "cases": number of validation cases behind it}.
        weights_sha256: hex digest of weights.safetensors.
    """

    version: str
    structures: StructureSet
    network: NetworkSpec
    preprocessing: Preprocessing
    activation: str
    label_layers: tuple[tuple[str, ...], ...]
    parent: str = ""
    created: str = ""
    settings: dict = field(default_factory=dict)
    cases: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, dict] = field(default_factory=dict)
    weights_sha256: str = ""

    def to_json(self) -> dict:
        return {
            "format": CARD_FORMAT,
            "version": self.version,
            "parent": self.parent,
            "created": self.created,
            "structures": self.structures.to_json(),
            "network": {
                "name": self.network.name,
                "channels": list(self.network.channels),
                "strides": [list(s) for s in self.network.strides],
                "plane": self.network.plane,
            },
            "preprocessing": {
                "spacing": list(self.preprocessing.spacing),
                "intensity": self.preprocessing.intensity,
                "patch": list(self.preprocessing.patch),
            },
            "activation": self.activation,
            "label_layers": [list(names) for names in self.label_layers],
            "settings": self.settings,
            "cases": self.cases,
            "scores": self.scores,
            "weights_sha256": self.weights_sha256,
        }

    @staticmethod
    def from_json(data: dict, path: Path) -> "ModelCard":
        """The card stored in the file at `path`. Raises InputError when it is damaged or newer than this program."""
        check_format(data, CARD_FORMAT, path, "model card")
        try:
            network, preprocessing = data["network"], data["preprocessing"]
            card = ModelCard(
                version=data["version"],
                structures=StructureSet.from_json(data["structures"], path),
                network=NetworkSpec(
                    network["name"],
                    tuple(network["channels"]),
                    tuple(tuple(s) for s in network["strides"]),
                    network["plane"],
                ),
                preprocessing=Preprocessing(
                    tuple(preprocessing["spacing"]), preprocessing["intensity"], tuple(preprocessing["patch"])
                ),
                activation=data["activation"],
                label_layers=tuple(tuple(names) for names in data["label_layers"]),
                parent=data["parent"],
                created=data["created"],
                settings=data["settings"],
                cases=data["cases"],
                scores=data["scores"],
                weights_sha256=data["weights_sha256"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"The model card {path} is damaged ({error!r}); restore it from a copy.") from error
        if sorted(str(n) for names in card.label_layers for n in names) != sorted(card.structures.names):
            raise InputError(f"The model card {path} is damaged: its label layers are not its structures.")
        return card


@dataclass(frozen=True)
class ModelVersion:
    """A stored model version: a folder with the card and the weights."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def card_path(self) -> Path:
        return self.folder / "model.json"

    @property
    def weights_path(self) -> Path:
        return self.folder / "weights.safetensors"

    def read_card(self) -> ModelCard:
        """Raises InputError when the card is missing, damaged or from a newer version of PresenceSeg."""
        return ModelCard.from_json(read_json(self.card_path, "model card"), self.card_path)

    def write_card(self, card: ModelCard) -> None:
        write_json(self.card_path, card.to_json())

    def check_weights(self, card: ModelCard) -> None:
        """Raises InputError when the weights are missing or are not those that the card was written with."""
        if not self.weights_path.is_file():
            raise InputError(f"There are no weights at {self.weights_path}; restore them from a copy.")
        if file_sha256(self.weights_path) != card.weights_sha256:
            raise InputError(
                f"The weights {self.weights_path} do not match their card (another file or a damaged one); restore "
                "both from the same copy."
            )


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
