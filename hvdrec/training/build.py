"""Build the model that a configuration describes."""

from __future__ import annotations

from collections.abc import Mapping

from hvdrec.config import Config
from hvdrec.models.cpu_layers import use_cpu_layers, vendor_cpu_layers
from hvdrec.models.recommender import Recommender


def build_model(config: Config, sizes: Mapping[str, int], *, with_tables: bool) -> Recommender:
    """Build the model of a run.

    If ``train.cpu_layers`` is still "auto", the model gets the default layers for the vendor of
    this CPU.

    Args:
        config: Configuration of the run.
        sizes: Name of an embedding table -> number of its rows.
        with_tables: True to create the embedding tables in the model. False for training, which
            passes the required rows to each forward pass.
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
