"""The loader on real Parquet files through Petastorm."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.errors import UserError
from hvdrec.loader import Batch, ShardLoader, table_arrays
from hvdrec.order import Progress
from hvdrec.schema import Feature, Schema

SCHEMA = Schema(
    (
        Feature("user_id"),
        Feature("history", kind="sequence", max_length=3),
        Feature("age", kind="numeric", dtype="float"),
        Feature("item_id", side="item"),
        Feature("tags", side="item", kind="categorical_list", max_length=2),
    ),
    "user_id",
    "item_id",
)


def shard(first: int, rows: int) -> pa.Table:
    """Return rows numbered from `first`; everything in a row tells its number."""
    number = np.arange(first, first + rows)
    return pa.table(
        {
            "user_id": pa.array(number + 2, pa.int32()),
            "history": pa.array([[n + 2] * (n % 4 % 3) for n in number], pa.list_(pa.int32())),
            "age": pa.array(number / 8, pa.float32()),
            "item_id": pa.array(number + 3, pa.int32()),
            "tags": pa.array([[5, n + 2][: n % 3] for n in number], pa.list_(pa.int32())),
            "user_index": pa.array(number, pa.int64()),
            "item_index": pa.array(number * 2, pa.int64()),
            "label": pa.array(number % 2, pa.float32()),
            "weight": pa.array(number + 1, pa.float32()),
        }
    )


def write_shards(folder: Path, files: Sequence[int], group: int) -> int:
    """Write files with so many rows, in row groups of `group`; return all rows."""
    first = 0
    for number, rows in enumerate(files):
        pq.write_table(
            shard(first, rows), folder / f"shard-{number:05d}.parquet", row_group_size=group
        )
        first += rows
    return first


def read(folder: Path, world: int, batch: int, **more: object) -> list[list[Batch]]:
    epoch, past = more.pop("epoch", 0), more.pop("past", ())
    return [
        list(
            ShardLoader(
                folder,
                SCHEMA,
                batch_size=batch,
                rank=rank,
                world_size=world,
                **more,  # type: ignore[arg-type]
            ).epoch(epoch, past)  # type: ignore[arg-type]
        )
        for rank in range(world)
    ]


def numbers(batches: Sequence[Batch]) -> list[int]:
    return [n for batch in batches for n in batch.user_index[: batch.rows].tolist()]


@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=4),
    st.integers(1, 10),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 30),
)
@settings(max_examples=25, deadline=None)
def test_each_row_once_equal_steps_and_whole_rows(
    files: list[int], group: int, world: int, batch: int, window: int
) -> None:
    with TemporaryDirectory() as folder:
        total = write_shards(Path(folder), files, group)
        parts = read(Path(folder), world, batch, window_rows=window)
    assert sorted(n for part in parts for n in numbers(part)) == list(range(total))
    assert len({len(part) for part in parts}) == 1
    for one in (one for part in parts for one in part):
        n = one.user_index[: one.rows]
        assert torch.equal(one.features["user_id"][: one.rows], n + 2)
        assert torch.equal(one.features["age"][: one.rows], (n / 8).float())
        assert torch.equal(one.weight[: one.rows], (n + 1).float())
        assert torch.equal(one.item_index[: one.rows], n * 2)
        expected = [[0] * (3 - k % 4 % 3) + [k + 2] * (k % 4 % 3) for k in n.tolist()]
        assert one.features["history"][: one.rows].tolist() == expected
        expected = [([5, k + 2][: k % 3] + [0, 0])[:2] for k in n.tolist()]
        assert one.features["tags"][: one.rows].tolist() == expected
        assert one.features["history"].shape == (batch, 3)
        assert not one.weight[one.rows :].any()
        assert not one.features["history"][one.rows :].any()


def test_fewer_row_groups_than_ranks_and_empty_files(tmp_path: Path) -> None:
    write_shards(tmp_path, [0, 7, 0], 100)
    parts = read(tmp_path, 5, 2)
    assert sorted(n for part in parts for n in numbers(part)) == list(range(7))
    assert [len(part) for part in parts] == [1] * 5


def test_no_rows_at_all(tmp_path: Path) -> None:
    write_shards(tmp_path, [0], 100)
    assert read(tmp_path, 2, 4) == [[], []]


def test_same_order_again_and_another_in_the_next_epoch(tmp_path: Path) -> None:
    write_shards(tmp_path, [40, 40], 8)
    (first,), (again,), (other,) = (read(tmp_path, 1, 16, epoch=e, workers=3) for e in (0, 0, 1))
    assert numbers(first) == numbers(again)
    assert numbers(first) != numbers(other)
    assert numbers(first) != sorted(numbers(first))


def test_resumed_batches_are_those_that_were_left(tmp_path: Path) -> None:
    write_shards(tmp_path, [40, 40], 8)
    whole = read(tmp_path, 2, 5, window_rows=20)
    rest = read(tmp_path, 2, 5, window_rows=20, past=(Progress(2, 5, 3),))
    for part, left in zip(whole, rest, strict=True):
        assert len(left) == len(part) - 3
        for expected, got in zip(part[3:], left, strict=True):
            assert torch.equal(expected.user_index, got.user_index)
            assert torch.equal(expected.features["history"], got.features["history"])


def test_without_shuffle_in_the_order_of_the_files(tmp_path: Path) -> None:
    total = write_shards(tmp_path, [11, 0, 9], 4)
    parts = read(tmp_path, 3, 4, shuffle=False)
    assert [n for part in parts for n in numbers(part)] == list(range(total))


def test_stopping_early_leaves_no_thread(tmp_path: Path) -> None:
    write_shards(tmp_path, [60, 60], 4)
    before = threading.active_count()
    epoch = ShardLoader(
        tmp_path, SCHEMA, batch_size=2, rank=0, world_size=1, window_rows=4, prefetch=1
    ).epoch(0)
    next(iter(epoch))
    epoch.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_only_the_asked_columns_are_read(tmp_path: Path) -> None:
    write_shards(tmp_path, [5], 4)
    loader = ShardLoader(tmp_path, SCHEMA, batch_size=5, rank=0, world_size=1, columns=["item_id"])
    assert [set(batch.features) for batch in loader.epoch(0)] == [{"item_id"}]


def test_lists_of_slices_and_chunks() -> None:
    table = pa.concat_tables([shard(0, 10).slice(3, 4), shard(20, 5)])
    arrays = table_arrays(table, [SCHEMA["history"]])
    numbers = [3, 4, 5, 6, 20, 21, 22, 23, 24]
    expected = [[0] * (3 - k % 4 % 3) + [k + 2] * (k % 4 % 3) for k in numbers]
    assert arrays["history"].tolist() == expected
    assert arrays["history"].dtype == np.int64


def test_errors_name_file_and_column(tmp_path: Path) -> None:
    def load() -> None:
        ShardLoader(tmp_path, SCHEMA, batch_size=1, rank=0, world_size=1)

    with pytest.raises(UserError, match="holds no shards; run hvdrec prepare"):
        load()
    pq.write_table(shard(0, 3).drop(["tags"]), tmp_path / "shard-00000.parquet")
    with pytest.raises(
        UserError, match=r"shard-00000.parquet: column 'tags' is missing; .*\[user_id"
    ):
        load()
    (tmp_path / "shard-00000.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"shard-00000.parquet: no readable Parquet \("):
        load()


def test_an_error_while_reading_reaches_the_consumer(tmp_path: Path) -> None:
    write_shards(tmp_path, [50], 5)
    loader = ShardLoader(tmp_path, SCHEMA, batch_size=5, rank=0, world_size=1)
    file = tmp_path / "shard-00000.parquet"
    whole = bytearray(file.read_bytes())
    whole[4:1500] = b"\xff" * 1496  # pages, not the footer
    file.write_bytes(bytes(whole))
    with pytest.raises(Exception, match=r".+"):
        list(loader.epoch(0))
