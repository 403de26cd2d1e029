"""The distinct table rows of a batch, and where its features find them: plain arrays on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from hvdrec.errors import UserError
from hvdrec.models.tables import ATTENTION, Lists, Values
from hvdrec.parallel.layout import Group, sorted_by_owner
from hvdrec.schema import MISSING, UNKNOWN, Pooling, Schema

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
    keys: list[Array] = [np.zeros(1, np.int64)]
    single: list[str] = []
    masks: dict[str, Array] = {}
    for feature in schema.features:
        table = schema.vocabulary_of(feature) if feature.is_embedded else ""
        if feature.name not in arrays or table not in group.rows:
            continue
        code = arrays[feature.name]
        if code.size and (code.min() < 0 or code.max() >= group.rows[table]):
            worst = int(code.min() if code.min() < 0 else code.max())
            raise UserError(
                f"feature '{feature.name}': code {worst} is outside table '{table}' of "
                f"{group.rows[table]} rows; run hvdrec prepare again"
            )
        if pooling.get(feature.name) in ATTENTION:
            # Each place of the list is a value of its own: the model is given all of them.
            for column in code.T:
                single.append(feature.name)
                keys.insert(len(single), group.keys(table, column))
        elif feature.is_list:
            masks[feature.name] = code != MISSING
            keys.append(group.keys(table, code[masks[feature.name]]))
        else:
            single.append(feature.name)
            keys.insert(len(single), group.keys(table, code))
    places, distinct = pd.factorize(np.concatenate(keys))
    order, counts = sorted_by_owner(group, distinct)
    if group.is_sharded:
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        places, distinct = back[places], distinct[order] % group.local_rows
    travels_small = travels and group.local_rows < 2**31
    row_type = np.int32 if travels_small else np.int64
    split = np.split(places, np.cumsum([len(part) for part in keys])[:-1])[1:]
    count = len(next(iter(arrays.values()))) if arrays else 0
    grid = np.stack(split[: len(single)]) if single else np.empty((0, count), np.int64)
    places_of = cuts(count, parts)
    lists: list[dict[str, Lists]] = [{} for _ in places_of]
    for name, place in zip(masks, split[len(single) :], strict=True):
        ends = np.concatenate([[0], np.cumsum(masks[name].sum(1))])
        for part, (start, stop) in zip(lists, places_of, strict=True):
            part[name] = _lists(
                place[ends[start] : ends[stop]],
                ends[start : stop + 1],
                len(distinct),
                root=pooling.get(name) == "sqrt",
            )
    return Found(
        torch.from_numpy(distinct.astype(row_type)),
        torch.from_numpy(counts.astype(np.int32)),
        tuple(single),
        tuple(_values(grid[:, i:j].reshape(-1), len(distinct)) for i, j in places_of),
        tuple(lists),
    )


def cuts(rows: int, parts: int) -> list[tuple[int, int]]:
    """Return where each of equal parts of a batch begins and ends."""
    return [(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]


def _values(places: Array, rows: int) -> Values:
    """Return values in both directions: their table rows, and which of them each row has."""
    by_place = sparse.csc_matrix(
        sparse.csr_matrix(
            (np.empty(len(places), np.int8), places, np.arange(len(places) + 1)),
            shape=(len(places), rows),
        )
    )
    return Values(
        torch.from_numpy(places),
        torch.from_numpy(by_place.indices.astype(np.int64)),
        torch.from_numpy(by_place.indptr[:-1].astype(np.int64)),
    )


def _lists(places: Array, ends: Array, rows: int, *, root: bool) -> Lists:
    """Return lists in both directions: entries' places, and where each batch row's begin.

    root: whether sums are divided by the square root of the number of entries.
    """
    divisors = np.maximum(np.diff(ends), 1).astype(np.float64)
    starts = ends - ends[0]
    matrix = sparse.csr_matrix(
        (np.empty(len(places), np.int8), places, starts), shape=(len(ends) - 1, rows)
    )
    by_place = matrix.tocsc()
    return Lists(
        torch.from_numpy(places),
        torch.from_numpy(starts[:-1].astype(np.int64)),
        torch.from_numpy(np.sqrt(divisors) if root else divisors)[:, None],
        torch.from_numpy(by_place.indices.astype(np.int64)),
        torch.from_numpy(by_place.indptr[:-1].astype(np.int64)),
    )
