"""Services and bundles that the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hvdrec.scoring import Scorer
from tests.bundles import write_bundle
from tests.serving.launch import Running, serving

PATIENT = ("--max-wait", "30")
"""Options for a busy machine; other tests cover waiting."""


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a bundle with string keys."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "strings")


@pytest.fixture(scope="session")
def int_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a bundle with integer keys."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "integers", key_dtype="int")


@pytest.fixture(scope="session")
def task_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a bundle whose ranker has two tasks."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tasks", tasks=True)


@pytest.fixture(scope="session")
def task_service(task_bundle: Path) -> Iterator[Running]:
    """Serve the bundle with tasks."""
    with serving(task_bundle, *PATIENT) as running:
        yield running


@pytest.fixture(scope="session")
def scorer(bundle: Path) -> Scorer:
    """Load the bundle with string keys."""
    return Scorer.load(bundle)


@pytest.fixture(scope="session")
def service(bundle: Path) -> Iterator[Running]:
    """Serve the bundle with string keys."""
    with serving(bundle, *PATIENT, "--max-body", "20000", "--max-candidates", "100") as running:
        yield running


@pytest.fixture(scope="session")
def int_service(int_bundle: Path) -> Iterator[Running]:
    """Serve the bundle with integer keys."""
    with serving(int_bundle, *PATIENT) as running:
        yield running


@pytest.fixture(scope="session")
def client(service: Running) -> Iterator[httpx.Client]:
    """Return a client of the service with string keys."""
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def int_client(int_service: Running) -> Iterator[httpx.Client]:
    """Return a client of the service with integer keys."""
    with httpx.Client(base_url=int_service.url, timeout=60) as client:
        yield client
