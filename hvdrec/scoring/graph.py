"""One of the bundle's ONNX graphs, opened for many threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hvdrec.scoring.bundle import Field
from hvdrec.scoring.errors import BundleError, choices

Array = NDArray[Any]
TENSOR = {"string": "tensor(string)", "int": "tensor(int64)", "float": "tensor(double)"}
VECTORS = "tensor(float)"


class Graph:
    """A graph with one output of rows; `run` is safe from many threads at once."""

    def __init__(self, file: Path, inputs: Mapping[str, str], output: str, threads: int) -> None:
        """Open a graph that takes ``inputs`` (name: tensor type); BundleError if it does not."""
        self.session = _session(file, threads)
        self._outputs = [output]
        found = {value.name: value.type for value in self.session.get_inputs()}
        if found != dict(inputs):
            raise BundleError(
                f"{file}: takes {_listed(found)}, the manifest says {_listed(inputs)}; "
                "export the bundle again"
            )
        outputs = [value.name for value in self.session.get_outputs()]
        if output not in outputs:
            raise BundleError(
                f"{file}: gives {choices(outputs)}, expected '{output}'; export the bundle again"
            )

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """Return the output, float32 [N] or [N, width]."""
        output: Array = self.session.run(self._outputs, inputs)[0]
        return output

    def run_blocks(self, inputs: Mapping[str, Array], rows: int, block: int) -> Array:
        """Return the output of ``rows`` rows, at most ``block`` at a time to bound the memory.

        Inputs with one row go into every block as they are.
        """
        if rows <= block:
            return self.run(inputs)
        parts = [
            self.run(
                {
                    name: array[start : start + block] if len(array) > 1 else array
                    for name, array in inputs.items()
                }
            )
            for start in range(0, rows, block)
        ]
        return np.concatenate(parts)


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
