"""The stage ``samples``: join tables, label and split rows, draw negatives, build histories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.data_sections import Samples
from hvdrec.config.schema import Side
from hvdrec.config.structure import to_dict
from hvdrec.errors import invalid_file, invalid_value
from hvdrec.parallel.progress import print_line
from hvdrec.samples.columns import group_ids, is_list
from hvdrec.samples.engine import INTERNAL, Engine, connect, visible
from hvdrec.samples.history import EventLog, UserTimes
from hvdrec.samples.join import ROW, JoinedTable, LabelJoin
from hvdrec.samples.label_tables import META, UNSETTLED
from hvdrec.samples.matches import report_matches
from hvdrec.samples.negatives import draw_negatives
from hvdrec.samples.rows import (
    KeyCodes,
    LabelledRows,
    collect_rows,
    concatenate_rows,
    time_values,
)
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.split import (
    SPLITS,
    STATES,
    count_copies,
    shuffled,
    split_rows,
    user_states,
)
from hvdrec.samples.write import (
    Entities,
    Histories,
    entity_tables,
    write_split,
    write_table,
    write_users,
)
from hvdrec.storage.artifacts import write_artifact
from hvdrec.storage.urls import as_location

DRAWN_ROWS = 2_097_152
"""Number of sampled negatives that are joined at a time, to bound memory."""
DRAWN, OF = f"{INTERNAL}drawn", f"{INTERNAL}of"
"""Internal columns of sampled negatives: row number of the negative, and of its positive row."""
Array = NDArray[Any]


@dataclass(frozen=True)
class SamplesResult:
    """The samples that `make_samples` wrote.

    Attributes:
        path: Directory of the artifact.
        rows: Split -> number of samples.
        positives: Split -> number of samples with label 1.
        users: Number of users.
        items: Number of items.
        matches: Configuration key of a joined table -> its "file", the number of "rows" of the log,
            and how many of them have a "matched" row in the table.
        warnings: A line for each thing that looks wrong in the raw tables.
        label_join: Counts of the label join: "exposures", "feedback" (name -> what became of its
            rows), and "end", the end of the log in microseconds. Empty without
            [[samples.feedback]].
    """

    path: str
    rows: Mapping[str, int]
    positives: Mapping[str, int]
    users: int
    items: int
    matches: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...] = ()
    label_join: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _SplitRows:
    """n labelled rows, their users and items as numbers, and the split and time of each row."""

    rows: LabelledRows
    users: KeyCodes
    items: KeyCodes
    split: Array
    time: Array | None


def make_samples(
    config: Config, *, overwrite: bool = False, progress: bool = True
) -> SamplesResult:
    """Make labelled, split samples from raw tables and write them to ``paths.samples``.

    The tables are joined and the rows are labelled and split. Then negatives are drawn: each has
    the split and the columns of its positive row, except the item, and is joined like other rows.
    The result does not depend on the order of rows in the files.

    The samples also contain a table of users and one of items. A feature of an item that is not in
    the raw table of items is taken from the item's latest training row. The same holds for users,
    with one table for each of `STATES`, from the latest row of the splits that it includes.

    Args:
        config: Configuration of the run.
        overwrite: Replace existing samples once the new ones are complete.
        progress: Print lines of progress on standard error.

    Raises:
        UserError: A table or an option is invalid. Existing samples are then unchanged.
    """
    spec = SampleSpec.of(config)
    spec.require_time()
    path, notify = config.paths.of("samples"), print_line if progress else lambda line: None
    meta: dict[str, Any] = {"config": to_dict(config)}
    with (
        write_artifact(path, "samples", meta, overwrite=overwrite) as draft,
        connect(spec.samples.tables) as engine,
    ):
        notify("reading and joining tables")
        join = _open_join(config, engine, draft, meta, notify)
        joined = join.join(join.interactions)
        logged = _label_and_split(join, joined, notify)
        meta["matches"] = report_matches(join, joined, logged.rows, notify)
        samples = logged
        if spec.samples.negatives.per_positive:
            samples = _add_negatives(join, logged, notify)
        histories = _build_histories(spec, samples)
        _require_known_labels(spec, samples)
        meta["columns"] = [*joined.origin]
        meta["user_states"] = user_states(spec.samples.split.method)
        meta["copies"] = _count_copies(spec.samples, logged, notify)
        meta |= _write_splits(draft, spec, samples, histories, notify)
        latest_last = [_rows_in_order(logged, state) for state in STATES]
        sides: tuple[tuple[Side, str, KeyCodes], ...] = (
            ("user", spec.samples.user, samples.users),
            ("item", spec.samples.item, samples.items),
        )
        for side, key, codes in sides:
            # There is one table of items, after the training rows, and one of users for each state.
            orders = latest_last[:1] if side == "item" else latest_last
            entities = Entities.of(side, key, codes, orders)
            tables = entity_tables(join, joined, samples.rows, entities)
            meta[f"{side}s"] = len(tables[0])
            notify(f"{len(tables[0])} {side}s")
            if side == "item":
                write_table(draft / "items.parquet", tables[0])
            else:
                write_users(draft, spec, tables, histories)
    return _result(path, meta, engine.warnings)


def _result(path: Path, meta: Mapping[str, Any], warnings: Sequence[str]) -> SamplesResult:
    names = ("rows", "positives", "users", "items", "matches")
    facts = {name: meta[name] for name in names}
    return SamplesResult(
        path=str(path), warnings=tuple(warnings), label_join=meta.get(META, {}), **facts
    )


def _open_join(
    config: Config, engine: Engine, draft: Path, meta: dict[str, Any], notify: Callable[[str], None]
) -> LabelJoin:
    """Open all tables; join and count the feedback, and save what is not settled."""
    spec, raw = SampleSpec.of(config), as_location(config.paths.raw)
    join = LabelJoin.open(engine, spec, raw, notify)
    if join.labelled:
        meta[META] = join.labelled.facts
        join.labelled.save(engine, draft / UNSETTLED, notify)
    return join


def _label_and_split(
    join: LabelJoin, joined: JoinedTable, notify: Callable[[str], None]
) -> _SplitRows:
    """Compute the labelled interactions and assign each to a split."""
    samples = join.spec.samples
    rows = collect_rows(join, joined)
    if not len(rows.label):
        if samples.drop:
            problem = f"removes every row of {join.file}"
            raise invalid_value("samples.drop", samples.drop, problem, "keep some rows")
        raise invalid_file(join.file, "the table is empty", "provide rows")
    notify(f"{len(rows.label)} labelled rows, {int(rows.label.sum())} positive")
    time = None
    if name := samples.time:
        time = time_values(joined.origin[name], name, "samples.time", rows.raw[name])
    users = KeyCodes.of(rows.columns[samples.user])
    items = KeyCodes.of(rows.columns[samples.item])
    column = samples.split.column or samples.time
    order = _split_order(samples, joined, rows, time)
    split = split_rows(samples.split, users.code, order, column)
    return _SplitRows(rows, users, items, split, time)


def _split_order(
    samples: Samples, joined: JoinedTable, rows: LabelledRows, time: Array | None
) -> Array | None:
    """Return the numbers [n] by which the split orders rows; None if the split ignores time."""
    split = samples.split
    if split.method != "temporal":
        return time
    name = split.column or samples.time
    array = rows.raw[name]
    if split.boundaries and pa.types.is_temporal(array.type):
        problem = f"column '{name}' is {array.type}, boundaries are numbers"
        example = f'samples.derive.day = "epoch({name}) / 86400"'
        remedy = f"derive a number, for example {example}, and name it in samples.split.column"
        raise invalid_value("samples.split.boundaries", list(split.boundaries), problem, remedy)
    if not split.column:
        return time
    return time_values(joined.origin[name], name, "samples.split.column", array)


def _add_negatives(
    join: LabelJoin, logged: _SplitRows, notify: Callable[[str], None]
) -> _SplitRows:
    """Append sampled negatives; each has the split and the time of its positive row."""
    _require_item_tables(join)
    samples, rows = join.spec.samples, logged.rows
    negatives = samples.negatives
    within = group_ids([rows.raw[c] for c in negatives.within], len(rows.label))
    positive = np.flatnonzero(rows.label == 1)
    users, items = logged.users.code, logged.items.code
    index, item = draw_negatives(
        within, users, items, positive, negatives.per_positive, negatives.seed
    )
    keys = logged.items.values.take(pa.array(item))
    drawn, of = _join_negatives(join, rows.number, positive[index], keys)
    notify(f"{len(of)} negatives drawn")
    both = concatenate_rows([rows, *drawn])
    return _SplitRows(
        both,
        KeyCodes.of(both.columns[samples.user]),
        KeyCodes.of(both.columns[samples.item]),
        np.concatenate([logged.split, logged.split[of]]),
        None if logged.time is None else np.concatenate([logged.time, logged.time[of]]),
    )


def _require_item_tables(join: LabelJoin) -> None:
    """Raise UserError if a feature of items is a column of the interactions.

    A sampled negative, which is another item, would get the value of its positive row.
    """
    columns = set(visible(join.interactions)) - {join.spec.samples.item}
    for feature in join.spec.features:
        if feature.side == "item" and feature.name in columns:
            problem = f"has side 'item' but is a column of {join.file}"
            remedy = (
                "with samples.negatives, columns of items must come from samples.items or "
                "samples.joins"
            )
            raise invalid_value("features.name", feature.name, problem, remedy)


def _join_negatives(
    join: LabelJoin, number: Array, of: Array, keys: pa.Array
) -> tuple[list[LabelledRows], Array]:
    """Build the rows of m sampled negatives, a bounded number at a time, and join them.

    Args:
        join: The raw tables.
        number: Row number of each of the n interactions, int64 [n].
        of: Index, among the interactions, of each negative's positive row, int64 [m].
        keys: Key of each negative's item [m].

    Returns:
        The negatives that ``samples.drop`` does not remove, and their entries of `of`.
    """
    item = join.spec.samples.item
    first = int(number.max()) + 1
    numbers = first + np.arange(len(of))
    context = join.interactions.drop(item)
    parts = []
    for start in range(0, len(of), DRAWN_ROWS):
        part = slice(start, start + DRAWN_ROWS)
        columns = {DRAWN: numbers[part], OF: number[of[part]], item: keys[part]}
        pairs = join.engine.register(pa.table(columns))
        interactions = pairs.inner_join(context, pairs[OF] == context[ROW])
        interactions = interactions.drop(OF, ROW).rename({ROW: DRAWN})
        joined = join.join(interactions, known=(item,))
        parts.append(collect_rows(join, joined, negatives=True))
    kept = [np.zeros(0, dtype=np.int64), *(part.number - first for part in parts)]
    return parts, of[np.concatenate(kept)]


def _build_histories(spec: SampleSpec, samples: _SplitRows) -> Histories:
    """Collect the events of all histories, for each state."""
    options, rows, user = spec.samples, samples.rows, samples.users.code
    # If the samples have no times, they have no histories, so any times will do.
    times = UserTimes.of(user, np.zeros_like(user) if samples.time is None else samples.time)

    def events(allowed: Array) -> dict[str, EventLog]:
        logs = {}
        for history, chosen in zip(options.history, rows.events, strict=True):
            values = rows.columns[history.column or options.item]
            code = None if history.repeats else group_ids([values], len(values))
            known = values.is_valid().to_numpy(zero_copy_only=False)
            logs[history.name] = EventLog.of(values, times, chosen & allowed & known, code)
        return logs

    return Histories(times, {s: events(samples.split <= i) for i, s in enumerate(STATES)})


def _require_known_labels(spec: SampleSpec, samples: _SplitRows) -> None:
    """Raise UserError for a task whose label is unknown (NULL) in every training row."""
    for i, (task, label) in enumerate(zip(spec.tasks, samples.rows.tasks, strict=True)):
        if np.isnan(label[samples.split == 0]).all():
            problem = "is NULL in every training row"
            remedy = "correct the expression or leave the task out"
            raise invalid_value(f"tasks[{i}].label", task.label, problem, remedy)


def _write_splits(
    draft: Path,
    spec: SampleSpec,
    samples: _SplitRows,
    histories: Histories,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Write all splits: training rows shuffled, the others sorted by time.

    Returns counts of rows and of positives for the ``meta`` of the manifest.
    """
    rows, time = samples.rows, samples.time
    counts: dict[str, Any] = {"rows": {}, "positives": {}}
    if spec.tasks:
        counts["tasks"] = {task.name: {} for task in spec.tasks}
    for number, name in enumerate(SPLITS):
        chosen = np.flatnonzero(samples.split == number)
        if number == 0:
            chosen = chosen[shuffled(len(chosen), spec.samples.split.seed + 1)]
        elif time is not None:
            chosen = chosen[np.argsort(time[chosen], kind="stable")]
        positives = int(rows.label[chosen].sum())
        counts["rows"][name], counts["positives"][name] = len(chosen), positives
        notify(f"{name}: {len(chosen)} rows, {positives} positive")
        for task, label in zip(spec.tasks, rows.tasks, strict=True):
            known = label[chosen][~np.isnan(label[chosen])]
            of_task = {"rows": len(known), "positives": int(known.sum())}
            counts["tasks"][task.name][name] = of_task
            notify(f"{name}: {task.name}: {len(known)} rows, {of_task['positives']} positive")
        write_split(draft / name, spec, rows, chosen, histories)
    return counts


def _rows_in_order(logged: _SplitRows, state: str) -> Array:
    """Return the numbers of the log's rows in the splits that `state` includes, in time order.

    Sampled negatives are not in the log: they tell nothing about the user.
    """
    rows = np.flatnonzero(logged.split <= STATES.index(state))
    return rows if logged.time is None else rows[np.argsort(logged.time[rows], kind="stable")]


def _count_copies(
    samples: Samples, logged: _SplitRows, notify: Callable[[str], None]
) -> dict[str, int]:
    """Count the rows of validation and test that are exact copies of rows in earlier splits.

    Copies have the same user, item, time and label. If there are no times, they have the same
    label and the same values in all columns that are not lists.
    """
    rows = logged.rows
    if samples.time:
        by = "user, item, time and label"
        columns = [rows.columns[samples.user], rows.columns[samples.item], rows.raw[samples.time]]
    else:
        by = "user, item, label and all single-valued features"
        columns = [array for array in rows.columns.values() if not is_list(array.type)]
    group = group_ids([*columns, pa.array(rows.label)], len(rows.label))
    copies = count_copies(group, logged.split)
    for name, number in copies.items():
        if number:
            notify(f"{name}: {number} rows are exact copies of rows of earlier splits (equal {by})")
    return copies
