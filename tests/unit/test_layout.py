"""Which rank holds which row."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvdrec.embeddings.placement import Group, arrange, bytes_of_rows

GROUPS = st.builds(
    Group,
    width=st.just(4),
    ranks=st.integers(1, 5),
    rows=st.dictionaries(st.sampled_from("abc"), st.integers(2, 40), min_size=1),
)


@given(GROUPS)
def test_every_row_has_one_home_and_missing_has_one_for_all(group: Group) -> None:
    homes: set[int] = set()
    for table, rows in group.rows.items():
        codes = np.arange(rows)
        keys = group.keys(table, codes)
        assert keys[0] == 0
        owner, place = np.divmod(keys[1:], group.local_rows)
        assert ((place >= 0) & (place < group.local_rows)).all()
        for code, rank, where in zip(codes[1:], owner, place, strict=True):
            assert rank == code % group.ranks
            assert group.ids(table, rank)[where - group.bases[table]] == code
        homes |= set(keys[1:].tolist())
    assert len(homes) == sum(rows - 1 for rows in group.rows.values())
    assert 0 not in homes


@given(GROUPS)
def test_the_ranks_parts_make_the_whole(group: Group) -> None:
    for table, rows in group.rows.items():
        parts = [group.ids(table, rank) for rank in range(group.ranks)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(rows))


def test_large_tables_are_sharded_and_small_ones_are_not() -> None:
    rows = {"user": 1000, "hour": 24, "wide": 1000}
    widths = {"user": 16, "hour": 16, "wide": 32}
    groups = arrange(rows, widths, 4, "auto", shard_from_bytes=64_000)
    assert {g.name: dict(g.rows) for g in groups} == {
        "replicated-16": {"hour": 24},
        "sharded-16": {"user": 1000},
        "sharded-32": {"wide": 1000},
    }
    assert [g.name for g in arrange(rows, widths, 1, "sharded")] == [
        "replicated-16",
        "replicated-32",
    ]
    assert all(g.is_sharded for g in arrange(rows, widths, 2, "sharded"))
    assert not any(g.is_sharded for g in arrange(rows, widths, 2, "replicated"))


def test_bytes_of_a_rank() -> None:
    groups = (Group(16, 4, {"user": 1001}), Group(8, 1, {"hour": 24}))
    # 1001 rows over 4 ranks are at most 251 each; one number of state beside a row of 16.
    assert bytes_of_rows(groups, {16: 1, 8: 8}) == 4 * (251 * 17 + 24 * 16)
