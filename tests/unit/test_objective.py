"""Losses of a step with drawn negatives or with a teacher, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hvdrec.parallel.ranks import World
from hvdrec.training.objective import compute_gradients
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import NegativeSampler, make_preparer, steps
from hvdrec.training.state import TrainState
from tests.small_model import (
    SIZES,
    Setting,
    of_type,
    small_batch,
    small_config,
    small_model,
    small_tables,
)

ITEMS, DRAWN = 9, 5


def test_drawn_items_are_negatives_of_every_positive_row() -> None:
    config = small_config("retrieval", uniform_negatives=DRAWN)
    whole = small_model(config)
    tables = small_tables(config, whole, World(), Setting())
    model = small_model(config, with_tables=False)
    random = np.random.default_rng(5)
    features = {
        "item_id": random.integers(2, SIZES["item_id"], ITEMS),
        "genres": random.integers(0, SIZES["genres"], (ITEMS, 3)),
        "price": random.integers(0, SIZES["price"], ITEMS),
    }
    share = torch.arange(1, ITEMS + 1, dtype=torch.float64) / 45
    prepare = make_preparer(tables, config, 0, NegativeSampler(features, ITEMS))
    shown = replace(of_type(small_batch(12), torch.float64), tasks=None)
    (step,) = steps([prepare(0, shown)], tables, torch.device("cpu"))
    optimizer = make_optimizer(model, config.train)
    loss, _ = compute_gradients(TrainState(config, model, tables, optimizer, share.log()), step)

    batch = step.batch
    assert len(batch.label) == 12 + DRAWN
    with torch.no_grad():
        output = whole(batch.features)
    positives = [n for n in range(12) if batch.label[n] * batch.weight[n] > 0]
    candidates = [*positives, *range(12, 12 + DRAWN)]
    total, weight = 0.0, 0.0
    for row in positives:
        terms = []
        for column in candidates:
            item = batch.item_index[column]
            if column != row and item == batch.item_index[row]:
                continue
            q = (len(positives) * share[item] + DRAWN / ITEMS) / (len(positives) + DRAWN)
            logit = (output.user[row] * output.item[column]).sum() / 0.2 - q.log()
            terms.append(logit)
            if column == row:
                own = logit
        total += float(batch.weight[row] * (torch.stack(terms).logsumexp(0) - own))
        weight += float(batch.weight[row])
    assert loss.total.item() == pytest.approx(total / weight, rel=1e-10)


def test_labels_are_mixed_with_the_teachers_probabilities() -> None:
    config = small_config("ranking", teacher="runs/teacher", teacher_weight=0.3)
    whole, teacher = small_model(config), small_model(config, seed=1).eval()
    tables = small_tables(config, whole, World(), Setting())
    model = small_model(config, with_tables=False)
    batch = replace(of_type(small_batch(12), torch.float64), tasks=None)
    (step,) = steps([make_preparer(tables, config, 0)(0, batch)], tables, torch.device("cpu"))
    optimizer = make_optimizer(model, config.train)
    loss, _ = compute_gradients(TrainState(config, model, tables, optimizer, teacher=teacher), step)
    with torch.no_grad():
        student = whole(batch.features).logit.sigmoid()
        soft = teacher(batch.features).logit.sigmoid()
    label = 0.7 * batch.label + 0.3 * soft
    losses = -batch.weight * (label * student.log() + (1 - label) * (1 - student).log())
    assert loss.total.item() == pytest.approx((losses.sum() / batch.weight.sum()).item(), rel=1e-10)
    assert not torch.allclose(student, soft)
