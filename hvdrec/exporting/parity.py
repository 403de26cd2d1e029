"""Compare a bundle's scores from raw values with those of the PyTorch model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.schema import SIDES, Feature, Schema
from hvdrec.data.collate import table_arrays
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import build, output_name
from hvdrec.features.raw import rows_to_inputs
from hvdrec.models.recommender import Recommender
from hvdrec.scoring import Scorer
from hvdrec.storage.parquet import read_table, read_tables

Arrays = Mapping[str, NDArray[Any]]
Row = dict[str, Any]

UNSEEN_KEY = {"string": "\N{NO-BREAK SPACE}never seen", "int": 2**62}


def largest_difference(
    bundle: Path, config: Config, model: Recommender, fitted: Fitted
) -> tuple[int, float]:
    """Score rows of the test split with the bundle and with torch, and compare the scores.

    The rows are spread evenly over the split. `Scorer.score` scores each row three times, and torch
    scores the same row from codes. First, the bundle gets the raw values, and torch gets the
    encoded shards. Then the bundle gets the item's key instead of the item's values, and torch gets
    the item's codes from the encoded catalogue. Last, some values are unknown, missing or NaN, and
    torch gets the output of the preprocessing graph. If the model has tasks (several labels), the
    probability of each is compared too.

    Args:
        bundle: The bundle's directory.
        config: The configuration of the run.
        model: The trained model on the CPU.
        fitted: The fitted features.

    Returns:
        The number of scores compared, and their largest absolute difference, which is infinite if a
        score is NaN.
    """
    samples, features = config.paths.of("samples"), config.paths.of("features")
    schema = config.schema
    raw: pa.Table = ds.dataset(str(samples / "test"), format="parquet").to_table()
    step = max(1, -(-raw.num_rows // config.export.parity_rows))
    chosen = np.arange(0, raw.num_rows, step)
    names = [schema.user_key, schema.item_key, *(column.name for column in schema.columns())]
    raw = raw.take(chosen).select([*dict.fromkeys(names)])
    encoded = read_tables(features / "test").take(chosen)
    items = read_table(features / "items.parquet").take(
        encoded[schema.own_name("item_index")].to_numpy()
    )

    scorer = Scorer.load(bundle, verify=False)  # the files have just been written and hashed
    codes = table_arrays(encoded, schema.features)
    by_key = {**codes, **table_arrays(items, schema.side("item"))}
    rows = raw.to_pylist()
    corrupted = [_corrupted(schema, number, row) for number, row in enumerate(rows)]
    corrupted_table = pa.Table.from_pylist(corrupted, schema=raw.schema)
    graph = build(fitted, [feature.name for feature in schema.features]).SerializeToString()
    comparisons = (
        (_scores(scorer, schema, rows, by_key=False), codes),
        (_scores(scorer, schema, rows, by_key=True), {**by_key, **_combined(fitted, by_key)}),
        (
            _scores(scorer, schema, corrupted, by_key=False),
            _encoded(graph, schema, corrupted_table),
        ),
    )
    differences = [np.abs(scores - _torch_scores(model, codes)) for scores, codes in comparisons]
    # Plain max() would ignore a NaN, depending on its position.
    largest = max(
        float(np.max(d, initial=0.0)) if not np.isnan(d).any() else np.inf for d in differences
    )
    return sum(len(d) for d in differences), largest


def _scores(scorer: Scorer, schema: Schema, rows: Sequence[Row], *, by_key: bool) -> NDArray[Any]:
    """Score n raw rows one by one, as a service does; float64 [n, 1 + T] for T tasks."""
    users, items, scene = ([column.name for column in schema.columns(side)] for side in SIDES)
    scores = np.empty((len(rows), 1 + len(scorer.tasks)), dtype=np.float64)
    for number, row in enumerate(rows):
        item = row[schema.item_key]
        request = (
            {name: row[name] for name in (schema.user_key, *users)},
            [item if by_key else {name: row[name] for name in (schema.item_key, *items)}],
            {name: row[name] for name in scene},
        )
        scores[number, 0] = scorer.score(*request)[0]
        if scorer.tasks:
            by_task = scorer.score_tasks(*request)
            scores[number, 1:] = [by_task[task][0] for task in scorer.tasks]
    return scores


def _torch_scores(model: Recommender, codes: Arrays, block: int = 4096) -> NDArray[Any]:
    """Score n encoded rows with torch; float64 [n, 1 + T] for T tasks."""
    count = len(next(iter(codes.values())))
    scores = [np.empty((0, 1 + len(model.tasks)))]
    with torch.inference_mode():
        for start in range(0, count, block):
            part = {
                name: torch.tensor(array[start : start + block]) for name, array in codes.items()
            }
            user, item = model.represent_users(part), model.represent_items(part)
            logit = model.rank(user, item, part)
            columns = [model.score(logit), *(logit.sigmoid().unbind(-1) if model.tasks else ())]
            scores.append(torch.stack(columns, dim=1).double().numpy())
    return np.concatenate(scores)


def _corrupted(schema: Schema, number: int, row: Row) -> Row:
    """Make some values of a row unknown or missing; the row's number decides which values."""
    corrupted = dict(row)
    dtypes = {column.name: column.dtype for column in schema.columns()}
    for key, every in ((schema.user_key, 2), (schema.item_key, 3)):
        if number % every == 0:
            corrupted[key] = UNSEEN_KEY[dtypes.get(key, "string")]
    for position, column in enumerate(schema.columns()):
        if column.name in (schema.user_key, schema.item_key):
            continue
        if (number + position) % 3 == 0:
            corrupted[column.name] = float("nan") if column.dtype == "float" else None
        elif (number + position) % 3 == 1 and column.is_list:
            corrupted[column.name] = [UNSEEN_KEY[column.dtype], *(row[column.name] or [])]
    return corrupted


def _encoded(graph: bytes, schema: Schema, table: pa.Table) -> Arrays:
    """Encode raw rows with the preprocessing graph of all features."""
    return _run(graph, schema.features, rows_to_inputs(schema.columns(), table))


def _combined(fitted: Fitted, codes: Arrays) -> Arrays:
    """Compute the scene features that combine other features, from the codes of these features."""
    features = [feature for feature in fitted.schema.side("scene") if feature.sources]
    if not features:
        return {}
    names = {name for feature in features for name in feature.sources}
    graph = build(fitted, [feature.name for feature in features]).SerializeToString()
    return _run(graph, features, {output_name(name): codes[name] for name in names})


def _run(graph: bytes, features: Sequence[Feature], inputs: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    outputs = session.run([output_name(feature.name) for feature in features], inputs)
    return {feature.name: array for feature, array in zip(features, outputs, strict=True)}
