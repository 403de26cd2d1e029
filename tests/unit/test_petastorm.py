"""Row groups are read in the planned order, with a bounded read-ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.data import petastorm
from hvdrec.data.petastorm import RowGroup, read_row_groups
from hvdrec.errors import UserError


def write_shard(file: Path, groups: int, start: int = 0) -> list[RowGroup]:
    """Write row groups of two rows; row group n of the file contains the number `start` + n."""
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.repeat(np.arange(start, start + groups), 2)
    table = pa.table({"number": numbers, "list": [[n] * (n % 3) for n in numbers]})
    pq.write_table(table, file, row_group_size=2, compression="none", use_dictionary=False)
    return [(str(file), index) for index in range(groups)]


def numbers(
    planned: Sequence[RowGroup], columns: Sequence[str] = ("number",), workers: int = 2
) -> list[int]:
    tables = list(read_row_groups(planned, columns, workers, threading.Event()))
    assert all(set(table.column_names) == set(columns) for table in tables)
    return [table["number"][0].as_py() for table in tables]


@pytest.mark.parametrize("workers", [1, 3])
def test_row_groups_are_read_in_the_planned_order(tmp_path: Path, workers: int) -> None:
    groups = write_shard(tmp_path / "b.parquet", 9) + write_shard(tmp_path / "a.parquet", 9, 9)
    order = np.random.default_rng(0).permutation(18)[:11].tolist()
    order += order[:3]  # a row group may be planned twice
    planned = [groups[i] for i in order]
    assert numbers(planned, workers=workers) == order
    assert numbers(planned, ["list", "number"], workers) == order


@pytest.mark.parametrize("name", ["run #1", "what?", "a=b", "100%25", "two words", "[x]*"])
def test_special_characters_in_directory_names_are_kept(tmp_path: Path, name: str) -> None:
    assert numbers(write_shard(tmp_path / name / "train" / "shard.parquet", 3)) == [0, 1, 2]


def test_a_slow_row_group_bounds_the_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = write_shard(tmp_path / "shard.parquet", 40)
    resume = threading.Event()
    started: list[int] = []
    process = petastorm._Worker.process

    def slow_at_first(self: Any, piece_index: int, *arguments: Any) -> None:
        started.append(piece_index)
        if piece_index == 0:
            resume.wait(10)
        process(self, piece_index, *arguments)

    monkeypatch.setattr(petastorm._Worker, "process", slow_at_first)
    seen: list[int] = []
    reading = threading.Thread(target=lambda: seen.extend(numbers(planned)))
    reading.start()
    deadline = time.monotonic() + 10
    while len(started) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert sorted(started) == [0, 1, 2, 3]  # two workers and two row groups ahead
    resume.set()
    reading.join(10)
    assert seen == list(range(40))


def test_a_damaged_row_group_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shard = tmp_path / "shard.parquet"
    planned = write_shard(shard, 3)
    column = pq.read_metadata(shard).row_group(1).column(0)
    contents = bytearray(shard.read_bytes())
    start = column.data_page_offset
    contents[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    shard.write_bytes(contents)
    before = set(threading.enumerate())
    tables = read_row_groups(planned, ["number"], 2, threading.Event())
    assert next(tables)["number"][0].as_py() == 0
    with pytest.raises(UserError) as caught:
        next(tables)
    line = str(caught.value)
    assert line.startswith(f"{shard}: row group 1 cannot be read (")
    assert line.endswith("); run hvdrec prepare with --overwrite")
    assert "\n" not in line
    assert capfd.readouterr().err == ""
    assert set(threading.enumerate()) - before == set()


def test_reading_ends_on_the_event_and_on_close(tmp_path: Path) -> None:
    planned = write_shard(tmp_path / "shard.parquet", 40)
    before = set(threading.enumerate())
    stopped = threading.Event()
    tables = read_row_groups(planned, ["number"], 2, stopped)
    next(tables)
    stopped.set()
    assert len(list(tables)) <= 4  # those that were already read
    tables = read_row_groups(planned, ["number"], 2, threading.Event())
    next(tables)
    tables.close()
    assert set(threading.enumerate()) - before == set()


def test_idle_workers_sleep(tmp_path: Path) -> None:
    planned = write_shard(tmp_path / "shard.parquet", 40)
    before = set(threading.enumerate())
    tables = read_row_groups(planned, ["number"], 3, threading.Event())
    next(tables)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 3
    time.sleep(0.2)  # the workers reach their read-ahead limit
    first = count_sleeps(workers)
    time.sleep(1)
    assert count_sleeps(workers) - first <= 60  # stock Petastorm: 1,000 a thread
    tables.close()


def test_sleeping_workers_stop_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petastorm.workers_pool.thread_pool.IO_TIMEOUT_INTERVAL_S", 60.0)
    before = set(threading.enumerate())
    planned = write_shard(tmp_path / "shard.parquet", 40)
    tables = read_row_groups(planned, ["number"], 3, threading.Event())
    next(tables)
    time.sleep(0.2)  # the workers reach their read-ahead limit
    started = time.monotonic()
    tables.close()
    assert time.monotonic() - started < 20
    assert set(threading.enumerate()) - before == set()


def count_sleeps(threads: set[threading.Thread]) -> int:
    """Return the number of voluntary context switches of threads."""
    slept = 0
    for thread in threads:
        for line in Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                slept += int(line.split()[1])
    return slept
