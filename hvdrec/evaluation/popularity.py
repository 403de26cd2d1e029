"""Measure retrieval by popularity on the validation split, to compare a model's retrieval with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.schema import Schema
from hvdrec.evaluation.event_metrics import rank_metrics
from hvdrec.evaluation.events import Events, obstacle, read_events
from hvdrec.evaluation.held_out import RetrievalQueries
from hvdrec.evaluation.references import BY_EVENT, Reference
from hvdrec.parallel import ranks
from hvdrec.samples.split import RANDOM
from hvdrec.storage.parquet import read_metadata, read_table
from hvdrec.storage.urls import Location

Array = NDArray[Any]
COMPARED_EVENTS = 2_000
"""Largest number of validation events on which a model is compared with popularity."""


@dataclass(frozen=True)
class PopularityByEvent:
    """Retrieval by popularity, event by event.

    Attributes:
        events: Events of the validation split, without their days.
        reference: Popularity's hit rate: the share of events whose item is among the k most popular
            unseen items.
    """

    events: Events
    reference: Reference


def popularity_by_event(config: Config) -> tuple[PopularityByEvent | None, str]:
    """Measure retrieval by popularity on at most `COMPARED_EVENTS` validation events.

    All ranks must call this at the same time.

    Returns:
        Two values. The first is the result; None if retrieval is not measured by event. The second
        is a line with the reason if the split follows time but the times in the samples cannot be
        read; otherwise "".
    """
    most = min(COMPARED_EVENTS, config.evaluate.events)
    if config.samples.split.method in RANDOM or not most:
        return None, ""
    reason = events_obstacle(config)
    if reason:
        return None, f"retrieval is compared with popularity by one list per user; {reason}"
    events = ranks.run_on_all(lambda: read_events(config, "validation", most))
    if not len(events):
        return None, ""
    _, items = popularity_of(config.paths.of("features"), config.schema)
    name = by_event_metric(config)
    measured = rank_metrics(events.popularity_ranks(items[:, 0]), config.evaluate.k)
    reference = Reference("popularity", name, measured[name.removeprefix(BY_EVENT)])
    return PopularityByEvent(replace(events, day=None, positives=None), reference), ""


def by_event_metric(config: Config) -> str:
    """Return the name of the metric by which retrieval by event is compared with popularity."""
    return f"{BY_EVENT}hit_rate@{config.evaluate.k[0]}"


def events_obstacle(config: Config) -> str:
    """Return a line that says why retrieval cannot be evaluated event by event, or "" if it can.

    All ranks must call this at the same time.
    """
    return next(filter(None, ranks.gather_objects(obstacle(config))), "")


def popularity_reference(config: Config, metric: str) -> tuple[Reference, list[str]]:
    """Measure retrieval by popularity on the validation split.

    All ranks must call this at the same time.

    Returns:
        The reference, and notes about the queries. If no user has a relevant item, the value of the
        reference is NaN, and a note gives the reason.
    """
    features, seen = config.paths.of("features"), config.evaluate.seen
    queries = RetrievalQueries.read(features, "validation", seen)
    metrics = queries.metrics(*popularity_of(features, config.schema), config.evaluate.k)
    notes = queries.notes("validation", seen)
    return Reference("popularity", metric, float(metrics[metric])), notes


def popularity_of(features: Location, schema: Schema) -> tuple[Array, Array]:
    """Return vectors of users and items, [n, 1] each, whose inner products are the popularity.

    Popularity is the number of positive training rows.
    """
    counted = schema.own_name("train_count")
    items = read_table(features / "items.parquet", [counted])[counted].to_numpy()
    users = np.ones((read_metadata(features / "users.parquet").num_rows, 1))
    return users, items[:, None].astype(np.float64)
