"""A feature may read a column of another name, and several features may read one column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hvdrec
from hvdrec.config import Config, Feature, History, Paths, Samples, Schema
from hvdrec.errors import UserError

ROWS = 400


def test_two_features_of_one_column(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    log = {
        "Kunden-Nr.": [f"u{u}" for u in draw.integers(0, 9, ROWS)],
        "item": [f"i{i}" for i in draw.integers(0, 7, ROWS)],
        "t": np.arange(ROWS),
        "click": draw.random(ROWS) < 0.5,
        "price": draw.uniform(1, 9, ROWS),
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    price = {"side": "item", "kind": "numeric", "dtype": "float", "column": "price"}
    config = Config(
        "run",
        (
            Feature("user", column="Kunden-Nr."),
            Feature("clicks", kind="sequence", column="recent"),
            Feature("item", "item"),
            Feature("level", **price),  # type: ignore[arg-type]
            Feature("bucket", transform="quantile", buckets=4, **price),  # type: ignore[arg-type]
        ),
        paths=Paths(raw=str(tmp_path), work=str(tmp_path / "work")),
        samples=Samples(
            interactions="log.parquet",
            user="Kunden-Nr.",
            item="item",
            time="t",
            label="click",
            history=(History("recent", length=5),),
        ),
    )
    samples = hvdrec.make_samples(config, progress=False)
    columns = set(pq.read_schema(next(Path(samples.path, "train").glob("*.parquet"))).names)
    assert {"Kunden-Nr.", "item", "price", "recent"} <= columns
    assert not columns & {"user", "level", "bucket", "clicks"}
    prepared = hvdrec.prepare(config, workers=1, progress=False)
    train = pq.read_table(Path(prepared.path, "train")).to_pandas()
    assert {"user", "clicks", "item", "level", "bucket"} <= set(train.columns)
    assert train.level.mean() == pytest.approx(0, abs=1e-5)
    assert train.bucket.nunique() == 4
    assert np.corrcoef(train.level, train.bucket)[0, 1] > 0.9
    assert train.user.nunique() == 9


@pytest.mark.parametrize(
    ("features", "field"),
    [
        ((Feature("a", column="x"), Feature("b", dtype="int", column="x")), "features.b"),
        (
            (
                Feature("a", kind="categorical_list", max_length=3, column="x"),
                Feature("b", kind="categorical_list", max_length=4, column="x"),
            ),
            "features.b.column",
        ),
        (
            (Feature("a", "scene", default="p"), Feature("b", "scene", column="a")),
            "features.b.column",
        ),
    ],
)
def test_features_of_one_column_must_agree(features: tuple[Feature, ...], field: str) -> None:
    with pytest.raises(UserError) as raised:
        Schema(features, "user", "item")
    assert raised.value.field == field


def test_column_and_columns_exclude_each_other() -> None:
    with pytest.raises(UserError) as raised:
        Feature("pair", kind="crossed", columns=("a", "b"), column="a")
    assert raised.value.field == "features.pair.column"
