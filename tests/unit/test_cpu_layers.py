"""The faster CPU layers compute what plain torch computes, and the switch chooses between them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from hvdrec.models import cpu_layers
from hvdrec.models.cpu_layers import (
    MIN_ONEDNN_WORK,
    CpuLayers,
    Dropout,
    ReluDropout,
    joined,
    use_cpu_layers,
    vendor_cpu_layers,
)
from hvdrec.models.layers import Mlp
from tests.small_model import Setting, small_batch, small_model

WIDTH, HIDDEN = 120, (300, 200)
ROWS = -(-MIN_ONEDNN_WORK // (120 * 300 + 300 * 200))
SHAPE = (500, 401)


def mlp(choice: CpuLayers, hidden: tuple[int, ...] = HIDDEN, dropout: float = 0.0) -> Mlp:
    """Return an MLP with the same weights for every choice."""
    torch.manual_seed(0)
    network = Mlp(WIDTH, hidden, dropout)
    use_cpu_layers(network, choice)
    return network


def step(network: Mlp, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the output and all gradients of one step."""
    torch.manual_seed(1)
    network = network.to(dtype)
    inputs = torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True)
    out = network(inputs)
    return [out.detach(), *grad(out.square().mean(), [inputs, *network.parameters()])]


def assert_close(ours: list[Tensor], plain: list[Tensor], share: float, least: float) -> None:
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype is theirs.dtype
        floor = least * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=share, atol=floor)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the faster versions that were run, in order."""
    for choice in ("fused", "onednn"):
        cpu_layers._works(choice)  # the check runs them, too
    names: list[str] = []
    for name in ("_run_fused", "_run_onednn"):
        original = getattr(cpu_layers, name)

        def recorded(*arguments: object, name: str = name, original: object = original) -> object:
            names.append(name.removeprefix("_run_"))
            return original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(cpu_layers, name, recorded)
    return names


@pytest.mark.parametrize("choice", ["fused", "onednn"])
def test_faster_layers_compute_what_plain_layers_compute(
    choice: CpuLayers, used: list[str]
) -> None:
    plain = step(mlp("plain"))
    assert used == []
    assert_close(step(mlp(choice)), plain, 1e-4, 1e-5)
    assert used == [choice]


def test_onednn_layers_with_dropout_compute_what_fused_ones_compute(used: list[str]) -> None:
    # Both draw the same masks; with dropout, "fused" runs plain linear layers.
    assert_close(step(mlp("onednn", dropout=0.1)), step(mlp("fused", dropout=0.1)), 1e-4, 1e-5)
    assert used == ["onednn"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fused_layers_take_column_blocks(dtype: torch.dtype, used: list[str]) -> None:
    is_bf16 = dtype is torch.bfloat16
    has_products = not is_bf16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def run(choice: CpuLayers) -> list[Tensor]:
        network = mlp(choice, (*HIDDEN, 100))
        torch.manual_seed(1)
        vectors = torch.randn(64, WIDTH - 3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            out = network([vectors[:, :50], torch.randn(64, 3), vectors[:, 50:]])
        assert out.dtype is dtype
        gradient = torch.randn_like(out)
        before = gradient.clone()
        gradients = grad([out], [vectors, *network.parameters()], [gradient])
        assert torch.equal(gradient, before)  # the caller may still need it
        return [out.detach(), *gradients]

    # In bf16, sums in another order round differently, to 8 bits.
    share, least = (0.02, 0.01) if is_bf16 else (1e-5, 1e-6)
    assert_close(run("fused"), run("plain"), share, least)
    # A CPU without bf16 products computes with plain layers.
    assert used == (["fused"] if has_products else [])


@pytest.mark.parametrize("choice", ["plain", "fused", "onednn"])
def test_a_step_repeats_bit_for_bit(choice: CpuLayers) -> None:
    first, second = (step(mlp(choice, dropout=0.1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("choice", "options"),
    [
        ("onednn", {"rows": 0}),
        ("onednn", {"rows": ROWS - 1}),
        ("onednn", {"dtype": torch.float64}),
        ("fused", {"rows": 8, "dtype": torch.float64}),
    ],
    ids=str,
)
def test_small_or_unsuitable_steps_use_plain_layers(
    choice: CpuLayers, options: dict[str, object], used: list[str]
) -> None:
    step(mlp(choice), **options)  # type: ignore[arg-type]
    assert used == []


@pytest.mark.parametrize("choice", ["fused", "onednn"])
def test_evaluation_uses_plain_layers(choice: CpuLayers, used: list[str]) -> None:
    mlp(choice).eval()(torch.randn(ROWS, WIDTH))
    assert mlp(choice, ())(inputs := torch.randn(ROWS, WIDTH)) is inputs
    assert used == []


def test_the_switch_reaches_every_layer_of_a_model(used: list[str]) -> None:
    config = Setting("joint").config()
    model = small_model(config, with_tables=True).float().train()
    codes = {
        name: code.float() if code.is_floating_point() else code
        for name, code in small_batch(12).features.items()
    }
    outputs = {}
    for choice in ("plain", "fused"):
        use_cpu_layers(model, choice)  # type: ignore[arg-type]
        outputs[choice] = model(codes).logit
    assert used == ["fused"] * 3  # two towers and the ranker
    torch.testing.assert_close(outputs["fused"], outputs["plain"], rtol=1e-5, atol=1e-6)


class NewTorch:
    """Stands in for the operators of a torch that has changed them."""

    def _linear_pointwise(self, *arguments: object) -> Tensor:
        raise TypeError("_linear_pointwise() takes 7 arguments")


class WrongTorch:
    def _linear_pointwise(self, inputs: Tensor, *rest: object) -> Tensor:
        return torch.zeros(len(inputs), len(rest[0]))  # type: ignore[arg-type]


def forget_the_checks() -> None:
    cpu_layers._works.cache_clear()
    cpu_layers._has_bf16_products.cache_clear()


@pytest.fixture
def unchecked(used: list[str]) -> Iterator[list[str]]:
    """Forget which layers work, before and after a test that changes torch."""
    forget_the_checks()
    yield used
    forget_the_checks()


@pytest.mark.parametrize(
    ("operators", "reason"),
    [
        (object(), "'object' object has no attribute '_linear_pointwise'"),
        (NewTorch(), "_linear_pointwise() takes 7 arguments"),
        (WrongTorch(), "not close"),
    ],
)
def test_a_torch_with_other_private_operators_uses_plain_layers(
    operators: object,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unchecked: list[str],
) -> None:
    plain = step(mlp("plain"))
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    with caplog.at_level(logging.WARNING):
        network = mlp("fused")
        unchecked.clear()  # the check itself runs them once
        assert all(torch.equal(a, b) for a, b in zip(step(network), plain, strict=True))
        step(network)
    assert unchecked == []
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "MLPs use plain layers" in record.getMessage()


def test_a_torch_without_onednns_layout_uses_plain_layers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, unchecked: list[str]
) -> None:
    plain = step(mlp("plain"))

    def to_mkldnn(self: Tensor) -> Tensor:
        raise RuntimeError("to_mkldnn was removed")

    monkeypatch.setattr(Tensor, "to_mkldnn", to_mkldnn)
    with caplog.at_level(logging.WARNING):
        network = mlp("onednn")
        unchecked.clear()
        assert all(torch.equal(a, b) for a, b in zip(step(network), plain, strict=True))
    assert unchecked == []
    assert "to_mkldnn was removed" in caplog.text


@pytest.mark.usefixtures("unchecked")
def test_the_check_of_the_layers_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert cpu_layers._works("fused")
    assert cpu_layers._works("onednn")
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_without_its_operator_uses_plain_layers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, unchecked: list[str]
) -> None:
    class OldTorch:
        _linear_pointwise = torch.ops.mkldnn._linear_pointwise

    monkeypatch.setattr(torch.ops, "mkldnn", OldTorch)
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", dtype=torch.bfloat16):
        network = mlp("fused")
        unchecked.clear()
        step(network)
        step(network)
    assert unchecked == []
    assert len(caplog.records) == 1
    assert "_is_mkldnn_bf16_supported" in caplog.text


def test_the_default_follows_the_vendor_and_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layers, "_is_intel", lambda: True)
    assert vendor_cpu_layers(bf16=False) == vendor_cpu_layers(bf16=True) == "fused"
    monkeypatch.setattr(cpu_layers, "_is_intel", lambda: False)
    assert (vendor_cpu_layers(bf16=False), vendor_cpu_layers(bf16=True)) == ("onednn", "fused")


def fast(layer: nn.Module) -> nn.Module:
    use_cpu_layers(layer, "fused")
    return layer


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_fast_dropout_drops_the_given_share_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    out = fast(Dropout(rate))(torch.ones(SHAPE, dtype=torch.float64))
    # Five standard deviations of the share of 200,500 independent elements.
    far = 5 * (rate * (1 - rate) / out.numel()) ** 0.5
    assert (out == 0).double().mean().item() == pytest.approx(rate, abs=far + 1e-5)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=0.02)
    assert out.mean().item() == pytest.approx(1.0, abs=far / (1 - rate))


def test_neighbouring_elements_are_dropped_independently() -> None:
    torch.manual_seed(0)
    zero = (fast(Dropout(0.5))(torch.ones(1_000_000)) == 0).double()
    for distance in (1, 2, 3, 4, 8):
        both = (zero[:-distance] * zero[distance:]).mean().item()
        assert both == pytest.approx(0.25, abs=0.0025)


@pytest.mark.parametrize("choice", ["plain", "fused"])
def test_gradients_flow_through_kept_positive_elements(choice: CpuLayers) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    layer = ReluDropout(0.25)
    use_cpu_layers(layer, choice)
    out = layer(inputs)
    (gradient,) = grad(out.sum(), inputs)
    kept = out != 0
    assert 0.3 < kept.double().mean().item() < 0.45
    torch.testing.assert_close(out[kept], inputs[kept] / 0.75)
    assert (inputs[kept] > 0).all()
    torch.testing.assert_close(gradient, kept.double() / 0.75)


@pytest.mark.parametrize("layer", [Dropout, ReluDropout])
def test_masks_follow_torchs_generator(layer: type[Dropout]) -> None:
    inputs, drop = torch.rand(SHAPE), fast(layer(0.5))
    torch.manual_seed(3)
    first, second = drop(inputs), drop(inputs)
    torch.manual_seed(3)
    assert torch.equal(drop(inputs), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0), Dropout(0.5)])
def test_nothing_is_dropped_without_training_rate_or_rows(layer: Dropout) -> None:
    inputs = torch.randn(0 if layer.training and layer.p else 7, 4)
    assert torch.equal(fast(layer)(inputs), inputs)
    relu = fast(ReluDropout(layer.p).train(layer.training))
    assert torch.equal(relu(inputs), inputs.relu())


def columns(*widths: int) -> tuple[Tensor, list[Tensor]]:
    matrix = (torch.arange(4 * sum(widths)).reshape(4, -1) + 0.5).requires_grad_()
    return matrix, list(torch.split(matrix * 2, list(widths), 1))


def join_and_count(monkeypatch: pytest.MonkeyPatch, parts: list[Tensor]) -> tuple[Tensor, int]:
    """Return the joined blocks and the number of tensors that were concatenated."""
    counts = [1]
    cat = torch.cat

    def counting(tensors: list[Tensor], dim: int) -> Tensor:
        counts[0] = len(tensors)
        return cat(tensors, dim)

    monkeypatch.setattr(torch, "cat", counting)
    out = joined(parts)
    monkeypatch.undo()
    assert torch.equal(out, cat(parts, 1))
    return out, counts[0]


def test_all_columns_of_one_matrix_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    first, a = columns(2, 1, 3)
    second, b = columns(1, 1)
    empty = torch.zeros(4, 0)
    assert join_and_count(monkeypatch, a)[1] == 1
    out, count = join_and_count(monkeypatch, [*a, empty, *b])
    assert count == 2
    for matrix, gradient in zip((first, second), grad(out.sum(), (first, second)), strict=True):
        assert torch.equal(gradient, torch.full_like(matrix, 2.0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("missing", 2), ("swapped", 3), ("between", 4), ("detached", 3), ("other", 2)],
)
def test_other_blocks_are_concatenated(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: int
) -> None:
    matrix, (a, b, c) = columns(2, 1, 3)
    parts = {
        "missing": [a, b],
        "swapped": [b, a, c],
        "between": [a, torch.zeros(4, 1), b, c],
        "detached": [a.detach(), b.detach(), c.detach()],
        "other": [a, columns(2, 1, 3)[1][1]],
    }[name]
    out, count = join_and_count(monkeypatch, parts)
    assert count == expected
    assert out.requires_grad == (name != "detached")
    assert matrix.grad is None
