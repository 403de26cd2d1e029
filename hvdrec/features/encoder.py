"""Raw columns to codes and to row numbers, by running the preprocessing graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.config.schema import MISSING, Feature
from hvdrec.errors import UserError
from hvdrec.features.fit import ARROW_TYPES, Fitted
from hvdrec.features.graph import build, build_positions, output_name
from hvdrec.features.raw import flat_to_input, one_chunk


class Encoder:
    """Encodes raw columns by running the graph over their distinct values."""

    def __init__(self, fitted: Fitted) -> None:
        self.fitted = fitted
        self._sessions = {
            feature.name: _session(build(fitted, [feature.name]))
            for feature in fitted.schema.features
        }

    def encode(self, feature: Feature, column: pa.ChunkedArray) -> pa.Array:
        """Return a raw column's codes: int32, float32 for a number, list<int32> for lists.

        Lists are cut as the graph cuts them; their missing entries are dropped.
        """
        array = one_chunk(column)
        if not feature.is_list:
            return pa.array(self._codes(feature, array))
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        codes = self._codes(feature, array.flatten())
        if lengths.max(initial=0) > feature.max_length:
            kept, lengths = _cut(lengths, feature)
            codes = codes[kept]
        present = codes != MISSING
        # How many entries are present before each row's end.
        ends = np.concatenate([[0], np.cumsum(present)])[np.cumsum(lengths, dtype=np.int64)]
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes[present]))

    def _codes(self, feature: Feature, values: pa.Array) -> NDArray[Any]:
        """Return scalars' codes [N]; a list's entries go through the graph as lists of one."""
        session = self._sessions[feature.name]

        def run(inputs: NDArray[Any]) -> NDArray[Any]:
            shaped = inputs[:, None] if feature.is_list else inputs
            codes: NDArray[Any] = session.run([output_name(feature.name)], {feature.name: shaped})[
                0
            ].reshape(-1)
            return codes.astype(np.int32) if feature.is_embedded else codes

        return _of_distinct(run, values)


class Rows:
    """Finds keys in a table of users or items by one hash table, made once."""

    def __init__(self, keys: pa.ChunkedArray, file: Path) -> None:
        if keys.type not in (pa.string(), pa.int64()):
            raise UserError(
                f"{file}: the key is {keys.type}, must be string or int64; make the samples again"
            )
        if not len(keys):
            raise UserError(f"{file}: holds no rows; make the samples again")
        self.keys = keys
        self._file = file
        self._session = _session(build_positions(keys.to_pylist(), string=_is_string(keys.type)))

    def index(self, column: pa.ChunkedArray, where: str) -> pa.Array:
        """Return int64 row numbers; UserError for a key that no row has, or of another type."""
        if column.type != self.keys.type:
            raise UserError(
                f"{where} is {column.type} in the samples, {self.keys.type} in {self._file}; "
                "make the samples again"
            )

        def run(inputs: NDArray[Any]) -> NDArray[Any]:
            positions: NDArray[Any] = self._session.run(None, {"key": inputs})[0]
            return positions

        array = one_chunk(column)
        found = _of_distinct(run, array)
        strangers = np.flatnonzero(found < 0)
        if len(strangers):
            stranger = array[int(strangers[0])].as_py()
            raise UserError(
                f"{where} '{stranger}' of a sample is in no row of {self._file}; "
                "make the samples again"
            )
        return pa.array(found)


def _session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _of_distinct(run: Callable[[NDArray[Any]], NDArray[Any]], values: pa.Array) -> NDArray[Any]:
    """Return what a function of raw inputs gives for each value.

    Strings cost a Python object each, so that of them only the distinct ones are run.
    """
    if not _is_string(values.type):
        return run(flat_to_input(values))
    encoded = values.dictionary_encode()
    # The entry behind the distinct values stands for null.
    distinct = pa.concat_arrays([encoded.dictionary, pa.nulls(1, values.type)])
    indices = pc.fill_null(encoded.indices, len(distinct) - 1).to_numpy(zero_copy_only=False)
    codes: NDArray[Any] = run(flat_to_input(distinct))[indices]
    return codes


def _is_string(kind: pa.DataType) -> bool:
    return bool(kind == ARROW_TYPES["string"])


def _cut(lengths: NDArray[Any], feature: Feature) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return which flat positions of ragged rows are kept, and the rows' new lengths."""
    kept = np.minimum(lengths, feature.max_length)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if feature.kind == "sequence":
        starts = starts + lengths - kept
    ends = np.cumsum(kept, dtype=np.int64)
    positions = np.arange(kept.sum()) + np.repeat(starts - (ends - kept), kept)
    return positions, kept
