"""Scores against annotations: Dice per structure, counted only in cases where the structure is annotated."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from PresenceSegLib.domain.case import Case
from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.engine.inference import Model

_RESAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """Scores of some cases.

    Attributes:
        cases: names.
        structures: names.
        dice: float64 [cases, C]; NaN where the structure is not annotated, or has no voxel in the annotation (Dice
            says nothing there).
        false_positive: bool [cases, C]: confirmed absent, and predicted all the same.
        absent: bool [cases, C]: confirmed absent.
    """

    cases: tuple[str, ...]
    structures: tuple[str, ...]
    dice: np.ndarray
    false_positive: np.ndarray
    absent: np.ndarray

    def count(self, structure: str) -> int:
        """Number of cases behind the structure's score."""
        return int(np.isfinite(self._column(structure)).sum())

    def mean(self, structure: str) -> float | None:
        """Mean Dice, or None where no case has a score."""
        column = self._column(structure)
        return float(np.nanmean(column)) if np.isfinite(column).any() else None

    def overall(self) -> float | None:
        """Mean over the structures that have a score."""
        means = [m for m in map(self.mean, self.structures) if m is not None]
        return float(np.mean(means)) if means else None

    def interval(self, structure: str, seed: int = 0) -> tuple[float, float] | None:
        """95 % bootstrap interval (percentiles, cases drawn with replacement) of the mean Dice."""
        values = self._column(structure)
        values = values[np.isfinite(values)]
        return bootstrap_interval(values, seed) if len(values) else None

    def scores(self) -> dict[str, dict]:
        """Per structure what model cards hold: {"dice": mean or None, "cases": number}."""
        return {name: {"dice": self.mean(name), "cases": self.count(name)} for name in self.structures}

    def _column(self, structure: str) -> np.ndarray:
        return self.dice[:, self.structures.index(structure)]


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` [n]."""
    picks = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def evaluate(
    model: Model,
    cases: Sequence[Case],
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Evaluation:
    """Segment the cases and score them against their Completed segments, on the volumes' own grids.

    Raises:
        InputError: there are no cases, or one cannot be read or segmented; the message names it.
    """
    if not cases:
        raise InputError("There are no cases to evaluate; annotate some, or choose another split.")
    structures = model.card.structures
    rows = []
    for case in progress(cases, len(cases)):
        try:
            volume = case.read_volume()
            truth = case.read_completed_labels(structures, volume.grid)
            rows.append(_case_scores(truth, model.segment(volume), case.presence(structures)))
        except InputError as error:
            raise InputError(f'Case "{case.name}": {error}') from error
    dice, false_positive, absent = (np.stack(part) for part in zip(*rows, strict=True))
    return Evaluation(tuple(c.name for c in cases), structures.names, dice, false_positive, absent)


def overlap_counts(truth: np.ndarray, predicted: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels of the intersection, of the truth and of the prediction, int [count] each, for structures 1..count.

    `truth` and `predicted` are label layers [L, ...], in which each structure lies in one layer as a whole.
    """
    size = count + 1
    intersection = sum(np.bincount(t[t == p], minlength=size) for t in truth for p in predicted)
    in_truth, in_prediction = (np.bincount(x.ravel(), minlength=size) for x in (truth, predicted))
    return intersection[1:size], in_truth[1:size], in_prediction[1:size]


def dice_scores(truth: np.ndarray, predicted: np.ndarray, presence: np.ndarray) -> np.ndarray:
    """Dice per structure, float64 [C]: 2|T and P| / (|T| + |P|); NaN without presence and where the truth is empty."""
    return _case_scores(truth, predicted, presence)[0]


def _case_scores(truth: np.ndarray, predicted: np.ndarray, presence: np.ndarray):
    """The rows of one case in `Evaluation`: dice, false_positive, absent."""
    intersection, in_truth, in_prediction = overlap_counts(truth, predicted, len(presence))
    scored, absent = presence & (in_truth > 0), presence & (in_truth == 0)
    dice = np.where(scored, 2 * intersection / np.maximum(in_truth + in_prediction, 1), np.nan)
    return dice, absent & (in_prediction > 0), absent
