"""Tests of worker pools: order of results, errors, and no work after the end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.errors import UserError
from hvdrec.parallel.pool import (
    RESULTS_PER_WORKER,
    TASKS_PER_HELPER,
    THIS_PROCESS,
    WorkerPool,
    local_pool,
)


def squared(number: int) -> int:
    return number * number


def process_of(number: int) -> int:
    return os.getpid()


def refuse_threes(number: int) -> int:
    if number % 3 == 0:
        raise UserError(f"{number} is refused")
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@given(tasks=st.lists(st.integers(), max_size=40), helpers=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_results_keep_the_order_of_the_tasks(tasks: list[int], helpers: int) -> None:
    with ThreadPoolExecutor(max(1, helpers)) as executor:
        workers = WorkerPool(executor, helpers)
        assert list(workers.map(squared, tasks)) == [task * task for task in tasks]


def test_several_processes_give_the_results_of_one() -> None:
    with local_pool(3) as workers:
        assert workers.helpers == 2
        assert list(workers.map(squared, range(20))) == [n * n for n in range(20)]
        assert list(workers.map(squared, [])) == []
    assert list(THIS_PROCESS.map(squared, range(20))) == [n * n for n in range(20)]


def test_this_process_and_helpers_share_the_work() -> None:
    here, there = threading.Event(), threading.Event()
    first = threading.current_thread()

    def meet(number: int) -> str:
        """Return the side that runs the task; the first task of each side waits for the other."""
        mine, other = (here, there) if threading.current_thread() is first else (there, here)
        mine.set()
        assert other.wait(30)
        return "here" if mine is here else "there"

    with ThreadPoolExecutor(1) as executor:
        sides = list(WorkerPool(executor, 1).map(meet, range(8)))
    assert set(sides) == {"here", "there"}


def test_by_default_helpers_start_only_if_the_work_takes_a_while() -> None:
    with local_pool() as workers:
        assert set(workers.map(process_of, range(50))) == {os.getpid()}


def test_one_worker_is_this_process() -> None:
    with local_pool(1) as workers:
        assert set(workers.map(process_of, range(5))) == {os.getpid()}


def test_an_error_is_raised_in_the_order_of_the_tasks() -> None:
    with local_pool(2) as workers:
        results = workers.map(refuse_threes, [1, 2, 3, 4, 6])
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(UserError, match=r"^3 is refused$"):
            next(results)


def test_the_death_of_a_worker_is_an_error() -> None:
    with (
        local_pool(2) as workers,
        closing(workers.map(squared, range(3))) as warm,
    ):
        assert list(warm) == [0, 1, 4]
        # The first tasks go to the helper: this process submits tasks before it runs one.
        with pytest.raises(UserError, match="a worker process has died"):
            list(workers.map(die_elsewhere, [os.getpid()] * 4))


def die_elsewhere(first: int) -> int:
    return first if os.getpid() == first else die(first)


def test_tasks_are_taken_only_as_workers_become_free() -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    with ThreadPoolExecutor(2) as executor:
        results = WorkerPool(executor, 2).map(squared, tasks())
        next(results)
        assert taken <= RESULTS_PER_WORKER * 3 + TASKS_PER_HELPER * 2
        results.close()
    assert taken < 1000


def test_no_helper_works_after_the_end() -> None:
    started, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    first = threading.current_thread()

    def work(number: int) -> int:
        if threading.current_thread() is first:
            assert started.wait(30)
            threading.Timer(0.2, may_end.set).start()
            raise UserError("enough")
        started.set()
        assert may_end.wait(30)
        ended.set()
        return number

    with ThreadPoolExecutor(1) as executor:
        results = WorkerPool(executor, 1).map(work, range(10))
        with pytest.raises(UserError, match="enough"):
            list(results)
        assert ended.is_set()
