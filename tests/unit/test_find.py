"""The distinct rows of a batch, and where its features find them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvdrec.embeddings.lookup import _LookedUp, find_rows
from hvdrec.embeddings.placement import arrange
from tests.small_model import SIZES, small_batch, small_config

KEYS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**40)), max_size=40)


def places_of(rows: NDArray[np.int64], distinct: int) -> list[list[int]]:
    """Return where each distinct row is looked up, in ascending order."""
    return [np.flatnonzero(rows == row).tolist() for row in range(distinct)]


def pieces(order: torch.Tensor, starts: torch.Tensor) -> list[list[int]]:
    ends = [*starts.tolist()[1:], len(order)]
    return [order[i:j].tolist() for i, j in zip(starts.tolist(), ends, strict=True)]


@given(KEYS, st.data())
def test_keys_are_listed_once_and_found_again(drawn: list[int], data: st.DataObject) -> None:
    keys = np.array([0, *drawn])
    if data.draw(st.booleans()):
        keys = (keys % 2**32).astype(np.uint32)
    found = _LookedUp.of(keys)
    assert found.distinct.tolist() == sorted(set(keys.tolist()))
    assert found.distinct[found.rows].tolist() == keys.tolist()
    start = data.draw(st.integers(1, len(keys)))
    stop = data.draw(st.integers(start, len(keys)))
    values = found.values(start, stop)
    assert values.places.tolist() == found.rows[start:stop].tolist()
    wanted = places_of(found.rows[start:stop], len(found.distinct))
    assert pieces(values.order, values.row_starts) == wanted


@given(KEYS, st.data())
def test_entries_of_lists_know_the_rows_that_hold_them(
    drawn: list[int], data: st.DataObject
) -> None:
    keys = np.array([0, *drawn])
    found = _LookedUp.of(keys)
    inner = data.draw(st.lists(st.integers(1, len(keys)), min_size=1, max_size=6).map(sorted))
    ends = np.array(inner)
    lists = found.lists(ends, root=False)
    lengths = np.diff(ends)
    assert lists.places.tolist() == found.rows[ends[0] : ends[-1]].tolist()
    assert lists.starts.tolist() == (ends[:-1] - ends[0]).tolist()
    assert lists.divisors.flatten().tolist() == np.maximum(lengths, 1).tolist()
    holders = np.repeat(np.arange(len(lengths)), lengths)
    wanted = places_of(found.rows[ends[0] : ends[-1]], len(found.distinct))
    held = pieces(lists.rows, lists.row_starts)
    assert held == [holders[places].tolist() for places in wanted]


def test_keys_of_tables_of_any_size_are_told_apart() -> None:
    config = small_config()
    for rows, kind in ((2**32 - 400, np.uint32), (2**33, np.int64)):
        sizes = SIZES | {"user_id": rows}
        (group,) = arrange(sizes, dict.fromkeys(sizes, 4), 8, "sharded")
        assert group.key_type is kind
        codes = [2**31 - 1, 2, 2**31 - 2, 2**31 - 1, 3]
        keys = [code % 8 * group.local_rows + code // 8 for code in codes]
        wanted = sorted({0, *keys})
        for dtype in (torch.int32, torch.int64):
            users = {"user_id": torch.tensor(codes, dtype=dtype)}
            (found,) = find_rows(config.schema, [group], users, travels=True)
            assert found.rows.tolist() == [key % group.local_rows for key in wanted]
            assert found.values[0].places.tolist() == [wanted.index(key) for key in keys]


def test_rows_are_sorted_by_the_rank_that_holds_them() -> None:
    config = small_config()
    (group,) = arrange(SIZES, dict.fromkeys(SIZES, 4), 3, "sharded")
    codes = small_batch(50).features
    (found,) = find_rows(config.schema, [group], codes, travels=True)
    keys = {0}
    for feature in config.schema.features:
        if feature.is_embedded:
            table = config.schema.vocabulary_of(feature)
            keys |= set(group.keys(table, codes[feature.name].numpy()).flatten().tolist())
    owners = [key // group.local_rows for key in sorted(keys)]
    assert found.counts.tolist() == [owners.count(rank) for rank in range(3)]
    assert found.rows.dtype is torch.int32
    assert found.rows.tolist() == [key % group.local_rows for key in sorted(keys)]
