"""Store a bundle's numbers as float16 or int8, and measure how much AUC this costs.

Embeddings become float16, or int8 with one scale per row: the row's largest absolute value divided
by 127. The weights of the ranker's inner layers become int8 with one scale per output; the inputs
of these layers are quantized at run time (ONNX Runtime's dynamic quantization).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.names import PREFIX
from hvdrec.config.schema import Column
from hvdrec.errors import UserError, invalid_value
from hvdrec.evaluation.ranking_metrics import auc
from hvdrec.exporting.graphs import inner
from hvdrec.features.raw import rows_to_inputs

Array = NDArray[Any]
BLOCK = 4096
MEASURED_ROWS = 200_000


def reduce_precision(draft: Path, config: Config) -> dict[str, Any]:
    """Rewrite a bundle's embeddings and ranker as ``[export]`` says, and measure the cost.

    The bundle's graphs score rows of the validation split before and after the change.

    Args:
        draft: The bundle's directory before it is published, all in float32.
        config: The configuration of the run.

    Returns:
        ``auc_float32``, ``auc`` and ``auc_loss`` over ``rows`` rows of the validation split; under
        ``tasks`` the same for each task.

    Raises:
        UserError: There are no validation rows, a value is too large for float16, or the ranker has
            no layer that can be int8.
    """
    export = config.export
    rows = _validation_rows(config)
    if not rows.num_rows:
        raise UserError("export: there are no validation rows to measure the loss of precision on")
    measured = _ValidationRows(draft, config, rows)
    reference = measured.scores(draft / "ranker.onnx", "float32")
    if export.ranker == "int8":
        quantize_ranker(draft / "ranker.onnx")
    for side in ("users", "items"):
        file = draft / side / "embeddings.npy"
        stored, scales = compressed(np.load(file, allow_pickle=False), export.embeddings)
        np.save(file, stored, allow_pickle=False)
        if scales is not None:
            np.save(file.with_name("scales.npy"), scales, allow_pickle=False)
    reduced = measured.scores(draft / "ranker.onnx", export.embeddings)
    score, *by_task = (
        {"auc_float32": before, "auc": after, "auc_loss": before - after}
        for before, after in zip(measured.aucs(reference), measured.aucs(reduced), strict=True)
    )
    tasks = {task.name: cost for task, cost in zip(config.tasks, by_task, strict=True)}
    return {
        "embeddings": export.embeddings,
        "ranker": export.ranker,
        "split": "validation",
        "rows": rows.num_rows,
        **score,
        **({"tasks": tasks} if tasks else {}),
    }


def compressed(embeddings: Array, dtype: str) -> tuple[Array, Array | None]:
    """Convert embeddings to the type in which they are stored.

    Args:
        embeddings: float32 [n, width].
        dtype: ``float32``, ``float16`` or ``int8``.

    Returns:
        The converted embeddings; the scales float32 [n] for int8, else None.

    Raises:
        UserError: A value is too large for float16.
    """
    if dtype == "float32":
        return embeddings, None
    if dtype == "float16":
        limit = float(np.finfo(np.float16).max)
        largest = float(np.abs(embeddings).max(initial=0.0))
        if largest > limit:
            problem = f"an embedding holds {largest:g}, float16 ends at {limit:g}"
            raise invalid_value("export.embeddings", dtype, problem, "use int8 or float32")
        return embeddings.astype(np.float16), None
    largest_of_rows = np.abs(embeddings).max(axis=1, initial=0.0)
    scales = (np.where(largest_of_rows > 0, largest_of_rows, 1.0) / 127).astype(np.float32)
    return np.rint(embeddings / scales[:, None]).astype(np.int8), scales


def restored(stored: Array, scales: Array | None) -> Array:
    """Convert stored embeddings to float32 [n, width]."""
    embeddings = stored.astype(np.float32)
    return embeddings if scales is None else embeddings * scales[:, None]


def quantize_ranker(file: Path) -> None:
    """Rewrite a ranker's graph so that the layers after the first have int8 weights.

    Raises:
        UserError: There is no such layer.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.onnx_model import ONNXModel

    # The library quantizes only MatMul, not Gemm (a product with a bias).
    model = ONNXModel(onnx.load(str(file)))
    model.replace_gemm_with_matmul()
    model.topological_sort()
    layers = _inner_layers(model.model.graph)
    if not layers:
        problem = "the ranker has no inner layer"
        remedy = "give model.ranker.hidden two layers or more, or use float32"
        raise invalid_value("export.ranker", "int8", problem, remedy)
    model.save_model_to_file(str(file))
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            str(file),
            str(file),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=layers,
        )
    finally:
        logging.getLogger().setLevel(level)


def _inner_layers(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the MatMul nodes of the ranker's inner layers, in order.

    Their weights are constants, and they run once per item. The first layer is left out: it is a
    sum of several MatMuls, and its errors would propagate to all other layers. The last layer of
    each output is left out too: it is small, and errors in logits do not average out.
    """
    constants = {weight.name for weight in graph.initializer}
    inputs = {value.name for value in graph.input}
    # The input has the prefixed name only if a raw column has the plain name.
    items = next(n for n in (f"{PREFIX}item_embedding", "item_embedding") if n in inputs)
    before: dict[str, frozenset[str]] = {items: frozenset(), inner("first"): frozenset()}
    followed: set[str] = set()
    layers = []
    for node in graph.node:
        earlier = [before[name] for name in node.input if name in before]
        if not earlier or inner("first") in node.output:
            continue
        preceding = frozenset().union(*earlier)
        if node.op_type == "MatMul" and node.input[1] in constants:
            followed |= preceding
            layers.append(node.name)
            preceding = frozenset([node.name])
        before |= dict.fromkeys(node.output, preceding)
    return [name for name in layers if name in followed]


class _ValidationRows:
    """Rows of the validation split with the embeddings that the bundle's towers compute."""

    def __init__(self, draft: Path, config: Config, rows: pa.Table) -> None:
        schema = config.schema
        output = schema.own_name("embedding")
        self._schema = schema
        self._users = _embed(draft / "user_tower.onnx", output, schema.columns("user"), rows)
        self._items = _embed(draft / "item_tower.onnx", output, schema.columns("item"), rows)
        self._scene, self._rows = schema.columns("scene"), rows
        self._tasks = config.tasks

    def scores(self, ranker: Path, dtype: str) -> Array:
        """Score the n rows, with embeddings rounded to `dtype`; float32 [1 + T, n] for T tasks."""
        session = onnxruntime.InferenceSession(str(ranker), providers=["CPUExecutionProvider"])
        users, items = (restored(*compressed(part, dtype)) for part in (self._users, self._items))
        own_name = self._schema.own_name
        outputs = [own_name(name) for name in ("score", *(t.output for t in self._tasks))]
        scores = []
        for start in range(0, len(users), BLOCK):
            part = slice(start, start + BLOCK)
            inputs = {
                own_name("user_embedding"): users[part],
                own_name("item_embedding"): items[part],
                own_name("request"): np.arange(len(users[part])),
                **rows_to_inputs(self._scene, self._rows.slice(start, BLOCK)),
            }
            scores.append(session.run(outputs, inputs))
        return np.concatenate(scores, axis=1)

    def aucs(self, scores: Array) -> list[float]:
        """Return the weighted AUC of each row of scores [1 + T, n], with the label of its task."""
        own_name = self._schema.own_name
        weight = self._rows[own_name("weight")].to_numpy()
        aucs = []
        columns = ("label", *(task.column for task in self._tasks))
        for name, score in zip(map(own_name, columns), scores, strict=True):
            label = self._rows[name].to_numpy()
            known = ~np.isnan(label)
            aucs.append(auc(score[known], label[known], weight[known]))
        return aucs


def _embed(graph: Path, output: str, columns: tuple[Column, ...], rows: pa.Table) -> Array:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    blocks = (rows.slice(start, BLOCK) for start in range(0, rows.num_rows, BLOCK))
    return np.concatenate(
        [session.run([output], rows_to_inputs(columns, block))[0] for block in blocks]
    )


def _validation_rows(config: Config) -> pa.Table:
    """Return at most MEASURED_ROWS validation rows, evenly spaced."""
    folder = config.paths.of("samples") / "validation"
    rows: pa.Table = ds.dataset(str(folder), format="parquet").to_table()
    step = max(1, -(-rows.num_rows // MEASURED_ROWS))
    return rows.take(np.arange(0, rows.num_rows, step))
