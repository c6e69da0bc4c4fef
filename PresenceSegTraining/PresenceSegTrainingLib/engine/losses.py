"""The losses that learn from partial labels: `merged`, the paper's `base`, `or` and `plus`, and `independent`.

`make_loss` returns a function of logits, labels and presence. What each mode does to a structure that nobody annotated,
at the voxels where it could really be (those not labeled as an annotated structure):

- `merged` never pushes it down; it raises it together with the background where the network claims an annotated one.
- `independent` never touches it, at these or any other voxels.
- `base` does not touch it in the cross-entropy; its Dice terms can only push it up.
- `or` and `plus` DO push it down, through the softmax, at voxels labeled 0 whose argmax is an annotated structure:
  there the cross-entropy asks for the background. That breaks the project's rule that an un-annotated structure is
  taught nothing wrong. The two modes are kept exactly as published because they reproduce the paper.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from PresenceSegLib.domain.errors import InputError
from PresenceSegTrainingLib.engine.presence import merge_unannotated, present_labels, voxel_mask

MODES = ("merged", "base", "or", "plus", "independent")
PAPER_LOSSES = ("xent", "xent+0.1*softdice", "xent+0.1*logdice")

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_DICE_SMOOTHING = 1e-5
_PAPER_EPSILON = 1e-10
_PAPER_DICE_FACTOR = 0.1


def make_loss(mode: str, loss: str | None = None) -> Loss:
    """Return the function loss(logits, labels, presence) -> 0-dim float32 tensor.

    The function computes in float32 whatever the dtype of the logits, reads nothing back from the device, and gives 0
    with zero gradients when nothing is annotated. Its arguments, labels on the device of the logits:

    - logits: [B, 1+C, *spatial], any floating dtype, two or three spatial axes; channel k is structure k.
    - labels: integer [B, L, *spatial]: 0, structure 1..C, or IGNORE (in any layer: the voxel teaches nothing). Labels
      of un-annotated structures count as 0. Where layers overlap, `independent` learns every structure; the other
      modes, which give a voxel to one structure, keep the one that comes later in the structure set.
    - presence: [B, C], bool or 0/1.

    It raises ValueError when these shapes do not fit each other.

    Args:
        mode: one of MODES. What each does to un-annotated structures is said at the top of this file; in particular
            `or` and `plus` push them down at voxels labeled 0 whose argmax is an annotated structure.
        loss: "ce+dice" for merged, "bce+dice" for independent, one of PAPER_LOSSES for base, or, plus (None:
            "xent+0.1*logdice").

    Raises:
        InputError: unknown mode, or a loss that does not belong to the mode.
    """
    if mode not in MODES:
        raise InputError(f"Loss mode {mode!r} is unknown: use one of {', '.join(MODES)}.")
    allowed = {"merged": ("ce+dice",), "independent": ("bce+dice",)}.get(mode, PAPER_LOSSES)
    name = allowed[-1] if loss is None else loss
    if name not in allowed:
        raise InputError(f"Loss {loss!r} does not belong to mode {mode}: use {' or '.join(allowed)}.")
    if mode == "merged":
        return partial(_evaluate, _merged)
    if mode == "independent":
        return partial(_evaluate, _independent)
    return partial(_evaluate, partial(_paper, mode, name))


def _evaluate(compute: Loss, logits: torch.Tensor, labels: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    _check_shapes(logits, labels, presence)
    presence = presence.to(logits.device, torch.bool)
    return compute(logits.float(), present_labels(labels, presence), presence)


def _check_shapes(logits: torch.Tensor, labels: torch.Tensor, presence: torch.Tensor) -> None:
    """Shapes that do not fit would otherwise broadcast and train on nonsense."""
    batch, channels, *spatial = logits.shape
    if len(spatial) not in (2, 3) or channels < 2:
        raise ValueError(f"Logits have shape {tuple(logits.shape)}: [B, 1+C, *spatial], 2-D or 3-D, is needed.")
    if labels.ndim != logits.ndim or labels.shape[0] != batch or list(labels.shape[2:]) != spatial:
        raise ValueError(f"Labels have shape {tuple(labels.shape)}: {(batch, 'L', *spatial)} is needed.")
    if presence.shape != (batch, channels - 1):
        raise ValueError(f"Presence has shape {tuple(presence.shape)}: {(batch, channels - 1)} is needed.")


def _merged(logits: torch.Tensor, labels: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    """Cross-entropy and Dice after the un-annotated structures joined the background.

    Mean of -log q[y] over the voxels that are not ignored, plus the mean Dice loss over the structures annotated in at
    least one item. Ordinary cross-entropy + batch Dice without background when everything is annotated.
    """
    target, valid = _join_layers(labels)
    log_q = merge_unannotated(logits, presence)
    log_q_of_label = _at_label(log_q, target)
    cross_entropy = -_masked_sum(log_q_of_label, valid) / valid.sum().clamp(min=1)
    dice = _pooled_dice_losses(_softmax_sums(log_q, log_q_of_label, target, valid), presence)
    return cross_entropy + dice.sum() / presence.any(dim=0).sum().clamp(min=1)


def _independent(logits: torch.Tensor, labels: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy and Dice of one sigmoid per structure, only where annotated. Channel 0 is not used.

    Both are divided by fixed numbers (all items x structures x voxels; all structures), so that the gradient of a
    structure does not depend on how many others are annotated (MultiTalent, Ulrich et al. 2023, sums for this reason).
    """
    valid = labels[:, :1] >= 0
    truth = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    truth = truth.scatter_(1, labels.clamp(min=0), True)[:, 1:]
    logits = logits[:, 1:]
    spatial = tuple(range(2, logits.ndim))

    binary_cross_entropy = functional.softplus(torch.where(truth, -logits, logits))
    binary_cross_entropy = _masked_sum(binary_cross_entropy, valid, spatial) * presence
    probability = logits.sigmoid()
    sums = _Sums(
        intersection=_masked_sum(probability, truth, spatial),
        predicted=_masked_sum(probability, valid, spatial),
        labeled=truth.sum(spatial),
    )
    return binary_cross_entropy.sum() / logits.numel() + _pooled_dice_losses(sums, presence).sum() / presence.shape[1]


def _paper(mode: str, name: str, logits: torch.Tensor, labels: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    """The losses of Wong et al. 2020 (arXiv:2008.07030), with TensorFlow's reductions.

    xent is the sum of m(x) x softmax cross-entropy over the number of voxels with m > 0. softdice is 1 -
    (2I+e)/(P+Y+e) and logdice log(P+Y+e) - log(2I+e) per item and structure, averaged over the annotated pairs. Class
    weights are 0 for the background and 1 for structures; ignored voxels weigh 0 everywhere.

    `or` and `plus` push un-annotated structures down at voxels labeled 0 whose argmax is an annotated structure.
    """
    target, valid = _join_layers(labels)
    log_p = logits.log_softmax(dim=1)
    log_p_of_label = _at_label(log_p, target)
    class_weights = torch.ones(logits.shape[1], device=logits.device)
    class_weights[0] = 0
    mask = voxel_mask(mode, target, logits, presence, class_weights).masked_fill(~valid, 0)
    cross_entropy = -(mask * log_p_of_label).sum() / (mask > 0).sum().clamp(min=1)
    if name == "xent":
        return cross_entropy

    sums = _softmax_sums(log_p, log_p_of_label, target, valid)
    overlap = 2 * sums.intersection + _PAPER_EPSILON
    size = sums.predicted + sums.labeled + _PAPER_EPSILON
    dice = 1 - overlap / size if name == "xent+0.1*softdice" else size.log() - overlap.log()
    return cross_entropy + _PAPER_DICE_FACTOR * (dice * presence).sum() / presence.sum().clamp(min=1)


class _Sums(NamedTuple):
    """Per item and structure, [B, C], over voxels not ignored: probability inside the label, probability, label."""

    intersection: torch.Tensor
    predicted: torch.Tensor
    labeled: torch.Tensor


def _softmax_sums(
    log_probability: torch.Tensor, log_probability_of_label: torch.Tensor, target: torch.Tensor, valid: torch.Tensor
) -> _Sums:
    """The Dice sums of log-probabilities [B, 1+C, *spatial], without building one-hot labels."""
    spatial = tuple(range(2, log_probability.ndim))
    channels = log_probability.shape[1]
    return _Sums(
        intersection=_sum_by_label(log_probability_of_label.exp(), target, channels)[:, 1:],
        predicted=_masked_sum(log_probability.exp(), valid[:, None], spatial)[:, 1:],
        labeled=_sum_by_label(torch.ones_like(log_probability_of_label), target, channels)[:, 1:],
    )


def _sum_by_label(values: torch.Tensor, target: torch.Tensor, channels: int) -> torch.Tensor:
    """Sum values [B, *spatial] over the voxels of each label -> [B, channels]."""
    # Row by row first: float32 goes wrong when a million numbers are added to one sum, one after the other.
    values, target = values.flatten(1, -2), target.flatten(1, -2)
    rows = values.new_zeros(*values.shape[:2], channels)
    return rows.scatter_add(2, target, values).sum(dim=1)


def _join_layers(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [B, L, *spatial] -> one label per voxel (0 where ignored) and whether it counts, [B, *spatial] each."""
    target = labels.amax(dim=1)
    return target.clamp(min=0), target >= 0


def _at_label(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """values [B, 1+C, *spatial] read at each voxel's label -> [B, *spatial]."""
    return values.gather(1, target[:, None])[:, 0]


def _masked_sum(values: torch.Tensor, mask: torch.Tensor, dim: tuple[int, ...] | None = None) -> torch.Tensor:
    return torch.where(mask, values, 0).sum(dim)


def _pooled_dice_losses(sums: _Sums, presence: torch.Tensor) -> torch.Tensor:
    """Dice loss per structure, [C], pooled over the items where it is annotated; exactly 0 where no item has it."""
    intersection, predicted, labeled = ((part * presence).sum(dim=0) for part in sums)
    return 1 - (2 * intersection + _DICE_SMOOTHING) / (predicted + labeled + _DICE_SMOOTHING)
