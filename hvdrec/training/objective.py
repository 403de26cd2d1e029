"""The loss of one step and its gradients, over the global batch.

The loss is the weighted sum over the rows of all ranks divided by their total weight, so N ranks
with batches of b rows give the gradients of one rank with a batch of N * b rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdrec.config import Config
from hvdrec.config.sections import Train
from hvdrec.data.batch import Batch
from hvdrec.embeddings.lookup import part_bounds
from hvdrec.embeddings.sharded import DistributedTables, PendingGradients
from hvdrec.models.losses import (
    binary_cross_entropy,
    in_batch_softmax,
    in_mixture,
    task_cross_entropies,
)
from hvdrec.models.recommender import Output, Recommender
from hvdrec.parallel.gradients import DenseGradients, gather_rows, global_sum
from hvdrec.parallel.ranks import current
from hvdrec.training.pipeline import Step


@dataclass(frozen=True)
class StepLoss:
    """This rank's share of a step's losses: their sum over the ranks is the loss of the step.

    Scalars without gradient; tasks: [T], of each task, which ranking is the weighted sum of.
    """

    total: Tensor
    ranking: Tensor
    retrieval: Tensor
    tasks: Tensor


def compute_gradients(
    model: Recommender,
    step: Step,
    tables: DistributedTables,
    config: Config,
    log_probability: Tensor | None,
    dense: DenseGradients,
    teacher: Recommender | None = None,
) -> tuple[StepLoss, PendingGradients]:
    """Run forward and backward on a step's batch, in `train.accumulate` parts.

    Every rank must call this together. The gradients of dense parameters are pending in `dense`,
    those of table rows in the second value returned.

    Args:
        log_probability: [items] log of each item's share of the positive training rows, for the
            logQ correction; None without it.
        dense: Sums the gradients of the model's parameters over the ranks.
        teacher: A model in evaluation mode that holds its tables; None without distillation.
    """
    train, batch = config.train, step.batch
    parts = tables.fetch(step.asked)
    dtype, device = batch.label.dtype, batch.label.device
    totals = step.totals.wait().clamp(min=1e-12).to(device, dtype, non_blocking=True)
    sums = torch.zeros(3 + len(config.tasks), dtype=dtype, device=device)
    task_factors = sums.new_tensor([task.weight for task in config.tasks])
    places = part_bounds(len(batch.label), len(parts))
    pieces = zip(places, parts, step.positives, strict=True)
    for number, ((start, stop), rows, index) in enumerate(pieces, start=1):
        part = batch if len(parts) == 1 else batch.part(start, stop)
        vectors = model.tables(model.schema.features, part.features, rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            output = model.combine(vectors)
        ranking = retrieval = sums.new_zeros(())
        of_tasks = sums.new_zeros(len(config.tasks))
        if part.tasks is not None:
            logits = output.logit.to(dtype)
            of_tasks = task_cross_entropies(logits, part.tasks, part.weight) / totals[2:]
            ranking = (task_factors * of_tasks).sum()
        elif train.objective != "retrieval":
            logit = output.logit.to(dtype)
            label = part.label
            if teacher is not None:
                label = _taught(label, teacher, part, train)
            ranking = binary_cross_entropy(logit, label, part.weight) / totals[0]
        if train.objective != "ranking":
            loss = _retrieval_loss(
                output, part, index, step.drawn, train, log_probability, model.temperature
            )
            retrieval = loss / totals[1]
        factor = train.retrieval_weight if train.objective == "joint" else 1.0
        total = ranking + factor * retrieval
        if number == len(parts):
            dense.expect_last_backward()
        total.backward()  # type: ignore[no-untyped-call]
        sums += torch.cat([torch.stack([total, ranking, retrieval]), of_tasks]).detach()
    sent = tables.send_gradients(step.asked)
    dense.send_rest()
    total, ranking, retrieval, *_ = sums.unbind()
    return StepLoss(total, ranking, retrieval, sums[3:]), sent


def clip(
    model: Recommender,
    tables: DistributedTables,
    step: Step,
    gradients: tuple[Tensor, ...],
    norm: float,
) -> tuple[Tensor, ...]:
    """Scale all gradients down to a global L2 norm, if they exceed it; every rank calls this."""
    dense = [p.grad for p in model.parameters() if p.grad is not None]
    mine, common = tables.squared_norms(step.asked, gradients)
    total = global_sum(mine) + common
    total = total + sum((g.double().square().sum() for g in dense), torch.zeros_like(total))
    scale = (norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in dense:
        gradient.mul_(scale)
    return tuple(gradient * scale.to(gradient.dtype) for gradient in gradients)


def _taught(label: Tensor, teacher: Recommender, batch: Batch, train: Train) -> Tensor:
    """Return labels mixed with a teacher's probabilities.

    The log loss against the mixture is the mixture of the log losses (Hinton et al., 2015,
    section 2, at temperature 1).
    """
    with (
        torch.no_grad(),
        torch.autocast(label.device.type, torch.bfloat16, enabled=train.precision == "bf16"),
    ):
        probability = teacher.score(teacher(batch.features).logit.to(label.dtype))
    return torch.lerp(label, probability, train.teacher_weight)


def _retrieval_loss(
    output: Output,
    batch: Batch,
    index: Tensor,
    drawn: int,
    train: Train,
    log_probability: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return the weighted sum of in-batch softmax losses over this rank's rows at `index`.

    drawn: how many rows at the batch's end are negatives that were drawn from the catalogue.
    """
    dtype = batch.label.dtype
    rows = len(batch.label)
    candidates = torch.cat([index, torch.arange(rows - drawn, rows, device=index.device)])
    items, start = gather_rows(output.item[candidates].to(dtype))
    item_index, _ = gather_rows(batch.item_index[candidates])
    user = output.user[index].to(dtype)
    if items.shape[0] == 0:
        return user.sum() + items.sum()
    log_q = None
    if train.logq and log_probability is not None:
        log_q = log_probability[item_index].to(dtype)
        if drawn:
            uniform = drawn * current().size
            log_q = in_mixture(log_q, len(items) - uniform, uniform, len(log_probability))
    return in_batch_softmax(
        user,
        items,
        batch.weight[index] * batch.label[index],
        own_B=torch.arange(start, start + index.shape[0], device=index.device),
        item_B=batch.item_index[index],
        item_C=item_index,
        temperature=temperature,
        log_probability_C=log_q,
        remove_accidental_hits=train.remove_accidental_hits,
        hard_negatives=train.hard_negatives,
    )
