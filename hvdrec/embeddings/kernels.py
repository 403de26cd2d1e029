"""Kernels hold one rank's rows of the embedding tables; they read and update chosen rows.

`TorchKernel` is the reference, for any floating dtype and device. `FbgemmKernel` uses FBGEMM's
table-batched embeddings (float32). A step updates only the rows that its batch looks up. Let w be
such a row, g the sum of its gradients, lr the learning rate. Weight decay first adds
weight_decay * w to g. Then the optimizers compute:

- sgd: w -= lr * g
- adagrad: s += g^2; w -= lr * g / (sqrt(s) + eps)      (Duchi et al., JMLR 2011). The state s
  starts at initial_accumulator; a positive value keeps the first steps of rare rows small.
- rowwise-adagrad: like adagrad, but with one number s per row, to which the mean of g^2 over the
  row is added (Gupta et al., 2014; the default of DLRM and FBGEMM).
- adam: Kingma and Ba, ICLR 2015. The moments of a row change only in steps that look it up
  ("lazy"), but the bias correction counts all steps.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hvdrec.errors import invalid_value

OptimizerName = Literal["rowwise-adagrad", "adagrad", "adam", "sgd"]
KernelName = Literal["torch", "fbgemm"]

AVERAGE = "average"
"""The name of the state that holds the moving averages of a table's rows."""


@dataclass(frozen=True)
class RowOptimizer:
    """The optimizer of embedding rows and its settings, except the learning rate."""

    name: OptimizerName = "rowwise-adagrad"
    weight_decay: float = 0.0
    initial_accumulator: float = 0.0
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999

    def state_shapes(self, rows: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of each tensor of optimizer state of a table [rows, width]."""
        match self.name:
            case "sgd":
                return {}
            case "rowwise-adagrad":
                return {"accumulator": (rows,)}
            case "adagrad":
                return {"accumulator": (rows, width)}
            case "adam":
                return {"mean": (rows, width), "variance": (rows, width)}

    def initial_state(self, name: str) -> float:
        """Return the value with which the state tensor `name` is filled at first."""
        return self.initial_accumulator if name == "accumulator" else 0.0

    def state_width(self, width: int) -> int:
        """Return the number of optimizer state values of one row with `width` columns."""
        return sum(math.prod(shape) for shape in self.state_shapes(1, width).values())


class Kernel(Protocol):
    """One rank's rows of a group of embedding tables; a group has tables of one width.

    Attributes:
        name: The name of the kernel in ``parallel.kernel``.
        weight: [rows, width], the rows of all tables of the group.
        state: The optimizer state of the rows: name -> [rows] or [rows, width].
        learning_rate: The learning rate of `update`; it must be set before each step's `update`.
        needs_rate_to_fetch: Whether the learning rate must also be set before `fetch`.
        sums_duplicates: Whether `update` accepts the same row several times and sums its gradients.
    """

    name: KernelName
    weight: Tensor
    state: dict[str, Tensor]
    sums_duplicates: bool
    needs_rate_to_fetch: bool
    learning_rate: float

    def fetch(self, rows: Tensor) -> Tensor:
        """Return copies of the rows with indices int64 [n], as [n, width]."""
        ...

    def update(self, rows: Tensor, gradient: Tensor, step: int) -> None:
        """Update the rows with indices int64 [n] by their gradients [n, width].

        `step` is the number of this optimizer step, counted from 1.
        """
        ...


HUGE_BYTES = 64 << 20
"""Tensors of at least this size are allocated in huge pages of memory."""


def allocate_zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return a tensor of zeros; a large one on a CPU is in huge pages where the system has them.

    Rows are read in random order, and with small pages nearly every read misses the TLB (the CPU's
    cache of page addresses). Reading and writing 16,000 of 8,000,000 rows took a third longer with
    small pages.
    """
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or count * dtype.itemsize < HUGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not every system has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class TorchKernel:
    """The reference kernel, in plain PyTorch; see `Kernel` for its attributes."""

    name: KernelName = "torch"
    sums_duplicates = False
    needs_rate_to_fetch = False

    def __init__(
        self,
        rows: int,
        width: int,
        optimizer: RowOptimizer,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Create rows of zeros and the initial optimizer state."""
        self.optimizer = optimizer
        self.learning_rate = 0.0
        self._fetched: tuple[Tensor, Tensor] | None = None
        self.weight = allocate_zeros((rows, width), dtype, device)
        self.state = {
            key: allocate_zeros(shape, dtype, device).fill_(optimizer.initial_state(key))
            for key, shape in optimizer.state_shapes(rows, width).items()
        }

    def fetch(self, rows: Tensor) -> Tensor:
        """Return copies of the rows with indices int64 [n], as [n, width]."""
        vectors = _read(self.weight, rows)
        if torch.is_grad_enabled():
            self._fetched = (rows, vectors.detach())
        return vectors

    def update(self, rows: Tensor, gradient: Tensor, step: int) -> None:
        """Update the rows with indices int64 [n], which must be unique; see `Kernel.update`."""
        options, rate = self.optimizer, self.learning_rate
        fetched, self._fetched = self._fetched, None
        is_fetched = fetched is not None and fetched[0] is rows
        weight = fetched[1] if fetched is not None and is_fetched else _read(self.weight, rows)
        if options.weight_decay:
            gradient = gradient.add(weight, alpha=options.weight_decay)
        match options.name:
            case "sgd":
                updated = weight.add(gradient, alpha=-rate)
            case "rowwise-adagrad":
                total = self._add("accumulator", rows, gradient.square().mean(1))
                root = total.sqrt_().add_(options.eps)
                updated = weight.addcdiv(gradient, root[:, None], value=-rate)
            case "adagrad":
                total = self._add("accumulator", rows, gradient.square())
                updated = weight.addcdiv(gradient, total.sqrt_().add_(options.eps), value=-rate)
            case "adam":
                mean = self._decay("mean", rows, gradient, options.beta1)
                variance = self._decay("variance", rows, gradient.square(), options.beta2)
                root = variance.div_(1 - options.beta2**step).sqrt_().add_(options.eps)
                updated = weight.addcdiv(mean, root, value=-rate / (1 - options.beta1**step))
        _write(self.weight, rows, updated)

    def _add(self, key: str, rows: Tensor, value: Tensor) -> Tensor:
        """Add `value` to the state of some rows and return the new state of these rows."""
        total = _read(self.state[key], rows).add_(value)
        _write(self.state[key], rows, total)
        return total

    def _decay(self, key: str, rows: Tensor, value: Tensor, beta: float) -> Tensor:
        """Update the moving averages of some rows and return the new averages."""
        updated = _read(self.state[key], rows).lerp_(value, 1 - beta)
        _write(self.state[key], rows, updated)
        return updated


def _read(source: Tensor, rows: Tensor) -> Tensor:
    """Return copies of the rows with these indices."""
    return _as_doubles(source).index_select(0, rows).view(source.dtype)


def _write(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Overwrite the rows with these indices, which must be unique."""
    if target.dim() == 1:
        target.index_put_((rows,), values)  # index_copy_ took three times as long
    else:
        _as_doubles(target).index_copy_(0, rows, _as_doubles(values))


def _as_doubles(values: Tensor) -> Tensor:
    """View float32 [n, width] on a CPU as float64 [n, width / 2], which is copied faster."""
    is_even = values.dim() == 2 and values.shape[1] % 2 == 0 and values.is_contiguous()
    if is_even and values.dtype is torch.float32 and values.device.type == "cpu":
        return values.view(torch.float64)
    return values


FBGEMM_OPTIMIZERS = {
    "sgd": "EXACT_SGD",
    "adagrad": "EXACT_ADAGRAD",
    "rowwise-adagrad": "EXACT_ROWWISE_ADAGRAD",
}


class FbgemmKernel:
    """FBGEMM's table-batched embeddings, with the optimizer fused into the backward pass."""

    name: KernelName = "fbgemm"
    needs_rate_to_fetch = True

    def __init__(
        self,
        rows: int,
        width: int,
        optimizer: RowOptimizer,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Create rows of zeros and the initial optimizer state.

        Raises:
            UserError: FBGEMM cannot hold these rows, see `fbgemm_problem`.
        """
        problem = fbgemm_problem(width, optimizer, dtype)
        if problem:
            raise invalid_value("parallel.kernel", "fbgemm", problem, "use 'torch' or 'auto'")
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            EmbeddingLocation,
            PoolingMode,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        on_cpu = torch.device(device).type == "cpu"
        self._tables = SplitTableBatchedEmbeddingBagsCodegen(
            [
                (
                    rows,
                    width,
                    EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE,
                    ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA,
                )
            ],
            optimizer=EmbOptimType[FBGEMM_OPTIMIZERS[optimizer.name]],
            eps=optimizer.eps,
            pooling_mode=PoolingMode.SUM,
            stochastic_rounding=False,
            device=None if on_cpu else torch.device(device),
        )
        self.learning_rate = 0.0
        # FBGEMM's optimizers differ in how they apply weight decay, so `update` adds it to the
        # gradient.
        self._weight_decay = optimizer.weight_decay
        self.sums_duplicates = optimizer.weight_decay == 0
        self.weight: Tensor = self._tables.split_embedding_weights()[0].detach()
        self.weight.zero_()
        names = list(optimizer.state_shapes(rows, width))
        states = self._tables.split_optimizer_states()[0] if names else ()
        self.state = {name: states[i].detach() for i, name in enumerate(names)}
        for name, state in self.state.items():
            state.fill_(optimizer.initial_state(name))
        self._fetched: tuple[Tensor, Tensor] | None = None

    def fetch(self, rows: Tensor) -> Tensor:
        """Return copies of the rows with indices int64 [n], as [n, width]."""
        if not torch.is_grad_enabled():
            return self.weight.index_select(0, rows)
        out = self._look_up(rows)
        self._fetched = (rows, out)
        return out.detach()

    def update(self, rows: Tensor, gradient: Tensor, step: int) -> None:
        """Update the rows with indices int64 [n] by their gradients; see `Kernel.update`."""
        fetched = self._fetched
        out = fetched[1] if fetched is not None and fetched[0] is rows else self._look_up(rows)
        self._fetched = None
        if self._weight_decay:
            gradient = gradient.add(out.detach(), alpha=self._weight_decay)
        out.backward(gradient)  # type: ignore[no-untyped-call]

    def _look_up(self, rows: Tensor) -> Tensor:
        """Look up rows; each row is passed to FBGEMM as a bag of one entry."""
        starts = torch.arange(rows.shape[0] + 1, device=rows.device, dtype=rows.dtype)
        with torch.enable_grad():
            self._tables.set_learning_rate(self.learning_rate)
            vectors: Tensor = self._tables(rows, starts)
            return vectors


def fbgemm_problem(width: int, optimizer: RowOptimizer, dtype: torch.dtype) -> str | None:
    """Return the reason why FBGEMM's kernel cannot hold these rows, or None if it can."""
    if width % 4:
        return f"FBGEMM needs a width that is a multiple of 4, not {width}"
    if optimizer.name not in FBGEMM_OPTIMIZERS:
        return f"FBGEMM does not support '{optimizer.name}' on every device"
    if dtype != torch.float32:
        return "FBGEMM stores float32 rows only"
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError) as error:
        return f"fbgemm_gpu cannot be imported ({' '.join(str(error).split())})"
    return None


KERNELS: dict[KernelName, Callable[..., Kernel]] = {"torch": TorchKernel, "fbgemm": FbgemmKernel}


def default_kernel(
    width: int, optimizer: RowOptimizer, dtype: torch.dtype, device: torch.device
) -> KernelName:
    """Return the kernel for ``parallel.kernel = "auto"``: on a GPU, FBGEMM if it supports the rows.

    Otherwise, return the PyTorch kernel. On a CPU it is the faster one: a step on 16,384 of 131,072
    rows took 1 to 8 ms, and 17 to 26 ms with FBGEMM (row-wise Adagrad, widths 4 to 128, one
    thread). The choice does not depend on a time measurement, because the results of the kernels
    differ in the last digit, and equal runs must give equal results.
    """
    if device.type == "cpu" or fbgemm_problem(width, optimizer, dtype):
        return "torch"
    return "fbgemm"
