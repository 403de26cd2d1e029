"""Encode columns in memory: raw values by the preprocessing graph, keys by their row number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.config.schema import MISSING, Feature
from hvdrec.errors import invalid_file
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import build, output_name
from hvdrec.features.kinds.kind import kind_of
from hvdrec.features.raw import flat_to_input, list_lengths, one_chunk
from hvdrec.features.sample_checks import REMEDY


class Encoder:
    """Encodes raw columns by running the graph of each feature over their values."""

    def __init__(self, fitted: Fitted) -> None:
        """Compile the graph of each feature."""
        self.fitted = fitted
        self._sessions = {
            feature.name: _session(fitted, feature) for feature in fitted.schema.features
        }
        self._values = {
            feature.name: _ByDistinct(partial(self._run_flat, feature))
            for feature in fitted.schema.features
        }

    def encode(self, features: Iterable[Feature], table: pa.Table) -> dict[str, pa.Array]:
        """Encode features.

        Args:
            features: The features to encode.
            table: n rows of raw columns.

        Returns:
            Name of a feature -> its codes, int32 [n] or list<int32> [n], or its numbers,
            float32 [n]. Lists are cut to ``max_length``, and their missing entries are dropped.
        """
        encoded: dict[str, pa.Array] = {}
        return {feature.name: self._encode(feature, table, encoded) for feature in features}

    def _encode(self, feature: Feature, table: pa.Table, encoded: dict[str, pa.Array]) -> pa.Array:
        """Encode a feature, after the features whose codes it combines; store all in `encoded`."""
        if feature.name not in encoded:
            codes = {
                output_name(name): self._encode(self.fitted.schema[name], table, encoded)
                .to_numpy(zero_copy_only=False)
                .astype(np.int64)
                for name in feature.sources
            }
            columns = kind_of(feature).columns(feature)
            if feature.is_list:
                encoded[feature.name] = self._lists(feature, table[columns[0].name].chunks)
            elif len(columns) == 1 and not codes:
                values = table[columns[0].name].chunks
                encoded[feature.name] = pa.array(self._values[feature.name](values))
            else:
                raw = {c.name: flat_to_input(one_chunk(table[c.name])) for c in columns}
                encoded[feature.name] = pa.array(self._run(feature, {**raw, **codes}))
        return encoded[feature.name]

    def _lists(self, feature: Feature, arrays: Sequence[pa.ListArray]) -> pa.ListArray:
        lengths = np.concatenate([np.empty(0, np.int32), *map(list_lengths, arrays)])
        codes = self._values[feature.name]([array.flatten() for array in arrays])
        if lengths.max(initial=0) > feature.max_length:
            kept, lengths = _cut(lengths, feature)
            codes = codes[kept]
        ends = np.cumsum(lengths, dtype=np.int64)
        missing = np.flatnonzero(codes == MISSING)
        if len(missing):
            ends -= np.searchsorted(missing, ends)
            codes = np.delete(codes, missing)
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes))

    def _run_flat(self, feature: Feature, values: NDArray[Any]) -> NDArray[Any]:
        """Encode flat values of a column; the graph gets each entry of a list as a list of one."""
        [column] = kind_of(feature).columns(feature)
        return self._run(feature, {column.name: values[:, None] if feature.is_list else values})

    def _run(self, feature: Feature, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        [codes] = self._sessions[feature.name].run([output_name(feature.name)], inputs)
        flat: NDArray[Any] = codes.reshape(-1)
        return flat.astype(np.int32) if feature.is_embedded else flat


class _ByDistinct:
    """Applies a function to flat values; calls it only once for each distinct string.

    This saves time, because a Python object is created for every string that the function gets. The
    results for the last dictionary are kept, because all rows of a row group share one dictionary.
    """

    def __init__(self, run: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        self._run = run
        self._dictionary = pa.array([], pa.string())
        self._results: NDArray[Any] | None = None

    def __call__(self, chunks: Sequence[pa.Array]) -> NDArray[Any]:
        """Return the results for the values of all chunks, one after the other."""
        results = [self._of_chunk(chunk) for chunk in chunks]
        if len(results) == 1:
            return results[0]
        return np.concatenate(results) if results else self._run(np.empty(0, object))

    def _of_chunk(self, values: pa.Array) -> NDArray[Any]:
        if values.type == pa.string():
            values = values.dictionary_encode()
        elif not pa.types.is_dictionary(values.type):
            return self._run(flat_to_input(values))
        if self._results is None or not self._dictionary.equals(values.dictionary):
            self._dictionary = values.dictionary
            # An additional entry after the distinct values is null; null values get its index.
            distinct = pa.concat_arrays([self._dictionary, pa.nulls(1, pa.string())])
            self._results = self._run(flat_to_input(distinct))
        indices = pc.fill_null(values.indices, len(self._dictionary))
        taken: NDArray[Any] = self._results[indices.to_numpy(zero_copy_only=False)]
        return taken


class KeyRows:
    """Finds the row of each key in a table of users or items, by a hash table."""

    def __init__(self, keys: pa.ChunkedArray, file: Path) -> None:
        """Build the hash table.

        Args:
            keys: The key of each row, all distinct; string or int64.
            file: File of the table, for error messages.

        Raises:
            UserError: There are no keys, or they are neither strings nor int64.
        """
        if keys.type not in (pa.string(), pa.int64()):
            raise invalid_file(file, f"the key is {keys.type}, must be string or int64", REMEDY)
        if not len(keys):
            raise invalid_file(file, "has no rows", REMEDY)
        self._type = keys.type
        self._file = file
        self._find = _ByDistinct(pd.Index(flat_to_input(keys)).get_indexer)

    def find(self, column: pa.ChunkedArray, name: str) -> pa.Array:
        """Return the row of each of n keys, int64 [n].

        Args:
            column: The keys [n].
            name: Name of the column, for error messages.

        Raises:
            UserError: A key is not in the table, or the column has another type than the table's
                keys.
        """
        stored = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if stored != self._type:
            problem = f"'{name}' is {self._type} here, {stored} in the samples"
            raise invalid_file(self._file, problem, REMEDY)
        rows = self._find(column.chunks)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            key = column[int(unknown[0])].as_py()
            problem = f"has no row for {name} '{key}' of the samples"
            raise invalid_file(self._file, problem, REMEDY)
        return pa.array(rows.astype(np.int64))


def _session(fitted: Fitted, feature: Feature) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        build(fitted, [feature.name]).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


def _cut(lengths: NDArray[Any], feature: Feature) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cut lists to ``max_length``; return the flat positions that remain, and the new lengths."""
    kept = np.minimum(lengths, feature.max_length)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if feature.is_sequence:
        starts = starts + lengths - kept
    ends = np.cumsum(kept, dtype=np.int64)
    positions = np.arange(kept.sum()) + np.repeat(starts - (ends - kept), kept)
    return positions, kept
