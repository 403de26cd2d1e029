"""Samples made with Spark equal those made with DuckDB."""

from __future__ import annotations

import datetime
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.config import Config
from hvdrec.config.data_sections import Task
from hvdrec.config.label_join import Exposures, Feedback
from hvdrec.errors import UserError
from hvdrec.samples import make_samples
from hvdrec.samples.engine import connect
from hvdrec.samples.make import ENGINES
from hvdrec.samples.spark_engine import connect_spark
from hvdrec.storage.artifacts import read_manifest
from tests.label_logs import colliding_log
from tests.unit.test_label_join import config_of, ordered, write_log
from tests.unit.test_samples import FEATURES, ITEMS, SPLITS, USERS, configured, write

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A log of 300 rows in three files, with users, items and prices by day."""
    dice, folder = random.Random(0), tmp_path / "raw"
    log = [
        {
            "user_id": f"u{dice.randrange(12)}",
            "item_id": dice.choice("abcdefghij"),
            "rating": dice.randrange(1, 6),
            "t": t // 2,
            "load": dice.choice([0.5, float("nan"), None, 2.0]),
        }
        for t in range(300)
    ]
    for part in range(3):
        write(folder / "log" / f"{part}.parquet", log[part::3])
    write(folder / "users.csv", USERS)
    write(folder / "items.parquet", ITEMS)
    days = [{"day": day, "price": day / 4} for day in range(0, 30, 2)]
    write(folder / "days.parquet", days)
    return folder


def made_by(engine: str, config: Config) -> tuple[Any, dict[str, list[Any]]]:
    """Make samples; return the facts in the manifest, and the rows of each table."""
    out = config.paths.of("samples")
    make_samples(config, engine=engine, overwrite=True, progress=False)
    manifest = read_manifest(out, "samples")
    names = sorted(name for name in manifest.files if name.endswith(".parquet"))
    return manifest.meta, {name: pq.read_table(out / name).to_pylist() for name in names}


@pytest.mark.parametrize(
    "changes",
    [
        {
            "history": [{"name": "liked", "length": 5, "repeats": False, "within": "20s"}],
            "negatives": {"per_positive": 2, "within": ["day"]},
            "weight": "coalesce(rating / 2, 1)",
            "drop": "rating = 2 AND t % 3 = 0",
        },
        pytest.param(
            {"split": {"method": "random-per-user"}, "negatives": {"rate": 0.5}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_spark_and_duckdb_make_the_same_samples(
    spark: SparkSession, raw: Path, changes: dict[str, Any]
) -> None:
    scene = {"side": "scene", "kind": "numeric", "dtype": "float"}
    names = ("price", "load", "weekday")
    derive = {
        "late": "t > 70",
        "day": "t // 5",
        # Division by zero gives NULL; days of the week count from Sunday = 0.
        "load": "load / (t % 7)",
        "weekday": "dayofweek(to_timestamp(t * 86400))",
    }
    config = configured(
        raw,
        [*FEATURES, *({"name": name, **scene} for name in names)],
        interactions="log",
        users="users.csv",
        derive=derive,
        joins=[{"table": "days.parquet", "on": ["day"]}],
        **changes,
    )
    config = replace(config, tasks=(Task("love", "CASE WHEN rating > 3 THEN rating = 5 END"),))
    (facts, tables), (spark_facts, spark_tables) = (made_by(e, config) for e in ENGINES)
    assert spark_facts == facts
    assert spark_tables == tables
    rows = [row for split in SPLITS for row in tables[f"{split}/part-00000.parquet"]]
    assert len(rows) > 100
    assert {row["weekday"] for row in rows} == set(range(7))
    assert any(row["load"] is None for row in rows)


@pytest.mark.slow
def test_spark_and_duckdb_make_the_same_samples_from_exposures_and_feedback(
    spark: SparkSession, tmp_path: Path
) -> None:
    click = Feedback("click", "click.parquet", ("request_id", "item_id"), "6s", skew="2s")
    buy = Feedback("buy", "buy.parquet", ("user_id", "item_id = asset"), "9s", value="value + 1")
    write_log(tmp_path / "raw", *colliding_log(1))
    config = config_of((click, buy), Exposures(end="55"))
    paths = replace(config.paths, raw=str(tmp_path / "raw"), work=str(tmp_path / "work"))
    (facts, tables), (spark_facts, spark_tables) = (
        made_by(engine, replace(config, paths=paths)) for engine in ENGINES
    )
    assert spark_facts == facts
    # Rows of the next run's tables have no order.
    ours, theirs = (
        {name: ordered(rows) if "unsettled" in name else rows for name, rows in each.items()}
        for each in (spark_tables, tables)
    )
    assert ours == theirs
    assert any("unsettled" in name and rows for name, rows in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("odd", [False, True])
def test_spark_keeps_the_types_of_columns(spark: SparkSession, tmp_path: Path, odd: bool) -> None:
    noon = datetime.datetime(2024, 5, 1, 12, 0, 0, 123456)
    columns: dict[str, pa.Array] = {
        "small": pa.array([1, None, 255], pa.uint8()),
        "large": pa.array([2**64 - 1, None, 0], pa.uint64()),
        "price": pa.array([1, None, 2], pa.decimal128(9, 2)),
        "day": pa.array([noon.date(), None, noon.date()]),
        "stamp": pa.array([noon, None, noon], pa.timestamp("us")),
        "zoned": pa.array([noon, None, noon], pa.timestamp("us", "UTC")),
        "raw": pa.array([b"a", None, b""]),
        "single": pa.array([0.5, math.nan, None], pa.float32()),
        "words": pa.array([["a"], None, []], pa.list_(pa.string())),
        "shade": pa.array(["x", None, "y"]).dictionary_encode(),
    }
    if odd:  # this process converts the file for Spark
        columns["clock"] = pa.array([noon.time(), None, noon.time()])
        columns["numbers"] = pa.array([[1.0, math.nan], None, []], pa.list_(pa.float32()))
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = []
    for opened in (connect(), connect_spark((), 1.0, tmp_path)):
        with opened as engine:
            table = engine.read(tmp_path, "t.parquet")
            table = engine.derive(table, "sum", "large::HUGEINT + small", "samples.derive.sum")
            stored = engine.keep(table, ["small"])
            found.append(engine.fetch(f"SELECT * FROM {stored.get_name()}"))
    assert found[1] == found[0]
    assert found[1]["sum"].to_pylist() == [2**64, 255, None]


@pytest.mark.parametrize(
    ("field", "expression", "words"),
    [
        ("samples.label", "stars > 3", "the columns are [user_id, item_id, rating"),
        ("samples.label", "sum(rating) OVER () > 9", "is a window over several rows"),
        pytest.param(
            "samples.weight",
            "CAST(item_id AS INTEGER)",
            "Could not convert string",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_errors_of_expressions_name_the_key_with_spark(
    spark: SparkSession, raw: Path, field: str, expression: str, words: str
) -> None:
    changes = {field.removeprefix("samples."): expression}
    config = configured(raw, interactions="log", users="users.csv", **changes)
    with pytest.raises(UserError) as raised:
        make_samples(config, engine="spark", progress=False)
    assert (raised.value.field, raised.value.value) == (field, expression)
    assert words in str(raised.value)
