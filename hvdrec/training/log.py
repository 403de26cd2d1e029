"""What training tells: JSON lines in a file, and a progress bar or the same lines for people."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


class TrainingLog:
    """Writes ``log.jsonl`` and shows progress on standard error; silent on all ranks but the first.

    On a terminal there is a bar that counts rows; elsewhere each line of the file is printed too.
    """

    def __init__(self, run: Path, *, is_first: bool, rows_per_epoch: int) -> None:
        self._file = (run / "log.jsonl").open("a") if is_first else None
        self._shows_bar = is_first and sys.stderr.isatty()
        self._rows = rows_per_epoch
        self._bar: tqdm[Any] | None = None
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
        """Begin an epoch's bar, `done` rows in."""
        if self._shows_bar:
            self._close_bar()
            self._bar = tqdm(
                total=self._rows,
                initial=done,
                desc=f"epoch {epoch + 1}",
                unit="row",
                unit_scale=True,
                leave=False,
                file=sys.stderr,
            )

    def advance(self, rows: int) -> None:
        """Count the rows of a step of all ranks."""
        if self._bar is not None:
            self._bar.update(min(rows, self._rows - self._bar.n))

    def write(self, event: str, **facts: Any) -> None:
        """Write one JSON line."""
        if self._file is None:
            return
        line = json.dumps(
            {"event": event, "seconds": round(time.time() - self._started, 3), **facts}
        )
        self._file.write(line + "\n")
        self._file.flush()
        if self._bar is not None and event == "step":
            self._bar.set_postfix(loss=f"{facts['loss']:.4f}", refresh=False)
        elif self._shows_bar:
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
