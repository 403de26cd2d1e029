"""Who tells that the first rank is lost."""

from __future__ import annotations

from hvdrec.parallel.ranks import World
from hvdrec.parallel.watchdog import turn_seconds


def turns(*hosts: str) -> list[float]:
    return [turn_seconds(World(rank, len(hosts), hosts=hosts)) for rank in range(1, len(hosts))]


def test_one_rank_of_each_host_speaks_in_its_turn() -> None:
    assert turns("a", "a") == [0]
    assert turns("a", "b", "c") == [0, 5]
    assert turns("a", "a", "a", "b", "b", "c") == [0, 20, 5, 20, 10]
    assert turns("a", *"bcdefg") == [0, 5, 10, 15, 20, 20]
