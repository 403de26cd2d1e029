"""Parquet files of encoded columns, laid out for training to read them in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.config.schema import Feature

PAGE_BYTES = 16 << 20
"""Large enough to hold a row group's column in one page: with many pages, decoding a list column
took twice as long."""


def encoded_types(features: Iterable[Feature]) -> dict[str, pa.DataType]:
    """Return name -> Arrow type of encoded features: int32 codes, float32, or lists of codes."""

    def encoded_type(feature: Feature) -> pa.DataType:
        scalar = pa.int32() if feature.is_embedded else pa.float32()
        return pa.list_(pa.field("element", scalar, nullable=False)) if feature.is_list else scalar

    return {feature.name: encoded_type(feature) for feature in features}


def shard_types(features: Iterable[Feature], labels: Sequence[str] = ()) -> dict[str, pa.DataType]:
    """Return name -> Arrow type of a shard's columns; `labels` names the columns of tasks."""
    indices = dict.fromkeys(("user_index", "item_index"), pa.int64())
    return (
        encoded_types(features)
        | indices
        | dict.fromkeys(("label", "weight", *labels), pa.float32())
    )


@contextmanager
def parquet_writer(
    file: Path, types: Mapping[str, pa.DataType], nullable: Sequence[str] = ()
) -> Iterator[Callable[[pa.Table], None]]:
    """Open a Parquet file and yield a function that writes a table as one row group.

    Non-nullable columns save their readers a third of the decoding time. LZ4 saves another fifth
    compared with Zstandard; files are a seventh larger (measured on MovieLens-1M with histories).

    Args:
        file: The file to write.
        types: Name -> type of the columns, in their order.
        nullable: Columns that may contain nulls.
    """
    schema = pa.schema([pa.field(name, each, name in nullable) for name, each in types.items()])
    with pq.ParquetWriter(file, schema, compression="lz4", data_page_size=PAGE_BYTES) as writer:

        def write(table: pa.Table) -> None:
            ordered = table.select(schema.names).cast(schema)
            writer.write_table(ordered, row_group_size=max(1, len(table)))

        yield write
