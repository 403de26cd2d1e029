"""The label join on Spark: the same expressions give the rows of DuckDB and of the reference."""

from __future__ import annotations

import datetime
import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ibis
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
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.thinning import keep_share
from tests.label_logs import Touch, colliding_log, join_labels
from tests.unit.test_label_join import config_of, ordered, run, write_log

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


class SparkEngine:
    """The methods of `Engine` that the label join uses, on a Spark session."""

    def __init__(self, session: SparkSession) -> None:
        """Hold a session."""
        self.session = session
        self.backend = ibis.pyspark.connect(session)
        self.warnings: list[str] = []
        self._numbers = itertools.count(1)

    def read(self, raw: Path, name: str, declared: object = None) -> Table:
        """Open a Parquet file."""
        return self._view(self.session.read.parquet(str(raw / name)))

    def materialize(self, table: Table) -> Table:
        """Compute a table and keep the result."""
        return self._view(self.session.sql(self.backend.compile(table)).localCheckpoint())

    def first(self, table: Table) -> dict[str, object] | None:
        """Return the first row."""
        rows = self.rows(table.limit(1))
        return rows[0] if rows else None

    def rows(self, table: Table) -> list[dict[str, Any]]:
        """Return all rows."""
        return cast(
            list[dict[str, Any]],
            self.session.sql(self.backend.compile(table)).toArrow().to_pylist(),
        )

    def _view(self, frame: Any) -> Table:
        name = f"label_join_{next(self._numbers)}"
        frame.createOrReplaceTempView(name)
        return self.backend.table(name)


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
    spec, engine = SampleSpec.of(config), SparkEngine(spark)
    file = tmp_path / "exposures.parquet"
    tables = open_tables(
        cast(Engine, engine), spec, tmp_path, engine.read(tmp_path, file.name), file
    )
    joined = join_feedback(cast(Engine, engine), spec, tables)
    expected = join_labels(exposures, feedback, (click, buy), end=55)
    settled, unsettled, in_duckdb = run(tmp_path, config)
    assert ordered(engine.rows(joined.table)) == ordered(expected.settled) == ordered(settled)
    assert ordered(engine.rows(joined.unsettled)) == ordered(unsettled)
    assert joined.facts == in_duckdb.facts
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

    zone = spark.conf.get("spark.sql.session.timeZone")
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    try:
        engine = SparkEngine(spark)
        ours = engine.rows(changed(engine.read(tmp_path, "rows.parquet")))
    finally:
        spark.conf.set("spark.sql.session.timeZone", str(zone))
    with connect() as duckdb:
        table = duckdb.read(tmp_path, "rows.parquet")
        theirs = pa.table(duckdb.collect(changed(table))).to_pylist()
    assert ordered(ours) == ordered(theirs)
    assert 14 < len(ours) < 40
