"""ONNX graphs of the towers and the ranker, with the features' preprocessing in front."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, compose, helper
from torch import Tensor, nn

from hvdrec.features.fit import Fitted
from hvdrec.features.graph import build, output_name
from hvdrec.models.recommender import Recommender
from hvdrec.schema import Feature

OPSET = 20
Function = Callable[[dict[str, Tensor]], Tensor]


class _Core(nn.Module):
    """A part of the model as a function of positional tensors, which is what the exporter wants."""

    def __init__(self, model: Recommender, function: Function, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self._names = list(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._function(dict(zip(self._names, tensors, strict=True)))


def user_tower(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return raw user features [N] -> ``embedding`` float32 [N, user_width]."""
    return _tower(model, fitted, model.schema.side("user"), model.represent_users)


def item_tower(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return raw item features [N] -> ``embedding`` float32 [N, item_width]."""
    return _tower(model, fitted, model.schema.side("item"), model.represent_items)


def ranker(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return the graph that scores pairs of representations in a scene.

    ``user_embedding`` float32 [U, user_width], ``item_embedding`` float32 [N, item_width] and raw
    scene features [U], where U is 1 or N -> ``score`` float32 [N], a probability.
    """
    scene = model.schema.side("scene")

    def score(inputs: dict[str, Tensor]) -> Tensor:
        codes = {feature.name: inputs[output_name(feature.name)] for feature in scene}
        return model.rank(inputs["user_embedding"], inputs["item_embedding"], codes).sigmoid()

    examples = {
        "user_embedding": torch.zeros(3, model.user_width()),
        "item_embedding": torch.zeros(3, model.item_width()),
        **{output_name(feature.name): _example(feature) for feature in scene},
    }
    core = _export(model, score, examples, "score")
    core = _broadcast(core, ["user_embedding", *(output_name(f.name) for f in scene)])
    return _behind(build(fitted, [f.name for f in scene]), core) if scene else core


def _tower(
    model: Recommender, fitted: Fitted, features: tuple[Feature, ...], represent: Function
) -> onnx.ModelProto:
    def embed(inputs: dict[str, Tensor]) -> Tensor:
        return represent({feature.name: inputs[output_name(feature.name)] for feature in features})

    examples = {output_name(feature.name): _example(feature) for feature in features}
    core = _export(model, embed, examples, "embedding")
    return _behind(build(fitted, [feature.name for feature in features]), core)


def _example(feature: Feature) -> Tensor:
    if not feature.is_embedded:
        return torch.zeros(3)
    return torch.zeros((3, 4) if feature.is_list else (3,), dtype=torch.int64)


def _export(
    model: Recommender, function: Function, examples: dict[str, Tensor], output: str
) -> onnx.ModelProto:
    """Export a function of named tensors whose rows (and list lengths) are of any number."""
    rows = torch.export.Dim("rows", min=1)
    shapes = tuple(
        {0: rows, 1: torch.export.Dim.DYNAMIC}
        if name.endswith(output_name("")) and t.ndim == 2
        else {0: rows}
        for name, t in examples.items()
    )
    core = _Core(model, function, list(examples)).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            core,
            tuple(examples.values()),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(examples),
            output_names=[f"{output}/exported"],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        file = Path(folder) / "core.onnx"
        program.save(str(file))
        return _named(onnx.load(str(file)), output)


def _named(core: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """Give the output its name, which the exporter may also use inside, and all else a prefix."""
    core = compose.add_prefix(core, "core/", rename_inputs=False, rename_outputs=False)
    for node in core.graph.node:
        node.output[:] = [output if name == f"{output}/exported" else name for name in node.output]
        # Traces of where the model's code lay on the exporting machine.
        del node.metadata_props[:]
    for value in (*core.graph.input, *core.graph.output):
        del value.metadata_props[:]
    core.graph.output[0].name = output
    return core


def _behind(front: onnx.ModelProto, core: onnx.ModelProto) -> onnx.ModelProto:
    """Return one graph in which the front's outputs feed the core's inputs of the same name."""
    outputs = {value.name for value in front.graph.output}
    joined = [value.name for value in core.graph.input if value.name in outputs]
    prefixed = compose.add_prefix(front, "front/", rename_inputs=False, rename_outputs=False)
    version = max(front.ir_version, core.ir_version)
    prefixed.ir_version = core.ir_version = version
    merged = compose.merge_models(prefixed, core, io_map=[(name, name) for name in joined])
    merged.producer_name = "hvdrec"
    return merged


def _broadcast(core: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Let the named inputs have one row where ``item_embedding`` has many."""
    graph = core.graph
    nodes = [
        helper.make_node("Shape", ["item_embedding"], ["pairs"], start=0, end=1),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Concat", ["pairs", "one"], ["pairs_by_one"], axis=0),
    ]
    for value in graph.input:
        if value.name not in names:
            continue
        shape = value.type.tensor_type.shape
        wide = f"{value.name}/wide"
        for node in graph.node:
            node.input[:] = [wide if name == value.name else name for name in node.input]
        target = "pairs_by_one" if len(shape.dim) == 2 else "pairs"
        nodes.append(helper.make_node("Expand", [value.name, target], [wide]))
        shape.dim[0].Clear()
        shape.dim[0].dim_param = "users"
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    assert core.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    return core
