"""From a configuration to the model that it describes."""

from __future__ import annotations

from collections.abc import Mapping

from hvdrec.config import Config
from hvdrec.models.cpu_layers import use_cpu_layers, vendor_cpu_layers
from hvdrec.models.recommender import Recommender


def build_model(config: Config, sizes: Mapping[str, int], *, with_tables: bool) -> Recommender:
    """Build the model of a run.

    ``train.cpu_layers = "auto"`` stands for the default of the CPU's vendor here.

    Args:
        config: The run; its schema, tasks, model and objective matter.
        sizes: Number of rows of each embedding table, by table name.
        with_tables: False if each forward pass brings the table rows that it needs (training).
    """
    train = config.train
    model = Recommender(
        config.schema,
        config.model,
        sizes,
        tasks=config.tasks,
        with_ranker=train.objective != "retrieval",
        temperature=train.temperature,
        with_tables=with_tables,
    )
    default = vendor_cpu_layers(bf16=train.precision == "bf16")
    use_cpu_layers(model, default if train.cpu_layers == "auto" else train.cpu_layers)
    return model
