"""What training reads: shards, the catalogue, and the model that teaches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvdrec.config import Config
from hvdrec.data.collate import table_arrays
from hvdrec.data.loader import ShardLoader
from hvdrec.errors import UserError
from hvdrec.models.recommender import Recommender
from hvdrec.storage.urls import read_table
from hvdrec.training import checkpoint
from hvdrec.training.pipeline import Catalogue


def check_codes(loader: ShardLoader, config: Config, sizes: Mapping[str, int]) -> None:
    """Raise UserError if the shards hold a code that its table has no row for."""
    for feature in config.schema.features:
        if not feature.is_embedded:
            continue
        table = config.schema.vocabulary_of(feature)
        for file, low, high in loader.code_ranges(feature.name):
            if low < 0 or high >= sizes[table]:
                raise UserError(
                    f"{file}: column '{feature.name}' holds code {low if low < 0 else high}, "
                    f"outside table '{table}' of {sizes[table]} rows; run hvdrec prepare again"
                )


def log_probability_of_items(config: Config, device: torch.device) -> Tensor | None:
    """Return the log of each item's share of the positive training rows, or None if unused."""
    if config.train.objective == "ranking" or not config.train.logq:
        return None
    file = config.paths.of("features") / "items.parquet"
    counts = read_table(file, ["train_count"])["train_count"].to_numpy()
    share = np.maximum(counts, 1) / max(counts.sum(), 1)
    return torch.from_numpy(np.log(share)).to(device, torch.float32)


def load_teacher(config: Config, device: torch.device) -> Recommender | None:
    """Return the model whose scores are soft labels, if one is named."""
    if not config.train.teacher:
        return None
    run = Path(config.train.teacher)
    theirs = checkpoint.read_config(run)
    features = config.paths.of("features")
    if str(theirs.paths.of("features")) != str(features) or theirs.features != config.features:
        raise UserError(
            f"train.teacher = '{run}': was trained on {theirs.paths.of('features')} or with other "
            f"[[features]], this run is on {features}; name a run over the same features"
        )
    if theirs.train.objective == "retrieval":
        raise UserError(
            f"train.teacher = '{run}': was trained with objective 'retrieval' and has no ranker; "
            "name a run that has one"
        )
    return checkpoint.load_model(run, theirs)[0].to(device)


def load_catalogue(config: Config) -> Catalogue | None:
    """Return the items to draw negatives from, or None if none are drawn."""
    if config.train.objective == "ranking" or not config.train.uniform_negatives:
        return None
    table = read_table(config.paths.of("features") / "items.parquet")
    return Catalogue(table_arrays(table, config.schema.side("item")), table.num_rows)
