"""Compute the loss of one step and its gradients over the global batch: the rows of all ranks.

The loss is the weighted sum of the losses of these rows, divided by their total weight. So N ranks
with batches of b rows compute the same gradients as one rank with a batch of N * b rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdrec.config.sections import Train
from hvdrec.data.batch import Batch
from hvdrec.embeddings.lookup import part_bounds
from hvdrec.embeddings.sharded import PendingGradients
from hvdrec.models.losses import in_batch_loss, in_mixture, retrieval_loss
from hvdrec.models.losses.cross_entropy import binary_cross_entropy, task_cross_entropies
from hvdrec.models.recommender import Output, Recommender
from hvdrec.parallel.gradients import gather_rows, global_sum
from hvdrec.parallel.ranks import current
from hvdrec.training.pipeline import Step
from hvdrec.training.state import TrainState


@dataclass(frozen=True)
class StepLoss:
    """This rank's share of the losses of a step. The shares of all ranks sum to the losses.

    Attributes:
        total: The loss that is minimized, a scalar without gradient.
        ranking: The ranking loss that is part of `total`; with tasks, the weighted sum of `tasks`.
        retrieval: The retrieval loss that is part of `total`, before it is multiplied by
            ``train.retrieval_weight``.
        tasks: The loss of each task [tasks].
    """

    total: Tensor
    ranking: Tensor
    retrieval: Tensor
    tasks: Tensor


def compute_gradients(state: TrainState, step: Step) -> tuple[StepLoss, PendingGradients]:
    """Run the forward and backward pass on a step's batch, in ``train.accumulate`` parts.

    All ranks must call this at the same time. The sum of the dense gradients over the ranks is only
    started; wait for it with ``state.dense.wait()``.

    Returns:
        The losses, and the gradients of table rows, whose exchange between the ranks has started.
    """
    train, batch, model = state.config.train, step.batch, state.model
    parts = state.tables.fetch(step.request)
    dtype, device = batch.label.dtype, batch.label.device
    totals = step.totals.wait().clamp(min=1e-12).to(device, dtype, non_blocking=True)
    sums = torch.zeros(3 + len(model.tasks), dtype=dtype, device=device)
    bounds = part_bounds(len(batch.label), len(parts))
    pieces = zip(bounds, parts, step.positives, strict=True)
    for number, ((start, stop), rows, positives) in enumerate(pieces, start=1):
        part = batch if len(parts) == 1 else batch.part(start, stop)
        vectors = model.tables(model.schema.features, part.features, rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            output = model.combine(vectors)
        ranking, tasks = _ranking_loss(state, output, part, totals)
        retrieval = sums.new_zeros(())
        if train.objective != "ranking":
            retrieval = _retrieval_loss(state, output, part, positives, step.drawn) / totals[1]
        factor = train.retrieval_weight if train.objective == "joint" else 1.0
        total = ranking + factor * retrieval
        if number == len(parts):
            state.dense.expect_last_backward()
        total.backward()  # type: ignore[no-untyped-call]
        sums += torch.cat([torch.stack([total, ranking, retrieval]), tasks]).detach()
    pending = state.tables.send_gradients(step.request)
    state.dense.send_rest()
    total, ranking, retrieval, *_ = sums.unbind()
    return StepLoss(total, ranking, retrieval, sums[3:]), pending


def clip(
    state: TrainState, step: Step, gradients: tuple[Tensor, ...], norm: float
) -> tuple[Tensor, ...]:
    """Scale all gradients down if their L2 norm, over all ranks, exceeds `norm`.

    All ranks must call this at the same time. Dense gradients are scaled in place.

    Args:
        state: The model with its dense gradients, already summed over the ranks.
        step: The step in which the gradients were computed.
        gradients: Gradients of table rows.
        norm: The largest allowed norm.

    Returns:
        The scaled gradients of table rows.
    """
    dense = [p.grad for p in state.model.parameters() if p.grad is not None]
    mine, common = state.tables.squared_norms(step.request, gradients)
    total = global_sum(mine) + common
    total = total + sum((g.double().square().sum() for g in dense), torch.zeros_like(total))
    scale = (norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in dense:
        gradient.mul_(scale)
    return tuple(gradient * scale.to(gradient.dtype) for gradient in gradients)


def _ranking_loss(
    state: TrainState, output: Output, batch: Batch, totals: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the ranking loss, a scalar, and the loss of each task [tasks]."""
    tasks, train = state.config.tasks, state.config.train
    zero, no_tasks = totals.new_zeros(()), totals.new_zeros(len(tasks))
    if batch.tasks is not None:
        logits = output.logit.to(totals.dtype)
        losses = task_cross_entropies(logits, batch.tasks, batch.weight) / totals[2:]
        return (totals.new_tensor([task.weight for task in tasks]) * losses).sum(), losses
    if train.objective == "retrieval":
        return zero, no_tasks
    label = batch.label
    if state.teacher is not None:
        label = _distilled(label, state.teacher, batch, train)
    logit = output.logit.to(totals.dtype)
    return binary_cross_entropy(logit, label, batch.weight) / totals[0], no_tasks


def _distilled(label: Tensor, teacher: Recommender, batch: Batch, train: Train) -> Tensor:
    """Return a weighted mean of the labels and a teacher's probabilities.

    The log loss against this mean is the weighted mean, with the same weights, of the log loss
    against the labels and the log loss against the probabilities.
    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, section 2, at
    temperature 1.
    """
    with (
        torch.no_grad(),
        torch.autocast(label.device.type, torch.bfloat16, enabled=train.precision == "bf16"),
    ):
        probability = teacher.score(teacher(batch.features).logit.to(label.dtype))
    return torch.lerp(label, probability, train.teacher_weight)


def _retrieval_loss(
    state: TrainState, output: Output, batch: Batch, positives: Tensor, drawn: int
) -> Tensor:
    """Compute the weighted sum of the retrieval losses of this rank's positive rows.

    Args:
        state: The model, and the item frequencies for the logQ correction.
        output: Output of the model for the batch.
        batch: The batch; its last `drawn` rows are negatives from the catalogue.
        positives: Indices of the positive rows, int64.
        drawn: Number of negatives from the catalogue.
    """
    train, dtype, rows = state.config.train, batch.label.dtype, len(batch.label)
    candidates = torch.cat([positives, torch.arange(rows - drawn, rows, device=positives.device)])
    items, start = gather_rows(output.item[candidates].to(dtype))
    item_index, _ = gather_rows(batch.item_index[candidates])
    user = output.user[positives].to(dtype)
    if items.shape[0] == 0:
        return user.sum() + items.sum()
    log_q = None
    if train.logq and state.log_probability is not None:
        log_q = state.log_probability[item_index].to(dtype)
        if drawn:
            uniform = drawn * current().size
            log_q = in_mixture(log_q, len(items) - uniform, uniform, len(state.log_probability))
    return in_batch_loss(
        retrieval_loss(train.retrieval_loss),
        user,
        items,
        batch.weight[positives] * batch.label[positives],
        own_B=torch.arange(start, start + positives.shape[0], device=positives.device),
        item_B=batch.item_index[positives],
        item_C=item_index,
        temperature=state.model.temperature,
        log_probability_C=log_q,
        remove_accidental_hits=train.remove_accidental_hits,
        hard_negatives=train.hard_negatives,
    )
