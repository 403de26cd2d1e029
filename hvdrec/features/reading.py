"""Read a range of rows from several Parquet files, as tables of given sizes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.features.sample_checks import damaged


def count_rows(files: Sequence[Path]) -> int:
    """Return the number of rows in all Parquet files together."""
    return sum(pq.read_metadata(file).num_rows for file in files)


def read_tables(
    files: Sequence[Path], columns: list[str], start: int, sizes: Sequence[int]
) -> Generator[pa.Table, None, None]:
    """Yield consecutive rows of several files as tables.

    Strings, also in lists, are dictionary-encoded, so each distinct string of a row group is
    decoded only once. Histories of string keys are then read in a third of the time.

    Args:
        files: Parquet files, read in this order as if they were one.
        columns: Columns to read.
        start: Number of the first row.
        sizes: Number of rows of each table.

    Raises:
        UserError: A file is damaged.
    """
    batches = _batches(files, columns, start, max(1, *sizes))
    pending: list[pa.RecordBatch] = []
    held = 0
    for size in sizes:
        while held < size:
            pending.append(next(batches))
            held += pending[-1].num_rows
        if not size:
            yield pa.table({})
            continue
        table = pa.Table.from_batches(pending)
        yield table.slice(0, size)
        pending, held = table.slice(size).to_batches(), held - size


def _batches(
    files: Sequence[Path], columns: list[str], start: int, rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield the rows from `start` on, at most `rows` at a time; skip row groups before `start`."""
    for file in files:
        try:
            metadata = pq.read_metadata(file)
            with pq.ParquetFile(
                file, metadata=metadata, read_dictionary=_string_paths(metadata.schema)
            ) as source:
                for group in range(metadata.num_row_groups):
                    length = metadata.row_group(group).num_rows
                    if start >= length:
                        start -= length
                        continue
                    # Read one row group at a time: each has its own dictionaries, and Arrow cannot
                    # combine lists with different dictionaries in one batch. Several workers run in
                    # parallel, so Arrow need not use threads.
                    batches = source.iter_batches(rows, [group], columns, use_threads=False)
                    for batch in batches:
                        skipped = min(start, batch.num_rows)
                        start -= skipped
                        if skipped < batch.num_rows:
                            yield batch.slice(skipped)
        except (OSError, pa.ArrowInvalid) as error:
            raise damaged(file, error) from None


def _string_paths(schema: pq.ParquetSchema) -> list[str]:
    """Return the paths of all columns of strings, which may be the entries of lists."""
    leaves = (schema.column(index) for index in range(len(schema)))
    return [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
