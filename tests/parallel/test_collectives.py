"""Tests of the collectives with each launcher."""

from __future__ import annotations

import pytest

from tests.parallel.launch import run_program


@pytest.mark.parametrize(("ranks", "launcher"), [(1, ""), (3, "horovodrun"), (2, "mpirun")])
def test_collectives(ranks: int, launcher: str) -> None:
    assert run_program("collectives.py", [], ranks, launcher).stdout.count("all correct") == ranks
