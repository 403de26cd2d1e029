"""The label join on Spark: the same expressions give the rows of DuckDB and of the reference."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ibis.expr.types import Table

from hvdrec.config.data_sections import Negatives
from hvdrec.config.label_join import Exposures, Feedback
from hvdrec.samples.clock import clock
from hvdrec.samples.engine import Engine, connect
from hvdrec.samples.exposures import join_feedback
from hvdrec.samples.label_tables import open_tables
from hvdrec.samples.spark_engine import connect_spark
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.thinning import keep_share
from tests.label_logs import Touch, colliding_log, join_labels
from tests.unit.test_label_join import config_of, ordered, run, write_log

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def rows_of(engine: Engine, table: Table) -> list[dict[str, Any]]:
    """Return the rows of a table in any order."""
    rows: list[dict[str, Any]] = pa.table(engine.collect(table)).to_pylist()
    return rows


@pytest.mark.parametrize(
    ("seed", "click_touch", "buy_touch", "key"),
    [
        (1, "last", "every", ()),
        pytest.param(2, "first", "last", ("t",), marks=pytest.mark.slow),
    ],
)
def test_spark_gives_the_rows_of_duckdb_and_of_the_reference(
    spark: SparkSession, tmp_path: Path, seed: int, click_touch: Touch, buy_touch: Touch, key: Any
) -> None:
    click = Feedback(
        "click", "click.parquet", ("request_id", "item_id"), "6s", skew="2s", touch=click_touch
    )
    buy = Feedback(
        "buy", "buy.parquet", ("user_id", "item_id = asset"), "9s",
        value="value", key=key, skew="1s", touch=buy_touch,
    )  # fmt: skip
    exposures, feedback = colliding_log(seed)
    write_log(tmp_path, exposures, feedback)
    config = config_of((click, buy), Exposures(end="55"))
    spec, file = SampleSpec.of(config), tmp_path / "exposures.parquet"
    expected = join_labels(exposures, feedback, (click, buy), end=55)
    in_duckdb = run(tmp_path, config)
    with connect_spark((), 1.0, tmp_path) as engine:
        tables = open_tables(engine, spec, tmp_path, engine.read(tmp_path, file.name), file)
        joined = join_feedback(engine, spec, tables)
        settled, unsettled = (rows_of(engine, t) for t in (joined.table, joined.unsettled))
    assert ordered(settled) == ordered(expected.settled) == ordered(in_duckdb[0])
    assert ordered(unsettled) == ordered(in_duckdb[1])
    assert joined.facts == in_duckdb[2].facts
    assert joined.facts["feedback"] == expected.counts
    assert all(count for count in expected.counts["click"].values())


def test_spark_reads_times_and_thins_negatives_as_duckdb_does(
    spark: SparkSession, tmp_path: Path
) -> None:
    moment = datetime.datetime(2024, 5, 1, 10, 30, 0, 123456)
    rows = [
        {
            "user_id": f"u{i}", "item_id": "x", "t": i, "label": float(i % 3 == 0), "weight": 1.0,
            "float": i + 0.1234567, "stamp": moment - datetime.timedelta(days=i * 9000),
            "zoned": (moment + datetime.timedelta(seconds=i)).replace(tzinfo=datetime.UTC),
            "day": moment.date() - datetime.timedelta(days=i * 9000),
        }
        for i in range(40)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    click = Feedback("click", "click.parquet", ("item_id",), "6s")
    samples = replace(config_of((click,)).samples, negatives=Negatives(rate=0.5))
    names = ("t", "float", "stamp", "zoned", "day")

    def changed(table: Table) -> Table:
        thinned = keep_share(table, samples, ["label"], "weight")
        return thinned.mutate(**{name: clock(thinned[name], "s") for name in names})

    with connect_spark((), 1.0, tmp_path) as engine:
        ours = rows_of(engine, changed(engine.read(tmp_path, "rows.parquet")))
    with connect() as duckdb:
        table = duckdb.read(tmp_path, "rows.parquet")
        theirs = rows_of(duckdb, changed(table))
    assert ordered(ours) == ordered(theirs)
    assert 14 < len(ours) < 40
