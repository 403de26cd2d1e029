"""Encode samples into shards by running the preprocessing graph.

A worker writes a whole shard at a time. Which rows and row groups a shard has depends only on the
samples and the configuration, so the files do not depend on the number of workers.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.data_sections import Encode
from hvdrec.config.schema import Schema, Side
from hvdrec.config.structure import to_dict
from hvdrec.errors import invalid_file
from hvdrec.features.duckdb_split import open_duckdb_split
from hvdrec.features.encoder import Encoder, KeyRows
from hvdrec.features.fit import Fitted, OpenSplit, fit
from hvdrec.features.graph import build
from hvdrec.features.grow import grow, growth_facts
from hvdrec.features.raw import one_chunk
from hvdrec.features.reading import count_rows, read_tables
from hvdrec.features.sample_checks import check_columns, check_file, check_task_labels
from hvdrec.features.shards import encoded_types, parquet_writer, shard_types
from hvdrec.parallel.pool import THIS_PROCESS, WorkerPool
from hvdrec.parallel.spark import SparkPool
from hvdrec.storage.artifacts import (
    MADE_FROM,
    Manifest,
    read_manifest,
    verify_artifact,
    write_artifact,
)
from hvdrec.storage.lineage import ANCESTORS, descent
from hvdrec.storage.parquet import FileChecksums, write_checksums
from hvdrec.storage.urls import Location

SPLITS = ("train", "validation", "test")
SIDE_FILES: dict[Side, str] = {"user": "users_train.parquet", "item": "items.parquet"}


@dataclass(frozen=True)
class _Job:
    """Settings that all tasks share.

    Attributes:
        samples: Directory of the samples.
        draft: Directory in which the features are written.
        labels: Columns of the labels of tasks.
        number: Random identifier of the run, because a process of a cluster may work for several
            runs.
    """

    samples: Path
    draft: Path
    labels: tuple[str, ...] = ()
    number: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True)
class _Shard:
    """A shard to write: the rows of a split from `start` on, in row groups of given sizes."""

    job: _Job
    split: str
    number: int
    start: int
    groups: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.job.draft / self.split / f"shard-{self.number:05d}.parquet"


@dataclass(frozen=True)
class _SideFile:
    """A table of users or items in the samples."""

    side: Side
    name: str

    @property
    def target(self) -> str:
        """File name of the encoded table; for the users of state "train", ``users.parquet``."""
        return "users.parquet" if self.name == SIDE_FILES["user"] else self.name


@dataclass(frozen=True)
class _SideRows:
    """Some rows of a table of users or items, which are encoded together."""

    job: _Job
    table: _SideFile
    start: int
    rows: int


def encode(
    samples: Path,
    out: Location,
    config: Config,
    *,
    parent: Location | None = None,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
    workers: WorkerPool = THIS_PROCESS,
) -> dict[str, Any]:
    """Fit the features on the training split, encode all splits and write the artifact.

    The memory of a worker depends on the size of a row group, the number of keys and the
    vocabularies, not on the number of samples.

    Args:
        samples: Directory that `hvdrec samples` wrote.
        out: Directory or URL to write.
        config: Configuration of the run, which is also stored in the manifest.
        parent: Earlier features to go on from, which may be at `out`; None if there are none.
        overwrite: Replace an existing artifact.
        notify: Called with a line of text at the start of each step.
        progress: Called with the number of rows written since the last call.
        workers: Processes that share the work. Both directories must be visible on all their hosts.

    Returns:
        The ``meta`` of the manifest: numbers of rows, sizes of tables, shards.

    Raises:
        UserError: The samples are missing or damaged, lack a column, or have a wrong type or an
            unknown key. Then nothing is written.
    """
    manifest, schema = verify_artifact(samples, "samples"), config.schema
    check_task_labels(samples, manifest, config.tasks, "hvdrec samples")
    states = sorted({*manifest.meta.get("user_states", {}).values()} - {"train"})
    _check(samples, schema, config.task_columns, states)
    meta = _first_facts(manifest, config)
    before = None if parent is None else _read_parent(parent, meta)
    with write_artifact(out, "features", meta, overwrite=overwrite) as draft:
        notify("fitting features")
        fitted = _write_fitted(draft, samples, config, before, workers)
        meta |= {"sizes": fitted.sizes, "growth": growth_facts(fitted)}
        job = _Job(samples.absolute(), draft.absolute(), config.task_columns)
        try:
            counts = _write_splits(job, config.encode, meta, notify, progress, workers)
            notify("encoding users and items")
            rows = config.encode.row_group_rows
            for state in ("train", *states):
                _write_side(job, _SideFile("user", f"users_{state}.parquet"), rows, workers, {})
            items = {schema.own_name("train_count"): counts}
            _write_side(job, _SideFile("item", SIDE_FILES["item"]), rows, workers, items)
            write_checksums(job.draft)
        finally:
            _state.cache_clear()
    return meta


def _write_fitted(
    draft: Path, samples: Path, config: Config, before: Fitted | None, workers: WorkerPool
) -> Fitted:
    """Fit the features; write the result and the preprocessing graph."""
    split, schema = _split_opener(workers, draft), config.schema
    if before is None:
        fitted = fit(samples, schema, split)
    else:
        fitted = grow(samples, schema, before, config.grow, split)
    fitted.save(draft)
    graph = build(fitted, [feature.name for feature in schema.features])
    onnx.save(graph, str(draft / "preprocess.onnx"))
    return fitted


def _split_opener(workers: WorkerPool, scratch: Path) -> OpenSplit:
    """Return a function that opens the training split, in this process or on the Spark cluster."""
    if not isinstance(workers, SparkPool):
        return partial(open_duckdb_split, scratch=scratch)
    from hvdrec.features.spark_split import open_spark_split

    return partial(open_spark_split, workers.session)


def _first_facts(samples: Manifest, config: Config) -> dict[str, Any]:
    """Return the ``meta`` of features, as far as it is known before they are fitted."""
    meta: dict[str, Any] = {"config": to_dict(config), "rows": {}, "sizes": {}, "shards": {}}
    meta[MADE_FROM] = {"samples": samples.identity}
    # Evaluation reads these: the state of users for each split, and the number of copied rows.
    kept = ("user_states", "copies")
    return meta | {key: samples.meta[key] for key in kept if key in samples.meta}


def _read_parent(parent: Location, meta: dict[str, Any]) -> Fitted:
    """Load the features to go on from, and record them in the ``meta`` of the new features."""
    meta[ANCESTORS] = descent(read_manifest(parent, "features"))
    return Fitted.load(parent, to_grow=True)


def _write_splits(
    job: _Job,
    encode: Encode,
    meta: dict[str, Any],
    notify: Callable[[str], None],
    progress: Callable[[int], None],
    workers: WorkerPool,
) -> NDArray[np.int64]:
    """Encode all splits; return the number of positive training rows of each item."""
    counts = np.zeros(count_rows([job.samples / SIDE_FILES["item"]]), dtype=np.int64)
    for split in SPLITS:
        notify(f"encoding {split}")
        shards = _shards(job, split, encode)
        meta["shards"][split] = [sum(shard.groups) for shard in shards]
        meta["rows"][split] = sum(meta["shards"][split])
        (job.draft / split).mkdir()
        checksums = {}
        with closing(workers.map(_write_shard, shards)) as results:
            for shard, written in zip(shards, results, strict=True):
                _require_visible(shard)
                checksums[shard.file.name] = written.checksums
                if split == "train":
                    counts[written.items] += written.times
                progress(sum(shard.groups))
        write_checksums(job.draft / split, checksums)
    return counts


def even_sizes(total: int, largest: int) -> list[int]:
    """Divide a total into as few parts of at most `largest` as possible; return their sizes.

    The sizes differ by at most one. If the total is 0, there is one empty part.
    """
    count = max(1, -(-total // largest))
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def _check(samples: Path, schema: Schema, labels: tuple[str, ...], states: Sequence[str]) -> None:
    others = (schema.user_key, schema.item_key, *schema.row_columns[2:], *labels)
    for split in SPLITS:
        check_columns(samples / split, schema, others)
    for side, name in SIDE_FILES.items():
        check_file(samples / name, schema.columns(side), [schema.key(side)])
    for state in states:
        file = samples / f"users_{state}.parquet"
        check_file(file, schema.columns("user"), [schema.user_key])


def _shards(job: _Job, split: str, encode: Encode) -> list[_Shard]:
    """Divide a split into shards of even sizes with even row groups."""
    total = count_rows(sorted((job.samples / split).glob("*.parquet")))
    shards, start = [], 0
    for number, size in enumerate(even_sizes(total, encode.shard_rows)):
        groups = tuple(even_sizes(size, encode.row_group_rows))
        shards.append(_Shard(job, split, number, start, groups))
        start += size
    return shards


@dataclass(frozen=True)
class _State:
    """Objects that a worker builds for its first task and keeps for all later tasks."""

    encoder: Encoder
    users: KeyRows
    items: KeyRows


@lru_cache(maxsize=1)
def _state(job: _Job) -> _State:
    for directory in (job.samples, job.draft):
        if not directory.is_dir():
            problem = f"not visible on host {socket.gethostname()}"
            remedy = "all hosts must share the directories of samples and features"
            raise invalid_file(directory, problem, remedy)
    fitted = Fitted.load(job.draft)
    users, items = (
        KeyRows(pq.read_table(file, columns=[fitted.schema.key(side)])[0], file)
        for side, file in ((side, job.samples / name) for side, name in SIDE_FILES.items())
    )
    return _State(Encoder(fitted), users, items)


@dataclass(frozen=True)
class _Written:
    """A shard that was written.

    Attributes:
        items: Indices of the n items that occur in its positive rows, int64 [n].
        times: Number of positive rows of each of them, int64 [n].
        checksums: Checksums of the file.
    """

    items: NDArray[np.int64]
    times: NDArray[np.int64]
    checksums: FileChecksums


def _write_shard(shard: _Shard) -> _Written:
    job, state = shard.job, _state(shard.job)
    schema = state.encoder.fitted.schema
    types = shard_types(schema, job.labels)
    names = [column.name for column in schema.columns()]
    _, item_index, *labels = schema.row_columns
    names = [schema.user_key, schema.item_key, *names, *labels, *job.labels]
    files = sorted((job.samples / shard.split).glob("*.parquet"))
    rows = read_tables(files, [*dict.fromkeys(names)], shard.start, shard.groups)
    positives = [np.empty(0, np.int64)]
    with closing(rows) as tables, parquet_writer(shard.file, types) as write:
        for table in tables:
            if not table.num_rows:
                write(pa.schema(list(types.items())).empty_table())
                continue
            encoded = _encode_rows(state, table, job.labels)
            write(encoded)
            index, label = encoded[item_index].to_numpy(), encoded[labels[0]].to_numpy()
            positives.append(index[label > 0])
    items, times = np.unique(np.concatenate(positives), return_counts=True)
    return _Written(items, times, FileChecksums.compute(shard.file))


def _require_visible(shard: _Shard) -> None:
    if not shard.file.is_file():
        problem = "a worker wrote this file, but it is not visible here"
        raise invalid_file(shard.file, problem, "all hosts must share the directory of features")


def _encode_rows(state: _State, rows: pa.Table, labels: Sequence[str]) -> pa.Table:
    schema = state.encoder.fitted.schema
    columns = state.encoder.encode(schema.features, rows)
    user_index, item_index, label, weight = schema.row_columns
    columns[user_index] = state.users.find(rows[schema.user_key], schema.user_key)
    columns[item_index] = state.items.find(rows[schema.item_key], schema.item_key)
    columns[label] = rows[label].cast(pa.float32())
    columns[weight] = rows[weight].cast(pa.float32())
    for name in labels:
        # NaN means that a row has no label for this task.
        columns[name] = pc.fill_null(rows[name].cast(pa.float32()), float("nan"))
    return pa.table(columns)


def _write_side(
    job: _Job,
    table: _SideFile,
    row_group_rows: int,
    workers: WorkerPool,
    further: dict[str, NDArray[np.int64]],
) -> None:
    """Encode a table of users or items, keep the order of its rows, and add columns `further`."""
    schema = _state(job).encoder.fitted.schema
    side, source = table.side, job.samples / table.name
    key = schema.own_name("key")
    types = {key: pq.read_schema(source).field(schema.key(side)).type}
    types |= encoded_types(schema.side(side)) | dict.fromkeys(further, pa.int64())
    total = count_rows([source])
    starts = range(0, total, row_group_rows)
    parts = [_SideRows(job, table, s, min(row_group_rows, total - s)) for s in starts]
    with (
        closing(workers.map(_encode_side, parts)) as encoded,
        parquet_writer(job.draft / table.target, types, nullable=(key,)) as write,
    ):
        for part, rows in zip(parts, encoded, strict=True):
            for name, values in further.items():
                column = pa.array(values[part.start : part.start + part.rows])
                rows = rows.append_column(name, column)  # noqa: PLW2901
            write(rows)


def _encode_side(part: _SideRows) -> pa.Table:
    """Return the keys and the encoded features of some users or items."""
    encoder = _state(part.job).encoder
    schema = encoder.fitted.schema
    side = part.table.side
    features, key = schema.side(side), schema.key(side)
    names = [*dict.fromkeys([key, *(column.name for column in schema.columns(side))])]
    file = part.job.samples / part.table.name
    with closing(read_tables([file], names, part.start, [part.rows])) as tables:
        rows = next(tables)
    return pa.table(
        {schema.own_name("key"): one_chunk(rows[key]), **encoder.encode(features, rows)}
    )
