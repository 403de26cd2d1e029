"""The ranker's graph in a bundle, whose inputs are stored embeddings and raw scene values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from hvdrec.config.schema import Side
from hvdrec.exporting.graphs import joined, parsed, preprocessing, stored_width
from hvdrec.exporting.ranker_graph import core, pair_features, rename_input, request_features
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import output_name
from hvdrec.models.recommender import Recommender

PAIRED = "paired/"
"""Prefix of the names of a request's codes after they are repeated for each of its items."""


def ranker(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return the graph that scores N items for R requests, each with one user and one scene.

    Inputs: ``user_embedding`` float32 [R, `stored_width`], raw scene columns [R] or [R, L] (lists),
    ``item_embedding`` float32 [N, `stored_width`], and ``request`` int64 [N], the number of the
    request (0 to R - 1) to which each item belongs. Outputs: ``score`` float32 [N], a probability,
    and ``score_NAME`` float32 [N] for each task.
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
    """Return the graph that gives each of N items the codes of its request: [R] -> [N]."""
    inputs = ["int64[rows] request", *(f"int64[requests] {name}" for name in names)]
    outputs = [f'int64[rows] "{PAIRED}{name}"' for name in names]
    nodes = [f'"{PAIRED}{name}" = Gather ({name}, request)' for name in names]
    return parsed("repeated", inputs, outputs, nodes, {})


def _unpacked(model: Recommender, side: Side, prefix: str, rows: str) -> onnx.ModelProto:
    """Return the graph that splits stored embeddings into the model's representation and codes."""
    name, stored = f"{side}_embedding", stored_width(model, side)
    codes = [output_name(feature.name) for feature in model.schema.carried(side)]
    width = stored - len(codes)
    represented = f'"{name}/represented"'
    parts = ", ".join([represented, *(f'"{code}/column"' for code in codes)])
    nodes = [f'{parts} = Split <axis = 1> ({name}, "{name}/widths")']
    for code in codes:
        nodes.append(f'"{code}/stored" = Squeeze ("{code}/column", "{name}/axis")')
        nodes.append(f'"{prefix}{code}" = Cast <to = {TensorProto.INT64}> ("{code}/stored")')
    return parsed(
        "unpacked",
        [f"float[{rows}, {stored}] {name}"],
        [
            f"float[{rows}, {width}] {represented}",
            *(f'int64[{rows}] "{prefix}{code}"' for code in codes),
        ],
        nodes,
        {f"{name}/widths": np.array([width, *[1] * len(codes)]), f"{name}/axis": np.array([1])},
    )
