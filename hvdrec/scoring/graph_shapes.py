"""Compute upper bounds for the sizes of a graph's tensors.

The bounds hold for a given number of rows and of list entries. Every shape in this module is such a
bound: at run time, no dimension is larger. The operators that reshape or expand a tensor must take
the new shape from constants and from shapes of other tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from hvdrec.scoring.graph_file import Graph, GraphError, Node, Tensor, UnsafeGraphError, weights

Shape = tuple[int, ...]
MOST_RANK = 8

PER_ROW = 1 << 18
"""Limit on the elements of one tensor, divided by the number of rows or of list entries, whichever
is larger."""
ALL_PER_ROW = 1 << 20
"""Limit on the elements of all tensors of a run together, counted in the same way."""
PRODUCTS_PER_ROW = 1 << 30
"""Limit on the multiplications in matrix products, counted in the same way."""
CONSTANT = 1 << 22
"""Number of elements that a tensor may have in addition, whatever the number of rows. In a graph
with weights, four times the number of weights is allowed on top."""

_ELEMENTWISE = """
Abs Acos Acosh Add And Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast
CastLike Ceil Celu Clip Cos Cosh CumSum DequantizeLinear Div Elu Equal Erf Exp Floor Gelu Greater
GreaterOrEqual HardSigmoid HardSwish Hardmax Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log
LogSoftmax Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear Reciprocal Relu Round Selu
Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where
Xor ai.onnx.ml:Binarizer ai.onnx.ml:LabelEncoder ai.onnx.ml:Scaler
"""
_REDUCTIONS = """
ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare
"""
_LIKE_FIRST = "LayerNormalization RMSNormalization ScatterElements ScatterND"


@dataclass(frozen=True)
class Sized:
    """What is known about a tensor before the graph runs."""

    shape: Shape
    """Upper bounds of the sizes of its dimensions."""
    values: tuple[int, ...] | None = None
    """Contents of the tensor if they follow from constants and from sizes of other tensors."""
    is_constant: bool = False
    """True if the contents follow from constants alone."""


@dataclass
class Sizes:
    """Adds up the sizes of the tensors of one graph."""

    rows: int
    """Size to assume for the first dimension of each input, if the graph leaves it open."""
    entries: int
    """Size to assume for every other input dimension that the graph leaves open."""
    elements: int = 0
    """Number of elements in the outputs of all operators so far."""
    products: int = 0
    """Number of multiplications in matrix products so far."""
    weights: int = field(default=0, init=False)
    """Number of elements in all constants."""

    def check(self, graph: Graph) -> None:
        """Raise GraphError if one tensor, all tensors together or the products are too large."""
        inputs = {}
        for name, shape in graph.inputs.items():
            varying = [self.rows if axis == 0 else self.entries for axis in range(len(shape))]
            sizes = zip(shape, varying, strict=True)
            inputs[name] = Sized(tuple(size if fixed is None else fixed for fixed, size in sizes))
        self.weights = weights(graph)
        self._run(graph, inputs)

    def _run(self, graph: Graph, outer: dict[str, Sized]) -> list[Sized]:
        """Compute the sizes of all tensors of a graph and return those of its outputs."""
        known = outer | {name: _constant(tensor) for name, tensor in graph.tensors.items()}
        ahead, turns = (
            [*graph.nodes],
            8,
        )  # a quantized ranker lists its If before operators whose outputs the branches read
        while ahead and (turns := turns - 1):
            nodes, ahead = ahead, []
            for node in nodes:
                if not node.reads <= known.keys():
                    ahead.append(node)
                    continue
                for name, sized in zip(node.outputs, self._outputs(node, known), strict=False):
                    self._count(node, sized)
                    known[name] = sized
                if any(name and name not in known for name in node.outputs):
                    raise GraphError(f"operator {node.op} has {len(node.outputs)} outputs")
        if ahead:
            raise GraphError(f"operator {ahead[0].op} reads a tensor that is not there")
        if not set(graph.outputs) <= known.keys():
            raise GraphError("has an output that no operator returns")
        return [known[name] for name in graph.outputs]

    def _outputs(self, node: Node, known: dict[str, Sized]) -> Sequence[Sized]:
        if node.op == "If":
            branches = [self._run(branch, known) for branch in node.graphs]
            if len(branches) != 2 or len({*map(len, branches)}) != 1:
                raise GraphError("has an If without two equal branches")
            return [Sized(_larger(*pair)) for pair in zip(*branches, strict=True)]
        rule = RULES.get(node.op)
        if node.graphs or rule is None:
            raise UnsafeGraphError(f"uses the operator {node.op[:60]}, which a bundle may not use")
        # None stands for an omitted input, so that the other inputs keep their positions.
        inputs = [known[name] if name else None for name in node.inputs]
        try:
            outputs = rule(node, inputs)
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            unknown = UnsafeGraphError(f"operator {node.op} has outputs of unknown sizes")
            raise (error if isinstance(error, GraphError) else unknown) from None
        if node.op in PRODUCTS:
            self.products += math.prod(outputs[0].shape) * _inner(node, inputs)
        return outputs

    def _count(self, node: Node, sized: Sized) -> None:
        count, most = math.prod(sized.shape), max(self.rows, self.entries)
        self.elements += count
        fixed = CONSTANT + 4 * self.weights
        if len(sized.shape) > MOST_RANK:
            raise UnsafeGraphError(f"operator {node.op} returns {len(sized.shape)} dimensions")
        if count > most * PER_ROW + fixed or self.elements > most * ALL_PER_ROW + 2 * fixed:
            rows = f"{self.rows} rows and {self.entries} list entries"
            raise UnsafeGraphError(
                f"operator {node.op} makes tensors too large: {sized.shape} for {rows}"
            )
        if self.products > most * PRODUCTS_PER_ROW:
            raise UnsafeGraphError(f"operator {node.op} makes the graph too slow")


def _constant(tensor: Tensor) -> Sized:
    return Sized(tensor.shape, tensor.values, is_constant=True)


Inputs = Sequence["Sized | None"]
Rule = Callable[[Node, Inputs], Sequence[Sized]]


def _given(inputs: Inputs, index: int = 0) -> Sized:
    sized = inputs[index] if index < len(inputs) else None
    if sized is None:
        raise IndexError
    return sized


def _constants(node: Node, inputs: Inputs, index: int, name: str) -> tuple[int, ...] | None:
    """Return the integers of a constant input or of an attribute; None if neither is there."""
    sized = inputs[index] if index < len(inputs) else None
    if sized is None:
        return node.numbers.get(name)
    if not sized.is_constant or sized.values is None:
        raise ValueError
    return sized.values


def _number(node: Node, name: str, default: int) -> int:
    return node.numbers.get(name, (default,))[0]


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise IndexError
    return axis % rank


def _larger(left: Sized, right: Sized) -> Shape:
    if len(left.shape) != len(right.shape):
        raise GraphError("has an If whose branches return different numbers of dimensions")
    return tuple(map(max, left.shape, right.shape))


def _broadcast(*shapes: Shape) -> Shape:
    # Sizes that do not match fail at run time, so the larger one is a valid bound for them, too.
    reverse = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)
    return tuple(0 if 0 in sizes and max(sizes) <= 1 else max(sizes) for sizes in reverse)[::-1]


def _elementwise(node: Node, inputs: Inputs) -> Sequence[Sized]:
    given = [sized for sized in inputs if sized is not None]
    if node.op == "Identity":
        return given
    return [Sized(_broadcast(*(sized.shape for sized in given)))]


def _like_first(node: Node, inputs: Inputs) -> Sequence[Sized]:
    return [Sized(_given(inputs).shape)] * max(len(node.outputs), 1)


def _reduced(node: Node, inputs: Inputs) -> Sequence[Sized]:
    shape = _given(inputs).shape
    if node.op.startswith("Arg"):
        axes: tuple[int, ...] | None = (_number(node, "axis", 0),)
    else:
        axes = _constants(node, inputs, 1, "axes")
    if not axes:
        if _number(node, "noop_with_empty_axes", 0):
            return [Sized(shape)]
        axes = tuple(range(len(shape)))
    gone = {_axis(axis, len(shape)) for axis in axes}
    if _number(node, "keepdims", 1):
        return [Sized(tuple(1 if i in gone else size for i, size in enumerate(shape)))]
    return [Sized(tuple(size for i, size in enumerate(shape) if i not in gone))]


def _shape(node: Node, inputs: Inputs) -> Sequence[Sized]:
    shape = _given(inputs).shape
    end = node.numbers["end"][0] if "end" in node.numbers else None
    values = shape[_number(node, "start", 0) : end]
    return [Sized((len(values),), values)]


def _size(node: Node, inputs: Inputs) -> Sequence[Sized]:
    return [Sized((), (math.prod(_given(inputs).shape),))]


def _gather(node: Node, inputs: Inputs) -> Sequence[Sized]:
    data, indices = _given(inputs, 0), _given(inputs, 1)
    axis = _axis(_number(node, "axis", 0), len(data.shape))
    values = None
    if data.values is not None and indices.values is not None and len(data.shape) == 1:
        values = tuple(data.values[index] for index in indices.values)
    return [Sized(data.shape[:axis] + indices.shape + data.shape[axis + 1 :], values)]


def _gather_elements(node: Node, inputs: Inputs) -> Sequence[Sized]:
    return [Sized(_given(inputs, 1).shape)]


def _concat(node: Node, inputs: Inputs) -> Sequence[Sized]:
    given = [_given(inputs, index) for index in range(len(inputs))]
    axis = _axis(node.numbers["axis"][0], len(given[0].shape))
    if len({len(sized.shape) for sized in given}) != 1:
        raise ValueError
    sizes = [max(each) for each in zip(*(sized.shape for sized in given), strict=True)]
    sizes[axis] = sum(sized.shape[axis] for sized in given)
    if len(sizes) > 1 or any(sized.values is None for sized in given):
        return [Sized(tuple(sizes))]
    return [Sized(tuple(sizes), tuple(v for sized in given for v in sized.values or ()))]


def _squeeze(node: Node, inputs: Inputs) -> Sequence[Sized]:
    data = _given(inputs)
    axes = _constants(node, inputs, 1, "axes")
    if axes is None:  # removes each dimension of size 1, but the sizes here are only bounds
        if data.shape != (1,):
            raise ValueError
        axes = (0,)
    gone = {_axis(axis, len(data.shape)) for axis in axes}
    kept = tuple(size for i, size in enumerate(data.shape) if i not in gone)
    return [replace(data, shape=kept)]


def _unsqueeze(node: Node, inputs: Inputs) -> Sequence[Sized]:
    data = _given(inputs)
    axes = _constants(node, inputs, 1, "axes")
    if axes is None:
        raise ValueError
    rank = len(data.shape) + len(axes)
    new, old = {_axis(axis, rank) for axis in axes}, iter(data.shape)
    return [replace(data, shape=tuple(1 if i in new else next(old) for i in range(rank)))]


def _slice(node: Node, inputs: Inputs) -> Sequence[Sized]:
    data = _given(inputs)
    if not all(sized is None or sized.is_constant for sized in inputs[1:]):
        return [Sized(data.shape)]  # a slice is never larger than what it is cut from
    parts = [
        _constants(node, inputs, i + 1, key)
        for i, key in enumerate(("starts", "ends", "axes", "steps"))
    ]
    starts, ends, axes, steps = parts
    if starts is None or ends is None:
        raise ValueError
    axes, steps = axes or tuple(range(len(starts))), steps or (1,) * len(starts)
    sizes, values = list(data.shape), data.values
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = _axis(axis, len(sizes))
        if step < 1:  # the old size remains an upper bound; the values are unknown
            values = None
            continue
        cut = slice(start, end, step)
        sizes[place] = len(range(*cut.indices(sizes[place])))
        values = values[cut] if values is not None and len(sizes) == 1 else None
    return [Sized(tuple(sizes), values)]


def _split(node: Node, inputs: Inputs) -> Sequence[Sized]:
    shape = _given(inputs).shape
    axis = _axis(_number(node, "axis", 0), len(shape))
    sizes = _constants(node, inputs, 1, "split") or (shape[axis],) * len(node.outputs)
    if min(sizes) < 0 or len(sizes) != len(node.outputs):
        raise ValueError
    return [Sized((*shape[:axis], min(size, shape[axis]), *shape[axis + 1 :])) for size in sizes]


def _transpose(node: Node, inputs: Inputs) -> Sequence[Sized]:
    shape = _given(inputs).shape
    order = node.numbers.get("perm") or tuple(reversed(range(len(shape))))
    if sorted(order) != [*range(len(shape))]:
        raise ValueError
    return [Sized(tuple(shape[axis] for axis in order))]


def _reshape(node: Node, inputs: Inputs) -> Sequence[Sized]:
    data, wanted = _given(inputs), _constants(node, inputs, 1, "shape")
    if wanted is None or min(wanted, default=0) < -1 or wanted.count(-1) > 1:
        raise ValueError
    keeps = not _number(node, "allowzero", 0)
    sizes = [data.shape[i] if size == 0 and keeps else size for i, size in enumerate(wanted)]
    if -1 in sizes:
        others = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = -(-math.prod(data.shape) // max(others, 1))
    return [Sized(tuple(sizes))]


def _flatten(node: Node, inputs: Inputs) -> Sequence[Sized]:
    shape = _given(inputs).shape
    axis = slice(_number(node, "axis", 1)).indices(len(shape))[1]
    return [Sized((math.prod(shape[:axis]), math.prod(shape[axis:])))]


def _expand(node: Node, inputs: Inputs) -> Sequence[Sized]:
    values = _given(inputs, 1).values
    if values is None or min(values, default=0) < 0:
        raise ValueError
    return [Sized(_broadcast(_given(inputs).shape, values))]


def _matmul(node: Node, inputs: Inputs) -> Sequence[Sized]:
    left, right = _given(inputs, 0).shape, _given(inputs, 1).shape
    if not left or not right:
        raise ValueError
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    return [Sized((*_broadcast(left[:-2], right[:-2]), *rows, *columns))]


def _gemm(node: Node, inputs: Inputs) -> Sequence[Sized]:
    left, right = _given(inputs, 0).shape, _given(inputs, 1).shape
    rows = left[1 if _number(node, "transA", 0) else 0]
    columns = right[0 if _number(node, "transB", 0) else 1]
    return [Sized((rows, columns))]


def _inner(node: Node, inputs: Inputs) -> int:
    """Return the number of products that are summed for one element of a matrix product."""
    shape = _given(inputs).shape
    return shape[0] if node.op == "Gemm" and _number(node, "transA", 0) else shape[-1]


def _quantized(node: Node, inputs: Inputs) -> Sequence[Sized]:
    return [Sized(_given(inputs).shape), Sized(()), Sized(())]


def _literal(node: Node, inputs: Inputs) -> Sequence[Sized]:
    if "value" in node.tensors:
        return [_constant(node.tensors["value"])]
    for name, is_list in (("value_int", False), ("value_ints", True)):
        if name in node.numbers:
            values = node.numbers[name]
            return [Sized((len(values),) if is_list else (), values, is_constant=True)]
    raise ValueError


PRODUCTS = ("Gemm", "MatMul", "MatMulInteger")
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduced),
    **dict.fromkeys(_LIKE_FIRST.split(), _like_first),
    "Concat": _concat,
    "Constant": _literal,
    "DynamicQuantizeLinear": _quantized,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Operator -> function that bounds the shapes of its outputs. `If` is allowed, too."""
