"""The ranker's graph in a bundle, whose inputs are stored embeddings and raw scene values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from hvdrec.config.names import PREFIX
from hvdrec.config.schema import Side
from hvdrec.exporting.graphs import inner, joined, parsed, preprocessing, stored_width
from hvdrec.exporting.ranker_graph import core, pair_features, rename_input, request_features
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import output_name
from hvdrec.models.recommender import Recommender

PAIRED = f"{PREFIX}paired/"
"""Prefix of the names of a request's codes after they are repeated for each item of the request."""


def ranker(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return the graph that scores n items for r requests, each with one user and one scene.

    The inputs are ``user_embedding``, float32 [r, `stored_width`]; raw scene columns, [r], or
    [r, list length] for lists; ``item_embedding``, float32 [n, `stored_width`]; and ``request``,
    int64 [n], the number of the request to which each item belongs, from 0. The outputs are
    ``score``, a probability, and ``score_NAME`` for each task, float32 [n].
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
        repeated = [name for name in sources if name not in carried]
        parts = [_repeated(model, repeated), combining, *parts]
    parts = [*preprocessing(fitted, request_features(model), rows="requests"), *parts]
    sides: tuple[tuple[Side, str, str], ...] = (("item", PAIRED, "rows"), ("user", "", "requests"))
    for side, prefix, rows in sides:
        if model.schema.carried(side):
            name = model.schema.own_name(f"{side}_embedding")
            rename_input(parts[-1].graph, name, _represented(side))
            for value in parts[-1].graph.input:
                if value.name == name:
                    value.name = _represented(side)
            parts.insert(0, _unpacked(model, side, prefix, rows))
    return joined(*parts)


def _repeated(model: Recommender, codes: Sequence[str]) -> onnx.ModelProto:
    """Return the graph that turns codes of requests, [requests], into codes of items, [items]."""
    names = {"request": model.schema.own_name("request")}
    names |= {f"code{i}": code for i, code in enumerate(codes)}
    names |= {f"paired{i}": PAIRED + code for i, code in enumerate(codes)}
    numbers = range(len(codes))
    inputs = ["int64[rows] request", *(f"int64[requests] code{i}" for i in numbers)]
    outputs = [f"int64[rows] paired{i}" for i in numbers]
    nodes = [f"paired{i} = Gather (code{i}, request)" for i in numbers]
    return parsed("repeated", inputs, outputs, nodes, {}, names)


def _represented(side: Side) -> str:
    """Return the name of a side's embedding without the codes that are stored with it."""
    return inner(f"{side}/represented")


def _unpacked(model: Recommender, side: Side, prefix: str, rows: str) -> onnx.ModelProto:
    """Return the graph that splits stored embeddings into the model's representation and codes."""
    stored = stored_width(model, side)
    codes = [output_name(feature.name) for feature in model.schema.carried(side)]
    width, numbers = stored - len(codes), range(len(codes))
    parts = ", ".join(["represented", *(f"column{i}" for i in numbers)])
    nodes = [f"{parts} = Split <axis = 1> (stored, widths)"]
    for i in numbers:
        nodes.append(f"number{i} = Squeeze (column{i}, axis)")
        nodes.append(f"code{i} = Cast <to = {TensorProto.INT64}> (number{i})")
    names = {
        "stored": model.schema.own_name(f"{side}_embedding"),
        "represented": _represented(side),
    }
    names |= {f"code{i}": prefix + code for i, code in enumerate(codes)}
    local = (*(f"{kind}{i}" for kind in ("column", "number") for i in numbers), "widths", "axis")
    names |= {name: inner(f"{side}/{name}") for name in local}
    return parsed(
        "unpacked",
        [f"float[{rows}, {stored}] stored"],
        [f"float[{rows}, {width}] represented", *(f"int64[{rows}] code{i}" for i in numbers)],
        nodes,
        {"widths": np.array([width, *[1] * len(codes)]), "axis": np.array([1])},
        names,
    )
