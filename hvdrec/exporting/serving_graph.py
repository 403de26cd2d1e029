"""The ranker's graph as a bundle contains it: over stored embeddings and raw scene values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hvdrec.config.schema import Side
from hvdrec.exporting.graphs import joined, preprocessing, stored_width
from hvdrec.exporting.ranker_graph import core, pair_features, rename_input, request_features
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import IR_VERSION, OPSET, output_name
from hvdrec.models.recommender import Recommender

PAIRED = "paired/"
"""Prefix of the codes of a request that are repeated for each of its items."""


def ranker(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return the graph that scores pairs of stored embeddings in the scenes of requests.

    Inputs: ``user_embedding`` float32 [R, `stored_width`], raw scene columns [R],
    ``item_embedding`` float32 [N, `stored_width`], and ``request`` int64 [N], the row of the user
    and the scene that each item is scored for. Outputs: ``score`` float32 [N], a probability, and
    with tasks ``score_NAME`` of each.
    """
    pairs = pair_features(model)
    parts = [core(model)]
    if pairs:
        [combining] = preprocessing(fitted, pairs, "pairs")
        sources = [value.name for value in combining.graph.input]
        for value in combining.graph.input:
            rename_input(combining.graph, value.name, PAIRED + value.name)
            value.name = PAIRED + value.name
        carried = {output_name(feature.name) for feature in model.schema.carried("item")}
        parts = [_repeated([name for name in sources if name not in carried]), combining, *parts]
    parts = [*preprocessing(fitted, request_features(model), rows="requests"), *parts]
    sides: tuple[tuple[Side, str, str], ...] = (("item", PAIRED, "rows"), ("user", "", "requests"))
    for side, prefix, rows in sides:
        if model.schema.carried(side):
            name = f"{side}_embedding"
            rename_input(parts[-1].graph, name, f"{name}/represented")
            for value in parts[-1].graph.input:
                if value.name == name:
                    value.name = f"{name}/represented"
            parts.insert(0, _unpacked(model, side, prefix, rows))
    return joined(*parts)


def _repeated(names: Sequence[str]) -> onnx.ModelProto:
    """Return the graph that gathers codes [R] by ``request`` into codes [N]."""
    nodes = [helper.make_node("Gather", [name, "request"], [PAIRED + name]) for name in names]
    inputs = [_codes(name, "requests") for name in names] + [_codes("request", "rows")]
    outputs = [_codes(PAIRED + name, "rows") for name in names]
    return _model(helper.make_graph(nodes, "repeated", inputs, outputs))


def _unpacked(model: Recommender, side: Side, prefix: str, rows: str) -> onnx.ModelProto:
    """Return the graph that splits stored embeddings into representations and codes."""
    name, stored = f"{side}_embedding", stored_width(model, side)
    carried = [output_name(feature.name) for feature in model.schema.carried(side)]
    width = stored - len(carried)
    constants = {f"{name}/start": [0], f"{name}/stop": [width], f"{name}/axis": [1]}
    represented = f"{name}/represented"
    nodes = [helper.make_node("Slice", [name, *constants], [represented])]
    outputs = [helper.make_tensor_value_info(represented, TensorProto.FLOAT, [rows, width])]
    initializers = [
        numpy_helper.from_array(np.array(value, np.int64), key) for key, value in constants.items()
    ]
    for column, code in enumerate(carried, start=width):
        index = np.array(column, np.int64)
        initializers.append(numpy_helper.from_array(index, f"{code}/column"))
        column_name = f"{code}/stored"
        nodes.append(helper.make_node("Gather", [name, f"{code}/column"], [column_name], axis=1))
        nodes.append(helper.make_node("Cast", [column_name], [prefix + code], to=TensorProto.INT64))
        outputs.append(_codes(prefix + code, rows))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, stored])]
    return _model(helper.make_graph(nodes, "unpacked", inputs, outputs, initializers))


def _codes(name: str, rows: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, [rows])


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
