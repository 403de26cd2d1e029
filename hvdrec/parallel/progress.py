"""Show progress on rank 0: a bar on a terminal or in a notebook, lines of text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_first_rank() -> bool:
    """Return True if this process prints for its job: it is rank 0, or the only process.

    The modules that know the rank are slow to import, so this function uses them only if they are
    already loaded.
    """
    ranks = sys.modules.get("hvdrec.parallel.ranks")
    workers = sys.modules.get("hvdrec.parallel.pool")
    return (ranks is None or bool(ranks.current().is_first)) and (
        workers is None or bool(workers.is_first_rank())
    )


def print_line(line: str) -> None:
    """Print a line on standard error, on the first rank."""
    if is_first_rank():
        print(line, file=sys.stderr, flush=True)


class ProgressDisplay:
    """Shows the current step of the work and how many rows are done."""

    def __init__(self, bar: Any = None, *, is_silent: bool = False) -> None:
        """Show a tqdm bar; without one, print each step as a line, or nothing if `is_silent`."""
        self._bar, self._is_silent = bar, is_silent

    def describe(self, step: str) -> None:
        """Show the name of the step that starts now."""
        if self._bar is not None:
            self._bar.set_description(step)
        elif not self._is_silent:
            print_line(step)

    def advance(self, rows: int) -> None:
        """Add to the number of rows that are done."""
        if self._bar is not None:
            self._bar.update(rows)


@contextmanager
def show_progress(shown: bool = True) -> Iterator[ProgressDisplay]:
    """Yield a display: a bar on a terminal or in a notebook, lines elsewhere.

    Args:
        shown: Whether to show anything.
    """
    if not shown or not is_first_rank():
        yield ProgressDisplay(is_silent=True)
    elif not can_show_bar():
        yield ProgressDisplay()
    else:
        from tqdm.auto import tqdm

        with tqdm(unit="row", unit_scale=True, leave=False) as bar:
            yield ProgressDisplay(bar)


def can_show_bar() -> bool:
    """Return True if a progress bar can be shown: on a terminal or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
