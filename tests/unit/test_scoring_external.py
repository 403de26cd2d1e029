"""Finding the files that a graph asks for, compared with what onnx itself reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, onnx_ml_pb2

from hvdrec.scoring.external import HOLDERS, LOCATION, WALKED_FIELDS, external_locations

ENTRY = "StringStringEntryProto"


def named(tensor: TensorProto, location: str) -> TensorProto:
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def found(tmp_path: Path, message: Any) -> set[str]:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    file = tmp_path / "graph.onnx"
    file.write_bytes(data)
    return external_locations(file)


def test_the_messages_that_hold_tensors_are_those_of_onnx() -> None:
    """Every field on a way from a model to a tensor is known, whatever onnx adds to them."""

    def reaches(name: str, seen: tuple[str, ...] = ()) -> bool:
        if name == "TensorProto":
            return True
        if name in seen:
            return False
        fields = getattr(onnx_ml_pb2, name).DESCRIPTOR.fields if hasattr(onnx_ml_pb2, name) else ()
        kinds = [field.message_type.name for field in fields if field.message_type]
        return any(reaches(kind, (*seen, name)) for kind in kinds)

    for name, held in HOLDERS.items():
        fields = [f for f in getattr(onnx_ml_pb2, name).DESCRIPTOR.fields if f.message_type]
        expected = {f.number: f.message_type.name for f in fields if reaches(f.message_type.name)}
        if name == "TensorProto":
            expected = {f.number: ENTRY for f in fields if f.name == "external_data"}
        assert held == expected, name
    assert "TensorProto" in HOLDERS


def ways(name: str, depth: int) -> Iterator[list[str]]:
    """Yield the ways from a message to a tensor, as fields, repeating messages to a depth."""
    if name == "TensorProto":
        yield []
        return
    if not depth:
        return
    for number, kind in HOLDERS[name].items():
        field = getattr(onnx_ml_pb2, name).DESCRIPTOR.fields_by_number[number]
        for way in ways(kind, depth - 1):
            yield [field.name, *way]


def test_a_tensor_is_found_wherever_it_may_lie(tmp_path: Path) -> None:
    every = list(ways("ModelProto", 7))
    assert len(every) > 90
    for number, way in enumerate(every):
        model = place = onnx.ModelProto()
        for name in way:
            place = getattr(place, name)
            place = place.add() if hasattr(place, "add") else place
        named(place, f"file {number}")
        assert found(tmp_path, model) == {f"file {number}"}, way


def test_a_graph_without_external_data_asks_for_nothing(tmp_path: Path) -> None:
    tensor = helper.make_tensor("location", TensorProto.STRING, [2], [b"location", b"../x"])
    node = helper.make_node("LabelEncoder", ["location"], ["y"], keys_strings=["location", "../x"])
    model = helper.make_model(helper.make_graph([node], "location", [], [], [tensor]))
    model.metadata_props.add(key="location", value="../x")
    assert found(tmp_path, model) == set()
    assert found(tmp_path, b"") == set()


@pytest.mark.parametrize("words", [["a"], ["a", "location"]])
@pytest.mark.parametrize("place", [0, WALKED_FIELDS + 7])
def test_long_vocabularies_hide_nothing(tmp_path: Path, words: list[str], place: int) -> None:
    """Neither before nor behind thousands of strings, in the node and in the tensor itself."""
    strings = helper.make_attribute("keys", words * (2 * WALKED_FIELDS)).SerializeToString()
    tensor = onnx.AttributeProto(t=named(TensorProto(), "../x")).SerializeToString()
    entry = helper.make_attribute("keys", ["word"]).SerializeToString()
    parts = [entry] * (2 * WALKED_FIELDS)
    parts.insert(place, tensor)
    for data in (strings + tensor, tensor + strings, b"".join(parts)):
        model = onnx.ModelProto()
        node = model.graph.node.add()
        node.attribute.add().MergeFromString(data)
        assert found(tmp_path, model) == {"../x"}


def length_delimited(tag: bytes, payload: bytes) -> bytes:
    assert len(payload) < 128
    return tag + bytes([len(payload)]) + payload


def hidden_tensor() -> bytes:
    """Return a model's field 7, a graph whose one initializer lies outside."""
    graph = onnx.GraphProto(initializer=[named(TensorProto(), "../x")])
    return graph.SerializeToString()


@pytest.mark.parametrize(
    "tag",
    [
        b"\x3a",
        b"\xba\x00",  # longer than it needs to be
        b"\xba\x80\x80\x80\x00",
        b"\xba\x80\x80\x80\x70",  # with bits that a parser of 32 bits drops
    ],
)
def test_unusual_spellings_of_a_field(tmp_path: Path, tag: bytes) -> None:
    data = length_delimited(tag, hidden_tensor())
    try:
        parsed = onnx.ModelProto.FromString(data)
    except Exception:
        parsed = None  # then no session opens it either
    assert parsed is None or parsed.graph.initializer[0].external_data
    assert found(tmp_path, data) == {"../x"}


def test_the_last_of_two_keys_counts(tmp_path: Path) -> None:
    twice = length_delimited(b"\x0a", b"offset") + length_delimited(b"\x0a", LOCATION)
    entry = twice + length_delimited(b"\x12", b"./a") + length_delimited(b"\x12", b"../x")
    tensor = length_delimited(b"\x6a", entry)
    data = length_delimited(b"\x3a", length_delimited(b"\x2a", tensor))
    assert onnx.ModelProto.FromString(data).graph.initializer[0].external_data[0].value == "../x"
    assert found(tmp_path, data) == {"../x"}


@pytest.mark.parametrize(
    "data",
    [
        b"no graph",
        b"\x3a",  # no length
        b"\x3a\x05ab",  # shorter than it says
        b"\x3b\x3c",  # groups, which ONNX has none of
        b"\xff" * 11,
        b"\x09\0\0",  # a number cut short
    ],
)
def test_what_is_no_message(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^Protobuf parsing failed$"):
        found(tmp_path, data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@given(cuts=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=4))
def test_whatever_onnx_reads_of_a_damaged_graph_is_found(
    folder: Path, cuts: list[tuple[int, bytes]]
) -> None:
    data = length_delimited(b"\x3a", hidden_tensor()) * 3
    for place, bytes_there in cuts:
        start = place % len(data)
        data = data[:start] + bytes_there + data[start + len(bytes_there) :]
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:
        model = onnx.ModelProto()
    expected = {
        os.fsdecode(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    try:
        locations = found(folder, data)
    except ValueError:
        return  # refused
    assert expected <= locations
