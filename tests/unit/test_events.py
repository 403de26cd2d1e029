"""Retrieval event by event, compared with plain loops over rows and items."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from hvdrec.evaluation.event_metrics import (
    describe_events,
    event_report,
    rank_metrics,
    sampled_metrics,
)
from hvdrec.evaluation.events import Events, find_events
from hvdrec.evaluation.held_out import Interactions
from hvdrec.evaluation.item_item import ItemItemModel

Array = NDArray[Any]
USERS, ITEMS, ROWS = 6, 9, 160


@dataclass(frozen=True)
class Log:
    rows: Interactions
    split: Array
    time: Array

    @property
    def first(self) -> int:
        return int((self.split < 2).sum())


@pytest.fixture(params=range(3))
def log(request: pytest.FixtureRequest) -> Log:
    random = np.random.default_rng(request.param)
    rows = Interactions(
        random.integers(0, USERS, ROWS),
        random.integers(0, ITEMS, ROWS),
        (random.random(ROWS) < 0.5).astype(np.float32),
        np.ones(ROWS, np.float32),
    )
    split = np.repeat([0, 1, 2], [60, 40, 60])
    return Log(rows, split, random.integers(0, 12, ROWS).astype(np.float64))


def before(log: Log, row: int, is_counted: Callable[[int], bool]) -> set[int]:
    """The items of the user's counted rows that are strictly before a row, by a plain loop."""
    return {
        int(log.rows.item[other])
        for other in range(ROWS)
        if log.rows.user[other] == log.rows.user[row]
        and (log.split[other], log.time[other]) < (log.split[row], log.time[row])
        and is_counted(other)
    }


def read(log: Log, seen: str = "taken") -> Events:
    return find_events(log.rows, log.split, log.time, ITEMS, seen, log.first)  # type: ignore[arg-type]


def own(events: Events, name: str, event: int) -> list[int]:
    prefixes = getattr(events, name)
    return [int(i) for i in prefixes.items[prefixes.start[event] : prefixes.stop[event]]]


@pytest.mark.parametrize("seen", ["taken", "shown"])
def test_an_event_knows_what_happened_strictly_before_it(log: Log, seen: str) -> None:
    events = read(log, seen)
    expected = {}
    for row in range(log.first, ROWS):
        excluded = before(log, row, lambda r: seen == "shown" or log.rows.label[r] > 0)
        if log.rows.label[row] > 0 and log.rows.item[row] not in excluded:
            expected[row - log.first] = excluded
    assert sorted(events.row) == sorted(expected)
    for event, row in enumerate(events.row):
        assert sorted(own(events, "seen", event)) == sorted(expected[row])
        taken = before(log, row + log.first, lambda r: log.rows.label[r] > 0)
        assert sorted(own(events, "taken", event)) == sorted(taken)
        assert events.item[event] == log.rows.item[row + log.first]


def test_compact_prefixes_hold_only_the_users_with_an_event(log: Log) -> None:
    events = read(log)
    few = events.take(slice(1, None, 4))
    compact = replace(few, seen=few.seen.compact(), taken=few.taken.compact())
    for event in range(len(few)):
        for name in ("seen", "taken"):
            assert own(compact, name, event) == own(few, name, event)
    users = np.unique(few.user)
    entries = sum(int(few.seen.lengths[few.user == user].max()) for user in users)
    assert len(compact.seen.items) == entries
    # Events of a user still share their items, which item-item models rely on.
    model = ItemItemModel(None, np.random.default_rng(0).random((ITEMS, ITEMS)))
    np.testing.assert_array_equal(compact.item_item_ranks(model), few.item_item_ranks(model))


def plain_rank(scores: Array, item: int, excluded: list[int]) -> int:
    order = sorted(range(ITEMS), key=lambda i: (-np.float32(scores[i]), i))
    return [i for i in order if i not in excluded].index(item) + 1


@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_ranks_are_those_of_a_plain_sort(
    log: Log, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdrec.evaluation.events.BLOCK_SCORES", block)
    events, random = read(log), np.random.default_rng(5)
    users, items = random.normal(size=(len(events), 3)), random.normal(size=(ITEMS, 3))
    items[4] = items[2]  # equal scores
    weights = random.normal(size=(ITEMS, ITEMS)).astype(np.float32)
    count = random.integers(0, 4, ITEMS)
    model = ItemItemModel(None, weights)
    ranks = {
        "vectors": events.vector_ranks(users, items),
        "dense": events.item_item_ranks(model),
        "sparse": events.item_item_ranks(replace(model, weights=sparse.csc_matrix(weights))),
        "popularity": events.popularity_ranks(count),
    }
    for event in range(len(events)):
        taken = own(events, "taken", event)
        history = weights[taken].sum(axis=0, dtype=np.float64)
        scores = {
            "vectors": items @ users[event],
            "dense": history,
            "sparse": history,
            "popularity": count,
        }
        for name, values in scores.items():
            excluded = own(events, "seen", event)
            assert ranks[name][event] == plain_rank(values, events.item[event], excluded), name


def test_recent_popularity_counts_whole_days_before_the_event(log: Log) -> None:
    found = read(log)
    day = log.time.astype(np.int64) + 20 * log.split
    positive = np.flatnonzero(log.rows.label > 0)
    positive = positive[np.argsort(day[positive], kind="stable")]
    events = replace(
        found,
        day=day[log.first + found.row],
        positives=np.stack([day[positive], log.rows.item[positive]]),
    )
    ranks = events.recent_ranks(3)
    for event in range(len(events)):
        assert events.day is not None
        today = events.day[event]
        count = np.zeros(ITEMS)
        for row in positive:
            if today - 3 <= day[row] < today:
                count[log.rows.item[row]] += 1
        assert ranks[event] == plain_rank(count, events.item[event], own(events, "seen", event))


def test_metrics_of_ranks_worked_out_by_hand() -> None:
    metrics = rank_metrics(np.array([1, 3, 20]), [5])
    assert metrics["hit_rate@5"] == pytest.approx(2 / 3)
    assert metrics["ndcg@5"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert metrics["mrr@5"] == pytest.approx((1 + 1 / 3) / 3)
    assert math.isnan(rank_metrics(np.empty(0, int), [5])["hit_rate@5"])


def test_events_are_divided_by_the_length_of_the_history() -> None:
    rank, history = np.array([1, 9, 1, 1]), np.array([0, 1, 5, 51])
    report = event_report(rank, history, np.full(4, 20), [5])
    buckets = report["by_history"]
    assert [bucket["events"] for bucket in buckets.values()] == [1, 2, 0, 1]
    assert buckets["1-5"]["hit_rate@5"] == 0.5


def test_sampled_metrics_are_the_mean_over_many_samples() -> None:
    random = np.random.default_rng(0)
    rank, candidates = np.array([1, 4, 30]), np.array([40, 35, 50])
    found = sampled_metrics(rank, candidates, [3], negatives=10)
    hits = []
    for r, c in zip(rank, candidates, strict=True):
        draws = np.array([random.choice(c - 1, 10, replace=False) for _ in range(4000)])
        hits.append(((draws < r - 1).sum(axis=1) < 3).mean())
    assert found["hit_rate@3"] == pytest.approx(np.mean(hits), abs=0.01)
    assert found["hit_rate@3"] > rank_metrics(rank, [3])["hit_rate@3"]


def test_the_sentence_compares_with_the_best_baseline() -> None:
    model = rank_metrics(np.array([1, 1, 9, 9]), [5])
    baselines = {
        "a": rank_metrics(np.array([1, 9, 9, 9]), [5]),
        "b": rank_metrics(np.array([9]), [5]),
    }
    text = describe_events(model, baselines, 5)
    assert "50.0% of 4 events" in text and "(a) in 25.0%, 2.00 times" in text
