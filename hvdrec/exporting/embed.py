"""Compute the embeddings of users and items that a bundle stores, with the bundle's own towers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config.schema import Column, Schema, Side
from hvdrec.errors import invalid_file
from hvdrec.features.raw import rows_to_inputs
from hvdrec.parallel.pool import WorkerPool

BLOCK = 8192


@dataclass(frozen=True)
class _Block:
    """A block of users (items) to embed: their raw columns as an Arrow stream."""

    tower: Path
    output: str
    columns: tuple[Column, ...]
    rows: bytes


def write_side(
    draft: Path, side: Side, table: pa.Table, schema: Schema, workers: WorkerPool
) -> int:
    """Compute the embeddings of all users (items); write the sorted keys and the embeddings.

    Args:
        draft: The bundle's directory, which already holds the towers; all workers must see it.
        side: ``user`` or ``item``.
        table: The keys and raw columns of all users (items).
        schema: The features.
        workers: Processes that share the work; each loads the tower with its embedding tables.

    Returns:
        Number of users (items).
    """
    key, columns = schema.key(side), schema.columns(side)
    keys = key_array(table[key])
    order = np.argsort(keys, kind="stable")
    folder = draft / f"{side}s"
    folder.mkdir()
    np.save(folder / "keys.npy", keys[order], allow_pickle=False)
    tower = draft / f"{side}_tower.onnx"
    names = [*dict.fromkeys([key, *(column.name for column in columns)])]
    output = schema.own_name("embedding")
    blocks = _blocks(tower.absolute(), output, columns, table.select(names).take(order))
    try:
        with closing(workers.map(_embed, blocks)) as embeddings:
            np.save(folder / "embeddings.npy", np.concatenate([*embeddings]), allow_pickle=False)
    finally:
        _session.cache_clear()
    return len(keys)


def key_array(column: pa.ChunkedArray) -> NDArray[Any]:
    """Convert keys to the array that a bundle stores: UTF-8 bytes of a fixed width, or int64."""
    if pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy(), dtype=np.int64)
    return np.array([key.encode() for key in column.to_pylist()], dtype=np.bytes_)


def _blocks(
    tower: Path, output: str, columns: tuple[Column, ...], table: pa.Table
) -> Iterator[_Block]:
    for start in range(0, table.num_rows, BLOCK):
        part = table.slice(start, BLOCK)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part)
        yield _Block(tower, output, columns, sink.getvalue().to_pybytes())


def _embed(block: _Block) -> NDArray[np.float32]:
    """Return the embeddings [rows, width] of a block."""
    with pa.ipc.open_stream(block.rows) as stream:
        inputs = rows_to_inputs(block.columns, stream.read_all())
    embeddings: NDArray[np.float32] = _session(block.tower).run([block.output], inputs)[0]
    return embeddings


@lru_cache(maxsize=1)
def _session(tower: Path) -> Any:
    if not tower.is_file():
        problem = f"not visible on host {socket.gethostname()}"
        raise invalid_file(tower, problem, "all hosts must share the directory of the bundle")
    options = onnxruntime.SessionOptions()
    # With one thread, the order of sums and so the last bits do not depend on the machine.
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(tower), options, providers=["CPUExecutionProvider"])
