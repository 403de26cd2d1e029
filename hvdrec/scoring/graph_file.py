"""Read the operators and tensor shapes of an ONNX file that may be hostile.

ONNX files are protobuf messages (https://protobuf.dev/programming-guides/encoding/). This reader
accepts the parts that `hvdrec export` writes. It refuses functions, sparse tensors, types that are
not tensors, and subgraphs other than the branches of an `If`. It does not copy weights, and its
work is bounded by `MOST_FIELDS` and the size of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

Buffer = memoryview
Value = int | tuple[int, int]
"""Value of a protobuf field: a number, or the offsets in the file where its bytes begin and end."""

LONG_BYTES = 4096
MOST_FIELDS = 4_000_000
MOST_NODES = 20_000
MOST_DEPTH = 4
"""Levels of graphs that are nested in other graphs."""
MOST_VALUES = 64
"""The values of an integer tensor, which may be axes or a shape, are read only if it has at most
this many entries."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 8: 1, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8}
"""ONNX data type -> bytes of an element. Type 8 is a string, which takes at least one byte."""
STRING = 8
MOST_TEXT = 4096
"""Largest size in bytes of a constant with strings: an operator may repeat them in each row."""
INTEGERS = {6: 4, 7: 8}

# For each type of message: field number -> the name that this module uses, or "" to skip the field.
MODEL = {1: "", 2: "", 3: "", 4: "", 5: "", 6: "", 7: "graph", 8: "", 14: ""}
GRAPH = {
    1: "nodes",
    2: "",
    5: "tensors",
    10: "",
    11: "inputs",
    12: "outputs",
    13: "",
    14: "",
    16: "",
}
NODE = {1: "inputs", 2: "outputs", 3: "", 4: "op", 5: "attributes", 6: "", 7: "domain", 9: ""}
ATTRIBUTE = {1: "name", 2: "", 3: "int", 4: "", 5: "tensor", 6: "graph", 7: "", 8: "ints", 9: ""}
ATTRIBUTE |= {13: "", 20: ""}
TENSOR = {1: "dims", 2: "type", 4: "data", 5: "data", 6: "data", 7: "data", 8: "name", 9: "raw"}
TENSOR |= {10: "data", 11: "data", 12: "", 13: "external", 14: "location", 16: ""}
VALUE, TYPE, TENSOR_TYPE = (
    {1: "name", 2: "type", 3: "", 4: ""},
    {1: "tensor", 6: ""},
    {1: "", 2: "shape"},
)
SHAPE, DIMENSION, ENTRY = {1: "dims"}, {1: "value", 2: "symbol", 3: ""}, {1: "key", 2: "value"}

_LIST_TAGS = b"\x4a\x40\x3d"


@cache
def _lists() -> re.Pattern[bytes]:
    """Return a pattern for the entries of a list: strings of up to 127 bytes, integers or floats.

    It skips the million keys of a vocabulary ten times as fast as a loop.
    """
    texts = (re.escape(bytes([size])) + b".{%d}" % size for size in range(128))
    parts = (rb"\x4a(?:%s)" % b"|".join(texts), rb"\x40[\x80-\xff]{0,9}[\x00-\x7f]", rb"\x3d.{4}")
    return re.compile(b"|".join(b"(?:%s)++" % part for part in parts), re.DOTALL)


class GraphError(ValueError):
    """The file is not an ONNX graph of the form that hvdrec writes."""


class UnsafeGraphError(GraphError):
    """Running the graph could take unlimited time or memory."""


@dataclass(frozen=True)
class Tensor:
    """Shape of a constant tensor, and its contents if these are a few integers."""

    shape: tuple[int, ...]
    """Sizes of the dimensions."""
    values: tuple[int, ...] | None = None
    """Contents of a small tensor of integers; None for other tensors."""
    external: tuple[str, int, int] | None = None
    """File name, offset and number of bytes of the contents, if they are in another file; else
    None."""


@dataclass(frozen=True)
class Node:
    """An operator of a graph."""

    op: str
    """Name of the operator; with a domain other than ONNX's own, ``domain:name``."""
    inputs: tuple[str, ...]
    """Names of its input tensors; "" for an optional input that is omitted."""
    outputs: tuple[str, ...]
    """Names of its output tensors."""
    numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Attributes that are integers or short lists of integers."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Attributes that are tensors."""
    graphs: tuple[Graph, ...] = ()
    """Attributes that are graphs."""

    @property
    def reads(self) -> set[str]:
        """Names of the tensors that the operator and its graphs read from outside."""
        names = {name for name in self.inputs if name}
        for graph in self.graphs:
            made = {name for node in graph.nodes for name in node.outputs}
            names |= {name for node in graph.nodes for name in node.reads} - made
            names -= graph.tensors.keys()
        return names


@dataclass(frozen=True)
class Graph:
    """A graph or a branch of an `If`."""

    nodes: tuple[Node, ...]
    """Operators in the order of the file."""
    tensors: Mapping[str, Tensor]
    """Name of a constant -> the constant."""
    inputs: Mapping[str, tuple[int | None, ...]]
    """Name of an input -> sizes of its dimensions; None for a size that varies."""
    outputs: tuple[str, ...]
    """Names of the graph's outputs."""


def parse_model(data: Buffer) -> Graph:
    """Parse the bytes of an ONNX file.

    Raises:
        GraphError: The bytes are not an ONNX model, or the model has a part that hvdrec never
            writes.
    """
    reader = _Reader(data)
    model = reader.message((0, len(data)), MODEL)
    return reader.graph(_span(model, "graph"), 0)


class _Reader:
    """Reads the protobuf messages of one file; counts fields to bound the work."""

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._fields = 0
        self._nodes = 0

    def graph(self, span: tuple[int, int], depth: int) -> Graph:
        if depth > MOST_DEPTH:
            raise UnsafeGraphError(f"nests graphs more than {MOST_DEPTH} deep")
        parts = self.message(span, GRAPH)
        nodes = tuple(self._node(part, depth) for part in _spans(parts, "nodes"))
        named = [self._tensor(part) for part in _spans(parts, "tensors")]
        inputs = dict(self._input(part) for part in _spans(parts, "inputs"))
        values = [self.message(part, VALUE) for part in _spans(parts, "outputs")]
        outputs = tuple(self._text(_span(value, "name")) for value in values)
        return Graph(nodes, dict(named), inputs, outputs)

    def _node(self, span: tuple[int, int], depth: int) -> Node:
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise UnsafeGraphError(f"has more than {MOST_NODES} operators")
        parts = self.message(span, NODE)
        numbers, tensors, graphs = {}, {}, []
        for each in _spans(parts, "attributes"):
            attribute = self.message(each, ATTRIBUTE)
            name = self._text(_span(attribute, "name"))
            if name == "values_strings":  # could return a long string for each row
                raise UnsafeGraphError("has a table of strings")
            found = [key for key in ("int", "ints", "tensor", "graph") if key in attribute]
            if found == ["tensor"]:
                tensors[name] = self._tensor(_span(attribute, "tensor"))[1]
            elif found == ["graph"]:
                graphs.append(self.graph(_span(attribute, "graph"), depth + 1))
            elif found:
                [key] = found if len(found) == 1 else ["int"]
                numbers[name] = tuple(_signed(number) for number in self._numbers(attribute, key))
        domain = self._text(_span(parts, "domain")) if "domain" in parts else ""
        prefix = "" if domain in ("", "ai.onnx") else f"{domain}:"
        return Node(
            prefix + self._text(_span(parts, "op")),
            tuple(self._text(part) for part in _spans(parts, "inputs")),
            tuple(self._text(part) for part in _spans(parts, "outputs")),
            numbers,
            tensors,
            tuple(graphs),
        )

    def _tensor(self, span: tuple[int, int]) -> tuple[str, Tensor]:
        """Read a constant and its name; raise GraphError if the file lacks some of its elements."""
        parts = self.message(span, TENSOR)
        name = self._text(_span(parts, "name")) if "name" in parts else ""
        shape = tuple(_signed(size) for size in self._numbers(parts, "dims"))
        dtype, location = (self._number(parts, key) for key in ("type", "location"))
        if dtype not in ITEM_BYTES or min(shape, default=0) < 0:
            raise GraphError(f"'{name}' has data type {dtype} and shape {shape}")
        size, count = math.prod(shape) * ITEM_BYTES[dtype], math.prod(shape)
        if location or "external" in parts:
            return name, Tensor(shape, None, self._external(parts, name, size))
        raw = _spans(parts, "raw")
        held = sum(end - start for start, end in raw)
        # Each element of a packed list takes at least one byte.
        listed = sum(each[1] - each[0] for each in _spans(parts, "data") or [(0, 0)])
        listed += sum(isinstance(each, int) or each[0] == each[1] for each in parts.get("data", ()))
        if held != size if raw else listed < count:
            raise GraphError(f"'{name}' has shape {shape}, the file holds {held + listed} bytes")
        if dtype == STRING and listed > MOST_TEXT:
            raise UnsafeGraphError(f"'{name}' is a table of strings")
        if dtype not in INTEGERS or count > MOST_VALUES:
            return name, Tensor(shape)
        return name, Tensor(shape, self._values(parts, raw, INTEGERS[dtype]))

    def _values(
        self, parts: Mapping[str, list[Value]], raw: list[tuple[int, int]], width: int
    ) -> tuple[int, ...]:
        if not raw:
            return tuple(_signed(number) for number in self._numbers(parts, "data"))
        [(start, end)] = raw
        pieces = (bytes(self._data[at : at + width]) for at in range(start, end, width))
        return tuple(int.from_bytes(piece, "little", signed=True) for piece in pieces)

    def _external(
        self, parts: Mapping[str, list[Value]], name: str, size: int
    ) -> tuple[str, int, int]:
        found = {}
        for span in _spans(parts, "external"):
            entry = self.message(span, ENTRY)
            key, value = (self._text(_span(entry, part)) for part in ("key", "value"))
            found[key] = value
        try:
            offset, length = int(found.get("offset", 0)), int(found.get("length", size))
        except ValueError:
            offset, length = -1, -1
        if "location" not in found or offset < 0 or length != size:
            raise GraphError(f"'{name}' has {size} bytes, its external data {dict(found)}"[:200])
        return found["location"], offset, length

    def _input(self, span: tuple[int, int]) -> tuple[str, tuple[int | None, ...]]:
        value = self.message(span, VALUE)
        name = self._text(_span(value, "name"))
        tensor = self.message(
            _span(self.message(_span(value, "type"), TYPE), "tensor"), TENSOR_TYPE
        )
        if "shape" not in tensor:
            raise GraphError(f"input '{name}' has no shape")
        sizes: list[int | None] = []
        for each in _spans(self.message(_span(tensor, "shape"), SHAPE), "dims"):
            dimension = self.message(each, DIMENSION)
            sizes.append(
                _signed(self._number(dimension, "value")) if "value" in dimension else None
            )
        if min((size for size in sizes if size is not None), default=0) < 0:
            raise GraphError(f"input '{name}' has the shape {sizes}")
        return name, tuple(sizes)

    def message(self, span: tuple[int, int], known: Mapping[int, str]) -> dict[str, list[Value]]:
        """Return the values of each field of a message, under the field's name in ``known``."""
        parts: dict[str, list[Value]] = {}
        for number, value in self._walk(*span, is_attribute=known is ATTRIBUTE):
            if number not in known:
                raise UnsafeGraphError(f"has a field {number} that hvdrec does not write")
            if known[number]:
                parts.setdefault(known[number], []).append(value)
        return parts

    def _walk(self, at: int, end: int, *, is_attribute: bool) -> Iterator[tuple[int, Value]]:
        while at < end:
            if is_attribute and (passed := self._pass_over(at, end)) > at:
                at = passed
                continue
            self._fields += 1
            if self._fields > MOST_FIELDS:
                raise UnsafeGraphError(f"has more than {MOST_FIELDS} fields")
            tag, at = self._varint(at, end)
            kind = tag & 7
            if kind == VARINT:
                value, at = self._varint(at, end)
                yield tag >> 3, value
                continue
            size, at = (
                self._varint(at, end)
                if kind == BYTES
                else ({FIXED32: 4, FIXED64: 8}.get(kind, -1), at)
            )
            if not 0 <= size <= end - at:
                raise GraphError("is cut off or not an ONNX file")
            yield tag >> 3, (at, at + size)
            at += size

    def _pass_over(self, at: int, end: int) -> int:
        """Return the end of an attribute's list of strings or numbers that begins at ``at``."""
        if end - at > LONG_BYTES and self._data[at] in _LIST_TAGS:
            found = _lists().match(self._data, at, end)
            if found is not None and found.end() - at > LONG_BYTES:
                return found.end()
        return at

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        number = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte < 128:
                return number & (2**64 - 1), at
            shift += 7
        raise GraphError("is cut off or not an ONNX file")

    def _numbers(self, parts: Mapping[str, list[Value]], key: str) -> Iterator[int]:
        """Yield the numbers of a repeated field, in protobuf's packed or plain encoding."""
        for value in parts.get(key, ()):
            if isinstance(value, int):
                yield value
                continue
            at, end = value
            while at < end:
                number, at = self._varint(at, end)
                yield number

    def _number(self, parts: Mapping[str, list[Value]], key: str) -> int:
        """Return the number in a field that occurs at most once; 0 if the field is omitted."""
        found = parts.get(key, [0])
        if len(found) != 1 or not isinstance(found[0], int):
            raise GraphError(f"has a damaged field '{key}'")
        return found[0]

    def _text(self, span: tuple[int, int]) -> str:
        if span[1] - span[0] > 1 << 16:
            raise GraphError("has a name of more than 65,536 bytes")
        try:
            return bytes(self._data[span[0] : span[1]]).decode()
        except UnicodeDecodeError:
            raise GraphError("has a name that is not UTF-8") from None


def _spans(parts: Mapping[str, list[Value]], key: str) -> list[tuple[int, int]]:
    return [value for value in parts.get(key, ()) if not isinstance(value, int)]


def _span(parts: Mapping[str, list[Value]], key: str) -> tuple[int, int]:
    """Return a field that must occur exactly once: protobuf parsers would merge two occurrences."""
    found = parts.get(key, [])
    if len(found) != 1 or isinstance(found[0], int):
        raise GraphError(f"has {len(found)} fields '{key}', expected one")
    return found[0]


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def weights(graph: Graph) -> int:
    """Return the number of elements of all weights of a graph and of the graphs inside it."""
    own = sum(math.prod(tensor.shape) for tensor in graph.tensors.values())
    inside = (weights(branch) for node in graph.nodes for branch in node.graphs)
    return own + sum(inside)
