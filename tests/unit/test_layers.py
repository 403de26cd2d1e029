"""The MLP computes the same in oneDNN's layout and in torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvdrec.models import layers
from hvdrec.models.layers import ONEDNN_WORK, Mlp

WIDTH, HIDDEN = 120, (300, 200)
PRODUCTS = 120 * 300 + 300 * 200
ROWS = -(-ONEDNN_WORK // PRODUCTS)


def trained(
    rows: int = ROWS,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> tuple[list[Tensor], bool]:
    """Return output and gradients of one step, and whether it ran in oneDNN's layout."""
    torch.manual_seed(0)
    network = Mlp(WIDTH, HIDDEN, dropout).to(dtype)
    inputs = torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True)
    seen: list[bool] = []
    network[0].register_forward_hook(lambda _, given, __: seen.append(given[0].is_mkldnn))
    out = network(inputs)
    out.square().mean().backward()
    return [out.detach(), inputs.grad, *(p.grad for p in network.parameters())], seen == [True]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layouts_agree(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    found, converted = trained(dropout=dropout)
    monkeypatch.setattr(layers, "ONEDNN_WORK", 2 * ONEDNN_WORK)
    wanted, without = trained(dropout=dropout)
    assert converted
    assert not without
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_a_step_repeats_bit_for_bit() -> None:
    first, second = trained(dropout=0.1)[0], trained(dropout=0.1)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"rows": 0}, {"rows": ROWS - 1}, {"dtype": torch.float64}],
    ids=str,
)
def test_what_is_small_or_cannot_be_converted_stays(options: dict[str, object]) -> None:
    assert not trained(**options)[1]  # type: ignore[arg-type]


def test_without_training_and_in_bf16_layers_stay() -> None:
    network = Mlp(WIDTH, HIDDEN, 0.0)
    inputs = torch.randn(ROWS, WIDTH)
    assert network._takes_onednn(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not network._takes_onednn(inputs)
    assert not network.eval()._takes_onednn(inputs)
    assert Mlp(WIDTH, (), 0.0)(inputs) is inputs
