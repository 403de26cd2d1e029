"""Write the training log: JSON lines in a file, and on the screen a progress bar or lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from hvdrec.errors import write_errors_named
from hvdrec.parallel.progress import can_show_bar
from hvdrec.storage.json_text import json_text


class TrainingLog:
    """Writes ``log.jsonl`` and shows progress, on the first rank only.

    On a terminal and in a notebook, a bar counts rows. Elsewhere, each line of the file is also
    printed on standard error.

    Args:
        run: Directory of the run.
        is_first: True on the first rank.
        rows_per_epoch: Number of rows of all ranks in an epoch.
        shown: False to show nothing on the screen.
    """

    def __init__(self, run: Path, *, is_first: bool, rows_per_epoch: int, shown: bool) -> None:
        self._file = (run / "log.jsonl").open("a") if is_first else None
        self._has_bar = is_first and shown and can_show_bar()
        self._prints = is_first and shown and not self._has_bar
        self._rows = rows_per_epoch
        self._bar: Any = None
        self._started = time.time()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close_bar()
        if self._file is not None:
            self._file.close()

    def start_epoch(self, epoch: int, done: int) -> None:
        """Start the bar of an epoch; `done` rows of it have been read before an interruption."""
        if self._has_bar:
            self._close_bar()
            self._bar = tqdm(
                total=self._rows,
                initial=done,
                desc=f"epoch {epoch + 1}",
                unit="row",
                unit_scale=True,
                leave=False,
            )

    def advance(self, rows: int) -> None:
        """Advance the bar by the number of rows that all ranks read in a step."""
        if self._bar is not None:
            self._bar.update(min(rows, self._rows - self._bar.n))

    def write(self, event: str, **facts: Any) -> None:
        """Write one JSON line; numbers that are NaN or infinite become null."""
        if self._file is None:
            return
        seconds = round(time.time() - self._started, 3)
        line = json_text({"event": event, "seconds": seconds, **facts})
        self._append(line)
        if self._bar is not None and event == "step":
            self._bar.set_postfix(loss=f"{facts['loss']:.4f}", refresh=False)
        elif self._has_bar:
            tqdm.write(line, file=sys.stderr)
        elif self._prints:
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show a line of text to the user, and write it to the file as an event ``note``."""
        if self._file is None:
            return
        self._append(json_text({"event": "note", "text": text}))
        if self._has_bar:
            tqdm.write(text, file=sys.stderr)
        elif self._prints:
            print(text, file=sys.stderr, flush=True)

    def _append(self, line: str) -> None:
        assert self._file is not None
        with write_errors_named(self._file.name):
            self._file.write(line + "\n")
            self._file.flush()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
