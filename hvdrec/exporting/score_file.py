"""Scoring whole tables: Parquet in, Parquet out."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.errors import UserError, choices
from hvdrec.scoring import Scorer

BATCH_ROWS = 65_536


def score_table(bundle: Path, source: Path, target: Path) -> dict[str, Any]:
    """Score every row of a Parquet file and write its columns, with ``score`` behind them.

    Where the bundle's ranker has tasks, ``score_NAME`` of each follows.

    A row needs the user and the item key; where the file has columns of raw user (item) features,
    these are used, otherwise the stored embedding of the key. Scene columns that are not there take
    their defaults. The target appears whole or not at all. Raises UserError for a file that is no
    Parquet or lacks a key.
    """
    scorer = Scorer.load(bundle)
    try:
        file = pq.ParquetFile(source)
    except FileNotFoundError:
        raise UserError(f"{source}: no such file; give a Parquet file of raw values") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{source}: no readable Parquet ({error}); write it again") from None
    found = file.schema_arrow.names
    for key in (scorer.info.user_key, scorer.info.item_key):
        if key not in found:
            raise UserError(f"{source}: column '{key}' is missing; the file has {choices(found)}")
    sides = {}
    for side, key in (("user", scorer.info.user_key), ("item", scorer.info.item_key)):
        names = [field.name for field in scorer.info.side(side) if field.name in found]
        raw = [name for name in names if name != key]
        sides[side] = (key, [key, *raw] if raw else [])
    scene = [field.name for field in scorer.info.side("scene") if field.name in found]
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    rows = 0
    made = ["score", *(f"score_{task}" for task in scorer.tasks)]
    kept = [name for name in found if name not in made]
    try:
        fields = [file.schema_arrow.field(name) for name in kept]
        schema = pa.schema([*fields, *(pa.field(name, pa.float32()) for name in made)])
        with pq.ParquetWriter(draft, schema) as writer:
            for batch in file.iter_batches(BATCH_ROWS):
                entries = {
                    side: batch.select(names).to_pylist() if names else batch[key].to_pylist()
                    for side, (key, names) in sides.items()
                }
                scenes = {name: batch[name].to_pylist() for name in scene}
                table = pa.Table.from_batches([batch]).select(kept)
                if scorer.tasks:
                    by_task = scorer.score_tasks_rows(entries["user"], entries["item"], scenes)
                    scores = list(by_task.values())
                else:
                    scores = [scorer.score_rows(entries["user"], entries["item"], scenes)]
                for name, column in zip(made, scores, strict=True):
                    table = table.append_column(name, pa.array(column))
                writer.write_table(table)
                rows += batch.num_rows
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return {"rows": rows, "output": str(target)}
