"""The gradient contract: N ranks give one rank's gradients on the same global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parallel.launch import run_program
from tests.small_model import small_batch, small_config, small_model


def plain_loss(objective: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute loss and gradients row by row from their definitions, with no code of training."""
    config = small_config(objective)
    model, batch = small_model(config), small_batch(12)
    output = model(batch.features)
    probability = output.logit.sigmoid()
    total = torch.zeros((), dtype=torch.float64)
    if objective != "retrieval":
        for p, y, w in zip(probability, batch.label, batch.weight, strict=True):
            total = total - w * (y * p.log() + (1 - y) * (1 - p).log())
        total = total / batch.weight.sum()
    if objective != "ranking":
        positives = [n for n in range(12) if batch.label[n] == 1]
        share = torch.arange(1, 10) / 45
        retrieval = torch.zeros((), dtype=torch.float64)
        for row in positives:
            own = batch.item_index[row]
            terms = []
            for column in positives:
                other = batch.item_index[column]
                if column != row and other == own:
                    continue
                logit = (output.user[row] * output.item[column]).sum() / 0.2 - share[other].log()
                terms.append(logit)
                if column == row:
                    mine = logit
            retrieval = retrieval - batch.weight[row] * (mine - torch.stack(terms).logsumexp(0))
        retrieval = retrieval / batch.weight[positives].sum()
        total = total + (config.train.retrieval_weight if objective == "joint" else 1.0) * retrieval
    loss = total.detach().clone()
    for table in model.tables.tables.values():
        total = total + 0.5 * config.train.embedding_l2 * table.weight.square().sum()
    total.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return loss, gradients


@pytest.mark.parametrize("objective", ["retrieval", "ranking", "joint"])
@pytest.mark.parametrize(("ranks", "launcher"), [(1, ""), (2, "horovodrun"), (3, "mpirun")])
def test_gradients_equal_those_of_the_global_batch(
    objective: str, ranks: int, launcher: str, tmp_path: Path
) -> None:
    run_program("gradients.py", [objective, str(tmp_path / "g.safetensors")], ranks, launcher)
    got = load_file(tmp_path / "g.safetensors")
    loss, expected = plain_loss(objective)
    assert abs(float(got.pop("loss") - loss)) < 1e-12
    for name, gradient in got.items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-12), name
    missing = expected.keys() - got.keys()
    assert all(not expected[name].any() for name in missing)
