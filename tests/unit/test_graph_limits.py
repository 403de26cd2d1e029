"""Graphs that could take time or memory without bound are refused before a session is made."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from hvdrec.scoring.errors import BundleError
from hvdrec.scoring.graph_limits import check_graph
from hvdrec.scoring.graph_shapes import RULES
from tests.bundles import write_bundle

NAME = "graph.onnx"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def constant(name: str, value: Any, dtype: Any = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def model(
    nodes: list[onnx.NodeProto], *constants: onnx.TensorProto, dtype: int = FLOAT
) -> onnx.ModelProto:
    """Return a graph from ``x`` [rows, 4] and ``ids`` [rows, length] to ``y``."""
    graph = helper.make_graph(
        nodes,
        "tested",
        [
            helper.make_tensor_value_info("x", FLOAT, ["rows", 4]),
            helper.make_tensor_value_info("ids", INT64, ["rows", "length"]),
        ],
        [helper.make_tensor_value_info("y", dtype, None)],
        list(constants),
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 4)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def check(folder: Path, graph: onnx.ModelProto | bytes) -> None:
    data = graph if isinstance(graph, bytes) else graph.SerializeToString()
    (folder / NAME).write_bytes(data)
    check_graph(folder.resolve(), NAME, [NAME])


def branch(*nodes: onnx.NodeProto, output: str = "b") -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes), "branch", [], [helper.make_tensor_value_info(output, FLOAT, None)]
    )


def endless_loop() -> onnx.ModelProto:
    names = [("i", INT64), ("go", TensorProto.BOOL)]
    inputs = [helper.make_tensor_value_info(name, dtype, []) for name, dtype in names]
    body = helper.make_graph(
        [node("Identity", "go", "again")],
        "body",
        inputs,
        [helper.make_tensor_value_info("again", TensorProto.BOOL, [])],
    )
    loop = helper.make_node("Loop", ["", "yes"], [], body=body)
    return model([loop, node("Identity", "x", "y")], constant("yes", True, np.bool_))


def nested(depth: int) -> onnx.NodeProto:
    inner = node("Identity", "x", "b") if depth == 0 else nested(depth - 1)
    result = node("If", "yes", "b", then_branch=branch(inner), else_branch=branch(inner))
    return result


def doubling() -> onnx.ModelProto:
    nodes = [node("Concat", "c0 c0", "c1", axis=0)]
    nodes += [node("Concat", f"c{i} c{i}", f"c{i + 1}", axis=0) for i in range(1, 36)]
    return model([*nodes, node("Identity", "x", "y")], constant("c0", [1.0], np.float32))


def with_function() -> onnx.ModelProto:
    graph = model([helper.make_node("F", ["x"], ["y"], domain="own")])
    opset = helper.make_opsetid("", 20)
    function = helper.make_function("own", "F", ["a"], ["b"], [node("Relu", "a", "b")], [opset])
    graph.functions.append(function)
    return graph


def sparse() -> onnx.ModelProto:
    graph = model([node("Identity", "x", "y")])
    values, indices = constant("s", [1.0], np.float32), constant("at", [0])
    graph.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))
    return graph


def vast_dims() -> onnx.ModelProto:
    tensor = constant("w", [1.0], np.float32)
    tensor.dims[:] = [1 << 20, 1 << 20]
    return model([node("Add", "x w", "y")], tensor)


def many_uses() -> onnx.ModelProto:
    nodes = [node("MatMul", f"m{i} m{i}", f"m{i + 1}") for i in range(4000)]
    return model([*nodes, node("Add", "x m4000", "y")], constant("m0", np.eye(1024), np.float32))


def expand(*nodes: onnx.NodeProto) -> Callable[[], onnx.ModelProto]:
    return lambda: model([*nodes, node("Expand", "x shape", "y")])


HOSTILE: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "endless loop": (endless_loop, "operator Loop"),
    "Scan": (lambda: model([node("Scan", "x", "y", body=branch(), num_scan_inputs=1)]), "Scan"),
    "SequenceMap": (lambda: model([node("SequenceMap", "x", "y", body=branch())]), "SequenceMap"),
    "16 GB constant": (
        lambda: model([node("ConstantOfShape", "n", "y")], constant("n", [1 << 32])),
        "ConstantOfShape",
    ),
    "16 GB of Expand": (
        lambda: model(
            [node("Expand", "one n", "y")], constant("n", [1 << 32]), constant("one", [1])
        ),
        "Expand",
    ),
    "Expand of a row": (
        lambda: model([node("Expand", "x n", "y")], constant("n", [1 << 25, 1, 4])),
        "Expand",
    ),
    "Tile": (lambda: model([node("Tile", "x n", "y")], constant("n", [1, 1 << 32])), "Tile"),
    "Range": (
        lambda: model([node("Range", "a b c", "y")], *(constant(n, 1) for n in "abc")),
        "Range",
    ),
    "Resize": (lambda: model([node("Resize", "x", "y")]), "Resize"),
    "Pad": (lambda: model([node("Pad", "x n", "y")], constant("n", [0, 1 << 40])), "Pad"),
    "Concat that doubles": (doubling, "Concat"),
    "outer product of constants": (
        lambda: model(
            [node("Add", "a b", "y")],
            constant("a", np.ones((1 << 14, 1)), np.float32),
            constant("b", np.ones((1, 1 << 14)), np.float32),
        ),
        "Add",
    ),
    "rows times rows": (
        lambda: model([node("Transpose", "x", "t"), node("MatMul", "x t", "y")]),
        "MatMul",
    ),
    "entries times entries": (
        lambda: model(
            [
                node("Unsqueeze", "ids two", "u"),
                node("Unsqueeze", "ids one", "v"),
                node("Add", "u v", "y"),
            ],
            constant("one", [1]),
            constant("two", [2]),
            dtype=INT64,
        ),
        "Add",
    ),
    "vast rows of a table": (
        lambda: model(
            [node("Gather", "w ids", "y")], constant("w", np.ones((1, 1 << 19)), np.float32)
        ),
        "Gather",
    ),
    "a shape from a request": (
        lambda: model(
            [node("Squeeze", "ids axis", "s"), node("Expand", "x s", "y")], constant("axis", [0])
        ),
        "Expand",
    ),
    "a shape that is computed": (
        lambda: model(
            [node("Shape", "x", "s"), node("Mul", "s s", "t"), node("Expand", "x t", "y")]
        ),
        "Expand",
    ),
    "many matrix products": (many_uses, "MatMul"),
    "deep branches": (lambda: model([nested(9)], constant("yes", True, np.bool_)), "nests graphs"),
    "function": (with_function, "field 25"),
    "sparse tensor": (sparse, "field 15"),
    "sizes without contents": (vast_dims, "'w'"),
    "table of strings": (
        lambda: model([node("Gather", "w ids", "y")], constant("w", ["a" * 99999], object)),
        "strings",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_graph_without_bound_is_refused_at_once(name: str, tmp_path: Path) -> None:
    make, word = HOSTILE[name]
    graph = make()
    started = time.process_time()
    with pytest.raises(BundleError) as caught:
        check(tmp_path, graph)
    assert time.process_time() - started < 2
    assert caught.value.field == str(tmp_path / NAME)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_graphs_of_a_bundle_pass(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", tasks=True)
    for name in ("user_tower.onnx", "item_tower.onnx", "ranker.onnx"):
        check_graph(bundle, name, [name])


def test_sizes_in_proportion_to_rows_and_entries_pass(tmp_path: Path) -> None:
    """A list of embeddings, pooled, a product with weights, and a branch."""
    nodes = [
        node("Gather", "w ids", "e"),
        node("ReduceSum", "e one", "p", keepdims=0),
        node("Shape", "x", "s", start=0, end=1),
        node("Concat", "s width", "t", axis=0),
        node("Expand", "bias t", "wide"),
        node("Add", "p wide", "q"),
        node("Gemm", "q m", "b", transB=1),
        node(
            "If",
            "yes",
            "y",
            then_branch=branch(node("Relu", "b", "positive"), output="positive"),
            else_branch=branch(node("Neg", "b", "negative"), output="negative"),
        ),
    ]
    constants = (
        constant("w", np.ones((1000, 64)), np.float32),
        constant("one", [1]),
        constant("width", [64]),
        constant("bias", np.ones(64), np.float32),
        constant("m", np.ones((32, 64)), np.float32),
        constant("yes", True, np.bool_),
    )
    graph = model(nodes, *constants)
    check(tmp_path, graph)
    session = onnxruntime.InferenceSession(str(tmp_path / NAME))
    inputs = {"x": np.ones((3, 4), np.float32), "ids": np.zeros((3, 5), np.int64)}
    assert session.run(["y"], inputs)[0].shape == (3, 32)


def test_a_vocabulary_of_many_keys_passes(tmp_path: Path) -> None:
    """Its keys are passed over together: of one and of several lengths, long ones, and integers."""
    texts = [str(i) * (1 + i % 3) for i in range(5000)] + ["k" * 200 + str(i) for i in range(100)]
    for keys in ({"keys_strings": texts}, {"keys_int64s": range(-2600, 2500)}):
        graph = model(
            [
                helper.make_node(
                    "LabelEncoder",
                    ["ids"],
                    ["y"],
                    domain="ai.onnx.ml",
                    values_int64s=range(5100),
                    default_int64=1,
                    **keys,
                )
            ],
            dtype=INT64,
        )
        check(tmp_path, graph)
        data = graph.SerializeToString()
        with pytest.raises(BundleError):
            check(tmp_path, data[: len(data) // 2])


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_without_another_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    whole = bytearray(
        model([nested(2), node("Relu", "b", "y")], constant("yes", 1)).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (folder / NAME).write_bytes(whole)
    try:
        check_graph(folder.resolve(), NAME, [NAME])
    except BundleError as error:
        assert error.field == str(folder.resolve() / NAME)


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / NAME).touch()
    os.truncate(tmp_path / NAME, 1 << 40)
    with pytest.raises(BundleError, match="bytes"):
        check_graph(tmp_path.resolve(), NAME, [NAME])


def test_no_rule_is_for_an_operator_with_a_subgraph() -> None:
    for name in RULES:
        domain, _, op = name.rpartition(":")
        attributes = onnx.defs.get_schema(op, domain=domain).attributes.values()
        kinds = {attribute.type for attribute in attributes}
        assert kinds.isdisjoint([onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS]), name


def test_an_if_may_stand_before_what_its_branches_read(tmp_path: Path) -> None:
    # The order that quantization leaves. ONNX Runtime opens such a graph, too.
    parts = [branch(node(op, "late", "b")) for op in ("Relu", "Identity")]
    nodes = [
        node("If", "yes", "chosen", then_branch=parts[0], else_branch=parts[1]),
        node("Relu", "chosen", "y"),
        node("Add", "x x", "late"),
    ]
    yes = constant("yes", True, bool)
    check(tmp_path, model(nodes, yes))
    with pytest.raises(BundleError, match="reads a tensor that is not there"):
        check(tmp_path, model(nodes[:2], yes))
