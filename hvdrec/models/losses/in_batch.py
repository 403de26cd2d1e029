"""Compute retrieval losses in blocks of rows. The negatives of a row are other rows' items.

In shapes, B is the number of positive rows of this rank, C the number of candidate items, D the
width of embeddings. Candidates are the items of the positive rows of all ranks, and additionally
drawn items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvdrec.models.losses.by_name import RetrievalLoss

BlockLoss = Callable[[Tensor, Tensor, slice], Tensor]

CPU_LOGITS, GPU_LOGITS = 1 << 20, 1 << 26
"""The largest number of logits in memory at a time; on a CPU, this many fit into its caches."""


def without_accidental_hits(
    logits_BC: Tensor, own_B: Tensor, item_B: Tensor, item_C: Tensor
) -> Tensor:
    """Set the logits of negatives that are the row's own item to -inf.

    Args:
        logits_BC: Logit of each candidate for each row [B, C].
        own_B: Column of each row's positive item, which keeps its logit, int64 [B].
        item_B: Number of each row's item, int64 [B].
        item_C: Number of each candidate item, int64 [C].
    """
    same = item_B.unsqueeze(1) == item_C.unsqueeze(0)
    same.scatter_(1, own_B.unsqueeze(1), False)
    return logits_BC.masked_fill(same, -torch.inf)


def with_logq(logits_BC: Tensor, log_probability_C: Tensor) -> Tensor:
    """Subtract from each logit the log probability that the candidate is in the batch.

    Logits are [B, C] for B rows and C candidates, log probabilities are [C].
    Source: Yi et al., "Sampling-bias-corrected neural modeling", RecSys 2019, equation 4.
    """
    return logits_BC - log_probability_C


def hardest(logits_BC: Tensor, own_B: Tensor, count: int) -> Tensor:
    """Keep the logits of each row's positive (column `own_B`) and of its `count` highest negatives.

    All other logits become -inf.
    """
    if count >= logits_BC.shape[1] - 1:
        return logits_BC
    negatives = logits_BC.detach().scatter(1, own_B.unsqueeze(1), -torch.inf)
    kept = torch.zeros_like(logits_BC, dtype=torch.bool)
    kept.scatter_(1, negatives.topk(count, dim=1, sorted=False).indices, True)
    kept.scatter_(1, own_B.unsqueeze(1), True)
    return logits_BC.masked_fill(~kept, -torch.inf)


def in_mixture(log_probability: Tensor, in_batch: int, uniform: int, items: int) -> Tensor:
    """Compute the log probability of items among negatives that come from two sources.

    Source: Yang et al., "Mixed negative sampling", WWW 2020 companion, section 3.2.

    Args:
        log_probability: The log probability of each item among the in-batch negatives.
        in_batch: Number of in-batch negatives.
        uniform: Number of negatives that are drawn uniformly from the catalogue.
        items: Number of items of the catalogue.
    """
    share = in_batch * log_probability.exp() + uniform / items
    return (share / max(in_batch + uniform, 1)).log()


def in_batch_loss(
    loss: RetrievalLoss,
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
    max_logits: int = 0,
) -> Tensor:
    """Return the weighted sum of the retrieval losses of B positive rows, a scalar.

    The rows are processed in blocks, so memory grows with C and not with B * C.

    Args:
        loss: The loss of a block of rows.
        user_BD: Embedding of each row's user [B, D].
        item_CD: Embedding of each candidate item [C, D].
        weight_B: Weight of each row [B].
        own_B: Number of each row's positive item among the candidates, int64 [B].
        item_B: Number of each row's item in the catalogue, int64 [B].
        item_C: Number of each candidate item in the catalogue, int64 [C].
        temperature: Divisor of the logits.
        log_probability_C: Log probability that each candidate is in the batch, for the logQ
            correction [C]; None to leave the correction out.
        remove_accidental_hits: Whether to ignore negatives that are the row's own item.
        hard_negatives: Number of negatives to keep for each row, those with the highest logits; 0
            for all.
        max_logits: The largest number of logits in memory at a time; 0 for a limit that suits the
            device.
    """

    def block_loss(user: Tensor, item: Tensor, rows: slice) -> Tensor:
        logits = user @ item.T
        logits = logits.to(weight_B.dtype) / temperature
        if log_probability_C is not None:
            logits = with_logq(logits, log_probability_C)
        if remove_accidental_hits:
            logits = without_accidental_hits(logits, own_B[rows], item_B[rows], item_C)
        if hard_negatives:
            logits = hardest(logits, own_B[rows], hard_negatives)
        return (loss(logits, own_B[rows]) * weight_B[rows]).sum()

    max_logits = max_logits or (CPU_LOGITS if user_BD.device.type == "cpu" else GPU_LOGITS)
    rows, size = len(user_BD), max(1, max_logits // max(1, len(item_CD)))
    if rows <= size:
        return block_loss(user_BD, item_CD, slice(None))
    total: Tensor = _InBlocks.apply(user_BD, item_CD, block_loss, size)  # type: ignore[no-untyped-call]
    return total


class _InBlocks(torch.autograd.Function):
    """Sum a loss over blocks of rows; the forward pass already computes each block's gradients.

    Only the loss and the gradients of a block are kept, so the logits of all rows are never in
    memory at the same time.
    """

    @staticmethod
    def forward(ctx: Any, user: Tensor, item: Tensor, loss: BlockLoss, size: int) -> Tensor:
        blocks = [slice(start, start + size) for start in range(0, len(user), size)]
        total = user.new_zeros(())
        if not any(ctx.needs_input_grad):
            for rows in blocks:
                total += loss(user[rows], item, rows)
            return total
        user_gradient, item_gradient = torch.empty_like(user), torch.zeros_like(item)
        item = item.detach().requires_grad_()
        for rows in blocks:
            part = user[rows].detach().requires_grad_()
            with torch.enable_grad():
                block = loss(part, item, rows)
            user_gradient[rows], of_items = torch.autograd.grad(block, (part, item))
            item_gradient += of_items
            total += block.detach()
        ctx.save_for_backward(user_gradient, item_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        user_gradient, item_gradient = ctx.saved_tensors
        return user_gradient * gradients[0], item_gradient * gradients[0], None, None
