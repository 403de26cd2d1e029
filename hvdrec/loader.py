"""Shards to batches of tensors, through Petastorm, off the training thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from hvdrec.errors import UserError, choices
from hvdrec.order import Plan, Progress, plan_epoch
from hvdrec.row_groups import read_row_groups
from hvdrec.schema import KEY_COLUMNS, MISSING, Feature, Schema

Array = NDArray[Any]
Columns = dict[str, Array]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors; behind the first `rows` rows there is padding of weight zero.

    features: name -> int64 codes [N] or [N, max_length] (0 pads), or float32 [N]; user_index,
    item_index: int64 [N]; label, weight: float32 [N].
    """

    features: dict[str, torch.Tensor]
    user_index: torch.Tensor
    item_index: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    rows: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; from pinned memory the copy does not wait."""
        if device.type == "cpu":
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Any) -> Batch:
        return Batch(
            {name: change(tensor) for name, tensor in self.features.items()},
            change(self.user_index),
            change(self.item_index),
            change(self.label),
            change(self.weight),
            self.rows,
        )


class ShardLoader:
    """Delivers the rows of a split's shards in batches, each row once over all ranks of an epoch.

    A batch has exactly `batch_size` rows and all ranks take the same number of steps; a rank that
    has no rows left gets padding. See `order` for which rows come when. Raises UserError for a
    directory without shards, a shard that cannot be read, or one that lacks a column.
    """

    def __init__(
        self,
        directory: Path,
        schema: Schema,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
        shuffle: bool = True,
        window_rows: int = 262_144,
        workers: int = 2,
        prefetch: int = 4,
        columns: Collection[str] | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.waited_seconds = 0.0
        self._features = [f for f in schema.features if columns is None or f.name in columns]
        self._columns = [*(feature.name for feature in self._features), *KEY_COLUMNS]
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._shuffle, self._window_rows = shuffle, window_rows
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory
        self._groups, self._group_rows = _row_groups(directory, self._columns)
        self.rows = sum(self._group_rows)

    def plan(self, epoch: int, past: Sequence[Progress] = ()) -> Plan:
        """Return what this rank reads in an epoch, after what its past has delivered."""
        return plan_epoch(
            self._group_rows,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self.batch_size,
            window_rows=self._window_rows,
            seed=self._seed,
            epoch=epoch,
            shuffle=self._shuffle,
            past=past,
        )

    def steps(self, epoch: int, past: Sequence[Progress] = ()) -> int:
        """Return how many batches `epoch` will deliver, the same on all ranks."""
        return self.plan(epoch, past).steps

    def epoch(self, epoch: int, past: Sequence[Progress] = ()) -> Iterator[Batch]:
        """Deliver an epoch's batches, or what is left of it; they are made in another thread."""
        plan = self.plan(epoch, past)
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self._prefetch)
        stopped = threading.Event()

        def put(item: Batch | BaseException | None) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def produce() -> None:
            try:
                for batch in self._batches(plan, stopped):
                    if not put(batch.pin_memory() if self._pin_memory else batch):
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=produce, name="hvdrec-loader", daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.waited_seconds += time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _batches(self, plan: Plan, stopped: threading.Event) -> Iterator[Batch]:
        """Cut batches across windows, carrying the rows that are over into the next."""
        delivered = 0
        pending: list[Columns] = []
        held = 0
        for window in self._windows(plan, stopped):
            pending.append(window)
            held += _count(window)
            while held >= self.batch_size:
                whole = _joined(pending)
                # Slices share memory with the window: a batch costs one copy, made by torch.
                for start in range(0, held - self.batch_size + 1, self.batch_size):
                    yield self._batch(_sliced(whole, start, start + self.batch_size))
                    delivered += 1
                rest = held % self.batch_size
                pending, held = [_sliced(whole, held - rest, held)] if rest else [], rest
        if held:
            yield self._batch(_joined(pending))
            delivered += 1
        while delivered < plan.steps:
            yield self._batch(self._no_rows())
            delivered += 1

    def _windows(self, plan: Plan, stopped: threading.Event) -> Iterator[Columns]:
        """Yield the rows of each window in the order of delivery."""
        wanted = [self._groups[f.group] for window in plan.windows for f in window]
        if not wanted:
            return
        tables = read_row_groups(wanted, self._columns, self._workers, stopped)
        for number, window in enumerate(plan.windows):
            parts = []
            for fragment in window:
                table = next(tables)
                if fragment.rows < table.num_rows:
                    table = table.take(pa.array(fragment.positions()))
                parts.append(self._arrays(table))
            whole = _joined(parts)
            order = plan.order(number)[plan.skip if number == 0 else 0 :]
            yield (
                whole
                if not self._shuffle and len(order) == _count(whole)
                else {name: column[order] for name, column in whole.items()}
            )

    def _arrays(self, table: pa.Table) -> Columns:
        keys = {name: table[name].to_numpy() for name in KEY_COLUMNS}
        return {**table_arrays(table, self._features, np.int32), **keys}

    def _no_rows(self) -> Columns:
        fields = [(f.name, _encoded_type(f)) for f in self._features]
        fields += [("user_index", pa.int64()), ("item_index", pa.int64())]
        fields += [("label", pa.float32()), ("weight", pa.float32())]
        return self._arrays(pa.schema(fields).empty_table())

    def _batch(self, columns: Columns) -> Batch:
        rows = _count(columns)
        tensors = {}
        for name, column in columns.items():
            kind = np.int64 if column.dtype.kind == "i" else column.dtype
            full = np.zeros((self.batch_size, *column.shape[1:]), dtype=kind)
            full[:rows] = column
            tensors[name] = torch.from_numpy(full)
        features = {feature.name: tensors[feature.name] for feature in self._features}
        user, item, label, weight = (tensors[name] for name in KEY_COLUMNS)
        return Batch(features, user, item, label, weight, rows)


def table_arrays(
    table: pa.Table, features: Sequence[Feature], dtype: type[np.integer[Any]] = np.int64
) -> Columns:
    """Return encoded columns as arrays: codes [N] or [N, max_length], or float32 [N].

    Lists are padded with 0 on the right, sequences on the left, without a Python object per row.
    dtype: of the codes.
    """
    arrays: Columns = {}
    for feature in features:
        column = table[feature.name]
        if not feature.is_list:
            array = column.to_numpy()
            arrays[feature.name] = array.astype(dtype) if feature.is_embedded else array
            continue
        chunks = [_padded(chunk, feature, dtype) for chunk in column.chunks]
        empty = np.zeros((0, feature.max_length), dtype)
        arrays[feature.name] = (
            np.concatenate(chunks)
            if len(chunks) != 1 and chunks
            else (chunks[0] if chunks else empty)
        )
    return arrays


def _padded(chunk: pa.ListArray, feature: Feature, dtype: type[np.integer[Any]]) -> Array:
    offsets = chunk.offsets.to_numpy()
    values = chunk.values.to_numpy()[offsets[0] : offsets[-1]]
    lengths = np.diff(offsets)
    width = feature.max_length
    out = np.full(len(lengths) * width, MISSING, dtype=dtype)
    # Position of every value in the flat matrix: its row's start, plus its place in the row.
    row_start = np.arange(len(lengths)) * width
    if feature.kind == "sequence":
        row_start = row_start + width - lengths
    out[np.arange(len(values)) + np.repeat(row_start - (offsets[:-1] - offsets[0]), lengths)] = (
        values
    )
    return out.reshape(len(lengths), width)


def _row_groups(directory: Path, columns: Sequence[str]) -> tuple[list[tuple[str, int]], list[int]]:
    """Return (file, index) and rows of each row group of a directory's shards, in canonical order."""
    files = sorted(Path(directory).glob("*.parquet"))
    if not files:
        raise UserError(f"{directory}: holds no shards; run hvdrec prepare")
    groups: list[tuple[str, int]] = []
    rows: list[int] = []
    for file in files:
        try:
            metadata = pq.read_metadata(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{file}: no readable Parquet ({error}); run hvdrec prepare again"
            ) from None
        found = metadata.schema.to_arrow_schema().names
        for column in columns:
            if column not in found:
                raise UserError(
                    f"{file}: column '{column}' is missing; the shard has {choices(found)}; "
                    "run hvdrec prepare again"
                )
        for index in range(metadata.num_row_groups):
            groups.append((str(file.resolve()), index))
            rows.append(metadata.row_group(index).num_rows)
    return groups, rows


def _encoded_type(feature: Feature) -> pa.DataType:
    scalar = pa.int32() if feature.is_embedded else pa.float32()
    return pa.list_(scalar) if feature.is_list else scalar


def _count(columns: Mapping[str, Array]) -> int:
    return len(columns["weight"])


def _joined(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _sliced(columns: Columns, start: int, stop: int) -> Columns:
    return {name: column[start:stop] for name, column in columns.items()}
