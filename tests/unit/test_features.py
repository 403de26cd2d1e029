"""Fitting, the preprocessing graph and encoding give the same codes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.config import Config
from hvdrec.config.data_sections import Encode, Samples
from hvdrec.config.schema import Feature
from hvdrec.errors import UserError
from hvdrec.features.encode import encode
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted, fit
from hvdrec.features.graph import build, output_name
from hvdrec.features.kinds.nodes import HASH_PRIME, hash_coefficients
from hvdrec.features.raw import rows_to_inputs
from hvdrec.storage.artifacts import read_manifest, write_artifact

FEATURES = (
    Feature("user", min_count=2),
    Feature("seen", kind="sequence", max_length=3),
    Feature("age", kind="numeric", dtype="float"),
    Feature("income", kind="numeric", dtype="int", transform="log"),
    Feature("item", side="item"),
    Feature("tags", side="item", kind="categorical_list", dtype="int", max_length=2),
    Feature("price", side="item", kind="numeric", dtype="float", transform="quantile", buckets=3),
    Feature("hour", side="scene", dtype="int"),
    Feature("shop", side="scene", kind="hashed", dtype="int", buckets=10),
)
TYPES = {
    "user": pa.string(),
    "seen": pa.list_(pa.string()),
    "age": pa.float64(),
    "income": pa.int64(),
    "item": pa.string(),
    "tags": pa.list_(pa.int64()),
    "price": pa.float64(),
    "hour": pa.int64(),
    "shop": pa.int64(),
}
SCHEMA = pa.schema(TYPES)
CONFIG = Config(
    name="test",
    features=FEATURES,
    samples=Samples(user="user", item="item"),
    encode=Encode(shard_rows=3, row_group_rows=2),
)

ROWS: list[dict[str, Any]] = [
    dict(
        user="a", seen=["x", "y"], age=10.0, income=0, item="x", tags=[7], price=1.0, hour=3, shop=5
    ),
    dict(user="a", seen=[], age=20.0, income=3, item="x", tags=[7, 8], price=2.0, hour=3, shop=-5),
    dict(
        user="b",
        seen=None,
        age=math.nan,
        income=None,
        item="y",
        tags=[],
        price=None,
        hour=None,
        shop=None,
    ),
    dict(
        user="",
        seen=["", None, "z"],
        age=math.inf,
        income=-3,
        item="z",
        tags=None,
        price=3.0,
        hour=4,
        shop=2**62,
    ),
    dict(
        user=None,
        seen=list("xyzx"),
        age=None,
        income=8,
        item="x",
        tags=[8, 7, 9],
        price=4.0,
        hour=4,
        shop=0,
    ),
]


def samples(
    folder: Path, rows: list[dict[str, Any]] = ROWS, test: list[dict[str, Any]] = ROWS
) -> Path:
    """Write a samples artifact: `rows` for training and validation, `test` for the test split."""
    out = folder / "samples"
    with write_artifact(out, "samples") as draft:
        for split, part in (("train", rows), ("validation", rows), ("test", test)):
            (draft / split).mkdir()
            table = pa.Table.from_pylist(part, SCHEMA)
            table = table.append_column(
                "label", pa.array([n % 2 for n in range(len(part))], pa.float32())
            )
            table = table.append_column("weight", pa.array([1.0] * len(part), pa.float32()))
            # Keys are never null in samples.
            for key in ("user", "item"):
                filled = pa.array([row[key] or "?" for row in part], pa.string())
                table = table.set_column(table.column_names.index(key), key, filled)
            pq.write_table(table, draft / split / "part-00000.parquet")
        everyone = [*rows, *test]
        users = {
            row["user"] or "?": {n: row[n] for n in ("seen", "age", "income")} for row in everyone
        }
        items = {row["item"] or "?": {n: row[n] for n in ("tags", "price")} for row in everyone}
        for name, key, values in (("users_train", "user", users), ("items", "item", items)):
            table = pa.Table.from_pylist(
                [{key: k, **values[k]} for k in sorted(values)],
                pa.schema(
                    [(key, pa.string()), *((n, TYPES[n]) for n in next(iter(values.values())))]
                ),
            )
            pq.write_table(table, draft / f"{name}.parquet")
    return out


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fit(samples(tmp_path_factory.mktemp("fit")), CONFIG.schema)


def run(fitted: Fitted, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return the graph's outputs for raw rows."""
    names = [feature.name for feature in FEATURES]
    session = onnxruntime.InferenceSession(build(fitted, names).SerializeToString())
    inputs = rows_to_inputs(CONFIG.schema.columns(), pa.Table.from_pylist(rows, SCHEMA))
    outputs = session.run([output_name(name) for name in names], inputs)
    return dict(zip(names, outputs, strict=True))


def test_vocabularies_are_sorted_by_falling_count_then_value(fitted: Fitted) -> None:
    assert fitted.features["item"].values == ["x", "y", "z"]
    assert fitted.features["seen"].values == ["x", "y", "z"]
    assert fitted.features["tags"].values == [7, 8, 9]
    assert fitted.features["hour"].values == [3, 4]
    # "?" is the user of the two rows without one; b occurs once.
    assert fitted.features["user"].values == ["?", "a"]
    assert fitted.sizes == {"user": 4, "item": 5, "tags": 5, "price": 5, "hour": 4, "shop": 12}


def test_statistics_ignore_values_that_are_not_finite(fitted: Fitted) -> None:
    assert fitted.features["age"].statistics["mean"] == 15.0
    assert fitted.features["age"].statistics["deviation"] == 5.0
    logs = [0.0, math.log(4), -math.log(4), math.log(9)]
    assert fitted.features["income"].statistics["mean"] == pytest.approx(np.mean(logs))
    assert fitted.features["income"].statistics["deviation"] == pytest.approx(np.std(logs))


def test_codes_by_hand(fitted: Fitted) -> None:
    codes = run(fitted, ROWS)
    assert codes["user"].tolist() == [3, 3, 1, 0, 0]
    assert codes["item"].tolist() == [2, 2, 3, 4, 2]
    # Sequences keep their last three; lists their first two; 0 is missing and padding.
    assert codes["seen"].tolist() == [[0, 2, 3], [0, 0, 0], [0, 0, 0], [0, 0, 4], [3, 4, 2]]
    assert codes["tags"].tolist() == [[2, 0], [2, 3], [0, 0], [0, 0], [3, 2]]
    assert codes["age"].tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]
    assert codes["hour"].tolist() == [2, 2, 0, 3, 3]
    assert codes["price"].tolist() == [2, 3, 0, 4, 4]


def test_unknown_values_have_code_1(fitted: Fitted) -> None:
    row = dict(
        user="new", seen=["new"], age=1.0, income=1, item="new", tags=[1], price=0.0, hour=9, shop=1
    )
    codes = run(fitted, [row])
    assert [codes[n].tolist() for n in ("user", "seen", "item", "tags", "hour")] == [
        [1],
        [[1]],
        [1],
        [[1]],
        [1],
    ]


@given(st.lists(st.integers(-(2**63) + 1, 2**63 - 1), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_hashes_equal_those_of_exact_integers(fitted: Fitted, values: list[int]) -> None:
    session = onnxruntime.InferenceSession(build(fitted, ["shop"]).SerializeToString())
    codes = session.run(None, {"shop": np.array(values, np.int64)})[0]
    a, c, b = hash_coefficients("shop", 2)
    for value, code in zip(values, codes.tolist(), strict=True):
        high = value // HASH_PRIME % HASH_PRIME
        mixed = (a * (value % HASH_PRIME) + c * high + b) % HASH_PRIME
        assert code == 2 + mixed % 10


def test_hash_spreads_evenly(fitted: Fitted) -> None:
    session = onnxruntime.InferenceSession(build(fitted, ["shop"]).SerializeToString())
    codes = session.run(None, {"shop": np.arange(100_000)})[0]
    counts = np.bincount(codes, minlength=12)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:].min() > 9_500


words = st.one_of(
    st.none(), st.sampled_from(["", "a", "b", "x", "y", "z", "new", "ü", "\U0001f600"])
)
whole = st.one_of(st.none(), st.integers(-5, 9), st.integers(-(2**63) + 1, 2**63 - 1))
real = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=64))
raw_rows = st.lists(
    st.fixed_dictionaries(
        {
            "user": words,
            "seen": st.one_of(st.none(), st.lists(words, max_size=6)),
            "age": real,
            "income": whole,
            "item": words,
            "tags": st.one_of(st.none(), st.lists(whole, max_size=5)),
            "price": real,
            "hour": whole,
            "shop": whole,
        }
    ),
    max_size=8,
)


@given(raw_rows)
@settings(max_examples=60, deadline=None)
def test_encoding_distinct_values_equals_running_the_graph_on_rows(
    fitted: Fitted, rows: list[dict[str, Any]]
) -> None:
    table = pa.Table.from_pylist(rows, SCHEMA)
    encoded = Encoder(fitted).encode(FEATURES, table)
    expected = run(fitted, rows)
    for feature in FEATURES:
        got = encoded[feature.name]
        if feature.is_list:
            kept = [[code for code in row if code] for row in expected[feature.name].tolist()]
            assert got.to_pylist() == kept
            assert got.type.value_type == pa.int32()
        else:
            np.testing.assert_array_equal(
                got.to_numpy(zero_copy_only=False), expected[feature.name]
            )
            assert np.isfinite(got.to_numpy(zero_copy_only=False)).all()


def test_save_and_load_give_the_same_graph(fitted: Fitted, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    names = [feature.name for feature in FEATURES]
    again = Fitted.load(tmp_path)
    assert again.sizes == fitted.sizes
    assert build(again, names).SerializeToString() == build(fitted, names).SerializeToString()


def test_encode_writes_even_shards_and_indices(tmp_path: Path) -> None:
    meta = encode(samples(tmp_path), tmp_path / "features", CONFIG)
    assert meta["shards"] == {"train": [2, 3], "validation": [2, 3], "test": [2, 3]}
    assert read_manifest(tmp_path / "features", "features").meta["rows"]["train"] == 5
    rows = pq.read_table(tmp_path / "features/train")
    users = pq.read_table(tmp_path / "features/users.parquet")
    items = pq.read_table(tmp_path / "features/items.parquet")
    assert users["key"].to_pylist() == ["?", "a", "b"]
    assert rows["user_index"].to_pylist() == [1, 1, 2, 0, 0]
    assert rows["item_index"].to_pylist() == [0, 0, 1, 2, 0]
    # Labels are 0, 1, 0, 1, 0.
    assert items["train_count"].to_pylist() == [1, 0, 1]
    assert rows["seen"].type.value_type == pa.int32()
    assert rows["age"].type == pa.float32()


def test_the_vocabulary_comes_from_the_training_split_alone(tmp_path: Path) -> None:
    test = [dict(ROWS[0], item="later", hour=23)]
    encode(samples(tmp_path, test=test), tmp_path / "features", CONFIG)
    assert "later" not in Fitted.load(tmp_path / "features").features["item"].values
    rows = pq.read_table(tmp_path / "features/test")
    assert [rows["item"][0].as_py(), rows["hour"][0].as_py()] == [1, 1]


def test_wrong_type_and_missing_column_are_named(tmp_path: Path) -> None:
    folder = samples(tmp_path)
    part = folder / "validation/part-00000.parquet"
    table = pq.read_table(part)
    place = table.column_names.index("hour")
    pq.write_table(table.set_column(place, "hour", table["hour"].cast(pa.string())), part)
    # The manifest's sizes are checked first, so they must fit the new file.
    from hvdrec.storage.artifacts import write_manifest

    write_manifest(folder, "samples", {})
    with pytest.raises(UserError, match="column 'hour' is string, its feature needs int64"):
        encode(folder, tmp_path / "features", CONFIG)
    pq.write_table(table.drop(["hour"]), part)
    write_manifest(folder, "samples", {})
    with pytest.raises(UserError, match=r"part-00000.parquet: column 'hour' is missing; .*\[user"):
        encode(folder, tmp_path / "features", CONFIG)
    assert not (tmp_path / "features").exists()
