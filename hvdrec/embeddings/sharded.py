"""Embedding tables outside the model, replicated on all ranks or sharded over them.

For each batch, the methods of `DistributedTables` run in this order:

1. `look_up` finds the unique embedding rows of the batch, on the loader's thread.
2. `request_rows` sends the row indices to the ranks that hold the rows, while the previous step
   still computes.
3. `start_fetch` starts to send the rows, as soon as the previous step has updated its rows.
4. `fetch` waits for the rows. Then the model runs forward and backward.
5. `send_gradients` and `wait_gradients` send the gradients to the ranks that hold the rows.
6. `update` takes the optimizer step on these rows.

Only rows that a batch looks up are sent, so the cost of a step does not depend on the number of
rows of the tables.
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
    """A batch's request for rows of one group of tables, and the data to send gradients back."""

    lookup: GroupLookup
    handle: int | None = None
    """The handle of the collective that sends the row indices."""
    rows: Tensor | None = None
    """int64: the indices of the rows that this rank reads and updates; they are unique unless the
    kernel sums duplicates."""
    order: Tensor | None = None
    """Positions in `rows`. For sharded tables: of each row that a rank requests from this rank. For
    replicated tables: of each row that this rank looks up."""
    counts: Tensor | None = None
    """int32 [ranks]: how many rows each rank requests from this rank."""
    is_started: bool = False
    """True as soon as this rank has started to send the vectors, or has found that it need not."""
    vectors_handle: int | None = None
    vectors: Tensor | None = None


@dataclass(frozen=True)
class RowRequest:
    """The embedding rows that a batch has requested; `DistributedTables.fetch` waits for them."""

    groups: tuple[_GroupRequest, ...]


@dataclass(frozen=True)
class PendingGradients:
    """The gradients of a batch's embedding rows while they are sent.

    `gradients` has for each group this rank's gradients and the handle of the collective, if any.
    """

    request: RowRequest
    gradients: tuple[tuple[Tensor, int | None], ...]


class DistributedTables:
    """The embedding tables of a model, stored on all ranks of a job.

    A job of one rank sends nothing.

    Attributes:
        groups: The tables, grouped by width and placement.
        kernels: For each group, the kernel that holds this rank's rows.
        step: The number of optimizer steps taken.
        sent_bytes: The bytes of row indices, vectors and gradients that this rank has sent in
            training, without the overhead of messages.
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
            groups: The tables, placed on `world.size` ranks.
            optimizer: The optimizer of the rows.
            world: This rank's number and the number of ranks.
            kernels: The name of the kernel for each table width.
            seed: The seed of the initial values; None fills the tables with zeros.
            deviation: The standard deviation of the initial values.
            dtype: The dtype of rows and optimizer state.
            device: The device that stores the rows.
            pooling: How lists are pooled, by feature name, as in ``[model.pooling]``.
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
        """Return this rank's rows of a table and their optimizer state by name, without a copy."""
        for group, kernel in zip(self.groups, self.kernels, strict=True):
            if name in group.sizes:
                start = group.offsets[name]
                stop = start + len(group.local_ids(name, self.world.rank))
                state = {key: value[start:stop] for key, value in kernel.state.items()}
                return kernel.weight[start:stop], state
        raise KeyError(name)

    def look_up(self, codes: Mapping[str, Tensor], parts: int = 1) -> tuple[GroupLookup, ...]:
        """Find the unique embedding rows that a batch needs; see `lookup.look_up`."""
        is_sent = self.world.size > 1
        return look_up(self.schema, self.groups, codes, self.pooling, parts=parts, is_sent=is_sent)

    def request_rows(self, lookups: Sequence[GroupLookup]) -> RowRequest:
        """Start to send row indices to the ranks that hold the rows, without waiting.

        All ranks must call this for each batch, in the same order, and later call `fetch` for each
        request.
        """
        # Two batches can have a pending request at the same time, so two names alternate.
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
        """Start to send the rows for the next step, after `update` of the current step.

        All ranks must call this at the same time. If a kernel needs the learning rate to read rows,
        this does nothing, because the next step's rate is not set yet. In this case `fetch` sends
        the rows.
        """
        if not any(kernel.needs_rate_to_fetch for kernel in self.kernels):
            self._start_fetch(request)

    def _start_fetch(self, request: RowRequest) -> None:
        for group, kernel, pending in self._each(request):
            if not pending.is_started:
                pending.vectors_handle = self._serve_rows(group, kernel, pending)
                pending.is_started = True

    def _serve_rows(self, group: TableGroup, kernel: Kernel, pending: _GroupRequest) -> int | None:
        """Wait until this rank knows which rows to read; start to send them if they are sharded."""
        if self.world.size == 1:
            return None
        assert pending.handle is not None
        own = pending.lookup
        is_training = torch.is_grad_enabled()
        if not group.is_sharded:
            # The rows are those that any rank looks up, in ascending order. They are the same on
            # all ranks, so the gradients can be summed element by element.
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
        """Wait for the requested rows and return them, once for each part of the batch.

        If gradients are enabled, the returned vectors require gradients.
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
        """Look up and fetch a batch's rows outside of training; all ranks call this together."""
        # Horovod's thread cannot write into tensors that were created in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            lookups = self.look_up({name: code.cpu() for name, code in codes.items()})
            (rows,) = self.fetch(self.request_rows(lookups))
        return rows

    def send_gradients(self, request: RowRequest) -> PendingGradients:
        """Start to send the gradients of a batch's rows to the ranks that hold these rows."""
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
        """Wait for the gradients of the rows that this rank updates.

        Returns:
            For each group, the gradients of all ranks [rows, width]. Gradients of the same row are
            already summed, unless the kernel sums them itself.
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
        """Take an optimizer step on a batch's rows; `gradients` come from `wait_gradients`."""
        self.step += 1
        for (_, kernel, pending), gradient in zip(self._each(request), gradients, strict=True):
            assert pending.rows is not None
            kernel.update(pending.rows, gradient, self.step)

    def squared_norms(
        self, request: RowRequest, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return two sums of squared gradients, float64 scalars.

        The first is over the sharded rows that this rank holds. The second is over replicated rows;
        it is the same on every rank. `gradients` is the result of `wait_gradients`.
        """
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
        """Return the same lookup indices with their tensors on the device of the tables."""
        if self.device.type == "cpu":
            return indices
        moved = {f.name: self._to_device(getattr(indices, f.name)) for f in fields(indices)}
        return replace(indices, **moved)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor  # even a `to` without a copy would let the loader's thread take the GIL
        return tensor.to(self.device, non_blocking=True)

    def _from_numpy(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def replicated_bytes(unique: int, union: int, width: int, ranks: int) -> int:
    """Return the bytes that a rank sends in a step for replicated tables of one width.

    The rank looks up `unique` rows, all ranks together `union` rows. Row indices are gathered over
    a ring of ranks, and gradients are reduced over it.
    """
    return 4 * unique * (ranks - 1) + 2 * 4 * union * width * (ranks - 1) // ranks


def _received(handle: int) -> Tensor:
    """Wait for a collective and return its tensor only; alltoall also returns counts."""
    result = wait(handle)
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor
