"""Damaged and malicious bundles are refused by `Scorer.load` and `Scorer.watch`.

Next to each bundle is a canary file, which some of them try to read or write. It must not change,
and no error may contain its contents.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import external_data_helper, helper

from hvdrec.scoring import BundleError, Scorer, session
from hvdrec.storage.artifacts import write_manifest
from hvdrec.storage.checksums import sealed, unsealed
from tests.bundles import write_bundle
from tests.other_bundle import put, write_other_bundle

CANARY = b"canary-5b1f0c"
NEVER = 3600.0


@dataclass(frozen=True)
class Broken:
    name: str
    break_it: Callable[[Path], object]
    text: str
    """Beginning of the error; B stands for the path of the bundle."""
    only_verified: bool = False
    """True if only verification detects it."""


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the manifest."""

    def break_it(bundle: Path) -> None:
        file = bundle / "manifest.json"
        parsed = unsealed(file.read_bytes())
        change(parsed)
        file.write_text(sealed(parsed))

    return break_it


def consistent(break_it: Callable[[Path], object]) -> Callable[[Path], object]:
    """Break a bundle and update its manifest, as an attacker would."""

    def break_both(bundle: Path) -> None:
        meta = json.loads((bundle / "manifest.json").read_text())["meta"]
        break_it(bundle)
        write_manifest(bundle, "bundle", meta)

    return break_both


def contents(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda bundle: (bundle / name).write_bytes(data)


def text(data: str) -> Callable[[Path], object]:
    return contents("manifest.json", data.encode())


def array(name: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    """Replace an array and update the manifest."""
    return consistent(lambda bundle: np.save(bundle / name, change(np.load(bundle / name))))


def truncated(name: str) -> Callable[[Path], object]:
    return lambda bundle: os.truncate(bundle / name, (bundle / name).stat().st_size - 4)


def flipped(bundle: Path) -> None:
    file = bundle / "users" / "embeddings.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def pickled(bundle: Path) -> None:
    objects = np.array([os.system, {}], dtype=object)
    np.save(bundle / "users" / "keys.npy", objects, allow_pickle=True)


class Touches:
    """An object that overwrites the canary when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.file, "touched")


def pickle_bytes(bundle: Path) -> None:
    file = bundle / "users" / "keys.npy"
    file.write_bytes(pickle.dumps(Touches(bundle.parent / "canary")))


def archive(bundle: Path) -> None:
    packed = io.BytesIO()
    np.savez(packed, keys=np.load(bundle / "users" / "keys.npy"))
    (bundle / "users" / "keys.npy").write_bytes(packed.getvalue())


def vast(bundle: Path) -> None:
    """Write an array header that claims more bytes than any memory has."""
    head = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (2**62, 3)}
    np.lib.format.write_array_header_1_0(head, shape)
    (bundle / "users" / "embeddings.npy").write_bytes(head.getvalue() + bytes(64))


def linked(name: str, target: str) -> Callable[[Path], object]:
    """Replace a file or directory by a link to a target outside of the bundle."""

    def break_it(bundle: Path) -> None:
        file = bundle / name
        outside = bundle.parent / target
        if not outside.exists():
            file.rename(outside)
        elif file.exists():
            file.unlink()
        file.symlink_to(outside)

    return break_it


def in_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Replace a file by something that is not a regular file."""

    def break_it(bundle: Path) -> None:
        (bundle / name).unlink()
        make(bundle / name)

    return break_it


def listening(file: Path) -> None:
    folder = os.open(file.parent, os.O_RDONLY)
    try:  # the path of a socket has at most 108 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{folder}/{file.name}")
    finally:
        os.close(folder)


def graph(name: str, change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    """Change a graph and update the manifest."""

    def break_it(bundle: Path) -> None:
        model = onnx.load(bundle / name, load_external_data=False)
        change(model)
        (bundle / name).write_bytes(model.SerializeToString())

    return consistent(break_it)


def external(bundle: Path, location: str, target: Path) -> None:
    """Move the ranker's weights to the file ``target``, which the graph names ``location``."""
    file = bundle / "ranker.onnx"
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:  # shapes are inferred from the others
            external_data_helper.set_external_data(tensor, location="w")
    onnx.save(model, str(file))  # writes the weights beside it
    weights = (bundle / "w").read_bytes()
    (bundle / "w").unlink()
    target.write_bytes(weights)
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    file.write_bytes(model.SerializeToString())


def escaping(location: Callable[[Path], str], *, link: str = "") -> Callable[[Path], object]:
    """Move the ranker's weights out of the bundle, to a path that the graph names."""

    def break_it(bundle: Path) -> None:
        if link:
            (bundle / link).symlink_to(bundle.parent)
        external(bundle, location(bundle), bundle.parent / "weights")

    return consistent(break_it)


def linked_weights(bundle: Path) -> None:
    consistent(lambda b: external(b, "ranker.onnx.data", b.parent / "weights"))(bundle)
    (bundle / "ranker.onnx.data").symlink_to(bundle.parent / "weights")


def lost_weights(bundle: Path) -> None:
    consistent(lambda b: external(b, "ranker.onnx.data", b / "ranker.onnx.data"))(bundle)
    (bundle / "ranker.onnx.data").unlink()


def short_weights(bundle: Path) -> None:
    external(bundle, "ranker.onnx.data", bundle / "ranker.onnx.data")
    os.truncate(bundle / "ranker.onnx.data", 4)


def other_input(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["clock" if name == "hour" else name for name in node.input]
    for value in model.graph.input:
        value.name = "clock" if value.name == "hour" else value.name


def unknown_operator(model: onnx.ModelProto) -> None:
    node = model.graph.node[-1]
    name, node.output[0] = node.output[0], "before"
    model.graph.node.append(helper.make_node("Exfiltrate", ["before"], [name], domain="evil"))
    model.opset_import.append(helper.make_opsetid("evil", 1))


DAMAGED = "B/manifest.json: damaged manifest ("

BROKEN = [
    Broken("truncated file", truncated("items/embeddings.npy"), "B/items/embeddings.npy: has "),
    Broken(
        "truncated array",
        consistent(truncated("items/embeddings.npy")),
        "B/items/embeddings.npy: cannot be read (mmap length is greater than file size)",
    ),
    Broken(
        "truncated graph",
        consistent(truncated("ranker.onnx")),
        "B/ranker.onnx: is not a readable graph",
    ),
    Broken("flipped bit", flipped, "B/users/embeddings.npy: contents differ", only_verified=True),
    Broken(
        "missing file", lambda b: (b / "users" / "keys.npy").unlink(), "B/users/keys.npy: is missi"
    ),
    Broken(
        "missing in the manifest",
        manifest(lambda m: m["files"].pop("items/keys.npy")),
        "B: 'items/keys.npy' is missing from the bundle; export it again",
    ),
    Broken("no manifest", lambda b: (b / "manifest.json").unlink(), "B: is not a bundle"),
    Broken(
        "another kind of artifact",
        manifest(lambda m: m.update(kind="run")),
        "B: is a 'run' artifact, expected 'bundle'",
    ),
    Broken(
        "newer format",
        manifest(lambda m: m.update(format=10**9)),
        "B: format 1000000000 is newer than this hvdrec reads (",
    ),
    Broken(
        "older format",
        manifest(lambda m: m.update(format=0)),
        "B: format 0 is not the one this hvdrec reads (",
    ),
    Broken("manifest of text", text("bundle"), f"{DAMAGED}Expecting value: line 1 column 1"),
    Broken("manifest of bytes", contents("manifest.json", b"\xff\xfe\0"), DAMAGED),
    Broken("manifest of a list", text("[]"), f"{DAMAGED}not a JSON object)"),
    Broken("manifest nested too deep", text('{"a":' + "[" * 100_000), DAMAGED),
    Broken("manifest of a vast number", text('{"kind": ' + "9" * 5000 + "}"), DAMAGED),
    Broken(
        "huge manifest",
        lambda b: os.truncate(b / "manifest.json", 1 << 40),
        "B/manifest.json: has 1099511627776 bytes, a manifest has at most 16777216",
    ),
    Broken(
        "widths that are not integers",
        manifest(lambda m: m["meta"].update(user_width=1.5)),
        f"{DAMAGED}user_width is 1.5, not an integer)",
    ),
    Broken(
        "sizes that are not integers",
        manifest(lambda m: m["files"]["ranker.onnx"].update(bytes=None)),
        f"{DAMAGED}int() argument must be",
    ),
    Broken(
        "path of two dots",
        manifest(lambda m: m["files"].update({"../canary": {"bytes": 13, "sha256": ""}})),
        "B: file name '../canary' leaves the bundle; do not use this bundle",
    ),
    Broken(
        "absolute path",
        manifest(lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": ""}})),
        "B: file name '/etc/hostname' leaves the bundle; do not use this bundle",
    ),
    Broken(
        "link out of the bundle",
        linked("items/titles.npy", "titles.npy"),
        "B: file name 'items/titles.npy' leaves the bundle; do not use this bundle",
    ),
    Broken(
        "linked folder",
        linked("items", "elsewhere"),
        "B: file name 'items/embeddings.npy' leaves the bundle; do not use this bundle",
    ),
    Broken(
        "linked manifest",
        linked("manifest.json", "canary"),
        "B: file name 'manifest.json' leaves the bundle; do not use this bundle",
    ),
    Broken(
        "array that is a link and not in the manifest",
        lambda b: (
            manifest(lambda m: m["files"].pop("items/titles_offsets.npy"))(b),
            linked("items/titles_offsets.npy", "offsets.npy")(b),
        ),
        "B: 'items/titles_offsets.npy' is missing from the bundle; export it again",
    ),
    Broken(
        "cyclic link",
        in_place("users/keys.npy", lambda file: file.symlink_to(file.name)),
        "B: file name 'users/keys.npy' leaves the bundle; do not use this bundle",
    ),
    Broken(
        "pipe",
        in_place("users/keys.npy", os.mkfifo),
        "B/users/keys.npy: is not a regular file; expo",
    ),
    Broken(
        "pipe as manifest",
        in_place("manifest.json", os.mkfifo),
        "B/manifest.json: is not a regular file; export the bundle again",
    ),
    Broken(
        "socket", in_place("ranker.onnx", listening), "B/ranker.onnx: is not a regular file; expo"
    ),
    Broken(
        "directory in place of a file",
        in_place("ranker.onnx", Path.mkdir),
        "B/ranker.onnx: is not a regular file; export the bundle again",
    ),
    Broken(
        "device",
        in_place("items/embeddings.npy", lambda file: file.symlink_to("/dev/zero")),
        "B: file name 'items/embeddings.npy' leaves the bundle; do not use this bundle",
    ),
    Broken(
        "weights outside, by two dots",
        escaping(lambda _: "../weights"),
        "B/ranker.onnx: is not a readable graph (",
    ),
    Broken(
        "weights outside, by an absolute path",
        escaping(lambda bundle: str(bundle.parent / "weights")),
        "B/ranker.onnx: is not a readable graph (",
    ),
    Broken(
        "weights outside, by a linked folder",
        escaping(lambda _: "up/weights", link="up"),
        "B/ranker.onnx: is not a readable graph (",
    ),
    Broken(
        "weights at an address of the process",
        escaping(lambda _: "*/_ORT_MEM_ADDR_/*"),
        "B/ranker.onnx: is not a readable graph (",
    ),
    Broken(
        "weights outside, by a linked file that is not in the manifest",
        linked_weights,
        "B/ranker.onnx: is not a readable graph (",
    ),
    Broken("weights that are missing", lost_weights, "B/ranker.onnx.data: is missing; export the"),
    Broken(
        "weights that are too short",
        consistent(short_weights),
        "B/ranker.onnx: is not a readable graph (",
    ),
    Broken(
        "pickled objects",
        consistent(pickled),
        "B/users/keys.npy: cannot be read (",
    ),
    Broken(
        "pickle in place of an array", consistent(pickle_bytes), "B/users/keys.npy: cannot be read "
    ),
    Broken(
        "archive in place of an array", consistent(archive), "B/users/keys.npy: cannot be read ("
    ),
    Broken(
        "array larger than memory", consistent(vast), "B/users/embeddings.npy: cannot be read ("
    ),
    Broken(
        "column-major array",
        array("items/embeddings.npy", np.asfortranarray),
        "B/items/embeddings.npy: is float32 of shape (4, 3), expected ",
    ),
    Broken(
        "another type",
        array("items/embeddings.npy", lambda a: a.astype(np.float64)),
        "B/items/embeddings.npy: is float64 of shape (4, 3), expected ",
    ),
    Broken(
        "another shape",
        array("users/embeddings.npy", lambda a: a[:, :2].copy()),
        "B/users/embeddings.npy: is float32 of shape (2, 2), expected ",
    ),
    Broken(
        "big-endian",
        array("users/embeddings.npy", lambda a: a.astype(">f4")),
        "B/users/embeddings.npy: is >f4 of shape (2, 3), expected ",
    ),
    Broken(
        "keys out of order",
        array("items/keys.npy", lambda a: a[::-1].copy()),
        "B/items/keys.npy: does not hold unique keys in ascending order; export",
        only_verified=True,
    ),
    Broken(
        "duplicate key",
        array("items/keys.npy", lambda a: a[[0, 0, 1, 2]]),
        "B/items/keys.npy: does not hold unique keys in ascending order; export",
        only_verified=True,
    ),
    Broken(
        "keys that are not UTF-8",
        array("items/keys.npy", lambda a: np.array([b"10", b"20", b"30", b"\xc3"])),
        "B/items/keys.npy: holds keys that are not UTF-8 text; export the bundle again",
        only_verified=True,
    ),
    Broken(
        "embeddings that are not finite",
        array("users/embeddings.npy", lambda a: a * np.float32("nan")),
        "B/users/embeddings.npy: holds numbers that are not finite; export the bundle again",
        only_verified=True,
    ),
    Broken(
        "offsets beyond the titles",
        array("items/titles_offsets.npy", lambda a: a * 1000),
        "B/items/titles_offsets.npy: does not divide 14 values into 4 parts",
    ),
    Broken(
        "offsets that descend",
        array("items/titles_offsets.npy", lambda a: a[[0, 3, 1, 2, 4]]),
        "B/items/titles_offsets.npy: does not ascend",
        only_verified=True,
    ),
    Broken(
        "offsets within a character",
        array("items/titles_offsets.npy", lambda a: np.array([0, 3, 6, 6, 14])),
        "B/items/titles.npy: is not UTF-8 text; export the bundle again",
        only_verified=True,
    ),
    Broken(
        "negative counts",
        array("items/popularity.npy", lambda a: -a),
        "B/items/popularity.npy: holds negative counts; export the bundle again",
        only_verified=True,
    ),
    Broken("no graph", consistent(contents("ranker.onnx", b"no graph")), "B/ranker.onnx: is not a"),
    Broken(
        "empty graph",
        consistent(contents("ranker.onnx", b"")),
        "B/ranker.onnx: is not a readable graph",
    ),
    Broken(
        "graph with other inputs",
        graph("ranker.onnx", other_input),
        "B/ranker.onnx: takes [clock: tensor(int64), ",
    ),
    Broken(
        "unknown operator",
        graph("ranker.onnx", unknown_operator),
        "B/ranker.onnx: uses the operator evil:Exfiltrate, which a bundle may not use; ",
    ),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("whole") / "b")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other_bundle(tmp_path_factory.mktemp("live") / "b")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    file = tmp_path / "canary"
    file.write_bytes(CANARY)
    return file


def refusal(bundle: Path, caught: BaseException | None) -> str:
    """Return the text of the error, with B for the bundle."""
    assert isinstance(caught, BundleError)
    line = str(caught)
    assert "\n" not in line
    assert CANARY.decode() not in line
    return line.replace(str(bundle), "B")


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_bundle_is_refused(
    broken: Broken, whole: Path, live: Path, canary: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "b"
    put(live, bundle)
    with Scorer.watch(bundle, interval=NEVER) as watched:
        request: Any = ("1", ["10", "20", "x"], {"hour": 21})
        expected = watched.score(*request)
        put(whole, bundle)
        broken.break_it(bundle)

        with pytest.raises(BundleError) as caught:
            Scorer.load(bundle)
        line = refusal(bundle, caught.value)
        assert line.startswith(broken.text)
        if broken.only_verified:
            Scorer.load(bundle, verify=False)
        else:
            with pytest.raises(BundleError) as caught:
                Scorer.load(bundle, verify=False)
            assert refusal(bundle, caught.value) == line

        for _ in range(2):  # a missing manifest is refused at the second look
            assert not watched.look()
        assert refusal(bundle, watched.last_error) == line
        np.testing.assert_array_equal(watched.score(*request), expected)
        assert watched.reloads == 0
    assert canary.read_bytes() == CANARY


def test_there_are_at_least_twenty_broken_bundles_with_unique_names() -> None:
    assert len({broken.name for broken in BROKEN}) == len(BROKEN) >= 20


def test_files_that_are_not_in_the_manifest_are_ignored(whole: Path, tmp_path: Path) -> None:
    """Such as notes, locks or file system metadata."""
    bundle = tmp_path / "b"
    put(whole, bundle)
    os.mkfifo(bundle / "notes")  # opening it would block
    (bundle / "items" / "more.npy").symlink_to("/dev/zero")
    expected = Scorer.load(whole).score("1", ["10"])
    for verify in (False, True):
        found = Scorer.load(bundle, verify=verify).score("1", ["10"])
        np.testing.assert_array_equal(found, expected)


def test_external_weights_inside_the_bundle_are_loaded(whole: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    put(whole, bundle)
    consistent(lambda b: external(b, "ranker.onnx.data", b / "ranker.onnx.data"))(bundle)
    expected = Scorer.load(whole)
    with Scorer.watch(bundle, interval=NEVER) as watched:
        scene = {"hour": 21, "place": "home"}
        for user in ("1", "2", "x"):
            found = watched.score(user, ["10", "20", "x"], scene)
            np.testing.assert_array_equal(found, expected.score(user, ["10", "20", "x"], scene))
        assert watched.current.info.model != expected.info.model
        model = watched.current.info.model
    weights = bundle / "ranker.onnx.data"
    consistent(lambda _: weights.write_bytes(weights.read_bytes() + b"\0"))(bundle)
    assert Scorer.load(bundle).info.model != model, "other weights must change the model"


@pytest.mark.parametrize("change", [other_input, unknown_operator])
def test_a_damaged_large_graph_is_refused_at_its_first_use(
    change: Callable[[onnx.ModelProto], object],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "LARGE_BYTES", 0)
    bundle = tmp_path / "b"
    put(whole, bundle)
    graph("ranker.onnx", change)(bundle)
    scorer = Scorer.load(bundle, verify=True)
    with pytest.raises(BundleError, match=r"ranker.onnx: (takes|uses the operator)"):
        scorer.warm()


def test_a_replaced_large_graph_is_not_opened(
    whole: Path, live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LARGE_BYTES", 0)
    bundle = tmp_path / "b"
    put(whole, bundle)
    scorer = Scorer.load(bundle)
    put(live, bundle)
    with pytest.raises(BundleError, match=r"was replaced after the bundle was loaded; load it ag"):
        scorer.score("1", ["10"])
    shutil.rmtree(bundle)
    with pytest.raises(BundleError):
        scorer.score("1", ["10"])
