"""The losses of the ranker.

In shapes, B is the number of batch rows of this rank, T the number of tasks (labels to predict).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def binary_cross_entropy(logit: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of the rows' log losses, a scalar.

    Logits, labels (in [0, 1]) and weights are [rows].
    """
    return functional.binary_cross_entropy_with_logits(logit, label, weight=weight, reduction="sum")


def task_weights(labels_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Return the weight of each row for each task [B, T]; it is 0 if the label is unknown (NaN)."""
    return weight_B.unsqueeze(1) * (~labels_BT.isnan())


def task_cross_entropies(logits_BT: Tensor, labels_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Return, for each task, the weighted sum of the log losses of the rows with a known label [T].

    Args:
        logits_BT: Logit of each row for each task [B, T].
        labels_BT: Label of each row for each task, 0, 1, or NaN if it is unknown [B, T].
        weight_B: Weight of each row [B].
    """
    weight_BT = task_weights(labels_BT, weight_B)
    losses_BT = functional.binary_cross_entropy_with_logits(
        logits_BT, labels_BT.nan_to_num(), weight=weight_BT, reduction="none"
    )
    return losses_BT.sum(dim=0)
