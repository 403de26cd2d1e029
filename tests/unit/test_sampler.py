"""Epoch plans: each row once, equal steps, and resumption on any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.data.sampler import EpochPlan, Fragment, Progress, plan_epoch

Row = tuple[int, int]

groups = st.lists(st.integers(0, 12), max_size=9)
worlds = st.integers(1, 5)
batches = st.integers(1, 9)
windows = st.integers(1, 30)


def delivered_rows(plan: EpochPlan) -> list[Row]:
    """Return (row group, position) of the rows of a plan in delivery order."""
    delivered: list[Row] = []
    for number, window in enumerate(plan.windows):
        rows = [(f.group, int(p)) for f in window for p in f.positions()]
        order = plan.order(number)[plan.skip if number == 0 else 0 :]
        delivered += [rows[i] for i in order]
    return delivered


def deliver(
    group_rows: Sequence[int], world: int, batch: int, window: int, **more: object
) -> tuple[list[list[Row]], set[int]]:
    """Return the rows of each rank and the set of the ranks' step counts."""
    plans = [
        plan_epoch(
            group_rows,
            rank=rank,
            world_size=world,
            batch_size=batch,
            window_rows=window,
            **{"seed": 0, "epoch": 0, **more},  # type: ignore[arg-type]
        )
        for rank in range(world)
    ]
    rows = [delivered_rows(plan) for plan in plans]
    assert [plan.rows for plan in plans] == [len(part) for part in rows]
    return rows, {plan.steps for plan in plans}


def all_rows(group_rows: Sequence[int]) -> Counter[Row]:
    return Counter((g, p) for g, rows in enumerate(group_rows) for p in range(rows))


@given(groups, worlds, batches, windows, st.integers(-9, 2**70), st.integers(0, 3), st.booleans())
@settings(max_examples=200, deadline=None)
def test_each_row_is_planned_once_in_equal_steps(
    group_rows: list[int], world: int, batch: int, window: int, seed: int, epoch: int, shuffle: bool
) -> None:
    parts, steps = deliver(
        group_rows, world, batch, window, seed=seed, epoch=epoch, shuffle=shuffle
    )
    assert Counter(row for part in parts for row in part) == all_rows(group_rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert steps == {-(-max(map(len, parts)) // batch)}


@given(groups, worlds, windows)
@settings(deadline=None)
def test_without_shuffle_the_ranks_read_in_file_order(
    group_rows: list[int], world: int, window: int
) -> None:
    parts, _ = deliver(group_rows, world, 3, window, shuffle=False)
    joined = [row for part in parts for row in part]
    assert joined == [(g, p) for g, rows in enumerate(group_rows) for p in range(rows)]


@given(groups, worlds, batches, worlds, st.integers(0, 4), windows)
@settings(deadline=None)
def test_without_shuffle_file_order_survives_a_resize(
    group_rows: list[int], old_world: int, batch: int, world: int, steps: int, window: int
) -> None:
    past = (Progress(old_world, batch, steps),)
    parts, _ = deliver(group_rows, world, batch, window, past=past, shuffle=False)
    joined = [row for part in parts for row in part]
    assert joined == sorted(joined)


def test_fragments_equal_a_worked_example() -> None:
    more = {"batch_size": 3, "window_rows": 4, "seed": 0, "epoch": 0, "shuffle": False}
    plans = [plan_epoch([3, 0, 4], rank=rank, world_size=2, **more) for rank in range(2)]  # type: ignore[arg-type]
    assert plans[0].windows == ((Fragment(0, 0, 3), Fragment(2, 0, 1)),)
    assert plans[1].windows == ((Fragment(2, 1, 4),),)
    assert [plan.steps for plan in plans] == [2, 2]


@given(groups, worlds, windows)
@settings(deadline=None)
def test_windows_exceed_the_requested_size_by_less_than_a_row_group(
    group_rows: list[int], world: int, window: int
) -> None:
    for rank in range(world):
        plan = plan_epoch(
            group_rows,
            rank=rank,
            world_size=world,
            batch_size=3,
            window_rows=window,
            seed=0,
            epoch=0,
        )
        sizes = [[fragment.rows for fragment in each] for each in plan.windows]
        assert all(sum(rows) >= window for rows in sizes[:-1])
        assert all(sum(rows[:-1]) < window for rows in sizes)


def test_the_order_depends_on_seed_and_epoch() -> None:
    group_rows = [20] * 10
    base = deliver(group_rows, 2, 4, 50)
    assert deliver(group_rows, 2, 4, 50) == base
    assert deliver(group_rows, 2, 4, 50, epoch=1)[0] != base[0]
    assert deliver(group_rows, 2, 4, 50, seed=1)[0] != base[0]
    assert deliver(group_rows, 2, 4, 50, seed=-1)[0] != base[0]
    one, two = deliver(group_rows, 2, 4, 50)[0], deliver(group_rows, 2, 4, 50, epoch=1)[0]
    assert set(one[0]) != set(two[0])  # a rank gets other rows in the next epoch


def test_rows_are_mixed_across_row_groups() -> None:
    (rows,), _ = deliver([50] * 8, 1, 10, 400)
    assert len({group for group, _ in rows[:50]}) >= 6


@given(
    groups,
    st.lists(st.tuples(worlds, batches, st.integers(0, 4)), min_size=1, max_size=3),
    worlds,
    batches,
    windows,
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_remaining_rows_are_planned_once_after_any_resizes(
    group_rows: list[int],
    past_runs: list[tuple[int, int, int]],
    world: int,
    batch: int,
    window: int,
    shuffle: bool,
) -> None:
    delivered: Counter[Row] = Counter()
    past: tuple[Progress, ...] = ()
    for old_world, old_batch, wanted in past_runs:
        parts, (available,) = deliver(
            group_rows, old_world, old_batch, window, past=past, shuffle=shuffle
        )
        steps = min(wanted, available)
        for part in parts:
            delivered.update(part[: steps * old_batch])
        past = (*past, Progress(old_world, old_batch, steps))
    rest, steps_left = deliver(group_rows, world, batch, window, past=past, shuffle=shuffle)
    delivered.update(row for part in rest for row in part)
    assert delivered == all_rows(group_rows)
    assert len(steps_left) == 1


@given(groups, worlds, batches, windows, st.integers(0, 6))
@settings(max_examples=200, deadline=None)
def test_the_same_world_size_continues_the_order_exactly(
    group_rows: list[int], world: int, batch: int, window: int, steps: int
) -> None:
    whole, (total,) = deliver(group_rows, world, batch, window)
    steps = min(steps, total)
    past = tuple(Progress(world, batch, 1) for _ in range(steps))
    rest, (left,) = deliver(group_rows, world, batch, window, past=past)
    assert rest == [part[steps * batch :] for part in whole]
    assert left == total - steps


def test_delivered_windows_are_not_read_again() -> None:
    plan = plan_epoch(
        [10] * 10,
        rank=0,
        world_size=1,
        batch_size=5,
        window_rows=20,
        seed=0,
        epoch=0,
        past=(Progress(1, 5, 9),),
    )
    assert sum(f.rows for window in plan.windows for f in window) == 60
    assert (plan.first, plan.skip, plan.rows, plan.steps) == (2, 5, 55, 11)


def test_a_large_epoch_is_planned_quickly() -> None:
    plan = plan_epoch(
        np.full(20_000, 10_000).tolist(),
        rank=3,
        world_size=8,
        batch_size=4096,
        window_rows=262_144,
        seed=0,
        epoch=0,
    )
    assert plan.rows == 25_000_000
    assert all(f.chosen is None for window in plan.windows for f in window)


def test_after_a_resize_only_started_windows_list_single_rows() -> None:
    plan = plan_epoch(
        [10_000] * 20_000,
        rank=0,
        world_size=5,
        batch_size=4096,
        window_rows=100_000,
        seed=0,
        epoch=0,
        past=(Progress(8, 4096, 900),),
    )
    left = 200_000_000 - 8 * 4096 * 900
    assert plan.rows == -(-left // 5)
    assert plan.steps == -(-plan.rows // 4096)
    chosen = [f.rows for window in plan.windows for f in window if f.chosen is not None]
    assert 0 < sum(chosen) <= 8 * 100_000
