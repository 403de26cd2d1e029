"""The command ``hvdrec promote``."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdrec.cli.command import CHECKPOINT, WORKERS, Answer, argument, command
from hvdrec.cli.model_commands import EXPORT_FIELDS
from hvdrec.cli.text_table import table
from hvdrec.errors import UserError

if TYPE_CHECKING:
    from hvdrec.promotion.promote import PromoteResult
    from hvdrec.promotion.versions import Published

BEFORE = ""
"""Value of --rollback without a version."""
NOTES = """\
The new model and the one that serves score the same fresh rows from raw values. The exit status is
0 if the new model serves now, and 1 if it was refused; the reasons are printed.

other uses:
  hvdrec promote --list --to published              # all versions, and which one serves
  hvdrec promote --rollback --to published          # the version before serves again
  hvdrec promote --rollback 0003 --to published     # version 0003 serves again
  hvdrec serve published/current                    # reloads after each promotion

"""


@command(
    argument("run", type=Path, nargs="?", help="directory of the run (WORK/run) to promote"),
    argument("--to", type=Path, metavar="DIR", help="published versions (default promote.to)"),
    argument("--list", action="store_true", help="list the versions"),
    argument(
        "--rollback",
        nargs="?",
        const=BEFORE,
        metavar="VERSION",
        help="let an earlier version serve again (default: the one before)",
    ),
    argument("--force", action="store_true", help="publish even if checks fail"),
    argument(
        "--allow-worse",
        action="store_true",
        help="export a model that is worse than simple baselines on the validation split",
    ),
    CHECKPOINT,
    WORKERS,
    notes=NOTES,
    example="hvdrec promote runs/movielens-1m/run --to published --promote.auc 0.001",
    fields=("promote.", *EXPORT_FIELDS),
)
def promote(options: argparse.Namespace) -> Answer:
    """Publish the bundle of a run if it is not worse than the bundle that serves."""
    from hvdrec.parallel.pool import open_pool
    from hvdrec.promotion.promote import promote

    if options.list and options.rollback is not None:
        raise UserError("--list and --rollback exclude each other; give one of them")
    if options.list:
        return _list(_published(options))
    if options.rollback is not None:
        return _roll_back(_published(options), options.rollback or None)
    if options.run is None:
        raise UserError(
            "RUN: is missing; give the directory of a run, or --list or --rollback", field="run"
        )
    with open_pool(options.workers) as pool:
        if pool is None:  # only the first rank of an MPI job promotes
            return Answer({}, "")
        result = promote(
            options.run,
            to=options.to,
            checkpoint=options.checkpoint,
            overrides=options.overrides,
            force=options.force,
            allow_worse=options.allow_worse,
            workers=pool,
        )
    return Answer(result.to_dict(), _text(result), 0 if result.is_promoted else 1)


def _published(options: argparse.Namespace) -> Published:
    """Return the published versions in the directory of --to, else of the run's configuration."""
    from hvdrec.promotion.promote import published_at
    from hvdrec.promotion.versions import Published
    from hvdrec.training.checkpoint import read_config

    if options.run is None:
        if options.to is None:
            raise UserError(
                "--to: is missing; give the directory of the published versions", field="--to"
            )
        return Published(options.to)
    return published_at(read_config(options.run), options.to)


def _list(published: Published) -> Answer:
    facts, rows = [], []
    for version in published.versions():
        record = version.record
        metrics = record.get("metrics", {})
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.get("time", 0)))
        mark = "serves" if version.is_current else ""
        shown = [_number(metrics.get(name)) for name in ("auc", "log_loss")]
        rows.append([version.name, mark, when if record else "", *shown, record.get("run", "")])
        facts.append({"version": version.name, "current": version.is_current, **record})
    if not rows:
        return Answer([], f"{published.folder}: no version was published; run hvdrec promote RUN")
    return Answer(facts, table(["version", "", "promoted", "auc", "log loss", "run"], rows))


def _roll_back(published: Published, name: str | None) -> Answer:
    from hvdrec.promotion.promote import roll_back

    before, now = roll_back(published, name)
    facts = {"version": now, "served": before, "path": str(published.link)}
    return Answer(facts, f"{published.link} serves version {now} (before: {before})")


def _text(result: PromoteResult) -> str:
    rows: list[list[Any]] = [
        [
            check.name,
            _number(check.new),
            _number(check.old),
            _number(check.margin),
            "" if check.is_passed else "refused",
        ]
        for check in result.checks
    ]
    lines = [table(["check", "new", "serving", "margin", ""], rows)] if rows else []
    lines += [f"refused: {reason}" for reason in result.reasons]
    if result.is_promoted:
        before = f", before {result.served}" if result.served else ""
        lines.append(f"{result.path} serves version {result.version}{before}")
    else:
        serving = f"version {result.version} still serves" if result.version else "nothing serves"
        lines.append(f"{result.path}: {serving}; --force publishes the new model all the same")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}"
