"""Retrieval as it is served: event by event, with the user's history before each event.

Each positive row of a split is an event. The user's features and history are those of the row, so
they hold everything that happened strictly before it, as in a request at that moment. The whole
catalogue is ranked without the items that the user had seen before the event. This needs a split
method that follows time: ``temporal`` or ``leave-last-out``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray
from scipy import sparse

from hvdrec.config import Config
from hvdrec.config.sections import SeenItems
from hvdrec.errors import UserError
from hvdrec.evaluation.event_metrics import event_report
from hvdrec.evaluation.held_out import Interactions, earlier_splits, read_interactions
from hvdrec.evaluation.item_item import ItemItemModel
from hvdrec.evaluation.retrieval import BLOCK_SCORES
from hvdrec.samples.split import RANDOM
from hvdrec.samples.times import DAY, comparable_times, epoch_seconds
from hvdrec.storage.artifacts import read_manifest
from hvdrec.storage.lineage import require_source
from hvdrec.storage.parquet import read_metadata, read_parts

Array = NDArray[Any]
ScoreBlock = Callable[[int, int], Array]
"""Function of start and stop that returns the scores of all items for the events from start to
stop - 1, [stop - start, items]."""


@dataclass(frozen=True)
class Prefixes:
    """For each of e events, items of its user before the event, in the order of time.

    Attributes:
        items: Items of all users, user after user, int64 [m].
        start: Index in `items` of the first item of each event's user, int64 [e].
        stop: Index in `items` after the last item before each event, int64 [e].
    """

    items: Array
    start: Array
    stop: Array

    @property
    def lengths(self) -> Array:
        """Number of items before each event, int64 [e]."""
        return self.stop - self.start

    def flat(self, first: int, last: int) -> tuple[Array, Array]:
        """Return the items of the prefixes of the events first to last - 1, and their events.

        Returns:
            Two arrays with an entry for each item of each prefix: the number of the event, counted
            from `first`, and the item.
        """
        lengths = self.lengths[first:last]
        row = np.repeat(np.arange(last - first), lengths)
        begin = np.cumsum(lengths) - lengths
        return row, self.items[
            np.arange(len(row)) - np.repeat(begin - self.start[first:last], lengths)
        ]

    def take(self, chosen: Array | slice) -> Prefixes:
        """Return the prefixes of some events."""
        return Prefixes(self.items, self.start[chosen], self.stop[chosen])

    def compact(self) -> Prefixes:
        """Return the same prefixes without the items of users who have no event."""
        first, user = np.unique(self.start, return_inverse=True)
        stop = first.copy()
        np.maximum.at(stop, user, self.stop)
        items = Prefixes(self.items, first, stop).flat(0, len(first))[1]
        moved = (np.cumsum(stop - first) - stop)[user]
        return Prefixes(items, self.start + moved, self.stop + moved)


@dataclass(frozen=True)
class Events:
    """e events of a split, ordered by user and time.

    Attributes:
        row: Number of each event's row in the split's shards, int64 [e].
        user: Index of each event's user, int64 [e].
        item: Index of the item to find, int64 [e].
        seen: Items to exclude for each event.
        taken: Items that the user took before each event, each item once.
        day: Day of each event since 1970, int64 [e]; None if there are no times.
        positives: Day and item of every positive row up to the end of the split, ordered by day,
            int64 [2, p]; None if there are no times.
        items: Number of items in the catalogue.
    """

    row: Array
    user: Array
    item: Array
    seen: Prefixes
    taken: Prefixes
    day: Array | None
    positives: Array | None
    items: int

    def __len__(self) -> int:
        """Return the number of events."""
        return len(self.row)

    def take(self, chosen: Array | slice) -> Events:
        """Return some of the events."""
        return Events(
            self.row[chosen],
            self.user[chosen],
            self.item[chosen],
            self.seen.take(chosen),
            self.taken.take(chosen),
            None if self.day is None else self.day[chosen],
            self.positives,
            self.items,
        )

    def ranks(self, score_block: ScoreBlock) -> Array:
        """Return the rank of each event's item among the unseen items, from 1, int64 [e].

        Scores are compared in float32. Of items with equal scores, the one with the smaller index
        comes first, as in `retrieval.rank_scores`.
        """
        rank = np.empty(len(self), dtype=np.int64)
        height = max(1, BLOCK_SCORES // max(1, self.items))
        for start in range(0, len(self), height):
            stop = min(start + height, len(self))
            scores = score_block(start, stop).astype(np.float32, copy=False)
            row, target = np.arange(stop - start), self.item[start:stop]
            own = scores[row, target]
            before = scores > own[:, None]
            equal_row, equal = np.nonzero(scores == own[:, None])
            before[equal_row, equal] = equal < target[equal_row]
            before[self.seen.flat(start, stop)] = False
            rank[start:stop] = 1 + before.sum(axis=1)
        return rank

    def report(self, rank: Array, config: Config) -> dict[str, Any]:
        """Return the metrics of the events' ranks; see `event_metrics.event_report`."""
        candidates = self.items - self.seen.lengths
        options = config.evaluate
        return event_report(
            rank, self.taken.lengths, candidates, options.k, options.sampled_negatives
        )

    def vector_ranks(self, users: Array, items: Array) -> Array:
        """Return the ranks by inner products of vectors: users [e, width], items [n, width]."""
        wide = items.T.astype(np.float64)
        return self.ranks(lambda start, stop: users[start:stop].astype(np.float64) @ wide)

    def item_item_ranks(self, model: ItemItemModel) -> Array:
        """Return the ranks by an item-item model that is fed with the items before each event."""
        if sparse.issparse(model.weights):
            by_row = model.weights.tocsr()
            return self.ranks(lambda start, stop: self._sparse_scores(by_row, start, stop))
        return self.ranks(lambda start, stop: self._dense_scores(model.weights, start, stop))

    def popularity_ranks(self, count: Array) -> Array:
        """Return the ranks if `count`, [items], has the scores of the items at all events."""
        scores = count.astype(np.float64)
        return self.ranks(lambda start, stop: np.broadcast_to(scores, (stop - start, self.items)))

    def recent_ranks(self, days: int) -> Array:
        """Return the ranks by each item's number of positive rows in the days before an event.

        These are the last `days` whole days before the day of the event.
        """
        assert self.day is not None and self.positives is not None
        rank = np.empty(len(self), dtype=np.int64)
        day, item = self.positives
        for today in np.unique(self.day):
            now = np.flatnonzero(self.day == today)
            window = slice(*np.searchsorted(day, [today - days, today]))
            count = np.bincount(item[window], minlength=self.items)
            rank[now] = self.take(now).popularity_ranks(count)
        return rank

    def _sparse_scores(self, weights: Any, start: int, stop: int) -> Array:
        row, item = self.taken.flat(start, stop)
        ones = np.ones(len(row), dtype=np.float32)
        taken = sparse.csr_matrix((ones, (row, item)), shape=(stop - start, self.items))
        return np.asarray((taken @ weights).toarray())

    def _dense_scores(self, weights: Array, start: int, stop: int) -> Array:
        """Return, for each event, the sum of the weights of the items that are taken before it.

        An event continues the sum of the user's previous event, so each item is added only once.
        """
        scores = np.empty((stop - start, self.items))
        taken, user = self.taken, -1
        total, done = np.zeros(self.items), 0
        for event in range(start, stop):
            if self.user[event] != user:
                user, done = self.user[event], int(taken.start[event])
                total = np.zeros(self.items)
            total = total + weights[taken.items[done : taken.stop[event]]].sum(
                axis=0, dtype=np.float64
            )
            done = int(taken.stop[event])
            scores[event - start] = total
        return scores


@dataclass(frozen=True)
class RankedEvents:
    """Events of a split with the ranks of their items.

    Attributes:
        events: The events, e of them.
        ranks: ``model`` or name of a baseline -> rank of each event's item, int64 [e]. Only the
            first rank has those of baselines.
    """

    events: Events
    ranks: dict[str, Array]

    def add(self, name: str, rank: Array, config: Config) -> dict[str, Any]:
        """Keep the ranks of a baseline, and return their metrics."""
        self.ranks[name] = rank
        return self.events.report(rank, config)


def obstacle(config: Config) -> str:
    """Return a line that says why there is no evaluation by event; "" if there is one."""
    method, samples = config.samples.split.method, config.paths.of("samples")
    if method in RANDOM:
        return f"events: left out, samples.split.method = '{method}' does not follow time"
    try:
        features = config.paths.of("features")
        manifest = read_manifest(features, "features")
        require_source(features, manifest, samples, "samples", "run hvdrec prepare")
    except UserError as error:
        return f"events: left out, they need the times in the samples: {error}"
    return ""


def read_events(config: Config, split: str, most: int) -> Events:
    """Read the events of a split; if there are more than `most`, about every n-th is taken."""
    features = config.paths.of("features")
    splits = (*earlier_splits(split), split)
    parts = [read_interactions(features, [name]) for name in splits]
    number = np.repeat(np.arange(len(splits)), [len(part.user) for part in parts])
    rows = Interactions(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("user", "item", "label", "weight")
        )
    )
    items = read_metadata(features / "items.parquet").num_rows
    time, seconds = _read_times(config, splits)
    first = len(number) - len(parts[-1].user)
    events = find_events(rows, number, time, items, config.evaluate.seen, first)
    if seconds is not None:
        positive = np.flatnonzero(rows.label > 0)
        day = np.floor(seconds / DAY).astype(np.int64)
        positive = positive[np.argsort(day[positive], kind="stable")]
        events = Events(
            events.row,
            events.user,
            events.item,
            events.seen,
            events.taken,
            day[first + events.row],
            np.stack([day[positive], rows.item[positive]]),
            items,
        )
    step = math.ceil(len(events) / most)
    events = events.take(slice(None, None, max(1, step)))
    return replace(events, seen=events.seen.compact(), taken=events.taken.compact())


def user_rows(config: Config, split: str, row: Array) -> pa.Table:
    """Read the user features of some rows of a split, given by their numbers, int64 [e]."""
    columns = [feature.name for feature in config.schema.side("user")]
    order = np.argsort(row, kind="stable")
    parts, start = [], 0
    for part in read_parts(config.paths.of("features") / split, columns):
        inside = row[order]
        inside = inside[(inside >= start) & (inside < start + part.num_rows)]
        parts.append(part.take(pa.array(inside - start)))
        start += part.num_rows
    back = np.empty(len(row), dtype=np.int64)
    back[order] = np.arange(len(row))
    return pa.concat_tables(parts).take(pa.array(back))


def read_seconds(config: Config, splits: tuple[str, ...]) -> Array | None:
    """Read the times of all rows of some splits, in seconds since 1970, float64 [n].

    Return None if the rows have no times that can be converted to seconds.
    """
    return _read_times(config, splits)[1]


def find_events(
    rows: Interactions, split: Array, time: Array, items: int, seen_items: SeenItems, first: int
) -> Events:
    """Find the events among n rows: positive rows with an item that the user had not seen before.

    Args:
        rows: Rows of the splits up to the evaluated one.
        split: Number of each row's split, in the order of the splits in time, int64 [n].
        time: Time of each row within its split [n]. Of two rows with the same user and time,
            neither is before the other.
        items: Number of items in the catalogue.
        seen_items: Which items count as seen.
        first: Number of the first row of the evaluated split, which is the last split.
    """
    order = np.lexsort((time, split, rows.user))
    user, item = rows.user[order], rows.item[order]
    positive, moment = rows.label[order] > 0, (rows.user[order], split[order], time[order])
    user_start = _run_starts(user)
    moment_start = _run_starts(*moment)
    pair = user * items + item
    taken_first, taken_count = _first_occurrences(pair, positive)
    seen_first, seen_count = taken_first, taken_count
    if seen_items == "shown":
        seen_first, seen_count = _first_occurrences(pair, np.ones(len(pair), dtype=bool))
    seen_before = np.zeros(len(pair), dtype=bool)
    known = {"pair": pair[seen_first], "at": np.flatnonzero(seen_first)}
    by_pair = np.argsort(known["pair"], kind="stable")
    place = np.searchsorted(known["pair"][by_pair], pair)
    place = np.minimum(place, max(len(by_pair) - 1, 0))
    if len(by_pair):
        found = known["pair"][by_pair][place] == pair
        seen_before = found & (known["at"][by_pair][place] < moment_start)
    event = np.flatnonzero(positive & ~seen_before & (order >= first))

    def prefixes(is_first: Array, count: Array) -> Prefixes:
        return Prefixes(item[is_first], count[user_start[event]], count[moment_start[event]])

    return Events(
        order[event] - first,
        user[event],
        item[event],
        prefixes(seen_first, seen_count),
        prefixes(taken_first, taken_count),
        None,
        None,
        items,
    )


def _first_occurrences(pair: Array, counted: Array) -> tuple[Array, Array]:
    """Return marks of the first counted row of each pair, and the number of marks before each row.

    The marks are bool [n], the numbers are int64 [n + 1].
    """
    rows = np.flatnonzero(counted)
    _, index = np.unique(pair[rows], return_index=True)
    is_first = np.zeros(len(pair), dtype=bool)
    is_first[rows[index]] = True
    return is_first, np.concatenate([[0], np.cumsum(is_first)])


def _run_starts(*columns: Array) -> Array:
    """Return, for each row, the index of the first row in its run of equal rows.

    Rows are equal if they are equal in all columns.
    """
    count = len(columns[0])
    changes = np.zeros(count, dtype=bool)
    changes[:1] = True
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return np.maximum.accumulate(np.where(changes, np.arange(count), 0))


def _read_times(config: Config, splits: tuple[str, ...]) -> tuple[Array, Array | None]:
    """Read the times of all rows of some splits, in the order of the shards.

    Returns:
        Two arrays [n]. The first has numbers that order the rows of a split by time; all are 0 if
        there are no times. The second has seconds since 1970, float64; it is None if the times
        cannot be converted to seconds.
    """
    samples, schema = config.paths.of("samples"), config.schema
    parts = [ds.dataset(str(samples / split), format="parquet") for split in splits]
    names = parts[0].schema.names if config.samples.time else []
    name = next((t for t in (schema.own_name("time"), config.samples.time) if t in names), None)
    if name is None:
        return np.zeros(sum(part.count_rows() for part in parts)), None
    columns = [comparable_times(part.to_table(columns=[name])[name]) for part in parts]
    if any(column is None for column in columns):
        return np.zeros(sum(part.count_rows() for part in parts)), None
    kind = columns[0][0]  # type: ignore[index]
    time = np.concatenate([column[1] for column in columns if column is not None])
    return time, epoch_seconds(time, kind)
