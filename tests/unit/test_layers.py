"""The MLP computes the same whichever way it takes, and parts are joined as torch.cat does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from hvdrec.models import layers
from hvdrec.models.layers import ONEDNN_WORK, Mlp, joined

WIDTH, HIDDEN = 120, (300, 200)
PRODUCTS = 120 * 300 + 300 * 200
ROWS = -(-ONEDNN_WORK // PRODUCTS)


@pytest.fixture(autouse=True)
def _not_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "is_intel", lambda: False)


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


def test_intels_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "is_intel", lambda: True)
    assert not trained()[1]


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


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_own_layers_give_what_torchs_give(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype
) -> None:
    if kind is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 products, so layers are never computed by them here")

    def step(chosen: torch.dtype | None) -> list[Tensor]:
        monkeypatch.setattr(Mlp, "_own_layers", lambda *_: chosen)
        torch.manual_seed(0)
        network = Mlp(WIDTH + 3, (*HIDDEN, 100), 0.0)
        vectors = torch.randn(64, WIDTH, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
            out = network([vectors[:, :50], torch.randn(64, 3), vectors[:, 50:]])
        assert out.dtype is kind
        gradient = torch.randn_like(out)
        before = gradient.clone()
        found = grad([out], [vectors, *network.parameters()], [gradient])
        assert torch.equal(gradient, before)  # others may hold it, too
        return [out.detach(), *found]

    for ours, theirs in zip(step(kind), step(None), strict=True):
        assert ours.dtype is theirs.dtype
        # In bf16 both round to 8 bits, after sums in another order.
        share, least = (0.02, 0.01) if kind is torch.bfloat16 else (1e-5, 1e-6)
        torch.testing.assert_close(ours, theirs, rtol=share, atol=least * theirs.abs().max().item())


def test_own_layers_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.randn(8, WIDTH)]
    plain, dropping = Mlp(WIDTH, HIDDEN, 0.0), Mlp(WIDTH, HIDDEN, 0.1)
    assert plain._own_layers(given) is None
    with torch.autocast("cpu", torch.bfloat16):
        has_products = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert plain._own_layers(given) is (torch.bfloat16 if has_products else None)
        assert dropping._own_layers(given) is None
        assert plain.eval()._own_layers(given) is None
    with torch.autocast("cpu", torch.float16):
        assert plain.train()._own_layers(given) is None
    monkeypatch.setattr(layers, "is_intel", lambda: True)
    assert plain._own_layers(given) is torch.float32
    assert plain._own_layers([given[0].double()]) is None
    assert plain.double()._own_layers(given) is None
    assert Mlp(WIDTH, (), 0.0)._own_layers(given) is None


def columns(*widths: int) -> tuple[Tensor, list[Tensor]]:
    matrix = (torch.arange(4 * sum(widths)).reshape(4, -1) + 0.5).requires_grad_()
    return matrix, list(torch.split(matrix * 2, list(widths), 1))


def copied(monkeypatch: pytest.MonkeyPatch, parts: list[Tensor]) -> tuple[Tensor, int]:
    """Return what `joined` gives, and of how many pieces."""
    pieces = [1]
    cat = torch.cat

    def counting(given: list[Tensor], dim: int) -> Tensor:
        pieces[0] = len(given)
        return cat(given, dim)

    monkeypatch.setattr(torch, "cat", counting)
    out = joined(parts)
    monkeypatch.undo()
    assert torch.equal(out, cat(parts, 1))
    return out, pieces[0]


def test_columns_of_one_matrix_are_joined_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first, a = columns(2, 1, 3)
    second, b = columns(1, 1)
    empty = torch.zeros(4, 0)
    assert copied(monkeypatch, a)[1] == 1
    out, pieces = copied(monkeypatch, [*a, empty, *b])
    assert pieces == 2
    for matrix, gradient in zip((first, second), grad(out.sum(), (first, second)), strict=True):
        assert torch.equal(gradient, torch.full_like(matrix, 2.0))


@pytest.mark.parametrize(
    ("name", "pieces"),
    [("missing", 2), ("swapped", 3), ("between", 4), ("detached", 3), ("other", 2)],
)
def test_other_columns_are_joined_one_by_one(
    monkeypatch: pytest.MonkeyPatch, name: str, pieces: int
) -> None:
    matrix, (a, b, c) = columns(2, 1, 3)
    parts = {
        "missing": [a, b],
        "swapped": [b, a, c],
        "between": [a, torch.zeros(4, 1), b, c],
        "detached": [a.detach(), b.detach(), c.detach()],
        "other": [a, columns(2, 1, 3)[1][1]],
    }[name]
    out, count = copied(monkeypatch, parts)
    assert count == pieces
    assert out.requires_grad == (name != "detached")
    assert matrix.grad is None
