"""Following a path: a new bundle there is verified, loaded beside the old one and swapped in."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdrec.scoring.bundle import MANIFEST, Stamp, check_unchanged, read_array, stamp_of
from hvdrec.scoring.errors import (
    BundleError,
    ReplacedError,
    ScoringError,
    StoreError,
    invalid_request,
    shown,
)

if TYPE_CHECKING:
    from hvdrec.scoring.candidates import Key, Recommendation
    from hvdrec.scoring.scorer import Array, Entries, Raw, Request, Scorer

LOG = logging.getLogger("hvdrec.scoring")
LISTED_FILES = 4096
"""Files of a refused bundle that are looked at, so that a mended one is taken."""
FIRST_TRIES = 3
PAUSES = 10.0
"""A bundle whose store does not answer is loaded again after so many times what loading took."""
STOP_SECONDS = 10.0
"""How long the end of a process, or `close`, waits for a bundle that is being loaded."""


class WatchedScorer:
    """A scorer that follows its bundle; made by `Scorer.watch`, safe to share between threads.

    Each call goes to one scorer from its beginning to its end: the one that is in use when it
    begins. A scorer that was replaced goes, with its memory, when its last call has ended. What
    needs several answers of one bundle takes `current` once and asks that.

    A thread of its own looks at the path every ``interval`` seconds, which costs one `stat`. It
    does not live on in a process that was forked: watch after the fork.
    """

    def __init__(
        self,
        path: Path,
        load: Callable[[Path], Scorer],
        *,
        interval: float,
        on_reload: Callable[[Scorer], object] | None = None,
        on_refused: Callable[[ScoringError], object] | None = None,
    ) -> None:
        """Load the bundle and follow its path; ``load`` opens and verifies one."""
        is_number = isinstance(interval, int | float) and not isinstance(interval, bool)
        if not is_number or not 0 < interval <= threading.TIMEOUT_MAX:
            raise invalid_request("interval", interval, "must be a positive number of seconds")
        self._path = path.absolute()  # the process may change its directory
        self._load = load
        self._on_reload = on_reload
        self._on_refused = on_refused
        self._looking = threading.Lock()
        self._reloads = 0
        self._last_error: ScoringError | None = None
        self._refused: str | None = None
        self._gone = False
        self._ask_again = math.inf
        self._seen: object = _manifest_stamp(self._path)
        self._current = self._first()
        self._stop = threading.Event()
        arguments = (weakref.ref(self), self._stop, float(interval))
        self._thread = threading.Thread(
            target=_follow, args=arguments, name="hvdrec-watch", daemon=True
        )
        self._thread.start()
        # At exit the thread must be out of onnxruntime before the interpreter goes.
        self._finalizer = weakref.finalize(self, _end, self._stop, self._thread)

    @property
    def current(self) -> Scorer:
        """Return the scorer in use."""
        return self._current

    @property
    def reloads(self) -> int:
        """Return how many times a new bundle was swapped in."""
        return self._reloads

    @property
    def last_error(self) -> ScoringError | None:
        """Return why the bundle that lies there now is not in use; None where it is."""
        return self._last_error

    def score(self, user: Key | Raw | None, items: Entries, scene: Raw | None = None) -> Array:
        """Return what `Scorer.score` of the bundle in use returns."""
        return self._current.score(user, items, scene)

    def score_tasks(
        self, user: Key | Raw | None, items: Entries, scene: Raw | None = None
    ) -> dict[str, Array]:
        """Return what `Scorer.score_tasks` of the bundle in use returns."""
        return self._current.score_tasks(user, items, scene)

    def score_many(self, requests: Sequence[Request]) -> list[Array]:
        """Return what `Scorer.score_many` of the bundle in use returns."""
        return self._current.score_many(requests)

    def recommend(
        self,
        user: Key | Raw | None,
        scene: Raw | None = None,
        k: int = 10,
        *,
        candidates: int = 500,
        exclude: Collection[Key] = (),
        allowed: Mapping[str, Collection[Any]] | None = None,
        skip_seen: bool = False,
        diversity: float = 0.0,
    ) -> list[Recommendation]:
        """Return what `Scorer.recommend` of the bundle in use returns."""
        return self._current.recommend(
            user,
            scene,
            k,
            candidates=candidates,
            exclude=exclude,
            allowed=allowed,
            skip_seen=skip_seen,
            diversity=diversity,
        )

    def look(self) -> bool:
        """Look for a new bundle now, without waiting for the next turn; return whether it is in.

        Returns False, too, where another thread is looking at the moment.
        """
        if not self._looking.acquire(blocking=False):
            return False
        try:
            return self._look()
        finally:
            self._looking.release()

    def close(self) -> None:
        """Stop following; the bundle in use stays in use."""
        self._finalizer()

    def __enter__(self) -> WatchedScorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _look(self) -> bool:
        manifest = _manifest_stamp(self._path)
        # A refused bundle may be mended in any of its files.
        stamp = manifest if self._refused is None else _all_stamps(self._path)
        if stamp == self._seen and time.monotonic() < self._ask_again:
            return False
        if manifest is None and not self._gone:
            # Between two renames there is nothing for a moment.
            self._gone = True
            return False
        self._gone = False
        started, files = time.monotonic(), _all_stamps(self._path)
        try:
            scorer = self._loaded()
        except ReplacedError:
            return False  # what replaced it is seen by the next look
        except ScoringError as error:
            self._refuse(error)
            self._seen, self._ask_again = files, math.inf
            if isinstance(error, StoreError):
                # That it answers now will not show in the files: it is asked again, at leisure.
                now = time.monotonic()
                self._ask_again = now + PAUSES * (now - started)
            return False
        old, self._current = self._current.info.version, scorer
        self._seen, self._refused, self._last_error = manifest, None, None
        self._ask_again = math.inf
        self._reloads += 1
        LOG.info(
            "%s: bundle %s replaces %s, loaded in %.1f s",
            self._path,
            scorer.info.version,
            old,
            time.monotonic() - started,
        )
        self._tell(self._on_reload, scorer)
        return True

    def _first(self) -> Scorer:
        """Return the first scorer; a bundle that is replaced meanwhile is loaded again."""
        for _ in range(FIRST_TRIES - 1):
            try:
                return self._loaded()
            except ReplacedError:
                self._seen = _manifest_stamp(self._path)
        return self._loaded()

    def _loaded(self) -> Scorer:
        """Return a scorer that is whole and was tried; ScoringError where it is not."""
        try:
            scorer = self._load(self._path)
            _try_out(scorer)
            check_unchanged(scorer.info)
        except ScoringError:
            raise
        except Exception as error:  # onnxruntime raises many kinds, without a common base
            reason = (str(error).splitlines() or [""])[0]
            raise BundleError(
                f"{self._path}: does not work ({type(error).__name__}: {reason}); "
                "export the bundle again"
            ) from None
        return scorer

    def _refuse(self, error: ScoringError) -> None:
        """Keep the old bundle; say so once for each content, not at every look."""
        # Tracebacks would keep what was loaded; the text says it all.
        error.__context__ = error.__cause__ = None
        self._last_error = error.with_traceback(None)
        content = str(_manifest_stamp(self._path))
        if content == self._refused:
            return
        self._refused = content
        LOG.error("%s: refused, bundle %s stays: %s", self._path, self._current.info.version, error)
        self._tell(self._on_refused, self._last_error)

    def _tell(self, callback: Callable[[Any], object] | None, news: object) -> None:
        if callback is None:
            return
        try:
            callback(news)
        except Exception:
            LOG.exception("%s: the callback failed", self._path)


def _follow(reference: weakref.ref[WatchedScorer], stop: threading.Event, interval: float) -> None:
    """Look at every turn, until closed or until nobody holds the watched scorer any more."""
    while not stop.wait(interval):
        watched = reference()
        if watched is None:
            return
        try:
            watched.look()
        except Exception:
            LOG.exception("looking for a new bundle failed")
        del watched


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(STOP_SECONDS)


def _try_out(scorer: Scorer) -> None:
    """Run every graph once and retrieve; BundleError where that gives what it should not.

    So a graph that fails, or whose vectors do not fit the stored ones, is found before anyone asks.
    """
    scorer.warm()
    info = scorer.info
    found = [*scorer.recommend(None, k=1), *scorer.recommend(_first_user(scorer), k=1)]
    items = [None, *(recommendation.item for recommendation in found)]
    of_tasks = scorer.score_tasks(None, items) if info.tasks else {}
    outputs = (
        ("user_tower.onnx", scorer.embed_user(None), (info.user_width,)),
        ("item_tower.onnx", scorer.embed_items(items), (len(items), info.item_width)),
        ("ranker.onnx", scorer.score(None, items), (len(items),)),
        *(("ranker.onnx", scores, (len(items),)) for scores in of_tasks.values()),
    )
    for name, output, shape in outputs:
        if output.shape != shape or not np.isfinite(output).all():
            raise BundleError(
                f"{info.path / name}: gives {shown(output.tolist())} for missing values, expected "
                f"numbers of shape {shape}; export the bundle again"
            )


def _first_user(scorer: Scorer) -> Key | None:
    """Return a stored user's key, or None where there is no user."""
    keys = read_array(scorer.info.path, "users/keys.npy")[:1].tolist()
    return next((key.decode() if isinstance(key, bytes) else key for key in keys), None)


def _manifest_stamp(path: Path) -> Stamp | None:
    """Return what changes when another bundle lies at the path; None where there is none."""
    try:
        return stamp_of((path / MANIFEST).stat())
    except (OSError, ValueError):
        return None


def _all_stamps(path: Path) -> list[tuple[str, Stamp]]:
    """Return what changes when any file of the bundle changes, in any order of the files."""
    stamps: list[tuple[str, Stamp]] = []
    try:
        for file in path.rglob("*"):
            if len(stamps) >= LISTED_FILES:
                break
            stamps.append((str(file), stamp_of(file.lstat())))
    except OSError:
        pass  # it is changing now
    return sorted(stamps)
