"""Scores whole tables: Parquet in, Parquet out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config.names import PREFIX, own_name
from hvdrec.config.schema import RawType
from hvdrec.errors import choices, invalid_file, nearest
from hvdrec.exporting.known_rows import KnownRows
from hvdrec.samples.columns import cast as cast_column
from hvdrec.samples.columns import compact, plain
from hvdrec.scoring import Scorer
from hvdrec.scoring.bundle import BundleInfo, Field
from hvdrec.storage.drafts import draft_file

BATCH_ROWS = 65_536
SAMPLE_COLUMNS = ("label", "weight", "time")
"""Columns that hvdrec adds to samples, which can be scored as they are."""
REMEDY = "add it, or use defaults (--defaults)"
CONVERT = "convert the column when you write the file"


@dataclass(frozen=True)
class _Columns:
    """How the columns of a file are used.

    Attributes:
        user: The user key and the raw features of users to read; the key alone stands for the
            stored embedding.
        item: The same of items.
        scene: The scene fields to read.
        kept: Columns of the file that are written again.
        added: Columns of the scores.
    """

    user: tuple[Field, ...]
    item: tuple[Field, ...]
    scene: tuple[Field, ...]
    kept: tuple[str, ...]
    added: tuple[str, ...]


def score_table(
    bundle: Path,
    source: Path,
    target: Path,
    *,
    defaults: bool = False,
    pass_through: Collection[str] = (),
    verify: bool = True,
) -> dict[str, Any]:
    """Score every row of a Parquet file and write its columns with ``score`` added.

    A bundle with tasks also adds ``score_NAME`` of each. A column of this name from an earlier
    scoring is replaced; if it is a feature or a column of the log, the added one is named
    ``__hvdrec_score``.

    Args:
        bundle: Directory of the bundle.
        source: Parquet file with the types that `hvdrec samples` takes. It needs the user key, the
            item key and all scene fields. It has all other raw features of users (items), or
            none: then the key's stored embedding is used.
        target: File to write, as a whole or not at all.
        defaults: Let missing scene fields take their defaults and other missing features count as
            missing values, and copy unknown columns.
        pass_through: Columns to copy and not to read, even if they have the name of a feature.
        verify: False to skip the comparison of the bundle's files with their checksums.

    Returns:
        ``rows``, ``output``, ``columns``, the names of the added columns, and ``warnings``: a line
        if rows are not later than what the stored users know, or if this cannot be told.

    Raises:
        UserError: The source is not a Parquet file, lacks a column, has an unknown column, or has
            a column whose type or values do not fit.
    """
    scorer = Scorer.load(bundle, verify=verify)
    try:
        file = pq.ParquetFile(source)
    except FileNotFoundError:
        raise invalid_file(source, "no such file", "give a Parquet file of raw values") from None
    except (OSError, pa.ArrowInvalid) as error:
        problem = f"is not readable as Parquet ({error})"
        raise invalid_file(source, problem, "write it again") from None
    columns = _columns(scorer, source, file.schema_arrow.names, defaults, pass_through)
    fields = [file.schema_arrow.field(name) for name in columns.kept]
    schema = pa.schema([*fields, *(pa.field(name, pa.float32()) for name in columns.added)])
    read = [name for name in file.schema_arrow.names if name not in pass_through]
    rows, known = 0, KnownRows(scorer.info, source, read)
    with draft_file(target) as draft, pq.ParquetWriter(draft, schema) as writer:
        for batch in file.iter_batches(BATCH_ROWS):
            scores = [pa.array(column) for column in _scores(scorer, source, batch, columns)]
            kept = [batch[name] for name in columns.kept]
            writer.write_table(pa.Table.from_arrays([*kept, *scores], schema=schema))
            known.count(batch)
            rows += batch.num_rows
    facts = {"rows": rows, "output": str(target), "columns": list(columns.added)}
    return facts | {"warnings": known.warnings()}


def _columns(
    scorer: Scorer,
    source: Path,
    names: Sequence[str],
    defaults: bool,
    pass_through: Collection[str],
) -> _Columns:
    """Decide how columns are used; UserError if one is missing or unknown."""
    info, present = scorer.info, [name for name in names if name not in pass_through]
    fields = {field.name: field for field in info.fields}
    for name in pass_through:
        if name not in names:
            problem = f"column '{name}' of pass_through is missing; {_near(name, names)}"
            raise invalid_file(source, problem, "correct the name")
    used: dict[str, tuple[Field, ...]] = {}
    for side in ("user", "item", "scene"):
        key = {"user": info.user_key, "item": info.item_key}.get(side)
        raw = [field for field in info.side(side) if field.name != key]
        missing = [field.name for field in raw if field.name not in present]
        if side != "scene" and len(missing) == len(raw):
            missing = []
        if key is not None and key not in present:
            problem = f"column '{key}' is missing, the {side} key; {_near(key, names)}"
            raise invalid_file(source, problem, "add it")
        if missing and not defaults:
            problem = f"column '{missing[0]}' is missing, a {side} feature; "
            raise invalid_file(
                source, problem + _near(missing[0], names), _remedy(side, raw, names)
            )
        keys = () if key is None else (fields.get(key) or _key_field(scorer, side, key),)
        used[side] = (*keys, *(field for field in raw if field.name in present))
    known = {info.user_key, info.item_key, *fields, *_log_columns(info)}
    added = ["score", *(f"score_{task}" for task in scorer.tasks)]
    known_here = {*known, *added, *SAMPLE_COLUMNS, *(f"label_{task}" for task in scorer.tasks)}
    for name in present:
        if name not in known_here and not name.startswith(PREFIX) and not defaults:
            problem = f"column '{name}' is unknown; {_near(name, [*fields, info.user_key])}"
            remedy = f"correct the name, or copy it unread (--pass-through '{name}')"
            raise invalid_file(source, problem, remedy)
    own = tuple(own_name(name, {*known, *pass_through} & {*names}) for name in added)
    kept = tuple(name for name in names if name not in own)
    return _Columns(used["user"], used["item"], used["scene"], kept, own)


def _near(name: str, known: Collection[str]) -> str:
    """Return the known names for a message, and the nearest one."""
    near = nearest(name, known)
    return f"known: {choices(known)}" + (f"; did you mean '{near}'?" if near else "")


def _remedy(side: str, raw: Sequence[Field], names: Sequence[str]) -> str:
    there = " ".join(f"'{field.name}'" for field in raw if field.name in names)
    if side == "scene" or not there:
        return REMEDY
    return f"{REMEDY}, or use the stored {side}s (--pass-through {there})"


def _key_field(scorer: Scorer, side: str, key: str) -> Field:
    """Describe a key that is not a feature."""
    return Field(key, side, scorer.key_dtype(side), False, False, 1, None)


def _log_columns(info: BundleInfo) -> set[str]:
    """Return the columns of the raw log of the run.

    An earlier version recorded only the configuration: there, every name in [samples] counts.
    """
    meta: Mapping[str, Any] = info.manifest["meta"]
    if "log_columns" in meta:
        return set(meta["log_columns"])
    texts = [*_texts(meta.get("config", {}).get("samples", {}))]
    return {*texts, *(word for text in texts for word in re.findall(r"\w+", text))}


def _texts(values: Any) -> Iterator[str]:
    """Yield all texts of nested JSON values, and the keys of objects."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping):
        yield from (key for key in values if isinstance(key, str))
        values = [*values.values()]
    if isinstance(values, list):
        for value in values:
            yield from _texts(value)


def _scores(
    scorer: Scorer, source: Path, batch: pa.RecordBatch, columns: _Columns
) -> Sequence[NDArray[np.float32]]:
    """Return the score of each row and, with tasks, each task's probability."""
    entries: list[list[Any]] = []
    for fields in (columns.user, columns.item):
        if len(fields) == 1:
            entries.append(_values(source, batch, fields[0]))
            continue
        raw = {field.name: _values(source, batch, field) for field in fields}
        entries.append(
            [dict(zip(raw, row, strict=True)) for row in zip(*raw.values(), strict=True)]
        )
    scene = {field.name: _values(source, batch, field) for field in columns.scene}
    if scorer.tasks:
        return list(scorer.score_tasks_rows(entries[0], entries[1], scene).values())
    return [scorer.score_rows(entries[0], entries[1], scene)]


def _values(source: Path, batch: pa.RecordBatch, field: Field) -> list[Any]:
    """Return the values of a column, converted as `hvdrec samples` converts them."""
    array = cast_column(
        compact(batch[field.name]),
        cast(RawType, field.dtype),
        where=str(source),
        name=field.name,
        purpose=f"a {field.side} field",
        lists=field.is_list,
        remedy=CONVERT,
    )
    values: list[Any] = plain(array).to_pylist()
    return values
