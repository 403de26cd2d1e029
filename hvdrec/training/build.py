"""From a configuration to the model that it describes."""

from __future__ import annotations

from collections.abc import Mapping

from hvdrec.config import Config
from hvdrec.models.recommender import Recommender


def build_model(config: Config, sizes: Mapping[str, int], *, with_tables: bool) -> Recommender:
    """Build the model of a run.

    Args:
        config: The run; its schema, tasks, model and objective matter.
        sizes: Number of rows of each embedding table, by table name.
        with_tables: False if each forward pass brings the table rows that it needs (training).
    """
    return Recommender(
        config.schema,
        config.model,
        sizes,
        tasks=config.tasks,
        with_ranker=config.train.objective != "retrieval",
        temperature=config.train.temperature,
        with_tables=with_tables,
    )
