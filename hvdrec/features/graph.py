"""Compile fitted features into the preprocessing graph, from raw values to inputs of the model.

This ONNX graph is the only implementation of preprocessing: `prepare` encodes the samples with it,
and each graph in a bundle begins with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, ValueInfoProto, helper

from hvdrec.config.names import PREFIX
from hvdrec.config.schema import Column, Feature
from hvdrec.features.fit import Fitted
from hvdrec.features.kinds.kind import kind_of
from hvdrec.features.kinds.nodes import Nodes

OPSET = 20
ML_OPSET = 4
IR_VERSION = 10
RAW_TYPES = {
    "string": TensorProto.STRING,
    "int": TensorProto.INT64,
    "float": TensorProto.DOUBLE,
}


def output_name(name: str) -> str:
    """Return the name that a feature's output has in the preprocessing graph."""
    return f"{PREFIX}code/{name}"


def build(fitted: Fitted, names: Sequence[str]) -> onnx.ModelProto:
    """Compile features into one graph.

    Args:
        fitted: The fitted features.
        names: Names of the features to compile.

    Returns:
        A graph with one input for each raw column: string, int64 or double, of shape [rows], or
        [rows, longest list] for lists. If a feature combines the codes of other features that are
        not in `names`, these codes are inputs, too: int64 [rows], named by `output_name`. Each
        feature has an output, named by `output_name`: codes, int64 with the shape of the input
        (lists cut to ``max_length``), or numbers, float32 [rows].
    """
    schema = fitted.schema
    features = [schema[name] for name in names]
    # Put features that combine the codes of other features last.
    ordered = sorted(features, key=lambda feature: len(feature.sources) > 0)
    inputs: dict[str, ValueInfoProto] = {}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for feature in ordered:
        columns = kind_of(feature).columns(feature)
        inputs |= {column.name: _raw_input(column) for column in columns}
        for name in map(output_name, feature.sources):
            if name not in map(output_name, names):
                inputs[name] = helper.make_tensor_value_info(name, TensorProto.INT64, ["rows"])
        part = Nodes(f"{PREFIX}node/{feature.name}")
        raw = [_cut(part, column) for column in columns]
        sources = [output_name(name) for name in feature.sources]
        result = kind_of(feature).compile(part, fitted.features[feature.name], [*raw, *sources])
        part.add("Identity", result, output=output_name(feature.name))
        nodes += part.nodes
        constants += part.constants
    graph = helper.make_graph(
        nodes, "preprocess", list(inputs.values()), [_output(f) for f in features], constants
    )
    model = helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("", OPSET),
            helper.make_opsetid("ai.onnx.ml", ML_OPSET),
        ],
        producer_name="hvdrec",
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model


def _raw_input(column: Column) -> ValueInfoProto:
    shape = ["rows", f"{column.name}_length"] if column.is_list else ["rows"]
    return helper.make_tensor_value_info(column.name, RAW_TYPES[column.dtype], shape)


def _output(feature: Feature) -> ValueInfoProto:
    dtype = TensorProto.INT64 if feature.is_embedded else TensorProto.FLOAT
    shape = ["rows", f"{feature.name}_kept"] if feature.is_list else ["rows"]
    return helper.make_tensor_value_info(output_name(feature.name), dtype, shape)


def _cut(nodes: Nodes, column: Column) -> str:
    """Cut lists to ``max_length``: a sequence keeps its last entries, other lists the first."""
    if not column.is_list:
        return column.name
    length = column.max_length
    start, stop = (-length, 2**62) if column.is_sequence else (0, length)
    bounds = [nodes.constant(np.array([bound], np.int64)) for bound in (start, stop, 1)]
    return nodes.add("Slice", column.name, *bounds)
