"""How long to wait for labels: delays of feedback, and the share that each label window catches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
from ibis.expr.types import IntegerColumn, Table

from hvdrec.config import Config
from hvdrec.config.durations import duration_text, microseconds, rounded_up
from hvdrec.config.label_join import Feedback
from hvdrec.errors import invalid_value
from hvdrec.parallel.progress import print_line
from hvdrec.samples.delay_curve import RATIO, DelayCurve, delay_bin, estimate
from hvdrec.samples.engine import INTERNAL, Engine, connect
from hvdrec.samples.exposures import exposure_key, matchable
from hvdrec.samples.feedback import (
    CLOCK,
    DELAY,
    SECOND,
    SHOWN,
    SHOWN_AT,
    TIME,
    complete_feedback,
    match,
    numbered,
    unique_exposures,
    unique_feedback,
)
from hvdrec.samples.label_tables import LabelTables, open_tables
from hvdrec.samples.raw_files import table_location
from hvdrec.samples.spec import SampleSpec
from hvdrec.storage.urls import as_location

CANDIDATES = (
    "10s", "1m", "5m", "10m", "30m", "1h", "2h", "6h", "12h", "1d", "2d", "3d", "7d", "14d", "30d",
)  # fmt: skip
"""Windows that every report lists, up to the longest window that is examined."""
LONGER = 10
"""By default, windows up to this many times the configured one are examined."""
OBSERVED = 0.1
"""By default, at least this share of the exposures was observed for the longest window examined."""
FEW = 100
"""With fewer positives, the report warns."""
DRAWN_POINTS = 120
_BIN, _ROWS = f"{INTERNAL}bin", f"{INTERNAL}rows"


@dataclass(frozen=True)
class WindowChoice:
    """The effects of a label window for one action. Shares are between 0 and 1.

    Attributes:
        window: The window as text, such as "30m".
        seconds: The window in seconds.
        caught: Share of the positives whose first feedback comes within the window.
        low: Lower end of the 95 % interval of `caught`.
        high: Upper end of this interval.
        missed: Share of the positives that would be labelled 0: 1 - caught.
        wrong_negatives: Share of the exposures labelled 0 that are positives.
        unsettled: Share of the exposures in the log whose window has not passed.
        age: Seconds from an exposure until it can be a sample: the window plus the lateness.
    """

    window: str
    seconds: float
    caught: float
    low: float
    high: float
    missed: float
    wrong_negatives: float
    unsettled: float
    age: float


@dataclass(frozen=True)
class ActionDelays:
    """The delays of one action.

    Attributes:
        name: Name of the feedback.
        configured: The window in the configuration.
        within: The longest window examined. Positives are exposures with feedback within it.
        exposures: Number of exposures.
        positives: Number of exposures for which the log has feedback within the longest window.
        share: The share of positives that the recommended window must catch.
        rate: Estimated share of all exposures that get feedback within the longest window.
        recommended: The smallest window that catches `share`, as text, rounded up by at most 2 %;
            "" if there are no positives.
        seconds: The same window in seconds before rounding; None if there are no positives.
        low: Lower end of its 95 % interval, in seconds.
        high: Upper end of this interval; None if it is beyond the longest window.
        choices: The candidate windows, ascending.
        curve: Points (seconds, caught, low, high) of the share caught as a function of the window.
        notes: Cautions for readers of the numbers, one line each.
    """

    name: str
    configured: str
    within: str
    exposures: int
    positives: int
    share: float
    rate: float = 0.0
    recommended: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[WindowChoice, ...] = ()
    curve: tuple[tuple[float, float, float, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DelayResult:
    """The delays of all actions of a configuration.

    Attributes:
        name: Name of the run.
        end: End of the log, in microseconds.
        actions: The actions, in the order of the configuration.
    """

    name: str
    end: int
    actions: tuple[ActionDelays, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)


def measure_delays(
    config: Config, *, share: float = 0.95, within: str = "", progress: bool = True
) -> DelayResult:
    """Measure the delays of feedback, and recommend a label window for each action.

    Args:
        config: Configuration of the run, with [[samples.feedback]].
        share: Share of the positives that the recommended window must catch.
        within: The longest window to examine, such as "7d". Empty: ten times the configured one,
            but not longer than the time for which a tenth of the exposures were observed.
        progress: Print lines of progress on standard error.

    Raises:
        UserError: A table or an option is invalid.
    """
    notify = print_line if progress else lambda line: None
    spec, raw = SampleSpec.of(config), as_location(config.paths.raw)
    if not 0 < share < 1:
        raise invalid_value("share", share, "must be between 0 and 1", "use 0.95, for example")
    longest = _longest(within)
    samples = spec.samples
    if not samples.feedback:
        remedy = "add a table of clicks or other actions; see docs/label-join.md"
        raise invalid_value("samples.feedback", [], "no feedback is declared", remedy)
    with connect(samples.tables) as engine:
        notify("reading exposures and feedback")
        file = table_location(raw, samples.interactions)
        exposures = engine.read(raw, samples.interactions, spec.declared)
        tables = open_tables(engine, spec, raw, exposures, file)
        unique = unique_exposures(engine, tables.exposures, exposure_key(spec))
        observed = _observed(engine, unique.unique, tables.end)
        actions = []
        for number, options in enumerate(samples.feedback):
            notify(f"measuring the delays of {options.name}")
            window = longest or _default_window(options, observed)
            delays = _first_delays(engine, spec, tables, matchable(spec, unique), (number, window))
            actions.append(_describe(spec, options, (share, window), observed, delays))
    return DelayResult(config.name, tables.end, tuple(actions))


def _longest(within: str) -> int:
    """Return the longest window in microseconds; 0 for the default."""
    try:
        longest = microseconds(within) if within else 0
    except ValueError as error:
        raise invalid_value("within", within, str(error)) from None
    if within and not longest:
        raise invalid_value("within", within, "must be greater than 0")
    return longest


def _bins(column: IntegerColumn) -> IntegerColumn:
    """Return the bin of each duration in microseconds, as `delay_bin` does."""
    positive = ibis.greatest(column, 1).cast("float64")
    return (positive.ln() / math.log(RATIO)).floor().cast("int64")


def _histogram(engine: Engine, table: Table, bins: IntegerColumn) -> dict[int, int]:
    """Count the rows in each bin."""
    counted = table.select(**{_BIN: bins}).group_by(_BIN).aggregate(lambda t: t.count().name(_ROWS))
    columns = pa.table(engine.collect(counted)).to_pydict()
    return dict(zip(columns[_BIN], columns[_ROWS], strict=True))


def _observed(engine: Engine, exposures: Table, end: int) -> dict[int, int]:
    """Count the exposures in each bin of the time for which they were observed."""
    known = exposures.filter(exposures[CLOCK] <= end)
    return _histogram(engine, known, _bins(end - known[CLOCK]))


def _default_window(options: Feedback, observed: Mapping[int, int]) -> int:
    """Return the default longest window in microseconds (see `LONGER` and `OBSERVED`)."""
    total = sum(observed.values())
    reached, number = 0, 0
    for number in sorted(observed, reverse=True):
        reached += observed[number]
        if reached >= OBSERVED * total:
            break
    return max(1, min(LONGER * microseconds(options.window), int(RATIO**number)))


def _first_delays(
    engine: Engine,
    spec: SampleSpec,
    tables: LabelTables,
    exposures: Table,
    action: tuple[int, int],
) -> tuple[dict[int, int], dict[int, int]]:
    """Find the first feedback on each exposure.

    Args:
        engine: Runs the queries.
        spec: Definition of the samples.
        tables: The feedback tables.
        exposures: The exposures to match.
        action: Index in samples.feedback, and the longest window in microseconds.

    Returns:
        Two histograms of the exposures with feedback, bin -> number of exposures: by the delay of
        the first feedback, and by the time for which the exposure was observed.
    """
    number, window = action
    options = dataclasses.replace(spec.samples.feedback[number], window=f"{window}us")
    whole = complete_feedback(tables.feedback[number].rows, len(options.on))
    whole = whole.filter(whole[TIME] <= tables.end)
    unique = engine.materialize(unique_feedback(whole, len(options.key)))
    key = exposure_key(spec)
    matches = match(exposures, key, unique, options, tables.end)
    shown = numbered(SHOWN, len(key))
    first = matches.group_by(*shown).aggregate(
        **{DELAY: matches[DELAY].min(), SHOWN_AT: matches[SHOWN_AT].min()}
    )
    first = engine.materialize(first.filter(first[SHOWN_AT] <= tables.end))
    return (
        _histogram(engine, first, _bins(first[DELAY])),
        _histogram(engine, first, _bins(tables.end - first[SHOWN_AT])),
    )


def _describe(
    spec: SampleSpec,
    options: Feedback,
    wanted: tuple[float, int],
    observed: Mapping[int, int],
    delays: tuple[Mapping[int, int], Mapping[int, int]],
) -> ActionDelays:
    """Estimate the curve of an action and describe it; `wanted` is the share and the window."""
    (share, window), (events, leaving) = wanted, delays
    censored = {number: rows - leaving.get(number, 0) for number, rows in observed.items()}
    curve = estimate(events, censored, delay_bin(window))
    positives = sum(events.values())
    action = ActionDelays(
        name=options.name,
        configured=options.window,
        within=duration_text(window),
        exposures=sum(observed.values()),
        positives=positives,
        share=share,
    )
    if curve is None:
        return dataclasses.replace(action, notes=(f"no feedback within {action.within}",))
    best, low, high = curve.smallest(share)
    texts = {microseconds(text): text for text in (*CANDIDATES, rounded_up(best), options.window)}
    lateness = microseconds(spec.samples.exposures.lateness)
    choices = [
        _choice(curve, text, size, observed, lateness)
        for size, text in sorted(texts.items())
        if size <= window * RATIO
    ]
    return dataclasses.replace(
        action,
        rate=float(curve.incidence[-1]),
        recommended=rounded_up(best),
        seconds=best / SECOND,
        low=low / SECOND,
        high=None if high is None else high / SECOND,
        choices=tuple(choices),
        curve=_points(curve),
        notes=tuple(_notes(best, high, positives, window)),
    )


def _choice(
    curve: DelayCurve, text: str, window: int, observed: Mapping[int, int], lateness: int
) -> WindowChoice:
    index = curve.at(window)
    low, high = curve.interval()
    caught, incidence = float(curve.caught[index]), float(curve.incidence[index])
    wrong = (float(curve.incidence[-1]) - incidence) / (1 - incidence)
    open_ = sum(rows for number, rows in observed.items() if number < delay_bin(window + lateness))
    return WindowChoice(
        window=text,
        seconds=window / SECOND,
        caught=caught,
        low=float(low[index]),
        high=float(high[index]),
        missed=1 - caught,
        wrong_negatives=wrong,
        unsettled=open_ / sum(observed.values()),
        age=(window + lateness) / SECOND,
    )


def _points(curve: DelayCurve) -> tuple[tuple[float, float, float, float], ...]:
    """Return points of the curve for drawing, evenly spaced in the logarithm of the window."""
    low, high = curve.interval()
    first = max(0, int(np.argmax(curve.caught > 0)) - 1)
    chosen = np.unique(np.linspace(first, len(curve.windows) - 1, DRAWN_POINTS).astype(int))
    return tuple(
        (float(curve.windows[i] / SECOND), float(curve.caught[i]), float(low[i]), float(high[i]))
        for i in chosen
    )


def _notes(best: float, high: float | None, positives: int, window: int) -> list[str]:
    notes = []
    if positives < FEW:
        notes.append(f"only {positives} positives: the interval is wide")
    if high is None or best > 0.8 * window:
        notes.append(
            f"feedback still arrives near the longest window ({duration_text(window)}): examine "
            "longer ones with --within, which needs a longer log"
        )
    return notes
