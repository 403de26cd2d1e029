"""ONNX graphs of the towers, with the features' preprocessing in front, and their making."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch
from onnx import compose, helper
from torch import Tensor, nn

from hvdrec.config.schema import Feature
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import build, output_name
from hvdrec.models.recommender import Recommender

OPSET = 20
Function = Callable[[dict[str, Tensor]], Tensor]
Functions = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


class _Core(nn.Module):
    """A part of the model as a function of positional tensors, which is what the exporter wants."""

    def __init__(self, model: Recommender, function: Functions, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self._names = list(names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._function(dict(zip(self._names, tensors, strict=True)))


def user_tower(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return raw user features [N] -> ``embedding`` float32 [N, user_width]."""
    return _tower(model, fitted, model.schema.side("user"), model.represent_users)


def item_tower(model: Recommender, fitted: Fitted) -> onnx.ModelProto:
    """Return raw item features [N] -> ``embedding`` float32 [N, item_width]."""
    return _tower(model, fitted, model.schema.side("item"), model.represent_items)


def _tower(
    model: Recommender, fitted: Fitted, features: tuple[Feature, ...], represent: Function
) -> onnx.ModelProto:
    def embed(inputs: dict[str, Tensor]) -> Tensor:
        return represent({feature.name: inputs[output_name(feature.name)] for feature in features})

    examples = {output_name(feature.name): example(feature) for feature in features}
    core = export_function(model, embed, examples, "embedding")
    return preprocessed(fitted, features, core)


def example(feature: Feature) -> Tensor:
    """Return a feature's codes of three rows, which the exporter traces a function with."""
    if not feature.is_embedded:
        return torch.zeros(3)
    return torch.zeros((3, 4) if feature.is_list else (3,), dtype=torch.int64)


def export_function(
    model: Recommender,
    function: Function,
    examples: dict[str, Tensor],
    output: str,
    rows: str = "rows",
) -> onnx.ModelProto:
    """Export a function of named tensors whose rows (and list lengths) are of any number."""
    return export_functions(model, lambda inputs: (function(inputs),), examples, [output], rows)


def export_functions(
    model: Recommender,
    function: Functions,
    examples: dict[str, Tensor],
    outputs: Sequence[str],
    rows: str = "rows",
) -> onnx.ModelProto:
    """Export a function that returns a tensor for each of the outputs; see `export_function`."""
    row_count = torch.export.Dim(rows, min=1)
    shapes = tuple(
        {0: row_count, 1: torch.export.Dim.DYNAMIC}
        if name.endswith(output_name("")) and t.ndim == 2
        else {0: row_count}
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
            output_names=[f"{output}/exported" for output in outputs],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        file = Path(folder) / "core.onnx"
        program.save(str(file))
        return _named(onnx.load(str(file)), outputs)


def _named(core: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """Give outputs their names, which the exporter may also use inside, and all else a prefix."""
    core = compose.add_prefix(core, f"{outputs[0]}/", rename_inputs=False, rename_outputs=False)
    final = {f"{output}/exported": output for output in outputs}
    for node in core.graph.node:
        node.input[:] = [final.get(name, name) for name in node.input]
        node.output[:] = [final.get(name, name) for name in node.output]
        # Traces of where the model's code lay on the exporting machine.
        del node.metadata_props[:]
    for value in (*core.graph.input, *core.graph.output):
        del value.metadata_props[:]
    for value in core.graph.output:
        value.name = final[value.name]
    return core


def joined(front: onnx.ModelProto, core: onnx.ModelProto) -> onnx.ModelProto:
    """Return one graph in which the front's outputs feed the core's inputs of the same name.

    An input that both take is one input. Names inside the two must differ.
    """
    made = {value.name for value in front.graph.output}
    inputs = {value.name: value for value in front.graph.input}
    inputs |= {value.name: value for value in core.graph.input if value.name not in made}
    graph = helper.make_graph(
        [*front.graph.node, *core.graph.node],
        core.graph.name,
        list(inputs.values()),
        list(core.graph.output),
        [*front.graph.initializer, *core.graph.initializer],
    )
    versions = {opset.domain: opset.version for opset in (*front.opset_import, *core.opset_import)}
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*opset) for opset in versions.items()],
        ir_version=max(front.ir_version, core.ir_version),
        producer_name="hvdrec",
    )


def preprocessed(
    fitted: Fitted, features: Sequence[Feature], core: onnx.ModelProto, rows: str = "rows"
) -> onnx.ModelProto:
    """Return a graph that takes ``rows`` raw values in place of the codes that the core takes."""
    if not features:
        return core
    front = build(fitted, [feature.name for feature in features])
    front = compose.add_prefix(front, "front/", rename_inputs=False, rename_outputs=False)
    # Sizes of one name are one size to the runtime, which reuses memory by it.
    for value in (*front.graph.input, *front.graph.output, *front.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "rows":
                size.dim_param = rows
    return joined(front, core)
