"""Losses as weighted sums over a rank's rows, ready to be divided by the global weight.

Shapes: B rows of this rank, C candidate items of all ranks, D width of the embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def binary_cross_entropy(logit: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of the log losses of B logits against labels 0 or 1 (a scalar)."""
    return functional.binary_cross_entropy_with_logits(logit, label, weight=weight, reduction="sum")


def task_weights(labels_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Return the weight [B, T] that a row has for each task: none where its label is NaN."""
    return weight_B.unsqueeze(1) * (~labels_BT.isnan())


def task_cross_entropies(logits_BT: Tensor, labels_BT: Tensor, weight_B: Tensor) -> Tensor:
    """Return of each task the weighted sum of its log losses over the rows that tell, [T].

    labels_BT: 0, 1, or NaN where a row tells nothing of a task.
    """
    weight_BT = task_weights(labels_BT, weight_B)
    losses_BT = functional.binary_cross_entropy_with_logits(
        logits_BT, labels_BT.nan_to_num(), weight=weight_BT, reduction="none"
    )
    return losses_BT.sum(dim=0)


def without_accidental_hits(
    logits_BC: Tensor, own_B: Tensor, item_B: Tensor, item_C: Tensor
) -> Tensor:
    """Mask (-inf) candidates that are the row's own item, except the one at the row's column.

    own_B: int64, the column of each row's own item; item_B, item_C: int64 item indices.
    """
    same = item_B.unsqueeze(1) == item_C.unsqueeze(0)
    same.scatter_(1, own_B.unsqueeze(1), False)
    return logits_BC.masked_fill(same, -torch.inf)


def with_logq(logits_BC: Tensor, log_probability_C: Tensor) -> Tensor:
    """Subtract the log of each candidate's probability of being drawn into the batch.

    Source: Yi et al., "Sampling-bias-corrected neural modeling", RecSys 2019, equation 4.
    """
    return logits_BC - log_probability_C


def hardest(logits_BC: Tensor, own_B: Tensor, count: int) -> Tensor:
    """Mask (-inf) all but each row's own column and its `count` highest negatives."""
    if count >= logits_BC.shape[1] - 1:
        return logits_BC
    negatives = logits_BC.detach().scatter(1, own_B.unsqueeze(1), -torch.inf)
    kept = torch.zeros_like(logits_BC, dtype=torch.bool)
    kept.scatter_(1, negatives.topk(count, dim=1, sorted=False).indices, True)
    kept.scatter_(1, own_B.unsqueeze(1), True)
    return logits_BC.masked_fill(~kept, -torch.inf)


def in_mixture(log_probability: Tensor, in_batch: int, uniform: int, items: int) -> Tensor:
    """Return the log probability of an item among negatives of two sources.

    log_probability: of the item among in-batch negatives; in_batch, uniform: how many negatives are
    of the batch and how many were drawn uniformly from `items`.
    Source: Yang et al., "Mixed negative sampling", WWW 2020 companion, section 3.2.
    """
    share = in_batch * log_probability.exp() + uniform / items
    return (share / max(in_batch + uniform, 1)).log()


def in_batch_softmax(
    user_BD: Tensor,
    item_CD: Tensor,
    weight_B: Tensor,
    *,
    own_B: Tensor,
    item_B: Tensor,
    item_C: Tensor,
    temperature: float,
    log_probability_C: Tensor | None = None,
    remove_accidental_hits: bool = True,
    hard_negatives: int = 0,
) -> Tensor:
    """Return the weighted sum of the in-batch softmax losses of B positive rows (a scalar).

    user_BD: embeddings of the rows' users; item_CD: embeddings of the items of all ranks' positive
    rows, the negatives of each other, and of further negatives; weight_B: the rows' weights; own_B:
    int64, each row's column among the C; item_B, item_C: int64 item indices; hard_negatives: how
    many of a row's negatives count, those with the highest logits (0: all).
    """
    logits_BC = user_BD @ item_CD.T
    logits_BC = logits_BC.to(weight_B.dtype) / temperature
    if log_probability_C is not None:
        logits_BC = with_logq(logits_BC, log_probability_C)
    if remove_accidental_hits:
        logits_BC = without_accidental_hits(logits_BC, own_B, item_B, item_C)
    if hard_negatives:
        logits_BC = hardest(logits_BC, own_B, hard_negatives)
    losses_B = functional.cross_entropy(logits_BC, own_B, reduction="none")
    return (losses_B * weight_B).sum()
