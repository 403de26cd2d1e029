"""The losses of the ranker.

Shapes: B batch rows of this rank, T tasks (labels to predict).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def binary_cross_entropy(logit: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Sum the log losses of logits [B] for labels [B] in [0, 1], times the row weights [B]."""
    return functional.binary_cross_entropy_with_logits(logit, label, weight=weight, reduction="sum")


def task_weights(labels_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Return the weight [B, T] of each row for each task: 0 where the label is unknown (NaN)."""
    return weight_B.unsqueeze(1) * (~labels_BT.isnan())


def task_cross_entropies(logits_BT: Tensor, labels_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Sum for each task the weighted log losses over the rows whose label is known: -> [T].

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
