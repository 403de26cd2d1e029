"""Raw tables in the formats that people have: declared text formats, JSON lines, table formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.config import Config, Feature, Paths, Samples, TableFormat
from hvdrec.config.schema import RawType
from hvdrec.errors import UserError
from hvdrec.samples import make_samples
from hvdrec.samples.columns import plain
from hvdrec.samples.engine import connect
from hvdrec.storage.urls import as_location


def read(raw: Any, table: TableFormat | str, **declared: RawType) -> list[dict[str, Any]]:
    """Read a table and return its rows, sorted by their text."""
    options = [] if isinstance(table, str) else [table]
    name = table if isinstance(table, str) else table.path
    with connect(options) as engine:
        columns = engine.collect(engine.read(as_location(str(raw)), name, declared))
    rows = pa.table({name: plain(array) for name, array in columns.items()}).to_pylist()
    return sorted(rows, key=str)


def refused(raw: Any, table: TableFormat | str) -> UserError:
    with pytest.raises(UserError) as raised:
        read(raw, table)
    assert "\n" not in str(raised.value)
    return raised.value


# ------------------------------------------------------------------------------ declared CSV


def test_a_tab_separated_file_without_header_in_latin_1(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_bytes("196\tcafé\t3\n7\t \t5\n".encode("latin-1"))
    table = TableFormat("u.data", encoding="latin-1", header=False, columns=("u", "name", "stars"))
    assert read(tmp_path, table, u="string") == [
        {"u": "196", "name": "café", "stars": 3},
        {"u": "7", "name": " ", "stars": 5},
    ]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "shift_jis"])
def test_any_encoding_of_python(tmp_path: Path, encoding: str) -> None:
    text = "a,b\nx,“”\n" if encoding == "cp1252" else "a,b\nx,表\n"
    with gzip.open(tmp_path / "t.csv.gz", "wb") as file:
        file.write(text.encode(encoding))
    [row] = read(tmp_path, TableFormat("t.csv.gz", encoding=encoding))
    assert row == {"a": "x", "b": text[-3:-1].strip(",")}


def test_a_delimiter_of_two_characters_and_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "movies.dat").write_text('1::"Heat" (1995)::Action\n2::Up, it\'s::a|b\n')
    table = TableFormat(
        "movies.dat", delimiter="::", quote="", header=False, columns=("id", "title", "genres")
    )
    assert read(tmp_path, table) == [
        {"id": 1, "title": '"Heat" (1995)', "genres": "Action"},
        {"id": 2, "title": "Up, it's", "genres": "a|b"},
    ]


def test_columns_without_names_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,x\n2,y\n")
    rows = read(tmp_path, TableFormat("t.csv", header=False))
    assert rows == [{"column0": 1, "column1": "x"}, {"column0": 2, "column1": "y"}]


def test_texts_for_null_and_new_names(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id;price\n1;NA\n2;2.5\n3;\\N\n")
    table = TableFormat("t.csv", nulls=("NA", "\\N"), rename={"id": "item_id"})
    assert read(tmp_path, table, item_id="string") == [
        {"item_id": "1", "price": None},
        {"item_id": "2", "price": 2.5},
        {"item_id": "3", "price": None},
    ]


def test_renaming_works_for_parquet_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "x": [2]}), tmp_path / "t.parquet")
    table = TableFormat("t.parquet", rename={"id": "item_id"})
    assert read(tmp_path, table) == [{"item_id": 1, "x": 2}]
    error = refused(tmp_path, TableFormat("t.parquet", rename={"idd": "item_id"}))
    assert error.field == "samples.tables.rename"
    assert error.value == "idd"
    assert "[id, x]" in str(error)
    assert "two columns" in str(refused(tmp_path, TableFormat("t.parquet", rename={"id": "x"})))


def test_partitions_of_csv_files_in_another_encoding(tmp_path: Path) -> None:
    for day, name in (("2024-05-01", "é"), ("2024-05-02", "ü")):
        folder = tmp_path / f"day={day}"
        folder.mkdir()
        (folder / "part.log").write_bytes(f"1|{name}\n".encode("latin-1"))
    table = TableFormat("day=*/*.log", encoding="latin-1", header=False, columns=("user", "name"))
    rows = read(tmp_path, table)
    assert {(str(row["day"]), row["name"]) for row in rows} == {
        ("2024-05-01", "é"),
        ("2024-05-02", "ü"),
    }


def test_mistakes_in_declared_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_bytes("1\té\n2\tx\n".encode("latin-1"))
    assert "samples.tables" in str(refused(tmp_path, "u.data"))
    wrong = TableFormat("u.data", header=False, encoding="latin-1", columns=("a", "b", "c"))
    assert "2 columns" in str(refused(tmp_path, wrong))
    utf8 = refused(tmp_path, TableFormat("u.data", header=False))
    assert utf8.field == str(tmp_path / "u.data")
    assert "encoding = 'latin-1'" in str(utf8)
    (tmp_path / "late.csv").write_bytes(b"a\n" + b"1\n" * 5000 + b"\x81\n")
    late = refused(tmp_path, TableFormat("late.csv", encoding="cp1252"))
    assert "line 5002" in str(late)


@pytest.mark.parametrize(
    ("table", "field"),
    [
        (TableFormat("t.csv", encoding="latin1x"), "encoding"),
        (TableFormat("t.csv", encoding="base64"), "encoding"),
        (TableFormat("t.csv", delimiter="-----"), "delimiter"),
    ],
)
def test_formats_are_checked_with_the_configuration(table: TableFormat, field: str) -> None:
    with pytest.raises(UserError) as raised:
        Config("run", (Feature("user_id"),), samples=Samples(tables=(table,)), paths=Paths())
    assert raised.value.field == f"samples.tables[0].{field}"
    assert raised.value.value == getattr(table, field)


# -------------------------------------------------------------------------------- JSON lines


def write_lines(file: Path, *rows: object) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    first = {"user": "007", "n": 1, "x": 1, "ok": True, "tags": ["a", "b"], "at": "2024-05-01"}
    late = {"user": "x", "n": 2, "x": 2.5, "ok": False, "tags": [], "at": None, "more": "é"}
    write_lines(tmp_path / name, *[first] * 3000, late)
    rows = read(tmp_path, name, user="string")
    assert len(rows) == 3001
    assert {type(row["x"]) for row in rows} == {float}
    [last] = [row for row in rows if row["user"] == "x"]
    assert last == late
    shown = {**first, "more": None, "at": rows[0]["at"]}
    assert rows[0] == shown
    assert str(rows[0]["at"]).startswith("2024-05-01")


def test_a_json_key_is_read_exactly_as_written(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", {"id": 9007199254740993}, {"id": "a"}, {"id": "1"})
    ids = [row["id"] for row in read(tmp_path, "t.jsonl", id="string")]
    assert sorted(ids) == ["1", "9007199254740993", "a"]


def test_damaged_json_lines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": \n')
    error = refused(tmp_path, "t.jsonl")
    assert error.field == str(tmp_path / "t.jsonl")
    assert "JSON" in str(error)
    (tmp_path / "list.jsonl").write_text("[1]\n")
    assert "object" in str(refused(tmp_path, "list.jsonl"))


# ------------------------------------------------------------------------ Delta and Iceberg


def test_the_current_version_of_a_delta_table(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    folder = str(tmp_path / "log")
    rows = pa.table({"user": ["a", "b", "c"], "day": ["1", "2", "1"]})
    deltalake.write_deltalake(folder, rows, partition_by=["day"])
    deltalake.DeltaTable(folder).delete("\"user\" = 'b'")
    assert read(tmp_path, "log") == [{"user": "a", "day": "1"}, {"user": "c", "day": "1"}]


def test_the_newest_snapshot_of_an_iceberg_table(tmp_path: Path) -> None:
    memory = pytest.importorskip("pyiceberg.catalog.memory")
    catalog = memory.InMemoryCatalog("test", warehouse=str(tmp_path))
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.log", schema=pa.schema([("x", pa.int64())]))
    table.append(pa.table({"x": [1, 2, 3]}))
    table.delete("x = 2")
    assert read(tmp_path, "shop/log") == [{"x": 1}, {"x": 3}]


# ----------------------------------------------------------------------------------- remote


def test_remote_tables_of_all_file_formats() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/logs/day=1/a.csv", b"x,y\n1,2\n")
    store.pipe("/logs/day=2/b.csv", b"x,y\n3,4\n")
    store.pipe("/logs/_SUCCESS", b"")
    store.pipe("/more/t.jsonl", b'{"x": 1}\n')
    with store.open("/more/t.parquet", "wb") as file:
        pq.write_table(pa.table({"x": [5]}), file)
    store.pipe("/more/u.data", "é\n".encode("latin-1"))
    expected = [{"x": 1, "y": 2, "day": 1}, {"x": 3, "y": 4, "day": 2}]
    try:
        assert read("memory://logs", "day=*/*.csv") == expected
        assert read("elsewhere", "memory://logs") == expected
        assert read("memory://more", "t.jsonl") == [{"x": 1}]
        assert read("memory://more", "t.parquet") == [{"x": 5}]
        latin = TableFormat("u.data", encoding="latin-1", header=False)
        assert read("memory://more", latin) == [{"column0": "é"}]
        assert refused("memory://more", "none.csv").field == "memory://more/none.csv"
    finally:
        store.rm("/logs", recursive=True)
        store.rm("/more", recursive=True)


# ------------------------------------------------------------------------------------- keys


def test_keys_of_several_columns_and_of_other_names(tmp_path: Path) -> None:
    rows = range(60)
    log = pa.table(
        {
            "shop": [f"s{row % 2}" for row in rows],
            "customer": [row % 5 for row in rows],
            "sku": [row % 4 for row in rows],
            "t": [*rows],
            "click": [row % 3 == 0 for row in rows],
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    people = pa.table(
        {
            "shop": [f"s{row // 5}" for row in range(10)],
            "customer": [row % 5 for row in range(10)],
            "age": [*range(10)],
        }
    )
    pq.write_table(people, tmp_path / "people.parquet")
    write_lines(tmp_path / "goods.jsonl", *({"id": f"{n}", "colour": f"c{n}"} for n in range(4)))
    samples = Samples(
        interactions="log.parquet",
        users="people.parquet",
        items="goods.jsonl",
        tables=(TableFormat("goods.jsonl", rename={"id": "sku"}),),
        user="buyer",
        item="sku",
        time="t",
        label="click",
        derive={"buyer": "shop || '/' || customer"},
    )
    features = (
        Feature("buyer"),
        Feature("age", dtype="int"),
        Feature("sku", "item", dtype="int"),
        Feature("colour", "item"),
    )
    paths = Paths(raw=str(tmp_path), work=str(tmp_path / "work"))
    result = make_samples(Config("run", features, samples=samples, paths=paths), progress=False)
    assert {name: m["matched"] for name, m in result.matches.items()} == {
        "samples.users": 60,
        "samples.items": 60,
    }
    test = pq.read_table(f"{result.path}/test").to_pylist()
    assert len(test) == 6
    for row in test:
        shop, customer = row["buyer"].split("/")
        assert row["age"] == 5 * int(shop[1:]) + int(customer)
        assert row["colour"] == f"c{row['sku']}"
