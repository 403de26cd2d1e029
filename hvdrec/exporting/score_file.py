"""Score all rows of a Parquet file and write them with their scores to another one."""

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
"""Columns that `hvdrec samples` adds. They are accepted, so that files of samples can be scored."""
REMEDY = "add it, or use defaults (--defaults)"
CONVERT = "convert the column when you write the file"


@dataclass(frozen=True)
class _Columns:
    """How the columns of a file are used.

    Attributes:
        user: Fields to read for users: the key and raw features. If there is only the key, the
            stored embeddings are used.
        item: Fields to read for items, in the same way.
        scene: Scene fields to read.
        kept: Names of the columns that are copied.
        added: Names of the new columns with scores.
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
    """Score every row of a Parquet file; write the rows and a new column ``score`` to another file.

    If the bundle predicts several tasks (labels), a column ``score_NAME`` is added for each. If the
    file has a column ``score`` from an earlier scoring, this column is replaced. If ``score`` is
    the name of a feature or of a column of the log, the new column is called ``__hvdrec_score``.

    Args:
        bundle: Directory of the bundle.
        source: Parquet file with columns of the types that `hvdrec samples` accepts. It must have
            the user key, the item key and all scene fields. It must have either all other raw
            features of users or none of them. If it has none, the users' stored embeddings are
            used. The same holds for items.
        target: File to write; it appears only when it is complete.
        defaults: True to accept missing and unknown columns. Missing scene fields take their
            defaults, other missing features are missing values, unknown columns are copied.
        pass_through: Columns to copy but not to read, even if they have the name of a feature.
        verify: False to skip the comparison of the bundle's files with their checksums.

    Returns:
        ``rows`` is the number of rows, ``output`` the path of the written file, ``columns`` the
        names of the new columns. ``warnings`` has a line if the stored embeddings of users may have
        been computed from the rows to score, so that their scores are too good.

    Raises:
        UserError: The source is not a Parquet file, lacks a column, has an unknown column, or has
            a column with the wrong type or with values that cannot be converted.
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
    return facts | {"warnings": [*known.warnings(), *_underived(scorer.info, source, read)]}


def _columns(
    scorer: Scorer,
    source: Path,
    names: Sequence[str],
    defaults: bool,
    pass_through: Collection[str],
) -> _Columns:
    """Decide how columns are used; raise UserError if one is missing or unknown."""
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
    """Format the known names and the one most similar to `name` for an error message."""
    near = nearest(name, known)
    return f"known: {choices(known)}" + (f"; did you mean '{near}'?" if near else "")


def _remedy(side: str, raw: Sequence[Field], names: Sequence[str]) -> str:
    there = " ".join(f"'{field.name}'" for field in raw if field.name in names)
    if side == "scene" or not there:
        return REMEDY
    return f"{REMEDY}, or use the stored {side}s (--pass-through {there})"


def _key_field(scorer: Scorer, side: str, key: str) -> Field:
    """Return a field that describes a key which is not a feature."""
    return Field(key, side, scorer.key_dtype(side), False, False, 1, None)


def _log_columns(info: BundleInfo) -> set[str]:
    """Return the names of the columns in the raw log of the run.

    For bundles of earlier versions, which did not record them, return all names in ``[samples]``.
    """
    meta: Mapping[str, Any] = info.manifest["meta"]
    if "log_columns" in meta:
        return set(meta["log_columns"])
    texts = [*_texts(meta.get("config", {}).get("samples", {}))]
    return {*texts, *(word for text in texts for word in re.findall(r"\w+", text))}


def _underived(info: BundleInfo, source: Path, names: Collection[str]) -> Iterator[str]:
    """Yield a line for each feature that the samples derived from a log column of the same name.

    Only a file with other columns of the log is checked. It is probably the log itself, which has
    the values from before the derivation.
    """
    meta: Mapping[str, Any] = info.manifest["meta"]
    features = {field.name for field in info.fields} | {info.user_key, info.item_key}
    derive = meta.get("config", {}).get("samples", {}).get("derive", {})
    if not set(meta.get("log_columns", ())) - features - set(derive) & set(names):
        return
    for name, expression in derive.items():
        if name in features and name in names and re.search(rf"\b{re.escape(name)}\b", expression):
            problem = f"column '{name}' is read as it is; the samples derived it as {expression}"
            yield f"{source}: {problem}; give it the derived values, unless it has them already"


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
    """Return the scores of a batch of rows; if there are tasks, also the probabilities of each."""
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
