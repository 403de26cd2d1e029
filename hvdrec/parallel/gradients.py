"""Sums over ranks that keep N ranks' gradients equal to one rank's on the same global batch.

Every collective has a name of its own, the same in each step: Horovod then knows it again from its
cache and need not negotiate it anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvdrec.parallel.ranks import current, wait


def global_sum(value: Tensor) -> Tensor:
    """Return the sum of a small tensor over the ranks, without gradient."""
    if current().size == 1:
        return value.detach()
    import horovod.torch as hvd

    mine = value.detach().reshape(-1)
    total: Tensor = wait(hvd.allreduce_async(mine, op=hvd.Sum, name="global_sum"))
    return total.reshape(value.shape)


_sums_begun = 0


@dataclass(frozen=True)
class PendingSum:
    """A sum over the ranks that is under way."""

    value: Tensor
    handle: int | None

    def wait(self) -> Tensor:
        """Return the sum."""
        if self.handle is None:
            return self.value
        total: Tensor = wait(self.handle)
        return total


def begin_global_sum(value: Tensor) -> PendingSum:
    """Begin to sum a small tensor [n] over the ranks; two may be under way at a time."""
    global _sums_begun  # noqa: PLW0603 -- names of collectives belong to the process
    if current().size == 1:
        return PendingSum(value, None)
    import horovod.torch as hvd

    _sums_begun += 1
    name = f"begun_sum/{_sums_begun % 2}"
    return PendingSum(value, hvd.allreduce_async(value, op=hvd.Sum, name=name))


class _Gather(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is the sum of what all ranks ask of it.

    Horovod's own allgather has a backward pass that averages, which is 1/N of that sum.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, start: int) -> Tensor:
        import horovod.torch as hvd

        ctx.start, ctx.count = start, rows.shape[0]
        gathered: Tensor = wait(hvd.allgather_async(rows.contiguous(), name="rows"))
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        import horovod.torch as hvd

        mine = gradients[0].contiguous()
        total: Tensor = wait(hvd.allreduce_async(mine, op=hvd.Sum, name="rows_grad"))
        return total[ctx.start : ctx.start + ctx.count], None


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Join the ranks' rows [n_r, ...] in order of rank, with gradient.

    Ranks may give different numbers of rows. Returns the rows of all ranks and the position of
    this rank's first. Every rank must call this, and run the backward pass through it.
    """
    if current().size == 1:
        return rows, 0
    import horovod.torch as hvd

    counts = wait(hvd.allgather_async(torch.tensor([rows.shape[0]]), name="counts"))
    start = int(counts[: current().rank].sum())
    if not rows.requires_grad:
        return wait(hvd.allgather_async(rows.contiguous(), name="plain_rows")), start
    gathered: Tensor = _Gather.apply(rows, start)  # type: ignore[no-untyped-call]
    return gathered, start


def sum_gradients(
    parameters: Iterable[nn.Parameter], how: Literal["step", "adasum", "average"] = "step"
) -> None:
    """Join the ranks' gradients of dense parameters, fused into few messages.

    step: each becomes its sum over the ranks. adasum: Adasum of the ranks' gradients, each of its
    own mean loss (Maleki et al., MLSys 2021). average: no messages, each rank keeps its own.
    Every rank must give the same parameters in the same order; one that this rank's batch did not
    touch takes part with zeros, because a rank that stays out would leave the others waiting.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    size = current().size
    if size == 1:
        return
    if how != "step":
        # What a rank has is its share of a sum; its own mean is about `size` times that.
        torch._foreach_mul_(gradients, size)
    if how == "average":
        return
    import horovod.torch as hvd

    operation = hvd.Sum if how == "step" else hvd.Adasum
    wait(hvd.grouped_allreduce_async_(gradients, op=operation, name="gradients"))


def average(tensors: Iterable[Tensor]) -> None:
    """Overwrite floating-point tensors by their mean over the ranks."""
    if current().size > 1:
        import horovod.torch as hvd

        wait(hvd.grouped_allreduce_async_(list(tensors), op=hvd.Average, name="average"))


def broadcast_state(tensors: dict[str, Tensor]) -> None:
    """Overwrite named tensors on every rank with the first rank's."""
    if current().size > 1:
        import horovod.torch as hvd

        hvd.broadcast_parameters(tensors, root_rank=0)
