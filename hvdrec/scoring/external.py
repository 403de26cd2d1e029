"""Which other files an ONNX graph asks for, read off its bytes: the slim install has no onnx.

A tensor may lie outside its graph: `TensorProto.external_data` then names a file, and onnxruntime
before 1.24 opens whatever it names, on any path. So the names are read before a session is made.
Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

LOCATION = b"location"
# A message with more fields than this (a vocabulary's strings) is searched before it is walked.
WALKED_FIELDS = 4096

HOLDERS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
"""Field numbers of each message that can hold a tensor, down to a tensor's external data."""


def external_locations(file: Path) -> set[str]:
    """Return the files whose tensors a graph asks for, as the graph names them.

    Raises ValueError where the bytes are no protobuf message, OSError where they cannot be read.
    """
    with file.open("rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            return set()
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data))


def _locations(data: mmap.mmap) -> Iterator[str]:
    messages = [("ModelProto", 0, len(data))]
    while messages:
        kind, start, stop = messages.pop()
        if kind == "StringStringEntryProto":
            entry = {number: data[begin:end] for number, begin, end in _fields(data, start, stop)}
            if entry.get(1) == LOCATION:
                yield os.fsdecode(entry.get(2, b""))
            continue
        held = HOLDERS[kind]
        for number, begin, end in _fields(data, start, stop):
            if number in held:
                messages.append((held[number], begin, end))


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, begin and end of a message's length-delimited fields."""
    place, count, found = start, 0, -1
    while place < stop:
        tag, place = _varint(data, place, stop)
        length = {0: 0, 1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            _, place = _varint(data, place, stop)
        elif tag & 7 == 2:
            length, place = _varint(data, place, stop)
        if length is None or length > stop - place:
            raise ValueError("Protobuf parsing failed")
        if tag & 7 == 2:
            # A parser keeps 32 bits of a tag.
            yield (tag & 0xFFFFFFFF) >> 3, place, place + length
        place += length
        count += 1
        if count % WALKED_FIELDS == 0 and place > found:
            found = data.find(LOCATION, place, stop)
            if found < 0:
                return


def _varint(data: mmap.mmap, place: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= stop:
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("Protobuf parsing failed")
