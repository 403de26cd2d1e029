"""Embedding tables in a checkpoint: a file per rank for sharded tables, one for replicated tables.

In a job of N ranks, rank R writes rows R, R + N, R + 2N, … of each sharded table to
``tables-RRRRR-of-NNNNN.safetensors``, where RRRRR and NNNNN are R and N in five digits.
``tables.safetensors`` holds the replicated tables. Tensors are named ``TABLE/weight``, or
``TABLE/STATE`` for a state of the optimizer such as ``accumulator``. Tables can be read into any
placement on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hvdrec.embeddings.kernels import AVERAGE
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.errors import UserError, invalid_file
from hvdrec.models.embedding import EmbeddingTables
from hvdrec.storage.artifacts import StoredFiles

REPLICATED = "tables.safetensors"
WEIGHT = "weight"


def table_meta(tables: DistributedTables) -> dict[str, Any]:
    """Return the part of a checkpoint's manifest about embedding tables, ready for JSON."""
    return {
        "ranks": tables.world.size,
        "sharded": [t for group in tables.groups if group.is_sharded for t in group.sizes],
        "kernels": {
            str(group.width): kernel.name
            for group, kernel in zip(tables.groups, tables.kernels, strict=True)
        },
        "step": tables.step,
        "sizes": {t: size for group in tables.groups for t, size in group.sizes.items()},
        # True if moving averages are stored; evaluation and export then read them as the rows.
        "averaged": any(AVERAGE in kernel.state for kernel in tables.kernels),
    }


def write_tables(directory: Path, tables: DistributedTables) -> list[Path]:
    """Write this rank's part of the sharded tables; rank 0 also writes the replicated tables.

    Returns:
        The files that this rank wrote.
    """
    replicated: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for group in tables.groups:
        for table in group.sizes:
            weight, state = tables.table(table)
            named = {f"{table}/{key}": value for key, value in {WEIGHT: weight, **state}.items()}
            (parts if group.is_sharded else replicated).update(named)
    named_files = {_part_name(tables.world.rank, tables.world.size): parts}
    if tables.world.is_first:
        named_files[REPLICATED] = replicated
    written = []
    for file, tensors in named_files.items():
        if tensors:
            written.append(directory / file)
            save_file({name: v.cpu().contiguous() for name, v in tensors.items()}, written[-1])
    return written


def read_tables(
    files: StoredFiles, meta: Mapping[str, Any], tables: DistributedTables, *, served: bool = False
) -> None:
    """Read this rank's rows and their optimizer state from a checkpoint into `tables`.

    Args:
        files: The files of the checkpoint, which are verified.
        meta: The result of `table_meta`, from the checkpoint's manifest.
        tables: The tables to fill.
        served: Whether to read the moving averages of the rows, if stored, instead of the rows.

    Raises:
        UserError: A file is damaged, or the features now give a table another shape.
    """
    for group in tables.groups:
        for table in group.sizes:
            start = tables.world.rank if group.is_sharded else 0
            weight, state = tables.table(table)
            for key, value in {WEIGHT: weight, **state}.items():
                total = group.sizes[table]
                source = served_key(meta) if served and key == WEIGHT else key
                rows = _rows(files, meta, f"{table}/{source}", total, start, group.ranks)
                if rows.shape != value.shape:
                    raise _wrong_shape(
                        files.directory, table, tuple(rows.shape), tuple(value.shape)
                    )
                value.copy_(rows)
    tables.step = int(meta["step"])


def carry_tables(
    files: StoredFiles,
    meta: Mapping[str, Any],
    tables: DistributedTables,
    changed: Mapping[str, NDArray[np.bool_]],
) -> None:
    """Read this rank's rows of a checkpoint into tables that have grown since the checkpoint.

    Tables and rows that the checkpoint lacks keep their initial values and optimizer state, and so
    do rows that changed their meaning.

    Args:
        files: The files of the checkpoint, which are verified.
        meta: The result of `table_meta`, from the checkpoint's manifest.
        tables: The tables to fill, which hold initial values.
        changed: Table -> whether each row has changed its meaning [rows].

    Raises:
        UserError: A file is damaged, or a table now has another width.
    """
    for group in tables.groups:
        for table in group.sizes:
            stored = _stored_rows(files, meta, table)
            if not stored:
                continue
            start = tables.world.rank if group.is_sharded else 0
            weight, state = tables.table(table)
            for key, value in {WEIGHT: weight, **state}.items():
                is_kept = key != AVERAGE or meta.get("averaged")
                source = f"{table}/{key if is_kept else WEIGHT}"
                rows = _rows(files, meta, source, stored, start, group.ranks)
                rows = rows[: len(value)]
                if rows.shape[1:] != value.shape[1:]:
                    shapes = tuple(rows.shape), tuple(value.shape)
                    raise _wrong_shape(files.directory, table, *shapes)
                own = torch.from_numpy(changed[table][start :: group.ranks][: len(rows)])
                kept = torch.nonzero(~own).squeeze(1)
                value[kept.to(value.device)] = rows[kept].to(value)
    tables.step = int(meta["step"])


def _stored_rows(files: StoredFiles, meta: Mapping[str, Any], table: str) -> int:
    """Return the number of rows of a table in a checkpoint; 0 if it lacks the table.

    Manifests of earlier versions lack this number; it is then computed from the files.
    """
    if "sizes" in meta:
        return int(meta["sizes"].get(table, 0))
    parts = range(int(meta["ranks"])) if table in meta["sharded"] else ()
    names = [_part_name(rank, int(meta["ranks"])) for rank in parts] or [REPLICATED]
    rows = 0
    for file in (files.verified(name) for name in names if name in files):
        with safe_open(file, framework="pt") as opened:
            if f"{table}/{WEIGHT}" in opened.keys():  # noqa: SIM118
                rows += opened.get_slice(f"{table}/{WEIGHT}").get_shape()[0]
    return rows


def read_into_model(files: StoredFiles, meta: Mapping[str, Any], tables: EmbeddingTables) -> None:
    """Read a checkpoint's rows, or their moving averages if stored, into a model's own tables."""
    for table, size in tables.sizes.items():
        weight = tables.weight(table)
        rows = _rows(files, meta, f"{table}/{served_key(meta)}", size, 0, 1)
        if rows.shape != weight.shape:
            raise _wrong_shape(files.directory, table, tuple(rows.shape), tuple(weight.shape))
        with torch.no_grad():
            weight.copy_(rows)


def served_key(meta: Mapping[str, Any]) -> str:
    """Return the tensor name of the rows to evaluate and serve: ``average`` or ``weight``."""
    return AVERAGE if meta.get("averaged") else WEIGHT


def _rows(
    files: StoredFiles, meta: Mapping[str, Any], name: str, total: int, start: int, step: int
) -> Tensor:
    """Read rows start, start + step, … of a tensor that has `total` rows over all files.

    Only the files that hold such rows are read.
    """
    if name.rpartition("/")[0] not in meta["sharded"]:
        return _tensor(files.verified(REPLICATED), name)[start::step]
    parts = int(meta["ranks"])
    rows: Tensor | None = None
    # rank + parts * i = start + step * j has solutions if gcd(parts, step) divides start - rank.
    for rank in range(start % math.gcd(parts, step), parts, math.gcd(parts, step)):
        part = _tensor(files.verified(_part_name(rank, parts)), name)
        ids = torch.arange(rank, rank + parts * len(part), parts)
        is_mine = ids % step == start
        if rows is None:
            rows = part.new_empty(-(-(total - start) // step), *part.shape[1:])
        indices = torch.div(ids[is_mine] - start, step, rounding_mode="floor")
        if len(indices) and int(indices[-1]) >= len(rows):
            raise _wrong_shape(files.directory, name, (int(ids[-1]) + 1,), (total,))
        rows[indices] = part[is_mine]
    assert rows is not None
    return rows


def _tensor(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        problem = f"'{name}' cannot be read ({error})"
        raise invalid_file(file, problem, "use another checkpoint") from None


def _part_name(rank: int, size: int) -> str:
    return f"tables-{rank:05d}-of-{size:05d}.safetensors"


def _wrong_shape(
    directory: Path, table: str, stored: tuple[int, ...], expected: tuple[int, ...]
) -> UserError:
    problem = f"table '{table}' has shape {list(stored)}, the features give {list(expected)}"
    return invalid_file(directory, problem, "train again after hvdrec prepare")
