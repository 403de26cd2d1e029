"""Encoding samples into shards, by running the preprocessing graph.

A shard is a task of its own: which rows it holds, and in which row groups, follows from the samples
and the configuration alone, so that it is the same whoever writes it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.schema import Schema, Side
from hvdrec.config.structure import to_dict
from hvdrec.errors import UserError
from hvdrec.features.encoder import Encoder, Rows
from hvdrec.features.fit import Fitted, check_columns, check_file, check_task_labels, fit, one_line
from hvdrec.features.graph import build
from hvdrec.features.raw import one_chunk
from hvdrec.features.shards import encoded_types, parquet_writer, shard_types
from hvdrec.parallel.pool import THIS_PROCESS, WorkerPool
from hvdrec.storage.artifacts import read_manifest, write_artifact
from hvdrec.storage.urls import Location

SPLITS = ("train", "validation", "test")
USERS, ITEMS = "users_train.parquet", "items.parquet"


@dataclass(frozen=True)
class _Source:
    """What all shards share: samples, the draft of the artifact with what was fitted, the columns
    of further labels."""

    samples: Path
    draft: Path
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Shard:
    """A shard to write: the rows of a split from `start` on, in row groups of the given sizes."""

    source: _Source
    split: str
    number: int
    start: int
    groups: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.source.draft / self.split / f"shard-{self.number:05d}.parquet"


@dataclass(frozen=True)
class _Part:
    """Rows of a table of users or items to encode."""

    source: _Source
    file: str
    side: Side
    start: int
    rows: int


def encode(
    samples: Path,
    out: Location,
    config: Config,
    *,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], None] | None = None,
    workers: WorkerPool = THIS_PROCESS,
) -> dict[str, Any]:
    """Fit the features, encode all splits and return the artifact's meta.

    samples: directory that `make_samples` wrote; out: directory to write. `progress` is told
    the rows that were written since it was last told. The workers share the encoding and write
    their shards; where they are on several hosts, all must see both directories. Memory grows, for
    each worker, with a row group, the keys and the vocabularies, not with the samples. Raises
    UserError for samples that are not there, that do not have the configured features in their
    declared types or the labels of the configured tasks, or whose keys are unknown; nothing is then
    written.
    """
    manifest = read_manifest(samples, "samples")
    schema = config.schema
    check_task_labels(samples, manifest, config, "hvdrec samples")
    _check(samples, schema, config.task_columns)
    meta: dict[str, Any] = {"config": to_dict(config), "rows": {}, "sizes": {}, "shards": {}}
    with write_artifact(out, "features", meta, overwrite=overwrite) as draft:
        notify("fitting features")
        fitted = fit(samples, schema)
        fitted.save(draft)
        graph = build(fitted, [feature.name for feature in schema.features])
        onnx.save(graph, str(draft / "preprocess.onnx"))
        meta["sizes"] = fitted.sizes
        source = _Source(samples.absolute(), draft.absolute(), config.task_columns)
        counts = np.zeros(pq.read_metadata(samples / ITEMS).num_rows, dtype=np.int64)
        try:
            for split in SPLITS:
                notify(f"encoding {split}")
                shards = _shards(source, split, config)
                meta["shards"][split] = [sum(shard.groups) for shard in shards]
                meta["rows"][split] = sum(meta["shards"][split])
                (draft / split).mkdir()
                with closing(workers.map(_write_shard, shards)) as written:
                    for shard, (taken, times) in zip(shards, written, strict=True):
                        _require_seen(shard)
                        if split == "train":
                            counts[taken] += times
                        if progress is not None:
                            progress(sum(shard.groups))
            notify("encoding users and items")
            rows = config.encode.row_group_rows
            _write_side(source, USERS, draft / "users.parquet", "user", rows, workers)
            _write_side(source, ITEMS, draft / "items.parquet", "item", rows, workers, counts)
        finally:
            _state.cache_clear()
    return meta


def even_sizes(total: int, most: int) -> list[int]:
    """Return the fewest sizes of at most `most` that add up to `total` and differ by at most one.

    There is always one, be it 0.
    """
    count = max(1, -(-total // most))
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def _check(samples: Path, schema: Schema, labels: tuple[str, ...]) -> None:
    others = (schema.user_key, schema.item_key, "label", "weight", *labels)
    for split in SPLITS:
        check_columns(samples / split, schema)
        for file in sorted((samples / split).glob("*.parquet")):
            check_file(file, schema.features, others)
    check_file(samples / USERS, schema.side("user"), [schema.user_key])
    check_file(samples / ITEMS, schema.side("item"), [schema.item_key])


def _sample_columns(schema: Schema, labels: tuple[str, ...]) -> list[str]:
    names = [feature.name for feature in schema.features]
    return [*dict.fromkeys([schema.user_key, schema.item_key, *names, "label", "weight", *labels])]


def _shards(source: _Source, split: str, config: Config) -> list[_Shard]:
    """Return a split's shards, of even sizes, in even row groups."""
    total = _count(sorted((source.samples / split).glob("*.parquet")))
    shards, start = [], 0
    for number, size in enumerate(even_sizes(total, config.encode.shard_rows)):
        groups = tuple(even_sizes(size, config.encode.row_group_rows))
        shards.append(_Shard(source, split, number, start, groups))
        start += size
    return shards


@dataclass(frozen=True)
class _State:
    """What a worker needs for its tasks, made at the first of them."""

    encoder: Encoder
    users: Rows
    items: Rows


@lru_cache(maxsize=1)
def _state(source: _Source) -> _State:
    for directory in (source.samples, source.draft):
        if not directory.is_dir():
            raise UserError(
                f"{socket.gethostname()}: {directory}: cannot be seen there; all hosts of the job "
                "must share the directories of samples and features"
            )
    fitted = Fitted.load(source.draft)
    keys = {USERS: fitted.schema.user_key, ITEMS: fitted.schema.item_key}
    users, items = (
        Rows(pq.read_table(source.samples / name, columns=[key])[0], source.samples / name)
        for name, key in keys.items()
    )
    return _State(Encoder(fitted), users, items)


def _write_shard(shard: _Shard) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Write a shard; return the item indices of its positive rows, and how often each occurs."""
    state, samples = _state(shard.source), shard.source.samples
    schema = state.encoder.fitted.schema
    labels = shard.source.labels
    kinds = shard_types(schema.features, labels)
    files = sorted((samples / shard.split).glob("*.parquet"))
    positives = [np.empty(0, np.int64)]
    with (
        closing(
            _tables(files, _sample_columns(schema, labels), shard.start, shard.groups)
        ) as tables,
        parquet_writer(shard.file, kinds) as write,
    ):
        for table in tables:
            if not table.num_rows:
                write(pa.schema(list(kinds.items())).empty_table())
                continue
            encoded = _encode_rows(state, table, shard.source)
            write(encoded)
            index, label = encoded["item_index"].to_numpy(), encoded["label"].to_numpy()
            positives.append(index[label > 0])
    taken, times = np.unique(np.concatenate(positives), return_counts=True)
    return taken, times


def _require_seen(shard: _Shard) -> None:
    if not shard.file.is_file():
        raise UserError(
            f"{shard.file}: a worker has written it, but it is not there; all hosts of the job "
            "must share the directory of features"
        )


def _encode_rows(state: _State, rows: pa.Table, source: _Source) -> pa.Table:
    encoder, samples = state.encoder, source.samples
    schema = encoder.fitted.schema
    columns = {f.name: encoder.encode(f, rows[f.name]) for f in schema.features}
    user, item = schema.user_key, schema.item_key
    columns["user_index"] = state.users.index(rows[user], f"{samples}: {user}")
    columns["item_index"] = state.items.index(rows[item], f"{samples}: {item}")
    columns["label"] = rows["label"].cast(pa.float32())
    columns["weight"] = rows["weight"].cast(pa.float32())
    for name in source.labels:
        # Where a row tells nothing of a task, its label is NaN.
        columns[name] = pc.fill_null(rows[name].cast(pa.float32()), float("nan"))
    return pa.table(columns)


def _write_side(
    source: _Source,
    name: str,
    file: Path,
    side: Side,
    row_group_rows: int,
    workers: WorkerPool,
    counts: NDArray[np.int64] | None = None,
) -> None:
    """Encode a table of users or items; the row of a key stays its row. counts: train_count."""
    schema = _state(source).encoder.fitted.schema
    key = schema.user_key if side == "user" else schema.item_key
    kinds = {"key": pq.read_schema(source.samples / name).field(key).type}
    kinds |= encoded_types(schema.side(side))
    if counts is not None:
        kinds["train_count"] = pa.int64()
    total = pq.read_metadata(source.samples / name).num_rows
    starts = range(0, total, row_group_rows)
    parts = [_Part(source, name, side, s, min(row_group_rows, total - s)) for s in starts]
    with (
        closing(workers.map(_encode_part, parts)) as encoded,
        parquet_writer(file, kinds, nullable=("key",)) as write,
    ):
        for part, table in zip(parts, encoded, strict=True):
            if counts is None:
                write(table)
            else:
                times = pa.array(counts[part.start : part.start + part.rows])
                write(table.append_column("train_count", times))


def _encode_part(part: _Part) -> pa.Table:
    """Return the keys and codes of some users or items."""
    encoder = _state(part.source).encoder
    schema = encoder.fitted.schema
    features = schema.side(part.side)
    key = schema.user_key if part.side == "user" else schema.item_key
    names = [*dict.fromkeys([key, *(feature.name for feature in features)])]
    with closing(_tables([part.source.samples / part.file], names, part.start, [part.rows])) as t:
        rows = next(t)
    columns = {feature.name: encoder.encode(feature, rows[feature.name]) for feature in features}
    return pa.table({"key": one_chunk(rows[key]), **columns})


def _count(files: Sequence[Path]) -> int:
    return sum(pq.read_metadata(file).num_rows for file in files)


def _tables(
    files: Sequence[Path], names: list[str], start: int, sizes: Sequence[int]
) -> Generator[pa.Table, None, None]:
    """Yield the files' rows from `start` on, in order, as tables of the given sizes."""
    batches = _batches(files, names, start, max(1, *sizes))
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
    files: Sequence[Path], names: list[str], start: int, rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield the files' rows from `start` on, at most `rows` at a time; others are passed over."""
    for file in files:
        try:
            with pq.ParquetFile(file) as source:
                metadata = source.metadata
                groups: list[int] = []
                for group in range(metadata.num_row_groups):
                    length = metadata.row_group(group).num_rows
                    if groups or start < length:
                        groups.append(group)
                    else:
                        start -= length
                # Workers are what runs at the same time here, not threads.
                found = source.iter_batches(rows, groups, names, use_threads=False)
                for batch in found if groups else ():
                    passed = min(start, batch.num_rows)
                    start -= passed
                    if passed < batch.num_rows:
                        yield batch.slice(passed)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{file}: damaged ({one_line(error)}); make the samples again"
            ) from None
