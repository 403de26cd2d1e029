"""Add sampled negatives: draw items for the positive rows, and join the tables of these items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.errors import invalid_value
from hvdrec.samples.engine import INTERNAL, visible
from hvdrec.samples.join import LABEL, LabelJoin
from hvdrec.samples.negatives import Block, Candidates, draw_negatives
from hvdrec.samples.row_plan import NUMBER, USER, Plan
from hvdrec.samples.rows import SortedRows, original, select_labelled
from hvdrec.samples.sql import literal, quoted
from hvdrec.samples.write import plan_columns, planned_rows

GROUP, CODE = f"{INTERNAL}group", f"{INTERNAL}code"
"""Columns with the number of a row's context (see `negatives`), and the code of its item."""
POSITIVE, OF, DRAWN = f"{INTERNAL}positive", f"{INTERNAL}of", f"{INTERNAL}drawn"
"""Column that is true for positive rows; columns with the number of a negative's positive row, and
with the number of the negative itself."""
BLOCK_ROWS = 524_288
Array = NDArray[Any]


def add_negatives(
    join: LabelJoin,
    rows: SortedRows,
    plan: Plan,
    folder: Path,
    notify: Callable[[str], None],
) -> str:
    """Draw negatives and store them in the engine, with the columns of the rows and of the plan.

    A negative has the columns of its positive row, except the item and the columns that are joined
    by it.

    Args:
        join: The raw tables.
        rows: The labelled rows.
        plan: Their splits and histories.
        folder: Directory for temporary files.
        notify: Called with lines of progress.

    Returns:
        The name of the table.

    Raises:
        UserError: A feature of items is a column of the interactions.
    """
    _require_item_tables(join)
    engine, samples = rows.engine, rows.spec.samples
    item, negatives = quoted(samples.item), samples.negatives
    items = engine.store(
        f"SELECT {item}, row_number() OVER (ORDER BY {item}) - 1 AS {CODE} "
        f"FROM (SELECT DISTINCT {item} FROM {rows.name})"
    ).get_name()
    pairs = _store_pairs(rows, plan, items)
    candidates = _candidates(rows, pairs, folder)
    drawn = folder / "drawn.parquet"
    fields = pa.schema([(OF, pa.int64()), (DRAWN, pa.int64()), (CODE, pa.int64())])
    with pq.ParquetWriter(drawn, fields, compression="lz4") as writer:
        for block in _blocks(rows, pairs):
            row, code = draw_negatives(candidates, block, negatives.per_positive, negatives.seed)
            of = block.number[row]
            # The numbers of rows are below rows.count, so no row or other negative has this one.
            nth = np.arange(len(row)) - np.searchsorted(row, row)
            number = rows.count + of * negatives.per_positive + nth
            writer.write_table(pa.table([of, number, code], schema=fields))
    engine.connection.execute(f"DROP TABLE {pairs}")
    name = _join_drawn(join, rows, plan, drawn, items)
    count = engine.one(f"SELECT count(*) AS n FROM {name}")["n"]
    notify(f"{count} negatives drawn")
    return name


def _require_item_tables(join: LabelJoin) -> None:
    """Raise UserError if a feature of items is a column of the interactions.

    A sampled negative copies the columns of its positive row, so it would get the value of the
    wrong item.
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


def _store_pairs(rows: SortedRows, plan: Plan, items: str) -> str:
    """Store the group, user, item and number of each row; return the name of the table."""
    samples, engine = rows.spec.samples, rows.engine
    within = [quoted(column) for column in samples.negatives.within]
    item = quoted(samples.item)
    columns = [samples.item, *samples.negatives.within, LABEL, NUMBER, USER]
    source = f"({planned_rows(rows, plan, columns)}) AS r JOIN {items} AS i "
    source += f"ON r.{item} = i.{item}"
    group = "0"
    if within:
        names = ", ".join(within)
        groups = engine.store(
            f"SELECT {names}, row_number() OVER (ORDER BY {names}) - 1 AS {GROUP} "
            f"FROM (SELECT DISTINCT {names} FROM {rows.name})"
        ).get_name()
        equal = " AND ".join(f"r.{name} IS NOT DISTINCT FROM g.{name}" for name in within)
        source, group = f"{source} JOIN {groups} AS g ON {equal}", f"g.{GROUP}"
    stored = engine.store(
        f"SELECT {group} AS {GROUP}, {USER}, {CODE}, {NUMBER}, {LABEL} = 1 AS {POSITIVE} "
        f"FROM {source}"
    )
    return str(stored.get_name())


def _candidates(rows: SortedRows, pairs: str, folder: Path) -> Candidates:
    """Write the distinct items of each group to a file, and map it into memory."""
    file, count = folder / "candidates", 0
    sizes = np.zeros(1, dtype=np.int64)
    query = f"SELECT DISTINCT {GROUP}, {CODE} FROM {pairs} ORDER BY ALL"
    with file.open("wb") as opened, closing(rows.engine.stream(query)) as batches:
        for batch in batches:
            opened.write(batch.column(CODE).to_numpy().astype(np.int32).data)
            group = batch.column(GROUP).to_numpy()
            sizes = np.pad(sizes, (0, max(0, int(group[-1]) + 1 - len(sizes))))
            sizes += np.bincount(group, minlength=len(sizes))
            count += len(batch)
    item = np.asarray(np.memmap(file, dtype=np.int32, mode="r", shape=(count,)))
    return Candidates(item, np.concatenate([[0], np.cumsum(sizes)]))


def _blocks(rows: SortedRows, pairs: str) -> Iterator[Block]:
    """Read the rows in blocks that hold all rows of each pair of group and user."""
    query = f"SELECT * FROM {pairs} ORDER BY {GROUP}, {USER}, {NUMBER}"
    held: list[pa.RecordBatch] = []
    with closing(rows.engine.stream(query, BLOCK_ROWS)) as batches:
        for batch in batches:
            group, user = (batch.column(c).to_numpy() for c in (GROUP, USER))
            last = (group == group[-1]) & (user == user[-1])
            cut = int(np.argmax(last))
            complete = [*held, batch.slice(0, cut)]
            first = held[0].slice(0, 1).to_pylist()[0] if held else None
            if cut == 0 and first and (first[GROUP], first[USER]) == (group[0], user[0]):
                held.append(batch)  # the whole batch belongs to the pair before
                continue
            yield _block(complete)
            held = [batch.slice(cut)]
    if held:
        yield _block(held)


def _block(batches: list[pa.RecordBatch]) -> Block:
    table = pa.Table.from_batches(batches)
    group, user, item, number = (
        table.column(c).to_numpy().astype(np.int64) for c in (GROUP, USER, CODE, NUMBER)
    )
    return Block(number, group, user, item, table.column(POSITIVE).to_numpy())


def _join_drawn(join: LabelJoin, rows: SortedRows, plan: Plan, drawn: Path, items: str) -> str:
    """Join the tables to the drawn items; return the name of the stored negatives."""
    engine, item = rows.engine, rows.spec.samples.item
    context = [column for column in join.interactions.columns if column != item]
    copied = ", ".join(f"r.{quoted(original(rows.spec, c))} AS {quoted(c)}" for c in context)
    plans = ", ".join(f"p.{c}" for c in plan_columns(rows.spec) if c != NUMBER)
    query = (
        f"SELECT i.{quoted(item)}, {copied + ', ' if copied else ''}{plans}, d.{DRAWN} AS {NUMBER} "
        f"FROM read_parquet({literal(str(drawn))}) AS d "
        f"JOIN read_parquet({literal(str(plan.file))}) AS p ON p.{NUMBER} = d.{OF} "
        f"JOIN {rows.name} AS r ON r.rowid = d.{OF} JOIN {items} AS i ON i.{CODE} = d.{CODE}"
    )
    interactions = engine.view(query)
    joined = join.join(interactions, known=(item,))
    labelled = select_labelled(join, joined, negatives=True, extra=plan_columns(rows.spec))
    return str(engine.keep(labelled).get_name())
