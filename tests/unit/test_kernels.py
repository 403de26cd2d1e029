"""The kernels: both pass the same tests, and touch the rows they are given and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvdrec.embeddings import kernels
from hvdrec.embeddings.kernels import (
    HUGE_BYTES,
    KERNELS,
    FbgemmKernel,
    Kernel,
    KernelName,
    OptimizerName,
    RowOptimizer,
    TorchKernel,
    fastest_kernel,
    fbgemm_refuses,
)
from hvdrec.errors import UserError

BOTH = [
    (kernel, optimizer)
    for kernel in ("torch", "fbgemm")
    for optimizer in ("sgd", "adagrad", "rowwise-adagrad", "adam")
    if (kernel, optimizer) != ("fbgemm", "adam")
]


def make(kernel: KernelName, optimizer: OptimizerName, decay: float = 0.0) -> Kernel:
    made = KERNELS[kernel](40, 8, RowOptimizer(optimizer, decay))
    made.weight.copy_(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)))
    made.rate = 0.1
    return made


@pytest.mark.parametrize(("kernel", "optimizer"), BOTH)
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_first_step_by_hand(kernel: KernelName, optimizer: OptimizerName, decay: float) -> None:
    made = make(kernel, optimizer, decay)
    rows = torch.tensor([3, 17, 0])
    before = made.weight.clone()
    gradient = torch.arange(24.0).reshape(3, 8) - 7.3
    assert torch.equal(made.fetch(rows), before[rows])
    made.update(rows, gradient, 1)
    g = gradient + decay * before[rows]
    steps = {
        "sgd": g,
        "adagrad": g.sign(),
        "rowwise-adagrad": g / g.square().mean(1, keepdim=True).sqrt(),
        "adam": g.sign(),
    }
    assert torch.allclose(made.weight[rows], before[rows] - 0.1 * steps[optimizer], atol=1e-5)
    others = torch.ones(40, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(made.weight[others], before[others])
    assert all(not state[others].any() for state in made.state.values())


@pytest.mark.parametrize("kernel", ["torch", "fbgemm"])
@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise-adagrad"])
def test_an_accumulator_that_begins_above_zero(
    kernel: KernelName, optimizer: OptimizerName
) -> None:
    made = KERNELS[kernel](40, 8, RowOptimizer(optimizer, initial_accumulator=9.0))
    assert (made.state["accumulator"] == 9).all()
    made.rate = 0.5
    made.update(torch.tensor([7]), torch.full((1, 8), 4.0), 1)
    assert torch.allclose(made.weight[7], torch.full((8,), -0.5 * 4 / 5))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise-adagrad"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_kernels_agree_over_many_steps(optimizer: OptimizerName, decay: float) -> None:
    kernels = [make("torch", optimizer, decay), make("fbgemm", optimizer, decay)]
    random = torch.Generator().manual_seed(2)
    for step in range(1, 21):
        rows = torch.randperm(40, generator=random)[:15]
        gradient = torch.randn(15, 8, generator=random)
        for kernel in kernels:
            kernel.rate = 0.1 / step
            kernel.fetch(rows)
            kernel.update(rows, gradient, step)
    assert torch.allclose(kernels[0].weight, kernels[1].weight, atol=1e-5)
    for name, state in kernels[0].state.items():
        other = kernels[1].state[name].reshape(state.shape)
        assert torch.allclose(state, other, rtol=1e-5, atol=1e-5)


def test_fbgemm_sums_a_row_given_twice_before_the_step() -> None:
    plain, fused = make("torch", "rowwise-adagrad"), make("fbgemm", "rowwise-adagrad")
    assert fused.sums_duplicates
    gradient = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    fused.update(torch.tensor([5, 9, 5]), gradient, 1)
    plain.update(torch.tensor([5, 9]), torch.stack([gradient[0] + gradient[2], gradient[1]]), 1)
    assert torch.allclose(plain.weight, fused.weight, atol=1e-6)


def test_looking_without_gradients_is_no_step() -> None:
    for kernel in ("torch", "fbgemm"):
        made = make(kernel, "adagrad")  # type: ignore[arg-type]
        with torch.no_grad():
            found = made.fetch(torch.tensor([1, 1, 2]))
        assert torch.equal(found[0], found[1])
        assert not made.state["accumulator"].any()


def test_what_fbgemm_refuses_is_told() -> None:
    assert "multiples of 4, not 6" in str(fbgemm_refuses(6, RowOptimizer(), torch.float32))
    assert "no 'adam'" in str(fbgemm_refuses(8, RowOptimizer("adam"), torch.float32))
    assert "float32" in str(fbgemm_refuses(8, RowOptimizer(), torch.float64))
    assert fbgemm_refuses(8, RowOptimizer(), torch.float32) is None
    with pytest.raises(UserError, match="multiples of 4, not 6; use 'torch' or 'auto'"):
        FbgemmKernel(10, 6, RowOptimizer())


def test_the_fastest_is_one_that_can() -> None:
    device = torch.device("cpu")
    assert fastest_kernel(6, RowOptimizer(), torch.float32, device) == "torch"
    assert fastest_kernel(8, RowOptimizer(), torch.float32, device, 64) in KERNELS


def test_the_reference_keeps_its_type() -> None:
    made = TorchKernel(5, 3, RowOptimizer("adam"), torch.float64)
    assert made.weight.dtype == made.state["mean"].dtype == torch.float64
    assert RowOptimizer("adam").state_width(3) == 6
    assert RowOptimizer("rowwise-adagrad").state_width(3) == 1


def test_rows_in_huge_pages_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, gradient = torch.tensor([4, 1]), torch.full((2, 8), 0.5)
    weights = []
    for least in (HUGE_BYTES, 1):
        monkeypatch.setattr(kernels, "HUGE_BYTES", least)
        kernel = make("torch", "adagrad")
        kernel.rate = 0.1
        kernel.fetch(rows)
        kernel.update(rows, gradient, 1)
        weights.append(kernel.weight)
    assert torch.equal(*weights)
    moved = (weights[1] != make("torch", "adagrad").weight).any(1)
    assert moved.nonzero().squeeze(1).tolist() == [1, 4]


def test_large_tables_ask_for_huge_pages() -> None:
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        large = kernels.zeros((HUGE_BYTES // 8, 2), torch.float32, "cpu")
        small = kernels.zeros((8, 2), torch.float32, "cpu")
        assert "hg" in memory_flags(large.data_ptr())
        assert "hg" not in memory_flags(small.data_ptr())


def memory_flags(address: int) -> list[str]:
    """Return what the kernel was told of the memory around an address."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, stop = (int(end, 16) for end in first.split("-"))
            is_there = start <= address < stop
        elif is_there and first == "VmFlags:":
            return rest
    raise AssertionError(f"nothing is at {address:x}")
