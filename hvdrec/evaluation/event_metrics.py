"""Metrics of retrieval event by event, from the rank of each event's item.

An event has one relevant item: the item of its row. For an event whose item has rank r (1 is the
best) and a cut-off k, hit_rate = 1 if r <= k, else 0 (with one relevant item, recall is the same);
ndcg = 1 / log2(r + 1) if r <= k, else 0; mrr = 1 / r if r <= k, else 0. The metrics are means over
the events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NAMES = ("hit_rate", "ndcg", "mrr")
HISTORY_BUCKETS = {"0": (0, 0), "1-5": (1, 5), "6-50": (6, 50), "51+": (51, np.inf)}
"""Name of a bucket -> smallest and largest number of items that the user took before the event."""


def event_report(
    rank: Array, history: Array, candidates: Array, ks: Sequence[int], negatives: int = 0
) -> dict[str, Any]:
    """Return the metrics over all events, and over the events of each history length.

    Args:
        rank: Rank of each event's item among the candidates, from 1, int64 [n].
        history: Number of items that the event's user took before, int64 [n].
        candidates: Number of items that were ranked for each event, int64 [n].
        ks: Cut-offs.
        negatives: Number of sampled negatives per event for the metrics ``sampled``; 0 to leave
            these metrics out.

    Returns:
        The result of `rank_metrics` for all events, with two more entries: ``by_history`` -> the
        same for each bucket of `HISTORY_BUCKETS`, and ``sampled`` -> the result of
        `sampled_metrics`.
    """
    report: dict[str, Any] = rank_metrics(rank, ks)
    report["by_history"] = {
        name: rank_metrics(rank[(history >= low) & (history <= high)], ks)
        for name, (low, high) in HISTORY_BUCKETS.items()
    }
    if negatives:
        report["sampled"] = sampled_metrics(rank, candidates, ks, negatives)
    return report


def rank_metrics(rank: Array, ks: Sequence[int]) -> dict[str, Any]:
    """Return ``name@k`` -> mean over n events, NaN without events; and the number of ``events``.

    >>> rank_metrics(np.array([1, 3, 20]), [2])
    {'hit_rate@2': 0.3333333333333333, 'ndcg@2': 0.3333333333333333, 'mrr@2': 0.3333333333333333, \
'events': 3}
    """
    metrics: dict[str, Any] = {}
    for k in ks:
        hit = rank <= k
        for name, gain in zip(NAMES, _gains(rank), strict=True):
            metrics[f"{name}@{k}"] = float(np.where(hit, gain, 0).mean()) if len(rank) else np.nan
    return {**metrics, "events": len(rank)}


def sampled_metrics(
    rank: Array, candidates: Array, ks: Sequence[int], negatives: int
) -> dict[str, Any]:
    """Return the expected metrics if an event's item is ranked among sampled negatives only.

    Many papers rank the item among 99 sampled items. Such metrics are biased: they can order models
    differently than the full ranking does (Krichene and Rendle, "On sampled metrics for item
    recommendation", KDD 2020). For an item of rank r among C candidates, r - 1 of the C - 1 other
    candidates are better. The number of these that are among the sampled negatives has a
    hypergeometric distribution. From this distribution, the expected metrics over all samples are
    computed exactly, without drawing a sample.

    Args:
        rank: Rank of each event's item among all its candidates, int64 [n].
        candidates: Number of candidates of each event, int64 [n].
        ks: Cut-offs.
        negatives: Number of sampled negatives of an event; if an event has fewer other candidates,
            all of them are its negatives.
    """
    from scipy.stats import hypergeom

    others = candidates - 1
    drawn = np.minimum(negatives, others)
    metrics: dict[str, Any] = {"negatives": negatives}
    better = np.arange(max(ks))
    chance = hypergeom.pmf(better, others[:, None], (rank - 1)[:, None], drawn[:, None])
    for k in ks:
        for name, gain in zip(NAMES, _gains(better[:k] + 1), strict=True):
            expected = (chance[:, :k] * gain).sum(axis=1)
            metrics[f"{name}@{k}"] = float(expected.mean()) if len(rank) else np.nan
    return metrics


def describe_events(
    model: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]], k: int
) -> str:
    """Say in one sentence how often the model and the best baseline find an event's item.

    Args:
        model: Result of `event_report` for the model.
        baselines: Name of a baseline -> result of `event_report`.
        k: Cut-off.
    """
    name, events = f"hit_rate@{k}", model["events"]
    if not events:
        return ""
    own = model[name]
    text = f"events: the item that the user took next is among the model's first {k} in {own:.1%}"
    best = max(baselines, key=lambda each: baselines[each][name], default="")
    if not best:
        return f"{text} of {events:,} events"
    value = baselines[best][name]
    ratio = f", {own / value:.2f} times as often" if value else ""
    return f"{text} of {events:,} events, with the best baseline ({best}) in {value:.1%}{ratio}"


def _gains(rank: Array) -> tuple[Array, ...]:
    """Return the gain of an item at each rank, by metric in the order of `NAMES`."""
    return np.ones(len(rank)), 1 / np.log2(rank + 1), 1 / rank
