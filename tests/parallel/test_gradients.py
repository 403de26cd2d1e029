"""Tests of the gradient contract: N ranks equal one rank on the same global batch.

Expected tables are plain arrays that are updated row by row from the definitions of the optimizers;
expected losses are computed row by row from their definitions.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hvdrec.data.batch import Batch
from hvdrec.models.recommender import Recommender
from tests.parallel.launch import run_program
from tests.small_model import (
    DENSE_RATE,
    SETTINGS,
    STEPS,
    TABLE_RATE,
    Setting,
    small_batch,
    small_model,
)

ROWS = 12


def plain_loss(setting: Setting, model: Recommender, batch: Batch) -> Tensor:
    """Compute the loss row by row from its definition, with no code of training."""
    config, objective = setting.config(), setting.objective
    output = model(batch.features)
    probability = output.logit.sigmoid()
    total = torch.zeros((), dtype=torch.float64)
    if setting.sharing:
        assert batch.tasks is not None
        for t, task in enumerate(config.tasks):
            known = [n for n in range(ROWS) if not math.isnan(batch.tasks[n, t])]
            assert 0 < len(known) < ROWS
            for n in known:
                p, y, w = probability[n, t], batch.tasks[n, t], batch.weight[n]
                loss = -w * (y * p.log() + (1 - y) * (1 - p).log())
                total = total + task.weight * loss / batch.weight[known].sum()
    elif objective != "retrieval":
        for p, y, w in zip(probability, batch.label, batch.weight, strict=True):
            total = total - w * (y * p.log() + (1 - y) * (1 - p).log())
        total = total / batch.weight.sum()
    if objective != "ranking":
        positives = [n for n in range(ROWS) if batch.label[n] == 1]
        share = torch.arange(1, 10) / 45
        retrieval = torch.zeros((), dtype=torch.float64)
        for row in positives:
            own = batch.item_index[row]
            negatives = []
            for column in positives:
                other = batch.item_index[column]
                if column != row and other == own:
                    continue
                logit = (output.user[row] * output.item[column]).sum() / 0.2
                if setting.logq:
                    logit = logit - share[other].log()
                if column == row:
                    positive = logit
                else:
                    negatives.append(logit)
            negatives.sort(key=lambda logit: float(logit.detach()), reverse=True)
            kept = torch.stack(negatives[: setting.hard_negatives or len(negatives)])
            if setting.retrieval_loss == "bpr":
                loss = -(positive - kept).sigmoid().log().mean()
            else:
                loss = torch.cat([positive.view(1), kept]).logsumexp(0) - positive
            retrieval = retrieval + batch.weight[row] * loss
        retrieval = retrieval / batch.weight[positives].sum()
        total = total + (config.train.retrieval_weight if objective == "joint" else 1.0) * retrieval
    return total


def looked_up(model: Recommender, batch: Batch) -> dict[str, set[int]]:
    """Return the rows that a batch looks up, by table."""
    rows: dict[str, set[int]] = {}
    for feature in model.schema.features:
        if feature.is_embedded:
            codes = set(batch.features[feature.name].reshape(-1).tolist()) - {0}
            rows.setdefault(model.schema.vocabulary_of(feature), set()).update(codes)
    return rows


def update_row(
    setting: Setting, row: np.ndarray, gradient: np.ndarray, state: dict[str, np.ndarray], step: int
) -> None:
    """Take an optimizer step on one row, as its source defines it."""
    gradient = gradient + setting.weight_decay * row
    if setting.optimizer == "sgd":
        row -= TABLE_RATE * gradient
    elif setting.optimizer == "adagrad":
        state["s"] = state.get("s", np.zeros(4)) + gradient**2
        row -= TABLE_RATE * gradient / (np.sqrt(state["s"]) + 1e-8)
    elif setting.optimizer == "rowwise-adagrad":
        state["s"] = state.get("s", np.zeros(())) + (gradient**2).mean()
        row -= TABLE_RATE * gradient / (np.sqrt(state["s"]) + 1e-8)
    else:
        state["m"] = 0.9 * state.get("m", np.zeros(4)) + 0.1 * gradient
        state["v"] = 0.999 * state.get("v", np.zeros(4)) + 0.001 * gradient**2
        mean, variance = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.999**step)
        row -= TABLE_RATE * mean / (np.sqrt(variance) + 1e-8)


@cache
def expected(name: str) -> dict[str, Tensor]:
    """Compute the expected results of a setting with plain loops over plain arrays."""
    setting = SETTINGS[name]
    model = small_model(setting.config())
    states: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    out: dict[str, Tensor] = {}
    for step in range(1, STEPS + 1):
        batch = small_batch(ROWS, seed=step - 1)
        model.zero_grad()
        loss = plain_loss(setting, model, batch)
        loss.backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in model.named_parameters()
        }
        if setting.clip_norm:
            norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
            for gradient in gradients.values():
                gradient.mul_(min(1.0, setting.clip_norm / (norm + 1e-6)))
        dense = {n: g for n, g in gradients.items() if not n.startswith("tables.")}
        if step == 1:
            out["loss"] = loss.detach()
            out |= {f"gradient/{n}": g.clone() for n, g in dense.items()}
        with torch.no_grad():
            for table, rows in looked_up(model, batch).items():
                weight = model.tables.weight(table)
                for row in rows:
                    update_row(
                        setting,
                        weight[row].numpy(),
                        gradients[f"tables.tables.{table}.weight"][row].numpy(),
                        states.setdefault((table, row), {}),
                        step,
                    )
            for n, gradient in dense.items():
                model.get_parameter(n).sub_(gradient, alpha=DENSE_RATE)
    return out | {
        f"table/{table}": model.tables.weight(table).detach() for table in model.tables.sizes
    }


@pytest.fixture(scope="module", params=[(1, ""), (2, "horovodrun"), (3, "mpirun"), (4, "mpirun")])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    ranks, launcher = request.param
    file = tmp_path_factory.mktemp("gradients") / "results.safetensors"
    run_program("gradients.py", [str(file)], ranks, launcher)
    return load_file(file)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_give_the_results_of_the_global_batch(name: str, results: dict[str, Tensor]) -> None:
    # FBGEMM computes in float32.
    tolerance = 2e-6 if SETTINGS[name].kernel == "fbgemm" else 1e-12
    reference = expected(name)
    got = {key.split("/", 1)[1]: v for key, v in results.items() if key.split("/", 1)[0] == name}
    assert got.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.allclose(got[key].double(), value, rtol=0, atol=tolerance), key


def test_every_setting_updates_its_tables() -> None:
    start = small_model(SETTINGS["ranking-sharded"].config())
    schema = start.schema
    for name, setting in SETTINGS.items():
        for table in start.tables.sizes:
            if setting.objective == "retrieval" and schema[table].side == "scene":
                continue  # towers have no scene features
            changed = expected(name)[f"table/{table}"] != start.tables.weight(table)
            assert changed.any(), (name, table)
            assert not changed[0].any()
