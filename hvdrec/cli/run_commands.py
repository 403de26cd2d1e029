"""The commands that show a run: top."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from hvdrec.cli.command import RUN, Answer, argument, command

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
