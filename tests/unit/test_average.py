"""Moving averages of weights, against their definition."""

from __future__ import annotations

import pytest
import torch

from hvdrec.parallel.ranks import World
from hvdrec.training.average import AVERAGE, Averages
from tests.small_model import Setting, small_config, small_model, small_tables


@pytest.mark.parametrize("every", [1, 3])
def test_averages_follow_their_definition(every: int) -> None:
    config = small_config("ranking")
    model = small_model(config, with_tables=False)
    tables = small_tables(config, small_model(config), World(), Setting())
    averages = Averages(model, tables, 0.9, every)
    weight, kernel = model.get_parameter("ranker.head.weight"), tables.kernels[0]
    expected, rows = weight.detach().clone(), kernel.weight.clone()
    for number in range(30):
        with torch.no_grad():
            weight.add_(number)
            kernel.weight.mul_(1.01)
        averages.update(number)
        if (number + 1) % every == 0:
            updates = (number + 1) // every
            keep = min(0.9**every, updates / (1 + updates))
            expected = keep * expected + (1 - keep) * weight.detach()
            rows = keep * rows + (1 - keep) * kernel.weight
    assert torch.allclose(averages.dense["ranker.head.weight"], expected)
    assert torch.allclose(kernel.state[AVERAGE], rows)


def test_averages_are_swapped_in_and_out() -> None:
    config = small_config("ranking")
    model = small_model(config, with_tables=False)
    tables = small_tables(config, small_model(config), World(), Setting())
    averages = Averages(model, tables, 0.5, 1)
    weight, kernel = model.get_parameter("ranker.head.weight"), tables.kernels[0]
    before, rows = weight.detach().clone(), kernel.weight.clone()
    with torch.no_grad():
        weight.zero_()
        kernel.weight.zero_()
    with averages.swapped_in():
        assert torch.equal(weight, before) and torch.equal(kernel.weight, rows)
    assert not (weight.any() or kernel.weight.any())
    assert torch.equal(averages.dense["ranker.head.weight"], before)
