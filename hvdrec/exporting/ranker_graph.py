"""The ranker's ONNX graph. It computes terms that do not depend on the item once per request.

The scene is the context of a request: time, place, device, placement. The ranker's first layer is
linear. Its input consists of the embeddings of user and item, their element-wise product, matches,
the scene, and pairs. So its output for an item is

    user W_u + scene W_s + b  +  item (W_i + diag(user) W_p)  +  pairs W_x.

The first three terms and the matrix in parentheses are computed once per request. An item then
costs one product with this matrix, at most a fourth of the cost of the whole layer. A match is the
inner product of some user columns and as many item columns. In W_p, the match's row of weights is
repeated for each of these columns. Pairs are scene features that combine item features (`crossed`);
they differ per item.

In shapes, R is the number of requests, N the number of items, U and I the widths of a user's and an
item's representation, and H the width of the first layer's output. P is the number of products of a
user column and an item column: first the products of the towers' outputs, then the products of the
matches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from hvdrec.config.schema import Feature
from hvdrec.exporting.graphs import example, export_function, inner, joined, parsed
from hvdrec.features.graph import output_name
from hvdrec.models.recommender import DnnRanker, Recommender
from hvdrec.models.tasks import TaskRanker

Codes = dict[str, Tensor]
OWN_INPUTS = ("user_embedding", "item_embedding", "request")
"""Inputs of the ranker's graph besides raw scene columns. If a raw column has the same name,
`Schema.own_name` gives the name that is used instead."""


@dataclass(frozen=True)
class Factored:
    """A ranker whose first layer is split into terms; see the module's formula.

    Attributes:
        request: Function that computes ``user W_u + scene W_s + b``, [requests, H], from the users'
            representations and the codes of `request_features`. H is the width of the first
            layer's output.
        item: The weights W_i of an item's representation [item_width, H].
        product: The weights W_p of the products of a user column and an item column [products, H].
        columns: The user columns and the item columns of these products, [products] each.
        pairs: Function that computes ``pairs W_x``, [items, H], from the codes of `pair_features`;
            None if there are no such features.
        rest: Function that computes the logits, [items] or [items, tasks], from the first layer's
            output [items, H].
    """

    request: Callable[[Tensor, Codes], Tensor]
    item: NDArray[np.float32]
    product: NDArray[np.float32]
    columns: tuple[NDArray[np.int64], NDArray[np.int64]]
    pairs: Callable[[Codes], Tensor] | None
    rest: Callable[[Tensor], Tensor]


def pair_features(model: Recommender) -> tuple[Feature, ...]:
    """Return the scene features that combine item features, so they differ between items."""
    if model.ranker is None:
        return ()
    return tuple(f for f in model.schema.side("scene") if f not in request_features(model))


def request_features(model: Recommender) -> tuple[Feature, ...]:
    """Return the scene features that are the same for all items of a request."""
    items = {feature.name for feature in model.schema.carried("item")}
    return tuple(f for f in model.schema.side("scene") if items.isdisjoint(f.sources))


def factored(model: Recommender) -> Factored | None:
    """Split the first layer of a model's ranker into a sum of terms.

    Each term depends on the user, the scene, the item, or a pair of user and item alone.

    Returns:
        The split ranker, or None if the ranker has cross layers or multiplies heads of the towers.
        A sum of such terms cannot express these.
    """
    if model.ranker is None:
        return _inner_product(model)
    if model.ranker.cross is not None or model.heads:
        return None
    first, rest = _split_ranker(model.ranker)
    width, matches = model.output_width, model.matches
    scene, pairs = model.schema.side("scene"), pair_features(model)
    widths = [model.user_width(), model.item_width(), width, len(matches)]
    widths += [model.tables.width(feature) for feature in scene]
    user, item, product, match, *by_feature = torch.split(first.weight.detach(), widths, dim=1)
    shared = torch.cat(
        [user, *(w for f, w in zip(scene, by_feature, strict=True) if f not in pairs)], dim=1
    )
    bias = first.bias.detach()
    match_widths = torch.tensor([match.width for match in matches], dtype=torch.int64)

    def request(users: Tensor, codes: Codes) -> Tensor:
        vectors = model.scene_vectors(codes, request_features(model))
        return functional.linear(torch.cat([users, *vectors.values()], dim=-1), shared, bias)

    def pair_terms(codes: Codes) -> Tensor:
        weights = [w for f, w in zip(scene, by_feature, strict=True) if f in pairs]
        vectors = model.scene_vectors(codes, pairs)
        return functional.linear(torch.cat([*vectors.values()], -1), torch.cat(weights, 1))

    return Factored(
        request,
        item.T.contiguous().numpy(),
        torch.cat([product, match.repeat_interleave(match_widths, dim=1)], 1)
        .T.contiguous()
        .numpy(),
        (
            _columns([(0, width), *((match.user, match.width) for match in matches)]),
            _columns([(0, width), *((match.item, match.width) for match in matches)]),
        ),
        pair_terms if pairs else None,
        rest,
    )


def _columns(ranges: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the numbers of the columns in ranges (start, width), one range after the other."""
    return np.concatenate([np.arange(start, start + width) for start, width in ranges])


def _split_ranker(ranker: DnnRanker | TaskRanker) -> tuple[nn.Linear, Callable[[Tensor], Tensor]]:
    """Return a ranker's first linear layer, and the function that maps its output to logits."""
    if isinstance(ranker, TaskRanker):
        return ranker.first, ranker.after_first
    first, *after = [*ranker.hidden, ranker.head]
    assert isinstance(first, nn.Linear)
    rest = nn.Sequential(*after)
    return first, lambda first_output: rest(first_output).squeeze(-1)


def _outputs(model: Recommender, logit: Tensor) -> tuple[Tensor, ...]:
    """Compute the served score, and the probability of each task if the model has tasks."""
    return model.score(logit), *(logit.sigmoid().unbind(dim=-1) if model.tasks else ())


def _output_names(model: Recommender) -> list[str]:
    return [*map(model.schema.own_name, ["score", *(task.output for task in model.tasks)])]


def _inner_product(model: Recommender) -> Factored:
    """Express a model without a ranker as `Factored`; logit = inner product / temperature."""
    weight = np.full((model.output_width, 1), 1 / model.temperature, dtype=np.float32)
    columns = _columns([(0, model.output_width)])
    return Factored(
        lambda users, codes: torch.zeros_like(users[:, :1]),
        np.zeros((model.item_width(), 1), dtype=np.float32),
        weight,
        (columns, columns),
        None,
        lambda first_output: first_output.squeeze(-1),
    )


def core(model: Recommender) -> onnx.ModelProto:
    """Return the ranker's graph without preprocessing: its scene inputs are codes.

    A run scores n items for r requests. The inputs are ``user_embedding``, float32 [r, user_width];
    ``item_embedding``, float32 [n, item_width]; the codes of `request_features` [r] and of
    `pair_features` [n]; and ``request``, int64 [n], the number of the request to which each item
    belongs, from 0. The outputs are ``score``, a probability, and ``score_NAME`` for each task,
    float32 [n]. If a raw column has one of these names, it gets a prefix; see `Schema.own_name`.
    """
    users = model.schema.own_name("user_embedding")
    request_examples = {
        users: torch.zeros(3, model.user_width()),
        **{output_name(f.name): example(f) for f in request_features(model)},
    }
    pair_examples = {output_name(f.name): example(f) for f in pair_features(model)}
    parts = factored(model)
    if parts is None:
        return _unfactored(model, request_examples, pair_examples)
    shared = export_function(
        model,
        lambda inputs: parts.request(inputs[users], _codes(model, inputs)),
        request_examples,
        [inner("shared")],
        rows="requests",
    )
    rest = export_function(
        model,
        lambda inputs: _outputs(model, parts.rest(inputs[inner("first")])),
        {inner("first"): torch.zeros(3, parts.product.shape[1])},
        _output_names(model),
    )
    first = _first_layer(parts, model)
    if parts.pairs is not None:
        to_terms = parts.pairs
        terms = [inner("pair_terms")]
        pairs = export_function(
            model, lambda inputs: to_terms(_codes(model, inputs)), pair_examples, terms
        )
        first = joined(pairs, first)
    return joined(shared, first, rest)


def _codes(model: Recommender, inputs: Mapping[str, Tensor]) -> Codes:
    names = [feature.name for feature in model.schema.side("scene")]
    return {name: inputs[output_name(name)] for name in names if output_name(name) in inputs}


def _unfactored(
    model: Recommender, request_examples: dict[str, Tensor], pair_examples: dict[str, Tensor]
) -> onnx.ModelProto:
    """Return the ranker's graph without the split: users and scenes are repeated for each item."""

    users, items, request = map(model.schema.own_name, OWN_INPUTS)

    def score(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        codes = _codes(model, inputs)
        logit = model.rank(inputs[users], inputs[items], codes)
        return _outputs(model, logit)

    item_example = {items: torch.zeros(3, model.item_width())}
    examples = {**request_examples, **pair_examples, **item_example}
    exported = export_function(model, score, examples, _output_names(model))
    graph = exported.graph
    gathers = []
    for value in graph.input:
        if value.name in request_examples:
            paired = inner(f"paired/{value.name}")
            rename_input(graph, value.name, paired)
            gathers.append(helper.make_node("Gather", [value.name, request], [paired]))
            value.type.tensor_type.shape.dim[0].dim_param = "requests"
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*gathers, *nodes])
    graph.input.append(helper.make_tensor_value_info(request, TensorProto.INT64, ["rows"]))
    return exported


def rename_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Replace the tensor `old` by the tensor `new` in the inputs of all nodes of a graph."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                rename_input(attribute.g, old, new)


ONE_OR_MANY = """
count = Shape <start = 0, end = 1> (user_embedding)
requests = Squeeze (count)
is_one = Equal (requests, one)
{output} = If (is_one) <
    then_branch = one_request () => (float[rows, {hidden}] first_of_one) {{
        user = Gather <axis = 1> (user_embedding, user_columns)
        user_column = Transpose <perm = [1, 0]> (user)
        of_products = Mul (user_column, product_weight)
        folded = ScatterND <reduction = "add"> (item_weight, item_rows, of_products)
        first_of_one = Gemm (item_embedding, folded, shared)
    }},
    else_branch = many_requests () => (float[rows, {hidden}] first_of_many) {{
        users = Gather <axis = 1> (user_embedding, user_columns)
        paired_users = Gather (users, request)
        items = Gather <axis = 1> (item_embedding, item_columns)
        products = Mul (paired_users, items)
        product_terms = MatMul (products, product_weight)
        item_terms = MatMul (item_embedding, item_weight)
        paired_shared = Gather (shared, request)
        first_of_many = Sum (product_terms, item_terms, paired_shared)
    }}
>"""
"""The first layer without pairs, in ONNX's text format, for one request and for many."""


def _first_layer(parts: Factored, model: Recommender) -> onnx.ModelProto:
    """Return the graph that adds the terms of the first layer.

    The graphs of `Factored.request` and `Factored.pairs` compute ``shared`` and ``pair_terms``.
    """
    item_width, hidden = parts.item.shape
    inputs = [
        f"float[requests, {model.user_width()}] user_embedding",
        f"float[requests, {hidden}] shared",
        f"float[rows, {item_width}] item_embedding",
        "int64[rows] request",
    ]
    nodes = [ONE_OR_MANY.format(hidden=hidden, output="first" if parts.pairs is None else "alone")]
    if parts.pairs is not None:
        inputs.append(f"float[rows, {hidden}] pair_terms")
        nodes.append("first = Add (alone, pair_terms)")
    constants = {
        "item_weight": parts.item,
        "product_weight": parts.product,
        "one": np.array(1),
        "user_columns": parts.columns[0],
        "item_columns": parts.columns[1],
        "item_rows": parts.columns[1][:, None],
    }
    outputs = [f"float[rows, {hidden}] first"]
    names = {name: model.schema.own_name(name) for name in OWN_INPUTS}
    return parsed("first_layer", inputs, outputs, nodes, constants, names)
