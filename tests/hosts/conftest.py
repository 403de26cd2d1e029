"""Fixtures with hosts and data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts.machines import Hosts, hosts_up
from tests.parallel.launch import BIN, launch
from tests.small_data import ROWS, write_small_data


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts_up(3, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture
def hosts(machines: Hosts) -> Iterator[Hosts]:
    """Yield hosts without running programs; programs that a test leaves are ended."""
    yield machines
    machines.clear()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the TOML file of a small run whose features are encoded."""
    return prepared(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the TOML file of a run with enough rows for meaningful metrics."""
    options = ["--encode.shard-rows", "20000", "--encode.row-group-rows", "2000"]
    return prepared(tmp_path_factory.mktemp("large"), 100_000, options)


def prepared(folder: Path, rows: int = ROWS, options: Sequence[str] = ()) -> Path:
    """Write a data set, encode its features and return its TOML file."""
    config = write_small_data(folder, rows=rows)
    for command in ("samples", "prepare"):
        done = launch([str(BIN / "hvdrec"), command, str(config), *options], 1)
        assert done.returncode == 0, done.stderr
    return config
