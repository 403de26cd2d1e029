"""The loss of one step and its gradients, over the global batch.

The loss is the weighted sum over the rows of all ranks divided by their total weight, so N ranks
with batches of b rows give the gradients of one rank with a batch of N * b rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdrec.config import Train
from hvdrec.loader import Batch
from hvdrec.models.losses import binary_cross_entropy, in_batch_softmax
from hvdrec.models.recommender import Output, Recommender
from hvdrec.parallel.gradients import gather_rows, global_sum, sum_gradients


@dataclass(frozen=True)
class StepLoss:
    """This rank's share of a step's losses: their sum over the ranks is the loss of the step.

    Scalars without gradient; `rows` is the weight of this rank's rows.
    """

    total: Tensor
    ranking: Tensor
    retrieval: Tensor
    weight: Tensor


def compute_gradients(
    model: Recommender,
    batch: Batch,
    train: Train,
    log_probability: Tensor | None,
) -> StepLoss:
    """Run forward and backward; leave the global batch's gradients in the parameters.

    log_probability: [items] log of each item's share of the positive training rows, for the logQ
    correction, or None. Every rank must call this together.
    """
    device_type = batch.label.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=train.precision == "bf16"):
        output = model(batch.features)
    positive = batch.weight * batch.label
    totals = global_sum(torch.stack([batch.weight.sum(), positive.sum()])).clamp(min=1e-12)
    zero = totals.new_zeros(())
    ranking = retrieval = zero
    if train.objective != "retrieval":
        logit = output.logit.to(batch.label.dtype)
        ranking = binary_cross_entropy(logit, batch.label, batch.weight) / totals[0]
    if train.objective != "ranking":
        retrieval = (
            _retrieval_loss(output, batch, positive, train, log_probability, model.temperature)
            / totals[1]
        )
    factor = train.retrieval_weight if train.objective == "joint" else 1.0
    total = ranking + factor * retrieval
    total.backward()  # type: ignore[no-untyped-call]
    sum_gradients(model.parameters())
    if train.embedding_l2 > 0:
        # The penalty's gradient is the same on every rank: it is added once, behind the sum.
        for table in model.tables.weights():
            assert table.grad is not None
            table.grad.add_(table.detach(), alpha=train.embedding_l2)
    return StepLoss(total.detach(), ranking.detach(), retrieval.detach(), batch.weight.sum())


def _retrieval_loss(
    output: Output,
    batch: Batch,
    positive: Tensor,
    train: Train,
    log_probability: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return the weighted sum of in-batch softmax losses over this rank's positive rows."""
    index = positive.nonzero().squeeze(1)
    dtype = batch.label.dtype
    items, start = gather_rows(output.item[index].to(dtype))
    item_index, _ = gather_rows(batch.item_index[index])
    user = output.user[index].to(dtype)
    if items.shape[0] == 0:
        return user.sum() + items.sum()
    log_q = None
    if train.logq and log_probability is not None:
        log_q = log_probability[item_index].to(dtype)
    return in_batch_softmax(
        user,
        items,
        positive[index],
        own_B=torch.arange(start, start + index.shape[0], device=index.device),
        item_B=batch.item_index[index],
        item_C=item_index,
        temperature=temperature,
        log_probability_C=log_q,
        remove_accidental_hits=train.remove_accidental_hits,
    )
