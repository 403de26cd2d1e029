"""The distinct table rows of a batch, and where its features find them: plain arrays on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config.schema import MISSING, SIDES, UNKNOWN, Pooling, Schema
from hvdrec.embeddings.placement import Group
from hvdrec.errors import UserError
from hvdrec.models.embedding import ATTENTION, Lists, Values

Array = NDArray[Any]


@dataclass(frozen=True)
class Found:
    """A batch's distinct rows of one group, and where its features find them.

    rows: int64 [R], or int32 where they are to travel and fit: places in the arrays of the ranks
    that hold them, rank by rank; counts: int32 [ranks], how many each rank has. The first is the
    row of MISSING. single, values, lists: as in models.tables.Block, for each part of the batch.
    """

    rows: Tensor
    counts: Tensor
    single: tuple[str, ...]
    values: tuple[Values, ...]
    lists: tuple[Mapping[str, Lists], ...]


def find_rows(
    schema: Schema,
    groups: Sequence[Group],
    codes: Mapping[str, Tensor],
    *,
    parts: int = 1,
    unknown_rate: float = 0.0,
    random: np.random.Generator | None = None,
    travels: bool = False,
    pooling: Mapping[str, Pooling] | None = None,
) -> tuple[Found, ...]:
    """List the distinct rows of a batch on the CPU; no rank waits for another here.

    codes: name -> int64 [N] or [N, L], of all or some embedded features; parts: into how many
    equal parts the batch will be cut; unknown_rate: the share of known single values that are
    replaced by UNKNOWN, drawn from `random`; travels: whether there are other ranks; pooling:
    of list features, as in config.Model. Raises UserError for a code that its table has no row for.
    """
    arrays = {
        feature.name: codes[feature.name].numpy()
        for feature in schema.features
        if feature.is_embedded and feature.name in codes
    }
    if unknown_rate and random is not None:
        for feature in schema.features:
            if feature.name in arrays and feature.kind == "categorical":
                code = arrays[feature.name]
                replaced = (random.random(code.shape) < unknown_rate) & (code != MISSING)
                arrays[feature.name] = np.where(replaced, UNKNOWN, code)
    how = pooling or {}
    return tuple(_find(schema, group, arrays, parts, how, travels=travels) for group in groups)


def _find(
    schema: Schema,
    group: Group,
    arrays: Mapping[str, Array],
    parts: int,
    pooling: Mapping[str, Pooling],
    *,
    travels: bool,
) -> Found:
    of_single: list[Array] = []
    of_lists: list[Array] = []
    single: list[str] = []
    masks: dict[str, Array] = {}
    # Side by side in the order in which they are joined to a model's inputs.
    sides = (feature for side in SIDES for feature in schema.side(side))
    for feature in sides:
        table = schema.vocabulary_of(feature) if feature.is_embedded else ""
        if feature.name not in arrays or table not in group.rows:
            continue
        code = arrays[feature.name]
        # Without their sign, numbers below zero are the largest.
        if code.size and code.astype(np.uint64).max() >= group.rows[table]:
            worst = int(code.min() if code.min() < 0 else code.max())
            raise UserError(
                f"feature '{feature.name}': code {worst} is outside table '{table}' of "
                f"{group.rows[table]} rows; run hvdrec prepare again"
            )
        if pooling.get(feature.name) in ATTENTION:
            # Each place of the list is a value of its own: the model is given all of them.
            for column in code.T:
                single.append(feature.name)
                of_single.append(group.keys(table, column))
        elif feature.is_list:
            masks[feature.name] = code != MISSING
            of_lists.append(group.keys(table, code[masks[feature.name]]))
        else:
            single.append(feature.name)
            of_single.append(group.keys(table, code))
    count = len(next(iter(arrays.values()))) if arrays else 0
    width, first = len(of_single), 1 + count * len(of_single)
    keys = np.empty(first + sum(map(len, of_lists)), group.key_type)
    keys[0] = 0  # that of MISSING, which each batch has
    side_by_side = keys[1:first].reshape(count, width)
    for column, of_feature in enumerate(of_single):
        side_by_side[:, column] = of_feature
    np.concatenate([keys[:0], *of_lists], out=keys[first:], casting="unsafe")
    looked_up = _LookedUp.of(keys)
    distinct = looked_up.distinct
    counts = np.array([len(distinct)])
    if group.is_sharded:
        ends = np.searchsorted(distinct, group.local_rows * np.arange(1, group.ranks + 1))
        distinct, counts = distinct % group.local_rows, np.diff(ends, prepend=0)
    row_type = np.int32 if travels and group.local_rows < 2**31 else np.int64
    cut = cuts(count, parts)
    lists: list[dict[str, Lists]] = [{} for _ in cut]
    for name, mask in masks.items():
        ends = first + np.concatenate([[0], np.cumsum(mask.sum(1))])
        first = ends[-1]
        for part, (start, stop) in zip(lists, cut, strict=True):
            part[name] = looked_up.lists(ends[start : stop + 1], root=pooling.get(name) == "sqrt")
    return Found(
        torch.from_numpy(distinct.astype(row_type)),
        torch.from_numpy(counts.astype(np.int32)),
        tuple(single),
        tuple(looked_up.values(1 + i * width, 1 + j * width) for i, j in cut),
        tuple(lists),
    )


def cuts(rows: int, parts: int) -> list[tuple[int, int]]:
    """Return where each of equal parts of a batch begins and ends."""
    return [(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]


@dataclass(frozen=True)
class _LookedUp:
    """The keys at E places: each once, and where.

    The first key is the lowest. distinct: [R] of the keys' type, ascending; rows: int32 [E], the
    place of each key among them; order: int32 [E], the places sorted by key, those of one key in
    their order; starts: int32 [R], where those of each begin.
    """

    distinct: Array
    rows: Array
    order: Array
    starts: Array

    @classmethod
    def of(cls, keys: Array) -> _LookedUp:
        """List keys, uint32 or int64 [E], from 0 on; the first is 0."""
        order = _sorted_places(keys)
        in_order = np.take(keys, order)
        is_other = in_order[1:] != in_order[:-1]
        starts = np.zeros(1 + np.count_nonzero(is_other), np.int32)
        starts[1:] = np.flatnonzero(is_other)
        starts[1:] += 1
        rows = np.zeros(len(keys), np.int32)
        rows[order[1:]] = np.cumsum(is_other, dtype=np.int32)
        return cls(np.take(in_order, starts), rows, order.astype(np.int32), starts)

    def values(self, start: int, stop: int) -> Values:
        """Return the places from `start` to `stop` in both directions; the first is never asked."""
        order, starts = self._sorted(start, stop)
        rows = self.rows[start:stop]
        return Values(torch.from_numpy(rows), torch.from_numpy(order), torch.from_numpy(starts))

    def lists(self, ends: Array, *, root: bool) -> Lists:
        """Return lists in both directions: those of N rows, between each two of `ends` [N + 1].

        root: whether sums are divided by the square root of the number of entries.
        """
        lengths = np.diff(ends)
        divisors = np.maximum(lengths, 1).astype(np.float64)
        order, starts = self._sorted(ends[0], ends[-1])
        return Lists(
            torch.from_numpy(self.rows[ends[0] : ends[-1]]),
            torch.from_numpy((ends - ends[0])[:-1].astype(np.int32)),
            torch.from_numpy(np.sqrt(divisors) if root else divisors)[:, None],
            torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order]),
            torch.from_numpy(starts),
        )

    def _sorted(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return `order` and `starts` of the places from `start` to `stop`, counted from there."""
        if (start, stop) == (1, len(self.order)):
            return self.order[1:] - np.int32(1), np.maximum(self.starts - np.int32(1), np.int32(0))
        order = self.order[(self.order >= start) & (self.order < stop)]
        order -= np.int32(start)
        times = np.bincount(self.rows[start:stop], minlength=len(self.distinct))
        return order, (np.cumsum(times) - times).astype(np.int32)


def _sorted_places(keys: Array) -> Array:
    """Return the stable order that sorts keys, int64 [E]."""
    # numpy sorts numbers of 16 bits by radix, on any CPU faster than it sorts larger ones.
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(16, 8 * keys.itemsize, 16):
        digits = (keys >> keys.dtype.type(shift)).astype(np.uint16)
        if digits.any():
            order = np.take(order, np.argsort(np.take(digits, order), kind="stable"))
    return order
