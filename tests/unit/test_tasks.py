"""Tasks: the shared layers against plain numpy, the losses and the score by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.data_sections import Task
from hvdrec.config.sections import Ranker
from hvdrec.exporting import graphs
from hvdrec.exporting.precision import quantize_ranker
from hvdrec.exporting.ranker_graph import core, factored
from hvdrec.features.graph import output_name
from hvdrec.models.losses.cross_entropy import task_cross_entropies, task_weights
from hvdrec.models.tasks import TaskRanker, combined_score
from tests.small_model import small_batch, small_config, small_model, with_tasks

Array = NDArray[Any]
RANKERS: Mapping[str, dict[str, Any]] = {
    "bottom": {"hidden": (6, 5)},
    "bottom-towers": {"hidden": (6,), "task_hidden": (4, 3), "combine": "sum"},
    "mmoe": {"hidden": (6, 5), "sharing": "mmoe", "experts": 3},
    "mmoe-towers": {"hidden": (6,), "sharing": "mmoe", "experts": 2, "task_hidden": (4,)},
    "cross": {"hidden": (6,), "sharing": "mmoe", "experts": 2, "cross_layers": 2},
}


def _config(name: str) -> Config:
    fields = {"cross_layers": 0, "direct": ("user_id",), **RANKERS[name]}
    return with_tasks(small_config("ranking"), **fields)


def _ranker(width: int, **fields: Any) -> tuple[TaskRanker, dict[str, Array]]:
    torch.manual_seed(0)
    ranker = TaskRanker(width, Ranker(**fields), 3).double().eval()
    return ranker, {name: value.numpy() for name, value in ranker.state_dict().items()}


def _relu(values: Array) -> Array:
    return np.maximum(values, 0.0)


def test_mixture_of_experts_against_numpy() -> None:
    ranker, weights = _ranker(
        7, hidden=(5, 4), sharing="mmoe", experts=2, task_hidden=(3,), dropout=0.3
    )
    inputs = np.random.default_rng(0).normal(size=(6, 7))
    # The rows of `first`: those of each expert, then the gate of each task.
    cut = [0, 5, 10, 12, 14, 16]
    parts = [(weights["first.weight"][i:j], weights["first.bias"][i:j]) for i, j in pairwise(cut)]
    expected = np.zeros((6, 3))
    for row, x in enumerate(inputs):
        experts = []
        for e in range(2):
            w, b = parts[e]
            inner = [weights[f"experts.{e}.2.{kind}"] for kind in ("weight", "bias")]
            experts.append(_relu(inner[0] @ _relu(w @ x + b) + inner[1]))
        for t in range(3):
            w, b = parts[2 + t]
            gate = np.exp(w @ x + b)
            mixed = sum(g * f for g, f in zip(gate / gate.sum(), experts, strict=True))
            tower = weights[f"heads.{t}.0.weight"] @ mixed + weights[f"heads.{t}.0.bias"]
            last = [weights[f"heads.{t}.3.{kind}"] for kind in ("weight", "bias")]
            expected[row, t] = (last[0] @ _relu(tower) + last[1]).item()
    with torch.no_grad():
        found = ranker([torch.from_numpy(inputs)]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_shared_bottom_with_cross_layers_against_numpy() -> None:
    ranker, weights = _ranker(7, hidden=(5,), cross_layers=1)
    x = np.random.default_rng(0).normal(size=(4, 7))
    deep = _relu(x @ weights["first.weight"].T + weights["first.bias"])
    crossed = x * (x @ weights["cross.layers.0.weight"].T + weights["cross.layers.0.bias"]) + x
    both = np.concatenate([crossed, deep], axis=1)
    expected = np.concatenate(
        [both @ weights[f"heads.{t}.0.weight"].T + weights[f"heads.{t}.0.bias"] for t in range(3)],
        axis=1,
    )
    with torch.no_grad():
        np.testing.assert_allclose(ranker([torch.from_numpy(x)]).numpy(), expected, atol=1e-12)


def test_losses_count_only_rows_with_a_known_label() -> None:
    nan, three = math.nan, math.log(3.0)
    logits = torch.tensor([[0.0, three], [three, 0.0], [9.0, -three]], requires_grad=True)
    labels = torch.tensor([[1.0, nan], [0.0, 1.0], [nan, 0.0]])
    weight = torch.tensor([1.0, 2.0, 4.0])
    assert task_weights(labels, weight).tolist() == [[1.0, 0.0], [2.0, 2.0], [0.0, 4.0]]
    losses = task_cross_entropies(logits, labels, weight)
    # log 2 + 2 log 4; 2 log 2 + 4 log (4 / 3).
    assert losses.tolist() == pytest.approx(
        [5 * math.log(2), 2 * math.log(2) + 4 * math.log(4 / 3)]
    )
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    # Weight times (probability - label), nothing where the label is unknown.
    expected = torch.tensor([[-0.5, 0.0], [1.5, -1.0], [0.0, 1.0]])
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_the_combined_score_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, 0.3]])
    tasks = [Task("a", "x"), Task("b", "x", share=0.5), Task("c", "x", share=0.0)]
    # 0.5 * sqrt(0.25) and 1 * 0; a task without a share does not count, even if it is 0.
    assert combined_score(p, tasks, "product").tolist() == [0.25, 0.0]
    assert combined_score(p, tasks, "sum").tolist() == pytest.approx([0.625 / 1.5, 1.0 / 1.5])


@pytest.mark.parametrize("name", RANKERS)
def test_every_output_of_the_graph_equals_torch(name: str) -> None:
    model = small_model(_config(name)).float().eval()
    assert (factored(model) is None) == (name == "cross")
    graph = core(model)
    onnx.checker.check_model(graph, full_check=True)
    names = ["score", "score_like", "score_love"]
    assert [value.name for value in graph.graph.output] == names
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    users = torch.randn(3, model.user_width(), generator=torch.Generator().manual_seed(2))
    items = torch.randn(5, model.item_width(), generator=torch.Generator().manual_seed(1))
    scene = {n: small_batch(3).features[n] for n in ("hour", "shop")}
    for count, pairs in ((1, [0] * 5), (3, [2, 0, 1, 1, 0])):
        with torch.inference_mode():
            paired = {n: code[pairs] for n, code in scene.items()}
            logits = model.rank(users[pairs], items, paired)
            theirs = torch.stack([model.score(logits), *logits.sigmoid().unbind(1)])
        inputs = {
            "user_embedding": users[:count].numpy(),
            "item_embedding": items.numpy(),
            "request": np.array(pairs),
            **{output_name(n): code[:count].numpy() for n, code in scene.items()},
        }
        ours = np.stack(session.run(names, inputs))
        assert ours.shape == (3, 5)
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6, rtol=0)
        np.testing.assert_array_equal(session.run(["score"], inputs)[0], ours[0])
        power, total = (1.0, 0.25), 1.25
        expected = ours[1] ** power[0] * ours[2] ** power[1]
        if RANKERS[name].get("combine") == "sum":
            expected = (power[0] * ours[1] + power[1] * ours[2]) / total
        np.testing.assert_allclose(ours[0], expected, rtol=1e-6)


def test_experts_and_gates_share_one_factored_layer() -> None:
    model = small_model(_config("mmoe")).float().eval()
    shapes = {w.name: tuple(w.dims) for w in core(model).graph.initializer}
    # Three experts of 6, and two gates over three experts.
    assert shapes[graphs.inner("item_weight")] == (model.item_width(), 3 * 6 + 2 * 3)
    assert shapes[graphs.inner("product_weight")] == (5, 3 * 6 + 2 * 3)


@pytest.mark.parametrize(("name", "inner"), [("bottom", 1), ("mmoe", 3), ("mmoe-towers", 2)])
def test_int8_leaves_the_layers_that_give_logits_alone(
    name: str, inner: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = small_model(_config(name)).float().eval()
    file = tmp_path_factory.mktemp("int8") / "ranker.onnx"
    onnx.save(core(model), str(file))
    inputs = {
        "user_embedding": np.ones((1, model.user_width()), np.float32),
        "item_embedding": np.linspace(-1, 1, 4 * model.item_width(), dtype=np.float32).reshape(
            4, -1
        ),
        "request": np.zeros(4, np.int64),
        output_name("hour"): np.array([2]),
        output_name("shop"): np.array([3]),
    }
    before = onnxruntime.InferenceSession(str(file)).run(None, inputs)
    quantize_ranker(file)
    kinds = [node.op_type for node in onnx.load(str(file)).graph.node]
    assert kinds.count("MatMulInteger") == inner
    after = onnxruntime.InferenceSession(str(file)).run(None, inputs)
    assert 0 < np.abs(np.stack(after) - np.stack(before)).max() < 0.05
