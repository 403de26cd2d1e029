"""Hosts and data for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts.machines import Hosts, hosts_up
from tests.parallel.launch import BIN, launch
from tests.small_data import ROWS, write_small_data


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts_up(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture
def hosts(machines: Hosts) -> Iterator[Hosts]:
    """Yield hosts on which nothing runs yet; what a test leaves there is ended."""
    yield machines
    machines.clear()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the TOML file of a small run that is prepared for training."""
    return prepared(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the TOML file of a run on enough rows for its metrics to mean something."""
    options = ["--encode.shard-rows", "20000", "--encode.row-group-rows", "2000"]
    return prepared(tmp_path_factory.mktemp("large"), 100_000, options)


def prepared(folder: Path, rows: int = ROWS, options: Sequence[str] = ()) -> Path:
    """Write a data set, prepare it for training and return its TOML file."""
    config = write_small_data(folder, rows=rows)
    for verb in ("samples", "prepare"):
        done = launch([str(BIN / "hvdrec"), verb, str(config), *options], 1)
        assert done.returncode == 0, done.stderr
    return config
