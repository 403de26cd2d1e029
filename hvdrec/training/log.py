"""Write the training log: JSON lines in a file, and progress on the screen."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hvdrec.errors import write_errors_named
from hvdrec.storage.json_text import json_text
from hvdrec.training.display import Display, Silent
from hvdrec.training.run_history import LOG_FILE, RunHistory, read_history
from hvdrec.training.trackers import Tracker, Trained


class TrainingLog:
    """Writes ``log.jsonl`` and shows each event, on the first rank only.

    Args:
        run: Directory of the run.
        is_first: True on the first rank.
        display: Shows the events of the first rank.
        trackers: Record the events of the first rank.
    """

    def __init__(
        self, run: Path, *, is_first: bool, display: Display, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._display = display if is_first else Silent()
        self._trackers = tuple(trackers) if is_first else ()
        has_log = is_first and (run / LOG_FILE).is_file()
        self._history = read_history(run) if has_log else RunHistory()
        self._file = (run / LOG_FILE).open("a") if is_first else None
        self._started = time.time()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)
        if self._file is not None:
            self._file.close()

    def start_epoch(self, epoch: int, epochs: int, rows: int, done: int) -> None:
        """Show that an epoch starts; see `Display.start_epoch`."""
        self._display.start_epoch(epoch, epochs, rows, done)

    def advance(self, rows: int) -> None:
        """Show that all ranks together have read `rows` more rows."""
        self._display.advance(rows)

    def write(self, event: str, **facts: Any) -> None:
        """Write one JSON line and show it; numbers that are NaN or infinite become null."""
        self._write({"event": event, "seconds": round(time.time() - self._started, 3), **facts})

    def finish(self, trained: Trained) -> None:
        """Let the trackers record the model at the end of training."""
        for tracker in self._trackers:
            tracker.finish(trained)

    def note(self, text: str) -> None:
        """Show a line of text to the user, and write it to the file as an event ``note``."""
        self._write({"event": "note", "text": text})

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = json_text(event)
        with write_errors_named(self._file.name):
            self._file.write(line + "\n")
            self._file.flush()
        event = json.loads(line)  # so that NaN becomes None, as in the file
        self._history.add(event)
        self._display.show(event, self._history)
        for tracker in self._trackers:
            tracker.log(event)
