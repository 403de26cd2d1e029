"""The Node example returns the same results as Python for the same bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring import Scorer
from hvdrec.storage.artifacts import write_manifest
from tests.bundles import write_bundle

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"
ULPS = 4
"""Units in the last place by which two builds of onnxruntime may differ; these two agree."""


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the example and install its packages from its package-lock.json."""
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    # Without --ignore-scripts the package downloads GPU libraries.
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"npm ci failed with exit code {done.returncode}"
    return folder


def node(example: Path, bundle: Path, requests: Any, *options: str) -> Any:
    """Run the example on requests, objects or lines; return exit code, answers and stderr."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in requests]
    done = subprocess.run(
        ["node", "score.mjs", str(bundle), *options],
        cwd=example,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "NODE_NO_WARNINGS": "1"},
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def requests(key: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Return requests of all forms; ``key`` converts a key to the bundle's type."""
    history = [key("10"), key("20"), key("30"), key("77"), key("20")]
    users = [
        key("1"),
        key("2"),
        key("99"),
        None,
        {},
        {"user_id": key("2")},
        {"age": 30, "history": history},
        {"user_id": key("99"), "age": 61.5, "history": []},
        {"age": None, "history": history[:1]},
    ]
    items = [
        key("10"),
        key("20"),
        key("40"),
        key("77"),
        None,
        {"item_id": key("10"), "genres": ["War", "Drama", "x"], "year": 1999},
        {"genres": [], "year": None},
        {"year": 2020},
    ]
    scenes: list[dict[str, Any]] = [
        {},
        {"hour": 21, "place": "home", "temperature": 20.0},
        {"hour": None, "place": None, "temperature": None},
        {"hour": 3, "place": "Zürich \N{GRINNING FACE}", "temperature": -7.3},
    ]
    scored = [{"user": u, "items": items, "scene": s} for u in users for s in scenes]
    scored += [{"user": users[0], "items": []}, {"user": users[0], "items": items[:1]}]
    recommended = [
        {"user": user, "scene": scene, "k": k}
        for user in [*users, {"user_id": key("99")}, {"age": None, "history": []}]
        for scene, k in zip(scenes, (1, 2, 4, 10), strict=True)
    ]
    recommended.append({"user": None, "k": 2, "exclude": [key("10")]})
    for user in (*users[:3], {"user_id": key("1"), "age": 20}):
        recommended.append({"user": user, "k": 4, "skip_seen": True})
        recommended.append({"user": user, "k": 4, "allowed": {"genres": ["War", "no such"]}})
        both = {"genres": ["Drama", "War"], "year": [1990, 2000, 1]}
        recommended.append({"user": user, "k": 4, "allowed": both})
        recommended.append(
            {"user": user, "k": 4, "allowed": {"genres": ["War", "Drama"]}, "skip_seen": True}
        )
    recommended.append({"user": users[0], "k": 2, "exclude": [key("20"), key("77")]})
    recommended.append({"user": users[1], "k": 2, "candidates": 1})
    return scored + recommended


def expected(scorer: Scorer, request: dict[str, Any]) -> Any:
    scene = request.get("scene", {})
    if "items" in request:
        return scorer.score(request["user"], request["items"], scene)
    names = ("candidates", "exclude", "allowed", "skip_seen")
    options = {name: request[name] for name in names if name in request}
    return scorer.recommend(request["user"], scene, request["k"], **options)


def agree(example: Path, bundle: Path, key: Callable[[str], Any]) -> None:
    scorer = Scorer.load(bundle, verify=True)
    lines = requests(key)
    code, answers, error = node(example, bundle, lines, "--verify")
    assert (code, error) == (0, "")
    for request, answer in zip(lines, answers, strict=True):
        ours = expected(scorer, request)
        if "items" in request:
            theirs = np.array(answer["scores"], dtype=np.float32)
            assert theirs.tolist() == answer["scores"], "float32 values, exactly"
            np.testing.assert_array_max_ulp(theirs, ours, ULPS)
            continue
        assert [r["item"] for r in answer["items"]] == [r.item for r in ours]
        for name in ("title", "source"):
            assert [r[name] for r in answer["items"]] == [getattr(r, name) for r in ours]
        for name in ("score", "retrieval_score"):
            np.testing.assert_allclose(
                [r[name] for r in answer["items"]], [getattr(r, name) for r in ours], rtol=1e-6
            )


def test_string_keys(example: Path, tmp_path: Path) -> None:
    agree(example, write_bundle(tmp_path / "b"), str)


def test_integer_keys(example: Path, tmp_path: Path) -> None:
    agree(example, write_bundle(tmp_path / "b", key_dtype="int"), int)


def test_trending_items(example: Path, tmp_path: Path) -> None:
    """Ties are broken by popularity, then by key: 40, 30, 10, 20."""
    bundle = write_bundle(tmp_path / "b")
    np.save(bundle / "items" / "trending.npy", np.array([1, 1, 1, 9]))
    np.save(bundle / "items" / "popularity.npy", np.array([5, 5, 7, 0]))
    write_manifest(bundle, "bundle", json.loads((bundle / "manifest.json").read_text())["meta"])
    agree(example, bundle, str)
    _, [answer], _ = node(example, bundle, [{"user": "99", "k": 4}])
    assert [r["item"] for r in answer["items"]] == ["40", "30", "10", "20"]
    assert {r["source"] for r in answer["items"]} == {"trending"}


def test_candidates_by_popularity(example: Path, tmp_path: Path) -> None:
    agree(example, write_bundle(tmp_path / "b", retrieval_width=0, titles=None), str)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_compressed_embeddings(example: Path, tmp_path: Path, dtype: str) -> None:
    bundle = write_bundle(tmp_path / "b")
    for side in ("users", "items"):
        file = bundle / side / "embeddings.npy"
        vectors = np.load(file)
        if dtype == "float16":
            small = (vectors * 1.1).astype(np.float16)
            small[0, 0] = 3e-6  # a subnormal number
        else:
            scales = (np.abs(vectors).max(axis=1) / 127).astype(np.float32)
            np.save(bundle / side / "scales.npy", scales)
            small = np.rint(vectors / scales[:, None]).astype(np.int8)
        np.save(file, small)
    write_manifest(bundle, "bundle", json.loads((bundle / "manifest.json").read_text())["meta"])
    agree(example, bundle, str)


def test_integers_that_javascript_numbers_cannot_hold(example: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", key_dtype="int")
    keys = np.array([-(2**63), 10, 2**62, 2**63 - 1])
    np.save(bundle / "items" / "keys.npy", keys)
    write_manifest(bundle, "bundle", json.loads((bundle / "manifest.json").read_text())["meta"])
    items = [str(key) for key in keys[1:]]
    lines = [{"user": 1, "items": items}, {"user": 1, "k": 4}]
    code, answers, error = node(example, bundle, lines)
    assert (code, error) == (0, "")
    ours = Scorer.load(bundle)
    theirs = np.array(answers[0]["scores"], dtype=np.float32)
    np.testing.assert_array_max_ulp(theirs, ours.score(1, keys[1:].tolist()), ULPS)
    assert [int(r["item"]) for r in answers[1]["items"]] == [r.item for r in ours.recommend(1, k=4)]


@pytest.mark.parametrize(
    ("request_line", "reason"),
    [
        (
            '{"user": "1", "items": ["10"], "scene": {"our": 3}}',
            "scene field 'our' does not exist; known: [hour, place, temperature]",
        ),
        (
            '{"user": "1", "items": ["10"], "scene": {"hour": "3pm"}}',
            'hour = "3pm": must be an integer',
        ),
        ('{"user": 1, "items": ["10"]}', "user_id = 1: must be a string"),
        ('{"user": "1", "items": [{"genres": "War"}]}', 'genres = "War": must be a list'),
        ('{"user": "1", "items": "10"}', 'items = "10": must be a list'),
        (
            '{"user": "1", "allowed": {"age": [3]}}',
            "allowed field 'age' does not exist; known: [",
        ),
        ('{"user": "1", "allowed": {"genres": "War"}}', 'allowed.genres = "War": must be a list'),
        ('{"user": "1", "k": 0}', "k = 0: must be a whole number from 1"),
        (
            '{"usr": "1"}',
            "request field 'usr' does not exist; "
            "known: [user, items, scene, k, candidates, exclude, allowed, skip_seen]",
        ),
        ("{", "no JSON request ("),
    ],
)
def test_an_invalid_request_ends_in_one_line(
    example: Path, tmp_path: Path, request_line: str, reason: str
) -> None:
    bundle = write_bundle(tmp_path / "b")
    valid = '{"user": "1", "items": ["10"]}'
    code, answers, error = node(example, bundle, [valid, request_line, valid])
    assert (code, len(answers)) == (2, 1)
    assert error.startswith(f"score.mjs: error: line 2: {reason}")
    assert error.count("\n") == 1


def test_bundles_that_are_refused(example: Path, tmp_path: Path) -> None:
    def refusal(bundle: Path, *options: str) -> str:
        code, answers, error = node(example, bundle, [], *options)
        assert (code, answers, error.count("\n")) == (2, [], 1)
        return str(error).replace(str(bundle), "B").strip()

    bundle = tmp_path / "b"
    assert refusal(bundle) == "score.mjs: error: B: no bundle here (manifest.json is missing)"
    write_bundle(bundle)
    embeddings = bundle / "items" / "embeddings.npy"
    content = embeddings.read_bytes()
    embeddings.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refusal(bundle, "--verify").endswith("B/items/embeddings.npy: contents differ")
    embeddings.write_bytes(content[:-1])
    assert refusal(bundle).endswith("B/items/embeddings.npy: has another size")
    embeddings.rename(tmp_path / "embeddings.npy")
    embeddings.symlink_to(tmp_path / "embeddings.npy")
    (tmp_path / "embeddings.npy").write_bytes(content)
    assert "leaves the bundle; do not use this bundle" in refusal(bundle)
    embeddings.unlink()
    assert refusal(bundle).endswith("B/items/embeddings.npy: is missing")
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["checksum"]
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert "is bundle of format 1, this reads bundle of 2" in refusal(bundle)
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "meta": None, "files": {}}))
    assert "damaged bundle (" in refusal(bundle)
