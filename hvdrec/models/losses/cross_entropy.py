"""Losses of the ranker.

Shapes: B rows of this rank, T tasks.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def binary_cross_entropy(logit: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Compute the weighted sum of the log losses of logits [B] against labels [B] in [0, 1]."""
    return functional.binary_cross_entropy_with_logits(logit, label, weight=weight, reduction="sum")


def task_weights(labels_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Return the weight [B, T] of each row for each task: 0 where the label is unknown (NaN)."""
    return weight_B.unsqueeze(1) * (~labels_BT.isnan())


def task_cross_entropies(logits_BT: Tensor, labels_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Compute each task's weighted sum of log losses over the rows with a known label, [T].

    Args:
        logits_BT: [B, T] logits.
        labels_BT: [B, T] labels: 0, 1, or NaN where a label is unknown.
        weight_B: [B] weights of the rows.
    """
    weight_BT = task_weights(labels_BT, weight_B)
    losses_BT = functional.binary_cross_entropy_with_logits(
        logits_BT, labels_BT.nan_to_num(), weight=weight_BT, reduction="none"
    )
    return losses_BT.sum(dim=0)
