"""Open the bundle that a worker serves, and replace it by new ones."""

from __future__ import annotations

from functools import partial

from hvdrec.scoring import Scorer
from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import ScoringError
from hvdrec.scoring.scorer import Stores, WatchedScorer
from hvdrec.scoring.stores import open_stores
from hvdrec.serving.metrics import Metrics
from hvdrec.serving.options import Options
from hvdrec.serving.problems import unavailable


class ServedBundle:
    """Holds the scorer that answers requests; there is none until `load` returns."""

    def __init__(self, options: Options, metrics: Metrics) -> None:
        """Prepare to serve ``options.bundle`` and to count reloads in ``metrics``."""
        self._options = options
        self._metrics = metrics
        self._scorer: Scorer | None = None
        self._watched: WatchedScorer | None = None

    @property
    def current(self) -> Scorer:
        """The current scorer; keep it for a whole request. Raises Problem if none is loaded yet."""
        if self._watched is not None:
            return self._watched.current
        if self._scorer is None:
            raise unavailable("the bundle is loading; try again")
        return self._scorer

    def load(self) -> None:
        """Open and warm up the bundle and watch its path; raise ScoringError if that fails."""
        if self._options.watch:
            self._watched = Scorer.watch(
                self._options.bundle,
                verify=self._options.verify,
                stores=stores_from(self._options.store),
                on_reload=self._reloaded,
                on_refused=self._refused,
            )
        else:
            scorer = open_scorer(self._options)
            scorer.warm()
            self._scorer = scorer
        self._metrics.serves(self.current.info.name, self.current.version)

    def close(self) -> None:
        """Stop watching the path."""
        if self._watched is not None:
            self._watched.close()

    def _reloaded(self, scorer: Scorer) -> None:
        self._metrics.reloads.inc()
        self._metrics.serves(scorer.info.name, scorer.version)

    def _refused(self, error: ScoringError) -> None:
        self._metrics.refused.inc()


def open_scorer(options: Options) -> Scorer:
    """Open the bundle without watching its path; raise ScoringError if that fails."""
    if options.store is None:
        return Scorer.load(options.bundle, verify=options.verify)
    users, items = open_stores(options.store, read_bundle(options.bundle, verify=False))
    return Scorer.load(options.bundle, verify=options.verify, users=users, items=items)


def stores_from(url: str | None) -> Stores | None:
    """Return a function that opens the stores at a URL for a bundle; None if the URL is None."""
    return None if url is None else partial(open_stores, url)
