"""The proof that a bundle, fed with raw values, scores as the torch model does."""

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
from hvdrec.config.schema import Feature
from hvdrec.data.collate import table_arrays
from hvdrec.features.fit import Fitted
from hvdrec.features.graph import output_name
from hvdrec.features.raw import rows_to_inputs
from hvdrec.models.recommender import Recommender
from hvdrec.scoring import Scorer
from hvdrec.storage.urls import Location, read_table, read_tables

Arrays = Mapping[str, NDArray[Any]]
Row = dict[str, Any]

UNSEEN_KEY = {"string": "\N{NO-BREAK SPACE}never seen", "int": 2**62}


def largest_difference(
    bundle: Path, config: Config, model: Recommender, fitted: Fitted
) -> tuple[int, float]:
    """Return how many scores were compared, and by how much they differ at most.

    Rows are spread evenly over the test split and go through `Scorer.score` one by one, three
    times: as they are (torch reads the encoded shards); with the item given by its key (torch reads
    the encoded catalogue); and spoiled with unknown keys, missing and NaN values (torch reads what
    the preprocessing graph makes of them). Where there are tasks, the probability of each is
    compared along with the score, through `Scorer.score_tasks`.
    """
    samples, features = config.paths.of("samples"), config.paths.of("features")
    raw: pa.Table = ds.dataset(str(samples / "test"), format="parquet").to_table()
    step = max(1, -(-raw.num_rows // config.export.parity_rows))
    chosen = np.arange(0, raw.num_rows, step)
    raw = raw.take(chosen)
    encoded = read_tables(features / "test").take(chosen)
    catalogue = read_table(features / "items.parquet")

    scorer = Scorer.load(bundle)
    schema = config.schema
    columns = [
        *dict.fromkeys([schema.user_key, schema.item_key, *(f.name for f in schema.features)])
    ]
    rows = raw.select(columns).to_pylist()
    codes = table_arrays(encoded, schema.features)
    own = encoded["item_index"].to_numpy()
    item_codes = table_arrays(catalogue.take(own), schema.side("item"))
    spoiled = [_spoiled(config, number, row) for number, row in enumerate(rows)]
    spoiled_table = pa.Table.from_pylist(spoiled, schema=raw.select(columns).schema)
    spoiled_codes = _preprocessed(features / "preprocess.onnx", schema.features, spoiled_table)
    comparisons = (
        (_scores(scorer, config, rows, by_key=False), _torch_scores(model, codes)),
        (
            _scores(scorer, config, rows, by_key=True),
            _torch_scores(model, {**codes, **item_codes}),
        ),
        (
            _scores(scorer, config, spoiled, by_key=False),
            _torch_scores(model, spoiled_codes),
        ),
    )
    differences = [np.abs(ours - torchs) for ours, torchs in comparisons]
    # A NaN on either side must not pass for a small difference.
    largest = max(
        float(np.max(d, initial=0.0)) if not np.isnan(d).any() else np.inf for d in differences
    )
    return sum(len(d) for d in differences), largest


def _scores(scorer: Scorer, config: Config, rows: Sequence[Row], *, by_key: bool) -> NDArray[Any]:
    """Score raw rows one by one, as a service would: float64 [n, 1 + T] of T tasks."""
    schema = config.schema
    users = [schema.user_key, *(feature.name for feature in schema.side("user"))]
    items = [schema.item_key, *(feature.name for feature in schema.side("item"))]
    scene = [feature.name for feature in schema.side("scene")]
    scores = np.empty((len(rows), 1 + len(scorer.tasks)), dtype=np.float64)
    for number, row in enumerate(rows):
        request = (
            {name: row[name] for name in users},
            [row[schema.item_key] if by_key else {name: row[name] for name in items}],
            {name: row[name] for name in scene},
        )
        scores[number, 0] = scorer.score(*request)[0]
        if scorer.tasks:
            by_task = scorer.score_tasks(*request)
            scores[number, 1:] = [by_task[task][0] for task in scorer.tasks]
    return scores


def _torch_scores(model: Recommender, codes: Arrays, block: int = 4096) -> NDArray[Any]:
    """Return torch's probabilities of encoded rows, float64 [n, 1 + T] of T tasks."""
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


def _spoiled(config: Config, number: int, row: Row) -> Row:
    """Return a row as bad luck would have it: by turns another part of it is unknown or missing."""
    schema = config.schema
    spoiled = dict(row)
    names = [feature.name for feature in schema.features]
    if number % 2 == 0:
        spoiled[schema.user_key] = _unseen(config, schema.user_key)
    if number % 3 == 0:
        spoiled[schema.item_key] = _unseen(config, schema.item_key)
    for position, feature in enumerate(schema.features):
        if feature.name in (schema.user_key, schema.item_key):
            continue
        if (number + position) % 3 == 0:
            spoiled[feature.name] = float("nan") if feature.dtype == "float" else None
        elif (number + position) % 3 == 1 and feature.is_list:
            spoiled[feature.name] = [_unseen(config, feature.name), *(row[feature.name] or [])]
    assert set(names) <= set(spoiled)
    return spoiled


def _unseen(config: Config, name: str) -> Any:
    schema = config.schema
    known = {feature.name: feature.dtype for feature in schema.features}
    return UNSEEN_KEY[known.get(name, "string")]


def _preprocessed(graph: Location, features: Sequence[Feature], table: pa.Table) -> Arrays:
    session = onnxruntime.InferenceSession(graph.read_bytes(), providers=["CPUExecutionProvider"])
    names = [output_name(feature.name) for feature in features]
    outputs = session.run(names, rows_to_inputs(tuple(features), table))
    return {feature.name: array for feature, array in zip(features, outputs, strict=True)}
