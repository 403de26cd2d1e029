"""The stage ``samples``: join tables, label and split rows, draw negatives, build histories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvdrec.config import Config
from hvdrec.config.data_sections import Samples
from hvdrec.config.structure import to_dict
from hvdrec.errors import invalid_value, unknown_name, write_errors_named
from hvdrec.parallel.progress import print_line
from hvdrec.samples.engine import Engine, connect
from hvdrec.samples.entities import write_items, write_users
from hvdrec.samples.join import LABEL, JoinedTable, LabelJoin, task_label
from hvdrec.samples.label_tables import META, UNSETTLED
from hvdrec.samples.matches import report_matches
from hvdrec.samples.row_plan import SPLIT, Plan, make_plan
from hvdrec.samples.rows import SortedRows, sort_rows, with_originals
from hvdrec.samples.sampled import add_negatives
from hvdrec.samples.spec import SampleSpec
from hvdrec.samples.split import SPLITS, user_states
from hvdrec.samples.sql import quoted
from hvdrec.samples.write import planned_rows, write_splits
from hvdrec.storage.artifacts import write_artifact
from hvdrec.storage.drafts import scratch_directory
from hvdrec.storage.urls import as_location

ENGINES = ("duckdb", "spark")


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
            and the number of these rows that "matched" a row of the table.
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


def make_samples(
    config: Config, *, engine: str = "duckdb", overwrite: bool = False, progress: bool = True
) -> SamplesResult:
    """Make labelled, split samples from raw tables and write them to ``paths.samples``.

    The tables are joined and the rows are labelled and split. Then negatives are drawn: each has
    the split of its positive row and copies its columns, except the item. The tables of items are
    joined to negatives as to other rows. The result does not depend on the order of rows in the
    files.

    The samples also contain tables of users and items. A feature of items that is not in the raw
    table of items is taken from the item's latest training row. There is one table of users for
    each state in `STATES`: a feature of users that is not in the raw table of users is taken from
    the user's latest row in the splits that the state includes.

    Args:
        config: Configuration of the run.
        engine: One of `ENGINES`: "duckdb" works in this process. "spark" joins and labels the rows
            in the executors of Spark, which must see the raw tables and the temporary files.
        overwrite: Replace existing samples once the new ones are complete.
        progress: Print lines of progress on standard error.

    Raises:
        UserError: A table or an option is invalid. Existing samples are then unchanged.
    """
    spec = SampleSpec.of(config)
    spec.require_time()
    path, samples = config.paths.of("samples"), spec.samples
    notify = print_line if progress else lambda line: None
    meta: dict[str, Any] = {"config": to_dict(config)}
    with (
        write_artifact(path, "samples", meta, overwrite=overwrite) as draft,
        _scratch(path, samples.temp_dir) as folder,
        _connect(engine, samples, folder) as opened,
    ):
        notify("reading and joining tables")
        join = LabelJoin.open(opened, spec, as_location(config.paths.raw), notify)
        if join.labelled:
            meta[META] = join.labelled.facts
            join.labelled.save(opened, draft / UNSETTLED, notify)
        source = join.interactions
        joined = join.join(
            with_originals(spec, source) if samples.negatives.per_positive else source
        )
        rows = sort_rows(join, joined)
        meta |= _write(draft, folder, join, joined, rows, notify)
    names = ("rows", "positives", "users", "items", "matches")
    facts = {name: meta[name] for name in names}
    label_join, warnings = meta.get(META, {}), tuple(opened.warnings)
    return SamplesResult(path=str(path), warnings=warnings, label_join=label_join, **facts)


def _connect(engine: str, samples: Samples, folder: Path) -> AbstractContextManager[Engine]:
    """Open an engine by its name."""
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if engine == "duckdb":
        return connect(samples.tables, samples.memory_gb, folder)
    from hvdrec.samples.spark_engine import connect_spark

    return connect_spark(samples.tables, samples.memory_gb, folder)


@contextmanager
def _scratch(path: Path, temp_dir: str) -> Iterator[Path]:
    """Yield a directory for temporary files: beside the samples, or in `temp_dir`."""
    place = path.with_name(f"{path.name}-temporary")
    if temp_dir:
        place = Path(temp_dir) / f"hvdrec-{path.name}"
    with write_errors_named(place), scratch_directory(place, 0o700) as folder:
        yield folder


def _write(
    draft: Path,
    folder: Path,
    join: LabelJoin,
    joined: JoinedTable,
    rows: SortedRows,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Split the rows, add negatives, and write all files; return the ``meta`` of the manifest."""
    spec = rows.spec
    positive = rows.engine.one(f"SELECT CAST(sum({LABEL}) AS BIGINT) AS n FROM {rows.name}")["n"]
    notify(f"{rows.count} labelled rows, {positive} positive")
    plan = make_plan(rows, folder, notify)
    meta: dict[str, Any] = {"matches": report_matches(join, joined, rows, notify)}
    negatives = None
    if spec.samples.negatives.per_positive:
        negatives = add_negatives(join, rows, plan, folder, notify)
    _require_known_labels(rows, plan)
    meta["columns"] = [*joined.origin]
    meta["user_states"] = user_states(spec.samples.split.method)
    meta["copies"] = _count_copies(rows, plan, notify)
    meta |= write_splits(draft, rows, plan, negatives, notify)
    for side, write in (("users", write_users), ("items", write_items)):
        meta[side] = write(draft, join, joined, rows, plan)
        notify(f"{meta[side]} {side}")
    return meta


def _require_known_labels(rows: SortedRows, plan: Plan) -> None:
    """Raise UserError for a task whose label is unknown (NULL) in every training row."""
    for i, task in enumerate(rows.spec.tasks):
        query = planned_rows(rows, plan, [task_label(i), SPLIT])
        known = rows.engine.one(
            f"SELECT count({task_label(i)}) AS n FROM ({query}) WHERE {SPLIT} = 0"
        )
        if not known["n"]:
            problem = "is NULL in every training row"
            remedy = "correct the expression or leave the task out"
            raise invalid_value(f"tasks[{i}].label", task.label, problem, remedy)


def _count_copies(rows: SortedRows, plan: Plan, notify: Callable[[str], None]) -> dict[str, int]:
    """Count the rows of validation and test that are exact copies of rows in earlier splits.

    Copies have the same user, item, time and label. If there are no times, they have the same
    label and the same values in all columns that are not lists.
    """
    samples, columns = rows.spec.samples, rows.spec.columns
    if samples.split.method == "temporal" and samples.split.column in ("", samples.time):
        return dict.fromkeys(SPLITS[1:], 0)  # rows of one time are in one split
    if samples.time:
        by = "user, item, time and label"
        columns = [samples.user, samples.item, samples.time]
    else:
        by = "user, item, label and all single-valued features"
        columns = [name for name in columns if not rows.table[name].type().is_array()]
    query = planned_rows(rows, plan, [*columns, LABEL, SPLIT])
    names = ", ".join(quoted(c) for c in [*columns, LABEL])
    counts = ", ".join(
        f"CAST(coalesce(sum(c{i}) FILTER (first < {i}), 0) AS BIGINT) AS c{i}" for i in (1, 2)
    )
    found = rows.engine.one(
        f"SELECT {counts} FROM (SELECT min({SPLIT}) AS first, "
        f"count(*) FILTER ({SPLIT} = 1) AS c1, count(*) FILTER ({SPLIT} = 2) AS c2 "
        f"FROM ({query}) GROUP BY {names})"
    )
    copies = {SPLITS[i]: int(found[f"c{i}"]) for i in (1, 2)}
    for name, number in copies.items():
        if number:
            notify(f"{name}: {number} rows are exact copies of rows of earlier splits (equal {by})")
    return copies
