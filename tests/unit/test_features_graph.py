"""The preprocessing graph against plain Python, for every kind and for extreme values."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.config.schema import FIRST_CODE, MISSING, MISSING_INT, UNKNOWN, Feature, Schema
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import build, output_name
from hvdrec.features.kinds import FittedFeature
from hvdrec.features.kinds.nodes import HASH_PRIME, hash_coefficients
from hvdrec.features.kinds.numeric import LARGEST
from hvdrec.features.raw import ARRAY_TYPES

WORDS = ["b", "a", "ü", "a b", "nul\0inside", "\U0001f600"]
NUMBERS = [7, -1, 0, 2**63 - 1, -(2**63) + 1]
BOUNDARIES = [-1.5, 0.0, 2.0]
MOMENTS = {"mean": 2.0, "deviation": 4.0}

LEARNED = (
    FittedFeature(Feature("user"), 8, WORDS),
    FittedFeature(Feature("item", side="item"), 8, WORDS),
    FittedFeature(Feature("seen", kind="sequence", max_length=3), 8, WORDS),
    FittedFeature(Feature("tags", kind="categorical_list", max_length=3), 8, WORDS),
    FittedFeature(Feature("codes", kind="categorical_list", dtype="int", max_length=1), 7, NUMBERS),
    FittedFeature(Feature("hour", dtype="int"), 7, NUMBERS),
    FittedFeature(Feature("age", kind="numeric", dtype="float"), statistics=MOMENTS),
    FittedFeature(Feature("size", kind="numeric", dtype="int"), statistics=MOMENTS),
    FittedFeature(
        Feature("cost", kind="numeric", dtype="float", transform="log"),
        statistics={"mean": 1.0, "deviation": 0.5},
    ),
    FittedFeature(
        Feature("price", kind="numeric", dtype="float", transform="quantile"),
        6,
        statistics={"boundaries": BOUNDARIES},
    ),
    FittedFeature(
        Feature("count", kind="numeric", dtype="int", transform="quantile"),
        6,
        statistics={"boundaries": BOUNDARIES},
    ),
    FittedFeature(
        Feature("one", kind="numeric", dtype="float", transform="quantile", buckets=1),
        3,
        statistics={"boundaries": []},
    ),
    FittedFeature(Feature("shop", kind="hashed", dtype="int", buckets=100), 102),
)
FITTED = Fitted(
    Schema(tuple(learned.feature for learned in LEARNED), "user", "item"),
    {learned.feature.name: learned for learned in LEARNED},
)


@pytest.fixture(scope="module")
def session() -> Any:
    model = build(FITTED, [learned.feature.name for learned in LEARNED])
    return onnxruntime.InferenceSession(model.SerializeToString())


def run_one(feature: Feature, values: Any) -> np.ndarray:
    """Return the codes that the graph of one feature gives."""
    model = build(FITTED, [feature.name])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    array = np.array(values, ARRAY_TYPES[feature.dtype])
    codes: np.ndarray = session.run([output_name(feature.name)], {feature.name: array})[0]
    return codes


def expected_code(learned: FittedFeature, value: Any) -> float:
    """Return one value's code in plain Python."""
    feature = learned.feature
    if value == MISSING_INT or value == "":
        return MISSING
    if feature.has_vocabulary:
        assert learned.values is not None
        known = value in learned.values
        return FIRST_CODE + learned.values.index(value) if known else UNKNOWN
    if feature.kind == "hashed":
        a, c, b = hash_coefficients(feature.name, 2)
        mixed = (a * (value % HASH_PRIME) + c * (value // HASH_PRIME) + b) % HASH_PRIME
        return FIRST_CODE + mixed % feature.buckets
    number = float(value)
    if not math.isfinite(number):
        return 0
    if feature.transform == "quantile":
        return FIRST_CODE + bisect_right(learned.statistics["boundaries"], number)
    if feature.transform == "log":
        number = math.copysign(math.log(1 + abs(number)), number)
    scaled = (number - learned.statistics["mean"]) / learned.statistics["deviation"]
    return float(np.float32(min(max(scaled, -LARGEST), LARGEST)))


RAW: dict[str, st.SearchStrategy[Any]] = {
    "string": st.sampled_from(["", "new", " b", "B", "nul", "nul\0", "u\u0308", *WORDS]),
    "int": st.one_of(
        st.sampled_from([MISSING_INT, 2**53 + 1, -HASH_PRIME, *NUMBERS]),
        st.integers(-(2**63) + 1, -1),
        st.integers(-3, 3),
        st.integers(0, 2**63 - 1),
    ),
    "float": st.one_of(
        st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1.7e308, 5e-324, *BOUNDARIES]),
        st.floats(-4, 4),
        st.floats(),
    ),
}


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Draw raw inputs of all features for a number of rows, and for lists a length, 0 included."""
    rows = draw(st.integers(0, 5))
    arrays = {}
    for learned in LEARNED:
        feature = learned.feature
        shape = (rows, draw(st.integers(0, 5))) if feature.is_list else (rows,)
        count = math.prod(shape)
        values = draw(st.lists(RAW[feature.dtype], min_size=count, max_size=count))
        array = np.empty(count, ARRAY_TYPES[feature.dtype])
        array[:] = values
        arrays[feature.name] = array.reshape(shape)
    return arrays


@given(arrays=inputs())
@settings(max_examples=100, deadline=None)
def test_codes_are_those_of_plain_python(session: Any, arrays: dict[str, np.ndarray]) -> None:
    names = [learned.feature.name for learned in LEARNED]
    outputs = session.run([output_name(name) for name in names], arrays)
    for learned, codes in zip(LEARNED, outputs, strict=True):
        feature, raw = learned.feature, arrays[learned.feature.name]
        if feature.is_list:
            cut = slice(-feature.max_length, None) if feature.is_sequence else slice(3)
            raw = raw[:, cut] if feature.name != "codes" else raw[:, :1]
        expected = np.array([expected_code(learned, value) for value in raw.ravel().tolist()])
        assert codes.dtype == (np.int64 if feature.is_embedded else np.float32)
        assert codes.shape == raw.shape
        # The logarithms of two libraries may differ in the last bit.
        tolerance = 1e-6 if feature.transform == "log" else 0
        np.testing.assert_allclose(codes.ravel(), expected, rtol=tolerance, atol=tolerance)


def test_a_value_on_a_boundary_is_in_the_upper_bucket() -> None:
    price = FITTED.schema["price"]
    assert run_one(price, [-9, -1.5, -1.4, 0.0, 2.0, 9.0]).tolist() == [2, 3, 3, 4, 5, 5]


def test_standardized_values_by_hand() -> None:
    assert run_one(FITTED.schema["age"], [2, 6, -2, math.nan]).tolist() == [0, 1, -1, 0]
    assert run_one(FITTED.schema["size"], [2, 6, -2, MISSING_INT]).tolist() == [0, 1, -1, 0]
    assert run_one(FITTED.schema["age"], [1e308, -1e308]).tolist() == [LARGEST, -LARGEST]
    # ln(1 + e - 1) = 1 is the mean; ln(1 + 0) = 0 lies two deviations below it.
    assert run_one(FITTED.schema["cost"], [math.e - 1, 0]).tolist() == pytest.approx([0, -2])


def test_the_graph_names_and_types_its_inputs_and_outputs() -> None:
    model = build(FITTED, ["seen", "hour"])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert [(i.name, i.type, len(i.shape)) for i in session.get_inputs()] == [
        ("seen", "tensor(string)", 2),
        ("hour", "tensor(int64)", 1),
    ]
    assert [(o.name, o.type, len(o.shape)) for o in session.get_outputs()] == [
        (output_name("seen"), "tensor(int64)", 2),
        (output_name("hour"), "tensor(int64)", 1),
    ]
    assert {entry.domain: entry.version for entry in model.opset_import} == {
        "": 20,
        "ai.onnx.ml": 4,
    }


def test_a_vocabulary_may_be_empty() -> None:
    learned = {**FITTED.features, "user": FittedFeature(Feature("user"), 2, [])}
    session = onnxruntime.InferenceSession(
        build(Fitted(FITTED.schema, learned), ["user"]).SerializeToString()
    )
    assert session.run(None, {"user": np.array(["", "a"], object)})[0].tolist() == [0, 1]
