"""Training a model version from partial labels, in steps that can be stopped and resumed at any time.

    training/<version>/run.json         settings, cases, network: everything that was decided at the start
    training/<version>/checkpoint.pt    state of the optimization; always whole

When the training ends, the version is written into models/ and the folder above is removed. A training of so many
iterations that was stopped and resumed on the same machine's CPU gives the same weights as one that ran through: every
random draw depends on seed and iteration only. (With a time budget the learning rate follows the clock.)
"""

import copy
import csv
import io
import math
import pickle
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from torch import Tensor

from PresenceSegLib.domain.case import Case
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.files import move, read_json, replaced, staging_folder, write_json
from PresenceSegLib.domain.model import PLANES, ModelCard, ModelVersion, file_sha256
from PresenceSegLib.domain.project import Project
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.engine.device import autocast, describe_device, gradient_scaler
from PresenceSegLib.engine.inference import Model, check_size, predict
from PresenceSegLib.engine.networks import SegmentationNetwork, build_network, keep_channels
from PresenceSegLib.engine.weights import load_network, save_weights
from PresenceSegTrainingLib.domain.settings import TrainingSettings
from PresenceSegTrainingLib.engine.augmentation import augment, margin_size
from PresenceSegTrainingLib.engine.evaluation import Evaluation, dice_scores, evaluate
from PresenceSegTrainingLib.engine.losses import make_loss
from PresenceSegTrainingLib.engine.planning import batch_size, plan, split_cases
from PresenceSegTrainingLib.engine.preparation import PreparedCase, prepare_cases
from PresenceSegTrainingLib.engine.sampling import Batch, PatchSampler

_WARM_UP = 0.05  # part of the training over which the learning rate rises
_VALIDATIONS = 10
_CHECKPOINT_SECONDS = 60.0
_MAX_SCORED_TRAINING_CASES = 20  # where nothing validates; these scores only show that something was learned

Wrap = Callable[[Iterable, int], Iterable]


@dataclass(frozen=True)
class TrainingProgress:
    """One step done. `seconds_left` is an estimate; `dice` is set after a validation (name -> score, NaN-free)."""

    iteration: int
    fraction: float
    seconds_left: float
    loss: float
    learning_rate: float
    dice: dict[str, float] | None = None


@dataclass
class _State:
    """What changes while training and goes into checkpoints."""

    network: SegmentationNetwork
    optimizer: torch.optim.Optimizer
    scaler: Any
    ema: dict[str, Tensor]
    iteration: int = 0
    seconds: float = 0.0
    best_score: float = -1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """A training that was begun in a project: its decisions, stored in `folder`."""

    project: Project
    folder: Path
    settings: TrainingSettings
    card: ModelCard
    train_names: tuple[str, ...]
    validation_names: tuple[str, ...]

    @staticmethod
    def begin(project: Project, settings: TrainingSettings, device: torch.device) -> "Training":
        """Decide everything that the cases decide and store it, so that the training can be resumed from here on.

        Raises InputError when nothing is annotated, or a setting is impossible.
        """
        make_loss(settings.presence_mask, settings.loss or None)
        parent = project.model(settings.parent).read_card() if settings.parent else None
        train, validation = split_cases(project.cases(), project.structures, settings)
        network, preprocessing = plan(train, project.structures, settings, device, parent)
        card = ModelCard(
            version=project.next_version(),
            structures=project.structures,
            network=network,
            preprocessing=preprocessing,
            activation="sigmoid" if settings.presence_mask == "independent" else "softmax",
            label_layers=(project.structures.names,),
            parent=settings.parent,
            settings=settings.to_json(),
        )
        _check_sizes((*train, *validation), card)
        folder = project.training_folder / card.version
        names = tuple(tuple(c.name for c in cases) for cases in (train, validation))
        with staging_folder(project.folder) as staging:
            write_json(staging / "run.json", {"card": card.to_json(), "train": names[0], "validation": names[1]})
            move(staging, folder)
        return Training(project, folder, settings, card, *names)

    @staticmethod
    def reopen(project: Project, version: str = "") -> "Training":
        """A training that has not ended: that of `version`, or the latest.

        Raises InputError when there is none, or its description is damaged.
        """
        folders = [f for f in project.unfinished_trainings() if (f / "run.json").is_file()]
        found = [f for f in folders if f.name == version] if version else folders[-1:]
        if not found:
            raise InputError(f"The project {project.folder} has no unfinished training to resume.")
        path = found[0] / "run.json"
        data = read_json(path, "training")
        try:
            card = ModelCard.from_json(data["card"], path)
            names = tuple(tuple(data[part]) for part in ("train", "validation"))
        except (KeyError, TypeError) as error:
            raise InputError(
                f"The training {path} is damaged ({error!r}); delete its folder and train anew."
            ) from error
        return Training(project, found[0], TrainingSettings.from_json(card.settings), card, *names)

    def run(
        self,
        device: torch.device,
        on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
        wrap: Wrap = lambda items, total: items,
    ) -> ModelVersion | None:
        """Train from the last checkpoint, or from the start, to the end; returns the new model version.

        Args:
            on_progress: called after each step.
            should_stop: asked after each step; True stores a checkpoint and returns None.
            wrap: wraps the loops over cases before and after the training, for a progress bar.

        Raises:
            InputError: a case cannot be read any more, or the disk is full; the last checkpoint stays.
        """
        cases = {c.name: c for c in self.project.cases()}
        missing = [name for name in (*self.train_names, *self.validation_names) if name not in cases]
        if missing:
            raise InputError(f'The case "{missing[0]}" of this training is gone; start a new training.')
        structures, preprocessing = self.card.structures, self.card.preprocessing
        chosen = [cases[name] for name in (*self.train_names, *self.validation_names)]
        try:
            prepared = prepare_cases(chosen, structures, preprocessing, self.project.cache_folder, wrap)
            training = replace(self, card=replace(self.card, label_layers=_label_layers(self.card, prepared)))
            state = training._load_state(device)
        except InputError:
            if not (self.folder / "checkpoint.pt").exists():  # nothing to resume: leave the project as it was
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        train, validation = prepared[: len(self.train_names)], prepared[len(self.train_names) :]
        if not training._optimize(state, train, validation, device, on_progress, should_stop):
            return None
        scored = [cases[n] for n in self.validation_names or self.train_names[:_MAX_SCORED_TRAINING_CASES]]
        taught = {case.name: _annotated(case, structures) for case in train}
        return training._finish(state, taught, scored, device, wrap)

    def _load_state(self, device: torch.device) -> _State:
        network = self._initial_network(device)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        state = _State(network, optimizer, gradient_scaler(device), ema=copy.deepcopy(network.state_dict()))
        path = self.folder / "checkpoint.pt"
        if path.is_file():
            saved = _read_checkpoint(path, device)
            for part in ("network", "optimizer", "scaler"):
                getattr(state, part).load_state_dict(saved.pop(part))
            for name, value in saved.items():
                setattr(state, name, value)
        return state

    def _initial_network(self, device: torch.device) -> SegmentationNetwork:
        torch.manual_seed(self.settings.seed)
        network = build_network(self.card.network, self.card.structures)
        if self.card.parent:
            parent = self.project.model(self.card.parent)
            known = load_network(parent, torch.device("cpu")).state_dict()
            structures = parent.read_card().structures
            network.load_state_dict(keep_channels(known, structures, network.state_dict(), self.card.structures))
        return network.to(device).train()

    def _save_state(self, state: _State) -> None:
        data = {name: getattr(state, name) for name in ("ema", "iteration", "seconds", "best_score", "best", "history")}
        data |= {part: getattr(state, part).state_dict() for part in ("network", "optimizer", "scaler")}
        buffer = io.BytesIO()
        torch.save(data, buffer)
        with replaced(self.folder / "checkpoint.pt") as temporary:
            temporary.write_bytes(buffer.getvalue())

    def _optimize(self, state, train, validation, device, on_progress, should_stop) -> bool:
        """Take steps until the training is done (True) or was asked to stop (False, with a checkpoint)."""
        settings = self.settings
        slice_axis = PLANES.index(self.card.network.plane) if self.card.network.plane else None
        patch = self.card.preprocessing.patch
        drawn = margin_size(patch, slice_axis) if settings.augment else patch
        sampler = PatchSampler(train, drawn, settings.foreground_fraction, settings.seed)
        mirror = settings.mirror and not self.card.structures.has_sides
        loss_of = make_loss(settings.presence_mask, settings.loss or None)
        count = batch_size(settings, self.card.network, device)
        started, begun, saved_at = time.monotonic(), state.seconds, time.monotonic()

        while (fraction := self._fraction(state)) < 1:
            learning_rate = settings.learning_rate * _schedule(fraction)
            batch = sampler.draw(state.iteration, count).to(device)
            if settings.augment:
                batch = augment(batch, patch, mirror, slice_axis, settings.seed * 1_000_003 + state.iteration)
            loss = _step(state, batch, loss_of, learning_rate, settings.gradient_clip)
            _update_ema(state, settings.ema_decay)
            state.iteration += 1
            state.seconds = begun + time.monotonic() - started

            before, fraction = fraction, self._fraction(state)
            dice = None
            if validation and _validation_due(before, fraction, settings):
                dice = self._validate(state, validation)
                state.seconds = begun + time.monotonic() - started
            state.history.append(_history_row(state, loss, learning_rate, dice))
            left = state.seconds / max(fraction, 1e-9) * (1 - min(fraction, 1))
            on_progress(TrainingProgress(state.iteration, min(fraction, 1.0), left, loss, learning_rate, dice))
            if should_stop():
                self._save_state(state)
                return False
            if time.monotonic() - saved_at > _CHECKPOINT_SECONDS:
                self._save_state(state)
                saved_at = time.monotonic()
        self._save_state(state)
        return True

    def _fraction(self, state: _State) -> float:
        """How much of the training is done, by iterations or by time, whichever ends first."""
        settings = self.settings
        by_iterations = state.iteration / settings.iterations if settings.iterations else 0.0
        by_time = state.seconds / (60 * settings.minutes) if settings.minutes else 0.0
        return max(by_iterations, by_time)

    def _validate(self, state: _State, cases: list[PreparedCase]) -> dict[str, float]:
        """Mean Dice per structure of the averaged weights on the network's grid; keeps them if they are the best."""
        network = copy.deepcopy(state.network)
        network.load_state_dict(state.ema)
        network.eval()
        device = next(network.parameters()).device
        rows = []
        for case in cases:
            predicted = predict(network, case.image.to(device), self.card, case.image.shape)
            rows.append(dice_scores(case.labels.numpy(), predicted.cpu().numpy(), case.presence.numpy()))
        columns = np.array(rows).T
        dice = {
            name: float(np.nanmean(column))
            for name, column in zip(self.card.structures.names, columns, strict=True)
            if np.isfinite(column).any()
        }
        score = float(np.mean(list(dice.values()))) if dice else 0.0
        if score >= state.best_score:
            state.best_score, state.best = score, copy.deepcopy(state.ema)
        return dice

    def _finish(self, state: _State, taught: dict[str, list[str]], cases, device, wrap: Wrap) -> ModelVersion:
        """Score on `cases` and write the version, all files at once; then remove what was only needed to resume."""
        target = ModelVersion(self.project.folder / "models" / self.card.version)
        network = copy.deepcopy(state.network)
        network.load_state_dict(state.best or state.ema)
        evaluation = evaluate(Model(self.card, network.eval(), device), cases, wrap)
        with staging_folder(self.project.folder) as staging:
            version = ModelVersion(staging)
            save_weights(version.weights_path, network.state_dict())
            save_weights(staging / "last.safetensors", state.ema)
            version.write_card(
                replace(
                    self.card,
                    created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    cases=taught,
                    scores=evaluation.scores(),
                    weights_sha256=file_sha256(version.weights_path),
                )
            )
            _write_history(staging / "history.csv", state.history)
            write_json(staging / "report.json", self._report(state, evaluation, device))
            move(staging, target.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        return target

    def _report(self, state: _State, evaluation: Evaluation, device: torch.device) -> dict:
        return {
            "scored_on": "validation cases" if self.validation_names else "training cases",
            "cases": {
                case: {s: None if math.isnan(d) else d for s, d in zip(evaluation.structures, row, strict=True)}
                for case, row in zip(evaluation.cases, evaluation.dice.tolist(), strict=True)
            },
            "iterations": state.iteration,
            "seconds": round(state.seconds, 1),
            "device": describe_device(device),
            "torch": torch.__version__,
            "monai": monai.__version__,
        }


def _check_sizes(cases: Iterable[Case], card: ModelCard) -> None:
    """Refuse cases that are too small for the network now, not when they are scored at the end of the training."""
    for case in cases:
        try:
            check_size(case.read_grid(), card)
        except InputError as error:
            raise InputError(f'Case "{case.name}": {error}') from error


def _annotated(case: PreparedCase, structures: StructureSet) -> list[str]:
    return [name for name, present in zip(structures.names, case.presence.tolist(), strict=True) if present]


def _read_checkpoint(path: Path, device: torch.device) -> dict:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"The checkpoint {path} cannot be read; delete its folder and train anew.") from error


def _step(state: _State, batch: Batch, loss_of, learning_rate: float, clip: float) -> float:
    """One forward, backward and update; returns the loss."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    with autocast(batch.images.device):
        logits = state.network(batch.images)
    loss = loss_of(logits, batch.labels, batch.presence)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"The training diverged at step {state.iteration + 1} (the loss is {value}); use a smaller learning rate."
        )
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return value


def _update_ema(state: _State, decay: float) -> None:
    """Exponential moving average of the weights, with a shorter memory at the start."""
    decay = min(decay, (1 + state.iteration) / (10 + state.iteration))
    with torch.no_grad():
        for key, value in state.network.state_dict().items():
            state.ema[key].lerp_(value, 1 - decay)


def _schedule(fraction: float) -> float:
    """Learning rate as a part of its peak: a short linear rise, then a half cosine down to 0."""
    if fraction < _WARM_UP:
        return (fraction + 1e-3) / (_WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (fraction - _WARM_UP) / (1 - _WARM_UP)))


def _validation_due(before: float, now: float, settings: TrainingSettings) -> bool:
    """Whether the training passed a validation point, or its end, between two fractions of it."""
    every = 1 / _VALIDATIONS
    if settings.validate_every and settings.iterations:
        every = settings.validate_every / settings.iterations
    return now >= 1 or math.floor(now / every + 1e-9) > math.floor(before / every + 1e-9)


def _history_row(state: _State, loss: float, learning_rate: float, dice: dict[str, float] | None) -> dict:
    row = {"iteration": state.iteration, "seconds": round(state.seconds, 2), "loss": loss, "lr": learning_rate}
    return row | {f"dice {name}": value for name, value in (dice or {}).items()}


def _write_history(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replaced(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _label_layers(card: ModelCard, cases: Iterable[PreparedCase]) -> tuple[tuple[str, ...], ...]:
    """Structures by output label layer: one layer, or, with sigmoids, as many as keep overlapping structures apart."""
    if card.activation == "softmax":
        return card.label_layers
    overlapping: set[tuple[int, int]] = set()
    for case in cases:
        layers = case.labels.flatten(1)
        for n, first in enumerate(layers):
            for second in layers[n + 1 :]:
                both = (first > 0) & (second > 0)
                pairs = torch.stack([first[both], second[both]]).unique(dim=1).T.tolist()
                overlapping |= {tuple(sorted(pair)) for pair in pairs}
    result: list[list[int]] = []
    for channel in range(1, len(card.structures) + 1):
        free = (m for m in result if not any(tuple(sorted((channel, o))) in overlapping for o in m))
        layer = next(free, None)
        if layer is None:
            result.append([channel])
        else:
            layer.append(channel)
    return tuple(tuple(card.structures.names[c - 1] for c in layer) for layer in result)
