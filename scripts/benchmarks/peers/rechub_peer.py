"""torch-rechub's side of the training benchmark.

Its Wide & Deep needs the wide part, so the DNN is built from its EmbeddingLayer and MLP and trained
by its CTRTrainer.
"""

from typing import Any

import common
import torch
import torch.nn.functional as F
from common import Clock, Options, options, report, work_a, work_b
from torch import Tensor, nn
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.basic.layers import MLP, EmbeddingLayer
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator


class DNN(nn.Module):
    def __init__(self, features: list[Any], hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.features = features
        self.embedding = EmbeddingLayer(features)
        inputs = sum(feature.embed_dim for feature in features)
        mlp = MLP(inputs, dims=list(hidden), dropout=dropout).mlp
        # It always normalizes batches; the other peers' networks do not.
        self.mlp = nn.Sequential(*(part for part in mlp if not isinstance(part, nn.BatchNorm1d)))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        vectors = self.embedding(inputs, self.features, squeeze_dim=True)
        return torch.sigmoid(self.mlp(vectors).squeeze(1))


def train(model: DNN, clock: Clock, batches: Any, adam: str) -> None:
    # The default has weight decay, which would read every table in every step.
    fused = {"fused": True} if adam == "fused" else {}
    trainer = CTRTrainer(model, optimizer_params={"lr": common.LEARNING_RATE, **fused})
    trainer.train_one_epoch(clock.batches(batches))


def finish(model: DNN, clock: Clock, inputs: dict[str, Tensor], label: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        loss = F.binary_cross_entropy(model(inputs), label).item()
    report(clock, loss, ["torch-rechub"])


def run_a(given: Options, clock: Clock) -> None:
    data = work_a(given.data)
    names = [f"c{table}" for table in range(common.TABLES)]
    features: list[Any] = [SparseFeature(name, data.rows, common.WIDTH_A) for name in names]
    model = DNN([*features, DenseFeature("numbers", common.NUMBERS)], given.hidden, 0.0)
    batches = [
        (dict(zip(names, ids.t().contiguous(), strict=True)) | {"numbers": dense}, label)
        for ids, dense, label in data.batches()
    ]
    train(model, clock, batches, given.adam)
    finish(model, clock, *batches[0])


def run_b(given: Options, clock: Clock) -> None:
    data = work_b(given.data)
    features = [
        SequenceFeature(name, rows, common.WIDTH_B, pooling="mean", padding_idx=0)
        if name == "genres"
        else SparseFeature(name, rows, common.WIDTH_B)
        for name, rows in data.sizes.items()
    ]
    model = DNN(features, common.HIDDEN_B, common.DROPOUT_B)
    generator = DataGenerator(data.columns, data.label)
    # The second and third are for validation and test: a few rows.
    few = {name: column[:1] for name, column in data.columns.items()}
    loader, _, _ = generator.generate_dataloader(
        few, data.label[:1], few, data.label[:1], batch_size=common.BATCH_B
    )
    train(model, clock, loader, given.adam)
    finish(model, clock, *data.first())


if __name__ == "__main__":
    given = options()
    {"a": run_a, "b": run_b}[given.work](given, Clock(given.seconds, given.warmup))
