"""The settings of a training, as they are given, checked, and stored with the model version they made."""

from dataclasses import asdict, dataclass, fields

from PresenceSegLib.domain.errors import InputError


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. Zero or empty means: let the cases decide (see `PresenceSegTrainingLib.engine.planning`).

    Attributes:
        presence_mask: "merged", "base", "or", "plus" or "independent".
        loss: "" for the usual one of the presence mask, else a name that `make_loss` knows.
        network: "unet", "segresnet" or "dynunet"; ignored when `parent` is given, as are the next four.
        plane: "axial", "coronal" or "sagittal" for a 2-D slice network, "" for a 3-D one.
        spacing: mm along [S, P, L], 0 for the cases' median.
        patch: voxels along [S, P, L], 0 for what suits the cases and the device.
        intensity: "auto", "mr" or "ct".
        iterations: length of the training in steps, 0 for no limit but `minutes`.
        minutes: time budget, 0 for none. Whichever of the two ends first shapes the learning rate.
        batch: patches per step, 0 for what suits the network.
        learning_rate, weight_decay: of AdamW; the rate is the peak of a cosine schedule.
        gradient_clip: largest norm of the gradient.
        ema_decay: memory of the averaged weights, which validate and become the version.
        foreground_fraction: part of the patches that are centered on an annotated structure.
        parent: model version whose weights and network the training starts from, "" for none.
        validation_fraction: part of the subjects held out, where the cases do not say it themselves.
        validate_every: iterations between two validations, 0 (and with only a time budget) for a tenth of the training.
        seed: of everything random.
        augment: whether patches are varied (affine, intensity, noise).
        mirror: whether left and right may be swapped in that; they never are where a structure is known to have a side.
    """

    presence_mask: str = "merged"
    loss: str = ""
    network: str = "unet"
    plane: str = ""
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    patch: tuple[int, int, int] = (0, 0, 0)
    intensity: str = "auto"
    iterations: int = 1000
    minutes: float = 0.0
    batch: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    ema_decay: float = 0.99
    foreground_fraction: float = 2 / 3
    parent: str = ""
    validation_fraction: float = 0.2
    validate_every: int = 0
    seed: int = 0
    augment: bool = True
    mirror: bool = True

    def __post_init__(self):
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:  # so that NaN is refused too
                raise InputError(f"The setting {name} is {getattr(self, name)}; it must be above 0.")
        if self.iterations == 0 and self.minutes == 0:
            raise InputError("A training needs an end: set its iterations or its minutes above 0.")
        for name in ("iterations", "minutes", "batch", "validate_every", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"The setting {name} is {getattr(self, name)}; it must not be below 0.")
        for name in ("spacing", "patch"):
            if not all(n >= 0 for n in getattr(self, name)):
                raise InputError(f"The setting {name} is {getattr(self, name)}; none of it must be below 0.")
        for name in ("validation_fraction", "foreground_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"The setting {name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if self.intensity not in ("auto", "mr", "ct"):
            raise InputError(f'"{self.intensity}" is no kind of intensity; use auto, mr or ct.')

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> "TrainingSettings":
        """Settings stored before; unknown ones, of a newer version, are left out."""
        known = {f.name for f in fields(TrainingSettings)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return TrainingSettings(**values)
