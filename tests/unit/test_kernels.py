"""Tests of the kernels: both pass the same tests and touch only the given rows."""

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
    default_kernel,
    fbgemm_problem,
)
from hvdrec.errors import UserError

BOTH = [
    (kernel, optimizer)
    for kernel in ("torch", "fbgemm")
    for optimizer in ("sgd", "adagrad", "rowwise-adagrad", "adam")
    if (kernel, optimizer) != ("fbgemm", "adam")
]


def make(kernel: KernelName, optimizer: OptimizerName, decay: float = 0.0) -> Kernel:
    table = KERNELS[kernel](40, 8, RowOptimizer(optimizer, decay))
    table.weight.copy_(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)))
    table.learning_rate = 0.1
    return table


@pytest.mark.parametrize(("kernel", "optimizer"), BOTH)
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_first_step_matches_the_definition(
    kernel: KernelName, optimizer: OptimizerName, decay: float
) -> None:
    table = make(kernel, optimizer, decay)
    rows = torch.tensor([3, 17, 0])
    before = table.weight.clone()
    gradient = torch.arange(24.0).reshape(3, 8) - 7.3
    assert torch.equal(table.fetch(rows), before[rows])
    table.update(rows, gradient, 1)
    g = gradient + decay * before[rows]
    steps = {
        "sgd": g,
        "adagrad": g.sign(),
        "rowwise-adagrad": g / g.square().mean(1, keepdim=True).sqrt(),
        "adam": g.sign(),
    }
    assert torch.allclose(table.weight[rows], before[rows] - 0.1 * steps[optimizer], atol=1e-5)
    others = torch.ones(40, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(table.weight[others], before[others])
    assert all(not state[others].any() for state in table.state.values())


@pytest.mark.parametrize("kernel", ["torch", "fbgemm"])
@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise-adagrad"])
def test_the_initial_accumulator_enters_the_first_step(
    kernel: KernelName, optimizer: OptimizerName
) -> None:
    table = KERNELS[kernel](40, 8, RowOptimizer(optimizer, initial_accumulator=9.0))
    assert (table.state["accumulator"] == 9).all()
    table.learning_rate = 0.5
    table.update(torch.tensor([7]), torch.full((1, 8), 4.0), 1)
    assert torch.allclose(table.weight[7], torch.full((8,), -0.5 * 4 / 5))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise-adagrad"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_kernels_agree_over_many_steps(optimizer: OptimizerName, decay: float) -> None:
    kernels = [make("torch", optimizer, decay), make("fbgemm", optimizer, decay)]
    random = torch.Generator().manual_seed(2)
    for step in range(1, 21):
        rows = torch.randperm(40, generator=random)[:15]
        gradient = torch.randn(15, 8, generator=random)
        for kernel in kernels:
            kernel.learning_rate = 0.1 / step
            kernel.fetch(rows)
            kernel.update(rows, gradient, step)
    assert torch.allclose(kernels[0].weight, kernels[1].weight, atol=1e-5)
    for name, state in kernels[0].state.items():
        other = kernels[1].state[name].reshape(state.shape)
        assert torch.allclose(state, other, rtol=1e-5, atol=1e-5)


def test_fbgemm_sums_the_gradients_of_a_repeated_row() -> None:
    plain, fused = make("torch", "rowwise-adagrad"), make("fbgemm", "rowwise-adagrad")
    assert fused.sums_duplicates
    gradient = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    fused.update(torch.tensor([5, 9, 5]), gradient, 1)
    plain.update(torch.tensor([5, 9]), torch.stack([gradient[0] + gradient[2], gradient[1]]), 1)
    assert torch.allclose(plain.weight, fused.weight, atol=1e-6)


def test_fetching_without_gradients_changes_no_state() -> None:
    for kernel in ("torch", "fbgemm"):
        table = make(kernel, "adagrad")  # type: ignore[arg-type]
        with torch.no_grad():
            vectors = table.fetch(torch.tensor([1, 1, 2]))
        assert torch.equal(vectors[0], vectors[1])
        assert not table.state["accumulator"].any()


def test_rows_that_fbgemm_cannot_hold_are_refused() -> None:
    assert "multiple of 4, not 6" in str(fbgemm_problem(6, RowOptimizer(), torch.float32))
    assert "'adam'" in str(fbgemm_problem(8, RowOptimizer("adam"), torch.float32))
    assert "float32" in str(fbgemm_problem(8, RowOptimizer(), torch.float64))
    assert fbgemm_problem(8, RowOptimizer(), torch.float32) is None
    with pytest.raises(UserError, match="multiple of 4, not 6; use 'torch' or 'auto'") as error:
        FbgemmKernel(10, 6, RowOptimizer())
    assert error.value.field == "parallel.kernel"


def test_the_default_kernel_depends_on_device_and_rows_only() -> None:
    adagrad, adam = RowOptimizer(), RowOptimizer("adam")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_kernel(8, adagrad, torch.float32, cpu) == "torch"
    assert default_kernel(8, adagrad, torch.float32, gpu) == "fbgemm"
    assert default_kernel(6, adagrad, torch.float32, gpu) == "torch"
    assert default_kernel(8, adam, torch.float32, gpu) == "torch"


def test_the_reference_keeps_its_dtype() -> None:
    table = TorchKernel(5, 3, RowOptimizer("adam"), torch.float64)
    assert table.weight.dtype == table.state["mean"].dtype == torch.float64
    assert RowOptimizer("adam").state_width(3) == 6
    assert RowOptimizer("rowwise-adagrad").state_width(3) == 1


def test_huge_pages_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, gradient = torch.tensor([4, 1]), torch.full((2, 8), 0.5)
    weights = []
    for least in (HUGE_BYTES, 1):
        monkeypatch.setattr(kernels, "HUGE_BYTES", least)
        kernel = make("torch", "adagrad")
        kernel.learning_rate = 0.1
        kernel.fetch(rows)
        kernel.update(rows, gradient, 1)
        weights.append(kernel.weight)
    assert torch.equal(*weights)
    changed = (weights[1] != make("torch", "adagrad").weight).any(1)
    assert changed.nonzero().squeeze(1).tolist() == [1, 4]


def test_large_tables_use_huge_pages() -> None:
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        large = kernels.allocate_zeros((HUGE_BYTES // 8, 2), torch.float32, "cpu")
        small = kernels.allocate_zeros((8, 2), torch.float32, "cpu")
        assert "hg" in memory_flags(large.data_ptr())
        assert "hg" not in memory_flags(small.data_ptr())


def memory_flags(address: int) -> list[str]:
    """Return the flags of the memory mapping around an address."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, stop = (int(end, 16) for end in first.split("-"))
            is_there = start <= address < stop
        elif is_there and first == "VmFlags:":
            return rest
    raise AssertionError(f"nothing is mapped at {address:x}")
