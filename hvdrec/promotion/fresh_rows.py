"""The freshest labelled rows of a run, and the metrics and scores of a bundle on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.schema import FIRST_CODE
from hvdrec.config.sections import Evaluate, Promote
from hvdrec.errors import invalid_file, unknown_name
from hvdrec.evaluation.ranking_metrics import auc, ranking_metrics
from hvdrec.exporting.score_file import score_table
from hvdrec.features.encoder import Encoder
from hvdrec.features.fit import Fitted
from hvdrec.promotion.gate import Measured
from hvdrec.samples.times import DAY, comparable_times, epoch_seconds
from hvdrec.scoring.array_files import read_array
from hvdrec.storage.urls import Location

Array = NDArray[Any]


@dataclass(frozen=True)
class FreshRows:
    """The n newest labelled rows of a run's samples.

    Attributes:
        table: The rows, with all columns of the samples.
        label: Label of each row [n].
        weight: Weight of each row [n].
        user: Number of each row's user, int64 [n].
        newest: Time of the newest row, in seconds since 1970; None if the samples have no times.
    """

    table: pa.Table
    label: Array
    weight: Array
    user: Array
    newest: float | None


def read_fresh_rows(config: Config) -> FreshRows:
    """Read the rows that ``[promote]`` chooses from the samples of a run.

    Raises:
        UserError: There are no samples, or a column in ``promote.slices`` is unknown.
    """
    options, schema, samples = config.promote, config.schema, config.paths.of("samples")
    splits = ("validation", "test") if options.days else ("test",)
    try:
        parts = [ds.dataset(str(samples / s), format="parquet").to_table() for s in splits]
    except (OSError, pa.ArrowInvalid) as error:
        problem = f"cannot be read ({' '.join(str(error).split())})"
        raise invalid_file(samples, problem, "run hvdrec samples with --overwrite") from None
    table = pa.concat_tables(parts)
    for name in options.slices:
        if name not in table.column_names:
            raise unknown_name("promote.slices", name, table.column_names)
    seconds = _seconds(table, schema.own_name("time"))
    if seconds is not None and len(seconds):
        order = np.argsort(seconds, kind="stable")[-options.rows :]
        if options.days:
            order = order[seconds[order] > seconds.max() - options.days * DAY]
        table, seconds = table.take(order), seconds[order]
    else:
        table = table.slice(max(0, table.num_rows - options.rows))
    user = table[schema.user_key].combine_chunks().dictionary_encode().indices
    return FreshRows(
        table,
        table[schema.own_name("label")].to_numpy(),
        table[schema.own_name("weight")].to_numpy(),
        user.to_numpy(zero_copy_only=False).astype(np.int64),
        None if seconds is None or not len(seconds) else float(seconds.max()),
    )


def measure(bundle: Path, rows: FreshRows, config: Config, scratch: Path) -> tuple[Measured, Array]:
    """Score fresh rows from their raw values with a bundle.

    Args:
        bundle: Directory of the bundle: that of the new run, or that of the model that serves.
        rows: The rows.
        config: Configuration of the new run.
        scratch: Directory for temporary files.

    Returns:
        The measured metrics, and the scores [n].
    """
    source, target = scratch / "rows.parquet", scratch / "scored.parquet"
    pq.write_table(rows.table, source)
    # The serving model may have other features than the new run. With `defaults`, the rows may lack
    # columns that its bundle reads, and have columns that it does not know.
    facts = score_table(bundle, source, target, defaults=True)
    score = pq.read_table(target, columns=facts["columns"])[0].to_numpy()
    metrics = _metrics(score, rows, config.evaluate)
    slices = _slices(score, rows, config.promote)
    return Measured(metrics, slices, _catalogue_share(bundle, rows, config)), score


def coverage(features: Location, rows: FreshRows) -> dict[str, dict[str, Any]]:
    """Return the coverage of each feature in the fresh rows.

    Returns:
        Feature -> two entries. ``known`` is the share of rows with a known value; a list needs at
        least one known value. ``varies`` is True if the rows have more than one value.
    """
    encoder, facts = Encoder(Fitted.load(features)), {}
    encoded = encoder.encode(encoder.fitted.schema.features, rows.table)
    for feature in encoder.fitted.schema.features:
        column = encoded[feature.name]
        if feature.is_list:
            known_entries = pc.greater_equal(column.flatten(), FIRST_CODE)
            parents = pc.list_parent_indices(column)
            known = len(pc.unique(parents.filter(known_entries))) / max(1, len(column))
            distinct = len(pc.unique(column.flatten()))
        elif feature.is_embedded:
            known = float(np.mean(column.to_numpy() >= FIRST_CODE)) if len(column) else 0.0
            distinct = len(pc.unique(column))
        else:
            raw = rows.table[feature.name]
            missing = pc.fill_null(pc.is_nan(raw.cast(pa.float64())), True)
            known = 1.0 - float(pc.mean(missing.cast(pa.float64())).as_py() or 0.0)
            distinct = len(pc.unique(column))
        facts[feature.name] = {"known": known, "varies": distinct > 1}
    return facts


def _metrics(score: Array, rows: FreshRows, options: Evaluate) -> dict[str, float]:
    return ranking_metrics(
        score,
        rows.label,
        rows.weight,
        rows.user,
        threshold=options.threshold,
        beta=options.beta,
    )


def _slices(score: Array, rows: FreshRows, options: Promote) -> dict[str, float]:
    """Return ``COLUMN=VALUE`` -> AUC, for each value with at least ``promote.slice_rows`` rows."""
    areas: dict[str, float] = {}
    counted = rows.weight > 0
    for name in options.slices:
        encoded = rows.table[name].combine_chunks().dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
        for code, value in enumerate(encoded.dictionary.to_pylist()):
            chosen = counted & (codes == code)
            if chosen.sum() >= options.slice_rows:
                area = auc(score[chosen], rows.label[chosen], rows.weight[chosen].astype(float))
                areas[f"{name}={value}"] = area
    return areas


def _catalogue_share(bundle: Path, rows: FreshRows, config: Config) -> float:
    """Return the share of rows whose item a bundle knows."""
    keys = read_array(bundle, "items/keys.npy")
    items = rows.table[config.schema.item_key].combine_chunks()
    if keys.dtype.kind == "S":
        own = np.array([str(each).encode() for each in items.to_pylist()], dtype=np.bytes_)
    else:
        own = pc.fill_null(items.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return float(np.isin(own, keys).mean()) if len(own) else 0.0


def _seconds(table: pa.Table, name: str) -> Array | None:
    """Return the times of rows in seconds since 1970, float64 [n]; None if rows have no times."""
    times = comparable_times(table[name]) if name in table.column_names else None
    if times is None:
        return None
    kind, values = times
    seconds = epoch_seconds(values, kind)
    # Numbers that are too small to be times since 1970 can still order the rows.
    return values if seconds is None else seconds
