"""Sums over ranks that keep N ranks' gradients equal to one rank's on the same global batch.

Every collective has a name of its own, the same in each step: Horovod then knows it again from its
cache and need not negotiate it anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hvdrec.parallel.ranks import current


def global_sum(value: Tensor) -> Tensor:
    """Return the sum of a small tensor over the ranks, without gradient."""
    if current().size == 1:
        return value.detach()
    import horovod.torch as hvd

    total: Tensor = hvd.allreduce(value.detach().reshape(-1), op=hvd.Sum, name="global_sum")
    return total.reshape(value.shape)


class _Gather(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is the sum of what all ranks ask of it.

    Horovod's own allgather has a backward pass that averages, which is 1/N of that sum.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, start: int) -> Tensor:
        import horovod.torch as hvd

        ctx.start, ctx.count = start, rows.shape[0]
        gathered: Tensor = hvd.allgather(rows.contiguous(), name="rows")
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        import horovod.torch as hvd

        total: Tensor = hvd.allreduce(gradients[0].contiguous(), op=hvd.Sum, name="rows_grad")
        return total[ctx.start : ctx.start + ctx.count], None


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Join the ranks' rows [n_r, ...] in order of rank, with gradient.

    Ranks may give different numbers of rows. Returns the rows of all ranks and the position of
    this rank's first. Every rank must call this, and run the backward pass through it.
    """
    if current().size == 1:
        return rows, 0
    import horovod.torch as hvd

    counts = hvd.allgather(torch.tensor([rows.shape[0]]), name="counts")
    start = int(counts[: current().rank].sum())
    if not rows.requires_grad:
        return hvd.allgather(rows.contiguous(), name="plain_rows"), start
    gathered: Tensor = _Gather.apply(rows, start)  # type: ignore[no-untyped-call]
    return gathered, start


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each parameter's gradient by its sum over the ranks, fused into few messages.

    Every rank must give the same parameters in the same order; one that this rank's batch did not
    touch takes part with zeros, because a rank that stays out would leave the others waiting.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if current().size > 1:
        import horovod.torch as hvd

        hvd.grouped_allreduce_(gradients, op=hvd.Sum, name="gradients")


def broadcast_state(tensors: dict[str, Tensor]) -> None:
    """Overwrite named tensors on every rank with the first rank's."""
    if current().size > 1:
        import horovod.torch as hvd

        hvd.broadcast_parameters(tensors, root_rank=0)
