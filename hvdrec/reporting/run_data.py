"""Read a run and measure its model: the data for all sections of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.data.collate import table_arrays
from hvdrec.evaluation.evaluate import embed_side, event_vectors, measure_model
from hvdrec.evaluation.events import Events, obstacle, read_seconds
from hvdrec.evaluation.held_out import ScoredRows, earlier_splits, read_interactions
from hvdrec.evaluation.result import EvaluationResult, Split
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.samples.times import DAY
from hvdrec.storage.parquet import read_table, read_tables
from hvdrec.training.checkpoint import load_model, read_config
from hvdrec.training.machine import pick_device, set_threads
from hvdrec.training.pointers import Checkpoint, Which
from hvdrec.training.run_history import RunHistory, read_history

Array = NDArray[Any]
EFFECT_ROWS = 4_000
"""Largest number of rows on which effects and importances are measured."""


@dataclass(frozen=True)
class RunData:
    """A run, and the results of measuring its model on a split.

    Attributes:
        run: Directory of the run.
        config: Configuration of the run.
        checkpoint: The measured checkpoint.
        model: The model of the checkpoint.
        split: Name of the split.
        result: Result of the evaluation, as plain JSON values.
        rows: The scored rows of the split; None without a ranker.
        events: The events of the split; None if they were left out.
        ranks: ``model`` and each baseline -> the rank of each event's item, int64 [e].
        history: The log of the training; empty if there is none.
    """

    run: Path
    config: Config
    checkpoint: Checkpoint
    model: Recommender
    split: Split
    result: Mapping[str, Any]
    rows: ScoredRows | None
    events: Events | None
    ranks: Mapping[str, Array]
    history: RunHistory

    def items(self) -> pa.Table:
        """Read the encoded items of the catalogue."""
        return read_table(self.config.paths.of("features") / "items.parquet")

    def item_vectors(self) -> Array:
        """Return the item tower's embeddings of the whole catalogue, float32 [items, width]."""
        return embed_side(self.model, self.config, "item")

    def raw_column(self, name: str) -> Array | None:
        """Read a raw column of the split's samples; None if the samples do not have it."""
        folder = self.config.paths.of("samples") / self.split
        if not folder.is_dir():
            return None
        samples = ds.dataset(str(folder), format="parquet")
        if name not in samples.schema.names or pa.types.is_nested(samples.schema.field(name).type):
            return None
        column = samples.to_table(columns=[name])[name]
        values = column.to_numpy()
        return values if len(values) == self._split_rows() else None

    def user_key(self, user: int) -> str:
        """Return the key of a user, given by its index."""
        name = self.config.schema.own_name("key")
        file = self.config.paths.of("features") / "users.parquet"
        return str(read_table(file, [name])[name][int(user)].as_py())

    def item_ages(self) -> Array | None:
        """Return, for each scored row, the age of its item in days, float64 [n].

        The age counts from the first row of the item, in any split up to this one. Return None if
        the rows have no times.
        """
        assert self.rows is not None
        splits = (*earlier_splits(self.split), self.split)
        reason = obstacle(self.config)
        seconds = None if reason else read_seconds(self.config, splits)
        if seconds is None:
            return None
        item = read_interactions(self.config.paths.of("features"), splits).item
        first = np.full(int(item.max()) + 1, np.inf)
        np.minimum.at(first, item, seconds)
        age: Array = np.floor(seconds / DAY) - np.floor(first[item] / DAY)
        return age[len(age) - len(self.rows.score) :]

    def event_vectors(self, events: Events) -> Array:
        """Return the user tower's embeddings of the users at some events, float32 [e, width]."""
        return event_vectors(self.model, self.config, self.split, events)

    def effect_rows(self) -> tuple[dict[str, Array], Array]:
        """Return the encoded features of some scored rows, and their numbers in the split."""
        assert self.rows is not None
        step = max(1, -(-len(self.rows.score) // EFFECT_ROWS))
        number = np.arange(0, len(self.rows.score), step)
        features = self.config.schema.features
        columns = [feature.name for feature in features]
        table = read_tables(self.config.paths.of("features") / self.split, columns)
        return table_arrays(table.take(pa.array(number)), features), number

    def predict(self, arrays: Mapping[str, Array]) -> Array:
        """Return the model's scores of n encoded rows, float32 [n]."""
        device = next(self.model.parameters()).device
        codes = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        with torch.inference_mode():
            score: Array = self.model.score(self.model(codes).logit.float()).cpu().numpy()
        return score

    def _split_rows(self) -> int:
        if self.rows is not None:
            return len(self.rows.score)
        folder = self.config.paths.of("features") / self.split
        return len(read_tables(folder, [self.config.schema.row_columns[2]]))


def read_run(
    run: Path, *, split: Split, which: Which, ease_items: int, baselines: bool = True
) -> RunData:
    """Load a checkpoint of a run and measure it on a split, in a single process.

    Raises:
        UserError: The run or its features cannot be read.
    """
    world = ranks.init()
    config = read_config(run)
    set_threads(config.train.threads, world)
    device = pick_device(config.train.device, world)
    model, checkpoint = load_model(run, config, which)
    model.to(device)
    measured = measure_model(model, config, split, with_baselines=baselines, ease_items=ease_items)
    result = EvaluationResult(str(run), checkpoint.name, **measured.report).to_dict()
    try:
        history = read_history(run)
    except ValueError:  # a run whose log was removed
        history = RunHistory()
    events, found = (
        (measured.events.events, measured.events.ranks) if measured.events else (None, {})
    )
    return RunData(
        run, config, checkpoint, model, split, result, measured.rows, events, found, history
    )
