"""Parquet files whose bytes are verified as they are read."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.data.petastorm import RowGroupCache, open_shards
from hvdrec.errors import UserError
from hvdrec.features.shards import parquet_writer
from hvdrec.storage.checksums import sealed, unsealed
from hvdrec.storage.parquet import (
    CHECKSUMS,
    grid_checksum,
    read_table,
    read_tables,
    write_checksums,
)
from hvdrec.storage.urls import Url

TYPES = {
    "code": pa.int32(),
    "number": pa.float32(),
    "list": pa.list_(pa.field("element", pa.int32(), nullable=False)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a shard of two row groups, and one without rows."""
    random = np.random.default_rng(0)
    for name, sizes in (("one", (30, 20)), ("two", (0,))):
        with parquet_writer(tmp_path / f"{name}.parquet", TYPES) as write:
            for rows in sizes:
                columns = [random.integers(0, 9, rows), random.random(rows), [[1, 2]] * rows]
                arrays = [pa.array(c, t) for c, t in zip(columns, TYPES.values(), strict=True)]
                write(pa.table(dict(zip(TYPES, arrays, strict=True))))
    write_checksums(tmp_path)
    return tmp_path


def flips(file: Path, count: int) -> Iterator[int]:
    """Flip a bit of a file, one after the other; yield its number."""
    data = file.read_bytes()
    for bit in sorted(random.Random(0).sample(range(8 * len(data)), count)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        yield bit
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["one.parquet", "two.parquet", CHECKSUMS])
def test_a_flipped_bit_is_named_or_without_effect(folder: Path, name: str) -> None:
    good, named = read_tables(folder), 0
    for bit in flips(folder / name, 400):
        try:
            assert read_tables(folder).equals(good), bit
        except UserError as error:
            assert str(folder) in error.field
            named += 1
    assert named > 200
    assert read_tables(folder).equals(good)


def test_a_remote_folder_is_verified(folder: Path) -> None:
    url = Url("memory://shards")
    for file in folder.iterdir():
        (url / file.name).upload(file)
    assert read_tables(url).equals(read_tables(folder))
    assert read_table(url / "one.parquet", ["code", "list"]).num_rows == 50
    file = folder / "one.parquet"
    data = bytearray(file.read_bytes())
    data[pq.read_metadata(file).row_group(1).column(1).data_page_offset + 10] ^= 1
    file.write_bytes(data)
    (url / "one.parquet").upload(file)
    with pytest.raises(UserError, match="differ from their checksum") as error:
        read_tables(url)
    assert error.value.field == str(url / "one.parquet")


def test_only_the_columns_that_are_read_are_verified(folder: Path) -> None:
    file = folder / "one.parquet"
    data = bytearray(file.read_bytes())
    chunk = pq.read_metadata(file).row_group(1).column(1)
    data[chunk.data_page_offset + 10] ^= 1
    file.write_bytes(data)
    assert read_table(file, ["code"]).num_rows == 50
    with pytest.raises(UserError, match=r"is damaged \(bytes .*; run hvdrec prepare with") as error:
        read_table(file, ["number"])
    assert error.value.field == str(file)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_named(folder: Path, size: int) -> None:
    file = folder / "one.parquet"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError) as error:
        open_shards(folder)
    assert error.value.field == str(file)


def test_a_file_without_checksums_beside_others_is_refused(folder: Path) -> None:
    shutil.copyfile(folder / "one.parquet", folder / "three.parquet")
    with pytest.raises(UserError, match=r"three.parquet: is not listed in"):
        read_tables(folder)


def test_a_folder_of_an_earlier_version_is_read(folder: Path) -> None:
    good = read_tables(folder)
    (folder / CHECKSUMS).unlink()
    assert read_tables(folder).equals(good)


def test_a_damaged_cached_row_group_is_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pa.table({"code": list(range(20_000))})
    reads = []

    def read() -> pa.Table:
        reads.append(1)
        return table

    def get() -> pa.Table:
        cache = RowGroupCache(tmp_path / "cache", 10**9, {"shard": "1"})
        return cache.get("shard", 0, ["code"], read)

    assert get().equals(table) and get().equals(table)
    assert len(reads) == 1
    [stored] = (tmp_path / "cache").rglob("*.val")
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 16
    stored.write_bytes(data)
    assert get().equals(table)
    assert len(reads) == 2 and "differs from its checksum" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "[", "[1]", "\udcb0", '{"a": 1, "checksum": "0"}', "[" * 9**5]
)
def test_a_damaged_document_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        unsealed(text.encode(errors="surrogateescape"))


def test_a_document_is_compared_with_its_checksum() -> None:
    text = sealed({"b": [1, 2.5, None], "a": {"é": "x"}})
    assert unsealed(text) == {"b": [1, 2.5, None], "a": {"é": "x"}}
    with pytest.raises(ValueError, match="differ from its checksum"):
        unsealed(text.replace("2.5", "2.6"))


@pytest.mark.parametrize("size", [0, 7, 4095, 4096, 4104, 20_000])
def test_a_checksum_sees_flips_swaps_and_zeros(size: int) -> None:
    data = np.random.default_rng(0).integers(1, 256, size, np.uint8)
    before = grid_checksum(data.tobytes())
    draw = random.Random(1)
    for _ in range(200 if size else 0):
        changed = data.copy()
        changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
        assert grid_checksum(changed.tobytes()) != before
    for one, other, length in ((0, 4096, 8), (8, 808, 8), (0, 4096, 4096), (4096, 12288, 4096)):
        if other + length <= size:
            changed = data.copy()
            changed[one : one + length] = data[other : other + length]
            changed[other : other + length] = data[one : one + length]
            assert grid_checksum(changed.tobytes()) != before
            changed[one : one + length] = 0
            assert grid_checksum(changed.tobytes()) != before
    assert grid_checksum(bytes(size)) != before or not size
