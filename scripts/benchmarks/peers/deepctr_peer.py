"""DeepCTR-Torch's side of the training benchmark.

Its plainest network is Wide & Deep; without columns for the wide part only the DNN remains. `fit`
has no public step, so `fit` itself runs, with the clock in its loader.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import common
import deepctr_torch.models.basemodel as basemodel
import torch
import torch.nn.functional as F
from common import Clock, Options, options, report, work_a, work_b
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.models import WDL
from torch import Tensor


class Timed:
    """Replaces the DataLoader of `fit`: the same or prepared batches, with the clock."""

    def __init__(self, clock: Clock, ready: Iterable[Any] | None = None) -> None:
        self.clock, self.ready = clock, ready
        self.loader = basemodel.DataLoader

    def __call__(self, **arguments: Any) -> Iterator[Any]:
        return self.clock.batches(self.ready or self.loader(**arguments))


def dnn(columns: list[Any], hidden: tuple[int, ...], dropout: float, adam: str) -> WDL:
    # Without regularization, which would read every table in every step.
    model = WDL(
        [],
        columns,
        hidden,
        l2_reg_linear=0,
        l2_reg_embedding=0,
        dnn_dropout=dropout,
        init_std=0.01,
    )
    fused = True if adam == "fused" else None
    optimizer = torch.optim.Adam(model.parameters(), lr=common.LEARNING_RATE, fused=fused)
    model.compile(optimizer, "binary_crossentropy")
    return model


def loss_of(model: WDL, inputs: Tensor, label: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return F.binary_cross_entropy(model(inputs.float()).squeeze(1), label).item()


def run_a(given: Options, clock: Clock) -> None:
    data = work_a(given.data)
    columns = [SparseFeat(f"c{table}", data.rows, common.WIDTH_A) for table in range(common.TABLES)]
    model = dnn([*columns, DenseFeat("numbers", common.NUMBERS)], given.hidden, 0.0, given.adam)
    # The model takes ids and numbers in one matrix of floats, exact up to 2**24.
    inputs = torch.cat((data.ids.float(), data.dense), dim=2)
    basemodel.DataLoader = Timed(clock, list(zip(inputs, data.label, strict=True)))
    model.fit([inputs[0].numpy()], data.label[0].numpy(), batch_size=len(inputs[0]), verbose=0)
    report(clock, loss_of(model, inputs[0], data.label[0]), ["deepctr-torch"])


def run_b(given: Options, clock: Clock) -> None:
    data = work_b(given.data)
    features: list[Any] = []
    for name, rows in data.sizes.items():
        feature = SparseFeat(name, rows, common.WIDTH_B)
        if name == "genres":
            feature = VarLenSparseFeat(feature, common.MAX_GENRES, combiner="mean")
        features.append(feature)
    model = dnn(features, common.HIDDEN_B, common.DROPOUT_B, given.adam)
    basemodel.DataLoader = Timed(clock)
    arrays = [data.columns[name] for name in data.sizes]
    model.fit(arrays, data.label, batch_size=common.BATCH_B, verbose=0)
    columns, label = data.first()
    parts = [columns[name].view(len(label), -1) for name in data.sizes]
    report(clock, loss_of(model, torch.cat(parts, dim=1), label), ["deepctr-torch"])


if __name__ == "__main__":
    given = options()
    {"a": run_a, "b": run_b}[given.work](given, Clock(given.seconds, given.warmup))
