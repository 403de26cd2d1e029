"""Raw tables that are directories, as Spark and Petastorm write them."""

from __future__ import annotations

import pickle
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hvdrec.data.petastorm_compat  # noqa: F401 # adds what Petastorm imports

# isort: split
from petastorm.codecs import CompressedNdarrayCodec, NdarrayCodec

from hvdrec.errors import UserError
from hvdrec.samples.engine import connect


def rows(raw: Path, name: str, order: str) -> list[dict[str, Any]]:
    """Read a raw table and return its rows, ordered by a column."""
    with connect() as engine:
        columns = engine.collect(engine.read(raw, name))
    return sorted(pa.table(columns).to_pylist(), key=lambda row: row[order])


def test_a_directory_that_spark_wrote(tmp_path: Path) -> None:
    start = datetime(2024, 1, 1)
    for month in (1, 2):
        folder = tmp_path / "log" / "year=2024" / f"month={month}"
        folder.mkdir(parents=True)
        for part in range(2):
            number = 2 * month + part
            table = pa.table(
                {
                    "item": pa.array([f"i{number}"]).dictionary_encode(),
                    "ts": pa.array([start + timedelta(minutes=number)], pa.timestamp("us")),
                }
            )
            file = folder / f"part-{part}.zstd.parquet"
            pq.write_table(table, file, compression="zstd", use_deprecated_int96_timestamps=True)
            (folder / f".{file.name}.crc").write_bytes(b"crc\0")
    (tmp_path / "log" / "_SUCCESS").touch()
    left = tmp_path / "log" / "_temporary" / "0"
    left.mkdir(parents=True)
    pq.write_table(pa.table({"item": ["unfinished"]}), left / "part-9.parquet")
    assert rows(tmp_path, "log", "item") == [
        {
            "item": f"i{number}",
            "ts": start + timedelta(minutes=number),
            "year": 2024,
            "month": number // 2,
        }
        for number in range(2, 6)
    ]
    assert rows(tmp_path, str(tmp_path / "log"), "item") == rows(tmp_path, "log", "item")


def write_petastorm(folder: Path, columns: dict[str, pa.Array]) -> None:
    """Write a data set with the metadata that marks Petastorm's own."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    pq.write_table(table, folder / "part-0.parquet")
    metadata = {b"dataset-toolkit.unischema.v1": pickle.dumps(None)}
    pq.write_metadata(table.schema.with_metadata(metadata), folder / "_common_metadata")


def encoded(codec: Any, values: list[Any]) -> pa.Array:
    """Return what a codec of Petastorm stores for arrays."""
    stored = []
    for value in values:
        array = None if value is None else np.asarray(value)
        field = (
            array
            if array is None
            else SimpleNamespace(name="column", numpy_dtype=array.dtype.type, shape=array.shape)
        )
        stored.append(None if array is None else bytes(codec.encode(field, array)))
    return pa.array(stored, pa.binary())


@pytest.mark.parametrize("codec", [NdarrayCodec(), CompressedNdarrayCodec()])
def test_arrays_that_petastorm_wrote_become_lists(tmp_path: Path, codec: Any) -> None:
    tags, vectors = [[3, 1], None, [2]], [[0.5, 1.5], [2.5], []]
    write_petastorm(
        tmp_path / "items",
        {
            "item": pa.array([1, 2, 3]),
            "tags": encoded(codec, tags),
            "vector": encoded(codec, [np.array(v, np.float32) for v in vectors]),
            "words": encoded(codec, [["a", "b"], ["c"], ["ü"]]),
            "image": pa.array([b"\x89PNG1", b"\x89PNG2", None], pa.binary()),
            "matrix": encoded(codec, [[[1, 2]], [[3, 4]], [[5, 6]]]),
        },
    )
    found = rows(tmp_path, "items", "item")
    assert [row["tags"] for row in found] == [[3, 1], [], [2]]  # a missing list is empty
    assert [row["vector"] for row in found] == vectors
    assert [row["words"] for row in found] == [["a", "b"], ["c"], ["ü"]]
    assert found[0]["image"] == b"\x89PNG1"
    assert isinstance(found[0]["matrix"], bytes)
    assert rows(tmp_path, "items/*.parquet", "item") == found


def test_damaged_arrays_are_named(tmp_path: Path) -> None:
    good = encoded(NdarrayCodec(), [[1, 2]])[0].as_py()
    objects = pa.array([good, good[:-3]], pa.binary())
    write_petastorm(tmp_path / "items", {"item": pa.array([1, 2]), "tags": objects})
    with pytest.raises(UserError, match="not a readable NumPy array") as caught:
        rows(tmp_path, "items", "item")
    assert str(tmp_path / "items") in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_of_python_objects_are_not_unpickled(tmp_path: Path) -> None:
    stored = tmp_path / "objects.npy"
    np.save(stored, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write_petastorm(tmp_path / "items", {"tags": pa.array([stored.read_bytes()], pa.binary())})
    with pytest.raises(UserError, match="allow_pickle"):
        rows(tmp_path, "items", "tags")


def test_directories_without_a_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "_SUCCESS").touch()
    with pytest.raises(UserError, match="holds no files"):
        rows(tmp_path, "log", "item")
    (tmp_path / "log" / "a.csv").write_text("item\n1\n")
    assert rows(tmp_path, "log", "item") == [{"item": 1}]
    pq.write_table(pa.table({"item": [1]}), tmp_path / "log" / "b.parquet")
    with pytest.raises(UserError, match=r"\[csv, parquet\]"):
        rows(tmp_path, "log", "item")
