"""Read arrays in data sets that Petastorm wrote: NumPy files, decoded to lists in DuckDB.

Petastorm's codecs store scalars as Parquet's own types, and an array as the bytes of a ``.npy``
file (NdarrayCodec) or of an ``.npz`` file with one array (CompressedNdarrayCodec). The pickled
schema in ``_common_metadata`` is not read, because unpickling can run code; the type of an array
follows from its bytes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb.func import ARROW
from numpy.typing import NDArray

from hvdrec.samples.sql import quoted

METADATA_FILE = "_common_metadata"
SCHEMA_KEY = b"dataset-toolkit.unischema.v1"
"""Metadata key under which Petastorm stores its schema."""
NPY, NPZ = b"\x93NUMPY", b"PK\x03\x04"
"""First bytes of ``.npy`` and ``.npz`` files."""
MAX_BYTES = 1 << 26
"""Largest accepted size of an array: a larger one is damaged, or not a feature."""
SQL_TYPES = {"b": "BOOLEAN", "i": "BIGINT", "u": "UBIGINT", "f": "DOUBLE", "U": "VARCHAR"}
"""Kind of a NumPy type (``numpy.dtype.kind``) -> type in DuckDB."""


def is_petastorm(folder: Path) -> bool:
    """Return True if Petastorm wrote the data set in a folder."""
    file = folder / METADATA_FILE
    return file.is_file() and SCHEMA_KEY in (pq.read_schema(file).metadata or {})


def decode_arrays(
    connection: duckdb.DuckDBPyConnection, view: str, new_name: Callable[[], str]
) -> str:
    """Create a view in which arrays of one dimension are lists, and return its name.

    Other binary columns, such as images and matrices, are not changed.

    Args:
        connection: The DuckDB connection.
        view: Name of a view with the rows as Petastorm stored them.
        new_name: Function that returns an unused name for a view.
    """
    table = connection.table(view)
    replaced = []
    for name, dtype in zip(table.columns, table.types, strict=True):
        if str(dtype) != "BLOB":
            continue
        query = f"SELECT {quoted(name)} FROM {view} WHERE {quoted(name)} IS NOT NULL LIMIT 1"
        rows = connection.sql(query).fetchall()
        first = decode(rows[0][0]) if rows else None
        if first is None or first.ndim > 1 or first.dtype.kind not in SQL_TYPES:
            continue
        function = new_name()
        sql_type = SQL_TYPES[first.dtype.kind] + "[]" * first.ndim
        connection.create_function(function, _decoder(name, first), ["blob"], sql_type, type=ARROW)
        replaced.append(f"{function}({quoted(name)}) AS {quoted(name)}")
    if not replaced:
        return view
    decoded = new_name()
    query = f"SELECT * REPLACE ({', '.join(replaced)}) FROM {view}"
    connection.execute(f"CREATE TEMP VIEW {decoded} AS {query}")
    return decoded


def decode(value: bytes) -> NDArray[Any] | None:
    """Return the array that a codec stored; None if the bytes are not a NumPy file.

    Raises:
        ValueError: The file is damaged, too large, or holds Python objects.
    """
    if not value.startswith((NPY, NPZ)):
        return None
    try:
        if value.startswith(NPZ):
            with zipfile.ZipFile(io.BytesIO(value)) as archive:
                (member,) = archive.infolist()
                if member.file_size > MAX_BYTES:
                    raise ValueError(f"{member.file_size} bytes in an array")
                value = archive.read(member)
        return np.lib.format.read_array(io.BytesIO(value), allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"not a readable NumPy array: {error}") from None


def _decoder(column: str, like: NDArray[Any]) -> Callable[[pa.ChunkedArray], pa.Array]:
    """Return a function that decodes a column of arrays with the shape and type of `like`."""
    value_type = {"b": pa.bool_(), "i": pa.int64(), "u": pa.uint64(), "f": pa.float64()}.get(
        like.dtype.kind, pa.string()
    )

    def decode_column(values: pa.ChunkedArray) -> pa.Array:
        rows: list[Any] = []
        for value in values.to_pylist():
            array = None if value is None else decode(value)
            if value is not None and (
                array is None or (array.ndim, array.dtype.kind) != (like.ndim, like.dtype.kind)
            ):
                raise ValueError(f"column '{column}': arrays differ in type or dimensions")
            rows.append(None if array is None else array.tolist())
        return pa.array(rows, pa.list_(value_type) if like.ndim else value_type)

    return decode_column
