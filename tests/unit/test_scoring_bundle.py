"""Damaged bundles: the error names the file, the problem and the remedy."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hvdrec.scoring import BundleError, RequestError, Scorer, ScoringError, file_checksums
from hvdrec.scoring import bundle as bundle_module
from hvdrec.scoring.bundle import read_bundle
from hvdrec.storage import tree_checksum
from hvdrec.storage.artifacts import write_manifest
from hvdrec.storage.checksums import sealed, unsealed
from tests.bundles import write_bundle

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "b")


def change_manifest(bundle: Path, change: Change) -> None:
    file = bundle / "manifest.json"
    manifest = unsealed(file.read_bytes())
    change(manifest)
    file.write_text(sealed(manifest))


def rewrite(bundle: Path) -> None:
    """List the current files in the manifest."""
    meta = json.loads((bundle / "manifest.json").read_text())["meta"]
    write_manifest(bundle, "bundle", meta)


def check(bundle: Path, file: str, *words: str, remedy: str = "export", **options: Any) -> None:
    """Load a bundle that must be refused; check the file, the words and the remedy of the error."""
    with pytest.raises(BundleError) as caught:
        Scorer.load(bundle, **options)
    error = caught.value
    assert isinstance(error, ScoringError)
    assert "\n" not in str(error)
    assert error.field == str(bundle / file)
    assert str(error).startswith(f"{error.field}: ")
    assert [word for word in words if word not in str(error)] == [], str(error)
    assert remedy in str(error).rpartition("; ")[2]


def test_a_path_without_a_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        check(path, "", "is not a bundle", "manifest.json is missing", remedy="hvdrec export")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[1]", "not a JSON object"),
    ],
)
def test_a_manifest_must_be_a_json_object(bundle: Path, text: str, reason: str) -> None:
    (bundle / "manifest.json").write_text(text)
    check(bundle, "manifest.json", "damaged manifest", reason)


def set_feature(**values: Any) -> Change:
    return lambda m: m["meta"]["schema"]["features"][0].update(values)


@pytest.mark.parametrize(
    ("change", "words", "remedy"),
    [
        (lambda m: m.update(kind="features"), ["a 'features' artifact, expected 'bundle'"], "pass"),
        (lambda m: m.update(format=3), ["format 3 is newer", "(2)"], "upgrade hvdrec"),
        (lambda m: m.update(format="1"), ["format '1'", "(2)"], "export"),
        (lambda m: m["files"].pop("ranker.onnx"), ["'ranker.onnx' is missing"], "export"),
    ],
)
def test_a_bundle_of_another_format_is_refused(
    bundle: Path, change: Change, words: list[str], remedy: str
) -> None:
    change_manifest(bundle, change)
    check(bundle, "", *words, remedy=remedy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("meta"), ["'meta' is missing"]),
        (lambda m: m["meta"]["schema"].pop("user_key"), ["'user_key' is missing"]),
        (lambda m: m["meta"].update(item_width="3"), ["item_width is '3', not an integer"]),
        (lambda m: m["meta"].update(user_width=1 << 40), ["user_width 1099511627776", "65536"]),
        (
            lambda m: m["meta"].update(retrieval_width=4),
            ["retrieval_width 4", "user_width 3", "item_width 3"],
        ),
        (set_feature(side="shop"), ["side of 'user_id' is 'shop'", "[user, item, scene]"]),
        (set_feature(kind="image"), ["kind of 'user_id' is 'image'", "[categorical, "]),
        (set_feature(dtype="bool"), ["dtype of 'user_id' is 'bool'", "[string, int, float]"]),
        (lambda m: m.update(files=["ranker.onnx"]), ["'list' object has no attribute 'items'"]),
        (lambda m: m["files"].update(x={"bytes": 1}), ["'sha256' is missing"]),
        (lambda m: m["meta"].update(tasks=[{"share": 1}]), ["'name' is missing"]),
    ],
)
def test_a_damaged_manifest_is_refused(bundle: Path, change: Change, words: list[str]) -> None:
    change_manifest(bundle, change)
    check(bundle, "manifest.json", "damaged manifest", *words)


def test_a_ranker_without_a_task_of_the_manifest_is_refused(bundle: Path) -> None:
    change_manifest(bundle, lambda m: m["meta"].update(tasks=[{"name": "click"}]))
    check(bundle, "ranker.onnx", "[score]", "'score_click'")


def test_the_default_of_a_scene_field_must_have_its_type(bundle: Path) -> None:
    change_manifest(bundle, lambda m: m["meta"]["schema"]["features"][6].update(default="noon"))
    with pytest.raises(BundleError, match=r"default of a scene field: .* an integer") as caught:
        Scorer.load(bundle)
    assert (caught.value.field, caught.value.value) == ("scene.hour", "noon")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "items/../../secret", "a\0b"])
def test_a_file_name_outside_the_bundle_is_refused(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("s")
    change_manifest(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": ""}}))
    check(bundle, "", f"{name!r} leaves the bundle", remedy="do not use this bundle")


def test_a_link_out_of_the_bundle_is_refused(bundle: Path) -> None:
    titles = bundle / "items" / "titles.npy"
    titles.rename(bundle.parent / "titles.npy")
    titles.symlink_to(bundle.parent / "titles.npy")
    check(bundle, "", "'items/titles.npy' leaves the bundle", remedy="do not use this bundle")


def test_a_missing_or_truncated_file_is_refused(bundle: Path) -> None:
    embeddings = bundle / "items" / "embeddings.npy"
    size = embeddings.stat().st_size
    embeddings.write_bytes(embeddings.read_bytes()[:-4])
    check(bundle, "items/embeddings.npy", f"has {size - 4} bytes, the manifest says {size}")
    embeddings.unlink()
    check(bundle, "items/embeddings.npy", "is missing")


def test_every_flipped_bit_is_detected_by_default(bundle: Path) -> None:
    """One bit in each of 15 stretches of every file; the towers' weights and keys among them."""
    names = json.loads((bundle / "manifest.json").read_text())["files"]
    for name in names:
        file = bundle / name
        whole = file.read_bytes()
        for position in range(0, len(whole), len(whole) // 15 + 1):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            with pytest.raises(BundleError) as caught:
                read_bundle(bundle, verify=True)
            assert caught.value.field == str(file)
        check(bundle, name, "contents differ from the manifest")
        file.write_bytes(whole)
    Scorer.load(bundle)


def test_a_flipped_bit_in_the_manifest_is_named_or_without_effect(bundle: Path) -> None:
    file = bundle / "manifest.json"
    whole = file.read_bytes()
    expected = read_bundle(bundle, verify=True)
    refused = 0
    for position in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        try:
            info = read_bundle(bundle, verify=True)
        except BundleError as error:
            assert str(bundle) in error.field
            refused += 1
        else:
            assert info.fields == expected.fields
            assert info.manifest["meta"] == expected.manifest["meta"]
            assert info.model == expected.model
    assert refused > len(whole) / 11 / 2


def test_a_sparse_file_of_a_terabyte_is_refused_before_it_is_read(bundle: Path) -> None:
    embeddings = bundle / "items" / "embeddings.npy"
    os.truncate(embeddings, 1 << 40)
    change_manifest(bundle, lambda m: m["files"]["items/embeddings.npy"].update(bytes=1 << 40))
    started = time.process_time()
    check(bundle, "items/embeddings.npy", "sparse")
    assert time.process_time() - started < 5


def test_verification_can_be_switched_off(bundle: Path) -> None:
    embeddings = bundle / "users" / "embeddings.npy"
    contents = bytearray(embeddings.read_bytes())
    contents[-1] ^= 1
    embeddings.write_bytes(contents)
    Scorer.load(bundle, verify=False)
    with Scorer.watch(bundle, verify=False) as watched:
        assert watched.current.items == 4
    check(bundle, "users/embeddings.npy", "contents differ from the manifest")


def test_a_checksum_that_fails_during_a_replacement_is_not_damage(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes agree in both bundles, so only a checksum shows that a file is of the other one."""
    plain, calls = file_checksums.check_files, []

    def replaced_meanwhile(folder: Path, files: Any) -> None:
        if not calls:
            other = write_bundle(tmp_path / "other", key_dtype="string")
            embeddings = other / "users" / "embeddings.npy"
            np.save(embeddings, np.load(embeddings) + 1)
            rewrite(other)
            bundle.rename(tmp_path / "old")
            other.rename(bundle)
        calls.append(folder)
        plain(folder, files)

    monkeypatch.setattr(bundle_module, "check_files", replaced_meanwhile)
    scorer = Scorer.load(bundle)
    assert len(calls) == 2
    assert scorer.version == read_bundle(bundle, verify=True).version


def test_a_tree_checksum_is_compared_block_by_block(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_checksums, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tree_checksum, "BLOCK_BYTES", 64)
    rewrite(bundle)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    assert {name for name, facts in files.items() if "tree" in facts} == {
        name for name, facts in files.items() if facts["bytes"] > 64
    }
    Scorer.load(bundle)
    file = bundle / "items" / "keys.npy"
    whole = file.read_bytes()
    for position in (0, 63, 64, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        check(bundle, "items/keys.npy", "contents differ from the manifest")


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("users/keys.npy", np.array(["1", "2"]), ["<U1", "(2,)", "bytes or int64"]),
        ("users/keys.npy", np.array([[b"1"]]), ["|S1", "(1, 1)", "bytes or int64"]),
        ("users/keys.npy", np.array([1, 2]), ["keys of type int", "'user_id'", "string"]),
        ("items/embeddings.npy", np.zeros((4, 3)), ["float64", "(4, 3)", "[float32, float16"]),
        ("items/embeddings.npy", np.zeros((3, 3), np.float32), ["float32", "(3, 3)", "(4, 3)"]),
        ("items/embeddings.npy", np.zeros((4, 3), np.float32, order="F"), ["(4, 3)"]),
        ("items/titles_offsets.npy", np.arange(5), ["14 values into 4 parts"]),
        ("items/titles_offsets.npy", np.arange(4), ["14 values into 4 parts"]),
    ],
)
def test_an_array_of_another_type_or_shape_is_refused(
    bundle: Path, name: str, array: Any, words: list[str]
) -> None:
    np.save(bundle / name, array)
    rewrite(bundle)
    check(bundle, name, *words)


def test_popularity_must_fit_the_items(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", retrieval_width=0)
    np.save(bundle / "items" / "popularity.npy", np.arange(3))
    rewrite(bundle)
    check(bundle, "items/popularity.npy", "int64", "(3,)", "(4,)")


def test_pickled_objects_are_refused(bundle: Path) -> None:
    np.save(bundle / "users" / "keys.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    rewrite(bundle)
    check(bundle, "users/keys.npy", "cannot be read (")


def test_a_file_that_is_not_a_graph_is_refused(bundle: Path) -> None:
    (bundle / "ranker.onnx").write_bytes(b"no graph")
    rewrite(bundle)
    check(bundle, "ranker.onnx", "is not a readable graph (")


def test_a_graph_with_other_inputs_or_outputs_is_refused(bundle: Path) -> None:
    change_manifest(bundle, set_feature(name="visitor"))
    floats, strings = "[age: tensor(double), history: tensor(string), ", ": tensor(string)]"
    takes, expected = f"{floats}user_id{strings}", f"{floats}visitor{strings}"
    check(bundle, "user_tower.onnx", f"takes {takes}", f"the manifest says {expected}")
    change_manifest(bundle, set_feature(name="user_id"))
    graph = onnx.load(bundle / "user_tower.onnx")
    graph.graph.node[-1].output[0] = graph.graph.output[0].name = "vector"
    onnx.save(graph, bundle / "user_tower.onnx")
    rewrite(bundle)
    check(bundle, "user_tower.onnx", "[vector]", "'embedding'")


@pytest.mark.parametrize("threads", [0, 1.5, True])
def test_threads_must_be_a_positive_integer(bundle: Path, threads: Any) -> None:
    with pytest.raises(RequestError, match=r"integer of at least 1") as caught:
        Scorer.load(bundle, threads=threads)
    assert (caught.value.field, caught.value.value) == ("threads", threads)
