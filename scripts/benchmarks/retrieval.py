"""Measure `Scorer.recommend` over a million items: exact search, and an index.

Item vectors are drawn with the structure of trained embeddings (see `drawn`), or are those of a
trained bundle, extended to a million (``--bundle``). ``--hard`` draws isotropic Gaussian vectors,
the worst case for an index. All measurements run on one thread, in turns, over the same memory-
mapped file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from loading import write_bundle
from threadpoolctl import threadpool_limits

from hvdrec.exporting.index import write_index
from hvdrec.exporting.precision import compressed
from hvdrec.scoring import Scorer
from hvdrec.storage.artifacts import write_manifest

ITEMS, USERS, WIDTH, K = 1_000_000, 1000, 64, 100
CLUSTERS = 3000
NEIGHBOURS = 10
BOUTS = 6
SCENE = {"hour": 21}
Array = np.ndarray[Any, Any]


def measure(
    turns: int = 5, entries: int = ITEMS, bundle: Path | None = None, hard: bool = False
) -> dict[str, Any]:
    """Return the figures of ``recommend``: medians over turns of many calls each."""
    random = np.random.default_rng(0)
    if bundle is not None:
        items, users, what = widened(random, bundle, entries)
    elif hard:
        items, users = (random.standard_normal((n, WIDTH), "f4") for n in (entries, USERS))
        what = "isotropic Gaussian"
    else:
        items, users = drawn(random, entries)
        what = "clusters, power-law spectrum, unit length"
    with tempfile.TemporaryDirectory(prefix="hvdrec-retrieval-") as name:
        say(f"writing a bundle of {entries} items")
        path = write_bundle(Path(name) / "bundle", entries)
        meta = json.loads((path / "manifest.json").read_text())["meta"]
        (path / "manifest.json").unlink()
        np.save(path / "users" / "embeddings.npy", users[np.arange(entries) % len(users)])
        np.save(path / "items" / "embeddings.npy", items)
        start = time.perf_counter()
        meta["index"] = write_index(path, WIDTH, say)
        built = time.perf_counter() - start
        write_manifest(path, "bundle", meta)
        with threadpool_limits(limits=1):
            found = _measured(path, len(users), turns)
        size = (path / "items" / "index.faiss").stat().st_size
    index = {**meta["index"], "build_seconds": built, "bytes": size}
    return {**found, "index": index, "items": entries, "vectors": what, **spectrum(items)}


def drawn(random: np.random.Generator, rows: int) -> tuple[Array, Array]:
    """Draw item and user vectors [rows, WIDTH] of unit length, at least as hard as trained ones.

    They form clusters of unequal size. The k-th direction has 1 / k of the variance, so about 18
    directions count (`spectrum`). The item embeddings of this repository's own models have 8
    (MovieLens-1M) and 11 (The Complete Journey).
    """
    deviations = np.arange(1, WIDTH + 1) ** -0.5
    centres = random.normal(size=(CLUSTERS, WIDTH)) * deviations
    sizes = random.gamma(0.5, size=CLUSTERS)

    def some(count: int) -> Array:
        of = random.choice(CLUSTERS, count, p=sizes / sizes.sum())
        vectors = centres[of] + 0.6 * random.normal(size=(count, WIDTH)) * deviations
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray((vectors / lengths).astype(np.float32))

    return some(rows), some(USERS)


def widened(random: np.random.Generator, bundle: Path, rows: int) -> tuple[Array, Array, str]:
    """Extend a bundle's item vectors to ``rows``; return them, its users', and a description.

    A new vector is a trained one moved along the difference of two of its nearest neighbours, so it
    varies as its surroundings do. Its length is that of the trained vector.
    """
    trained = np.unique(np.load(bundle / "items" / "embeddings.npy")[:, :WIDTH], axis=0)
    near = np.empty((len(trained), NEIGHBOURS), np.int64)
    for start in range(0, len(trained), 2048):
        products = trained[start : start + 2048] @ trained.T
        products[np.arange(len(products)), start + np.arange(len(products))] = -np.inf
        near[start : start + 2048] = np.argpartition(-products, NEIGHBOURS)[:, :NEIGHBOURS]
    one = random.integers(0, len(trained), rows)
    others = near[one[:, None], random.integers(0, NEIGHBOURS, (rows, 2))]
    first, second, third = trained[one], trained[others[:, 0]], trained[others[:, 1]]
    share = random.uniform(0, 1, (rows, 1)).astype(np.float32)
    push = random.normal(0, 0.5, (rows, 1)).astype(np.float32)
    items = first + share * (second - first) + push * (second - third)
    items *= np.linalg.norm(first, axis=1, keepdims=True) / np.linalg.norm(
        items, axis=1, keepdims=True
    )
    users = np.load(bundle / "users" / "embeddings.npy")[:, :WIDTH]
    users = users[random.permutation(len(users))[:USERS]]
    return items, users, f"{len(trained)} items of {bundle}, widened"


def spectrum(items: Array) -> dict[str, float]:
    """Return the participation ratio of the vectors' spectrum: how many directions count."""
    part = items[:: max(1, len(items) // 50_000)]
    variance = np.linalg.svd(part - part.mean(axis=0), compute_uv=False) ** 2
    return {"directions": float(variance.sum() ** 2 / (variance**2).sum())}


def _measured(path: Path, users: int, turns: int) -> dict[str, Any]:
    indexed, exact = Scorer.load(path), Scorer.load(path)
    indexed._retrieval.open()
    search = indexed._retrieval.search
    exact._retrieval.search = search.exact
    vectors, nothing = search.exact.vectors, np.empty(0, dtype=np.int64)
    keys = [f"user {n:07d}" for n in range(users)]
    queries = np.stack([indexed.embed_user(key) for key in keys])
    exact.recommend(keys[0])

    calls: dict[str, Callable[[int], Any]] = {
        "numpy": lambda i: np.argpartition(vectors @ queries[i], len(vectors) - K)[-K:],
        "exact": lambda i: exact.recommend(keys[i], SCENE, K),
        "index": lambda i: indexed.recommend(keys[i], SCENE, K),
        "exact_100_candidates": lambda i: exact.recommend(keys[i], SCENE, K, candidates=K),
        "index_100_candidates": lambda i: indexed.recommend(keys[i], SCENE, K, candidates=K),
        "exact_retrieval": lambda i: exact._retrieval.search.search(queries[i], K, nothing),
        "index_retrieval": lambda i: search.search(queries[i], K, nothing),
    }
    for kind in ("float16", "int8"):
        smaller = type(search.exact)(*compressed(vectors, kind))
        calls[f"exact_retrieval_{kind}"] = lambda i, s=smaller: s.search(queries[i], K, nothing)
    found = _in_turns(calls, turns, users)
    hits = same = 0
    for i in range(users):
        scores = vectors.astype(np.float32, copy=False) @ queries[i]
        best = np.argpartition(scores, len(scores) - K)[-K:]
        hits += len(np.intersect1d(calls["index_retrieval"](i)[0], best))
    asked = range(0, users, max(1, users // 100))
    for i in asked:
        answers = ({r.item for r in calls[name](i)} for name in ("exact", "index"))
        same += len(set.intersection(*answers))
    return {
        "exact_over_numpy": found["exact"] / found["numpy"],
        "index_recall": hits / (users * K),
        "index_over_exact": found["index"] / found["exact"],
        "index_over_exact_100_candidates": found["index_100_candidates"]
        / found["exact_100_candidates"],
        "index_over_exact_retrieval": found["index_retrieval"] / found["exact_retrieval"],
        "same_answers": same / (len(asked) * K),
        "milliseconds": found,
    }


def _in_turns(
    calls: Mapping[str, Callable[[int], Any]], turns: int, users: int
) -> dict[str, float]:
    """Return the median, over turns, of each call's median time in milliseconds.

    Short series of exact search and of index search alternate, so other load on the machine affects
    all of them alike.
    """
    kinds = {True: 40, False: 5}
    medians: dict[str, list[float]] = {name: [] for name in calls}
    user = 0
    for _ in range(turns):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(BOUTS):
            for is_index, rounds in kinds.items():
                for _ in range(rounds):
                    for name, call in calls.items():
                        if name.startswith("index") == is_index:
                            user = (user + 1) % users
                            start = time.perf_counter()
                            call(user)
                            times[name].append(time.perf_counter() - start)
        for name, values in times.items():
            medians[name].append(statistics.median(values) * 1e3)
    return {name: statistics.median(values) for name, values in medians.items()}


def say(text: str) -> None:
    """Print a progress line."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--items", type=int, default=ITEMS)
    parser.add_argument("--bundle", type=Path, help="a trained bundle, whose vectors are widened")
    parser.add_argument("--hard", action="store_true", help="isotropic Gaussian vectors")
    options = parser.parse_args()
    figures = measure(options.turns, options.items, options.bundle, options.hard)
    print(json.dumps({"recommend": figures}, indent=1))
