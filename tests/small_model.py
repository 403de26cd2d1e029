"""A small model and batch with every kind of feature, for tests."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from hvdrec.config import Config
from hvdrec.config.data_sections import Samples, Task
from hvdrec.config.schema import Feature, Pooling
from hvdrec.config.sections import Model, Parallel, Ranker, Tower, Train
from hvdrec.data.batch import Batch
from hvdrec.embeddings.setup import row_optimizer, table_groups
from hvdrec.embeddings.sharded import DistributedTables
from hvdrec.models.recommender import Recommender
from hvdrec.parallel.ranks import World
from hvdrec.training.build import build_model

SIZES = {"user_id": 9, "item_id": 11, "genres": 6, "price": 7, "hour": 5, "shop": 8}


STEPS = 3
DENSE_RATE = 0.1
TABLE_RATE = 0.3


@dataclass(frozen=True)
class Setting:
    """The options with which the small model is trained for a few steps.

    placement "mixed" shards the tables of at least 8 rows.
    """

    objective: str = "ranking"
    placement: str = "mixed"
    optimizer: str = "sgd"
    kernel: str = "torch"
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    accumulate: int = 1
    sharing: str = ""
    hard_negatives: int = 0
    retrieval_loss: str = "softmax"
    logq: bool = True
    heads: int = 0
    pooling: Pooling = "mean"

    def config(self) -> Config:
        """Return the small configuration with this setting."""
        mixed = self.placement == "mixed"
        config = small_config(
            self.objective,
            embedding_optimizer=self.optimizer,
            embedding_weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            accumulate=self.accumulate,
            hard_negatives=self.hard_negatives,
            retrieval_loss=self.retrieval_loss,
            logq=self.logq,
        )
        pooling = {"history": self.pooling, "genres": self.pooling}
        ranker = replace(config.model.ranker, heads=self.heads)
        model = replace(config.model, pooling=pooling, ranker=ranker)
        config = replace(config, model=model)
        parallel = Parallel(
            placement="auto" if mixed else self.placement,  # type: ignore[arg-type]
            shard_from_mb=8 * 4 * 4 / 1e6,
        )
        if self.sharing:
            config = with_tasks(config, sharing=self.sharing, experts=2, task_hidden=(3,))
        return replace(config, parallel=parallel)


SETTINGS = {
    **{
        f"{objective}-{placement}": Setting(objective, placement)
        for objective in ("retrieval", "ranking", "joint")
        for placement in ("replicated", "sharded", "mixed")
    },
    **{
        f"{optimizer}-{kernel}": Setting(
            "joint", "mixed", optimizer, kernel, 0.05 if optimizer != "adagrad" else 0.0
        )
        for optimizer in ("sgd", "adagrad", "rowwise-adagrad", "adam")
        for kernel in ("torch", "fbgemm")
        if (optimizer, kernel) != ("adam", "fbgemm")
    },
    "clipped": Setting("joint", "mixed", clip_norm=0.05),
    "clipped-fbgemm": Setting("joint", "mixed", kernel="fbgemm", clip_norm=0.05),
    "hard-negatives": Setting("retrieval", hard_negatives=2),
    "bpr": Setting("joint", retrieval_loss="bpr"),
    "bpr-hard-negatives": Setting("retrieval", hard_negatives=2, retrieval_loss="bpr", logq=False),
    "heads": Setting("joint", heads=5),
    "sqrt": Setting("joint", pooling="sqrt"),
    "attention": Setting("joint", pooling="attention"),
    "self-attention": Setting("ranking", pooling="self-attention", accumulate=2),
    "accumulated": Setting("ranking", "mixed", "rowwise-adagrad", accumulate=3),
    "tasks-bottom": Setting("ranking", "mixed", accumulate=3, sharing="bottom"),
    "tasks-mmoe": Setting("joint", "mixed", "rowwise-adagrad", sharing="mmoe"),
}
TASKS = (Task("like", "rating > 3"), Task("love", "rating = 5", weight=0.5, share=0.25))


def small_config(objective: str = "joint", **train: object) -> Config:
    return Config(
        name="small",
        features=(
            Feature("user_id"),
            Feature("history", kind="sequence", max_length=4),
            Feature("age", kind="numeric", dtype="float"),
            Feature("item_id", side="item"),
            Feature("genres", side="item", kind="categorical_list", max_length=3),
            Feature("price", side="item", kind="numeric", dtype="float", transform="quantile"),
            Feature("hour", side="scene", dtype="int"),
            Feature("shop", side="scene", kind="hashed", dtype="int"),
        ),
        samples=Samples(user="user_id", item="item_id"),
        model=Model(
            dimension=4,
            tower=Tower(hidden=(7,), output=5, normalize=True),
            ranker=Ranker(hidden=(6,), cross_layers=2, direct=("user_id", "genres")),
        ),
        train=Train(objective=objective, temperature=0.2, **train),  # type: ignore[arg-type]
    )


def with_tasks(config: Config, **ranker: object) -> Config:
    """Return a configuration with two tasks and changed fields of the ranker."""
    shape = replace(config.model.ranker, **ranker)  # type: ignore[arg-type]
    return replace(config, tasks=TASKS, model=replace(config.model, ranker=shape))


def small_model(config: Config, seed: int = 0, *, with_tables: bool = True) -> Recommender:
    """Return a model whose dense weights are the same with and without tables."""
    model = build_model(config, SIZES, with_tables=with_tables).double()
    for name, parameter in model.named_parameters():
        random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        torch.nn.init.normal_(parameter, std=0.3, generator=random)
    for name in model.tables.tables:
        with torch.no_grad():
            model.tables.weight(name)[0] = 0.0
    return model


def small_tables(
    config: Config,
    model: Recommender,
    world: World,
    setting: Setting,
    device: torch.device | str = "cpu",
) -> DistributedTables:
    """Return the tables of a model, placed on the ranks."""
    groups = table_groups(config.schema, config.model.dimension, SIZES, world.size, config.parallel)
    tables = DistributedTables(
        config.schema,
        groups,
        row_optimizer(config.train),
        world,
        kernels={group.width: setting.kernel for group in groups},  # type: ignore[misc]
        seed=None,
        dtype=torch.float32 if setting.kernel == "fbgemm" else torch.float64,
        device=device,
        pooling=config.model.pooling,
    )
    for group in groups:
        for name in group.sizes:
            with torch.no_grad():
                whole = model.tables.weight(name)
                tables.table(name)[0].copy_(
                    whole[torch.from_numpy(group.local_ids(name, world.rank))]
                )
    return tables


def small_batch(rows: int, padding: int = 0, seed: int = 0) -> Batch:
    """Return random rows with different weights, followed by padding of weight zero.

    The label of each of the two tasks is unknown in some rows, that of the second in most.
    """
    random = np.random.default_rng(seed)

    def padded(drawn: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(
            np.concatenate([drawn, np.zeros_like(drawn[:1]).repeat(padding, 0)])
        )

    def codes(name: str, *shape: int, low: int = 0) -> torch.Tensor:
        return padded(random.integers(low, SIZES[name], (rows, *shape)))

    items = random.integers(0, 9, rows)
    others = np.random.default_rng([seed, 1])
    tasks = others.integers(0, 2, (rows, 2)).astype(np.float64)
    tasks[others.random((rows, 2)) < (0.3, 0.7)] = np.nan
    return Batch(
        features={
            "user_id": codes("user_id", low=1),
            "history": codes("item_id", 4),
            "age": padded(random.normal(size=rows)),
            "item_id": padded(items + 2),
            "genres": codes("genres", 3),
            "price": codes("price"),
            "hour": codes("hour"),
            "shop": codes("shop"),
        },
        user_index=padded(random.integers(0, 7, rows)),
        item_index=padded(items),
        label=padded(random.integers(0, 2, rows).astype(np.float64)),
        weight=padded(random.uniform(0.5, 2.0, rows)),
        rows=rows,
        tasks=padded(tasks),
    )


def of_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch with its floats cast to a dtype."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return replace(
        batch,
        features={name: cast(tensor) for name, tensor in batch.features.items()},
        label=cast(batch.label),
        weight=cast(batch.weight),
        tasks=None if batch.tasks is None else cast(batch.tasks),
    )
