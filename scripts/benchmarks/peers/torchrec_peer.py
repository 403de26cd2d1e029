"""TorchRec's side of the training benchmark: FBGEMM's fused tables under TorchRec modules.

Two ranks: `torchrun --nproc-per-node 2 torchrec_peer.py --distributed --work a --data DIR`.
"""

import itertools
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Clock, Options, options, peak_memory_mb, report, work_a, work_b
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

CPU = torch.device("cpu")
PACKAGES = ("torchrec", "fbgemm-gpu-cpu")


def tables(sizes: dict[str, int], width: int, pooling: PoolingType) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(rows, width, name=name, feature_names=[name], pooling=pooling)
        for name, rows in sizes.items()
    ]


def fused(configs: list[EmbeddingBagConfig]) -> FusedEmbeddingBagCollection:
    """Build tables whose backward pass updates the looked-up rows, without an optimizer step."""
    arguments = {"lr": common.LEARNING_RATE}
    return FusedEmbeddingBagCollection(configs, RowWiseAdagrad, arguments, device=CPU)


class Ranker(nn.Module):
    def __init__(
        self, embeddings: nn.Module, inputs: int, hidden: tuple[int, ...], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU(inplace=True)]
            layers += [nn.Dropout(dropout)] if dropout else []
            inputs = width
        self.mlp = nn.Sequential(*layers, nn.Linear(inputs, 1))

    def forward(self, ids: KeyedJaggedTensor, dense: Tensor | None) -> Tensor:
        vectors = self.embeddings(ids).values()
        inputs = vectors if dense is None else torch.cat((vectors, dense), dim=1)
        return self.mlp(inputs).squeeze(1)


class Trainer:
    """One step: lookup, MLP, backward pass with the tables' updates, fused Adam."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.model, self.bf16 = model, precision == "bf16"
        dense = [weight for name, weight in model.named_parameters() if "mlp" in name]
        self.adam = torch.optim.Adam(dense, lr=common.LEARNING_RATE, fused=True)

    def loss(self, ids: KeyedJaggedTensor, dense: Tensor | None, label: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.model(ids, dense)
        return F.binary_cross_entropy_with_logits(logits.float(), label)

    def step(self, ids: KeyedJaggedTensor, dense: Tensor | None, label: Tensor) -> None:
        loss = self.loss(ids, dense, label)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


def sharded(configs: list[EmbeddingBagConfig], given: Options) -> nn.Module:
    """Build the model of work (a) with whole tables placed on the ranks.

    TorchRec's planner refuses row-wise sharding of pooled tables on CPU.
    """
    embeddings = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    arguments = {"lr": common.LEARNING_RATE}
    apply_optimizer_in_backward(RowWiseAdagrad, embeddings.parameters(), arguments)
    model = Ranker(embeddings, common.INPUTS_A, given.hidden)
    wish = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={config.name: wish for config in configs},
    )
    sharder: Any = EmbeddingBagCollectionSharder()
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=[sharder])


def run_a(given: Options) -> None:
    data = work_a(given.data)
    names = [f"c{table}" for table in range(common.TABLES)]
    configs = tables(dict.fromkeys(names, data.rows), common.WIDTH_A, PoolingType.SUM)
    rank, ranks = 0, 1
    if given.distributed:
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        model = sharded(configs, given)
    else:
        model = Ranker(fused(configs), common.INPUTS_A, given.hidden)
    trainer = Trainer(model, given.precision)
    size = data.label.shape[1] // ranks
    # One id per bag: lengths and offsets are the same in every batch.
    lengths = torch.ones(common.TABLES * size, dtype=torch.int32)
    offsets = torch.arange(common.TABLES * size + 1, dtype=torch.int32)

    def keyed(ids: Tensor) -> KeyedJaggedTensor:
        values = ids.int().t().reshape(-1)
        return KeyedJaggedTensor(names, values, lengths=lengths, offsets=offsets, stride=size)

    clock = Clock(given.seconds, given.warmup)
    calls = itertools.count(1)

    def agreed(over: bool) -> bool:
        """Return True if all ranks stop; they ask each other once in eight steps."""
        return over if ranks == 1 else next(calls) % 8 == 0 and total(over, dist.ReduceOp.MAX) > 0

    batches = data.batches(rank, ranks)
    for ids, dense, label in clock.batches(batches, agreed):
        trainer.step(keyed(ids), dense, label)
    ids, dense, label = batches[0]
    loss = trainer.loss(keyed(ids), dense, label).item()
    if ranks == 1:
        report(clock, loss, PACKAGES)
        return
    more = {
        "samples_per_second": total(clock.samples / clock.elapsed),
        "peak_memory_mb": total(peak_memory_mb(), dist.ReduceOp.MAX),  # of the larger rank
        "ranks": ranks,
        "sharding": "table_wise",
    }
    loss = total(loss) / ranks
    if rank == 0:
        report(clock, loss, PACKAGES, **more)
    dist.destroy_process_group()


def total(value: float, operation: Any = dist.ReduceOp.SUM) -> float:
    reduced = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(reduced, operation)
    return reduced.item()


def run_b(given: Options) -> None:
    data = work_b(given.data)
    names = [name for name in data.sizes if name != "genres"]
    # Means of one id are the id's vector: with one pooling all tables are one FBGEMM operator.
    sizes = {name: data.sizes[name] for name in [*names, "genres"]}
    embeddings = fused(tables(sizes, common.WIDTH_B, PoolingType.MEAN))
    model = Ranker(embeddings, common.WIDTH_B * len(sizes), common.HIDDEN_B, common.DROPOUT_B)
    trainer = Trainer(model, given.precision)
    codes = torch.stack([torch.from_numpy(data.columns[name]) for name in names], dim=1)
    genres, labels = torch.from_numpy(data.columns["genres"]), torch.from_numpy(data.label)
    dataset = TensorDataset(codes, genres, labels)
    # A sampler of whole batches: one indexing per column instead of one per sample.
    sampler = BatchSampler(RandomSampler(dataset), common.BATCH_B, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)

    def keyed(codes: Tensor, genres: Tensor) -> KeyedJaggedTensor:
        given_genres = genres != 0
        ones = torch.ones(codes.numel(), dtype=torch.int32)
        return KeyedJaggedTensor(
            [*names, "genres"],
            torch.cat((codes.t().reshape(-1), genres[given_genres])),
            lengths=torch.cat((ones, given_genres.sum(1, dtype=torch.int32))),
            stride=len(codes),
        )

    clock = Clock(given.seconds, given.warmup)
    for codes_, genres_, label in clock.batches(loader):
        trainer.step(keyed(codes_, genres_), None, label)
    model.eval()
    columns, label = data.first()
    codes = torch.stack([columns[name] for name in names], dim=1)
    report(clock, trainer.loss(keyed(codes, columns["genres"]), None, label).item(), PACKAGES)


if __name__ == "__main__":
    given = options(("fp32", "bf16"), distributed=True)
    if given.distributed and given.work == "b":
        raise SystemExit("--distributed is for --work a")
    {"a": run_a, "b": run_b}[given.work](given)
