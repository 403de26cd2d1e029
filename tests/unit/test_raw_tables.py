"""Raw tables: what is read is right, or refused with a remedy that works."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.config import Config
from hvdrec.config.schema import RawType
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError
from hvdrec.samples import SamplesResult, make_samples
from hvdrec.samples.columns import cast, plain
from hvdrec.samples.engine import Engine, connect
from hvdrec.samples.rows import time_values

UTC = datetime.UTC
LATE = 3000
"""More rows than the types are first guessed from."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with connect() as opened:
        yield opened


def read(
    engine: Engine, raw: Path, name: str, declared: dict[str, RawType] | None = None
) -> dict[str, list[Any]]:
    """Read a table; return its columns as lists, each sorted by text."""
    table = engine.read(raw, name, declared or {})
    return {c: sorted(plain(a).to_pylist(), key=str) for c, a in engine.collect(table).items()}


def refusal(engine: Engine, raw: Path, name: str) -> str:
    with pytest.raises(UserError) as raised:
        engine.collect(engine.read(raw, name))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def csv_column(raw: Path, values: list[str], early: str | None = None) -> None:
    """Write values to the column x of t.csv, after many rows of another value."""
    rows = [early] * LATE if early is not None else []
    (raw / "t.csv").write_text("\n".join(["x,y", *(f"{v},1" for v in [*rows, *values])]) + "\n")


# ------------------------------------------------------------------------- types of CSV columns


@pytest.mark.parametrize(
    ("early", "values", "expected"),
    [
        ("1", ["2.5"], [1.0, 2.5]),
        ("1", ["1e-3"], [0.001, 1.0]),
        ("1", ["-7", "+8"], [-7, 1, 8]),
        ("1", ["free"], ["1", "free"]),
        ("1", ["007"], ["007", "1"]),
        ("1", ["nan"], [1, None]),
        ("2.5", ["NaN"], [2.5, None]),
        ("1", [str(2**62 + 1)], [1, 2**62 + 1]),
        ("1", [str(2**64)], ["1", str(2**64)]),
        ("2024-05-01", ["2024-05-02 10:30:00"], [(2024, 5, 1), (2024, 5, 2, 10, 30)]),
        ("2024-02-29", ["2023-02-29"], ["2023-02-29", "2024-02-29"]),
        ("03/04/2024", ["31/12/2024"], ["03/04/2024", "31/12/2024"]),
        (
            "2024-05-01T10:00:00Z",
            ["2024-05-01T10:00:00+02:00"],
            [(2024, 5, 1, 8, 0, 0, 0, UTC), (2024, 5, 1, 10, 0, 0, 0, UTC)],
        ),
        (
            "2024-05-01 10:00:00",
            ["2024-05-01 10:00:00+02:00"],
            ["2024-05-01 10:00:00", "2024-05-01 10:00:00+02:00"],
        ),
        ("true", ["False"], [False, True]),
        ("true", ["2"], ["2", "true"]),
        ("", ["5"], [5, None]),
    ],
)
def test_csv_types_hold_for_all_rows(
    engine: Engine, tmp_path: Path, early: str, values: list[str], expected: list[Any]
) -> None:
    csv_column(tmp_path, values, early)
    wanted = [datetime.datetime(*v) if isinstance(v, tuple) else v for v in expected]
    found = sorted(set(read(engine, tmp_path, "t.csv")["x"]), key=str)
    assert found == wanted
    assert {type(value) for value in found} == {type(value) for value in wanted}


def test_nanoseconds_that_appear_late_are_kept(engine: Engine, tmp_path: Path) -> None:
    csv_column(tmp_path, ["2024-05-01 10:00:00.123456789"], "2024-05-01 10:00:00")
    array = engine.collect(engine.read(tmp_path, "t.csv"))["x"]
    assert array.type == pa.timestamp("ns")
    assert max(array.cast(pa.int64()).to_pylist()) % 10**9 == 123456789


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("string", ["01", "1", "1.10", "nan"], ["01", "1", "1.10", "nan"]),
        ("string", ["2024-05-01", "true"], ["2024-05-01", "true"]),
        ("string", ["1.0", "2"], [1.0, 2.0]),
        ("int", ["01", "2"], [1, 2]),
        ("int", ["1", "2.5"], [1.0, 2.5]),
        ("float", ["01.5", "2"], [1.5, 2.0]),
        ("float", ["01.5", "old"], ["01.5", "old"]),
    ],
)
def test_declared_types_decide_what_text_means(
    engine: Engine, tmp_path: Path, dtype: RawType, values: list[str], expected: list[Any]
) -> None:
    csv_column(tmp_path, values)
    assert read(engine, tmp_path, "t.csv", {"x": dtype})["x"] == expected


def test_a_word_among_numbers_is_reported(tmp_path: Path) -> None:
    csv_column(tmp_path, ["free"], "7")
    with connect() as engine:
        engine.read(tmp_path, "t.csv")
        [line] = engine.warnings
        engine.read(tmp_path, "t.csv", {"x": "string"})
    assert line == f"{tmp_path}/t.csv: column 'x' is read as text: 'free' is not a number"
    assert engine.warnings == [line]


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        ("a;b", "1;2,5"),
        ("a\tb", "1\t2,5"),
        ("a|b", "1|2,5"),
        ('"a";b', '1;"2,5"'),
        ("\ufeffa,b", '1,"2,5"'),
    ],
)
def test_the_delimiter_is_that_of_the_header(
    engine: Engine, tmp_path: Path, first: str, rest: str
) -> None:
    (tmp_path / "t.csv").write_text(f"{first}\r\n{rest}\r\n")
    assert read(engine, tmp_path, "t.csv") == {"a": [1], "b": ["2,5"]}
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    assert read(engine, tmp_path, "t.csv.gz") == {"a": [1], "b": ["2,5"]}


def test_csv_files_are_united_by_name(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "p1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "p2.csv").write_text("b;a;c\n2.5;3;x\n")
    found = read(engine, tmp_path, "p*.csv")
    assert found == {"a": [1, 3], "b": [2.0, 2.5], "c": [None, "x"]}


# --------------------------------------------------------------------- reasons of unreadable files


@pytest.mark.parametrize(
    ("content", "words", "remedy"),
    [
        (b"a,b\n1,2\n1,2,3\n", ["Line: 3", "Columns: 2 Found: 3"], "correct the file"),
        (b"a,b\n1,2\n1\n", ["Line: 3", "Columns: 2 Found: 1"], "correct the file"),
        (b"a,b\n1,2\n3,Am\xe9lie\n", ["Line: 3", "utf-8"], "save the file as UTF-8"),
        (b"a,Gr\xf6\xdfe\n1,2\n", ["UTF-8"], "save the file as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), ["UTF-8"], "save the file as UTF-8"),
        (b'a,b\n1,"x\n2,y\n', ["Line: 2", "unterminated quote"], "correct the file"),
        (b"", ["no line with the names of columns"], "add one"),
        (b"a,b,a\n1,2,3\n", ["two columns have the name 'a'"], "rename one of them"),
    ],
)
def test_errors_of_csv_files_keep_their_reason(
    engine: Engine, tmp_path: Path, content: bytes, words: list[str], remedy: str
) -> None:
    (tmp_path / "p1.csv").write_bytes(content)
    text = refusal(engine, tmp_path, "p*.csv")
    assert text.startswith(f"{tmp_path}/p1.csv: ") and f"; {remedy}" in text
    for word in words:
        assert word in text


def test_following_the_remedy_for_an_encoding_works(engine: Engine, tmp_path: Path) -> None:
    content = "a,b\n1,Amélie\n"
    (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
    assert "save the file as UTF-8" in refusal(engine, tmp_path, "t.csv")
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    assert read(engine, tmp_path, "t.csv") == {"a": [1], "b": ["Amélie"]}


# ------------------------------------------------------------------------------- NaN, names, paths


def test_nan_is_null_in_every_float_column(engine: Engine, tmp_path: Path) -> None:
    nan = float("nan")
    structs = pa.array([{"s": nan, "k": 1}, {"s": 1.0, "k": 2}])
    small = pa.array([nan, 1.0], pa.float32())
    table = pa.table({"x": [nan, 1.0], "small": small, "lists": [[nan, 1.0], []], "st": structs})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = engine.read(tmp_path, "t.parquet")
    tests = "[x > 0, small > 0, lists[1] > 0, st.s > 0, x / 0 > 0]"
    found = engine.collect(engine.derive(rows, "found", tests, "key"))["found"].to_pylist()
    assert sorted(found, key=str) == [[None] * 5, [True, True, None, True, None]]
    derived = engine.derive(rows, "ratio", "CAST('nan' AS DOUBLE)", "key")
    assert engine.collect(derived)["ratio"].to_pylist() == [None, None]


def test_only_directories_within_the_pattern_give_columns(engine: Engine, tmp_path: Path) -> None:
    raw = tmp_path / "x=7" / "raw"
    for day in ("2024-05-01", "2024-05-02"):
        folder = raw / f"day={day}" / "store=__HIVE_DEFAULT_PARTITION__"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"x": [1]}), folder / "p.parquet")
        (folder / "p.csv").write_text("x\n1\n")
    days = [datetime.date(2024, 5, 1), datetime.date(2024, 5, 2)]
    expected = {"x": [1, 1], "day": days, "store": [None, None]}
    for suffix in ("parquet", "csv"):
        assert read(engine, raw, f"day=*/*/*.{suffix}") == expected
        assert read(engine, raw, f"**/*.{suffix}") == expected
    found = read(engine, raw, f"{raw}/day=*/*/*.parquet", {"day": "string"})
    assert found["day"] == ["2024-05-01", "2024-05-02"]
    assert read(engine, raw / "day=2024-05-01" / "store=__HIVE_DEFAULT_PARTITION__", "*.csv") == {
        "x": [1]
    }
    literal = raw / "day=2024-05-01" / "store=__HIVE_DEFAULT_PARTITION__" / "p.csv"
    assert read(engine, raw, str(literal)) == {"x": [1]}
    (raw / "Y=1").mkdir()
    (raw / "Y=1" / "t.csv").write_text("y\n1\n")
    assert "differ only in case" in refusal(engine, raw, "*/t.csv")
    # The column of a file stands.
    assert read(engine, tmp_path, "x=7/raw/*/*/*.csv")["x"] == [1, 1]


def test_a_column_in_some_files_and_directories_is_refused(engine: Engine, tmp_path: Path) -> None:
    for name, table in {"a": {"x": [1], "day": [1]}, "b": {"x": [2]}}.items():
        (tmp_path / "day=5").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), tmp_path / "day=5" / f"{name}.parquet")
    text = refusal(engine, tmp_path, "day=*/*.parquet")
    assert "column 'day' is in some files" in text and text.endswith("or in none")


def test_a_file_name_is_not_a_pattern(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "t[1].csv").write_text("x\n1\n")
    (tmp_path / "t1.csv").write_text("x\n2\n")
    assert read(engine, tmp_path, "t[1].csv") == {"x": [1]}


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_names_that_differ_only_in_case_are_refused(
    engine: Engine, tmp_path: Path, suffix: str
) -> None:
    def write(name: str, columns: list[str]) -> None:
        file = tmp_path / f"{name}.{suffix}"
        if suffix == "csv":
            file.write_text(",".join(columns) + "\n" + ",".join("1" * len(columns)) + "\n")
        else:
            pq.write_table(pa.Table.from_arrays([pa.array([1])] * len(columns), columns), file)

    write("one", ["Clicked", "clicked"])
    write("p1", ["Clicked"])
    write("p2", ["clicked"])
    for name in ("one", "p*"):
        text = refusal(engine, tmp_path, f"{name}.{suffix}")
        assert "'Clicked'" in text and "'clicked'" in text
        assert text.endswith("differ only in case, which SQL ignores; rename one of them")
    table = engine.read(tmp_path, f"p1.{suffix}")
    with pytest.raises(UserError, match="differ only in case"):
        engine.derive(table, "clicked", "1", "samples.derive.clicked")


INT, FLOAT, TEXT = pa.array([2**53 + 1]), pa.array([1.5]), pa.array(["a"])
ZONED = pa.array([datetime.datetime(2024, 5, 1, tzinfo=UTC)])


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (INT, FLOAT, str(2**53 + 1)),
        (pa.array([[2**53 + 1]]), pa.array([[1.5]]), "list of integer"),
        (FLOAT, TEXT, "float in p1.parquet and string in p2.parquet"),
        (ZONED, ZONED.cast(pa.timestamp("us")), "timestamp with time zone in p1.parquet"),
        (pa.array([True]), TEXT, "boolean"),
    ],
)
def test_files_whose_types_have_no_common_one_are_refused(
    engine: Engine, tmp_path: Path, first: pa.Array, second: pa.Array, word: str
) -> None:
    for order in ((first, second), (second, first)):
        for name, array in zip(("p1", "p2"), order, strict=True):
            pq.write_table(pa.table({"x": array}), tmp_path / f"{name}.parquet")
        text = refusal(engine, tmp_path, "p*.parquet")
        assert f"{tmp_path}/p*.parquet: column 'x'" in text and "in all files" in text
        if order[0] is first:
            assert word in text


def test_files_whose_types_have_a_common_one_are_united(engine: Engine, tmp_path: Path) -> None:
    columns: list[dict[str, Any]] = [
        {"a": [1], "b": [1], "c": pa.array([1], pa.int8()), "d": pa.nulls(1)},
        {"a": [1.5], "b": ["01"], "c": pa.array([2**62]), "d": ["x"]},
    ]
    for i, table in enumerate(columns):
        pq.write_table(pa.table(table), tmp_path / f"p{i}.parquet")
    expected = {"a": [1.0, 1.5], "b": ["01", "1"], "c": [1, 2**62], "d": [None, "x"]}
    assert read(engine, tmp_path, "p*.parquet") == expected


@pytest.mark.parametrize("declared", [{}, {"x": "string"}])
def test_large_ids_among_decimals_are_refused(
    engine: Engine, tmp_path: Path, declared: dict[str, RawType]
) -> None:
    csv_column(tmp_path, ["1.152921504606847e+18", "1.0"], str(2**60))
    with pytest.raises(UserError, match=f"mixes integers such as {2**60} with decimals"):
        engine.read(tmp_path, "t.csv", declared)


# ----------------------------------------------------------------------------- remedies that work


def following(engine: Engine, remedy: str, name: str, array: pa.Array) -> pa.Array:
    """Derive the column as the message says."""
    [(key, expression)] = re.findall(r'samples\.derive\.(\S+|".*") = ("(?:[^"\\]|\\.)*")', remedy)
    assert json.loads(key if key.startswith('"') else f'"{key}"') == name
    table = engine.register(pa.table({name: plain(array)}))
    return engine.collect(engine.derive(table, name, json.loads(expression), "key"))[name]


DAY = datetime.date(2024, 5, 1)
BIG = decimal.Decimal(10**30)


@pytest.mark.parametrize(
    ("dtype", "array", "expected"),
    [
        ("string", pa.array([1.0, 2.0]), ["1", "2"]),
        ("string", pa.array([1.5, 2.0]), ["1.5", "2.0"]),
        ("string", pa.array([True, None]), ["true", None]),
        ("string", pa.array([DAY]), ["2024-05-01"]),
        ("string", pa.array([uuid.UUID(int=255).bytes], pa.binary(16)), ["0" * 30 + "FF"]),
        ("string", pa.array([decimal.Decimal("1.50")]), ["1.50"]),
        ("int", pa.array([3.0, None]), [3, None]),
        ("int", pa.array(["20", "03"]), [20, 3]),
        ("int", pa.array(["20", "old"]), [20, None]),
        ("int", pa.array([DAY]), [1714521600000000]),
        ("int", pa.array([2**64 - 1, 5], pa.uint64()), [-1, 5]),
        ("float", pa.array(["2.5", "1e3"]), [2.5, 1000.0]),
        ("float", pa.array(["2.5", "nan", "old"]), [2.5, None, None]),
        ("float", pa.array([True]), [1.0]),
        ("float", pa.array([DAY]), [1714521600.0]),
    ],
)
@pytest.mark.parametrize("name", ["x", "order", 'Grö"ße (cm)'])
def test_derived_types_fit_if_the_remedy_is_followed(
    engine: Engine, name: str, dtype: RawType, array: pa.Array, expected: list[Any]
) -> None:
    def typed(values: pa.Array) -> pa.Array:
        return plain(cast(values, dtype, where="file", name=name, purpose="a key"))

    with pytest.raises(UserError) as raised:
        typed(array)
    assert typed(following(engine, str(raised.value), name, array)).to_pylist() == expected


@pytest.mark.parametrize(
    ("dtype", "array", "remedy"),
    [
        ("string", pa.array([float(2**60)]), "write the column as integers or text"),
        ("int", pa.array([float(2**60)]), "write the column as integers or text"),
        ("int", pa.array([1.5]), "declare dtype = 'float', or dtype = 'string'"),
        ("int", pa.array(["1.5", "2"]), "declare dtype = 'string'"),
        ("float", pa.array(["red", "blue"]), "declare dtype = 'string'"),
    ],
)
def test_no_remedy_recommends_a_lossy_cast(dtype: RawType, array: pa.Array, remedy: str) -> None:
    with pytest.raises(UserError) as raised:
        cast(array, dtype, where="file", name="x", purpose="a key")
    assert remedy in str(raised.value)
    assert "BIGINT" not in str(raised.value) and "DOUBLE" not in str(raised.value)


def test_decimals_without_fraction_are_keys(engine: Engine) -> None:
    array = pa.array([BIG, None], pa.decimal128(38, 0))
    found = cast(array, "string", where="file", name="x", purpose="a key")
    assert plain(found).to_pylist() == [str(10**30), None]


@pytest.mark.parametrize(
    ("dtype", "array", "expected"),
    [
        ("string", pa.array(["a|b", "c"]), [["a", "b"], ["c"]]),
        ("int", pa.array(["1|2", "3"]), [[1, 2], [3]]),
        ("string", pa.array([1, 2]), [["1"], ["2"]]),
        ("int", pa.array([1, 2]), [[1], [2]]),
        ("string", pa.array([[True]]), [["true"]]),
        ("int", pa.array([["1", "2"]]), [[1, 2]]),
    ],
)
def test_lists_fit_if_the_remedy_is_followed(
    engine: Engine, dtype: RawType, array: pa.Array, expected: list[Any]
) -> None:
    def typed(values: pa.Array) -> pa.Array:
        return plain(cast(values, dtype, where="f", name="x", purpose="a feature", lists=True))

    with pytest.raises(UserError) as raised:
        typed(array)
    assert typed(following(engine, str(raised.value), "x", array)).to_pylist() == expected


def microseconds(*time: int) -> int:
    return int(datetime.datetime(*time, tzinfo=UTC).timestamp()) * 10**6  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["03/04/2024"], [microseconds(2024, 4, 3)]),
        (["03/04/2024", "04/13/2024"], [microseconds(2024, 3, 4), microseconds(2024, 4, 13)]),
        (["3.4.2024 10:30"], [microseconds(2024, 4, 3, 10, 30)]),
        (["2024/04/03 10:30:01"], [microseconds(2024, 4, 3, 10, 30, 1)]),
        (["2024-04-03 10:00"], [microseconds(2024, 4, 3, 10)]),
        (["2024-04-03 10:00:00+02:00"], [microseconds(2024, 4, 3, 8)]),
        (
            ["2024-04-03", "2024-04-03T10:00:00+02"],
            [microseconds(2024, 4, 3), microseconds(2024, 4, 3, 8)],
        ),
        (["1700000000.5"], [1700000000.5]),
    ],
)
@pytest.mark.parametrize("name", ["ts", "Time (UTC)"])
def test_times_are_right_if_the_remedy_is_followed(
    engine: Engine, name: str, texts: list[str], expected: list[float]
) -> None:
    array = pa.array(texts)
    with pytest.raises(UserError) as raised:
        time_values("file", name, "samples.time", array)
    remedy = str(raised.value).split(", or ")[0]
    derived = following(engine, remedy, name, array)
    assert time_values("file", name, "samples.time", derived).tolist() == expected


# --------------------------------------------------------------------------------- share of matches


def samples(raw: Path, users: str, log_users: list[str], **options: Any) -> Config:
    """Write a log with one row per entry of `log_users` and a table of users."""
    lines = [f"{user},{i % 3},{i % 2},{i}" for i, user in enumerate(log_users)]
    (raw / "log.csv").write_text("\n".join(["user_id,item_id,label,t", *lines]) + "\n")
    (raw / "users.csv").write_text(users)
    table = {"interactions": "log.csv", "users": "users.csv", "time": "t", **options}
    features = [{"name": "user_id"}, {"name": "age", "dtype": "int"}]
    paths = {"raw": str(raw), "work": str(raw / "work")}
    return from_dict(Config, {"name": "x", "paths": paths, "samples": table, "features": features})


def made(config: Config) -> SamplesResult:
    return make_samples(config, overwrite=True, progress=False)


@pytest.mark.parametrize(("log", "table"), [("{:d}", "{:05d}"), ("{:05d}", "{:d}")])
def test_a_table_that_matches_nothing_is_refused_with_a_remedy(
    tmp_path: Path, log: str, table: str
) -> None:
    users = "user_id,age\n" + "".join(f"{table.format(i)},{20 + i}\n" for i in range(1, 10))
    keys = [log.format(1 + i % 9) for i in range(40)]
    with pytest.raises(UserError) as raised:
        made(samples(tmp_path, users, keys))
    text = str(raised.value)
    assert raised.value.field == str(tmp_path / "users.csv")
    assert f"'{log.format(1)}' against '{table.format(1)}'" in text and "samples.users" in text
    [expression] = re.findall(r"samples\.derive\.user_id = (\".*\")$", text)
    config = samples(tmp_path, users, keys, derive={"user_id": json.loads(expression)})
    result = made(config)
    assert result.matches["samples.users"] == {"file": "users.csv", "rows": 40, "matched": 40}
    assert result.warnings == ()
    found = pq.read_table(config.paths.of("samples") / "users_all.parquet").to_pylist()
    assert {int(row["user_id"]): row["age"] for row in found} == {i: 20 + i for i in range(1, 10)}


def test_a_low_share_of_matches_and_other_forms_of_keys_are_reported(tmp_path: Path) -> None:
    users = "user_id,age\n01,21\n2,22\n"
    result = made(samples(tmp_path, users, ["1", "1", "2", "3", "4"] * 8))
    assert result.matches["samples.users"]["matched"] == 8
    low, twin = result.warnings
    assert low.startswith(f"{tmp_path}/users.csv: only 20.0% of rows match")
    assert "'01' does not match '1'" in twin
    facts = json.loads((tmp_path / "work" / "samples" / "manifest.json").read_text())["meta"]
    assert facts["matches"] == result.matches


def test_columns_of_two_tables_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    config = samples(tmp_path, "user_id,Label,age\n1,0,20\n", ["1"] * 30)
    with pytest.raises(UserError, match="'label' and 'Label' differ only in case"):
        made(config)


def test_a_missing_label_has_a_remedy_that_works(tmp_path: Path) -> None:
    users = "user_id,age\n1,20\n2,nan\n"
    keys = ["1", "2", "2"] * 20
    with pytest.raises(UserError) as raised:
        made(samples(tmp_path, users, keys, label="age > 10"))
    assert "40 of 60 rows" in str(raised.value) and "for example null" in str(raised.value)
    [label] = re.findall(r"write (coalesce\(.*\)),", str(raised.value))
    assert sum(made(samples(tmp_path, users, keys, label=label)).positives.values()) == 20
    [drop] = re.findall(r"samples\.drop = (\".*\")$", str(raised.value))
    config = samples(tmp_path, users, keys, label="age > 10", drop=json.loads(drop))
    assert sum(made(config).rows.values()) == 20


def test_padded_keys_of_a_table_are_not_integers(tmp_path: Path) -> None:
    users = "user_id,age\n01,20\n2,30\n"
    features = [{"name": "user_id", "dtype": "int"}, {"name": "age", "dtype": "int"}]
    config = samples(tmp_path, users, ["1", "2"] * 20)
    pq.write_table(pa.table({"user_id": ["01", "2"], "age": [20, 30]}), tmp_path / "u.parquet")
    table = to_dict(config) | {"features": features}
    table["samples"]["users"] = "u.parquet"
    with pytest.raises(UserError, match="'01' is not how the number is written"):
        made(from_dict(Config, table))


def test_a_key_may_be_derived_of_a_column_with_a_space(tmp_path: Path) -> None:
    config = samples(tmp_path, "user_id,age\n1,20\n", ["1"] * 30, derive={"user_id": '"User ID"'})
    log = tmp_path / "log.csv"
    log.write_text(log.read_text().replace("user_id", "User ID"))
    assert made(config).matches["samples.users"]["matched"] == 30
