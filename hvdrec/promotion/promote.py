"""The stage ``promote``: publish the bundle of a run if it is no worse than the one that serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hvdrec.config import Config, with_fields
from hvdrec.errors import invalid_value
from hvdrec.evaluation.result import as_json
from hvdrec.exporting.export_run import export_with
from hvdrec.parallel.pool import THIS_PROCESS, WorkerPool
from hvdrec.parallel.progress import print_line
from hvdrec.promotion.fresh_rows import FreshRows, coverage, measure, read_fresh_rows
from hvdrec.promotion.gate import (
    Check,
    Difference,
    compare,
    coverage_checks,
    freshness_check,
    noise,
    rows_check,
    score_drift,
)
from hvdrec.promotion.versions import PROMOTED, REFUSED, ROLLED_BACK, Published
from hvdrec.storage.artifacts import read_manifest
from hvdrec.storage.drafts import scratch_directory
from hvdrec.storage.urls import is_url
from hvdrec.training.checkpoint import read_config
from hvdrec.training.pointers import Which, find_checkpoint

Notify = Callable[[str], None]


@dataclass(frozen=True)
class PromoteResult:
    """The result of `promote`.

    Attributes:
        is_promoted: True if the new model serves now, or already served before.
        version: Name of the version that serves now; None if there is none.
        served: Name of the version that served before; None if there was none.
        path: Path of the link ``current``, for services to load and to watch.
        rows: Number of rows that both models were compared on.
        checks: The comparisons.
        reasons: Reasons of the checks that failed; the new model was refused unless ``force``.
    """

    is_promoted: bool
    version: str | None
    served: str | None
    path: str
    rows: int
    checks: Sequence[Check]
    reasons: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values; NaN becomes None."""
        return as_json(self)


def published_at(config: Config, to: Path | str | None = None) -> Published:
    """Return the published versions of a configuration, or those in the directory `to`."""
    folder = str(to or config.promote.to or Path(config.paths.work) / "published")
    if is_url(folder):
        problem = "must be a directory"
        remedy = "copy a version to a store with hvdrec fetch, or mount the store"
        raise invalid_value("promote.to", folder, problem, remedy)
    return Published(Path(folder))


def promote(
    run: Path | str,
    *,
    to: Path | str | None = None,
    checkpoint: Which = "best",
    overrides: dict[str, Any] | None = None,
    force: bool = False,
    allow_worse: bool = False,
    workers: WorkerPool = THIS_PROCESS,
    progress: bool = True,
) -> PromoteResult:
    """Publish the bundle of a run if it is no worse than the bundle that serves.

    Both are compared on the freshest labelled rows of the run's samples; see ``[promote]``. If the
    new bundle passes, the link ``current`` is replaced in one atomic step, and a service that
    watches this link reloads.

    Args:
        run: Directory of the run.
        to: Directory of the published versions; by default ``promote.to``, or WORK/published.
        checkpoint: ``best`` for the checkpoint with the best validation metric, or ``latest``.
        overrides: New values of fields of ``[promote]`` and ``[export]``.
        force: Publish even if checks fail.
        allow_worse: As in `hvdrec.export`.
        workers: Processes that compute the embeddings of the bundle.
        progress: True to print the steps on standard error.

    Raises:
        UserError: The run, its samples or the published versions cannot be read, or the export
            fails. In all these cases, nothing is published.
    """
    config = with_fields(read_config(Path(run)), overrides or {})
    published = published_at(config, to)
    loaded = find_checkpoint(Path(run), checkpoint)
    notify = print_line if progress else _silent
    with published.locked():
        served, link = published.current(), str(published.link)
        if served is not None and _is_made_from(published.path(served), loaded.manifest.identity):
            notify(f"version {served} was made from {loaded.directory}: nothing to do")
            return PromoteResult(True, served, served, link, 0, (), ())
        rows = read_fresh_rows(config)
        facts = {"run": str(run), "checkpoint": loaded.name, "served": served}
        checks = _check_data(published, served, rows, config, facts)
        with scratch_directory(published.folder / "candidate") as scratch:
            bundle = scratch / "bundle"
            if force or not _reasons(checks):
                target = replace(config.paths, bundle=str(bundle))
                export_with(
                    workers,
                    Path(run),
                    replace(config, paths=target),
                    checkpoint=checkpoint,
                    allow_worse=allow_worse,
                    progress=progress,
                )
                checks += _compare(published, served, bundle, rows, config, facts, notify)
            version = _decide(published, served, bundle, checks, facts, force=force)
            published.prune(config.promote.keep)
    shown = (len(rows.label), checks, _reasons(checks))
    return PromoteResult(version != served, version, served, link, *shown)


def roll_back(published: Published, name: str | None = None) -> tuple[str | None, str]:
    """Let an earlier version serve again; return the previous and the new current version.

    Args:
        published: The published versions.
        name: Version that is to serve; None for the newest version before the current one.

    Raises:
        UserError: There is no such version.
    """
    with published.locked():
        before, now = published.roll_back(name)
        published.note(ROLLED_BACK, version=now, served=before)
    return before, now


def _check_data(
    published: Published,
    served: str | None,
    rows: FreshRows,
    config: Config,
    facts: dict[str, Any],
) -> list[Check]:
    """Check the fresh rows before the export, and add facts about them to `facts`."""
    options, record = config.promote, published.record(served)
    known = coverage(config.paths.of("features"), rows)
    age = (time.time() - rows.newest) / 3600 if rows.newest is not None else 0.0
    facts |= {"rows": len(rows.label), "coverage": known, "newest": rows.newest}
    return [
        rows_check(len(rows.label), options),
        freshness_check(rows.newest, record.get("newest"), age, options.max_age_hours),
        *coverage_checks(known, record.get("coverage", {}), options.coverage),
    ]


def _compare(
    published: Published,
    served: str | None,
    bundle: Path,
    rows: FreshRows,
    config: Config,
    facts: dict[str, Any],
    notify: Notify,
) -> list[Check]:
    """Compare both models on the fresh rows, and add the new model's results to `facts`."""
    notify(f"scoring {len(rows.label)} fresh rows with the new model")
    new, scores = measure(bundle, rows, config, bundle.parent)
    facts |= {"metrics": dict(new.metrics), "catalogue": new.catalogue}
    old, difference = None, Difference()
    if served is not None:
        notify(f"scoring them with version {served}, which serves")
        old, before = measure(published.path(served), rows, config, bundle.parent)
        difference = Difference(score_drift(scores, before), noise(scores, before, rows))
    has_ranker = config.train.objective != "retrieval"
    return compare(new, old, difference, config.promote, has_ranker=has_ranker)


def _decide(
    published: Published,
    served: str | None,
    bundle: Path,
    checks: Sequence[Check],
    facts: dict[str, Any],
    *,
    force: bool,
) -> str | None:
    """Publish or refuse the bundle, record the decision; return the version that serves now."""
    reasons = _reasons(checks)
    facts |= {"reasons": reasons, "checks": [asdict(check) for check in checks]}
    if reasons and not force:
        published.note(REFUSED, **facts)
        return served
    version = published.publish(bundle)
    published.note(PROMOTED, version=version, **facts)
    return version


def _reasons(checks: Sequence[Check]) -> list[str]:
    return [check.reason for check in checks if not check.is_passed]


def _silent(line: str) -> None:
    """Print nothing."""


def _is_made_from(bundle: Path, checkpoint: str) -> bool:
    return read_manifest(bundle, "bundle").made_from("checkpoint") == checkpoint
