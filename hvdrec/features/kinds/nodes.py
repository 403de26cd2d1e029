"""Build the ONNX nodes of the preprocessing graph."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.schema import FIRST_CODE, MISSING, MISSING_INT, UNKNOWN

if TYPE_CHECKING:
    import onnx

HASH_PRIME = 2**31 - 1
"""Modulus of all hashes; the product of two numbers below it fits into int64."""


def hash_coefficients(name: str, count: int) -> tuple[int, ...]:
    """Derive the `count` coefficients of a hash function from the name of a feature.

    All but the last are multipliers a_i in [1, p); the last is b in [0, p), where p is HASH_PRIME.
    The hash of numbers x_i is (sum of a_i x_i + b) mod p. It is universal (Carter and Wegman,
    1979): two different inputs get the same bucket with a probability of about 1 / buckets.
    """
    digest = b"".join(
        hashlib.sha256(name.encode() + (b"/%d" % block if block else b"")).digest()
        for block in range(count // 4 + 1)
    )
    draws = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count + 1)]
    return (*(1 + draw % (HASH_PRIME - 1) for draw in draws[:-1]), draws[-1] % HASH_PRIME)


class Nodes:
    """The nodes and constants of one feature. Their names begin with a common prefix.

    Attributes:
        nodes: ONNX nodes in topological order.
        constants: Constant tensors (ONNX initializers).
    """

    def __init__(self, prefix: str) -> None:
        """Start without nodes; all names will begin with `prefix`."""
        self._prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        from onnx import helper

        name = output or f"{self._prefix}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """Append a constant and return its name."""
        from onnx import numpy_helper

        name = f"{self._prefix}/constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def integer(self, value: int) -> str:
        """Append an int64 scalar and return its name."""
        return self.constant(np.array(value, np.int64))

    def double(self, value: float) -> str:
        """Append a double scalar and return its name."""
        return self.constant(np.array(value, np.float64))

    def cast(self, tensor: str, dtype: type[np.generic]) -> str:
        """Cast a tensor to a numpy type."""
        from onnx import helper

        return self.add("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def vocabulary(self, raw: str, dtype: str, values: Sequence[Any]) -> str:
        """Look up the codes of raw values; return the name of the resulting tensor.

        The code is MISSING, UNKNOWN, or FIRST_CODE plus the index of the value in `values`, where
        None stands for a code that is free.
        """
        used = [index for index, value in enumerate(values) if value is not None]
        values = [values[index] for index in used]
        codes = [MISSING, *(FIRST_CODE + index for index in used)]
        attributes: dict[str, Any] = {"values_int64s": codes, "default_int64": UNKNOWN}
        if dtype == "string":
            attributes["keys_strings"] = ["", *values]
        else:
            attributes["keys_int64s"] = [MISSING_INT, *(int(value) for value in values)]
        return self.add("LabelEncoder", raw, domain="ai.onnx.ml", **attributes)

    def number(self, raw: str, dtype: str) -> tuple[str, str]:
        """Convert raw numbers to double and find the missing ones.

        An integer becomes the nearest double: this is exact up to 2^53, with a relative error of at
        most 2^-53 above. Fitting does the same.

        Returns:
            The names of two tensors: the doubles, with 0 for values that are missing, NaN or
            infinite; and a bool mask that is true for these values.
        """
        if dtype == "int":
            missing = self.add("Equal", raw, self.integer(MISSING_INT))
            number = self.cast(raw, np.float64)
        else:
            # ONNX Runtime lacks IsInf for doubles on some platforms: x - x != 0 detects NaN and
            # infinity.
            difference = self.add("Sub", raw, raw)
            missing = self.add("Not", self.add("Equal", difference, self.double(0.0)))
            number = raw
        return self.add("Where", missing, self.double(0.0), number), missing

    def buckets(self, terms: Sequence[str], coefficients: Sequence[int], buckets: int) -> str:
        """Hash int64 tensors into `buckets` codes, the first of which is FIRST_CODE.

        Args:
            terms: Tensors with values in [0, HASH_PRIME).
            coefficients: Coefficients of the hash function; see `hash_coefficients`.
            buckets: Number of buckets.
        """
        prime = self.integer(HASH_PRIME)
        mixed = self.integer(coefficients[-1])
        for term, multiplier in zip(terms, coefficients, strict=False):
            product = self.add("Mul", term, self.integer(multiplier))
            mixed = self.add("Mod", self.add("Add", product, mixed), prime)
        bucket = self.add("Mod", mixed, self.integer(buckets))
        return self.add("Add", bucket, self.integer(FIRST_CODE))
