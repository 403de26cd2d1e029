"""Find the unique embedding rows that a batch needs and where its features use them, on the CPU.

A *code* is the row number of a value in the embedding table of its feature. The tables of one width
and placement form a *group*, whose rows are stored in one array. The *key* of a row is its position
in the concatenation of all ranks' arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config.schema import MISSING, SIDES, UNKNOWN, Feature, Pooling, Schema
from hvdrec.embeddings.placement import TableGroup
from hvdrec.errors import UserError
from hvdrec.models.embedding import ATTENTION, ListIndices, SingleIndices

Array = NDArray[Any]


@dataclass(frozen=True)
class GroupLookup:
    """The unique rows of one group of embedding tables that a batch needs, and their uses.

    Attributes:
        rows: Index of each row in the array of the rank that holds it, sorted by this rank [unique
            rows]. The dtype is int64, or int32 if the indices are sent to other ranks and fit into
            int32. The first entry always names the row of zeros, which stands for missing values.
        counts: Number of these rows on each rank, int32 [ranks].
        single: The names of the features that have one value per batch row; see
            `models.embedding.RowBlock`.
        values: For each part of the batch (such as its users), the positions in `rows` of
            the values of these features.
        lists: For each part of the batch, pooled list feature -> the positions in `rows` of the
            entries of its lists.
    """

    rows: Tensor
    counts: Tensor
    single: tuple[str, ...]
    values: tuple[SingleIndices, ...]
    lists: tuple[Mapping[str, ListIndices], ...]


def drop_to_unknown(
    schema: Schema, codes: Mapping[str, Tensor], rate: float, random: np.random.Generator
) -> dict[str, Tensor]:
    """Replace a random share of the values of categorical features by code UNKNOWN.

    Lists and missing values are not changed. `codes` maps feature names to int64 codes, [rows] or
    [rows, list length]. `rate` is the share to replace, from 0 to 1.
    """
    dropped = dict(codes)
    for feature in schema.features:
        if feature.name in codes and feature.has_vocabulary and not feature.is_list:
            code = codes[feature.name].numpy()
            mask = (random.random(code.shape) < rate) & (code != MISSING)
            dropped[feature.name] = torch.from_numpy(np.where(mask, UNKNOWN, code))
    return dropped


def look_up(
    schema: Schema,
    groups: Sequence[TableGroup],
    codes: Mapping[str, Tensor],
    pooling: Mapping[str, Pooling],
    *,
    parts: int = 1,
    is_sent: bool = False,
) -> tuple[GroupLookup, ...]:
    """Find, without communication, the unique embedding rows that a batch needs from each group.

    Args:
        schema: The features.
        groups: The embedding tables, placed on ranks.
        codes: Feature name -> int64 codes, [rows] or [rows, list length], for some or all of the
            embedded features.
        pooling: How lists are pooled, by feature name, as in ``[model.pooling]``.
        parts: The number of equal parts in which the model processes the batch.
        is_sent: Whether the row indices will be sent to other ranks.

    Raises:
        UserError: A code is not below the number of rows of its table.
    """
    embedded = [f for f in schema.features if f.is_embedded and f.name in codes]
    arrays = {feature.name: codes[feature.name].numpy() for feature in embedded}
    return tuple(_look_up(schema, group, arrays, pooling, parts, is_sent) for group in groups)


def part_bounds(rows: int, parts: int) -> list[tuple[int, int]]:
    """Cut a batch of `rows` rows into equal parts and return the start and end of each."""
    return [(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]


@dataclass
class _GroupKeys:
    """The keys of a batch's codes in one group, collected feature by feature."""

    single: list[str] = field(default_factory=list)
    """Name of the feature of each column."""
    columns: list[Array] = field(default_factory=list)
    """Keys of each column [rows]. A list that the model pools by attention has a column for each
    list position."""
    list_masks: dict[str, Array] = field(default_factory=dict)
    """Name of each list feature that the model does not pool by attention -> True for each position
    that has an entry, bool [rows, list length]."""
    list_keys: list[Array] = field(default_factory=list)
    """For each list feature in `list_masks`, the keys of its entries, row after row."""

    def add(
        self, group: TableGroup, table: str, feature: Feature, code: Array, pooling: Pooling | None
    ) -> None:
        """Add the keys of a feature's codes, [rows] or [rows, list length]."""
        if pooling in ATTENTION:
            # The model pools these lists itself: each entry is looked up like a single value.
            self.single += [feature.name] * code.shape[1]
            self.columns += list(group.keys(table, code).T)
        elif feature.is_list:
            mask = self.list_masks[feature.name] = code != MISSING
            self.list_keys.append(group.keys(table, code[mask]))
        else:
            self.single.append(feature.name)
            self.columns.append(group.keys(table, code))

    def joined(self, rows: int, dtype: type[np.uint32] | type[np.int64]) -> tuple[Array, int]:
        """Join all keys into one array; return it and the index at which the keys of lists begin.

        The order is: key 0 (missing), the keys of the columns, batch row after batch row, and the
        keys of the lists.
        """
        width = len(self.columns)
        first = 1 + rows * width
        keys = np.empty(first + sum(map(len, self.list_keys)), dtype)
        keys[0] = 0
        side_by_side = keys[1:first].reshape(rows, width)
        for index, column in enumerate(self.columns):
            side_by_side[:, index] = column
        np.concatenate([keys[:0], *self.list_keys], out=keys[first:], casting="unsafe")
        return keys, first


def _look_up(
    schema: Schema,
    group: TableGroup,
    codes: Mapping[str, Array],
    pooling: Mapping[str, Pooling],
    parts: int,
    is_sent: bool,
) -> GroupLookup:
    group_keys = _GroupKeys()
    for feature, table in _features_of(schema, group, codes):
        code = codes[feature.name]
        _check_codes(feature, table, code, group.sizes[table])
        group_keys.add(group, table, feature, code, pooling.get(feature.name))
    count = len(next(iter(codes.values()))) if codes else 0
    keys, first = group_keys.joined(count, group.key_type)
    width = len(group_keys.columns)
    unique_keys = _UniqueKeys.of(keys)
    rows = unique_keys.unique
    counts = np.array([len(rows)])
    if group.is_sharded:
        ends = np.searchsorted(rows, group.local_rows * np.arange(1, group.ranks + 1))
        rows, counts = rows % group.local_rows, np.diff(ends, prepend=0)
    row_type = np.int32 if is_sent and group.local_rows < 2**31 else np.int64
    bounds = part_bounds(count, parts)
    lists: list[dict[str, ListIndices]] = [{} for _ in bounds]
    for name, mask in group_keys.list_masks.items():
        ends = first + np.concatenate([[0], np.cumsum(mask.sum(1))])
        first = ends[-1]
        for part, (start, stop) in zip(lists, bounds, strict=True):
            part[name] = unique_keys.lists(ends[start : stop + 1], root=pooling.get(name) == "sqrt")
    return GroupLookup(
        torch.from_numpy(rows.astype(row_type)),
        torch.from_numpy(counts.astype(np.int32)),
        tuple(group_keys.single),
        tuple(unique_keys.values(1 + i * width, 1 + j * width) for i, j in bounds),
        tuple(lists),
    )


def _features_of(
    schema: Schema, group: TableGroup, codes: Mapping[str, Array]
) -> Iterator[tuple[Feature, str]]:
    """Yield each feature of a group and its table, in the order of the model's inputs."""
    for side in SIDES:
        for feature in schema.side(side):
            if feature.name in codes and schema.vocabulary_of(feature) in group.sizes:
                yield feature, schema.vocabulary_of(feature)


def _check_codes(feature: Feature, table: str, code: Array, size: int) -> None:
    # Negative codes become huge unsigned integers, so the comparison finds them, too.
    if code.size and code.astype(np.uint64).max() >= size:
        worst = int(code.min() if code.min() < 0 else code.max())
        raise UserError(
            f"feature '{feature.name}': code {worst} is outside table '{table}' of {size} rows; "
            "run hvdrec prepare with --overwrite",
            field=feature.name,
            value=worst,
        )


@dataclass(frozen=True)
class _UniqueKeys:
    """An array of keys, and its unique values.

    Attributes:
        unique: The unique keys in ascending order, with the dtype of the keys [unique].
        rows: Index of each key in `unique`, int32 [keys].
        order: Indices that sort the keys; equal keys keep their order; int32 [keys].
        starts: Position in `order` at which the indices of each unique key begin, int32 [unique].
    """

    unique: Array
    rows: Array
    order: Array
    starts: Array

    @classmethod
    def of(cls, keys: Array) -> _UniqueKeys:
        """Find the unique values of keys, uint32 or int64; the first key must be 0, the least."""
        order = _stable_argsort(keys)
        in_order = np.take(keys, order)
        is_other = in_order[1:] != in_order[:-1]
        starts = np.zeros(1 + np.count_nonzero(is_other), np.int32)
        starts[1:] = np.flatnonzero(is_other)
        starts[1:] += 1
        rows = np.zeros(len(keys), np.int32)
        rows[order[1:]] = np.cumsum(is_other, dtype=np.int32)
        return cls(np.take(in_order, starts), rows, order.astype(np.int32), starts)

    def values(self, start: int, stop: int) -> SingleIndices:
        """Return the lookup indices for keys `start` to `stop` (exclusive); `start` is above 0."""
        order, starts = self._sorted(start, stop)
        rows = self.rows[start:stop]
        return SingleIndices(
            torch.from_numpy(rows), torch.from_numpy(order), torch.from_numpy(starts)
        )

    def lists(self, ends: Array, *, root: bool) -> ListIndices:
        """Return the lookup indices for lists; list i has the keys ``ends[i]:ends[i + 1]``.

        Pooling divides the sum over a list by its length, or with `root` by the square root of its
        length.
        """
        lengths = np.diff(ends)
        divisors = np.maximum(lengths, 1).astype(np.float64)
        order, starts = self._sorted(ends[0], ends[-1])
        return ListIndices(
            torch.from_numpy(self.rows[ends[0] : ends[-1]]),
            torch.from_numpy((ends - ends[0])[:-1].astype(np.int32)),
            torch.from_numpy(np.sqrt(divisors) if root else divisors)[:, None],
            torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order]),
            torch.from_numpy(starts),
        )

    def _sorted(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return `order` and `starts` for keys `start` to `stop` only, counted from `start`."""
        if (start, stop) == (1, len(self.order)):
            return self.order[1:] - np.int32(1), np.maximum(self.starts - np.int32(1), np.int32(0))
        order = self.order[(self.order >= start) & (self.order < stop)]
        order -= np.int32(start)
        times = np.bincount(self.rows[start:stop], minlength=len(self.unique))
        return order, (np.cumsum(times) - times).astype(np.int32)


def _stable_argsort(keys: Array) -> Array:
    """Return the indices that sort keys, int64 [keys]; equal keys keep their order."""
    # Sort by 16 bits at a time: for 16-bit integers numpy uses radix sort, which is faster than its
    # other sorts on any CPU.
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(16, 8 * keys.itemsize, 16):
        digits = (keys >> keys.dtype.type(shift)).astype(np.uint16)
        if digits.any():
            order = np.take(order, np.argsort(np.take(digits, order), kind="stable"))
    return order
