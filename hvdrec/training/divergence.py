"""Stop a run whose loss or weights are NaN or infinite, before a checkpoint is written."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hvdrec.config.sections import Train
from hvdrec.errors import UserError
from hvdrec.parallel import ranks
from hvdrec.training.optimizer import optimizer_tensors
from hvdrec.training.state import TrainState

USUAL_RATES = {"adam": 0.01}
"""Optimizer of the embedding tables -> its usual learning rate; for other optimizers, ROW_RATE."""
DENSE_RATE, ROW_RATE = 1e-3, 0.1


def diverged(train: Train, step: int, what: str, value: float) -> UserError:
    """Build the error for a run that has diverged; it names the learning rate to lower.

    It is the learning rate of the dense weights or that of the table rows, whichever is higher in
    proportion to its usual value.

    Args:
        train: The ``[train]`` section.
        step: Number of steps since the start of training.
        what: Name of the quantity that is NaN or infinite, such as "loss".
        value: Value of the quantity.
    """
    usual = USUAL_RATES.get(train.embedding_optimizer, ROW_RATE)
    field, rate = "train.learning_rate", train.learning_rate
    if train.embedding_learning_rate / usual > train.learning_rate / DENSE_RATE:
        field, rate = "train.embedding_learning_rate", train.embedding_learning_rate
    return UserError(
        f"{what} = {value:g} at step {step}: training has diverged; lower {field} = {rate:g} and "
        "train again with --overwrite",
        field=field,
        value=rate,
    )


def check_loss(train: Train, step: int, loss: float) -> None:
    """Raise SharedError if a loss is NaN or infinite; all ranks must pass the same loss."""
    if not math.isfinite(loss):
        error = diverged(train, step, "loss", loss)
        ranks.raise_shared(str(error), error.field)


def check_weights(state: TrainState, step: int) -> None:
    """Check that no weight, table row or optimizer state is NaN or infinite.

    All ranks must call this at the same time. The check takes less time than writing a checkpoint.

    Raises:
        SharedError: A value is NaN or infinite on at least one rank.
    """

    def check() -> None:
        for name, tensor in _tensors(state):
            worst = _extreme(tensor)
            if not math.isfinite(worst):
                raise diverged(state.config.train, step, name, worst)

    ranks.run_on_all(check)


def _tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors that this rank writes to a checkpoint, with names for error messages."""
    dense = state.model.state_dict() | optimizer_tensors(state.model, state.optimizer)
    if state.averages is not None:
        dense |= state.averages.dense
    yield from ((f"weight {name}", tensor) for name, tensor in dense.items())
    for group, kernel in zip(state.tables.groups, state.tables.kernels, strict=True):
        name = f"embedding table of {', '.join(group.sizes)}"
        yield from ((name, tensor) for tensor in (kernel.weight, *kernel.state.values()))


def _extreme(tensor: Tensor) -> float:
    """Return an entry of a tensor that is NaN or infinite; if there is none, its largest entry."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return float(high) if math.isfinite(low) else float(low)
