"""Sum gradients over the ranks, so that N ranks train as one rank with the same global batch.

Each collective has the same name in each step, so Horovod's response cache hits and ranks do not
negotiate. Small tensors are concatenated here into one message. Horovod's tensor fusion could do
it too, but which tensors it joins depends on timing. The last bit of a sum over three or more ranks
would then change from run to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvdrec.errors import invalid_value
from hvdrec.parallel.ranks import World, current, wait


def global_sum(value: Tensor) -> Tensor:
    """Return the sum of a small tensor over the ranks, without gradient."""
    if current().size == 1:
        return value.detach()
    import horovod.torch as hvd

    mine = value.detach().reshape(-1)
    total: Tensor = wait(hvd.allreduce_async(mine, op=hvd.Sum, name="global_sum"))
    return total.reshape(value.shape)


_started_sums = 0


@dataclass(frozen=True)
class PendingSum:
    """A sum over the ranks that has been started and may not be complete."""

    value: Tensor
    handle: int | None

    def wait(self) -> Tensor:
        """Wait for the sum and return it."""
        if self.handle is None:
            return self.value
        total: Tensor = wait(self.handle)
        return total


def start_global_sum(value: Tensor) -> PendingSum:
    """Start to sum a small tensor [n] over the ranks; at most two such sums may be pending."""
    global _started_sums  # noqa: PLW0603 -- names of collectives belong to the process
    if current().size == 1:
        return PendingSum(value, None)
    import horovod.torch as hvd

    _started_sums += 1
    name = f"started_sum/{_started_sums % 2}"
    return PendingSum(value, hvd.allreduce_async(value, op=hvd.Sum, name=name))


class _Gather(torch.autograd.Function):
    """Gather the rows of all ranks; the backward pass sums each row's gradient over the ranks.

    The backward pass of Horovod's own allgather computes the mean over the ranks, not the sum.
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
    """Concatenate the rows of all ranks; gradients flow back to the rank that gave a row.

    All ranks must call this at the same time, and all must run the backward pass.

    Args:
        rows: This rank's rows [n_r, ...]; n_r may differ between ranks.

    Returns:
        The rows of all ranks [sum of n_r, ...] in rank order, and the index of this rank's first
        row.
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


SumMode = Literal["step", "adasum", "average"]
BUCKETS, MIN_BUCKET_BYTES = 4, 1 << 18
"""The largest number of messages for small dense gradients, and the smallest size of a message."""


class DenseGradients:
    """Sums the gradients of dense parameters over the ranks during the backward pass.

    Parameters are divided into a few buckets, starting with the model's last ones, because the
    backward pass reaches them first. As soon as all gradients of a bucket are ready, they are sent
    as one message. A large gradient has a bucket of its own and is not copied.

    All ranks must pass the same parameters in the same order, and make the same calls. Create only
    one `DenseGradients` for a model.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        mode: SumMode = "step",
    ) -> None:
        """Register hooks on the parameters.

        Args:
            parameters: The dense parameters of a model.
            mode: ``step`` sums each gradient over the ranks. ``adasum`` combines the gradients of
                the ranks' mean losses by Adasum (Maleki et al., MLSys 2021). ``average`` sends
                nothing, so each rank keeps its own gradient.
        """
        self._parameters, self._mode, self._size = list(parameters), mode, current().size
        self._buckets = _buckets(self._parameters)
        self._missing: list[int] = []
        self._sent: dict[int, _Message] = {}
        if self._size > 1 and mode != "average":
            for number, bucket in enumerate(self._buckets):
                for parameter in bucket:
                    hook = partial(self._on_gradient, number)
                    parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def expect_last_backward(self) -> None:
        """Let the next backward pass send gradients; it must be the step's last backward pass."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def send_rest(self) -> None:
        """Send the buckets that have not been sent yet, without waiting for the sums.

        A gradient that does not exist is sent as zeros, because the other ranks wait for it.
        """
        self._missing = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._size > 1:
            for number in range(len(self._buckets)):
                self._send(number)

    def wait(self) -> None:
        """Wait for the sums and store them in the parameters' ``grad``."""
        for bucket, message in self._sent.items():
            for parameter, gradient in zip(self._buckets[bucket], message.wait(), strict=True):
                parameter.grad = gradient
        self._sent = {}

    def _on_gradient(self, bucket: int, _: Tensor) -> None:
        if self._missing:
            self._missing[bucket] -= 1
            if not self._missing[bucket]:
                self._send(bucket)

    def _send(self, bucket: int) -> None:
        if bucket in self._sent:
            return
        gradients = [p.grad for p in self._buckets[bucket] if p.grad is not None]
        if self._mode != "step":
            # The gradient of the global mean loss is a sum over the ranks. Adasum needs the
            # gradient of each rank's own mean loss, which is about `size` times the rank's term of
            # the sum.
            torch._foreach_mul_(gradients, self._size)
        if self._mode != "average":
            self._sent[bucket] = _Message.send(gradients, self._mode, f"gradients/{bucket}")


@dataclass(frozen=True)
class _Message:
    """Tensors that are being summed over the ranks."""

    tensors: Sequence[Tensor]
    buffer: Tensor | None
    """The sent data: a copy of several tensors, or a view of one. None with Adasum, which sends the
    tensors themselves."""
    handle: int

    @staticmethod
    def send(tensors: Sequence[Tensor], mode: Literal["step", "adasum"], name: str) -> _Message:
        import horovod.torch as hvd

        if mode == "adasum":
            # Adasum computes its coefficients for each tensor, so tensors are not concatenated.
            handle = hvd.grouped_allreduce_async_(list(tensors), op=hvd.Adasum, name=name)
            return _Message(tensors, None, handle)
        flat = [tensor.reshape(-1) for tensor in tensors]
        buffer = torch.cat(flat) if len(flat) > 1 else flat[0]
        return _Message(tensors, buffer, hvd.allreduce_async_(buffer, op=hvd.Sum, name=name))

    def wait(self) -> Sequence[Tensor]:
        """Wait for the sums and return them, each in the shape of its tensor."""
        wait(self.handle)
        if self.buffer is None:
            return self.tensors
        parts = torch.split(self.buffer, [tensor.numel() for tensor in self.tensors])
        return [p.view_as(t) for p, t in zip(parts, self.tensors, strict=True)]


def bucket_bytes(total: int) -> int:
    """Return how many bytes a bucket holds if all gradients together take `total` bytes."""
    return max(MIN_BUCKET_BYTES, total // BUCKETS)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters, from last to first, into buckets of similar size; a large one is alone."""
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
    """Replace floating-point tensors with their mean over the ranks, in place."""
    if current().size > 1:
        mine = list(tensors)
        torch._foreach_div_(mine, current().size)
        torch._foreach_copy_(mine, list(_Message.send(mine, "step", "average").wait()))


def broadcast_state(tensors: dict[str, Tensor]) -> None:
    """Replace named tensors on every rank with those of rank 0, in place."""
    if current().size > 1:
        import horovod.torch as hvd

        hvd.broadcast_parameters(tensors, root_rank=0)


def check_synchronization(mode: SumMode, world: World, device: torch.device) -> None:
    """Raise UserError if this job cannot train with ``parallel.synchronization = mode``."""
    if mode != "adasum" or world.size == 1:
        return
    import horovod.torch as hvd

    problem = ""
    if world.size & (world.size - 1):
        problem = f"needs a power of two of ranks, not {world.size}; change their number"
    elif device.type == "cpu" and not hvd.mpi_enabled():
        problem = "needs MPI on CPUs; start the job with mpirun or horovodrun --mpi"
    if problem:
        raise invalid_value("parallel.synchronization", mode, problem, "or use 'step'")
