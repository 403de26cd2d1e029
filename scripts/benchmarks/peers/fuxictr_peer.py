"""FuxiCTR's side of the training benchmark.

The wheel has no model zoo. This is the zoo's DNN, built from the wheel's parts and trained by
`BaseModel.train_epoch`, which clips the norm of all gradients, including those of the tables.
"""

import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import Clock, Options, options, report, work_a, work_b
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor


class DNN(BaseModel):  # type: ignore[misc]
    def __init__(
        self,
        features: FeatureMap,
        width: int,
        inputs: int,
        hidden: tuple[int, ...],
        dropout: float,
        adam: str,
    ) -> None:
        super().__init__(features, verbose=0, model_root=tempfile.gettempdir(), metrics=["AUC"])
        self.embedding_layer = FeatureEmbedding(features, width)
        self.mlp = MLP_Block(
            inputs,
            list(hidden),
            output_dim=1,
            output_activation=self.output_activation,
            dropout_rates=dropout,
        )
        self.compile("adam", "binary_crossentropy", common.LEARNING_RATE)
        weights = self.parameters()
        if adam == "fused":  # `compile` passes the optimizer nothing but a learning rate
            self.optimizer = torch.optim.Adam(weights, lr=common.LEARNING_RATE, fused=True)
        self.reset_parameters()
        # What `fit` sets before its first epoch; no evaluation in the timed steps.
        self._max_gradient_norm, self._stop_training = 10.0, False
        self._total_steps, self._eval_steps = 0, 10**9

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        return {"y_pred": self.mlp(vectors)}

    def loss_of(self, batch: dict[str, Tensor]) -> float:
        self.eval()
        with torch.no_grad():
            predicted = self.forward(batch)["y_pred"]
            return F.binary_cross_entropy(predicted, self.get_labels(batch)).item()


def feature_map(features: dict[str, dict[str, Any]]) -> FeatureMap:
    made = FeatureMap("benchmark", tempfile.gettempdir())
    made.features.update({name: {"source": "", **spec} for name, spec in features.items()})
    made.labels, made.num_fields = ["label"], len(features)
    made.set_column_index()
    return made


def run_a(given: Options) -> None:
    data = work_a(given.data)
    names = [f"c{table}" for table in range(common.TABLES)]
    features: dict[str, dict[str, Any]] = {
        name: {"type": "categorical", "vocab_size": data.rows} for name in names
    }
    # "numeric" would embed each number; a vector with the identity as its encoder stays as it is.
    features["numbers"] = {
        "type": "embedding",
        "pretrain_dim": common.NUMBERS,
        "feature_encoder": "nn.Identity()",
    }
    made = feature_map(features)
    model = DNN(made, common.WIDTH_A, common.INPUTS_A, given.hidden, 0.0, given.adam)
    batches = [
        dict(zip(names, ids.t().contiguous(), strict=True)) | {"numbers": dense, "label": label}
        for ids, dense, label in data.batches()
    ]
    clock = Clock(given.seconds, given.warmup)
    model.train_epoch(clock.batches(batches))
    report(clock, model.loss_of(batches[0]), ["fuxictr"])


def run_b(given: Options) -> None:
    data = work_b(given.data)
    features: dict[str, dict[str, Any]] = {
        name: {"type": "categorical", "vocab_size": rows} for name, rows in data.sizes.items()
    }
    features["genres"] |= {
        "type": "sequence",
        "max_len": common.MAX_GENRES,
        "padding_idx": 0,
        "feature_encoder": "layers.MaskedAveragePooling()",
    }
    made = feature_map(features)
    inputs = common.WIDTH_B * len(features)
    model = DNN(made, common.WIDTH_B, inputs, common.HIDDEN_B, common.DROPOUT_B, given.adam)
    clock = Clock(given.seconds, given.warmup)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.npz")
        np.savez(path, **data.columns, label=data.label)
        loader, _ = RankDataLoader(
            made, stage="train", train_data=str(path), batch_size=common.BATCH_B, shuffle=True
        )
    model.train_epoch(clock.batches(loader))
    columns, label = data.first()
    report(clock, model.loss_of(columns | {"label": label}), ["fuxictr"])


if __name__ == "__main__":
    given = options()
    {"a": run_a, "b": run_b}[given.work](given)
