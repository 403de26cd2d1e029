"""Logs with known truth for tests of the label join, and a slow, plain reference of the join.

`make_log` simulates a service: exposures, actions with random delays, and what a real log does to
them (rows written twice, out of order, late, lost, with wrong clocks). `join_labels` defines the
label join row by row in plain Python; every engine must give the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from hypothesis import strategies as st

from hvdrec.config.durations import microseconds
from hvdrec.config.label_join import Feedback

Row = dict[str, Any]
Touch = Literal["last", "first", "every"]
SECOND = 1_000_000


@dataclass(frozen=True)
class Log:
    """What a service logged, and what really happened.

    Attributes:
        exposures: Rows with request_id, user_id, item_id, t (seconds), hour and position.
        feedback: Action -> rows with request_id, user_id, item_id, t (seconds) and value.
        arrivals: All rows in the order in which they arrive: (second of arrival, "exposures" or the
            action, row).
        truth: Action -> for each request and item, the true delays in seconds.
    """

    exposures: list[Row]
    feedback: dict[str, list[Row]]
    arrivals: list[tuple[float, str, Row]]
    truth: dict[str, dict[tuple[str, str], list[float]]]


@dataclass(frozen=True)
class Faults:
    """How a log differs from the truth: shares of rows, and times in seconds."""

    duplicates: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    lateness: float = 3600.0
    skew: float = 0.0


@dataclass(frozen=True)
class Action:
    """An action: its probability after an exposure, and its mean delay (exponential) in seconds."""

    rate: float = 0.2
    delay: float = 60.0
    again: float = 0.1


def make_log(
    seed: int,
    *,
    requests: int = 100,
    items: int = 3,
    duration: float = 86_400.0,
    actions: Mapping[str, Action] | None = None,
    faults: Faults | None = None,
) -> Log:
    """Simulate a log in which each request shows several items.

    Args:
        seed: Seed of all random draws.
        requests: Number of requests.
        items: Number of items that a request shows.
        duration: Length of the log in seconds; actions after it are missing from the log.
        actions: The actions; None: clicks.
        faults: How the log differs from the truth; None: not at all.
    """
    draw, faults = random.Random(seed), faults or Faults()
    actions = actions or {"click": Action()}
    log = Log([], {name: [] for name in actions}, [], {name: {} for name in actions})
    for number in range(requests):
        at = draw.uniform(0, duration)
        request, user = f"r{number}", f"u{draw.randrange(max(1, requests // 5))}"
        for position, item in enumerate(draw.sample(range(max(items * 4, 8)), items)):
            keys = {"request_id": request, "user_id": user, "item_id": f"i{item}"}
            shown = {**keys, "t": at, "hour": int(at // 3600) % 24, "position": position}
            _record(log, draw, faults, "exposures", shown, duration)
            for name, action in actions.items():
                delays = []
                if draw.random() < action.rate:
                    delays.append(draw.expovariate(1 / action.delay))
                    while draw.random() < action.again:
                        delays.append(draw.expovariate(1 / action.delay))
                log.truth[name][request, f"i{item}"] = sorted(delays)
                for delay in delays:
                    t = at + delay + draw.uniform(-faults.skew, faults.skew)
                    done = {**keys, "t": t, "value": round(draw.uniform(0, 100), 2)}
                    _record(log, draw, faults, name, done, duration)
    draw.shuffle(log.exposures)
    for rows in log.feedback.values():
        draw.shuffle(rows)
    log.arrivals.sort(key=lambda arrival: arrival[0])
    return log


def _record(
    log: Log, draw: random.Random, faults: Faults, kind: str, row: Row, duration: float
) -> None:
    """Log a row, perhaps twice, late or never. Rows that arrive after the end are not logged."""
    if kind != "exposures" and draw.random() < faults.lost:
        return
    for _ in range(1 + (draw.random() < faults.duplicates)):
        wait = draw.uniform(0, faults.lateness) if draw.random() < faults.late else 0.0
        if row["t"] + wait < duration:
            log.arrivals.append((row["t"] + wait, kind, row))
            (log.exposures if kind == "exposures" else log.feedback[kind]).append(row)


@dataclass(frozen=True)
class Joined:
    """The result of the reference join.

    Attributes:
        settled: The settled exposures with their labels.
        unsettled: The unsettled exposures.
        carried: Action -> the feedback that the next run needs.
        counts: Action -> what became of its rows, as `FeedbackCounts`.
        settled_before: Exposures before this time, in microseconds, are settled.
    """

    settled: list[Row]
    unsettled: list[Row]
    carried: dict[str, list[Row]]
    counts: dict[str, dict[str, int]]
    settled_before: int


@dataclass
class _Match:
    """A feedback, and the exposures for which it counts."""

    row: Row
    exposures: list[int] = field(default_factory=list)


def join_labels(
    exposures: Sequence[Row],
    feedback: Mapping[str, Sequence[Row]],
    options: Sequence[Feedback],
    *,
    key: Sequence[str] = (),
    end: int | None = None,
    lateness: str = "0s",
    previous: Joined | None = None,
) -> Joined:
    """Join exposures with feedback row by row. Times are integers in seconds (column t).

    Args:
        exposures: Rows with user_id, item_id and t.
        feedback: Action -> rows with the columns of its `on`, t and (if it is used) value.
        options: The feedback tables.
        key: Columns that identify an exposure; empty: user, item, time and all `on` columns.
        end: End of the log in seconds; None: the latest time in any table.
        lateness: As in the configuration.
        previous: The result of the previous run.
    """
    on = [left for each in options for left, _ in each.pairs]
    key = list(dict.fromkeys(key or ("user_id", "item_id", "t", *on)))
    exposures = [*exposures, *(previous.unsettled if previous else [])]
    tables = {
        each.name: [*feedback[each.name], *(previous.carried[each.name] if previous else [])]
        for each in options
    }
    times = [row["t"] for rows in (exposures, *tables.values()) for row in rows]
    last = max((t for t in times if t is not None), default=0) if end is None else end
    complete = last * SECOND - microseconds(lateness)
    settled_from = complete - max(microseconds(each.window) for each in options)
    before = previous.settled_before if previous else -(10**18)
    unique = _earliest([row for row in exposures if row["t"] * SECOND >= before], key)
    result = Joined([], [], {}, {}, max(settled_from, before))
    labels: list[Row] = [{} for _ in unique]
    for each in options:
        matches, counts = _match(unique, key, tables[each.name], each, complete)
        result.counts[each.name] = counts
        result.carried[each.name] = [
            match.row
            for match in matches
            if any(unique[i]["t"] * SECOND >= settled_from for i in match.exposures)
            or (
                (not match.exposures or each.touch == "every")
                and match.row["t"] * SECOND >= complete - microseconds(each.skew)
            )
        ]
        for i, label in enumerate(labels):
            rows = [match.row for match in matches if i in match.exposures]
            label.update(_label(each, unique[i], rows))
    for row, label in zip(unique, labels, strict=True):
        if row["t"] * SECOND < settled_from:
            result.settled.append(row | label)
        else:
            result.unsettled.append(row)
    return result


def _label(options: Feedback, exposure: Row, rows: Sequence[Row]) -> Row:
    delays = [max(0, row["t"] - exposure["t"]) for row in rows]
    label: Row = {f"{options.name}_count": len(rows)}
    label[f"{options.name}_delay"] = float(min(delays)) if delays else None
    if options.value:
        values = [Decimal(str(row["value"])) for row in rows if row["value"] is not None]
        label[f"{options.name}_value"] = float(sum(values, Decimal(0)))
    return label


def _match(
    exposures: Sequence[Row],
    key: Sequence[str],
    rows: Sequence[Row],
    options: Feedback,
    complete: int,
) -> tuple[list[_Match], dict[str, int]]:
    """Match each unique feedback with exposures, and count what became of the rows."""
    window, skew = microseconds(options.window), microseconds(options.skew)
    names = [right for _, right in options.pairs]
    whole = [row for row in rows if None not in [row["t"], *(row[name] for name in names)]]
    identity = options.key or [*names, "t", *(["value"] if options.value else [])]
    unique = _earliest(whole, identity, [*names, "value"] if options.value else names)
    counts = dict.fromkeys(("matched", "early", "late", "unknown", "waiting"), 0)
    counts |= {"rows": len(rows), "incomplete": len(rows) - len(whole)}
    counts["duplicates"] = len(whole) - len(unique)
    matches = []
    for row in unique:
        same = [
            i
            for i, exposure in enumerate(exposures)
            if all(exposure[left] == row[right] for left, right in options.pairs)
        ]
        gap = {i: (row["t"] - exposures[i]["t"]) * SECOND for i in same}
        within = [i for i in same if -skew <= gap[i] <= window]
        # An exposure before the feedback wins over one after it; then the time decides.
        within.sort(
            key=lambda i: (
                gap[i] < 0,
                abs(gap[i]) if options.touch == "last" else exposures[i]["t"],
                _ordered(exposures[i][name] for name in key),
            )
        )
        matches.append(_Match(row, within if options.touch == "every" else within[:1]))
        if within:
            reason = "matched"
        elif row["t"] * SECOND >= complete - skew:
            reason = "waiting"
        elif not same:
            reason = "unknown"
        else:
            reason = "early" if all(each < -skew for each in gap.values()) else "late"
        counts[reason] += 1
    return matches, counts


def _earliest(rows: Sequence[Row], key: Sequence[str], others: Sequence[str] = ()) -> list[Row]:
    """Keep the earliest row per key; of equally early ones, the one with the smallest columns."""
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        names = others or [name for name in row if name != "t"]
        identity = tuple(row[name] for name in key)
        rank = _ordered([row["t"], *(row[name] for name in names)])
        best = chosen.get(identity)
        if best is None or rank < _ordered([best["t"], *(best[name] for name in names)]):
            chosen[identity] = row
    return list(chosen.values())


def _ordered(values: Any) -> tuple[tuple[bool, Any], ...]:
    """Return a sort key for values of which some are None, which come last."""
    return tuple((value is None, 0 if value is None else value) for value in values)


_IDS = st.one_of(st.sampled_from(["a", "b"]), st.none())
_TIMES = st.integers(0, 30)


@st.composite
def small_logs(draw: st.DrawFn) -> tuple[list[Row], dict[str, list[Row]]]:
    """Draw exposures, clicks (by request and item) and buys (by user and item) that collide."""
    exposure = st.fixed_dictionaries(
        {
            "request_id": _IDS,
            "user_id": st.sampled_from(["u", "v"]),
            "item_id": st.sampled_from(["x", "y"]),
            "t": _TIMES,
            "position": st.integers(0, 1),
        }
    )
    done = {"t": st.one_of(_TIMES, st.none()), "value": st.one_of(st.none(), st.integers(0, 3))}
    click = {"request_id": _IDS, "item_id": st.sampled_from(["x", "y", "z"]), **done}
    buy = {
        "user_id": st.sampled_from(["u", "v", "w"]),
        "asset": st.sampled_from(["x", "y"]),
        **done,
    }
    return (
        draw(st.lists(exposure, min_size=1, max_size=12)),
        {
            "click": draw(st.lists(st.fixed_dictionaries(click), max_size=10)),
            "buy": draw(st.lists(st.fixed_dictionaries(buy), max_size=10)),
        },
    )


_TOUCH = st.sampled_from(["last", "first", "every"])


@st.composite
def small_options(draw: st.DrawFn) -> tuple[Feedback, Feedback]:
    """Draw the options of the two actions of `small_logs`."""
    seconds = st.integers(0, 12).map(lambda n: f"{n}s")
    click = Feedback(
        "click", "click.parquet", ("request_id", "item_id"), draw(seconds),
        skew=draw(st.sampled_from(["0s", "2s"])), touch=draw(_TOUCH),
    )  # fmt: skip
    buy = Feedback(
        "buy", "buy.parquet", ("user_id", "item_id = asset"), draw(seconds), value="value",
        key=draw(st.sampled_from([(), ("t",)])),
        skew=draw(st.sampled_from(["0s", "1s"])), touch=draw(_TOUCH),
    )  # fmt: skip
    return click, buy


def colliding_log(seed: int, rows: int = 60) -> tuple[list[Row], dict[str, list[Row]]]:
    """Draw a log as `small_logs` does, with many rows, so that one log reaches most rules."""
    draw = random.Random(seed)

    def ids() -> str | None:
        return draw.choice(["a", "b", "c", "d", None])

    def done() -> Row:
        t = draw.choice([*range(60), None])
        return {"t": t, "value": draw.choice([None, 0, 1, 2, 3])}

    exposures = [
        {"request_id": ids(), "user_id": draw.choice("uv"), "item_id": draw.choice("xy"),
         "t": draw.randrange(60), "position": draw.randrange(2)}
        for _ in range(rows)
    ]  # fmt: skip
    clicks = [{"request_id": ids(), "item_id": draw.choice("xyz"), **done()} for _ in range(rows)]
    buys = [
        {"user_id": draw.choice("uvw"), "asset": draw.choice("xy"), **done()} for _ in range(rows)
    ]
    return exposures, {"click": clicks, "buy": buys}
