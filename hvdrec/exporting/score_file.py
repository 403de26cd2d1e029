"""Score all rows of a Parquet file and write them with their scores to another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.errors import choices, invalid_file
from hvdrec.exporting.known_rows import KnownRows
from hvdrec.scoring import Scorer
from hvdrec.storage.drafts import draft_file

BATCH_ROWS = 65_536


def score_table(bundle: Path, source: Path, target: Path, *, verify: bool = True) -> dict[str, Any]:
    """Score every row of a Parquet file; write the rows and a new column ``score`` to another file.

    If the bundle predicts several tasks (labels), a column ``score_NAME`` is added for each.

    Args:
        bundle: Directory of the bundle.
        source: Parquet file with the columns of the user key and the item key. If it has columns of
            other raw features of users, the users' embeddings are computed from these; otherwise
            the embeddings stored in the bundle are used. The same holds for items. A scene field
            without a column takes its default.
        target: File to write; it appears only when it is complete.
        verify: False to skip the comparison of the bundle's files with their checksums.

    Returns:
        ``rows`` is the number of rows, ``output`` is the path of the written file. ``warnings`` has
        a line if the stored embeddings of users may have been computed from the rows to score, so
        that their scores are too good.

    Raises:
        UserError: The source is not a Parquet file or lacks the column of a key.
    """
    scorer = Scorer.load(bundle, verify=verify)
    try:
        file = pq.ParquetFile(source)
    except FileNotFoundError:
        raise invalid_file(source, "no such file", "give a Parquet file of raw values") from None
    except (OSError, pa.ArrowInvalid) as error:
        problem = f"is not readable as Parquet ({error})"
        raise invalid_file(source, problem, "write it again") from None
    names = file.schema_arrow.names
    for key in (scorer.info.user_key, scorer.info.item_key):
        if key not in names:
            raise invalid_file(source, f"column '{key}' is missing; the file has {choices(names)}")
    added = ["score", *(f"score_{task}" for task in scorer.tasks)]
    kept = [name for name in names if name not in added]
    fields = [file.schema_arrow.field(name) for name in kept]
    schema = pa.schema([*fields, *(pa.field(name, pa.float32()) for name in added)])
    rows, known = 0, KnownRows(scorer.info, source, names)
    with draft_file(target) as draft, pq.ParquetWriter(draft, schema) as writer:
        for batch in file.iter_batches(BATCH_ROWS):
            table = pa.Table.from_batches([batch]).select(kept)
            for name, column in zip(added, _scores(scorer, batch), strict=True):
                table = table.append_column(name, pa.array(column))
            writer.write_table(table)
            known.count(batch)
            rows += batch.num_rows
    return {"rows": rows, "output": str(target), "warnings": known.warnings()}


def _scores(scorer: Scorer, batch: pa.RecordBatch) -> Sequence[NDArray[np.float32]]:
    """Return the scores of a batch of rows; if there are tasks, also the probabilities of each."""
    names, info = batch.schema.names, scorer.info
    entries = []
    for side, key in (("user", info.user_key), ("item", info.item_key)):
        raw = [f.name for f in info.side(side) if f.name in names and f.name != key]
        entries.append((batch.select([key, *raw]) if raw else batch[key]).to_pylist())
    scene = {f.name: batch[f.name].to_pylist() for f in info.side("scene") if f.name in names}
    if scorer.tasks:
        return list(scorer.score_tasks_rows(entries[0], entries[1], scene).values())
    return [scorer.score_rows(entries[0], entries[1], scene)]
