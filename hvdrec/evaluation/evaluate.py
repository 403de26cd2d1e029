"""Evaluate a model on a split; the ranks share the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config import Config
from hvdrec.data.collate import table_arrays
from hvdrec.data.loader import ShardLoader
from hvdrec.evaluation.compare import CHOICE_USERS, compare
from hvdrec.evaluation.event_metrics import describe_events, rank_metrics
from hvdrec.evaluation.events import Events, RankedEvents, read_events, user_rows
from hvdrec.evaluation.held_out import RetrievalQueries, ScoredRows, part_of, user_state
from hvdrec.evaluation.item_item import LARGEST_CATALOGUE
from hvdrec.evaluation.popularity import (
    PopularityByEvent,
    by_event_metric,
    events_obstacle,
    popularity_of,
)
from hvdrec.evaluation.references import (
    BY_EVENT,
    LabelFacts,
    Reference,
    describe_worse,
    label_facts,
    worse_than,
)
from hvdrec.features.sample_checks import check_task_labels
from hvdrec.models.embedding import BatchRows
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.samples.split import user_states
from hvdrec.storage.artifacts import Manifest, read_manifest
from hvdrec.storage.parquet import read_table

Array = NDArray[Any]
FetchRows = Callable[[Mapping[str, Tensor]], BatchRows]
"""Function that looks up the table rows of a batch, for a model without its embedding tables."""
BLOCK = 8192
"""Number of users or items that are embedded at a time."""
OLD_FEATURES = (
    "retrieval: users are as of the end of training, without their validation rows, because an "
    "earlier version wrote the features; run hvdrec samples and hvdrec prepare with --overwrite"
)
SAMPLED_IS_BIASED = (
    "events, sampled: metrics over a few sampled items are biased and may order models wrongly; "
    "use them only to compare with papers that report them"
)


@dataclass(frozen=True)
class Measured:
    """What was measured on a split.

    Attributes:
        report: Name -> value, for the fields of `EvaluationResult` except ``run`` and
            ``checkpoint``. Fields that do not apply are missing. ``notes`` says what is left out,
            and why a metric is not defined.
        rows: The scored rows; None without a ranker.
        events: The events with their ranks; None if retrieval was not measured by event.
    """

    report: dict[str, Any]
    rows: ScoredRows | None
    events: RankedEvents | None


def measure_model(
    model: Recommender,
    config: Config,
    split: str = "test",
    *,
    with_baselines: bool = True,
    ease_items: int = LARGEST_CATALOGUE,
    fetch_rows: FetchRows | None = None,
) -> Measured:
    """Measure a model and the baselines on a split; all ranks return the same report.

    Args:
        model: The model.
        config: Configuration of the run that trained it.
        split: The split to measure on.
        with_baselines: True to measure the baselines on the same rows and users.
        ease_items: Largest number of items for which EASE is fitted.
        fetch_rows: Function that looks up table rows; None if the model has its tables.
    """
    features = config.paths.of("features")
    manifest = ranks.run_on_all(lambda: read_manifest(features, "features"))
    ranks.run_on_all(lambda: check_task_labels(features, manifest, config.tasks, "hvdrec prepare"))
    model.eval()
    report: dict[str, Any] = {"split": split}
    notes = _copies_note(manifest, split)
    rows: ScoredRows | None = None
    if config.train.objective != "retrieval":
        rows, metrics, tasks = _ranking(model, config, split, fetch_rows)
        report |= {"ranking": metrics} | ({"tasks": tasks} if tasks else {})
        notes += rows.notes(split)
    queries: RetrievalQueries | None = None
    events: RankedEvents | None = None
    if config.train.objective != "ranking":
        state = user_state(manifest, split)
        items = embed_side(model, config, "item", fetch_rows)
        queries, report["retrieval"] = _retrieval(model, config, split, items, fetch_rows, state)
        notes += queries.notes(split, config.evaluate.seen)
        if state != user_states(config.samples.split.method)[split]:
            notes.append(OLD_FEATURES)
        events, remarks = _events(model, config, split, items, fetch_rows)
        if events is not None:
            report["events"] = events.events.report(events.ranks["model"], config)
        notes += remarks
    if with_baselines:
        report["baselines"], remarks = compare(config, split, rows, queries, ease_items, events)
        notes += remarks
    if "events" in report:
        notes += _events_notes(report, config)
    report["worse_than"] = _worse_than(config, split, report)
    if report["worse_than"]:
        notes.append(f"the model is worse than {describe_worse(report['worse_than'])}")
    return Measured(report | ({"notes": notes} if notes else {}), rows, events)


def _copies_note(manifest: Manifest, split: str) -> list[str]:
    """Return a line if rows of the split are copies of rows in earlier splits."""
    copies, rows = manifest.meta.get("copies", {}).get(split), manifest.meta["rows"][split]
    if not copies:
        return []
    return [f"{copies} of {rows} {split} rows are exact copies of rows of earlier splits"]


def _worse_than(config: Config, split: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the simple baselines that are better than the model; see `references.worse_than`."""
    worse: list[dict[str, Any]] = []
    if "ranking" in report:
        facts = ranks.broadcast_object(
            ranks.run_on_all(
                lambda: label_facts(config, split).to_dict() if ranks.current().is_first else None
            )
        )
        metrics = {**report["ranking"], "tasks": report.get("tasks", {})}
        worse += worse_than(metrics, LabelFacts.from_dict(facts).references)
    popularity = report.get("baselines", {}).get("popularity", {})
    if "events" in report and "events" in popularity:
        name = by_event_metric(config)
        value = popularity["events"][name.removeprefix(BY_EVENT)]
        worse += worse_than(report, [Reference("popularity", name, value)])
    elif "retrieval" in popularity:
        name = f"recall@{config.evaluate.k[0]}"
        reference = Reference("popularity", name, popularity["retrieval"][name])
        worse += worse_than(report["retrieval"], [reference])
    return worse


def validation_metric(
    model: Recommender,
    config: Config,
    name: str,
    fetch_rows: FetchRows | None = None,
    events: Events | None = None,
) -> tuple[float, dict[str, Any]]:
    """Return the metric `name` on the validation split, and all metrics computed along with it.

    If `name` is a retrieval metric and `events` are given, ``events`` holds their metrics.
    """
    if "@" in name:
        items = embed_side(model, config, "item", fetch_rows)
        _, metrics = _retrieval(model, config, "validation", items, fetch_rows)
        if events is not None:
            rank = event_ranks(model, config, "validation", events, items, fetch_rows)
            metrics["events"] = rank_metrics(rank, config.evaluate.k)
    else:
        _, metrics, tasks = _ranking(model, config, "validation", fetch_rows)
        if tasks:
            metrics |= {"tasks": tasks, "task_auc": task_auc(tasks, config)}
    return float(metrics[name]), metrics


def retrieval_worse_than_popularity(
    model: Recommender, config: Config, by_event: PopularityByEvent | None
) -> list[dict[str, Any]]:
    """Compare retrieval by a model with retrieval by popularity on the validation split.

    A single process calls this, without other ranks.

    Args:
        model: The model, with its tables, in evaluation mode.
        config: Configuration of the run that trained it.
        by_event: Popularity by event; None to compare one list per user, for at most 10,000 users.

    Returns:
        One entry if popularity is better, else an empty list; see `references.worse_than`.
    """
    features, ks = config.paths.of("features"), config.evaluate.k
    with ranks.single_rank():
        items = embed_side(model, config, "item")
        if by_event is not None:
            rank = event_ranks(model, config, "validation", by_event.events, items)
            return worse_than({"events": rank_metrics(rank, ks)}, [by_event.reference])
        seen = config.evaluate.seen
        queries = RetrievalQueries.read(features, "validation", seen, CHOICE_USERS)
        own = queries.metrics(embed_side(model, config, "user"), items, ks)
        popularity = queries.metrics(*popularity_of(features, config.schema), ks)
    name = f"recall@{ks[0]}"
    return worse_than(own, [Reference("popularity", name, popularity[name])])


def task_auc(tasks: Mapping[str, Any], config: Config) -> float:
    """Return the mean of the tasks' AUCs, weighted by ``tasks.share``; NaN if none is defined."""
    pairs = [(tasks[task.name]["auc"], task.share) for task in config.tasks]
    defined = [(auc, share) for auc, share in pairs if not math.isnan(auc)]
    total = sum(share for _, share in defined)
    return sum(auc * share for auc, share in defined) / total if total else math.nan


def score_split(
    model: Recommender, config: Config, split: str, fetch_rows: FetchRows | None = None
) -> ScoredRows:
    """Score every row of a split. Each rank scores a part; all ranks return all rows."""
    world, device = ranks.current(), next(model.parameters()).device
    loader = ShardLoader.from_config(
        config, split, config.evaluate.batch_size, world.rank, world.size, shuffle=False
    )
    parts: list[tuple[Array, ...]] = []
    with torch.inference_mode():
        for host_batch in loader.epoch(0):
            batch = host_batch.to(device)
            rows = fetch_rows(host_batch.features) if fetch_rows is not None else None
            logit = model(batch.features, rows).logit.float()
            columns = [batch.user_index, batch.item_index, batch.label, batch.weight]
            columns.append(model.score(logit))
            if batch.tasks is not None:
                columns += [logit.sigmoid(), batch.tasks]
            parts.append(tuple(column[: batch.rows].cpu().numpy() for column in columns))
    gathered = [ranks.gather_arrays(np.concatenate(column)) for column in zip(*parts, strict=True)]
    if not config.tasks:
        gathered += [np.empty((len(gathered[0]), 0), np.float32)] * 2
    return ScoredRows(*gathered)


def embed_side(
    model: Recommender,
    config: Config,
    side: Literal["user", "item"],
    fetch_rows: FetchRows | None = None,
    state: str = "train",
) -> Array:
    """Return the tower's embeddings of all users (or items), float32 [n, width].

    The ranks share the work. `state`, one of `samples.split.STATES`, names the last split whose
    rows the features of the users include.
    """
    world = ranks.current()
    name = f"{side}s.parquet" if state == "train" else f"{side}s_{state}.parquet"
    table = read_table(config.paths.of("features") / name)
    start, stop = part_of(table.num_rows, world.rank, world.size)
    largest = math.ceil(table.num_rows / world.size)
    mine = _embed(model, config, side, table.slice(start, stop - start), largest, fetch_rows)
    return ranks.gather_arrays(mine)


def _embed(
    model: Recommender,
    config: Config,
    side: Literal["user", "item"],
    table: pa.Table,
    largest: int,
    fetch_rows: FetchRows | None,
) -> Array:
    """Return the tower's embeddings of this rank's rows; no rank has more than `largest` rows."""
    device, features = next(model.parameters()).device, config.schema.side(side)
    represent = model.represent_users if side == "user" else model.represent_items
    blocks: list[Array] = [np.empty((0, model.output_width), np.float32)]
    # All ranks run the same number of steps, because a lookup may need all ranks.
    with torch.inference_mode():
        for step in range(math.ceil(largest / BLOCK)):
            arrays = table_arrays(table.slice(step * BLOCK, BLOCK), features)
            codes = {name: torch.from_numpy(array) for name, array in arrays.items()}
            rows = fetch_rows(codes) if fetch_rows is not None else None
            codes = {name: code.to(device) for name, code in codes.items()}
            vectors = represent(codes, rows)[:, : model.output_width]
            blocks.append(vectors.float().cpu().numpy())
    return np.concatenate(blocks)


def _ranking(
    model: Recommender, config: Config, split: str, fetch_rows: FetchRows | None
) -> tuple[ScoredRows, dict[str, Any], dict[str, Any]]:
    """Return the scored rows of a split, their metrics, and the metrics of each task."""
    rows = score_split(model, config, split, fetch_rows)
    names = [task.name for task in config.tasks]
    metrics = rows.metrics(rows.score, config.evaluate)
    tasks = rows.task_metrics(rows.task_scores, names, config.evaluate) if names else {}
    return rows, metrics, tasks


def _retrieval(
    model: Recommender,
    config: Config,
    split: str,
    items: Array,
    fetch_rows: FetchRows | None,
    state: str = "train",
) -> tuple[RetrievalQueries, dict[str, Any]]:
    """Return the queries of a split, and the model's metrics on them with users as of `state`.

    `items` are the embeddings of all items, [items, width].
    """
    queries = RetrievalQueries.read(config.paths.of("features"), split, config.evaluate.seen)
    users = embed_side(model, config, "user", fetch_rows, state)
    return queries, queries.metrics(users, items, config.evaluate.k)


def _events(
    model: Recommender, config: Config, split: str, items: Array, fetch_rows: FetchRows | None
) -> tuple[RankedEvents | None, list[str]]:
    """Rank the items of the split's events; if there are none, return a line with the reason."""
    if not config.evaluate.events:
        return None, []
    reason = events_obstacle(config)
    if reason:
        return None, [reason]
    events = ranks.run_on_all(lambda: read_events(config, split, config.evaluate.events))
    if not len(events):
        return None, ["events: n/a, no positive row has an item that is new to its user"]
    rank = event_ranks(model, config, split, events, items, fetch_rows)
    return RankedEvents(events, {"model": rank}), []


def event_ranks(
    model: Recommender,
    config: Config,
    split: str,
    events: Events,
    items: Array,
    fetch_rows: FetchRows | None = None,
) -> Array:
    """Return the rank of each event's item by the model, int64 [e]; the ranks share the work.

    `items` are the embeddings of all items, [items, width].
    """
    world = ranks.current()
    mine = events.take(slice(*part_of(len(events), world.rank, world.size)))
    largest = math.ceil(len(events) / world.size)
    users = event_vectors(model, config, split, mine, fetch_rows, largest)
    return ranks.gather_arrays(mine.vector_ranks(users, items))


def event_vectors(
    model: Recommender,
    config: Config,
    split: str,
    events: Events,
    fetch_rows: FetchRows | None = None,
    largest: int = 0,
) -> Array:
    """Return the user tower's embeddings with the features and histories of this rank's events.

    No rank has more than `largest` events; 0 means that this is the only rank.
    """
    rows = ranks.run_on_all(lambda: user_rows(config, split, events.row))
    return _embed(model, config, "user", rows, largest or len(events), fetch_rows)


def _events_notes(report: Mapping[str, Any], config: Config) -> list[str]:
    """Return a sentence about the events, and a warning about sampled metrics."""
    baselines = report.get("baselines", {})
    by_event = {name: each["events"] for name, each in baselines.items() if "events" in each}
    notes = [describe_events(report["events"], by_event, config.evaluate.k[0])]
    return notes + ([SAMPLED_IS_BIASED] if config.evaluate.sampled_negatives else [])
