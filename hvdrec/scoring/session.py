"""Open one of a bundle's ONNX graphs and run it from many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.bundle import BundleInfo, Field, replaced, stamp_of
from hvdrec.scoring.errors import choices, first_line, invalid_bundle
from hvdrec.scoring.graph_limits import check_graph

TENSOR_TYPES = {"string": "tensor(string)", "int": "tensor(int64)", "float": "tensor(double)"}
FLOAT32_TENSOR = "tensor(float)"
INT64_TENSOR = "tensor(int64)"
LARGE_BYTES = 8 << 20


class GraphSession:
    """An ONNX graph of a bundle; safe to share between threads.

    The vocabularies in a large graph take long to load. So a file of `LARGE_BYTES` or more is only
    opened by `open` or by the first run.
    """

    def __init__(
        self,
        info: BundleInfo,
        name: str,
        inputs: Mapping[str, str],
        output: str,
        threads: int,
        more: Sequence[str] = (),
    ) -> None:
        """Open a graph, unless it is large.

        Args:
            info: The bundle.
            name: Name of the ONNX file in the bundle.
            inputs: Name of each input that the graph must have -> its tensor type.
            output: Name of the output that `run` returns.
            threads: Number of threads of one run.
            more: Names of further outputs, which `run_all` returns after ``output``.

        Raises:
            BundleError: The graph cannot be opened, or has other inputs or outputs.
        """
        self._info = info
        self._file = file = info.path / name
        self._inputs = dict(inputs)
        self._outputs = [output]
        self._all_outputs = [output, *more]
        self._threads = threads
        self._lock = threading.Lock()
        self._session: Any = None
        try:
            status = file.stat()
        except OSError as error:
            raise invalid_bundle(file, f"cannot be read ({error})") from None
        self._stamp = stamp_of(status)
        if status.st_size < LARGE_BYTES:
            self.open()

    def open(self) -> Any:
        """Return the onnxruntime session; raise BundleError if the graph cannot be opened."""
        with self._lock:
            if self._session is None:
                self._session = self._opened()
            return self._session

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """Run the graph and return its first output, float32 [rows] or [rows, width]."""
        session = self._session or self.open()
        output: Array = session.run(self._outputs, inputs)[0]
        return output

    def run_all(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Run the graph and return all its outputs, float32 [rows] each."""
        session = self._session or self.open()
        outputs: list[Array] = session.run(self._all_outputs, inputs)
        return outputs

    def run_blocks(self, inputs: Mapping[str, Array], rows: int, block: int) -> Array:
        """Run the graph on ``block`` rows at a time; return the first output for all ``rows``."""
        if rows <= block:
            return self.run(inputs)
        parts = [
            self.run({name: array[start : start + block] for name, array in inputs.items()})
            for start in range(0, rows, block)
        ]
        return np.concatenate(parts)

    def _opened(self) -> Any:
        check_graph(self._info.path, self._file.name, self._info.manifest["files"])
        session = _create_session(self._file, self._threads)
        if stamp_of(self._file.stat()) != self._stamp:
            raise replaced(self._file, "after the bundle was loaded")
        inputs = {value.name: value.type for value in session.get_inputs()}
        if inputs != self._inputs:
            expected = _described(self._inputs)
            problem = f"takes {_described(inputs)}, the manifest says {expected}"
            raise invalid_bundle(self._file, problem)
        outputs = [value.name for value in session.get_outputs()]
        for output in self._all_outputs:
            if output not in outputs:
                problem = f"returns {choices(outputs)}, expected '{output}'"
                raise invalid_bundle(self._file, problem)
        return session


def input_types(fields: Iterable[Field]) -> dict[str, str]:
    """Return the name of each field -> tensor type of its input in a graph."""
    return {field.name: TENSOR_TYPES[field.dtype] for field in fields}


def _create_session(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # By default, waiting threads spin: an idle service would keep a core busy.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise invalid_bundle(file, f"is not a readable graph ({first_line(error)})") from None


def _described(inputs: Mapping[str, str]) -> str:
    return choices(f"{name}: {tensor}" for name, tensor in sorted(inputs.items()))
