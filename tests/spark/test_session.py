"""The fixture itself: what the other tests of this directory rely on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def test_python_workers_run_this_environment(spark: SparkSession) -> None:
    def squares(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import hvdrec

        for batch in batches:
            numbers = batch.column("id").to_numpy()
            files = [hvdrec.__file__] * len(numbers)
            yield pa.RecordBatch.from_pydict({"square": numbers**2, "file": files})

    import hvdrec

    rows = spark.range(1000).mapInArrow(squares, "square long, file string").collect()
    assert sorted(row.square for row in rows) == [n * n for n in range(1000)]
    assert {row.file for row in rows} == {hvdrec.__file__}
