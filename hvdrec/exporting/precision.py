"""Smaller numbers in a bundle, and what they cost.

Embeddings are stored as float16, or as int8 with one scale per row (the row's largest magnitude
over 127); the ranker's inner layers as int8 with one scale per output, their inputs quantized as
they come (onnxruntime's dynamic quantization). The cost is the AUC that is lost on the validation
split, both scores computed by the bundle's own graphs from raw values.
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
from hvdrec.config.schema import Column
from hvdrec.errors import UserError
from hvdrec.evaluation.ranking import auc
from hvdrec.features.raw import rows_to_inputs

Array = NDArray[Any]
BLOCK = 4096
MEASURED_ROWS = 200_000


def make_smaller(draft: Path, config: Config) -> dict[str, Any]:
    """Rewrite a draft's embeddings and ranker as ``export`` says, and return what that costs.

    The result is ``auc_float32``, ``auc``, ``auc_loss`` over ``rows`` of the validation split, and
    under ``tasks`` the same of each task's own probability and label. Raises UserError where the
    ranker has no layer that could be int8.
    """
    kinds = config.export
    rows = _validation_rows(config)
    if not rows.num_rows:
        raise UserError("export: there are no validation rows to measure smaller numbers on")
    before = _Measured(draft, config, rows)
    reference = before.scores(draft / "ranker.onnx", "float32")  # of the score, then of each task
    if kinds.ranker == "int8":
        quantize_ranker(draft / "ranker.onnx")
    for side in ("users", "items"):
        file = draft / side / "embeddings.npy"
        stored, scales = compressed(np.load(file, allow_pickle=False), kinds.embeddings)
        np.save(file, stored, allow_pickle=False)
        if scales is not None:
            np.save(file.with_name("scales.npy"), scales, allow_pickle=False)
    smaller = before.scores(draft / "ranker.onnx", kinds.embeddings)
    (full, reached), *of_tasks = zip(before.aucs(reference), before.aucs(smaller), strict=True)
    names = [task.name for task in config.tasks]
    tasks = {
        name: {"auc_float32": f, "auc": r, "auc_loss": f - r}
        for name, (f, r) in zip(names, of_tasks, strict=True)
    }
    return {
        "embeddings": kinds.embeddings,
        "ranker": kinds.ranker,
        "split": "validation",
        "rows": rows.num_rows,
        "auc_float32": full,
        "auc": reached,
        "auc_loss": full - reached,
        **({"tasks": tasks} if tasks else {}),
    }


def compressed(embeddings: Array, kind: str) -> tuple[Array, Array | None]:
    """Return embeddings float32 [n, width] as they are stored, and int8's scales float32 [n].

    Raises UserError for a value that float16 cannot hold.
    """
    if kind == "float32":
        return embeddings, None
    if kind == "float16":
        limit = float(np.finfo(np.float16).max)
        largest = float(np.abs(embeddings).max(initial=0.0))
        if largest > limit:
            raise UserError(
                f"export.embeddings = 'float16': an embedding holds {largest:g}, float16 ends at "
                f"{limit:g}; store them as int8 or float32"
            )
        return embeddings.astype(np.float16), None
    largest_of_rows = np.abs(embeddings).max(axis=1, initial=0.0)
    scales = (np.where(largest_of_rows > 0, largest_of_rows, 1.0) / 127).astype(np.float32)
    return np.rint(embeddings / scales[:, None]).astype(np.int8), scales


def restored(stored: Array, scales: Array | None) -> Array:
    """Return stored embeddings as float32 [n, width]."""
    embeddings = stored.astype(np.float32)
    return embeddings if scales is None else embeddings * scales[:, None]


def quantize_ranker(file: Path) -> None:
    """Rewrite a ranker with int8 weights behind its first layer; UserError if there are none."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.onnx_model import ONNXModel

    # Only products are quantized, no products with a bias.
    model = ONNXModel(onnx.load(str(file)))
    model.replace_gemm_with_matmul()
    model.topological_sort()
    layers = _layers(model.model.graph)
    if not layers:
        raise UserError(
            "export.ranker = 'int8': the ranker has no inner layer; give model.ranker.hidden two "
            "layers or more, or leave it at float32"
        )
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


def _layers(graph: onnx.GraphProto) -> list[str]:
    """Return the inner products with constant weights that are computed for each item, in order.

    Those with which no other comes behind them give logits: they are small, and errors there are
    not averaged out.
    """
    constants = {weight.name for weight in graph.initializer}
    before: dict[str, frozenset[str]] = {"item_embedding": frozenset(), "first": frozenset()}
    inner: set[str] = set()
    layers = []
    for node in graph.node:
        found = [before[name] for name in node.input if name in before]
        if not found:
            continue
        behind = frozenset().union(*found)
        if node.op_type == "MatMul" and node.input[1] in constants:
            inner |= behind
            layers.append(node.name)
            behind = frozenset([node.name])
        before |= dict.fromkeys(node.output, behind)
    return [name for name in layers if name in inner]


class _Measured:
    """Validation rows as the bundle's towers represent them."""

    def __init__(self, draft: Path, config: Config, rows: pa.Table) -> None:
        schema = config.schema
        self._users = _run(draft / "user_tower.onnx", schema.columns("user"), rows)
        self._items = _run(draft / "item_tower.onnx", schema.columns("item"), rows)
        self._scene, self._rows = schema.columns("scene"), rows
        self._tasks = config.tasks

    def scores(self, ranker: Path, kind: str) -> Array:
        """Return the outputs float32 [1 + T, n] of representations that were stored as ``kind``."""
        session = onnxruntime.InferenceSession(str(ranker), providers=["CPUExecutionProvider"])
        users, items = (restored(*compressed(part, kind)) for part in (self._users, self._items))
        scores = []
        for start in range(0, len(users), BLOCK):
            part = slice(start, start + BLOCK)
            inputs = {
                "user_embedding": users[part],
                "item_embedding": items[part],
                "request": np.arange(len(users[part])),
                **rows_to_inputs(self._scene, self._rows.slice(start, BLOCK)),
            }
            scores.append(session.run(["score", *(t.output for t in self._tasks)], inputs))
        return np.concatenate(scores, axis=1)

    def aucs(self, scores: Array) -> list[float]:
        """Return the AUCs of scores [1 + T, n], each on its label, weighted as in evaluation."""
        weight = self._rows["weight"].to_numpy()
        columns = ("label", *(task.column for task in self._tasks))
        found = []
        for name, score in zip(columns, scores, strict=True):
            label = self._rows[name].to_numpy()
            known = ~np.isnan(label)
            found.append(auc(score[known], label[known], weight[known]))
        return found


def _run(graph: Path, columns: tuple[Column, ...], rows: pa.Table) -> Array:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    blocks = (rows.slice(start, BLOCK) for start in range(0, rows.num_rows, BLOCK))
    return np.concatenate(
        [session.run(["embedding"], rows_to_inputs(columns, block))[0] for block in blocks]
    )


def _validation_rows(config: Config) -> pa.Table:
    """Return validation rows, at most MEASURED_ROWS, spread evenly."""
    folder = config.paths.of("samples") / "validation"
    rows: pa.Table = ds.dataset(str(folder), format="parquet").to_table()
    step = max(1, -(-rows.num_rows // MEASURED_ROWS))
    return rows.take(np.arange(0, rows.num_rows, step))
