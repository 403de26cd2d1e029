"""Embedding tables in a checkpoint: one file per rank for sharded ones, one for all others.

``tables-RRRRR-of-NNNNN.safetensors`` holds, of each sharded table, the rows R, R + N, R + 2N, …;
``tables.safetensors`` holds the replicated tables whole. A tensor is named ``TABLE/weight`` or
``TABLE/STATE``. They are read into any placement on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hvdrec.embeddings.kernels import AVERAGE
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.errors import UserError
from hvdrec.models.embedding import EmbeddingTables

REPLICATED = "tables.safetensors"
WEIGHT = "weight"


def table_meta(tables: DistributedTables) -> dict[str, Any]:
    """Return what a checkpoint's manifest must say of its tables."""
    return {
        "ranks": tables.world.size,
        "sharded": [t for group in tables.groups if group.is_sharded for t in group.rows],
        "kernels": {
            str(group.width): kernel.name
            for group, kernel in zip(tables.groups, tables.kernels, strict=True)
        },
        "step": tables.step,
        # Whether averages lie beside the rows, which are then what is evaluated and served.
        "averaged": any(AVERAGE in kernel.state for kernel in tables.kernels),
    }


def write_tables(directory: Path, tables: DistributedTables) -> None:
    """Write this rank's part of the sharded tables; the first rank writes the others, too."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for group in tables.groups:
        for table in group.rows:
            weight, state = tables.table(table)
            named = {f"{table}/{key}": value for key, value in {WEIGHT: weight, **state}.items()}
            (parts if group.is_sharded else whole).update(named)
    if parts:
        file = directory / _part_name(tables.world.rank, tables.world.size)
        save_file({name: value.cpu().contiguous() for name, value in parts.items()}, file)
    if whole and tables.world.is_first:
        save_file(
            {name: value.cpu().contiguous() for name, value in whole.items()},
            directory / REPLICATED,
        )


def read_tables(
    directory: Path, meta: Mapping[str, Any], tables: DistributedTables, *, served: bool = False
) -> None:
    """Fill this rank's tables and their optimizer state from a checkpoint.

    served: take the averages of the rows for the rows, where there are averages.
    """
    for group in tables.groups:
        for table in group.rows:
            start = tables.world.rank if group.is_sharded else 0
            weight, state = tables.table(table)
            for key, value in {WEIGHT: weight, **state}.items():
                total = group.rows[table]
                source = served_key(meta) if served and key == WEIGHT else key
                rows = _rows(directory, meta, f"{table}/{source}", total, start, group.ranks)
                if rows.shape != value.shape:
                    raise _does_not_fit(directory, table, tuple(rows.shape), tuple(value.shape))
                value.copy_(rows)
    tables.step = int(meta["step"])


def read_into_model(directory: Path, meta: Mapping[str, Any], tables: EmbeddingTables) -> None:
    """Fill the tables that a model holds itself."""
    for table, size in tables.sizes.items():
        weight = tables.weight(table)
        rows = _rows(directory, meta, f"{table}/{served_key(meta)}", size, 0, 1)
        if rows.shape != weight.shape:
            raise _does_not_fit(directory, table, tuple(rows.shape), tuple(weight.shape))
        with torch.no_grad():
            weight.copy_(rows)


def served_key(meta: Mapping[str, Any]) -> str:
    """Return the name under which the rows that are evaluated and served are stored."""
    return AVERAGE if meta.get("averaged") else WEIGHT


def _rows(
    directory: Path, meta: Mapping[str, Any], name: str, total: int, start: int, step: int
) -> Tensor:
    """Return rows start, start + step, … of a stored tensor that has `total` in all."""
    if name.split("/", maxsplit=1)[0] not in meta["sharded"]:
        return _tensor(directory / REPLICATED, name)[start::step]
    before = int(meta["ranks"])
    found: Tensor | None = None
    for rank in range(before):
        part = _tensor(directory / _part_name(rank, before), name)
        ids = torch.arange(rank, rank + before * len(part), before)
        mine = ids % step == start
        if found is None:
            found = part.new_empty(-(-(total - start) // step), *part.shape[1:])
        places = torch.div(ids[mine] - start, step, rounding_mode="floor")
        if len(places) and int(places[-1]) >= len(found):
            raise _does_not_fit(directory, name, (int(ids[-1]) + 1,), (total,))
        found[places] = part[mine]
    assert found is not None
    return found


def _tensor(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}: '{name}' cannot be read ({error}); use another checkpoint"
        ) from None


def _part_name(rank: int, size: int) -> str:
    return f"tables-{rank:05d}-of-{size:05d}.safetensors"


def _does_not_fit(
    directory: Path, table: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> UserError:
    return UserError(
        f"{directory}: table '{table}' is {list(found)}, the features make it {list(wanted)}; "
        "train again after hvdrec prepare"
    )
