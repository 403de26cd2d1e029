"""The ranker's graph against torch, for all kinds of rankers, with one request and many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from hvdrec.config import Config
from hvdrec.config.schema import Feature, Pooling
from hvdrec.config.sections import Ranker, Tower
from hvdrec.exporting.graphs import inner
from hvdrec.exporting.ranker_graph import core, factored
from hvdrec.features.graph import output_name
from hvdrec.models.recommender import Recommender
from tests.small_model import SIZES, small_batch, small_config, small_model

ALL = ("user_id", "history", "age", "item_id", "genres", "price")


def _config(ranker: Ranker, output: int = 5, objective: str = "ranking") -> Config:
    config = small_config(objective)
    tower = Tower(hidden=(7,) if output else (), output=output, normalize=output > 0)
    return replace(config, model=replace(config.model, tower=tower, ranker=ranker))


CONFIGS = {
    "hidden": _config(Ranker(hidden=(6, 5))),
    "linear": _config(Ranker(hidden=())),
    "direct": _config(Ranker(hidden=(6,), direct=("user_id", "genres"))),
    "cross": _config(Ranker(hidden=(6,), cross_layers=2, direct=("user_id",))),
    "heads": _config(Ranker(hidden=(6,), heads=2), output=6),
    "matches": _config(Ranker(hidden=(6,), direct=("history", "age", "item_id"), matches=True)),
    "matches-alone": _config(Ranker(hidden=(6,), direct=ALL, matches=True), output=0),
    "dropout": _config(Ranker(hidden=(6, 5), dropout=0.5)),
    "no-towers": _config(Ranker(hidden=(6,), direct=ALL), output=0),
    "retrieval": _config(Ranker(), objective="retrieval"),
}


def _scores(
    model: Recommender, graph: onnx.ModelProto, users: torch.Tensor, items: int, pairs: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return torch's scores and the graph's."""
    batch = small_batch(max(len(users), items), seed=3)
    codes = {name: array[: len(users)] for name, array in batch.features.items()}
    codes = {name: c.float() if c.is_floating_point() else c for name, c in codes.items()}
    item = torch.randn(items, model.item_width(), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        paired = {name: c[pairs] for name, c in codes.items()}
        theirs = model.rank(users[pairs], item, paired).sigmoid().numpy()
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    taken = {value.name for value in session.get_inputs()}
    inputs = {
        "user_embedding": users.numpy(),
        "item_embedding": item.numpy(),
        "request": np.array(pairs),
        **{output_name(name): code.numpy() for name, code in codes.items()},
    }
    ours = session.run(["score"], {name: inputs[name] for name in taken})[0]
    return theirs, ours


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_gives_the_scores_of_torch(name: str) -> None:
    model = small_model(CONFIGS[name]).float().eval()
    graph = core(model)
    onnx.checker.check_model(graph, full_check=True)
    users = torch.randn(3, model.user_width(), generator=torch.Generator().manual_seed(2))
    for count, items, pairs in (
        (1, 4, [0, 0, 0, 0]),
        (1, 1, [0]),
        (3, 5, [2, 0, 1, 1, 0]),
        (2, 1, [1]),
        (3, 3, [0, 1, 2]),
    ):
        theirs, ours = _scores(model, graph, users[:count], items, pairs)
        assert ours.shape == theirs.shape == (items,)
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=0)


def test_terms_shared_by_a_request_are_computed_once() -> None:
    model = small_model(CONFIGS["direct"]).float().eval()
    graph = core(model).graph
    weights = {w.name: numpy_helper.to_array(w).shape for w in graph.initializer}
    # No weight matrix spans all four parts; item_weight takes the item's representation alone.
    width = 3 * 5 + 4 + 4 + 4 + 4
    assert not [shape for shape in weights.values() if width in shape]
    assert weights[inner("item_weight")] == (model.item_width(), 6)
    assert weights[inner("product_weight")] == (5, 6)


def test_only_cross_layers_and_heads_cannot_be_factored() -> None:
    for name, config in CONFIGS.items():
        assert (factored(small_model(config).float()) is None) == (name in ("cross", "heads"))


@pytest.mark.parametrize("pooling", ["mean", "sqrt", "attention", "self-attention"])
def test_scene_lists_are_pooled_per_request(pooling: Pooling) -> None:
    config = CONFIGS["hidden"]
    tags = Feature("tags", side="scene", kind="categorical_list")
    model_config = replace(config.model, pooling={"tags": pooling})
    config = replace(config, features=(*config.features, tags), model=model_config)
    model = Recommender(config.schema, config.model, {**SIZES, "tags": 5}).eval()
    session = onnxruntime.InferenceSession(core(model).SerializeToString())
    users, items = torch.randn(2, model.user_width()), torch.randn(3, model.item_width())
    codes = {
        "hour": torch.tensor([1, 2]),
        "shop": torch.tensor([3, 4]),
        "tags": torch.tensor([[2, 3, 0], [4, 0, 0]]),
    }
    pairs = [0, 1, 1]
    with torch.inference_mode():
        paired = {name: c[pairs] for name, c in codes.items()}
        theirs = model.rank(users[pairs], items, paired).sigmoid().numpy()
    inputs = {
        "user_embedding": users.numpy(),
        "item_embedding": items.numpy(),
        "request": np.array(pairs),
        **{output_name(name): code.numpy() for name, code in codes.items()},
    }
    np.testing.assert_allclose(session.run(["score"], inputs)[0], theirs, atol=2e-6, rtol=0)
