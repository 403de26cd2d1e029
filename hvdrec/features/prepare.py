"""The stage ``prepare``: fit the features on the training split and encode all splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvdrec.config import Config
from hvdrec.features.encode import encode
from hvdrec.parallel.pool import WorkerPool, open_pool
from hvdrec.parallel.progress import show_progress
from hvdrec.storage.artifacts import read_manifest


@dataclass(frozen=True)
class PrepareResult:
    """The encoded features of a run.

    Attributes:
        path: Directory or URL of the features artifact.
        rows: Rows of each split.
        sizes: Number of codes of each embedding table, with the codes for unknown and missing.
        shards: Rows of each shard, by split.
    """

    path: str
    rows: Mapping[str, int]
    sizes: Mapping[str, int]
    shards: Mapping[str, Sequence[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)


def prepare(
    config: Config, *, overwrite: bool = False, workers: int = 0, progress: bool = True
) -> PrepareResult:
    """Fit the features on the training split and encode all splits into shards.

    Reads ``paths.samples`` and writes ``paths.features``. Under mpirun the ranks share the work,
    and each of them returns the same result.

    Args:
        config: The run.
        overwrite: Replace features that an earlier run wrote.
        workers: Processes that share the work outside mpirun; 0: one per core, at most 8. The
            shards do not depend on it.
        progress: Show a bar, or lines where there is no terminal, on the first rank.

    Raises:
        UserError: The samples are missing or do not fit the configuration, or features are already
            there; nothing is written.
    """
    with open_pool(workers) as pool:
        if pool is not None:
            return prepare_with(pool, config, overwrite=overwrite, progress=progress)
    # The first rank of the MPI job has finished the artifact, which all ranks see.
    return _result(config, read_manifest(config.paths.of("features"), "features").meta)


def prepare_with(
    pool: WorkerPool, config: Config, *, overwrite: bool = False, progress: bool = True
) -> PrepareResult:
    """Do what `prepare` does, with a pool of workers that is already open."""
    with show_progress(progress) as display:
        meta = encode(
            config.paths.of("samples"),
            config.paths.of("features"),
            config,
            overwrite=overwrite,
            notify=display.describe,
            progress=display.advance,
            workers=pool,
        )
    return _result(config, meta)


def _result(config: Config, meta: Mapping[str, Any]) -> PrepareResult:
    path = str(config.paths.of("features"))
    return PrepareResult(path, meta["rows"], meta["sizes"], meta["shards"])
