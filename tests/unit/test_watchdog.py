"""Tests of the order in which ranks report the loss of rank 0."""

from __future__ import annotations

from hvdrec.parallel.ranks import World
from hvdrec.parallel.watchdog import report_delay


def delays(*hosts: str) -> list[float]:
    return [report_delay(World(rank, len(hosts), hosts=hosts)) for rank in range(1, len(hosts))]


def test_one_rank_per_host_reports_after_the_hosts_before_it() -> None:
    assert delays("a", "a") == [0]
    assert delays("a", "b", "c") == [0, 5]
    assert delays("a", "a", "a", "b", "b", "c") == [0, 20, 5, 20, 10]
    assert delays("a", *"bcdefg") == [0, 5, 10, 15, 20, 20]
