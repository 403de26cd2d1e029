"""Embedding tables that are held outside the model, whole or in shards over the ranks.

A step goes like this: `find` lists the batch's distinct rows (on the reader's thread), `ask` sends
their numbers to the ranks that hold them (while the step before computes), `begin_fetch` starts to
bring the rows once that step has updated its own, `fetch` waits for them, the model runs,
`send_gradients` and `gradients` bring theirs to where the rows are, and `update` takes the
optimizer's step. Nothing in it costs more with a larger vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config.schema import FIRST_CODE, Pooling, Schema
from hvdrec.embeddings.alltoall import begin_alltoall
from hvdrec.embeddings.kernels import KERNELS, Kernel, KernelName, RowOptimizer
from hvdrec.embeddings.lookup import Found, find_rows
from hvdrec.embeddings.placement import Group
from hvdrec.models.embedding import Block, Lists, Rows, Values
from hvdrec.parallel.ranks import World, wait

Array = NDArray[Any]
Moved = TypeVar("Moved", Values, Lists)


@dataclass
class _Exchange:
    """What is under way for one group: the answer to `ask`, and what the gradients go back by."""

    found: Found
    handle: int | None = None
    rows: Tensor | None = None
    """int64: the rows that are read and updated here, each once if the kernel needs that."""
    order: Tensor | None = None
    """Where each row that was asked for (sharded) or found (replicated) is among `rows`."""
    counts: Tensor | None = None
    """int32 [ranks]: how many rows each rank asked for."""
    is_begun: bool = False
    """Whether vectors are on their way, or need not travel; `arriving` is their handle, if so."""
    arriving: int | None = None
    vectors: Tensor | None = None


@dataclass(frozen=True)
class Asked:
    """The rows of a batch, under way; `fetch` waits for them."""

    exchanges: tuple[_Exchange, ...]


@dataclass(frozen=True)
class Sent:
    """Gradients of a batch's rows, under way: of each group this rank's own, and a handle."""

    asked: Asked
    gradients: tuple[tuple[Tensor, int | None], ...]


class DistributedTables:
    """The embedding tables of a model, over the ranks of a job.

    With one rank nothing is exchanged. sent_bytes: what this rank has sent to others in
    training so far: row numbers, vectors and gradients, without the messages' own overhead.
    """

    def __init__(
        self,
        schema: Schema,
        groups: Sequence[Group],
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
        """Make tables with their first values, which do not depend on the number of ranks.

        kernels: width -> kernel; seed and deviation: of the first values, or seed None for zeros;
        pooling: see config.Model.
        """
        self.pooling = pooling or {}
        self.schema, self.groups, self.optimizer = schema, tuple(groups), optimizer
        self.world, self.device, self.step = world, torch.device(device), 0
        self.sent_bytes = 0
        self._asks = 0
        self.kernels: tuple[Kernel, ...] = tuple(
            KERNELS[kernels[group.width]](group.local_rows, group.width, optimizer, dtype, device)
            for group in groups
        )
        if seed is not None:
            for group, kernel in zip(groups, self.kernels, strict=True):
                _fill(group, kernel.weight, world.rank, seed, deviation)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate, before a step's rows are fetched."""
        for kernel in self.kernels:
            kernel.rate = rate

    def table(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's rows of a table and of its optimizer state, as views."""
        for group, kernel in zip(self.groups, self.kernels, strict=True):
            if name in group.rows:
                start = group.bases[name]
                stop = start + len(group.ids(name, self.world.rank))
                state = {key: value[start:stop] for key, value in kernel.state.items()}
                return kernel.weight[start:stop], state
        raise KeyError(name)

    def find(
        self,
        codes: Mapping[str, Tensor],
        *,
        parts: int = 1,
        unknown_rate: float = 0.0,
        random: np.random.Generator | None = None,
    ) -> tuple[Found, ...]:
        """List the distinct rows of a batch, see `find_rows`; no rank waits for another here."""
        return find_rows(
            self.schema,
            self.groups,
            codes,
            parts=parts,
            unknown_rate=unknown_rate,
            random=random,
            travels=self.world.size > 1,
            pooling=self.pooling,
        )

    # --------------------------------------------------------------------------------- the exchange

    def ask(self, found: Sequence[Found]) -> Asked:
        """Begin to tell the ranks which rows are wanted of them; does not wait.

        Every rank must call this, and then `fetch`, for each of its batches in order.
        """
        # The rows of two batches can be under way at a time, under two names.
        self._asks += 1
        return Asked(tuple(map(self._ask, self.groups, found)))

    def _ask(self, group: Group, found: Found) -> _Exchange:
        exchange = _Exchange(found)
        name = f"rows/{group.name}/{self._asks % 2}"
        if self.world.size == 1:
            exchange.rows = self._moved(found.rows)
        elif group.is_sharded:
            exchange.handle = begin_alltoall(found.rows, found.counts, name)
        else:
            import horovod.torch as hvd

            exchange.handle = hvd.allgather_async(found.rows, name=name)
        return exchange

    def fetch(self, asked: Asked) -> Rows | tuple[Rows, ...]:
        """Bring the rows that were asked for; with gradients enabled, they want gradients.

        Returns the rows of the batch, or of each of its parts where there are several.
        """
        self._begin_fetch(asked)
        blocks = []
        for group, kernel, exchange in self._each(asked):
            assert exchange.rows is not None
            if exchange.arriving is None:
                vectors = kernel.fetch(exchange.rows)
                if exchange.order is not None:
                    vectors = vectors.index_select(0, exchange.order)
            else:
                vectors = _received(exchange.arriving)
            exchange.vectors = vectors.requires_grad_(torch.is_grad_enabled())
            found = exchange.found
            blocks.append(
                [
                    Block(
                        exchange.vectors,
                        found.single,
                        self._to(values),
                        {name: self._to(given) for name, given in lists.items()},
                    )
                    for values, lists in zip(found.values, found.lists, strict=True)
                ]
            )
            assert group.width == vectors.shape[1]
        parts = tuple(Rows(tuple(part)) for part in zip(*blocks, strict=True))
        return parts[0] if len(parts) == 1 else parts

    def begin_fetch(self, asked: Asked) -> None:
        """Begin to bring the rows of a later step, once this one's have been updated.

        Every rank must call this together. Where a kernel wants to know the learning rate before
        it reads, which is not known yet, nothing happens until `fetch`.
        """
        if not any(kernel.wants_rate for kernel in self.kernels):
            self._begin_fetch(asked)

    def _begin_fetch(self, asked: Asked) -> None:
        for group, kernel, exchange in self._each(asked):
            if not exchange.is_begun:
                exchange.arriving = self._arrive(group, kernel, exchange)
                exchange.is_begun = True

    def _arrive(self, group: Group, kernel: Kernel, exchange: _Exchange) -> int | None:
        """Wait for what is asked of this rank; start to send sharded rows and return the handle."""
        if self.world.size == 1:
            return None
        assert exchange.handle is not None
        if not group.is_sharded:
            everyone = wait(exchange.handle).numpy()
            # The same rows in the same order everywhere: their gradients can then be summed.
            union = np.unique(everyone)
            exchange.rows = torch.from_numpy(union.astype(np.int64)).to(self.device)
            order = np.searchsorted(union, exchange.found.rows.numpy())
            if torch.is_grad_enabled():
                self.sent_bytes += replicated_bytes(
                    len(exchange.found.rows), len(union), group.width, self.world.size
                )
            exchange.order = torch.from_numpy(order).to(self.device)
            return None
        wanted, exchange.counts = wait(exchange.handle)
        rows = wanted.long()
        mine = self.world.rank
        elsewhere = len(exchange.found.rows) - int(exchange.found.counts[mine])
        answered = len(rows) - int(exchange.counts[mine])
        if torch.is_grad_enabled():
            self.sent_bytes += 4 * elsewhere * (1 + group.width) + 4 * answered * group.width
        if kernel.sums_duplicates:
            exchange.rows = rows.to(self.device)
            outgoing = kernel.fetch(exchange.rows)
        else:
            order, distinct = pd.factorize(rows.numpy())
            exchange.rows = torch.from_numpy(distinct).to(self.device)
            exchange.order = torch.from_numpy(order).to(self.device)
            outgoing = kernel.fetch(exchange.rows).index_select(0, exchange.order)
        return begin_alltoall(outgoing, exchange.counts, f"vectors/{group.name}")

    def send_gradients(self, asked: Asked) -> Sent:
        """Begin to bring the gradients of a batch's rows to where the rows are; does not wait."""
        sent = []
        for group, _, exchange in self._each(asked):
            assert exchange.vectors is not None
            gradient = exchange.vectors.grad
            if gradient is None:
                gradient = torch.zeros_like(exchange.vectors)
            sent.append((gradient, self._send_back(group, exchange, gradient)))
        return Sent(asked, tuple(sent))

    def gradients(self, sent: Sent) -> tuple[Tensor, ...]:
        """Return, of each group, the gradients [R, width] of the rows to update here.

        They are summed over all ranks and have each row once, where the kernel needs that.
        """
        summed = []
        exchanges = sent.asked.exchanges
        for exchange, (gradient, handle) in zip(exchanges, sent.gradients, strict=True):
            assert exchange.rows is not None
            came = gradient if handle is None else _received(handle)
            if exchange.order is not None and exchange.counts is not None:
                total = came.new_zeros(len(exchange.rows), came.shape[1])
                came = total.index_add_(0, exchange.order, came)
            summed.append(came)
        return tuple(summed)

    def _send_back(self, group: Group, exchange: _Exchange, gradient: Tensor) -> int | None:
        if self.world.size == 1:
            return None
        name = f"gradients/{group.name}"
        if group.is_sharded:
            return begin_alltoall(gradient, exchange.found.counts, name)
        import horovod.torch as hvd

        assert exchange.rows is not None
        assert exchange.order is not None
        total = gradient.new_zeros(len(exchange.rows), group.width)
        total[exchange.order] = gradient
        handle: int = hvd.allreduce_async_(total, op=hvd.Sum, name=name)
        return handle

    def update(self, asked: Asked, gradients: Sequence[Tensor]) -> None:
        """Take an optimizer step on the rows of a batch, with what `gradients` returned."""
        self.step += 1
        for (_, kernel, exchange), gradient in zip(self._each(asked), gradients, strict=True):
            assert exchange.rows is not None
            kernel.update(exchange.rows, gradient, self.step)

    def square_norm(self, asked: Asked, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sums of squared gradients: of rows only this rank has, of those all have."""
        mine = torch.zeros((), device=self.device, dtype=torch.float64)
        common = torch.zeros_like(mine)
        for (group, kernel, exchange), gradient in zip(self._each(asked), gradients, strict=True):
            once = gradient
            if group.is_sharded and kernel.sums_duplicates:
                assert exchange.rows is not None
                order, distinct = pd.factorize(exchange.rows.cpu().numpy())
                once = gradient.new_zeros(len(distinct), group.width)
                once.index_add_(0, torch.from_numpy(order).to(self.device), gradient)
            (mine if group.is_sharded else common).add_(once.double().square().sum())
        return mine, common

    def rows_of(self, codes: Mapping[str, Tensor]) -> Rows:
        """Return the rows of a batch to look at; every rank must call this together."""
        # Horovod's own thread could not write into tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            rows = self.fetch(self.ask(self.find({n: c.cpu() for n, c in codes.items()})))
        assert isinstance(rows, Rows)
        return rows

    def _each(self, asked: Asked) -> list[tuple[Group, Kernel, _Exchange]]:
        return list(zip(self.groups, self.kernels, asked.exchanges, strict=True))

    def _to(self, given: Moved) -> Moved:
        """Return values or lists with their tensors on the device."""
        if self.device.type == "cpu":
            return given
        moved = {field.name: self._moved(getattr(given, field.name)) for field in fields(given)}
        return replace(given, **moved)

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device."""
        if self.device.type == "cpu":
            return tensor  # `to` would lend the interpreter to the reader, even to do nothing
        return tensor.to(self.device, non_blocking=True)


def replicated_bytes(distinct: int, union: int, width: int, ranks: int) -> int:
    """Return what a rank sends in a step for replicated tables of one width.

    distinct: rows that it looks up; union: those that any rank does. Row numbers go round a ring
    once, gradients are reduced over a ring.
    """
    return 4 * distinct * (ranks - 1) + 2 * 4 * union * width * (ranks - 1) // ranks


def _received(handle: int) -> Tensor:
    """Wait for an exchange and return what came, without how much came from where."""
    result = wait(handle)
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


# --------------------------------------------------------------------------------- the first values


def _fill(
    group: Group, weight: Tensor, rank: int, seed: int, deviation: float, block: int = 1 << 18
) -> None:
    """Write the first values of a rank's rows; those of MISSING and UNKNOWN are zero."""
    with torch.no_grad():
        for table, base in group.bases.items():
            ids = group.ids(table, rank)
            for start in range(0, len(ids), block):
                part = ids[start : start + block]
                values = initial_rows(table, part, group.width, seed, deviation)
                weight[base + start : base + start + len(part)] = torch.from_numpy(values)


def initial_rows(table: str, ids: Array, width: int, seed: int, deviation: float) -> Array:
    """Return the first values of rows, float64 [n, width]: uniform, with a standard deviation.

    A value is a function of (seed, table, row, column) alone, so each rank can make its own rows.
    An unknown value says nothing until training says otherwise: its row is zero.
    Source of the mixing function: Steele et al., "Fast splittable pseudorandom number generators",
    OOPSLA 2014 (SplitMix64).
    """
    key = np.uint64((zlib.crc32(table.encode()) << 32) ^ (seed & 0xFFFFFFFF))
    with np.errstate(over="ignore"):
        start = _mix(np.asarray(key))
        cells = ids.astype(np.uint64)[:, None] * np.uint64(width) + np.arange(
            width, dtype=np.uint64
        )
        mixed = _mix(start + (cells + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    share = (mixed >> np.uint64(11)).astype(np.float64) / 2**53
    values = (2 * share - 1) * deviation * np.sqrt(3.0)
    values[ids < FIRST_CODE] = 0.0
    return np.asarray(values)


def _mix(value: Array) -> Array:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
