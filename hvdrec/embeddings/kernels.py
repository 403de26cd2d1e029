"""Reading and updating rows of one rank's part of the embedding tables, and nothing but those rows.

Two kernels do the same: `TorchKernel`, the reference, in any floating type and on any device,
and `FbgemmKernel` on FBGEMM's table-batched embeddings (float32). Optimizers, for a looked-up row w
with summed gradient g (weight decay first adds weight_decay * w to g; rows that are not looked up
stay as they are, so weight decay acts on a row only in the steps that meet it):

- sgd: w -= rate * g
- adagrad: s += g^2; w -= rate * g / (sqrt(s) + eps)      (Duchi et al., JMLR 2011); s begins at
  initial_accumulator, which keeps the first steps of rows that are met rarely small
- rowwise-adagrad: the same with one s per row, the mean of g^2 over the row (Gupta et al., 2014;
  the default of DLRM and FBGEMM)
- adam: as Kingma and Ba, ICLR 2015, with the global step in the bias corrections ("lazy")
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hvdrec.errors import UserError

OptimizerName = Literal["rowwise-adagrad", "adagrad", "adam", "sgd"]
KernelName = Literal["torch", "fbgemm"]

AVERAGE = "average"
"""Name of the state that holds the moving averages of a table's rows."""


@dataclass(frozen=True)
class RowOptimizer:
    """How looked-up rows are updated; the rate comes with each update."""

    name: OptimizerName = "rowwise-adagrad"
    weight_decay: float = 0.0
    initial_accumulator: float = 0.0
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999

    def state_shapes(self, rows: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state beside rows [rows, width]."""
        match self.name:
            case "sgd":
                return {}
            case "rowwise-adagrad":
                return {"accumulator": (rows,)}
            case "adagrad":
                return {"accumulator": (rows, width)}
            case "adam":
                return {"mean": (rows, width), "variance": (rows, width)}

    def first_state(self, name: str) -> float:
        """Return what a state begins with."""
        return self.initial_accumulator if name == "accumulator" else 0.0

    def state_width(self, width: int) -> int:
        """Return how many numbers of state a row of this width has."""
        return sum(math.prod(shape) for shape in self.state_shapes(1, width).values())


class Kernel(Protocol):
    """One rank's rows of a group of tables.

    weight: [rows, width]; state: name -> [rows, ...]; rate: the learning rate, to be set before the
    rows of a step are updated, or if it `wants_rate`, before they are fetched. sums_duplicates:
    whether `update` takes a row several times and sums its gradients first.
    """

    name: KernelName
    weight: Tensor
    state: dict[str, Tensor]
    sums_duplicates: bool
    wants_rate: bool
    rate: float

    def fetch(self, rows: Tensor) -> Tensor:
        """Return copies of rows: int64 [n] -> [n, width]."""
        ...

    def update(self, rows: Tensor, gradient: Tensor, step: int) -> None:
        """Take an optimizer step, counted from 1, on rows int64 [n] with gradients [n, width]."""
        ...


HUGE_BYTES = 64 << 20
"""Tensors in memory from which on huge pages are asked for."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return zeros, on a CPU in huge pages where the system has them and the tensor is large.

    Rows are read from all over a table, and nearly each misses the address cache otherwise: to read
    and write 16,000 of 8,000,000 took a third longer.
    """
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or count * dtype.itemsize < HUGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not every system has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class TorchKernel:
    """The reference kernel."""

    name: KernelName = "torch"
    sums_duplicates = False
    wants_rate = False

    def __init__(
        self,
        rows: int,
        width: int,
        optimizer: RowOptimizer,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.optimizer = optimizer
        self.rate = 0.0
        self._fetched: tuple[Tensor, Tensor] | None = None
        self.weight = zeros((rows, width), dtype, device)
        self.state = {
            key: zeros(shape, dtype, device).fill_(optimizer.first_state(key))
            for key, shape in optimizer.state_shapes(rows, width).items()
        }

    def fetch(self, rows: Tensor) -> Tensor:
        """See Kernel."""
        found = _read(self.weight, rows)
        if torch.is_grad_enabled():
            self._fetched = (rows, found.detach())
        return found

    def update(self, rows: Tensor, gradient: Tensor, step: int) -> None:
        """See Kernel; each row must be given once."""
        options, rate = self.optimizer, self.rate
        known, self._fetched = self._fetched, None
        is_known = known is not None and known[0] is rows
        weight = known[1] if known is not None and is_known else _read(self.weight, rows)
        if options.weight_decay:
            gradient = gradient.add(weight, alpha=options.weight_decay)
        match options.name:
            case "sgd":
                moved = weight.add(gradient, alpha=-rate)
            case "rowwise-adagrad":
                total = self._add("accumulator", rows, gradient.square().mean(1))
                root = total.sqrt_().add_(options.eps)
                moved = weight.addcdiv(gradient, root[:, None], value=-rate)
            case "adagrad":
                total = self._add("accumulator", rows, gradient.square())
                moved = weight.addcdiv(gradient, total.sqrt_().add_(options.eps), value=-rate)
            case "adam":
                mean = self._decay("mean", rows, gradient, options.beta1)
                variance = self._decay("variance", rows, gradient.square(), options.beta2)
                root = variance.div_(1 - options.beta2**step).sqrt_().add_(options.eps)
                moved = weight.addcdiv(mean, root, value=-rate / (1 - options.beta1**step))
        _write(self.weight, rows, moved)

    def _add(self, key: str, rows: Tensor, value: Tensor) -> Tensor:
        """Add to state and return the new values of these rows."""
        total = _read(self.state[key], rows).add_(value)
        _write(self.state[key], rows, total)
        return total

    def _decay(self, key: str, rows: Tensor, value: Tensor, beta: float) -> Tensor:
        """Move state towards a value and return the new values of these rows."""
        moved = _read(self.state[key], rows).lerp_(value, 1 - beta)
        _write(self.state[key], rows, moved)
        return moved


def _read(held: Tensor, rows: Tensor) -> Tensor:
    """Return copies of rows."""
    return _in_pairs(held).index_select(0, rows).view(held.dtype)


def _write(held: Tensor, rows: Tensor, values: Tensor) -> None:
    """Overwrite rows, each given once."""
    if held.dim() == 1:
        held.index_put_((rows,), values)  # index_copy_ took three times as long
    else:
        _in_pairs(held).index_copy_(0, rows, _in_pairs(values))


def _in_pairs(values: Tensor) -> Tensor:
    """Return float32 [n, width] on a CPU as half as many doubles, which are copied faster."""
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
    """FBGEMM's table-batched embeddings, with the optimizer fused into the backward pass.

    Raises UserError for what FBGEMM cannot do: see `fbgemm_refuses`.
    """

    name: KernelName = "fbgemm"
    wants_rate = True

    def __init__(
        self,
        rows: int,
        width: int,
        optimizer: RowOptimizer,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        reason = fbgemm_refuses(width, optimizer, dtype)
        if reason:
            raise UserError(f"parallel.kernel = 'fbgemm': {reason}; use 'torch' or 'auto'")
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
        self.rate = 0.0
        # Its own decay is not the same in all its optimizers: it is added here, once for a row.
        self._weight_decay = optimizer.weight_decay
        self.sums_duplicates = optimizer.weight_decay == 0
        self.weight: Tensor = self._tables.split_embedding_weights()[0].detach()
        self.weight.zero_()
        names = list(optimizer.state_shapes(rows, width))
        states = self._tables.split_optimizer_states()[0] if names else ()
        self.state = {name: states[i].detach() for i, name in enumerate(names)}
        for name, state in self.state.items():
            state.fill_(optimizer.first_state(name))
        self._fetched: tuple[Tensor, Tensor] | None = None

    def fetch(self, rows: Tensor) -> Tensor:
        """See Kernel."""
        if not torch.is_grad_enabled():
            return self.weight.index_select(0, rows)
        out = self._look_up(rows)
        self._fetched = (rows, out)
        return out.detach()

    def update(self, rows: Tensor, gradient: Tensor, step: int) -> None:
        """See Kernel."""
        known = self._fetched
        out = known[1] if known is not None and known[0] is rows else self._look_up(rows)
        self._fetched = None
        if self._weight_decay:
            gradient = gradient.add(out.detach(), alpha=self._weight_decay)
        out.backward(gradient)  # type: ignore[no-untyped-call]

    def _look_up(self, rows: Tensor) -> Tensor:
        """Return each row as the sum over a list of one."""
        starts = torch.arange(rows.shape[0] + 1, device=rows.device, dtype=rows.dtype)
        with torch.enable_grad():
            self._tables.set_learning_rate(self.rate)
            found: Tensor = self._tables(rows, starts)
            return found


def fbgemm_refuses(width: int, optimizer: RowOptimizer, dtype: torch.dtype) -> str | None:
    """Return why FBGEMM's kernel cannot take these rows, or None if it can."""
    if width % 4:
        return f"FBGEMM wants widths that are multiples of 4, not {width}"
    if optimizer.name not in FBGEMM_OPTIMIZERS:
        return f"FBGEMM has no '{optimizer.name}' that runs everywhere"
    if dtype != torch.float32:
        return "FBGEMM keeps float32 rows"
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError) as error:
        return f"fbgemm_gpu cannot be imported ({' '.join(str(error).split())})"
    return None


KERNELS: dict[KernelName, Callable[..., Kernel]] = {"torch": TorchKernel, "fbgemm": FbgemmKernel}


def fastest_kernel(
    width: int, optimizer: RowOptimizer, dtype: torch.dtype, device: torch.device, rows: int = 16384
) -> KernelName:
    """Return the kernel that is faster here at reading and updating rows, by a short trial."""
    if fbgemm_refuses(width, optimizer, dtype):
        return "torch"
    seconds = {
        name: _seconds(make(8 * rows, width, optimizer, dtype, device), rows)
        for name, make in KERNELS.items()
    }
    return min(seconds, key=lambda name: seconds[name])


def _seconds(kernel: Kernel, rows: int) -> float:
    """Return the shortest time of a few steps, which an unrelated load disturbs least."""
    device = kernel.weight.device
    chosen = torch.randperm(len(kernel.weight), generator=torch.Generator().manual_seed(0))[:rows]
    chosen = chosen.to(device)
    gradient = torch.ones(rows, kernel.weight.shape[1], device=device)
    times = []
    for step in range(1, 8):
        started = time.perf_counter()
        kernel.fetch(chosen)
        kernel.update(chosen, gradient, step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
