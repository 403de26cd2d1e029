"""The loader on real Parquet files, read through Petastorm."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.config.data_sections import Loader
from hvdrec.config.schema import Feature, Schema
from hvdrec.data import loader as loader_module
from hvdrec.data.batch import Batch
from hvdrec.data.collate import table_arrays
from hvdrec.data.loader import ShardLoader
from hvdrec.data.sampler import Progress
from hvdrec.errors import UserError

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
    """Return rows numbered from `first`; every column is a function of the number."""
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
    """Write one shard per number of rows, in row groups of `group`; return the total."""
    first = 0
    for number, rows in enumerate(files):
        pq.write_table(
            shard(first, rows), folder / f"shard-{number:05d}.parquet", row_group_size=group
        )
        first += rows
    return first


def read(
    folder: Path,
    world: int,
    batch: int,
    *,
    epoch: int = 0,
    past: Sequence[Progress] = (),
    options: Loader = Loader(),
    **more: Any,
) -> list[list[Batch]]:
    """Return the batches of each rank."""
    loaders = [
        ShardLoader(folder, SCHEMA, options, batch_size=batch, rank=rank, world_size=world, **more)
        for rank in range(world)
    ]
    return [list(loader.epoch(epoch, past)) for loader in loaders]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    keys = ("user_index", "item_index", "label", "weight")
    return {**batch.features, **{name: getattr(batch, name) for name in keys}}


def numbers(batches: Iterable[Batch]) -> list[int]:
    return [n for batch in batches for n in batch.user_index[: batch.rows].tolist()]


@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=4),
    st.integers(1, 10),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 30),
)
@settings(max_examples=25, deadline=None)
def test_each_row_is_delivered_once_intact_and_in_equal_steps(
    files: list[int], group: int, world: int, batch: int, window: int
) -> None:
    with TemporaryDirectory() as folder:
        total = write_shards(Path(folder), files, group)
        parts = read(Path(folder), world, batch, options=Loader(shuffle_rows=window))
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
        expected = [[*[5, k + 2][: k % 3], 0, 0][:2] for k in n.tolist()]
        assert one.features["tags"][: one.rows].tolist() == expected
        assert one.features["history"].shape == (batch, 3)
        assert not one.weight[one.rows :].any()
        assert not one.features["history"][one.rows :].any()


def test_task_labels_form_a_matrix_and_unknown_labels_are_nan(tmp_path: Path) -> None:
    write_shards(tmp_path, [5], 100)
    table = pq.read_table(tmp_path / "shard-00000.parquet")
    table = table.append_column("label_a", pa.array([1, 0, math.nan, 1, 0], pa.float32()))
    table = table.append_column("label_b", pa.array([math.nan, 1, 1, 0, 0], pa.float32()))
    pq.write_table(table, tmp_path / "shard-00000.parquet", row_group_size=2)
    ((first, last),) = read(tmp_path, 1, 3, shuffle=False, tasks=["label_b", "label_a"])
    assert first.tasks is not None and last.tasks is not None
    assert first.tasks.dtype == torch.float32
    np.testing.assert_array_equal(first.tasks, [[math.nan, 1], [1, 0], [1, math.nan]])
    # The last row is padding.
    np.testing.assert_array_equal(last.tasks, [[0, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(first.part(1, 3).tasks, [[1, 0], [1, math.nan]])
    ((plain, _),) = read(tmp_path, 1, 3, shuffle=False)
    assert plain.tasks is None
    with pytest.raises(UserError, match="label_c"):
        read(tmp_path, 1, 3, tasks=["label_c"])


def test_fewer_row_groups_than_ranks_and_empty_files_are_read(tmp_path: Path) -> None:
    write_shards(tmp_path, [0, 7, 0], 100)
    parts = read(tmp_path, 5, 2)
    assert sorted(n for part in parts for n in numbers(part)) == list(range(7))
    assert [len(part) for part in parts] == [1] * 5


@pytest.mark.parametrize("world", [1, 3])
def test_empty_row_groups_are_skipped(tmp_path: Path, world: int) -> None:
    with pq.ParquetWriter(tmp_path / "shard-00000.parquet", shard(0, 0).schema) as writer:
        for first, rows in ((0, 0), (0, 4), (4, 0), (4, 3), (7, 0)):
            writer.write_table(shard(first, rows))
    assert pq.read_metadata(tmp_path / "shard-00000.parquet").num_row_groups == 5
    parts = read(tmp_path, world, 2)
    assert sorted(n for part in parts for n in numbers(part)) == list(range(7))


def test_a_rank_without_rows_starts_no_reader_and_pads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, [2], 100)
    monkeypatch.setattr(loader_module, "read_row_groups", lambda *_: pytest.fail("started"))
    (batch,) = ShardLoader(tmp_path, SCHEMA, batch_size=4, rank=2, world_size=3).epoch(0)
    assert batch.rows == 0
    assert batch.features["history"].shape == (4, 3)
    assert not any(tensor.any() for tensor in tensors(batch).values())


def test_padding_is_zero_in_every_column(tmp_path: Path) -> None:
    write_shards(tmp_path, [7], 100)
    ((first, last),) = read(tmp_path, 1, 5)
    assert (first.rows, last.rows) == (5, 2)
    for name, tensor in tensors(last).items():
        assert len(tensor) == 5
        assert not tensor[2:].any(), name


def test_shards_without_rows_give_no_batches(tmp_path: Path) -> None:
    write_shards(tmp_path, [0], 100)
    assert read(tmp_path, 2, 4) == [[], []]


def test_the_order_is_reproducible_and_changes_with_the_epoch(tmp_path: Path) -> None:
    write_shards(tmp_path, [40, 40], 8)
    (first,), (again,), (other,) = (
        read(tmp_path, 1, 16, epoch=e, options=Loader(workers=3)) for e in (0, 0, 1)
    )
    assert numbers(first) == numbers(again)
    assert numbers(first) != numbers(other)
    assert numbers(first) != sorted(numbers(first))


def test_a_resumed_epoch_delivers_the_remaining_batches(tmp_path: Path) -> None:
    write_shards(tmp_path, [40, 40], 8)
    options = Loader(shuffle_rows=20)
    whole = read(tmp_path, 2, 5, options=options)
    rest = read(tmp_path, 2, 5, options=options, past=(Progress(2, 5, 3),))
    for part, left in zip(whole, rest, strict=True):
        assert len(left) == len(part) - 3
        for expected, got in zip(part[3:], left, strict=True):
            assert expected.rows == got.rows
            for name, tensor in tensors(expected).items():
                assert torch.equal(tensor, tensors(got)[name]), name


def test_after_a_resize_each_remaining_row_is_delivered_once(tmp_path: Path) -> None:
    total = write_shards(tmp_path, [13, 0, 17], 4)
    seen: list[int] = []
    past: list[Progress] = []
    for world, batch, steps in ((2, 3, 2), (3, 1, 2), (1, 5, 99)):
        for part in read(tmp_path, world, batch, options=Loader(shuffle_rows=6), past=past):
            seen += numbers(part[:steps])
        past.append(Progress(world, batch, steps))
    assert sorted(seen) == list(range(total))


def test_without_shuffle_rows_keep_file_order(tmp_path: Path) -> None:
    total = write_shards(tmp_path, [11, 0, 9], 4)
    parts = read(tmp_path, 3, 4, shuffle=False)
    assert [n for part in parts for n in numbers(part)] == list(range(total))


@pytest.fixture
def no_thread_remains() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) - before == set()


@pytest.mark.usefixtures("no_thread_remains")
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_an_epoch_ends_its_threads(tmp_path: Path, taken: int) -> None:
    write_shards(tmp_path, [60, 60], 4)
    options = Loader(shuffle_rows=4, prefetch=1)
    epoch = ShardLoader(tmp_path, SCHEMA, options, batch_size=2, rank=0, world_size=1).epoch(0)
    for _ in range(taken):
        next(epoch)
    epoch.close()
    assert list(epoch) == []


@pytest.mark.usefixtures("no_thread_remains")
def test_threads_end_with_the_epoch_or_when_it_is_dropped(tmp_path: Path) -> None:
    write_shards(tmp_path, [60], 4)
    loader = ShardLoader(tmp_path, SCHEMA, batch_size=2, rank=0, world_size=1)
    assert len(list(loader.epoch(0))) == 30
    for _ in loader.epoch(1):
        break


@pytest.mark.usefixtures("no_thread_remains")
@pytest.mark.parametrize(
    "where", ["hvdrec.data.loader.fill", "hvdrec.data.loader.ShardLoader._batch"]
)
def test_an_error_in_the_thread_is_raised_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the thread")

    write_shards(tmp_path, [60], 4)
    monkeypatch.setattr(where, fail)
    with pytest.raises(ZeroDivisionError, match="in the thread") as caught:
        read(tmp_path, 1, 4, options=Loader(shuffle_rows=8))
    assert "fail" in [frame.name for frame in traceback.extract_tb(caught.tb)]


def test_batches_are_prefetched_in_another_thread_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, [60, 60], 30)
    threads: list[str] = []
    batch = ShardLoader._batch

    def watched(self: ShardLoader, pieces: Any) -> Batch:
        threads.append(threading.current_thread().name)
        return batch(self, pieces)

    monkeypatch.setattr(ShardLoader, "_batch", watched)
    loader = ShardLoader(tmp_path, SCHEMA, Loader(prefetch=3), batch_size=4, rank=0, world_size=1)
    epoch = loader.epoch(0)
    next(epoch)
    deadline = time.monotonic() + 10
    while len(threads) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert threads == ["hvdrec-loader"] * 5  # delivered, three queued, one waiting
    epoch.close()


def test_the_next_epoch_is_read_ahead_and_equals_a_separate_one(tmp_path: Path) -> None:
    write_shards(tmp_path, [30, 30], 10)
    options = Loader(shuffle_rows=20)
    loader = ShardLoader(tmp_path, SCHEMA, options, batch_size=4, rank=0, world_size=1)
    past = [Progress(1, 4, 5)]
    prepared: list[int] = []

    def prepare(number: int, batch: Batch) -> Batch:
        prepared.append(number)
        return batch

    delivered = []
    with closing(loader.epochs(3, 6, prepare, past)) as epochs:
        for epoch in epochs:
            first = next(epoch)
            delivered.append(numbers([first, *epoch]))
            if len(delivered) == 1:
                deadline = time.monotonic() + 10
                while len(prepared) <= 10 and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert len(prepared) > 10  # batches of the next epoch, before it is requested
    separate = [numbers(loader.epoch(n, past if n == 3 else ())) for n in (3, 4, 5)]
    assert delivered == separate
    assert prepared == list(range(10 + 15 + 15))


def test_the_waiting_time_of_the_consumer_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = loader_module.fill

    def slowly(*arguments: Any) -> None:
        time.sleep(0.05)
        fill(*arguments)

    write_shards(tmp_path, [20], 4)
    monkeypatch.setattr(loader_module, "fill", slowly)
    loader = ShardLoader(tmp_path, SCHEMA, batch_size=5, rank=0, world_size=1)
    began = time.perf_counter()
    for _ in loader.epoch(0):
        pass
    # Five row groups are filled before the first batch is delivered.
    assert 0.2 < loader.waited_seconds <= time.perf_counter() - began


def test_batches_are_pinned_if_cuda_is_available(tmp_path: Path) -> None:
    write_shards(tmp_path, [5], 4)
    ((batch,),) = read(tmp_path, 1, 5, pin_memory=True)
    assert batch.label.is_pinned() is torch.cuda.is_available()


def test_reading_prints_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path, [5], 4)
    group = (str(tmp_path / "shard-00000.parquet"), 1)
    program = (
        "import threading; from hvdrec.data.petastorm import read_row_groups; "
        f"tables = read_row_groups([{group}], ['user_index'], 1, threading.Event()); "
        "print([table['user_index'].to_pylist() for table in tables])"
    )
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("[[4]]\n", "")


def test_lists_in_sliced_and_chunked_columns_are_padded() -> None:
    table = pa.concat_tables([shard(0, 10).slice(3, 4), shard(20, 5)])
    arrays = table_arrays(table, [SCHEMA["history"]])
    numbers = [3, 4, 5, 6, 20, 21, 22, 23, 24]
    expected = [[0] * (3 - k % 4 % 3) + [k + 2] * (k % 4 % 3) for k in numbers]
    assert arrays["history"].tolist() == expected
    assert arrays["history"].dtype == np.int64


def padded(lists: pa.Array | pa.ChunkedArray, kind: Any) -> list[list[int]]:
    feature = Feature("codes", kind=kind, max_length=3, shares="item_id")
    return table_arrays(pa.table({"codes": lists}), [feature])["codes"].tolist()


def test_long_lists_keep_their_first_and_long_sequences_their_last_codes() -> None:
    lists = pa.array([[2], [3, 4, 5, 6, 7], [], None, [8, 9, 10, 11]], pa.list_(pa.int32()))
    zeros = [0, 0, 0]
    first = [[2, 0, 0], [3, 4, 5], zeros, zeros, [8, 9, 10]]
    assert padded(lists, "categorical_list") == first
    assert padded(lists, "sequence") == [[0, 0, 2], [5, 6, 7], zeros, zeros, [9, 10, 11]]


@given(
    st.lists(st.lists(st.integers(1, 99), max_size=6), max_size=12),
    st.integers(0, 5),
    st.integers(0, 12),
    st.integers(1, 12),
)
@settings(deadline=None)
def test_padding_equals_a_loop_over_python_lists(
    rows: list[list[int]], start: int, length: int, chunk: int
) -> None:
    whole = pa.array(rows, pa.list_(pa.int32()))
    chunks = [whole.slice(at, chunk) for at in range(0, len(whole), chunk)]
    part = pa.chunked_array(chunks, whole.type).slice(start, length)
    assert padded(part, "categorical_list") == [(row + [0] * 3)[:3] for row in part.to_pylist()]
    assert padded(part, "sequence") == [([0] * 3 + row)[-3:] for row in part.to_pylist()]


def refused(folder: Path, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, 1, 2, **more)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    assert refused(folder) == f"{folder}: no such directory; run hvdrec prepare"


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "directory"])
def test_an_unreadable_shard_is_refused(tmp_path: Path, damage: str) -> None:
    write_shards(tmp_path, [5, 5], 4)
    file = tmp_path / "shard-00001.parquet"
    contents = file.read_bytes()
    file.unlink()
    if damage == "directory":
        file.mkdir()
    else:
        file.write_bytes({"text": b"a,b\n1,2\n" * 9, "truncated": contents[:-20]}.get(damage, b""))
    line = refused(tmp_path)
    assert line.startswith(f"{file}: not a readable Parquet file (")
    assert line.endswith("); run hvdrec prepare with --overwrite")


def test_a_shard_that_changes_during_reading_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [5], 4)
    loader = ShardLoader(tmp_path, SCHEMA, batch_size=5, rank=0, world_size=1)
    write_shards(tmp_path, [5], 3)
    with pytest.raises(UserError, match=r"shard-00000.parquet: row group [01] has . rows, had ."):
        list(loader.epoch(0))


def test_errors_name_file_and_column(tmp_path: Path) -> None:
    def load() -> None:
        ShardLoader(tmp_path, SCHEMA, batch_size=1, rank=0, world_size=1)

    with pytest.raises(UserError, match="contains no shards; run hvdrec prepare"):
        load()
    pq.write_table(shard(0, 3).drop(["tags"]), tmp_path / "shard-00000.parquet")
    with pytest.raises(
        UserError, match=r"shard-00000.parquet: column 'tags' is missing; .*\[user_id"
    ):
        load()
    (tmp_path / "shard-00000.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"shard-00000.parquet: not a readable Parquet file \("):
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
