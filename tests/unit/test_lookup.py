"""Tests of the unique rows of a batch and of the lookup indices."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvdrec.embeddings.lookup import _UniqueKeys, look_up
from hvdrec.embeddings.placement import group_tables
from tests.small_model import SIZES, small_batch, small_config

KEYS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**40)), max_size=40)


def indices_of(rows: NDArray[np.int64], unique: int) -> list[list[int]]:
    """Return the indices at which each unique row is looked up, in ascending order."""
    return [np.flatnonzero(rows == row).tolist() for row in range(unique)]


def split(order: torch.Tensor, starts: torch.Tensor) -> list[list[int]]:
    ends = [*starts.tolist()[1:], len(order)]
    return [order[i:j].tolist() for i, j in zip(starts.tolist(), ends, strict=True)]


@given(KEYS, st.data())
def test_unique_keys_reproduce_the_keys(drawn: list[int], data: st.DataObject) -> None:
    keys = np.array([0, *drawn])
    if data.draw(st.booleans()):
        keys = (keys % 2**32).astype(np.uint32)
    unique_keys = _UniqueKeys.of(keys)
    assert unique_keys.unique.tolist() == sorted(set(keys.tolist()))
    assert unique_keys.unique[unique_keys.rows].tolist() == keys.tolist()
    start = data.draw(st.integers(1, len(keys)))
    stop = data.draw(st.integers(start, len(keys)))
    values = unique_keys.values(start, stop)
    assert values.indices.tolist() == unique_keys.rows[start:stop].tolist()
    expected = indices_of(unique_keys.rows[start:stop], len(unique_keys.unique))
    assert split(values.order, values.row_offsets) == expected


@given(KEYS, st.data())
def test_list_entries_refer_to_their_rows(drawn: list[int], data: st.DataObject) -> None:
    keys = np.array([0, *drawn])
    unique_keys = _UniqueKeys.of(keys)
    inner = data.draw(st.lists(st.integers(1, len(keys)), min_size=1, max_size=6).map(sorted))
    ends = np.array(inner)
    lists = unique_keys.lists(ends, root=False)
    lengths = np.diff(ends)
    assert lists.indices.tolist() == unique_keys.rows[ends[0] : ends[-1]].tolist()
    assert lists.offsets.tolist() == (ends[:-1] - ends[0]).tolist()
    assert lists.divisors.flatten().tolist() == np.maximum(lengths, 1).tolist()
    holders = np.repeat(np.arange(len(lengths)), lengths)
    expected = indices_of(unique_keys.rows[ends[0] : ends[-1]], len(unique_keys.unique))
    held = split(lists.batch_rows, lists.row_offsets)
    assert held == [holders[places].tolist() for places in expected]


def test_keys_of_large_tables_do_not_collide() -> None:
    config = small_config()
    for rows, key_type in ((2**32 - 400, np.uint32), (2**33, np.int64)):
        sizes = SIZES | {"user_id": rows}
        (group,) = group_tables(sizes, dict.fromkeys(sizes, 4), 8, "sharded")
        assert group.key_type is key_type
        codes = [2**31 - 1, 2, 2**31 - 2, 2**31 - 1, 3]
        keys = [code % 8 * group.local_rows + code // 8 for code in codes]
        expected = sorted({0, *keys})
        for dtype in (torch.int32, torch.int64):
            users = {"user_id": torch.tensor(codes, dtype=dtype)}
            (lookup,) = look_up(config.schema, [group], users, {}, is_sent=True)
            assert lookup.rows.tolist() == [key % group.local_rows for key in expected]
            assert lookup.values[0].indices.tolist() == [expected.index(key) for key in keys]


def test_rows_are_sorted_by_owner_rank() -> None:
    config = small_config()
    (group,) = group_tables(SIZES, dict.fromkeys(SIZES, 4), 3, "sharded")
    codes = small_batch(50).features
    (lookup,) = look_up(config.schema, [group], codes, {}, is_sent=True)
    keys = {0}
    for feature in config.schema.features:
        if feature.is_embedded:
            table = config.schema.vocabulary_of(feature)
            keys |= set(group.keys(table, codes[feature.name].numpy()).flatten().tolist())
    owners = [key // group.local_rows for key in sorted(keys)]
    assert lookup.counts.tolist() == [owners.count(rank) for rank in range(3)]
    assert lookup.rows.dtype is torch.int32
    assert lookup.rows.tolist() == [key % group.local_rows for key in sorted(keys)]
