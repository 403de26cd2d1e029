"""Watch the path of a bundle: verify and load each new bundle, then switch to it."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from hvdrec.scoring.bundle import MANIFEST, Stamp, stamp_of
from hvdrec.scoring.errors import (
    ReplacedError,
    ScoringError,
    StoreError,
    first_line,
    invalid_bundle,
    invalid_request,
)

if TYPE_CHECKING:
    import logging

LISTED_FILES = 4096
"""Largest number of files of a refused bundle that are checked for changes."""
FIRST_TRIES = 3
RETRY_SECONDS = 0.05
"""Pause before another try. Some publishers move the old bundle away, then the new one to its path,
which leaves the path empty for a moment."""
PAUSES = 10.0
"""If an embedding store does not answer, loading is tried again after a pause: this factor times
the duration of the failed try."""
STOP_SECONDS = 10.0
"""Longest time that `close` and the end of the process wait for a load that is under way."""


class Versioned(Protocol):
    """An object that was loaded from a bundle."""

    @property
    def version(self) -> str:
        """Version of the bundle."""


T = TypeVar("T", bound=Versioned)


class BundleWatcher(Generic[T]):
    """Holds an object loaded from a bundle; loads a new one when another bundle is at the path.

    A thread checks the path every ``interval`` seconds, which costs one `stat`. It ends when the
    watcher is closed or garbage-collected. A process that forks must create the watcher after the
    fork, because threads do not survive it. A replaced object is freed when nothing refers to it.
    """

    def __init__(
        self,
        path: Path,
        load: Callable[[Path], T],
        *,
        interval: float,
        on_reload: Callable[[T], object] | None = None,
        on_refused: Callable[[ScoringError], object] | None = None,
    ) -> None:
        """Load a bundle and watch its path.

        ``load`` opens and verifies the bundle at a path. For the other arguments see
        `Scorer.watch`.
        """
        is_number = isinstance(interval, int | float) and not isinstance(interval, bool)
        if not is_number or not 0 < interval <= threading.TIMEOUT_MAX:
            raise invalid_request("interval", interval, "must be a positive number of seconds")
        self._path = path.absolute()  # the process may change its working directory
        self._load = load
        self._on_reload = on_reload
        self._on_refused = on_refused
        self._looking = threading.Lock()
        self._reloads = 0
        self._last_error: ScoringError | None = None
        self._refused: str | None = None
        self._is_gone = False
        self._retry_time = math.inf
        self._seen: object = None
        self._current = self._load_first()
        self._stop = threading.Event()
        arguments = (weakref.ref(self), self._stop, float(interval))
        self._thread = threading.Thread(
            target=_follow, args=arguments, name="hvdrec-watch", daemon=True
        )
        self._thread.start()
        # At exit, the thread must leave onnxruntime before the interpreter is torn down.
        self._finalizer = weakref.finalize(self, _end, self._stop, self._thread)

    @property
    def current(self) -> T:
        """The object in use. Keep the reference if several results must come from one bundle."""
        return self._current

    @property
    def reloads(self) -> int:
        """Number of times that a new bundle has taken over."""
        return self._reloads

    @property
    def last_error(self) -> ScoringError | None:
        """Error for which the bundle at the path was refused; None if the bundle is in use."""
        return self._last_error

    def look(self) -> bool:
        """Check the path now; return True if a new bundle has taken over.

        If another thread is checking at the same time, return False without a check.
        """
        if not self._looking.acquire(blocking=False):
            return False
        try:
            return self._look()
        finally:
            self._looking.release()

    def close(self) -> None:
        """Stop watching the path; the current object stays in use."""
        self._finalizer()

    def __enter__(self) -> Self:
        """Return the watcher; leaving the ``with`` block closes it."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the watcher."""
        self.close()

    def _look(self) -> bool:
        manifest = _manifest_stamp(self._path)
        # A refused bundle may be repaired without a new manifest, so check the stamps of all files.
        stamp = manifest if self._refused is None else _all_stamps(self._path)
        if stamp == self._seen and time.monotonic() < self._retry_time:
            return False
        if manifest is None and not self._is_gone:
            # The path may be empty between the two renames of a replacement: look once more.
            self._is_gone = True
            return False
        self._is_gone = False
        started, files = time.monotonic(), _all_stamps(self._path)
        try:
            new = self._loaded()
        except ReplacedError:
            return False  # the next check finds the bundle that replaced it
        except ScoringError as error:
            if _all_stamps(self._path) != files:
                return False  # another bundle is just replacing it
            self._refuse(error)
            self._seen, self._retry_time = files, math.inf
            if isinstance(error, StoreError):
                # No file changes when the store answers again, so load again after a pause.
                now = time.monotonic()
                self._retry_time = now + PAUSES * (now - started)
            return False
        old, self._current = self._current.version, new
        self._seen, self._refused, self._last_error = manifest, None, None
        self._retry_time = math.inf
        self._reloads += 1
        _log().info(
            "%s: bundle %s replaces %s, loaded in %.1f s",
            self._path,
            new.version,
            old,
            time.monotonic() - started,
        )
        self._notify(self._on_reload, new)
        return True

    def _load_first(self) -> T:
        """Load the first bundle; load again if another bundle replaces it during the load."""

        def load() -> T:
            self._seen = _manifest_stamp(self._path)
            return self._loaded()

        return load_unreplaced(load)

    def _loaded(self) -> T:
        try:
            return self._load(self._path)
        except ScoringError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise invalid_bundle(self._path, f"fails ({reason})") from None

    def _refuse(self, error: ScoringError) -> None:
        """Keep the old bundle and log the error, once for each refused manifest."""
        # A traceback refers to local variables, which would keep the loaded arrays in memory.
        error.__context__ = error.__cause__ = None
        self._last_error = error.with_traceback(None)
        content = str(_manifest_stamp(self._path))
        if content == self._refused:
            return
        self._refused = content
        version = self._current.version
        _log().error("%s: refused, bundle %s stays: %s", self._path, version, error)
        self._notify(self._on_refused, self._last_error)

    def _notify(self, callback: Callable[[Any], object] | None, argument: object) -> None:
        if callback is None:
            return
        try:
            callback(argument)
        except Exception:
            _log().exception("%s: the callback failed", self._path)


def load_unreplaced(load: Callable[[], T]) -> T:
    """Load a bundle; try up to `FIRST_TRIES` times if another bundle replaces it during a load."""
    for _ in range(FIRST_TRIES - 1):
        try:
            return load()
        except ReplacedError:
            time.sleep(RETRY_SECONDS)
    return load()


def _follow(
    reference: weakref.ref[BundleWatcher[Any]], stop: threading.Event, interval: float
) -> None:
    """Check the path at each interval until the watcher is closed or garbage-collected."""
    while not stop.wait(interval):
        watcher = reference()
        if watcher is None:
            return
        try:
            watcher.look()
        except Exception:
            _log().exception("looking for a new bundle failed")
        del watcher


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(STOP_SECONDS)


def _log() -> logging.Logger:
    import logging  # not at the top: `import hvdrec.scoring` should stay cheap

    return logging.getLogger("hvdrec.scoring")


def _manifest_stamp(path: Path) -> Stamp | None:
    """Return the stamp of the manifest at a path; None if there is no manifest."""
    try:
        return stamp_of((path / MANIFEST).stat())
    except (OSError, ValueError):
        return None


def _all_stamps(path: Path) -> list[tuple[str, Stamp]]:
    """Return the name and stamp of each file of the bundle, sorted by name."""
    stamps: list[tuple[str, Stamp]] = []
    try:
        for file in path.rglob("*"):
            if len(stamps) >= LISTED_FILES:
                break
            stamps.append((str(file), stamp_of(file.lstat())))
    except OSError:
        pass  # a file was removed while the files were listed
    return sorted(stamps)
