"""Encoding samples into shards, by running the preprocessing graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.artifacts import read_manifest, write_artifact
from hvdrec.config import Config
from hvdrec.errors import UserError
from hvdrec.features.fit import ARROW_TYPES, Fitted, check_columns, check_file, fit, one_line
from hvdrec.features.graph import build, build_positions, output_name
from hvdrec.features.raw import flat_to_input, one_chunk
from hvdrec.schema import MISSING, Feature, Schema
from hvdrec.structure import to_dict

SPLITS = ("train", "validation", "test")
USERS, ITEMS = "users_train.parquet", "items.parquet"


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


class _Rows:
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


def encode(
    samples: Path,
    out: Path,
    config: Config,
    *,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Fit the features, encode all splits and return the artifact's meta.

    samples: directory that `hvdrec.samples.make` wrote; out: directory to write. `progress` is told
    the rows that were written since it was last told. Memory grows with a row group, the keys and
    the vocabularies, not with the samples. Raises UserError for samples that are not there, that do
    not have the configured features in their declared types, or whose keys are unknown; nothing is
    then written.
    """
    read_manifest(samples, "samples")
    schema = config.schema
    _check(samples, schema)
    meta: dict[str, Any] = {"config": to_dict(config), "rows": {}, "sizes": {}, "shards": {}}
    with write_artifact(out, "features", meta, overwrite=overwrite) as draft:
        notify("fitting features")
        fitted = fit(samples, schema)
        fitted.save(draft)
        graph = build(fitted, [feature.name for feature in schema.features])
        onnx.save(graph, str(draft / "preprocess.onnx"))
        meta["sizes"] = fitted.sizes
        encoder = Encoder(fitted)
        users = _Rows(pq.read_table(samples / USERS, columns=[schema.user_key])[0], samples / USERS)
        items = _Rows(pq.read_table(samples / ITEMS, columns=[schema.item_key])[0], samples / ITEMS)
        counts = np.zeros(len(items.keys), dtype=np.int64)

        def encode_rows(rows: pa.Table) -> pa.Table:
            if progress is not None:
                progress(rows.num_rows)
            return _encode_rows(encoder, rows, users, items, samples)

        for split in SPLITS:
            notify(f"encoding {split}")
            files = sorted((samples / split).glob("*.parquet"))
            sizes = even_sizes(_count(files), config.encode.shard_rows)
            meta["rows"][split], meta["shards"][split] = sum(sizes), sizes
            (draft / split).mkdir()
            batches = _batches(files, _sample_columns(schema), config.encode.row_group_rows)
            taken = _write_shards(draft / split, batches, sizes, config, encode_rows)
            if split == "train":
                counts += np.bincount(taken, minlength=len(counts))
        notify("encoding users and items")
        rows = config.encode.row_group_rows
        _write_side(encoder, samples / USERS, draft / "users.parquet", schema, "user", rows)
        _write_side(encoder, samples / ITEMS, draft / "items.parquet", schema, "item", rows, counts)
    return meta


def even_sizes(total: int, most: int) -> list[int]:
    """Return the fewest sizes of at most `most` that add up to `total` and differ by at most one.

    There is always one, be it 0.
    """
    count = max(1, -(-total // most))
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def _check(samples: Path, schema: Schema) -> None:
    others = (schema.user_key, schema.item_key, "label", "weight")
    for split in SPLITS:
        check_columns(samples / split, schema)
        for file in sorted((samples / split).glob("*.parquet")):
            check_file(file, schema.features, others)
    check_file(samples / USERS, schema.side("user"), [schema.user_key])
    check_file(samples / ITEMS, schema.side("item"), [schema.item_key])


def _sample_columns(schema: Schema) -> list[str]:
    names = [feature.name for feature in schema.features]
    return [*dict.fromkeys([schema.user_key, schema.item_key, *names, "label", "weight"])]


def _write_shards(
    folder: Path,
    batches: Iterator[pa.RecordBatch],
    sizes: Sequence[int],
    config: Config,
    encode_rows: Callable[[pa.Table], pa.Table],
) -> NDArray[np.int64]:
    """Write a split's shards in even row groups; return the item index of each positive row."""
    kinds = _encoded_types(config.schema.features)
    kinds |= {"user_index": pa.int64(), "item_index": pa.int64()}
    kinds |= {"label": pa.float32(), "weight": pa.float32()}
    groups = [even_sizes(size, config.encode.row_group_rows) for size in sizes]
    tables = _regroup(batches, [rows for shard in groups for rows in shard if rows])
    positives = [np.empty(0, np.int64)]
    for number, shard in enumerate(groups):
        with _writer(folder / f"shard-{number:05d}.parquet", kinds) as write:
            for rows in shard:
                if not rows:
                    write(pa.schema(list(kinds.items())).empty_table())
                    continue
                encoded = encode_rows(next(tables))
                write(encoded)
                index, label = encoded["item_index"].to_numpy(), encoded["label"].to_numpy()
                positives.append(index[label > 0])
    return np.concatenate(positives)


def _encode_rows(
    encoder: Encoder, rows: pa.Table, users: _Rows, items: _Rows, samples: Path
) -> pa.Table:
    schema = encoder.fitted.schema
    columns = {f.name: encoder.encode(f, rows[f.name]) for f in schema.features}
    user, item = schema.user_key, schema.item_key
    columns["user_index"] = users.index(rows[user], f"{samples}: {user}")
    columns["item_index"] = items.index(rows[item], f"{samples}: {item}")
    columns["label"] = rows["label"].cast(pa.float32())
    columns["weight"] = rows["weight"].cast(pa.float32())
    return pa.table(columns)


def _write_side(
    encoder: Encoder,
    source: Path,
    file: Path,
    schema: Schema,
    side: Any,
    row_group_rows: int,
    counts: NDArray[np.int64] | None = None,
) -> None:
    """Encode a table of users or items; the row of a key stays its row. counts: train_count."""
    features = schema.side(side)
    key = schema.user_key if side == "user" else schema.item_key
    kinds = {"key": pq.read_schema(source).field(key).type, **_encoded_types(features)}
    if counts is not None:
        kinds["train_count"] = pa.int64()
    names = [*dict.fromkeys([key, *(feature.name for feature in features)])]
    start = 0
    with _writer(file, kinds) as write:
        for batch in _batches([source], names, row_group_rows):
            rows = pa.Table.from_batches([batch])
            columns = {f.name: encoder.encode(f, rows[f.name]) for f in features}
            if counts is not None:
                columns["train_count"] = pa.array(counts[start : start + len(rows)])
            write(pa.table({"key": rows[key], **columns}))
            start += len(rows)


def _encoded_types(features: Sequence[Feature]) -> dict[str, pa.DataType]:
    def kind(feature: Feature) -> pa.DataType:
        scalar = pa.int32() if feature.is_embedded else pa.float32()
        return pa.list_(scalar) if feature.is_list else scalar

    return {feature.name: kind(feature) for feature in features}


@contextmanager
def _writer(file: Path, kinds: Mapping[str, pa.DataType]) -> Iterator[Callable[[pa.Table], None]]:
    """Yield a function that writes a table as one row group; its columns are put in order."""
    schema = pa.schema(list(kinds.items()))
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:

        def write(table: pa.Table) -> None:
            ordered = table.select(schema.names).cast(schema)
            writer.write_table(ordered, row_group_size=max(1, len(table)))

        yield write


def _batches(files: Sequence[Path], names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    for file in files:
        try:
            with pq.ParquetFile(file) as source:
                yield from source.iter_batches(rows, columns=names)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{file}: damaged ({one_line(error)}); make the samples again"
            ) from None


def _count(files: Sequence[Path]) -> int:
    return sum(pq.read_metadata(file).num_rows for file in files)


def _regroup(batches: Iterator[pa.RecordBatch], sizes: Sequence[int]) -> Iterator[pa.Table]:
    """Yield the batches' rows in order, as tables of the given sizes, of which none is 0."""
    pending: list[pa.RecordBatch] = []
    held = 0
    for size in sizes:
        while held < size:
            pending.append(next(batches))
            held += pending[-1].num_rows
        table = pa.Table.from_batches(pending)
        yield table.slice(0, size)
        pending, held = table.slice(size).to_batches(), held - size


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
