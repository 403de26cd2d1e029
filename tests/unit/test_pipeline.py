"""Preparing batches for a step."""

from __future__ import annotations

import numpy as np
import torch

from hvdrec.training.pipeline import NegativeSampler
from tests.small_model import small_batch


def test_drawn_items_are_appended_with_weight_0_and_without_a_user() -> None:
    batch = small_batch(6, padding=2)
    features = {
        "item_id": np.arange(10, 15),
        "genres": np.arange(15).reshape(5, 3),
        "price": np.arange(20, 25),
    }
    more = NegativeSampler(features, 5).append_to(batch, 4, np.random.default_rng(0))
    assert (len(more.label), more.rows) == (12, 6)
    for name, column in batch.features.items():
        assert torch.equal(more.features[name][:8], column)
        if name not in features:
            assert not more.features[name][8:].any()
    drawn = more.item_index[8:].numpy()
    assert len(set(drawn.tolist())) > 1
    for name, column in features.items():
        assert (more.features[name][8:].numpy() == column[drawn]).all()
    assert not (more.weight[8:].any() or more.label[8:].any() or more.user_index[8:].any())


def test_drawn_items_depend_only_on_the_seed() -> None:
    batch = small_batch(3)
    sampler = NegativeSampler({"item_id": np.arange(1000)}, 1000)
    drawn = [
        sampler.append_to(batch, 50, np.random.default_rng(seed)).item_index[3:]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
