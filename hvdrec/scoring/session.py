"""One of the bundle's ONNX graphs, opened for many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hvdrec.scoring.bundle import Field, stamp_of
from hvdrec.scoring.errors import BundleError, ReplacedError, choices

Array = NDArray[Any]
TENSOR = {"string": "tensor(string)", "int": "tensor(int64)", "float": "tensor(double)"}
VECTORS = "tensor(float)"
ROWS = "tensor(int64)"
LARGE_BYTES = 8 << 20


class GraphSession:
    """A graph with outputs of rows; `run` is safe from many threads at once.

    A large file is opened by the first run, or by `open`: its vocabularies take long to load.
    """

    def __init__(
        self,
        file: Path,
        inputs: Mapping[str, str],
        output: str,
        threads: int,
        more: Sequence[str] = (),
    ) -> None:
        """Take a graph with ``inputs`` (name: tensor type); BundleError if it is another one.

        output: what `run` returns; more: what `run_all` returns behind it.
        """
        self._file = file
        self._inputs = dict(inputs)
        self._outputs = [output]
        self._all_outputs = [output, *more]
        self._threads = threads
        self._lock = threading.Lock()
        self._session: Any = None
        try:
            status = file.stat()
        except OSError as error:
            raise BundleError(
                f"{file}: cannot be read ({error}); export the bundle again"
            ) from None
        self._stamp = stamp_of(status)
        if status.st_size < LARGE_BYTES:
            self.open()

    def open(self) -> Any:
        """Return the session; BundleError if the file holds no graph or another one."""
        with self._lock:
            if self._session is None:
                self._session = self._opened()
            return self._session

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """Return the output, float32 [N] or [N, width]."""
        session = self._session or self.open()
        output: Array = session.run(self._outputs, inputs)[0]
        return output

    def run_all(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Return all outputs, float32 [N] each."""
        session = self._session or self.open()
        outputs: list[Array] = session.run(self._all_outputs, inputs)
        return outputs

    def run_blocks(self, inputs: Mapping[str, Array], rows: int, block: int) -> Array:
        """Return the output of ``rows`` rows, at most ``block`` at a time to bound the memory."""
        if rows <= block:
            return self.run(inputs)
        parts = [
            self.run({name: array[start : start + block] for name, array in inputs.items()})
            for start in range(0, rows, block)
        ]
        return np.concatenate(parts)

    def _opened(self) -> Any:
        session = _session(self._file, self._threads)
        if stamp_of(self._file.stat()) != self._stamp:
            raise ReplacedError(
                f"{self._file}: was replaced after the bundle was loaded; load it again"
            )
        found = {value.name: value.type for value in session.get_inputs()}
        if found != self._inputs:
            raise BundleError(
                f"{self._file}: takes {_listed(found)}, the manifest says {_listed(self._inputs)}; "
                "export the bundle again"
            )
        outputs = [value.name for value in session.get_outputs()]
        for output in self._all_outputs:
            if output not in outputs:
                raise BundleError(
                    f"{self._file}: gives {choices(outputs)}, expected '{output}'; "
                    "export the bundle again"
                )
        return session


def input_types(fields: Iterable[Field]) -> dict[str, str]:
    """Return the tensor types that a graph takes for raw fields."""
    return {field.name: TENSOR[field.dtype] for field in fields}


def _session(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Waiting threads of an idle service should sleep.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds, without a common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"{file}: no readable graph ({reason}); export the bundle again"
        ) from None


def _listed(inputs: Mapping[str, str]) -> str:
    return choices(f"{name}: {kind}" for name, kind in sorted(inputs.items()))
