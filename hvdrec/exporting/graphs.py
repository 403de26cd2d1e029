"""Build the towers' ONNX graphs with preprocessing in front; export torch functions as graphs."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import torch
from numpy.typing import NDArray
from onnx import compose, helper, numpy_helper
from torch import Tensor, nn

from hvdrec.config.names import PREFIX
from hvdrec.config.schema import Feature, Side
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import IR_VERSION, OPSET, build, output_name
from hvdrec.models.recommender import Recommender

Function = Callable[[dict[str, Tensor]], Tensor | tuple[Tensor, ...]]


class _Core(nn.Module):
    """A part of the model as a module with positional inputs, which torch's exporter requires."""

    def __init__(self, model: Recommender, function: Function, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self._names = list(names)

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._function(dict(zip(self._names, tensors, strict=True)))


def stored_width(model: Recommender, side: Side) -> int:
    """Return the number of columns of the stored embeddings of users or items.

    These are the columns of the model's representation, and one for the code of each feature that a
    scene feature combines (`crossed`). Codes are whole numbers below 2^24, exact in float32.
    """
    represented = model.user_width() if side == "user" else model.item_width()
    return represented + len(model.schema.carried(side))


def tower(model: Recommender, fitted: Fitted, side: Side) -> onnx.ModelProto:
    """Return the graph that computes embeddings of users (or items) from their raw columns.

    The output is [rows, `stored_width`].
    """
    represent = model.represent_users if side == "user" else model.represent_items
    features, carried = model.schema.side(side), model.schema.carried(side)

    def embed(inputs: dict[str, Tensor]) -> Tensor:
        vectors = represent({f.name: inputs[output_name(f.name)] for f in features})
        codes = [inputs[output_name(f.name)].unsqueeze(-1).to(vectors.dtype) for f in carried]
        return torch.cat([vectors, *codes], dim=-1) if codes else vectors

    examples = {output_name(feature.name): example(feature) for feature in features}
    core = export_function(model, embed, examples, [model.schema.own_name("embedding")])
    return joined(*preprocessing(fitted, features), core)


def example(feature: Feature) -> Tensor:
    """Return example codes of three rows, with which the exporter traces a function."""
    if not feature.is_embedded:
        return torch.zeros(3)
    return torch.zeros((3, 4) if feature.is_list else (3,), dtype=torch.int64)


def export_function(
    model: Recommender,
    function: Function,
    examples: dict[str, Tensor],
    outputs: Sequence[str],
    rows: str = "rows",
) -> onnx.ModelProto:
    """Export a function as an ONNX graph that takes any number of rows and any list lengths.

    Args:
        model: The model whose parameters the function uses.
        function: Maps a dict of named input tensors to one tensor per output.
        examples: Name -> example of each input.
        outputs: Names of the outputs.
        rows: Name of the dimension that counts rows.
    """
    row_count = torch.export.Dim(rows, min=1)
    shapes = tuple(
        {0: row_count, 1: torch.export.Dim.DYNAMIC}
        if name.startswith(output_name("")) and t.ndim == 2
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
    """Rename the outputs of a graph, and prefix all other names so that none equals an output."""
    prefix = f"{PREFIX}exported/{outputs[0].removeprefix(PREFIX)}/"
    core = compose.add_prefix(core, prefix, rename_inputs=False, rename_outputs=False)
    final = {f"{output}/exported": output for output in outputs}
    for node in core.graph.node:
        node.input[:] = [final.get(name, name) for name in node.input]
        node.output[:] = [final.get(name, name) for name in node.output]
        # The exporter stores stack traces here, with paths of this machine.
        del node.metadata_props[:]
    for value in (*core.graph.input, *core.graph.output):
        del value.metadata_props[:]
    for value in core.graph.output:
        value.name = final[value.name]
    return core


def joined(*models: onnx.ModelProto) -> onnx.ModelProto:
    """Join graphs into one, which has the outputs of the last graph.

    An input with the name of an earlier graph's output reads that output. Inputs of the same name
    become one input. All other names must differ between the graphs.
    """
    inputs: dict[str, onnx.ValueInfoProto] = {}
    outputs: set[str] = set()
    for model in models:
        inputs |= {v.name: v for v in model.graph.input if v.name not in outputs | {*inputs}}
        outputs |= {value.name for value in model.graph.output}
    last = models[-1].graph
    graph = helper.make_graph(
        [node for model in models for node in model.graph.node],
        last.name,
        list(inputs.values()),
        list(last.output),
        [constant for model in models for constant in model.graph.initializer],
    )
    versions = {opset.domain: opset.version for model in models for opset in model.opset_import}
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*opset) for opset in versions.items()],
        ir_version=max(model.ir_version for model in models),
        producer_name="hvdrec",
    )


def parsed(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    nodes: Sequence[str],
    constants: Mapping[str, NDArray[Any]],
    names: Mapping[str, str],
) -> onnx.ModelProto:
    """Parse a graph in ONNX's text format.

    Args:
        name: Name of the graph.
        inputs: Declarations of the inputs, such as ``float[rows, 8] item_embedding``.
        outputs: Declarations of the outputs.
        nodes: The nodes, such as ``sum = Add (left, right)``.
        constants: Name -> value of the constants that the nodes read.
        names: Name in the text -> name in the graph, for the tensors whose name matters. All other
            tensors get the name that `inner` returns.
    """
    signature = f"{name} ({', '.join(inputs)}) => ({', '.join(outputs)})"
    header = f'<ir_version: {IR_VERSION}, opset_import: ["": {OPSET}]>'
    model = onnx.parser.parse_model("\n".join([header, signature, "{", *nodes, "}"]))
    tensors = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    model.graph.initializer.extend(tensors)
    _rename(model.graph, names)
    return model


def inner(name: str) -> str:
    """Return a name for an inner tensor of a graph; no raw column can have this name."""
    return f"{PREFIX}inner/{name}"


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename the tensors of a graph and its subgraphs: as `names` says, else by `inner`."""

    def new(name: str) -> str:
        return names.get(name, inner(name)) if name else ""

    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = new(value.name)
    for node in graph.node:
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, names)


def preprocessing(
    fitted: Fitted, features: Sequence[Feature], prefix: str = "front", rows: str = "rows"
) -> tuple[onnx.ModelProto, ...]:
    """Return the preprocessing graph of some features in a tuple, for `joined`; empty if none.

    Args:
        fitted: The fitted features.
        features: The features to compile.
        prefix: Prefix of the names inside the graph.
        rows: Name of the dimension that counts rows. Dimensions with the same name must have the
            same size at run time, because ONNX Runtime plans memory by name.
    """
    if not features:
        return ()
    front = build(fitted, [feature.name for feature in features])
    prefix = f"{PREFIX}{prefix}/"
    front = compose.add_prefix(front, prefix, rename_inputs=False, rename_outputs=False)
    for value in (*front.graph.input, *front.graph.output, *front.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "rows":
                size.dim_param = rows
    return (front,)
