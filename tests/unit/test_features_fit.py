"""What fitting learns from the training split: vocabularies, statistics, quantiles."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.config.schema import FIRST_CODE, MISSING, MISSING_INT, Feature, Schema
from hvdrec.errors import UserError
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted, fit
from hvdrec.features.graph import build

KEYS = (Feature("user"), Feature("item", side="item"))


def train(folder: Path, columns: Mapping[str, pa.Array], parts: int = 1) -> Path:
    """Write the training split of samples, in parts, and return the samples' directory."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    table = pa.table(
        {"user": pa.array(["u"] * rows), "item": pa.array(["i"] * rows), **dict(columns)}
    )
    size = -(-rows // parts)
    for part in range(parts):
        piece = table.slice(part * size, size)
        pq.write_table(piece, folder / f"train/part-{part:05d}.parquet")
    return folder


def learned(folder: Path, *features: Feature, **columns: pa.Array) -> Fitted:
    return fit(train(folder, columns), Schema((*KEYS, *features), "user", "item"))


def test_ties_are_sorted_by_the_bytes_of_the_value_and_rare_values_are_left_out(
    tmp_path: Path,
) -> None:
    words = ["b", "a", "Z", "é", "b", "a", "Z", "é", "b", "rare", "", None]
    fitted = learned(tmp_path, Feature("word", min_count=2), word=pa.array(words))
    assert fitted.features["word"].values == ["b", "Z", "a", "é"]
    assert fitted.sizes["word"] == FIRST_CODE + 4


def test_a_shared_vocabulary_comes_from_the_owners_column(tmp_path: Path) -> None:
    fitted = fit(
        train(
            tmp_path,
            {
                "item": pa.array(["x", "y", "x"]),
                "seen": pa.array([["y", "y", "elsewhere"], ["y"], []]),
                "last": pa.array(["y", "y", "elsewhere"]),
            },
        ),
        Schema(
            (*KEYS, Feature("seen", kind="sequence"), Feature("last", shares="item")),
            "user",
            "item",
        ),
    )
    for name in ("item", "seen", "last"):
        assert fitted.features[name].values == ["x", "y"]
    assert fitted.sizes == {"user": 3, "item": 4}


def test_the_missing_integer_is_ignored(tmp_path: Path) -> None:
    numbers = pa.array([1, 3, MISSING_INT, None])
    fitted = learned(
        tmp_path,
        Feature("code", dtype="int"),
        Feature("codes", kind="categorical_list", dtype="int"),
        Feature("size", kind="numeric", dtype="int"),
        Feature("rank", kind="numeric", dtype="int", transform="quantile", buckets=2),
        code=numbers,
        codes=pa.array([[MISSING_INT, 4], [4, None], [], None]),
        size=numbers,
        rank=numbers,
    )
    assert fitted.features["code"].values == [1, 3]
    assert fitted.features["codes"].values == [4]
    assert fitted.features["size"].statistics == {"mean": 2.0, "deviation": 1.0}
    assert fitted.features["rank"].statistics == {"boundaries": [1.0], "precision": "double"}


def test_constant_and_empty_columns_have_deviation_1(tmp_path: Path) -> None:
    fitted = learned(
        tmp_path,
        Feature("same", kind="numeric", dtype="float"),
        Feature("none", kind="numeric", dtype="float"),
        Feature("nowhere", kind="numeric", dtype="float", transform="quantile"),
        same=pa.array([0.1] * 1000),
        none=pa.array([math.nan, -math.inf, None, math.inf] * 250),
        nowhere=pa.array([None, math.nan] * 500, pa.float64()),
    )
    assert fitted.features["same"].statistics["mean"] == pytest.approx(0.1)
    assert fitted.features["same"].statistics["deviation"] == 1.0
    assert fitted.features["none"].statistics == {"mean": 0.0, "deviation": 1.0}
    assert fitted.features["nowhere"].statistics == {"boundaries": [], "precision": "double"}
    assert fitted.sizes["nowhere"] == FIRST_CODE + 1


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    st.integers(1, 8),
)
@settings(max_examples=25, deadline=None)
def test_boundaries_are_quantiles_of_the_sorted_values(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], buckets: int
) -> None:
    feature = Feature("x", kind="numeric", dtype="float", transform="quantile", buckets=buckets)
    folder = tmp_path_factory.mktemp("quantiles")
    fitted = learned(folder, feature, x=pa.array(values, pa.float64()))
    statistics = fitted.features["x"].statistics
    if statistics["precision"] == "float32":
        largest = float(np.finfo(np.float32).max)
        values = [float(np.float32(min(max(value, -largest), largest))) for value in values]
    # Position ceil(share * n / buckets), counted from 1, in integer arithmetic.
    positions = [-(-share * len(values) // buckets) - 1 for share in range(1, buckets)]
    uppers = sorted({sorted(values)[max(0, position)] for position in positions})
    assert fitted.sizes["x"] == FIRST_CODE + len(uppers) + 1
    for boundary, upper in zip(statistics["boundaries"], uppers, strict=True):
        lower = max((value for value in values if value < upper), default=-math.inf)
        assert lower < boundary <= upper
        # Neighbours are equally far, unless no number lies between them.
        if lower > -math.inf and boundary < upper:
            assert boundary == pytest.approx(lower / 2 + upper / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "precision"),
    [
        (np.array([0.1, 0.2, 0.3, 19.99, 1e-40, 3e38]), "float32"),
        (np.float32([0.1, 0.2, 0.3, 19.99]).astype(float), "float32"),
        # One price in two precisions is one price.
        (np.append(np.float32([0.1, 0.2, 0.3]).astype(float), [0.1, 0.2, 0.3]), "float32"),
        (1.7e9 + np.arange(100) / 3, "double"),
        (np.array([1e300, -1e300, 1e301, 1e302]), "double"),
    ],
)
def test_a_value_has_one_code_in_the_precisions_it_comes_in(
    tmp_path: Path, values: np.ndarray, precision: str
) -> None:
    feature = Feature("x", kind="numeric", dtype="float", transform="quantile", buckets=9)
    fitted = learned(tmp_path, feature, x=pa.array(values))
    statistics = fitted.features["x"].statistics
    assert statistics["precision"] == precision
    between = np.array(statistics["boundaries"])
    near = [np.nextafter(between, side) for side in (-np.inf, np.inf)]
    random = np.random.default_rng(0).normal(0, 10, 2000)
    tried = np.concatenate(
        [values, between, *near, random, [0.0, -0.0, 5e-324, -1e308, np.nan, np.inf, -np.inf]]
    )
    encoder = Encoder(fitted)
    codes = encoder.encode([feature], pa.table({"x": tried}))["x"].to_numpy()
    session = onnxruntime.InferenceSession(build(fitted, ["x"]).SerializeToString())
    assert session.run(None, {"x": tried})[0].tolist() == codes.tolist()
    dtype = np.float32 if precision == "float32" else np.float64
    by_hand = FIRST_CODE + np.searchsorted(between.astype(dtype), tried.astype(dtype), "right")
    by_hand[~np.isfinite(tried)] = MISSING
    assert codes.tolist() == by_hand.tolist()
    if precision == "float32":
        single = tried[np.abs(tried) < 3e38]
        narrow, wide = (
            encoder.encode([feature], pa.table({"x": each}))["x"].to_numpy()
            for each in (single.astype(np.float32).astype(float), single)
        )
        assert narrow.tolist() == wide.tolist()


def test_fitting_the_same_rows_is_deterministic_bit_for_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    columns = {
        "x": pa.array(random.lognormal(3, 4, 300_000)),
        "word": pa.array([f"w{n}" for n in random.integers(0, 999, 300_000)]),
    }
    samples = train(tmp_path, columns, parts=3)
    features = (
        Feature("x", kind="numeric", dtype="float", transform="log"),
        Feature("word", min_count=200),
    )
    texts = set()
    for attempt in range(3):
        out = tmp_path / str(attempt)
        out.mkdir()
        fit(samples, Schema((*KEYS, *features), "user", "item")).save(out)
        texts.add(
            (out / "fitted.json").read_text() + str(pq.read_table(out / "vocabulary/word.parquet"))
        )
    assert len(texts) == 1
    fact = json.loads(texts.pop().split("\n}\n")[0] + "}")["fitted"]["x"]
    logs = np.log1p(columns["x"].to_numpy())
    assert fact["mean"] == pytest.approx(logs.mean(), rel=1e-12)
    assert fact["deviation"] == pytest.approx(logs.std(), rel=1e-12)


@pytest.mark.parametrize("name", ["run[1]", "all*", "what?", "it's", "{a,b}"])
def test_wildcards_in_the_name_of_a_directory_are_literal(tmp_path: Path, name: str) -> None:
    fitted = learned(tmp_path / name, Feature("word"), word=pa.array(["a", "b", "a"]))
    assert fitted.features["word"].values == ["a", "b"]


def test_numbers_without_a_finite_mean_are_refused(tmp_path: Path) -> None:
    huge = pa.array([1e200, -1e200, 3.0])
    with pytest.raises(UserError) as error:
        learned(tmp_path, Feature("x", kind="numeric", dtype="float"), x=huge)
    assert (error.value.field, error.value.value) == ("features.x.transform", "standardize")
    for part in ("mean 1.0", "deviation inf", "'log'", "'quantile'"):
        assert part in str(error.value)
    logs = Feature("x", kind="numeric", dtype="float", transform="log")
    assert learned(tmp_path, logs, x=huge).features["x"].statistics["deviation"] > 100


@pytest.mark.parametrize(
    ("feature", "column", "text"),
    [
        (Feature("x"), pa.array([1]), "column 'x' is int64, its feature needs string"),
        (
            Feature("x", dtype="int"),
            pa.array([1.0]),
            "column 'x' is double, its feature needs int64",
        ),
        (
            Feature("x", kind="numeric", dtype="float"),
            pa.array([1]),
            "column 'x' is int64, its feature needs double",
        ),
        (
            Feature("x", kind="categorical_list"),
            pa.array(["a"]),
            "column 'x' is string, its feature needs list<item: string>",
        ),
        (
            Feature("x", kind="categorical_list", dtype="int"),
            pa.array([["a"]]),
            "its feature needs list<item: int64>",
        ),
        (Feature("x"), pa.array([["a"]]), "its feature needs string"),
        (Feature("y"), pa.array(["a"]), "column 'y' is missing; the file has [user, item, x]"),
    ],
)
def test_columns_of_wrong_types_are_refused(
    tmp_path: Path, feature: Feature, column: Any, text: str
) -> None:
    with pytest.raises(UserError) as error:
        learned(tmp_path, feature, x=column)
    assert str(error.value).startswith(f"{tmp_path}/train/part-00000.parquet: column '")
    assert text in str(error.value)
    assert "make the samples again" in str(error.value)


def test_missing_files_and_files_of_another_format_are_refused(tmp_path: Path) -> None:
    schema = Schema(KEYS, "user", "item")
    with pytest.raises(UserError) as error:
        fit(tmp_path, schema)
    assert error.value.field == f"{tmp_path}/train"
    assert "no Parquet files; make the samples again" in str(error.value)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/part-00000.parquet").write_text("user,item\n")
    with pytest.raises(
        UserError, match=r"part-00000.parquet: is not readable as Parquet \(.*; make"
    ):
        fit(tmp_path, schema)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fitted.json: is missing; run hvdrec prepare"):
        Fitted.load(tmp_path)
    learned(tmp_path, Feature("word"), word=pa.array(["a"])).save(tmp_path)
    (tmp_path / "vocabulary/word.parquet").unlink()
    with pytest.raises(UserError, match=r"word.parquet: is missing; run hvdrec prepare"):
        Fitted.load(tmp_path)
    (tmp_path / "vocabulary/word.parquet").write_text("a")
    with pytest.raises(UserError, match=r"word.parquet: is damaged \(.*; run hvdrec prepare"):
        Fitted.load(tmp_path)
    (tmp_path / "fitted.json").write_text('{"schema": ')
    with pytest.raises(UserError, match=r"fitted.json: is damaged \(.*; run hvdrec prepare"):
        Fitted.load(tmp_path)
