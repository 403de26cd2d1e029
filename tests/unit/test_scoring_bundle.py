"""Bundles that are refused, on the text of the error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hvdrec.scoring import BundleError, RequestError, Scorer, ScoringError
from hvdrec.storage.artifacts import write_manifest
from tests.bundles import write_bundle

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "b")


def change_manifest(bundle: Path, change: Change) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def rewrite(bundle: Path) -> None:
    """Let the manifest list what is there now."""
    meta = json.loads((bundle / "manifest.json").read_text())["meta"]
    write_manifest(bundle, "bundle", meta)


def refusal(bundle: Path, **options: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Scorer.load(bundle, **options)
    assert isinstance(caught.value, ScoringError)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{bundle}", "B")


def test_no_bundle(tmp_path: Path) -> None:
    expected = "B: no bundle here (manifest.json is missing); run hvdrec export"
    assert refusal(tmp_path / "nowhere") == expected
    assert refusal(tmp_path) == expected
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file") == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[1]", "no JSON object"),
    ],
)
def test_manifest_that_is_none(bundle: Path, text: str, reason: str) -> None:
    (bundle / "manifest.json").write_text(text)
    expected = f"B/manifest.json: damaged manifest ({reason}); export the bundle again"
    assert refusal(bundle) == expected


def set_feature(**values: Any) -> Change:
    return lambda m: m["meta"]["schema"]["features"][0].update(values)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(kind="features"), "B: is a 'features' artifact, expected 'bundle'"),
        (
            lambda m: m.update(format=3),
            "B: format 3 is newer than this hvdrec reads (2); upgrade hvdrec",
        ),
        (
            lambda m: m.update(format="1"),
            "B: format '1' is not what this hvdrec reads (2); export the bundle again",
        ),
        (lambda m: m.pop("meta"), "'meta' is missing"),
        (lambda m: m["meta"]["schema"].pop("user_key"), "'user_key' is missing"),
        (lambda m: m["meta"].update(item_width="3"), "item_width is '3', not an integer"),
        (
            lambda m: m["meta"].update(retrieval_width=4),
            "retrieval_width 4 is not within user_width 3 and item_width 3",
        ),
        (
            set_feature(side="shop"),
            "side of 'user_id' is 'shop', not of [user, item, scene]",
        ),
        (
            set_feature(kind="image"),
            "kind of 'user_id' is 'image', not of [categorical, categorical_list, sequence, "
            "numeric, hashed]",
        ),
        (set_feature(dtype="bool"), "dtype of 'user_id' is 'bool', not of [string, int, float]"),
        (lambda m: m.update(files=["ranker.onnx"]), "'list' object has no attribute 'items'"),
        (lambda m: m["files"].update(x={"bytes": 1}), "'sha256' is missing"),
        (
            lambda m: m["files"].pop("ranker.onnx"),
            "B: 'ranker.onnx' is missing from the bundle; export it again",
        ),
        (
            lambda m: m["meta"].update(tasks=[{"name": "click"}]),
            "B/ranker.onnx: gives [score], expected 'score_click'; export the bundle again",
        ),
        (lambda m: m["meta"].update(tasks=[{"share": 1}]), "'name' is missing"),
        (
            lambda m: m["meta"]["schema"]["features"][6].update(default="noon"),
            "B: default of a scene field: scene.hour = 'noon': must be an integer, not str",
        ),
    ],
)
def test_manifest_that_does_not_fit(bundle: Path, change: Change, text: str) -> None:
    change_manifest(bundle, change)
    if not text.startswith("B"):
        text = f"B/manifest.json: damaged manifest ({text}); export the bundle again"
    assert refusal(bundle) == text


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "items/../../secret", "a\0b"])
def test_file_names_that_leave_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("s")
    change_manifest(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": ""}}))
    assert refusal(bundle) == f"B: file name {name!r} leaves the bundle; do not use this bundle"


def test_a_link_that_leaves_the_bundle(bundle: Path) -> None:
    titles = bundle / "items" / "titles.npy"
    titles.rename(bundle.parent / "titles.npy")
    titles.symlink_to(bundle.parent / "titles.npy")
    assert refusal(bundle) == (
        "B: file name 'items/titles.npy' leaves the bundle; do not use this bundle"
    )


def test_a_file_that_is_missing_or_truncated(bundle: Path) -> None:
    embeddings = bundle / "items" / "embeddings.npy"
    size = embeddings.stat().st_size
    embeddings.write_bytes(embeddings.read_bytes()[:-4])
    assert refusal(bundle) == (
        f"B/items/embeddings.npy: has {size - 4} bytes, the manifest says {size}; export it again"
    )
    embeddings.unlink()
    assert refusal(bundle) == "B/items/embeddings.npy: is missing; export the bundle again"


def test_changed_contents_are_found_on_request(bundle: Path) -> None:
    embeddings = bundle / "users" / "embeddings.npy"
    contents = bytearray(embeddings.read_bytes())
    contents[-1] ^= 1
    embeddings.write_bytes(contents)
    Scorer.load(bundle)
    assert refusal(bundle, verify=True) == (
        "B/users/embeddings.npy: contents differ from the manifest; export the bundle again"
    )


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("users/keys.npy", np.array(["1", "2"]), "is <U1 of shape (2,), expected bytes or int64"),
        ("users/keys.npy", np.array([[b"1"]]), "is |S1 of shape (1, 1), expected bytes or int64"),
        ("users/keys.npy", np.array([1, 2]), "holds keys of type int, feature 'user_id' is of "),
        (
            "items/embeddings.npy",
            np.zeros((4, 3)),
            "is float64 of shape (4, 3), expected one of [float32, float16, int8] of (4, 3)",
        ),
        (
            "items/embeddings.npy",
            np.zeros((3, 3), np.float32),
            "is float32 of shape (3, 3), expected one of [float32, float16, int8] of (4, 3)",
        ),
        (
            "items/embeddings.npy",
            np.zeros((4, 3), np.float32, order="F"),
            "is float32 of shape (4, 3), expected one of [float32, float16, int8] of (4, 3)",
        ),
        ("items/titles_offsets.npy", np.arange(5), "does not fit 4 items and their titles"),
        ("items/titles_offsets.npy", np.arange(4), "does not fit 4 items and their titles"),
    ],
)
def test_arrays_that_do_not_fit(bundle: Path, name: str, array: Any, text: str) -> None:
    np.save(bundle / name, array)
    rewrite(bundle)
    assert refusal(bundle).startswith(f"B/{name}: {text}")


def test_popularity_is_needed_where_retrieval_was_not_trained(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", retrieval_width=0)
    np.save(bundle / "items" / "popularity.npy", np.arange(3))
    rewrite(bundle)
    assert refusal(bundle) == (
        "B/items/popularity.npy: is int64 of shape (3,), expected int64 of (4,); "
        "export the bundle again"
    )


def test_nothing_is_unpickled(bundle: Path) -> None:
    np.save(bundle / "users" / "keys.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    rewrite(bundle)
    text = refusal(bundle)
    assert text.startswith("B/users/keys.npy: cannot be read (")
    assert text.endswith("); export the bundle again")


def test_a_graph_that_is_none(bundle: Path) -> None:
    (bundle / "ranker.onnx").write_bytes(b"no graph")
    rewrite(bundle)
    assert refusal(bundle).startswith("B/ranker.onnx: no readable graph (")


def test_a_graph_that_takes_or_gives_something_else(bundle: Path) -> None:
    change_manifest(bundle, set_feature(name="visitor"))
    assert refusal(bundle) == (
        "B/user_tower.onnx: takes [age: tensor(double), history: tensor(string), "
        "user_id: tensor(string)], the manifest says [age: tensor(double), "
        "history: tensor(string), visitor: tensor(string)]; export the bundle again"
    )
    change_manifest(bundle, set_feature(name="user_id"))
    graph = onnx.load(bundle / "user_tower.onnx")
    graph.graph.node[-1].output[0] = graph.graph.output[0].name = "vector"
    onnx.save(graph, bundle / "user_tower.onnx")
    rewrite(bundle)
    assert refusal(bundle) == (
        "B/user_tower.onnx: gives [vector], expected 'embedding'; export the bundle again"
    )


@pytest.mark.parametrize("threads", [0, 1.5, True])
def test_threads(bundle: Path, threads: Any) -> None:
    with pytest.raises(RequestError, match=r"^threads = .*: must be an integer of at least 1$"):
        Scorer.load(bundle, threads=threads)
