"""Encoding samples into shards, by running the preprocessing graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.artifacts import read_manifest, write_artifact
from hvdrec.config import Config, to_dict
from hvdrec.errors import UserError
from hvdrec.features.fit import Fitted, check_columns, check_type, fit
from hvdrec.features.graph import build, output_name
from hvdrec.features.raw import flat_to_input
from hvdrec.schema import MISSING, Feature

SPLITS = ("train", "validation", "test")
TABLE_ROW_GROUP = 65_536


class Encoder:
    """Encodes raw columns by running the graph over their distinct values."""

    def __init__(self, fitted: Fitted) -> None:
        self.fitted = fitted
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._sessions = {
            feature.name: onnxruntime.InferenceSession(
                build(fitted, [feature.name]).SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
            )
            for feature in fitted.schema.features
        }

    def encode(self, feature: Feature, column: pa.ChunkedArray) -> pa.Array:
        """Return a raw column's codes: int32, float32 for a number, list<int32> for lists.

        Lists are cut as the graph cuts them; their missing entries are dropped.
        """
        array = _one_chunk(column)
        if not feature.is_list:
            return self._scalars(feature, array)
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        kept, lengths = _cut(lengths, feature)
        flat = self._scalars(feature, array.flatten().take(pa.array(kept)))
        codes = flat.to_numpy(zero_copy_only=False)
        present = codes != MISSING
        row = np.repeat(np.arange(len(lengths)), lengths)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(np.bincount(row[present], minlength=len(lengths)), out=offsets[1:])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes[present]))

    def _scalars(self, feature: Feature, values: pa.Array) -> pa.Array:
        encoded = values.dictionary_encode()
        # The entry behind the distinct values stands for null.
        distinct = pa.concat_arrays([encoded.dictionary, pa.nulls(1, values.type)])
        inputs = flat_to_input(feature, distinct)
        session = self._sessions[feature.name]
        shaped = inputs[:, None] if feature.is_list else inputs
        codes = session.run([output_name(feature.name)], {feature.name: shaped})[0].reshape(-1)
        if feature.is_embedded:
            codes = codes.astype(np.int32)
        null = len(distinct) - 1
        indices = pc.fill_null(encoded.indices, null).to_numpy(zero_copy_only=False)
        return pa.array(codes[indices])


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
    the rows of each shard that is done. Raises UserError for samples that are not there or do not
    have the configured features in their declared types; nothing is then written.
    """
    read_manifest(samples, "samples")
    schema = config.schema
    for split in SPLITS:
        check_columns(samples / split, schema)
    meta: dict[str, Any] = {"config": to_dict(config), "rows": {}, "sizes": {}, "shards": {}}
    with write_artifact(out, "features", meta, overwrite=overwrite) as draft:
        notify("fitting features")
        fitted = fit(samples, schema)
        fitted.save(draft)
        graph = build(fitted, [feature.name for feature in schema.features])
        onnx.save(graph, str(draft / "preprocess.onnx"))
        meta["sizes"] = fitted.sizes
        encoder = Encoder(fitted)
        users = _read(samples / "users_train.parquet", schema.user_key, schema.side("user"))
        items = _read(samples / "items.parquet", schema.item_key, schema.side("item"))
        keys = (users[schema.user_key], items[schema.item_key])
        counts = np.zeros(len(items), dtype=np.int64)
        for split in SPLITS:
            notify(f"encoding {split}")
            sizes = []
            (draft / split).mkdir()
            for number, rows in enumerate(_shards(samples / split, config.encode.shard_rows)):
                shard = _encode_rows(encoder, rows, keys, config)
                pq.write_table(
                    shard,
                    draft / split / f"shard-{number:05d}.parquet",
                    row_group_size=config.encode.row_group_rows,
                    compression="zstd",
                )
                sizes.append(shard.num_rows)
                if split == "train":
                    taken = shard["item_index"].to_numpy()[shard["label"].to_numpy() > 0]
                    counts += np.bincount(taken, minlength=len(counts))
                if progress is not None:
                    progress(shard.num_rows)
            meta["rows"][split], meta["shards"][split] = sum(sizes), sizes
        _write_side(draft / "users.parquet", encoder, users, schema.user_key, schema.side("user"))
        _write_side(
            draft / "items.parquet",
            encoder,
            items,
            schema.item_key,
            schema.side("item"),
            train_count=pa.array(counts),
        )
    return meta


def _encode_rows(
    encoder: Encoder, rows: pa.Table, keys: tuple[pa.ChunkedArray, pa.ChunkedArray], config: Config
) -> pa.Table:
    schema = config.schema
    columns = {f.name: encoder.encode(f, rows[f.name]) for f in schema.features}
    for name, key, known in (
        ("user_index", schema.user_key, keys[0]),
        ("item_index", schema.item_key, keys[1]),
    ):
        index = pc.index_in(rows[key], value_set=known)
        if index.null_count:
            stranger = rows[key].filter(pc.is_null(index))[0].as_py()
            raise UserError(
                f"{config.paths.of('samples')}: {key} '{stranger}' of a sample stands in no row of "
                f"{name.removesuffix('_index')}s; make the samples again"
            )
        columns[name] = index.cast(pa.int64())
    columns["label"] = rows["label"].cast(pa.float32())
    columns["weight"] = rows["weight"].cast(pa.float32())
    return pa.table(columns)


def _shards(folder: Path, shard_rows: int) -> Iterator[pa.Table]:
    """Yield a split's rows in order, cut into tables whose sizes differ by one row at most."""
    dataset = ds.dataset([str(file) for file in sorted(folder.glob("*.parquet"))], format="parquet")
    total = dataset.count_rows()
    count = max(1, -(-total // shard_rows))
    sizes = [total * (i + 1) // count - total * i // count for i in range(count)]
    pending: list[pa.RecordBatch] = []
    held = 0
    batches = iter(dataset.to_batches())
    for size in sizes:
        while held < size:
            batch = next(batches)
            pending.append(batch)
            held += batch.num_rows
        table = pa.Table.from_batches(pending, dataset.schema)
        yield table.slice(0, size)
        rest = table.slice(size)
        pending, held = rest.to_batches(), rest.num_rows


def _read(file: Path, key: str, features: Sequence[Feature]) -> pa.Table:
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file}: no readable Parquet ({error}); make the samples again") from None
    for feature in features:
        check_type(file, table.schema, feature)
    if key not in table.column_names:
        raise UserError(f"{file}: column '{key}' is missing; make the samples again")
    return table


def _write_side(
    file: Path,
    encoder: Encoder,
    table: pa.Table,
    key: str,
    features: Sequence[Feature],
    **more: pa.Array,
) -> None:
    columns = {feature.name: encoder.encode(feature, table[feature.name]) for feature in features}
    encoded = pa.table({"key": table[key], **columns, **more})
    pq.write_table(encoded, file, row_group_size=TABLE_ROW_GROUP, compression="zstd")


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        return combined.chunk(0) if combined.num_chunks else pa.array([], column.type)
    return combined


def _cut(lengths: NDArray[Any], feature: Feature) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return which flat positions of ragged rows are kept, and the rows' new lengths."""
    kept = np.minimum(lengths, feature.max_length)
    starts = np.cumsum(lengths) - lengths
    if feature.kind == "sequence":
        starts = starts + lengths - kept
    ends = np.cumsum(kept)
    positions = np.arange(kept.sum()) + np.repeat(starts - (ends - kept), kept)
    return positions, kept
