"""`prepare` on Spark writes the shards that it writes in process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hvdrec
from hvdrec.config import Config, Encode, Feature, Paths, Samples
from hvdrec.config.schema import MISSING_INT
from hvdrec.errors import UserError, invalid_value
from hvdrec.features.duckdb_split import open_duckdb_split
from hvdrec.features.spark_split import SparkSplit
from hvdrec.storage.artifacts import read_manifest, write_artifact

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

FEATURES = (
    Feature("user"),
    Feature("seen", kind="sequence", dtype="int", max_length=3),
    Feature("words", kind="categorical_list", max_length=2, min_count=2),
    Feature("age", kind="numeric", dtype="float"),
    Feature("spent", kind="numeric", dtype="float", transform="log"),
    Feature("item", side="item", dtype="int"),
    Feature("stock", side="item", kind="numeric", dtype="int", transform="quantile", buckets=4),
    Feature("price `€`", "item", "numeric", "float", transform="quantile", buckets=8),
    Feature("both", "item", "crossed", columns=("item", "stock"), buckets=16),
    Feature("hour", side="scene", kind="hashed", dtype="int", buckets=8, default=12),
)
USERS, ITEMS, SPLITS = 20, 15, ("train", "validation", "test")


def drawn(seed: int, rows: int) -> pa.Table:
    """Return rows with nulls, missing values, NaN, infinity, empty lists and lists too long."""
    random = np.random.default_rng(seed)

    def some(values: list[Any], length: int) -> list[Any]:
        return [values[n] for n in random.integers(0, len(values), length)]

    def lists(values: list[Any]) -> list[Any]:
        kept = [some(values, int(n)) for n in random.integers(0, 6, rows)]
        return [None if random.random() < 0.1 else row for row in kept]

    odd = [None, float("nan"), float("inf"), -0.0, 0.0]
    times = 1_600_000_000_000_000 + random.integers(0, 10**12, rows)
    prices = [*odd, *random.gamma(2, 5, 60)]
    return pa.table(
        {
            "time": pa.array(times, pa.timestamp("us")),
            "user": [f"ü{n}" for n in random.integers(0, USERS, rows)],
            "item": random.integers(0, ITEMS, rows),
            "seen": pa.array(lists([None, MISSING_INT, *range(ITEMS)]), pa.list_(pa.int64())),
            "words": pa.array(lists([None, "", "a", "b", "Z", "ü", "é"]), pa.list_(pa.string())),
            "age": pa.array(some([*odd, *random.normal(40, 9, 50)], rows), pa.float64()),
            "spent": pa.array(some([*odd, *random.normal(0, 100, 50)], rows), pa.float64()),
            "stock": pa.array(some([None, MISSING_INT, *range(40)], rows), pa.int64()),
            "price `€`": pa.array(some(prices, rows), pa.float64()),
            "hour": pa.array(some([None, *range(24)], rows), pa.int64()),
            "label": pa.array(random.integers(0, 2, rows), pa.float32()),
            "weight": pa.array(random.uniform(0, 2, rows), pa.float32()),
        }
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with samples, in a directory whose name has wildcards and a space."""
    work = tmp_path_factory.mktemp("run") / "a [b] *{c}"
    with write_artifact(work / "samples", "samples") as draft:
        for seed, split in enumerate(SPLITS):
            (draft / split).mkdir()
            for part in range(2):
                file = draft / split / f"part-{part:05d}.parquet"
                pq.write_table(drawn(10 * seed + part, 150), file, row_group_size=64)
        users = drawn(1, USERS).select(["seen", "words", "age", "spent"])
        users = users.append_column("user", pa.array([f"ü{n}" for n in range(USERS)]))
        pq.write_table(users, draft / "users_train.parquet")
        items = drawn(2, ITEMS).select(["stock", "price `€`"])
        pq.write_table(items.append_column("item", pa.array(range(ITEMS))), draft / "items.parquet")
    return Config(
        name="test",
        paths=Paths(work=str(work)),
        features=FEATURES,
        samples=Samples(user="user", item="item"),
        encode=Encode(shard_rows=70, row_group_rows=33),
    )


def test_both_engines_write_the_same_features(config: Config, spark: SparkSession) -> None:
    features = config.paths.of("features")
    here = hvdrec.prepare(config, workers=1, progress=False)
    before = read_manifest(features, "features")
    there = hvdrec.prepare(config, overwrite=True, progress=False, engine="spark")
    assert there == here
    assert there.rows == {split: 300 for split in SPLITS}
    after = read_manifest(features, "features")
    # Means and deviations may differ in their last bits; all shards and vocabularies are equal.
    assert before.files.keys() == after.files.keys()
    changed = {name for name in before.files if before.files[name] != after.files[name]}
    assert changed <= {"fitted.json", "preprocess.onnx"}
    assert sum(name.endswith(".parquet") for name in after.files) == 3 * 5 + 2 + 3
    assert after.meta == before.meta


def test_both_engines_fit_the_same(config: Config, spark: SparkSession) -> None:
    samples = config.paths.of("samples")
    assert isinstance(samples, Path)
    there = SparkSplit(spark, samples / "train", "time")
    columns = {column.name: column for column in config.schema.columns()}
    with open_duckdb_split(samples, config.schema) as here:
        for column in (columns["words"], columns["seen"]):
            for after in (None, 18_524.5):
                far, near = (each.occurrences(column, after) for each in (there, here))
                assert far.to_pydict() == near.to_pydict()
        age = columns["age"]
        for transform in ("standardize", "log"):
            expected = pytest.approx(here.moments(age, transform), rel=1e-12)
            assert there.moments(age, transform) == expected
        with there.sorted_numbers(age) as far, here.sorted_numbers(age) as near:
            assert far.count == near.count > 200
            everywhere = range(near.count)
            assert far.at(everywhere).tolist() == near.at(everywhere).tolist()
            values = np.unique(near.at(everywhere))
            for limits in (values, values.astype(np.float32)):
                lowers = near.largest_below(limits)
                assert lowers.tolist() == [-np.inf, *limits[:-1]]
                assert far.largest_below(limits).tolist() == lowers.tolist()


@pytest.mark.parametrize(
    "times",
    [
        pa.array([1_700_000_000_123, None, 1_600_000_000_000]),
        pa.array([1.7e9 + 0.1, None]),
        pa.array([17_000, None, 18_001], pa.date32()),
        pa.array([1_700_000_000_123_456, None], pa.timestamp("us", "Europe/Paris")),
    ],
    ids=lambda times: str(times.type),
)
def test_both_engines_see_the_same_days(
    tmp_path: Path, times: pa.Array, config: Config, spark: SparkSession
) -> None:
    (tmp_path / "train").mkdir()
    pq.write_table(pa.table({"time": times}), tmp_path / "train" / "part-00000.parquet")
    with open_duckdb_split(tmp_path, config.schema) as here:
        assert here.newest_day is not None
        assert SparkSplit(spark, tmp_path / "train", "time").newest_day == here.newest_day


def test_an_error_in_an_executor_is_that_of_the_task(spark: SparkSession) -> None:
    from hvdrec.parallel.spark import SparkPool

    pool = SparkPool(spark)
    assert list(pool.map(refuse_odd, range(0, 30, 2))) == list(range(0, 60, 4))
    with pytest.raises(UserError, match="must be even") as caught:
        list(pool.map(refuse_odd, [2, 4, 3, 5]))
    assert (caught.value.field, caught.value.value) == ("number", 3)
    with pytest.raises(UserError, match="ZeroDivisionError: division by zero") as caught:
        list(pool.map(invert, [1, 0]))
    assert "\n" not in str(caught.value)


def refuse_odd(number: int) -> int:
    if number % 2:
        raise invalid_value("number", number, "must be even")
    return 2 * number


def invert(number: int) -> float:
    return 1 / number


def test_a_number_of_workers_is_refused(config: Config) -> None:
    with pytest.raises(UserError, match="leave it out") as caught:
        hvdrec.prepare(config, workers=2, engine="spark")
    assert (caught.value.field, caught.value.value) == ("workers", 2)
    with pytest.raises(UserError, match="duckdb") as caught:
        hvdrec.prepare(config, engine="sparc")
    assert (caught.value.field, caught.value.value) == ("engine", "sparc")
