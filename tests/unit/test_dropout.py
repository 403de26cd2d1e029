"""Dropout keeps the share that it is told, what it keeps is scaled, and it repeats."""

from __future__ import annotations

import pytest
import torch

from hvdrec.models.dropout import Dropout, ReluDropout

PLACES = (500, 401)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_the_share_of_zeros_and_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    out = Dropout(rate)(torch.ones(PLACES, dtype=torch.float64))
    # Five deviations of a share of 200,500 independent places.
    far = 5 * (rate * (1 - rate) / out.numel()) ** 0.5
    assert (out == 0).double().mean().item() == pytest.approx(rate, abs=far + 1e-5)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=0.02)
    assert out.mean().item() == pytest.approx(1.0, abs=far / (1 - rate))


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    zero = (Dropout(0.5)(torch.ones(1_000_000)) == 0).double()
    for distance in (1, 2, 3, 4, 8):
        both = (zero[:-distance] * zero[distance:]).mean().item()
        assert both == pytest.approx(0.25, abs=0.0025)


def test_gradients_pass_where_values_do() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(PLACES, dtype=torch.float64, requires_grad=True)
    out = ReluDropout(0.25)(inputs)
    out.sum().backward()
    assert inputs.grad is not None
    passed = out != 0
    assert 0.3 < passed.double().mean().item() < 0.45
    torch.testing.assert_close(out[passed], inputs[passed] / 0.75)
    assert (inputs[passed] > 0).all()
    torch.testing.assert_close(inputs.grad, passed.double() / 0.75)


@pytest.mark.parametrize("layer", [Dropout, ReluDropout])
def test_masks_follow_the_generator(layer: type[Dropout]) -> None:
    inputs = torch.rand(PLACES)
    torch.manual_seed(3)
    first, second = layer(0.5)(inputs), layer(0.5)(inputs)
    torch.manual_seed(3)
    assert torch.equal(layer(0.5)(inputs), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0), Dropout(0.5)])
def test_nothing_is_dropped_without_training_rate_or_rows(layer: Dropout) -> None:
    inputs = torch.randn(0 if layer.training and layer.p else 7, 4)
    assert torch.equal(layer(inputs), inputs)
    assert torch.equal(ReluDropout(layer.p).train(layer.training)(inputs), inputs.relu())
