"""Sections of a report about retrieved items: events, lists, users."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.evaluation.events import Events
from hvdrec.evaluation.held_out import read_interactions
from hvdrec.evaluation.retrieval import rank_catalogue, user_item_matrix
from hvdrec.evaluation.titles import item_titles
from hvdrec.reporting.bootstrap import Interval, difference, intervals, user_weights
from hvdrec.reporting.lists import list_facts
from hvdrec.reporting.page import columns, table, text
from hvdrec.reporting.run_data import RunData

Array = NDArray[Any]
LIST_USERS = 2_000
"""Lists are described for about this number of users."""
USERS_SHOWN, ITEMS_SHOWN, HISTORY_SHOWN = 3, 10, 6


def gains(rank: Array, k: int) -> Array:
    """Return hit rate, NDCG and MRR at k of each event with these ranks, float64 [e, 3]."""
    hit = rank <= k
    return np.where(hit, [np.ones(len(rank)), 1 / np.log2(rank + 1), 1 / rank], 0).T


def events(data: RunData) -> str:
    """Show retrieval event by event, with confidence intervals over users."""
    if data.events is None or not len(data.events):
        return ""
    k = data.config.evaluate.k[0]
    _, user = np.unique(data.events.user, return_inverse=True)
    weights = user_weights(int(user.max()) + 1)
    rows = []
    for name, rank in data.ranks.items():
        cells = [_text(each) for each in intervals(gains(rank, k), user, weights)]
        rows.append([name, *cells])
    headers = ["", f"hit_rate@{k}", f"ndcg@{k}", f"mrr@{k}"]
    shown = {"model": data.result["events"]}
    baselines = data.result.get("baselines", {})
    shown |= {name: each["events"] for name, each in baselines.items() if "events" in each}
    buckets = []
    for bucket, facts in data.result["events"]["by_history"].items():
        values = (each["by_history"][bucket][f"ndcg@{k}"] for each in shown.values())
        buckets.append([bucket, facts["events"], *values])
    return (
        text(
            f"Each of {len(data.events):,} events is ranked with the history before it, as a "
            "request would be. Brackets hold the 95 % interval of a bootstrap over users.",
            "soft",
        )
        + table(headers, rows)
        + f"<h3>ndcg@{k} by the number of items that the user took before</h3>"
        + table(["items before", "events", *shown], buckets)
    )


def compared_metrics(data: RunData, other: RunData) -> str:
    """Show the metrics of two runs beside each other."""
    rows = [
        [name, value, other.result[stage].get(name)]
        for stage in ("ranking", "retrieval")
        if stage in data.result and stage in other.result
        for name, value in data.result[stage].items()
    ]
    return table(["metric", str(data.run), str(other.run)], rows)


def compared(data: RunData, other: RunData) -> str:
    """Show the differences between two runs in retrieval by event, with their significance."""
    if data.events is None or other.events is None:
        return text("Not compared: one of the runs has no evaluation by event.", "none")
    _, mine, theirs = np.intersect1d(data.events.row, other.events.row, return_indices=True)
    if not len(mine):
        return text("Not compared: the runs have no events in common.", "none")
    _, user = np.unique(data.events.user[mine], return_inverse=True)
    weights = user_weights(int(user.max()) + 1)
    k = data.config.evaluate.k[0]
    one, two = (
        gains(each.ranks["model"][rows], k) for each, rows in ((data, mine), (other, theirs))
    )
    rows = []
    for column, name in enumerate(("hit_rate", "ndcg", "mrr")):
        found = difference(one[:, column], two[:, column], user, weights)
        rows.append(
            [
                f"{name}@{k}",
                float(one[:, column].mean()),
                float(two[:, column].mean()),
                f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]",
                f"{found.p_value:.3f}",
                "yes" if found.is_significant else "no",
            ]
        )
    headers = ["event by event", str(data.run), str(other.run), "difference", "p", "significant"]
    return text(f"{len(mine):,} events, bootstrap over users.", "soft") + table(headers, rows)


def lists(data: RunData) -> str:
    """Show coverage, popularity bias, novelty and diversity of the lists of some users."""
    if data.events is None or not len(data.events):
        return ""
    k, found, vectors = data.config.evaluate.k[0], _latest(data.events), data.item_vectors()
    found = found.take(slice(None, None, max(1, len(found) // LIST_USERS)))
    counted = data.config.schema.own_name("train_count")
    count = data.items()[counted].to_numpy().astype(np.float64)
    users = len(np.unique(read_interactions(data.config.paths.of("features"), ["train"]).user))
    seen = _seen(found)
    popular = rank_catalogue(np.ones((len(found), 1)), count[:, None], seen, k)
    shown = {
        "model": rank_catalogue(data.event_vectors(found), vectors, seen, k),
        "popularity": popular,
        "what users took": found.item[:, None],
    }
    facts = {name: list_facts(each, count, users, vectors) for name, each in shown.items()}
    names = {
        "coverage": f"share of the catalogue in at least one list of {k}",
        "popularity": "mean share of training users who took a listed item",
        "novelty": "mean information of a listed item, bits",
        "diversity": "mean distance (1 - cosine) of two items in a list",
        "concentration": "Gini coefficient of how often items are listed",
    }
    rows = [
        [f"{name}: {meaning}", *(getattr(each, name) for each in facts.values())]
        for name, meaning in names.items()
    ]
    return text(f"Lists of {len(found):,} users at their last event.", "soft") + table(
        ["", *facts], rows
    )


def users(data: RunData) -> str:
    """Show the lists of the users with the best and the worst mean NDCG."""
    if data.events is None or not len(data.events):
        return ""
    k = data.config.evaluate.k[0]
    _, user = np.unique(data.events.user, return_inverse=True)
    total = np.bincount(user)
    mean = np.bincount(user, gains(data.ranks["model"], k)[:, 1]) / total
    eligible = np.flatnonzero(total >= min(5, total.max()))
    order = eligible[np.argsort(-mean[eligible], kind="stable")]
    found = _latest(data.events)
    parts = []
    for title, chosen in (("best", order[:USERS_SHOWN]), ("worst", order[::-1][:USERS_SHOWN])):
        chosen_events = found.take(chosen)
        vectors = data.event_vectors(chosen_events)
        best = rank_catalogue(vectors, data.item_vectors(), _seen(chosen_events), ITEMS_SHOWN)
        for event, (items, each) in enumerate(zip(best, chosen, strict=True)):
            key = data.user_key(int(chosen_events.user[event]))
            heading = f"{title}: user {key}, ndcg@{k} {mean[each]:.3f} of {total[each]} events"
            parts.append((heading, _user_lists(data, chosen_events, event, items)))
    return columns(*parts)


def _user_lists(data: RunData, found: Events, event: int, items: Sequence[int]) -> str:
    titles = item_titles(data.config)
    assert data.events is not None
    took = set(data.events.item[data.events.user == found.user[event]].tolist())
    history = found.taken.items[found.taken.start[event] : found.taken.stop[event]]
    latest = [titles[item] for item in history[::-1][:HISTORY_SHOWN]]
    cells = "".join(
        f'<tr><td class="n">{place}</td><td class="{"hit" if item in took else ""}">'
        f"{escape(titles[item])}{' ✓' if item in took else ''}</td></tr>"
        for place, item in enumerate(items, start=1)
        if item >= 0
    )
    before = f"Took before, latest first: {'; '.join(latest) or 'nothing'}."
    return text(before, "soft") + (
        '<div class="scroll"><table><thead><tr><th>rank</th><th>recommended at the last event '
        f"(✓: taken in this split)</th></tr></thead><tbody>{cells}</tbody></table></div>"
    )


def _latest(found: Events) -> Events:
    """Return the last event of each user."""
    last = np.flatnonzero(np.append(np.diff(found.user) != 0, True))
    return found.take(last)


def _seen(found: Events) -> Any:
    row, item = found.seen.flat(0, len(found))
    return user_item_matrix(row, item, len(found), found.items)


def _text(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
