"""Sums over ranks that keep N ranks' gradients equal to one rank's on the same global batch.

Every collective has a name of its own, the same in each step: Horovod then knows it again from its
cache and need not negotiate it anew. What is to travel in one message is joined here, not by
Horovod, which joins what happens to be there: with it the order of a sum over three and more ranks,
and so its last bit, would change from run to run (see launcher.DEFAULTS).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
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


BUCKETS, SMALLEST_BUCKET = 4, 1 << 18
"""Into how many messages dense gradients are put at most, and the bytes that fill one at least."""


class DenseGradients:
    """The gradients of dense parameters, joined over the ranks while the backward pass goes on.

    The backward pass comes to a model's last parameters first: from them on gradients are put into
    a few buckets, and a bucket goes out as one message when the last of its gradients is there. A
    large gradient is a bucket by itself, which need not be copied.

    how: step: each becomes its sum over the ranks. adasum: Adasum of the ranks' gradients, each of
    its own mean loss (Maleki et al., MLSys 2021). average: no messages, each rank keeps its own.
    Every rank must give the same parameters in the same order, and call each method as often. A
    model has one of these.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        how: Literal["step", "adasum", "average"] = "step",
    ) -> None:
        self._parameters, self._how, self._size = list(parameters), how, current().size
        self._buckets = _buckets(self._parameters)
        self._missing: list[int] = []
        self._sent: dict[int, _Message] = {}
        if self._size > 1 and how != "average":
            for number, bucket in enumerate(self._buckets):
                for parameter in bucket:
                    hook = partial(self._arrived, number)
                    parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def expect(self) -> None:
        """Say that the next backward pass is the last one before the step."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Begin to join what has not gone out yet; does not wait.

        A parameter that this rank's batch did not touch takes part with zeros, because a rank that
        stays out would leave the others waiting.
        """
        self._missing = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._size > 1:
            for number in range(len(self._buckets)):
                self._send(number)

    def wait(self) -> None:
        """Wait until the parameters have their joined gradients."""
        for bucket, message in self._sent.items():
            for parameter, gradient in zip(self._buckets[bucket], message.wait(), strict=True):
                parameter.grad = gradient
        self._sent = {}

    def _arrived(self, bucket: int, _: Tensor) -> None:
        if self._missing:
            self._missing[bucket] -= 1
            if not self._missing[bucket]:
                self._send(bucket)

    def _send(self, bucket: int) -> None:
        if bucket in self._sent:
            return
        gradients = [p.grad for p in self._buckets[bucket] if p.grad is not None]
        if self._how != "step":
            # What a rank has is its share of a sum; its own mean is about `size` times that.
            torch._foreach_mul_(gradients, self._size)
        if self._how != "average":
            self._sent[bucket] = _Message.send(gradients, self._how, f"gradients/{bucket}")


@dataclass(frozen=True)
class _Message:
    """Tensors that are joined over the ranks.

    joined: what travels: a copy of several tensors, the memory of one; None with Adasum, where each
    travels by itself.
    """

    tensors: Sequence[Tensor]
    joined: Tensor | None
    handle: int

    @staticmethod
    def send(tensors: Sequence[Tensor], how: Literal["step", "adasum"], name: str) -> _Message:
        import horovod.torch as hvd

        if how == "adasum":
            # Its sums are of each tensor alone.
            handle = hvd.grouped_allreduce_async_(list(tensors), op=hvd.Adasum, name=name)
            return _Message(tensors, None, handle)
        flat = [tensor.reshape(-1) for tensor in tensors]
        joined = torch.cat(flat) if len(flat) > 1 else flat[0]
        return _Message(tensors, joined, hvd.allreduce_async_(joined, op=hvd.Sum, name=name))

    def wait(self) -> Sequence[Tensor]:
        """Return the joined tensors, each of its shape."""
        wait(self.handle)
        if self.joined is None:
            return self.tensors
        parts = torch.split(self.joined, [tensor.numel() for tensor in self.tensors])
        return [p.view_as(t) for p, t in zip(parts, self.tensors, strict=True)]


def bucket_bytes(total: int) -> int:
    """Return how many bytes of gradients fill a bucket, of `total`."""
    return max(SMALLEST_BUCKET, total // BUCKETS)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters, the last first, into large ones and buckets of about as many bytes."""
    enough = bucket_bytes(sum(p.nbytes for p in parameters))
    buckets = [[p] for p in reversed(parameters) if p.nbytes >= enough]
    small: list[list[nn.Parameter]] = []
    for parameter in reversed(parameters):
        if parameter.nbytes < enough:
            if not small or sum(p.nbytes for p in small[-1]) >= enough:
                small.append([])
            small[-1].append(parameter)
    return buckets + small


def average(tensors: Iterable[Tensor]) -> None:
    """Overwrite floating-point tensors by their mean over the ranks."""
    if current().size > 1:
        mine = list(tensors)
        torch._foreach_div_(mine, current().size)
        torch._foreach_copy_(mine, list(_Message.send(mine, "step", "average").wait()))


def broadcast_state(tensors: dict[str, Tensor]) -> None:
    """Overwrite named tensors on every rank with the first rank's."""
    if current().size > 1:
        import horovod.torch as hvd

        hvd.broadcast_parameters(tensors, root_rank=0)
