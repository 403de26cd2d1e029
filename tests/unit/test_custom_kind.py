"""A kind that a user registers: two raw columns, learned statistics, ONNX nodes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.config.schema import Schema
from hvdrec.errors import UserError
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted, fit
from hvdrec.features.graph import build, output_name
from hvdrec.features.kinds import (
    Column,
    Feature,
    FittedFeature,
    Kind,
    Nodes,
    TrainingSplit,
    register_kind,
)
from hvdrec.features.raw import rows_to_inputs
from hvdrec.features.sample_checks import check_file


class Ratio(Kind):
    """The quotient of two numbers over its largest value in the training split; 0 if missing."""

    dtypes = ("float",)

    def check(self, feature: Feature) -> None:
        if len(feature.columns) != 2:
            raise feature.invalid("columns", "ratio needs two columns")

    def columns(self, feature: Feature) -> tuple[Column, ...]:
        return tuple(feature.raw_column(name, "numeric") for name in feature.columns)

    def is_embedded(self, feature: Feature) -> bool:
        return False

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        above, below = (split.values(column) for column in self.columns(feature))
        largest = above.max("v").fetchall()[0][0] / below.min("v").fetchall()[0][0]
        return FittedFeature(feature, statistics={"largest": largest})

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        (above, no_above), (below, no_below) = (nodes.number(name, "float") for name in inputs)
        missing = nodes.add("Or", no_above, no_below)
        one = nodes.double(1.0)
        ratio = nodes.add("Div", above, nodes.add("Where", missing, one, below))
        scaled = nodes.add("Div", ratio, nodes.double(fitted.statistics["largest"]))
        known = nodes.add("Where", missing, nodes.double(0.0), scaled)
        return nodes.cast(known, np.float32)


register_kind("ratio", Ratio())
SCHEMA = Schema(
    (
        Feature("user"),
        Feature("item", side="item"),
        Feature("price", side="item", kind="numeric", dtype="float"),
        Feature("per_gram", "item", "ratio", "float", columns=("price", "weight_g")),
    ),
    "user",
    "item",
)
TABLE = pa.table(
    {
        "user": ["a", "b", "c"],
        "item": ["x", "y", "z"],
        "price": pa.array([8.0, 2.0, None]),
        "weight_g": pa.array([4.0, 2.0, 1.0]),
    }
)


@pytest.fixture
def fitted(tmp_path: Path) -> Fitted:
    (tmp_path / "train").mkdir()
    pq.write_table(TABLE, tmp_path / "train/part-00000.parquet")
    return fit(tmp_path, SCHEMA)


def test_raw_columns_follow_from_the_kind() -> None:
    assert [(c.name, c.side, c.dtype, c.kind) for c in SCHEMA.columns()] == [
        ("user", "user", "string", "categorical"),
        ("item", "item", "string", "categorical"),
        ("price", "item", "float", "numeric"),
        ("weight_g", "item", "float", "numeric"),
    ]
    with pytest.raises(UserError) as error:
        Feature("x", "item", "ratio", "float", columns=("price",))
    assert (error.value.field, error.value.value) == ("features.x.columns", ("price",))


def test_two_columns_are_fitted_encoded_and_compiled_alike(fitted: Fitted, tmp_path: Path) -> None:
    expected = np.array([2 / 8, 1 / 8, 0], np.float32)  # largest: 8 / 1
    encoded = Encoder(fitted).encode(SCHEMA.features, TABLE)
    assert encoded["per_gram"].type == pa.float32()
    assert encoded["per_gram"].to_pylist() == expected.tolist()
    fitted.save(tmp_path)
    names = [feature.name for feature in SCHEMA.features]
    graph = build(Fitted.load(tmp_path), names).SerializeToString()
    inputs = rows_to_inputs(SCHEMA.columns(), TABLE)
    [result] = onnxruntime.InferenceSession(graph).run([output_name("per_gram")], inputs)
    np.testing.assert_array_equal(result, expected)


def test_a_missing_second_column_is_named(tmp_path: Path) -> None:
    pq.write_table(TABLE.drop(["weight_g"]), tmp_path / "part.parquet")
    with pytest.raises(UserError, match="column 'weight_g' is missing"):
        check_file(tmp_path / "part.parquet", SCHEMA.columns())


def test_one_column_has_one_type() -> None:
    price = Feature("price", side="item", kind="numeric", dtype="int")
    with pytest.raises(UserError, match="column 'price'") as error:
        Schema((price, SCHEMA["per_gram"]), "user", "item")
    assert error.value.field == "features.per_gram"


def test_names_belong_to_one_kind() -> None:
    class Other(Ratio):
        """Another kind."""

    register_kind("ratio", Ratio())
    taken: Any
    for taken in ("ratio", "numeric"):
        with pytest.raises(ValueError, match="already registered"):
            register_kind(taken, Other())
