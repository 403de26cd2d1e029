"""Fitted features as one ONNX graph from raw values to model inputs.

The graph is all there is of preprocessing: shards are encoded by it and the bundle carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hvdrec.config.schema import FIRST_CODE, MISSING, MISSING_INT, UNKNOWN, Feature
from hvdrec.features.fit import HASH_PRIME, Fitted, FittedFeature, hash_coefficients

OPSET = 20
ML_OPSET = 4
IR_VERSION = 10
RAW_TYPES = {
    "string": TensorProto.STRING,
    "int": TensorProto.INT64,
    "float": TensorProto.DOUBLE,
}


LARGEST = 1e6
"""Standardized numbers are clipped to this many deviations."""


def output_name(name: str) -> str:
    """Return the name of a feature's output in the preprocessing graph."""
    return f"{name}__code"


@dataclass
class _Nodes:
    """The nodes and constants of one feature, under names of its own."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        name = output or f"{self.prefix}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """Append a constant and return its name."""
        name = f"{self.prefix}/constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def build(fitted: Fitted, names: Sequence[str]) -> onnx.ModelProto:
    """Compile features into one graph.

    For each feature: an input of its name, string, int64 or double, [N] or (lists) [N, L], and an
    output `output_name`: int64 codes of the same shape, lists cut to their max_length, or
    float32 [N] for a number.
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    inputs, outputs = [], []
    for name in names:
        feature = fitted.schema[name]
        part = _Nodes(name)
        _compile(part, fitted, feature)
        nodes += part.nodes
        constants += part.constants
        shape = ["rows", f"{name}_length"] if feature.is_list else ["rows"]
        cut = ["rows", f"{name}_kept"] if feature.is_list else ["rows"]
        kind = TensorProto.INT64 if feature.is_embedded else TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(name, RAW_TYPES[feature.dtype], shape))
        outputs.append(helper.make_tensor_value_info(output_name(name), kind, cut))
    return _model(nodes, "preprocess", inputs, outputs, constants)


def build_positions(keys: Sequence[Any], *, string: bool) -> onnx.ModelProto:
    """Compile distinct keys into a graph: input ``key``, string or int64 [N], output ``position``.

    ``position`` is the int64 [N] place of each key among `keys`, -1 where it is none of them.
    """
    part = _Nodes("key")
    kind = "strings" if string else "int64s"
    places = {f"keys_{kind}": [*keys], "values_int64s": [*range(len(keys))], "default_int64": -1}
    part.add("LabelEncoder", "key", output="position", domain="ai.onnx.ml", **places)
    raw = TensorProto.STRING if string else TensorProto.INT64
    key = helper.make_tensor_value_info("key", raw, ["rows"])
    position = helper.make_tensor_value_info("position", TensorProto.INT64, ["rows"])
    return _model(part.nodes, "positions", [key], [position], [])


def _model(
    nodes: list[onnx.NodeProto],
    name: str,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: list[onnx.TensorProto],
) -> onnx.ModelProto:
    model = helper.make_model(
        helper.make_graph(nodes, name, inputs, outputs, constants),
        opset_imports=[
            helper.make_opsetid("", OPSET),
            helper.make_opsetid("ai.onnx.ml", ML_OPSET),
        ],
        producer_name="hvdrec",
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model


def _compile(part: _Nodes, fitted: Fitted, feature: Feature) -> None:
    raw = feature.name
    if feature.is_list:
        raw = _truncate(part, raw, feature)
    compilers: dict[str, Callable[[_Nodes, str, FittedFeature], None]] = {
        "categorical": _vocabulary,
        "categorical_list": _vocabulary,
        "sequence": _vocabulary,
        "numeric": _quantile if feature.transform == "quantile" else _standardize,
        "hashed": _hashed,
    }
    compilers[feature.kind](part, raw, fitted.features[feature.name])


def _truncate(part: _Nodes, raw: str, feature: Feature) -> str:
    """Keep the last (sequences) or the first (lists) max_length columns."""
    length = feature.max_length
    start, stop = (-length, 2**62) if feature.kind == "sequence" else (0, length)
    bounds = [part.constant(np.array([bound], np.int64)) for bound in (start, stop, 1)]
    return part.add("Slice", raw, *bounds)


def _vocabulary(part: _Nodes, raw: str, fitted: FittedFeature) -> None:
    values = fitted.values
    assert values is not None
    codes = [MISSING, *range(FIRST_CODE, FIRST_CODE + len(values))]
    attributes: dict[str, Any] = {"values_int64s": codes, "default_int64": UNKNOWN}
    if fitted.feature.dtype == "string":
        attributes["keys_strings"] = ["", *values]
    else:
        attributes["keys_int64s"] = [MISSING_INT, *(int(value) for value in values)]
    output = output_name(fitted.feature.name)
    part.add("LabelEncoder", raw, output=output, domain="ai.onnx.ml", **attributes)


def _number(part: _Nodes, raw: str, feature: Feature) -> tuple[str, str]:
    """Return a double without NaN and infinities (0 in their place), and a mask of where they were.

    An integer becomes the nearest double: exact up to 2^53, above that within 1 part in 2^53, in
    fitting as here.
    """
    if feature.dtype == "int":
        missing = part.add("Equal", raw, part.constant(np.array(MISSING_INT, np.int64)))
        number = part.add("Cast", raw, to=TensorProto.DOUBLE)
    else:
        # ONNX Runtime has no IsInf for doubles everywhere: a difference that is no zero tells.
        difference = part.add("Sub", raw, raw)
        zero = part.constant(np.array(0.0, np.float64))
        missing = part.add("Not", part.add("Equal", difference, zero))
        number = raw
    return part.add("Where", missing, part.constant(np.array(0.0, np.float64)), number), missing


def _standardize(part: _Nodes, raw: str, fitted: FittedFeature) -> None:
    number, missing = _number(part, raw, fitted.feature)
    if fitted.feature.transform == "log":
        magnitude = part.add("Add", part.add("Abs", number), part.constant(np.array(1.0)))
        number = part.add("Mul", part.add("Sign", number), part.add("Log", magnitude))
    centered = part.add("Sub", number, part.constant(np.array(fitted.mean)))
    scaled = part.add("Div", centered, part.constant(np.array(fitted.deviation)))
    # Far outliers must not become infinities among float32.
    limits = [part.constant(np.array(limit)) for limit in (-LARGEST, LARGEST)]
    scaled = part.add("Clip", scaled, *limits)
    known = part.add("Where", missing, part.constant(np.array(0.0)), scaled)
    part.add("Cast", known, output=output_name(fitted.feature.name), to=TensorProto.FLOAT)


def _quantile(part: _Nodes, raw: str, fitted: FittedFeature) -> None:
    """Code FIRST_CODE + the number of boundaries that are not above the value."""
    assert fitted.boundaries is not None
    number, missing = _number(part, raw, fitted.feature)
    column = part.add("Unsqueeze", number, part.constant(np.array([1], np.int64)))
    boundaries = part.constant(fitted.boundaries.astype(np.float64)[None, :])
    above = part.add("GreaterOrEqual", column, boundaries)
    counted = part.add("Cast", above, to=TensorProto.INT64)
    bucket = part.add("ReduceSum", counted, part.constant(np.array([1], np.int64)), keepdims=0)
    code = part.add("Add", bucket, part.constant(np.array(FIRST_CODE, np.int64)))
    zero = part.constant(np.array(MISSING, np.int64))
    part.add("Where", missing, zero, code, output=output_name(fitted.feature.name))


def _hashed(part: _Nodes, raw: str, fitted: FittedFeature) -> None:
    """Code FIRST_CODE + ((a * low + c * high + b) mod p) mod buckets; see `hash_coefficients`.

    ONNX takes the sign of a remainder from the divisor, but divides integers towards zero: of a
    negative x, floor(x / p) is (x + 1) / p - 1, which cannot overflow either.
    """
    feature = fitted.feature

    def number(value: int) -> str:
        return part.constant(np.array(value, np.int64))

    a, c, b = hash_coefficients(feature.name)
    prime = number(HASH_PRIME)
    low = part.add("Mod", raw, prime)
    negative = part.add("Cast", part.add("Less", raw, number(0)), to=TensorProto.INT64)
    quotient = part.add("Div", part.add("Add", raw, negative), prime)
    high = part.add("Mod", part.add("Sub", quotient, negative), prime)
    mixed = part.add("Mul", low, number(a))
    mixed = part.add("Add", mixed, part.add("Mul", high, number(c)))
    mixed = part.add("Mod", part.add("Add", mixed, number(b)), prime)
    bucket = part.add("Mod", mixed, number(feature.buckets))
    code = part.add("Add", bucket, number(FIRST_CODE))
    missing = part.add("Equal", raw, number(MISSING_INT))
    part.add("Where", missing, number(MISSING), code, output=output_name(feature.name))
