"""Tests of the placement of rows on ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvdrec.embeddings.placement import TableGroup, bytes_per_rank, group_tables

GROUPS = st.builds(
    TableGroup,
    width=st.just(4),
    ranks=st.integers(1, 5),
    sizes=st.dictionaries(st.sampled_from("abc"), st.integers(2, 40), min_size=1),
)


@given(GROUPS)
def test_each_row_has_one_key_and_missing_shares_key_0(group: TableGroup) -> None:
    all_keys: set[int] = set()
    for table, rows in group.sizes.items():
        codes = np.arange(rows)
        keys = group.keys(table, codes)
        assert keys[0] == 0
        owner, index = np.divmod(keys[1:], group.local_rows)
        assert ((index >= 0) & (index < group.local_rows)).all()
        for code, rank, i in zip(codes[1:], owner, index, strict=True):
            assert rank == code % group.ranks
            assert group.local_ids(table, rank)[i - group.offsets[table]] == code
        all_keys |= set(keys[1:].tolist())
    assert len(all_keys) == sum(rows - 1 for rows in group.sizes.values())
    assert 0 not in all_keys


@given(GROUPS)
def test_ranks_hold_every_row_once(group: TableGroup) -> None:
    for table, rows in group.sizes.items():
        parts = [group.local_ids(table, rank) for rank in range(group.ranks)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(rows))


def test_only_large_tables_are_sharded() -> None:
    rows = {"user": 1000, "hour": 24, "wide": 1000}
    widths = {"user": 16, "hour": 16, "wide": 32}
    groups = group_tables(rows, widths, 4, "auto", shard_from_bytes=64_000)
    assert {g.name: dict(g.sizes) for g in groups} == {
        "replicated-16": {"hour": 24},
        "sharded-16": {"user": 1000},
        "sharded-32": {"wide": 1000},
    }
    assert [g.name for g in group_tables(rows, widths, 1, "sharded")] == [
        "replicated-16",
        "replicated-32",
    ]
    assert all(g.is_sharded for g in group_tables(rows, widths, 2, "sharded"))
    assert not any(g.is_sharded for g in group_tables(rows, widths, 2, "replicated"))


def test_bytes_per_rank_include_the_optimizer_state() -> None:
    groups = (TableGroup(16, 4, {"user": 1001}), TableGroup(8, 1, {"hour": 24}))
    # 1001 rows on 4 ranks are at most 251 per rank; a row of width 16 has one number of state.
    assert bytes_per_rank(groups, {16: 1, 8: 8}) == 4 * (251 * 17 + 24 * 16)
