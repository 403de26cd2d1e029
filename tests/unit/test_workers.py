"""Tasks over processes: their order, their errors, and that nobody works on after the end."""

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
from hvdrec.parallel.pool import AHEAD, ALONE, HELD, Workers, local_workers


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
def test_results_come_in_the_order_of_the_tasks(tasks: list[int], helpers: int) -> None:
    with ThreadPoolExecutor(max(1, helpers)) as executor:
        workers = Workers(executor, helpers)
        assert list(workers.map(squared, tasks)) == [task * task for task in tasks]


def test_processes_give_what_one_gives() -> None:
    with local_workers(3) as workers:
        assert workers.helpers == 2
        assert list(workers.map(squared, range(20))) == [n * n for n in range(20)]
        assert list(workers.map(squared, [])) == []
    assert list(ALONE.map(squared, range(20))) == [n * n for n in range(20)]


def test_this_process_and_others_share_the_work() -> None:
    here, there = threading.Event(), threading.Event()
    first = threading.current_thread()

    def meet(number: int) -> str:
        """Return who works; the first task on either side waits for one on the other."""
        mine, other = (here, there) if threading.current_thread() is first else (there, here)
        mine.set()
        assert other.wait(30)
        return "here" if mine is here else "there"

    with ThreadPoolExecutor(1) as executor:
        who = list(Workers(executor, 1).map(meet, range(8)))
    assert set(who) == {"here", "there"}


def test_without_a_number_others_are_started_only_if_the_work_lasts() -> None:
    with local_workers() as workers:
        assert set(workers.map(process_of, range(50))) == {os.getpid()}


def test_one_worker_is_this_process() -> None:
    with local_workers(1) as workers:
        assert set(workers.map(process_of, range(5))) == {os.getpid()}


def test_the_first_error_by_order_is_raised_after_the_results_before_it() -> None:
    with local_workers(2) as workers:
        results = workers.map(refuse_threes, [1, 2, 3, 4, 6])
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(UserError, match=r"^3 is refused$"):
            next(results)


def test_a_worker_that_dies_is_told() -> None:
    with (
        local_workers(2) as workers,
        closing(workers.map(squared, range(3))) as warm,
    ):
        assert list(warm) == [0, 1, 4]
        # The task goes to the helper: this process does none before it has sent that one some.
        with pytest.raises(UserError, match="a worker process has died"):
            list(workers.map(die_elsewhere, [os.getpid()] * 4))


def die_elsewhere(first: int) -> int:
    return first if os.getpid() == first else die(first)


def test_tasks_are_taken_as_there_is_somebody_to_do_them() -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    with ThreadPoolExecutor(2) as executor:
        results = Workers(executor, 2).map(squared, tasks())
        next(results)
        assert taken <= HELD * 3 + AHEAD * 2
        results.close()
    assert taken < 1000


def test_after_the_end_no_helper_is_at_work() -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    first = threading.current_thread()

    def work(number: int) -> int:
        if threading.current_thread() is first:
            assert began.wait(30)
            threading.Timer(0.2, may_end.set).start()
            raise UserError("enough")
        began.set()
        assert may_end.wait(30)
        ended.set()
        return number

    with ThreadPoolExecutor(1) as executor:
        results = Workers(executor, 1).map(work, range(10))
        with pytest.raises(UserError, match="enough"):
            list(results)
        assert ended.is_set()
