"""The stage ``export``: write the bundle of a trained run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hvdrec.config import Config, with_fields
from hvdrec.errors import invalid_value
from hvdrec.evaluation.result import as_json
from hvdrec.exporting.worse import compare_with_baselines
from hvdrec.exporting.writer import write_bundle
from hvdrec.parallel.pool import WorkerPool, open_pool
from hvdrec.parallel.progress import show_progress
from hvdrec.storage.artifacts import read_manifest
from hvdrec.training.checkpoint import load_model, read_config
from hvdrec.training.pointers import Which

__all__ = ["ExportResult", "export"]

ALLOWED = "fields of [export], evaluate.seen, tasks.N.share, model.ranker.combine, paths.bundle can"
UNTRAINED = re.compile(
    r"export\.\w+|evaluate\.seen|tasks\.\d+\.share|model\.ranker\.combine|paths\.bundle"
)
"""The fields that export may change, because training does not depend on them."""


@dataclass(frozen=True)
class ExportResult:
    """A bundle that was written.

    Attributes:
        path: Directory or URL of the bundle.
        name: Name of the run.
        checkpoint: Name of the exported checkpoint.
        users: Number of users with stored embeddings.
        items: Number of items.
        user_width: Number of entries of a user's stored embedding.
        item_width: Number of entries of an item's stored embedding.
        parity: ``rows``, the number of scores compared with torch, and ``largest_difference``.
        metrics: The validation metrics of the checkpoint.
        precision: How much validation AUC int8 or float16 costs; None for a float32 bundle.
    """

    path: str
    name: str
    checkpoint: str
    users: int
    items: int
    user_width: int
    item_width: int
    parity: Mapping[str, Any]
    metrics: Mapping[str, Any]
    precision: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values; NaN becomes None."""
        return as_json(self)


def export(
    run: Path | str,
    *,
    to: Path | str | None = None,
    checkpoint: Which = "best",
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    allow_worse: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> ExportResult:
    """Write the bundle of a run, if it gives the same scores as the PyTorch model.

    Under mpirun the ranks share the work, and all of them return the same result.

    Args:
        run: Directory of the run.
        to: Directory or URL of the bundle; by default ``paths.bundle`` of the run.
        checkpoint: ``best`` for the checkpoint with the best validation metric, or ``latest``.
        overrides: New values of fields that do not influence training:
            ``{"export.embeddings": "int8", "tasks.0.share": 2.0, "model.ranker.combine": "sum"}``.
        overwrite: Replace a bundle that is already there.
        allow_worse: Export a model even if simple baselines are better on the validation split.
        workers: Number of processes that share the work, except under mpirun; 0 for one per core,
            at most 8. The bundle does not depend on their number.
        progress: True to print the steps on standard error (on the first rank).

    Raises:
        UserError: The run cannot be read; a field cannot be overridden; there is a bundle already;
            the model is worse than a simple baseline; or the bundle's scores differ from those of
            PyTorch by more than ``export.tolerance``. In all these cases, no bundle is written.
    """
    changes = dict(overrides or {}) | ({} if to is None else {"paths.bundle": str(to)})
    with open_pool(workers) as pool:
        if pool is not None:
            config = _with_untrained_fields(read_config(Path(run)), changes)
            return export_with(
                pool,
                Path(run),
                config,
                checkpoint=checkpoint,
                overwrite=overwrite,
                allow_worse=allow_worse,
                progress=progress,
            )
    # The first rank of the MPI job has written the bundle; all ranks can read it.
    config = _with_untrained_fields(read_config(Path(run)), changes)
    return _result(config, read_manifest(config.paths.of("bundle"), "bundle").meta)


def export_with(
    pool: WorkerPool,
    run: Path,
    config: Config,
    *,
    checkpoint: Which = "best",
    overwrite: bool = False,
    allow_worse: bool = False,
    progress: bool = True,
) -> ExportResult:
    """Do what `export` does, with an open pool of workers and the complete configuration."""
    model, loaded = load_model(run, config, checkpoint)
    with show_progress(progress) as display:
        worse = compare_with_baselines(
            config, model, loaded, allow_worse=allow_worse, notify=display.describe
        )
        metrics = loaded.metrics | ({} if worse is None else {"worse_than": worse})
        meta = write_bundle(
            config,
            model,
            checkpoint=loaded.name,
            checkpoint_identity=loaded.manifest.identity,
            metrics=metrics,
            overwrite=overwrite,
            notify=display.describe,
            workers=pool,
        )
    return _result(config, meta)


def _with_untrained_fields(config: Config, changes: Mapping[str, Any]) -> Config:
    """Change fields of a configuration, which must be fields that do not influence training."""
    for name, value in changes.items():
        if not UNTRAINED.fullmatch(name):
            raise invalid_value(name, value, "cannot change after training", ALLOWED)
    return with_fields(config, changes)


def _result(config: Config, meta: Mapping[str, Any]) -> ExportResult:
    names = [field.name for field in fields(ExportResult) if field.name in meta]
    return ExportResult(path=str(config.paths.of("bundle")), **{name: meta[name] for name in names})
