"""What presence becomes in the loss: which labels count, what joins the background and how much each voxel weighs.

Presence says which structures of a case were annotated. Whatever was not annotated must cost nothing and must teach
nothing wrong, so each loss removes it in its own way: by merging it into the background (`merge_unannotated`) or by
giving voxels a weight (`voxel_mask`). Channel 0 is the background, channel k is structure k.
"""

import torch

IGNORE = -1
"""Label of a voxel that teaches nothing, for example because it lies outside the volume."""

EXCLUDED = -1e30
"""Log of "impossible": its exponential is exactly 0 in float32, and unlike -inf it never turns into NaN."""


def present_labels(labels: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    """Keep only the labels that somebody vouched for.

    Labels of un-annotated structures become 0 before layers are joined, so that they cannot hide an annotated
    structure underneath. A voxel that is IGNORE in any layer becomes IGNORE in all of them.

    Args:
        labels: [B, L, *spatial], any integer dtype: 0, a structure 1..C, or IGNORE.
        presence: [B, C], bool or 0/1.

    Returns:
        int64 [B, L, *spatial].
    """
    labels = labels.long()
    ignored = (labels < 0).any(dim=1, keepdim=True)
    labels = labels.clamp(min=0)
    kept = _lookup(_with_background(presence.bool()), labels)
    return labels.masked_fill(~kept, 0).masked_fill(ignored, IGNORE)


def merge_unannotated(logits: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in which the un-annotated structures of each item have joined the background.

    With p = softmax(logits): q_0 = p_0 + the sum of p_u over un-annotated u, and q_c = p_c for annotated c (the
    marginal loss of Shi et al. 2021, Medical Image Analysis, and of Fang and Yan 2020, PIPO-FAN). An item without any
    annotated structure has q_0 = 1 exactly, hence a cross-entropy and a gradient of exactly 0.

    Args:
        logits: [B, 1+C, *spatial], any floating dtype.
        presence: [B, C], bool or 0/1.

    Returns:
        log q, float32 [B, 1+C, *spatial]; about EXCLUDED (finite, probability exactly 0) for un-annotated structures.
    """
    logits = logits.float()
    annotated = _with_background(presence.bool()).view(*logits.shape[:2], *[1] * (logits.ndim - 2))
    joins_background = ~annotated
    joins_background[:, 0] = True
    # -inf is safe here, because channel 0 always joins, and much faster to exponentiate than a finite number.
    background = logits.masked_fill(~joins_background, -torch.inf).logsumexp(dim=1, keepdim=True)
    structures = logits[:, 1:].masked_fill(~annotated[:, 1:], EXCLUDED)
    return torch.cat([background, structures], dim=1).log_softmax(dim=1)


def voxel_mask(
    mode: str, labels: torch.Tensor, logits: torch.Tensor, presence: torch.Tensor, class_weights: torch.Tensor
) -> torch.Tensor:
    """The weight m(x) of each voxel in the cross-entropy of Wong et al. 2020 (arXiv:2008.07030).

    With a_c = class weight x presence (the background is always present), y the one-hot label and h the one-hot argmax
    of the logits: `base` sum_c y_c a_c, `or` sum_c (y_c OR h_c) a_c, `plus` sum_c (y_c + h_c) a_c. No gradient passes.

    Args:
        mode: "base", "or" or "plus".
        labels: integer [B, *spatial], 0..C or IGNORE, which weighs 0.
        logits: [B, 1+C, *spatial], any floating dtype.
        presence: [B, C], bool or 0/1.
        class_weights: [1+C]; the paper uses 0 for the background and 1 for every structure.

    Returns:
        float32 [B, *spatial].

    Raises:
        ValueError: the mode is not one of the three.
    """
    weights = _with_background(presence.bool()) * class_weights.float()
    labels = labels.long()
    of_label = _lookup(weights, labels.clamp(min=0))
    if mode == "base":
        mask = of_label
    elif mode in ("or", "plus"):
        predicted = logits.argmax(dim=1)
        of_prediction = _lookup(weights, predicted)
        if mode == "or":
            of_prediction = of_prediction.masked_fill(predicted == labels, 0)
        mask = of_label + of_prediction
    else:
        raise ValueError(f"Voxel mask mode is {mode!r}: use base, or, plus.")
    return mask.masked_fill(labels < 0, 0)


def _with_background(presence: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B, 1+C]: the background counts as present."""
    return torch.cat([torch.ones_like(presence[:, :1]), presence], dim=1)


def _lookup(table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """table [B, 1+C] read at labels [B, ...] -> [B, ...]."""
    return table.gather(1, labels.flatten(1)).view(labels.shape)
