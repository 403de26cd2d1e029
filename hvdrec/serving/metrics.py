"""What Prometheus is told; several workers count in files that any of them can sum."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from hvdrec.errors import UserError

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@contextlib.contextmanager
def shared_folder() -> Iterator[None]:
    """Let the processes that are started meanwhile count together, in a folder that goes after.

    Raises UserError where no temporary directory can be written.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix="hvdrec-metrics-")
    except OSError as error:
        raise UserError(
            f"--workers: the counters of several workers need a temporary directory ({error}); "
            "let /tmp be written (in a container --tmpfs /tmp), set TMPDIR, or use one worker"
        ) from None
    with temporary as folder:
        os.environ[FOLDER] = folder  # prometheus_client reads it when it is imported
        try:
            yield
        finally:
            del os.environ[FOLDER]


def remove_shared_folder() -> None:
    """Remove the folder where the process that made it cannot any more."""
    if folder := os.environ.get(FOLDER):
        shutil.rmtree(folder, ignore_errors=True)


class Metrics:
    """A worker's counters."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        per_answer = ["route", "status"]
        self._requests = Counter(
            "hvdrec_requests", "Requests that were answered.", per_answer, registry=registry
        )
        self._seconds = Histogram(
            "hvdrec_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            per_answer,
            buckets=SECONDS,
            registry=registry,
        )
        self.candidates = Counter(
            "hvdrec_candidates", "Items scored or returned.", ["route"], registry=registry
        )
        self.in_flight = Gauge(
            "hvdrec_requests_in_flight",
            "Requests that are read, waiting or scored.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._bundle = Gauge(
            "hvdrec_bundle_info",
            "1 for a bundle that is served, 0 for one that was.",
            ["name", "version"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._served: Gauge | None = None
        self.reloads = Counter(
            "hvdrec_bundle_reloads", "New bundles taken, by each worker.", registry=registry
        )
        self.refused = Counter(
            "hvdrec_bundle_refused", "New bundles refused, by each worker.", registry=registry
        )
        self._known: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        known = self._known.get((route, status))
        if known is None:
            labels = (route, str(status))
            known = self._requests.labels(*labels), self._seconds.labels(*labels)
            self._known[route, status] = known
        known[0].inc()
        known[1].observe(seconds)

    def serves(self, name: str, version: str) -> None:
        """Tell which bundle answers from now on."""
        if self._served is not None:
            self._served.set(0)
        self._served = self._bundle.labels(name, version)
        self._served.set(1)

    def exposed(self) -> bytes:
        """Return everything in Prometheus' text format, over all workers."""
        registry = self._registry
        if folder := os.environ.get(FOLDER):
            _forget_the_dead(Path(folder))
            registry = CollectorRegistry()
            MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _forget_the_dead(folder: Path) -> None:
    """Remove the gauges of workers that are no more, which counts only what is now."""
    for pid in {int(found[1]) for file in folder.iterdir() if (found := _GAUGE.match(file.name))}:
        if not Path("/proc", str(pid)).exists():
            mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


_GAUGE = re.compile(r"gauge_live\w+_(\d+)\.db$")
