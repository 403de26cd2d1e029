"""Embedding tables outside the model, replicated or sharded over the ranks.

The order of a step:

1. `look_up` finds the batch's unique rows, on the loader's thread.
2. `request_rows` sends their indices to the ranks that hold them, while the step before computes.
3. `start_fetch` starts to send the rows, once the step before has updated its own.
4. `fetch` waits for the rows, and the model runs forward and backward.
5. `send_gradients` and `wait_gradients` bring the gradients to the rows.
6. `update` takes the optimizer step.

The cost of a step does not depend on the size of the vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config.schema import Pooling, Schema
from hvdrec.embeddings.alltoall import start_alltoall
from hvdrec.embeddings.initialization import fill_initial_rows
from hvdrec.embeddings.kernels import KERNELS, Kernel, KernelName, RowOptimizer
from hvdrec.embeddings.lookup import GroupLookup, look_up
from hvdrec.embeddings.placement import TableGroup
from hvdrec.models.embedding import BatchRows, ListIndices, RowBlock, SingleIndices
from hvdrec.parallel.ranks import World, wait

Array = NDArray[Any]
Indices = TypeVar("Indices", SingleIndices, ListIndices)


@dataclass
class _GroupRequest:
    """The pending rows of one group, and what is needed to send their gradients back."""

    lookup: GroupLookup
    handle: int | None = None
    """The collective that sends the row indices."""
    rows: Tensor | None = None
    """int64: the rows read and updated on this rank, unique if the kernel needs that."""
    order: Tensor | None = None
    """The index in `rows` of each requested row (sharded) or of each own row (replicated)."""
    counts: Tensor | None = None
    """int32 [ranks]: the number of rows that each rank requested."""
    is_started: bool = False
    """True if the vectors are being sent, or need not be sent."""
    vectors_handle: int | None = None
    vectors: Tensor | None = None


@dataclass(frozen=True)
class RowRequest:
    """The pending rows of a batch; `DistributedTables.fetch` waits for them."""

    groups: tuple[_GroupRequest, ...]


@dataclass(frozen=True)
class PendingGradients:
    """A batch's row gradients while they are sent: by group, this rank's own and a handle."""

    request: RowRequest
    gradients: tuple[tuple[Tensor, int | None], ...]


class DistributedTables:
    """The embedding tables of a model, over the ranks of a job. One rank exchanges nothing.

    Attributes:
        groups: The groups of tables.
        kernels: This rank's rows of each group.
        step: The number of optimizer steps taken.
        sent_bytes: The bytes this rank has sent in training (row indices, vectors and gradients,
            without message overhead).
    """

    def __init__(
        self,
        schema: Schema,
        groups: Sequence[TableGroup],
        optimizer: RowOptimizer,
        world: World,
        *,
        kernels: Mapping[int, KernelName],
        seed: int | None = 0,
        deviation: float = 0.01,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pooling: Mapping[str, Pooling] | None = None,
    ) -> None:
        """Create the tables with initial values that do not depend on the number of ranks.

        Args:
            schema: The features.
            groups: The tables, as placed on `world.size` ranks.
            optimizer: The optimizer of the rows.
            world: This rank's position in the job.
            kernels: The kernel for each width.
            seed: The seed of the initial values; None fills the tables with zeros.
            deviation: The standard deviation of the initial values.
            dtype: The dtype of rows and optimizer state.
            device: Where the rows are stored.
            pooling: The pooling of list features, as in `config.model.pooling`.
        """
        self.schema, self.groups, self.optimizer = schema, tuple(groups), optimizer
        self.pooling = pooling or {}
        self.world, self.device, self.step = world, torch.device(device), 0
        self.sent_bytes = 0
        self._requests = 0
        self.kernels: tuple[Kernel, ...] = tuple(
            KERNELS[kernels[group.width]](group.local_rows, group.width, optimizer, dtype, device)
            for group in groups
        )
        if seed is not None:
            for group, kernel in zip(groups, self.kernels, strict=True):
                fill_initial_rows(group, kernel.weight, world.rank, seed, deviation)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate; call it before a step's rows are fetched."""
        for kernel in self.kernels:
            kernel.learning_rate = rate

    def table(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return views of this rank's rows of a table and of their optimizer state."""
        for group, kernel in zip(self.groups, self.kernels, strict=True):
            if name in group.sizes:
                start = group.offsets[name]
                stop = start + len(group.local_ids(name, self.world.rank))
                state = {key: value[start:stop] for key, value in kernel.state.items()}
                return kernel.weight[start:stop], state
        raise KeyError(name)

    def look_up(self, codes: Mapping[str, Tensor], parts: int = 1) -> tuple[GroupLookup, ...]:
        """Find the unique rows of a batch, see `lookup.look_up`."""
        is_sent = self.world.size > 1
        return look_up(self.schema, self.groups, codes, self.pooling, parts=parts, is_sent=is_sent)

    def request_rows(self, lookups: Sequence[GroupLookup]) -> RowRequest:
        """Start to send row indices to the ranks that hold the rows, without waiting.

        Every rank must call this, and then `fetch`, for each of its batches in order.
        """
        # Requests of two batches can be pending at a time, so two names alternate.
        self._requests += 1
        return RowRequest(tuple(map(self._request, self.groups, lookups)))

    def _request(self, group: TableGroup, lookup: GroupLookup) -> _GroupRequest:
        request = _GroupRequest(lookup)
        name = f"rows/{group.name}/{self._requests % 2}"
        if self.world.size == 1:
            request.rows = self._to_device(lookup.rows)
        elif group.is_sharded:
            request.handle = start_alltoall(lookup.rows, lookup.counts, name)
        else:
            import horovod.torch as hvd

            request.handle = hvd.allgather_async(lookup.rows, name=name)
        return request

    def start_fetch(self, request: RowRequest) -> None:
        """Start to send the rows of a later step, once this step has updated its own.

        Every rank must call this together. It does nothing if a kernel needs the learning rate
        before it reads: the rate of the later step is not known yet.
        """
        if not any(kernel.needs_rate_to_fetch for kernel in self.kernels):
            self._start_fetch(request)

    def _start_fetch(self, request: RowRequest) -> None:
        for group, kernel, pending in self._each(request):
            if not pending.is_started:
                pending.vectors_handle = self._serve_rows(group, kernel, pending)
                pending.is_started = True

    def _serve_rows(self, group: TableGroup, kernel: Kernel, pending: _GroupRequest) -> int | None:
        """Wait for the requests to this rank; start to send sharded rows and return the handle."""
        if self.world.size == 1:
            return None
        assert pending.handle is not None
        own = pending.lookup
        is_training = torch.is_grad_enabled()
        if not group.is_sharded:
            # All ranks use the same rows in the same order, so their gradients can be summed.
            union = np.unique(wait(pending.handle).numpy())
            pending.rows = self._from_numpy(union.astype(np.int64))
            pending.order = self._from_numpy(np.searchsorted(union, own.rows.numpy()))
            if is_training:
                self.sent_bytes += replicated_bytes(
                    len(own.rows), len(union), group.width, self.world.size
                )
            return None
        requested, pending.counts = wait(pending.handle)
        rows = requested.long()
        rank = self.world.rank
        if is_training:
            asked = len(own.rows) - int(own.counts[rank])
            served = len(rows) - int(pending.counts[rank])
            self.sent_bytes += 4 * asked * (1 + group.width) + 4 * served * group.width
        if kernel.sums_duplicates:
            pending.rows = rows.to(self.device)
            vectors = kernel.fetch(pending.rows)
        else:
            order, unique = pd.factorize(rows.numpy())
            pending.rows, pending.order = self._from_numpy(unique), self._from_numpy(order)
            vectors = kernel.fetch(pending.rows).index_select(0, pending.order)
        return start_alltoall(vectors, pending.counts, f"vectors/{group.name}")

    def fetch(self, request: RowRequest) -> tuple[BatchRows, ...]:
        """Wait for the requested rows and return them for each part of the batch.

        If gradients are enabled, the vectors require gradients.
        """
        self._start_fetch(request)
        blocks = []
        for _, kernel, pending in self._each(request):
            assert pending.rows is not None
            if pending.vectors_handle is None:
                vectors = kernel.fetch(pending.rows)
                if pending.order is not None:
                    vectors = vectors.index_select(0, pending.order)
            else:
                vectors = _received(pending.vectors_handle)
            vectors = pending.vectors = vectors.requires_grad_(torch.is_grad_enabled())
            own = pending.lookup
            blocks.append(
                [
                    RowBlock(
                        vectors,
                        own.single,
                        self._move(values),
                        {name: self._move(each) for name, each in lists.items()},
                    )
                    for values, lists in zip(own.values, own.lists, strict=True)
                ]
            )
        return tuple(BatchRows(tuple(part)) for part in zip(*blocks, strict=True))

    def fetch_rows(self, codes: Mapping[str, Tensor]) -> BatchRows:
        """Look up a batch outside of training; every rank must call this together."""
        # Horovod's thread cannot write into tensors that were created in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            lookups = self.look_up({name: code.cpu() for name, code in codes.items()})
            (rows,) = self.fetch(self.request_rows(lookups))
        return rows

    def send_gradients(self, request: RowRequest) -> PendingGradients:
        """Start to send the gradients of a batch's rows to the ranks that hold the rows."""
        sent = []
        for group, _, pending in self._each(request):
            assert pending.vectors is not None
            gradient = pending.vectors.grad
            if gradient is None:
                gradient = torch.zeros_like(pending.vectors)
            sent.append((gradient, self._send_gradient(group, pending, gradient)))
        return PendingGradients(request, tuple(sent))

    def _send_gradient(
        self, group: TableGroup, pending: _GroupRequest, gradient: Tensor
    ) -> int | None:
        if self.world.size == 1:
            return None
        name = f"gradients/{group.name}"
        if group.is_sharded:
            return start_alltoall(gradient, pending.lookup.counts, name)
        import horovod.torch as hvd

        assert pending.rows is not None
        assert pending.order is not None
        total = gradient.new_zeros(len(pending.rows), group.width)
        total[pending.order] = gradient
        handle: int = hvd.allreduce_async_(total, op=hvd.Sum, name=name)
        return handle

    def wait_gradients(self, pending: PendingGradients) -> tuple[Tensor, ...]:
        """Wait for the gradients of the rows that this rank updates, summed over all ranks.

        Returns:
            For each group [R, width], with unique rows if the kernel needs that.
        """
        sums = []
        pairs = zip(pending.request.groups, pending.gradients, strict=True)
        for request, (gradient, handle) in pairs:
            assert request.rows is not None
            received = gradient if handle is None else _received(handle)
            if request.order is not None and request.counts is not None:
                total = received.new_zeros(len(request.rows), received.shape[1])
                received = total.index_add_(0, request.order, received)
            sums.append(received)
        return tuple(sums)

    def update(self, request: RowRequest, gradients: Sequence[Tensor]) -> None:
        """Take an optimizer step on the rows of a batch with the result of `wait_gradients`."""
        self.step += 1
        for (_, kernel, pending), gradient in zip(self._each(request), gradients, strict=True):
            assert pending.rows is not None
            kernel.update(pending.rows, gradient, self.step)

    def squared_norms(
        self, request: RowRequest, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of squared gradients of sharded rows here, and of replicated rows."""
        sharded = torch.zeros((), device=self.device, dtype=torch.float64)
        replicated = torch.zeros_like(sharded)
        for (group, kernel, pending), gradient in zip(self._each(request), gradients, strict=True):
            total = gradient
            if group.is_sharded and kernel.sums_duplicates:
                assert pending.rows is not None
                order, unique = pd.factorize(pending.rows.cpu().numpy())
                total = gradient.new_zeros(len(unique), group.width)
                total.index_add_(0, self._from_numpy(order), gradient)
            (sharded if group.is_sharded else replicated).add_(total.double().square().sum())
        return sharded, replicated

    def _each(self, request: RowRequest) -> list[tuple[TableGroup, Kernel, _GroupRequest]]:
        return list(zip(self.groups, self.kernels, request.groups, strict=True))

    def _move(self, indices: Indices) -> Indices:
        """Return lookup indices with their tensors on the device."""
        if self.device.type == "cpu":
            return indices
        moved = {f.name: self._to_device(getattr(indices, f.name)) for f in fields(indices)}
        return replace(indices, **moved)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor  # even a `to` without effect would yield the GIL to the loader's thread
        return tensor.to(self.device, non_blocking=True)

    def _from_numpy(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def replicated_bytes(unique: int, union: int, width: int, ranks: int) -> int:
    """Return the bytes that a rank sends in a step for replicated tables of one width.

    The rank looks up `unique` rows, all ranks together `union` rows. Row indices travel around a
    ring once; gradients are reduced over a ring.
    """
    return 4 * unique * (ranks - 1) + 2 * 4 * union * width * (ranks - 1) // ranks


def _received(handle: int) -> Tensor:
    """Wait for an exchange and return its tensor, without the counts of an alltoall."""
    result = wait(handle)
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor
