"""Read what training needs besides batches: item frequencies, negatives, and a teacher model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvdrec.config import Config
from hvdrec.config.schema import Schema
from hvdrec.data.collate import table_arrays
from hvdrec.data.loader import ShardLoader
from hvdrec.errors import invalid_file, invalid_value
from hvdrec.models.recommender import Recommender
from hvdrec.storage.parquet import read_table
from hvdrec.training import checkpoint
from hvdrec.training.pipeline import NegativeSampler
from hvdrec.training.pointers import find_checkpoint


def check_codes(loader: ShardLoader, schema: Schema, sizes: Mapping[str, int]) -> None:
    """Raise UserError if the shards contain a code that is not a row of its embedding table."""
    for feature in schema.features:
        if not feature.is_embedded:
            continue
        table = schema.vocabulary_of(feature)
        for file, low, high in loader.code_ranges(feature.name):
            if low < 0 or high >= sizes[table]:
                raise invalid_file(
                    file,
                    f"column '{feature.name}' holds code {low if low < 0 else high}, outside "
                    f"table '{table}' of {sizes[table]} rows",
                    "run hvdrec prepare with --overwrite",
                )


def log_probability_of_items(config: Config, device: torch.device) -> Tensor | None:
    """Return the logarithm of each item's share of the positive training rows, float32 [items].

    Returns None if the configured loss does not need it.
    """
    if config.train.objective == "ranking" or not config.train.logq:
        return None
    file = config.paths.of("features") / "items.parquet"
    name = config.schema.own_name("train_count")
    counts = read_table(file, [name])[name].to_numpy()
    share = np.maximum(counts, 1) / max(counts.sum(), 1)
    return torch.from_numpy(np.log(share)).to(device, torch.float32)


def load_negatives(config: Config) -> NegativeSampler | None:
    """Return the sampler for ``train.uniform_negatives``; None if no negatives are drawn."""
    if config.train.objective == "ranking" or not config.train.uniform_negatives:
        return None
    table = read_table(config.paths.of("features") / "items.parquet")
    return NegativeSampler(table_arrays(table, config.schema.side("item")), table.num_rows)


def load_teacher(config: Config, device: torch.device) -> Recommender | None:
    """Load the model of the run ``train.teacher``; return None if none is configured.

    Raises:
        UserError: The teacher was trained on other features, or has no ranker.
    """
    if not config.train.teacher:
        return None
    run, features = Path(config.train.teacher), config.paths.of("features")
    theirs = checkpoint.read_config(run)
    is_recorded = find_checkpoint(run, "best").manifest.made_from("features")
    is_elsewhere = not is_recorded and str(theirs.paths.of("features")) != str(features)
    if is_elsewhere or theirs.features != config.features:
        raise invalid_value(
            "train.teacher",
            str(run),
            f"was trained on {theirs.paths.of('features')} or with other [[features]], this run "
            f"is on {features}",
            "name a run over the same features",
        )
    if theirs.train.objective == "retrieval":
        raise invalid_value(
            "train.teacher",
            str(run),
            "was trained with objective 'retrieval' and has no ranker",
            "name a run that has one",
        )
    # The teacher may have read a copy of the features at another path. Use the path of this run;
    # `load_model` checks that the features there are those on which the teacher was trained.
    theirs = replace(theirs, paths=config.paths)
    return checkpoint.load_model(run, theirs)[0].to(device)
