"""Prometheus metrics. Each of several workers writes files, and any worker can add these up."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from hvdrec.errors import UserError

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
GAUGE_FILE = re.compile(r"gauge_live\w+_(\d+)\.db$")


@contextlib.contextmanager
def shared_folder() -> Iterator[None]:
    """Make processes started in the ``with`` body share metrics in a temporary directory."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix="hvdrec-metrics-")
    except OSError as error:
        raise UserError(
            f"--workers: several workers share metrics in a temporary directory, which cannot be "
            f"created ({error}); make /tmp writable (in a container --tmpfs /tmp), set TMPDIR, or "
            "use one worker",
            field="--workers",
        ) from None
    with temporary as folder:
        os.environ[FOLDER] = folder  # prometheus_client reads this variable at its import
        try:
            yield
        finally:
            del os.environ[FOLDER]


def remove_shared_folder() -> None:
    """Remove the shared directory in a worker whose parent process, which created it, has died."""
    if folder := os.environ.get(FOLDER):
        shutil.rmtree(folder, ignore_errors=True)


class Metrics:
    """The metrics of one worker; each has a help text for Prometheus that describes it."""

    def __init__(self) -> None:
        """Create all metrics with value zero."""
        self._registry = registry = CollectorRegistry()
        labels = ["route", "status"]
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        self._requests = counter("hvdrec_requests", "Answered requests.", labels)
        self._seconds = Histogram(
            "hvdrec_request_seconds",
            "Seconds from the head of a request to the end of its response.",
            labels,
            buckets=SECONDS,
            registry=registry,
        )
        self.candidates = counter("hvdrec_candidates", "Items scored or returned.", ["route"])
        self.in_flight = gauge(
            "hvdrec_requests_in_flight",
            "Requests being read, waiting or being scored.",
            multiprocess_mode="livesum",
        )
        self._bundle = gauge(
            "hvdrec_bundle_info",
            "1 for the bundle being served, 0 for earlier ones.",
            ["name", "version"],
            multiprocess_mode="livemax",
        )
        self._served: Gauge | None = None
        self.reloads = counter("hvdrec_bundle_reloads", "New bundles loaded, per worker.")
        self.refused = counter("hvdrec_bundle_refused", "New bundles refused, per worker.")
        self._labelled: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered with ``status`` after ``seconds``."""
        labelled = self._labelled.get((route, status))
        if labelled is None:
            labels = (route, str(status))
            labelled = self._requests.labels(*labels), self._seconds.labels(*labels)
            self._labelled[route, status] = labelled
        labelled[0].inc()
        labelled[1].observe(seconds)

    def serves(self, name: str, version: str) -> None:
        """Record the name and version of the bundle that is used from now on."""
        if self._served is not None:
            self._served.set(0)
        self._served = self._bundle.labels(name, version)
        self._served.set(1)

    def exposition(self) -> bytes:
        """Return the metrics of all workers in Prometheus' text format."""
        registry = self._registry
        if folder := os.environ.get(FOLDER):
            _remove_dead_gauges(Path(folder))
            registry = CollectorRegistry()
            MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _remove_dead_gauges(folder: Path) -> None:
    """Remove the files with the gauges of dead workers, so that they are not added up."""
    matches = (GAUGE_FILE.match(file.name) for file in folder.iterdir())
    for pid in {int(match[1]) for match in matches if match}:
        if not Path("/proc", str(pid)).exists():
            mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
