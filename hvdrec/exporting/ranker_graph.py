"""The ranker's ONNX graph, which computes once per request what all its candidates share.

The ranker's first linear layer reads [user, item, user * item, matches, scene]. With its weights
cut into those parts it is, for one request,

    user W_u + scene W_s + b  +  item (W_i + diag(user) W_p),

so that user and scene enter once per request, and an item costs one product with a matrix made for
the request, a fourth of the unfactored layer or less. A match is an inner product of columns of
user and item: each of these columns adds the match's one row of weights to W_p. Shapes: R requests,
N items, U and I widths of representations, H of the first layer, P pairs of columns that are
multiplied: the D of the towers' embeddings, then those of matches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.exporting.graphs import (
    OPSET,
    example,
    export_function,
    export_functions,
    joined,
    preprocessed,
)
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import output_name
from hvdrec.models.recommender import Ranker, Recommender
from hvdrec.models.tasks import TaskRanker

Codes = dict[str, Tensor]


@dataclass(frozen=True)
class Factored:
    """A ranker as a first linear layer, in its parts, and the rest."""

    request: Callable[[Tensor, Codes], Tensor]
    """user_embedding [R, U] and scene codes [R] -> what all items of a request share, [R, H]."""
    item: NDArray[np.float32]
    """[I, H]: weights of an item's representation."""
    product: NDArray[np.float32]
    """[P, H]: weights of the products of a user's and an item's columns."""
    columns: tuple[NDArray[np.int64], NDArray[np.int64]]
    """[P] each: which columns of a user and an item are multiplied."""
    rest: Callable[[Tensor], Tensor]
    """The first layer's output [N, H] -> logits [N], or [N, T] of T tasks."""


def factored(model: Recommender) -> Factored | None:
    """Return a model's ranker in parts; None where its first layer is not linear in each of them.

    That is so with cross layers and with products of heads.
    """
    if model.ranker is None:
        return _inner_product(model)
    if model.ranker.cross is not None or model.heads:
        return None
    first, rest = _in_two(model.ranker)
    user, item, width = model.user_width(), model.item_width(), model.output_width
    matches = model.matches
    cuts = [user, item, width, len(matches)]
    weights = torch.split(first.weight.detach(), [*cuts, first.in_features - sum(cuts)], dim=1)
    shared = torch.cat([weights[0], weights[4]], dim=1)
    bias = first.bias.detach()
    widths = torch.tensor([match.width for match in matches], dtype=torch.int64)
    of_matches = weights[3].repeat_interleave(widths, dim=1)

    def request(users: Tensor, codes: Codes) -> Tensor:
        scene = model.scene_vectors(codes)
        return functional.linear(torch.cat([users, *scene.values()], dim=-1), shared, bias)

    return Factored(
        request,
        weights[1].T.contiguous().numpy(),
        torch.cat([weights[2], of_matches], dim=1).T.contiguous().numpy(),
        (
            _columns([(0, width), *((match.user, match.width) for match in matches)]),
            _columns([(0, width), *((match.item, match.width) for match in matches)]),
        ),
        rest,
    )


def _columns(ranges: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the numbers of columns in ranges of (start, width)."""
    return np.concatenate([np.arange(start, start + width) for start, width in ranges])


def _in_two(ranker: Ranker | TaskRanker) -> tuple[nn.Linear, Callable[[Tensor], Tensor]]:
    """Return a ranker's first linear layer, and what makes logits of that layer's output."""
    if isinstance(ranker, TaskRanker):
        return ranker.first, ranker.after_first
    first, *after = [*ranker.hidden, ranker.head]
    assert isinstance(first, nn.Linear)
    rest = nn.Sequential(*after)
    return first, lambda first_output: rest(first_output).squeeze(-1)


def _outputs(model: Recommender, logit: Tensor) -> tuple[Tensor, ...]:
    """Return the served score of logits and, where there are tasks, the probability of each."""
    return model.score(logit), *(logit.sigmoid().unbind(dim=-1) if model.tasks else ())


def _names(model: Recommender) -> list[str]:
    return ["score", *(task.output for task in model.tasks)]


def _inner_product(model: Recommender) -> Factored:
    """Return the score of a model without a ranker: the towers' inner product over T."""
    weight = np.full((model.output_width, 1), 1 / model.temperature, dtype=np.float32)
    columns = _columns([(0, model.output_width)])
    return Factored(
        lambda users, codes: torch.zeros_like(users[:, :1]),
        np.zeros((model.item_width(), 1), dtype=np.float32),
        weight,
        (columns, columns),
        lambda first_output: first_output.squeeze(-1),
    )


def ranker(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return the graph that scores pairs of representations in the scenes of requests.

    ``user_embedding`` float32 [R, U], raw scene features [R], ``item_embedding`` float32 [N, I],
    ``request`` int64 [N], the row of the user and the scene that an item is paired with
    -> ``score`` float32 [N], a probability; of a model with tasks also that of each,
    ``score_NAME``.
    """
    return preprocessed(fitted, model.schema.side("scene"), core(model), "requests")


def core(model: Recommender) -> onnx.ModelProto:
    """Return the same graph over the codes of scene features, without their preprocessing."""
    examples = {
        "user_embedding": torch.zeros(3, model.user_width()),
        **{output_name(f.name): example(f) for f in model.schema.side("scene")},
    }
    parts = factored(model)
    if parts is None:
        return _unfactored(model, examples)
    shared = export_function(
        model,
        lambda inputs: parts.request(inputs["user_embedding"], _codes(model, inputs)),
        examples,
        "shared",
        rows="requests",
    )
    rest = export_functions(
        model,
        lambda inputs: _outputs(model, parts.rest(inputs["first"])),
        {"first": torch.zeros(3, parts.product.shape[1])},
        _names(model),
    )
    first = _first_layer(parts, model.user_width(), shared.ir_version)
    return joined(joined(shared, first), rest)


def _codes(model: Recommender, inputs: dict[str, Tensor]) -> Codes:
    return {f.name: inputs[output_name(f.name)] for f in model.schema.side("scene")}


def _unfactored(model: Recommender, examples: dict[str, Tensor]) -> onnx.ModelProto:
    """Return the ranker as it is, over users and scenes that are gathered for each item."""

    def score(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        codes = _codes(model, inputs)
        logit = model.rank(inputs["user_embedding"], inputs["item_embedding"], codes)
        return _outputs(model, logit)

    items = {"item_embedding": torch.zeros(3, model.item_width())}
    whole = export_functions(model, score, {**examples, **items}, _names(model))
    graph = whole.graph
    gathers = []
    for value in graph.input:
        if value.name not in examples:
            continue
        for node in graph.node:
            node.input[:] = [
                f"{name}/paired" if name == value.name else name for name in node.input
            ]
        gathers.append(
            helper.make_node("Gather", [value.name, "request"], [f"{value.name}/paired"])
        )
        value.type.tensor_type.shape.dim[0].dim_param = "requests"
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*gathers, *kept])
    graph.input.append(helper.make_tensor_value_info("request", TensorProto.INT64, ["rows"]))
    return whole


def _first_layer(parts: Factored, user_width: int, ir_version: int) -> onnx.ModelProto:
    """Return the graph of the first layer behind `Factored.request`.

    ``user_embedding`` [R, U], ``shared`` [R, H], ``item_embedding`` [N, I], ``request`` int64 [N]
    -> ``first`` [N, H].
    """
    hidden = parts.product.shape[1]
    constants: dict[str, NDArray[Any]] = {
        "item_weight": parts.item,
        "product_weight": parts.product,
        "one": np.array(1, dtype=np.int64),
        "user_columns": parts.columns[0],
        "item_columns": parts.columns[1],
        "item_rows": parts.columns[1][:, None],
    }
    node = helper.make_node
    one_request = [
        node("Gather", ["user_embedding", "user_columns"], ["user"], axis=1),
        node("Transpose", ["user"], ["user_column"], perm=[1, 0]),
        node("Mul", ["user_column", "product_weight"], ["of_products"]),
        node("ScatterND", ["item_weight", "item_rows", "of_products"], ["folded"], reduction="add"),
        node("Gemm", ["item_embedding", "folded", "shared"], ["first_of_one"]),
    ]
    many_requests = [
        node("Gather", ["user_embedding", "user_columns"], ["users"], axis=1),
        node("Gather", ["users", "request"], ["paired_users"]),
        node("Gather", ["item_embedding", "item_columns"], ["items"], axis=1),
        node("Mul", ["paired_users", "items"], ["products"]),
        node("MatMul", ["products", "product_weight"], ["product_terms"]),
        node("MatMul", ["item_embedding", "item_weight"], ["item_terms"]),
        node("Gather", ["shared", "request"], ["paired_shared"]),
        node("Sum", ["product_terms", "item_terms", "paired_shared"], ["first_of_many"]),
    ]
    branches = {
        "then_branch": _branch(one_request, "first_of_one", hidden),
        "else_branch": _branch(many_requests, "first_of_many", hidden),
    }
    graph = helper.make_graph(
        [
            node("Shape", ["user_embedding"], ["requests"], start=0, end=1),
            node("Squeeze", ["requests"], ["count"]),
            node("Equal", ["count", "one"], ["is_one"]),
            node("If", ["is_one"], ["first"], **branches),
        ],
        "first_layer",
        [
            _float("user_embedding", "requests", user_width),
            _float("shared", "requests", hidden),
            _float("item_embedding", "rows", len(parts.item)),
            helper.make_tensor_value_info("request", TensorProto.INT64, ["rows"]),
        ],
        [_float("first", "rows", hidden)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def _branch(nodes: list[onnx.NodeProto], output: str, width: int) -> onnx.GraphProto:
    return helper.make_graph(nodes, output, [], [_float(output, "rows", width)])


def _float(name: str, rows: str, width: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width])
