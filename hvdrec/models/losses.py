"""Losses as weighted sums over a rank's rows, ready to be divided by the global weight.

Shapes: B rows of this rank, C candidate items of all ranks, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BlockLoss = Callable[[Tensor, Tensor, slice], Tensor]

CPU_CELLS, GPU_CELLS = 1 << 20, 1 << 26
"""Logits of the softmax that are held at a time: on a CPU, what fits into its caches."""


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
    cells: int = 0,
) -> Tensor:
    """Return the weighted sum of the in-batch softmax losses of B positive rows (a scalar).

    user_BD: embeddings of the rows' users; item_CD: embeddings of the items of all ranks' positive
    rows, the negatives of each other, and of further negatives; weight_B: the rows' weights; own_B:
    int64, each row's column among the C; item_B, item_C: int64 item indices; hard_negatives: how
    many of a row's negatives count, those with the highest logits (0: all); cells: how many logits
    are held at a time (0: what suits the device), so that memory grows with C and not with B * C.
    """

    def loss(user: Tensor, item: Tensor, rows: slice) -> Tensor:
        logits = user @ item.T
        logits = logits.to(weight_B.dtype) / temperature
        if log_probability_C is not None:
            logits = with_logq(logits, log_probability_C)
        if remove_accidental_hits:
            logits = without_accidental_hits(logits, own_B[rows], item_B[rows], item_C)
        if hard_negatives:
            logits = hardest(logits, own_B[rows], hard_negatives)
        losses = functional.cross_entropy(logits, own_B[rows], reduction="none")
        return (losses * weight_B[rows]).sum()

    cells = cells or (CPU_CELLS if user_BD.device.type == "cpu" else GPU_CELLS)
    rows, block = len(user_BD), max(1, cells // max(1, len(item_CD)))
    if rows <= block:
        return loss(user_BD, item_CD, slice(None))
    slices = [slice(start, start + block) for start in range(0, rows, block)]
    total: Tensor = _InBlocks.apply(user_BD, item_CD, loss, slices)  # type: ignore[no-untyped-call]
    return total


class _InBlocks(torch.autograd.Function):
    """A sum over blocks of rows, whose gradients are taken at once, block by block.

    What a block leaves behind is its loss and its gradients: the logits of all rows are never there
    at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, user: Tensor, item: Tensor, loss: BlockLoss, slices: Sequence[slice]
    ) -> Tensor:
        total = user.new_zeros(())
        if not any(ctx.needs_input_grad):
            for rows in slices:
                total += loss(user[rows], item, rows)
            return total
        of_user, of_item = torch.empty_like(user), torch.zeros_like(item)
        item = item.detach().requires_grad_()
        for rows in slices:
            part = user[rows].detach().requires_grad_()
            with torch.enable_grad():
                block = loss(part, item, rows)
            of_user[rows], more = torch.autograd.grad(block, (part, item))
            of_item += more
            total += block.detach()
        ctx.save_for_backward(of_user, of_item)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_user, of_item = ctx.saved_tensors
        return of_user * gradients[0], of_item * gradients[0], None, None
