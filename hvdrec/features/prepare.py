"""The stage ``prepare``: fit the features on the training split and encode all splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvdrec.config import Config
from hvdrec.errors import invalid_value, unknown_name
from hvdrec.features.encode import encode
from hvdrec.parallel.pool import WorkerPool, open_pool
from hvdrec.parallel.progress import show_progress
from hvdrec.storage.artifacts import read_manifest
from hvdrec.storage.urls import as_location

ENGINES = ("duckdb", "spark")


@dataclass(frozen=True)
class PrepareResult:
    """The result of `prepare`: the encoded features of a run.

    Attributes:
        path: Directory or URL of the features.
        rows: Split -> number of rows.
        sizes: Embedding table -> number of codes, including those for unknown and missing values.
        shards: Split -> number of rows of each shard.
        growth: Embedding table -> the number of values that got a code (``admitted``), of values
            that lost their code (``evicted``), and of codes without a value (``free``). Empty
            unless the features went on from earlier ones.
    """

    path: str
    rows: Mapping[str, int]
    sizes: Mapping[str, int]
    shards: Mapping[str, Sequence[int]]
    growth: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)


def prepare(
    config: Config,
    *,
    start_from: Path | str | None = None,
    overwrite: bool = False,
    workers: int = 0,
    progress: bool = True,
    engine: str = "duckdb",
) -> PrepareResult:
    """Fit the features on the training split and encode all splits into shards.

    It reads ``paths.samples`` and writes ``paths.features``. Under mpirun, the ranks share the work
    and all return the same result.

    Args:
        config: Configuration of the run.
        start_from: Directory or URL of earlier features to go on from: known values keep their
            codes, and new ones get further codes. It may be ``paths.features`` itself.
        overwrite: Replace features that were written before.
        workers: Number of processes that share the work, except under mpirun; 0 for one per core,
            at most 8. The shards do not depend on it.
        progress: Show a progress bar on the first rank, or lines if there is no terminal.
        engine: One of `ENGINES`: "duckdb" works in this process and its workers, "spark" in the
            executors of the active Spark session, or of a new session. Both write the same shards.

    Raises:
        UserError: The samples are missing or do not match the configuration or the earlier
            features, or there are features already. Then nothing is written.
    """
    with open_workers(engine, workers) as pool:
        if pool is not None:
            return prepare_with(
                pool, config, start_from=start_from, overwrite=overwrite, progress=progress
            )
    # The first rank of the MPI job has finished the artifact, and all ranks can read it.
    return _result(config, read_manifest(config.paths.of("features"), "features").meta)


@contextmanager
def open_workers(engine: str, workers: int) -> Iterator[WorkerPool | None]:
    """Yield the workers of an engine, or None on all ranks of an MPI job but rank 0.

    Args:
        engine: One of `ENGINES`.
        workers: Number of processes for "duckdb"; 0 for one per core, at most 8.

    Raises:
        UserError: The engine is unknown or cannot start, or does not take a number of workers.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if engine == "duckdb":
        with open_pool(workers) as pool:
            yield pool
        return
    from hvdrec.parallel.spark import SparkPool, spark_session

    if workers:
        problem = "has no effect with engine 'spark', which uses the executors of the cluster"
        raise invalid_value("workers", workers, problem, "leave it out")
    with spark_session("hvdrec prepare") as session:
        yield SparkPool(session)


def prepare_with(
    pool: WorkerPool,
    config: Config,
    *,
    start_from: Path | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareResult:
    """Run `prepare` with workers that `open_workers` has opened."""
    with show_progress(progress) as display:
        meta = encode(
            config.paths.of("samples"),
            config.paths.of("features"),
            config,
            parent=None if start_from is None else as_location(str(start_from)),
            overwrite=overwrite,
            notify=display.describe,
            progress=display.advance,
            workers=pool,
        )
    return _result(config, meta)


def _result(config: Config, meta: Mapping[str, Any]) -> PrepareResult:
    path = str(config.paths.of("features"))
    growth = meta.get("growth", {})
    return PrepareResult(path, meta["rows"], meta["sizes"], meta["shards"], growth)
