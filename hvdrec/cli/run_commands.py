"""The commands that show a run: top, report."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from hvdrec.cli.command import CHECKPOINT, RUN, Answer, argument, command

REFRESH_SECONDS = 2.0
CLEAR_SCREEN = "\033[H\033[2J"


@command(
    RUN,
    argument(
        "--once", action="store_true", help="print the state once, also on a terminal (no refresh)"
    ),
    example="hvdrec top runs/movielens-1m/run",
)
def top(options: argparse.Namespace) -> Answer:
    """Show a running or finished training: progress, speed, curves, time left.

    On a terminal, the view is refreshed every two seconds until the run ends or you press Ctrl-C.
    """
    from hvdrec.cli.run_view import render_run, run_facts, run_state
    from hvdrec.training.run_history import LOG_FILE, read_history

    run: Path = options.run
    is_live = sys.stdout.isatty() and not options.once and not options.json
    while True:
        history = read_history(run)
        age = max(0.0, time.time() - (run / LOG_FILE).stat().st_mtime)
        if not is_live or run_state(history, age) == "finished":
            break
        print(f"{CLEAR_SCREEN}{render_run(history, age)}\n\n{run}  (Ctrl-C ends this view)")
        time.sleep(REFRESH_SECONDS)
    return Answer(run_facts(history, age), render_run(history, age))


@command(
    RUN,
    argument("--to", type=Path, metavar="FILE", help="HTML file (default WORK/report.html)"),
    argument(
        "--against", type=Path, metavar="RUN", help="another run on the same samples to compare"
    ),
    argument("--split", choices=["validation", "test"], default="test", help="default: test"),
    CHECKPOINT,
    argument(
        "--ease-items",
        type=int,
        default=10_000,
        metavar="N",
        help="largest catalogue for which EASE is fitted (default 10000; 0: never)",
    ),
    example="hvdrec report runs/movielens-1m/run",
)
def report(options: argparse.Namespace) -> Answer:
    """Write a report of a run as one HTML file, and a model card in Markdown.

    The report holds the tables that hvdrec evaluate prints, curves, slices, confidence intervals,
    the effect of the scene and of each feature, and lists of recommended items for some users. The
    file needs no network and can be printed.
    """
    from hvdrec.reporting.report import report

    result = report(
        options.run,
        to=options.to,
        against=options.against,
        split=options.split,
        checkpoint=options.checkpoint,
        ease_items=options.ease_items,
    )
    return Answer(
        result.to_dict(), f"wrote {result.path} ({result.bytes / 1e3:.0f} kB) and {result.card}"
    )
