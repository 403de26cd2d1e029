"""Tests that every `Store` must pass, and bundles with known embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvdrec.scoring.stores import Store
from hvdrec.storage.artifacts import read_manifest, write_manifest
from tests.bundles import write_bundle

WIDTH = 3
DTYPES = ("float32", "float16", "int8")
Key = str | int

STRING_KEYS = [
    "",
    "a",
    "ab",
    "a\0b",
    "b",
    "é",
    "ключ",
    "\U0001f3ac",
    "ab" * 40,
    *map(str, range(60)),
]
INT_KEYS = [0, 1, -1, 7, 2**63 - 1, -(2**63), *range(100, 160)]
UNKNOWN_STRINGS = ["", "a\0", "a\0b", "A", "aa", "ab" * 41, "é ", "999", "00", "\xff"]
UNKNOWN_INTS = [2, -7, 99, 2**62, -(2**62)]


def rewrite_side(bundle: Path, side: str, keys: Sequence[Key], values: Any, dtype: str) -> None:
    """Replace the keys and embeddings of one side of a bundle and update its manifest.

    values: float32 [n, WIDTH], stored as ``dtype``.
    """
    folder = bundle / f"{side}s"
    raw = [key.encode() if isinstance(key, str) else key for key in keys]
    order = sorted(range(len(raw)), key=raw.__getitem__)
    key_dtype: Any = np.int64 if isinstance(keys[0], int) else np.bytes_
    np.save(folder / "keys.npy", np.array([raw[i] for i in order], dtype=key_dtype))
    stored = np.asarray(values, dtype=np.float32)[order]
    if dtype == "int8":
        scales = np.linspace(0.01, 3.0, len(stored), dtype=np.float32)
        np.save(folder / "scales.npy", scales)
        stored = np.clip(np.rint(stored / scales[:, None]), -127, 127)
    np.save(folder / "embeddings.npy", stored.astype(dtype))
    if side == "item":
        np.save(folder / "popularity.npy", np.zeros(len(stored), np.int64))
    write_manifest(bundle, "bundle", read_manifest_meta(bundle))


def read_manifest_meta(bundle: Path) -> dict[str, Any]:
    """Return the ``meta`` table of a bundle's manifest."""
    meta: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())["meta"]
    return meta


def make_bundle(path: Path, key_dtype: str = "string", dtype: str = "float32") -> Path:
    """Write a bundle with random embeddings for keys that are easy to get wrong."""
    write_bundle(path, key_dtype=key_dtype, titles=None, trending=None, seen=None, filters=())
    keys: Sequence[Key] = STRING_KEYS if key_dtype == "string" else INT_KEYS
    for seed, side in enumerate(("user", "item")):
        values = np.random.default_rng(seed).standard_normal((len(keys), WIDTH))
        rewrite_side(path, side, keys, values, dtype)
    read_manifest(path, "bundle")
    return path


def expected_rows(bundle: Path, side: str) -> dict[Key, list[float]]:
    """Return the embedding of each key, read from the bundle's files without hvdrec."""
    folder = bundle / f"{side}s"
    keys = np.load(folder / "keys.npy").tolist()
    values = np.load(folder / "embeddings.npy").astype(np.float32)
    if (folder / "scales.npy").exists():
        values = values * np.load(folder / "scales.npy")[:, None]
    names = [key.decode() if isinstance(key, bytes) else key for key in keys]
    return dict(zip(names, values.tolist(), strict=True))


def check_lookup(store: Store, rows: dict[Key, list[float]], keys: Sequence[Key | None]) -> None:
    """Check that a lookup returns the rows, bit for bit."""
    embeddings, is_stored = store.lookup(keys)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(keys), WIDTH)
    assert is_stored.dtype == np.bool_
    assert is_stored.tolist() == [key in rows for key in keys]
    assert embeddings.tolist() == [rows.get(key, [0.0] * WIDTH) for key in keys]  # type: ignore[arg-type]


class StoreSuite:
    """Tests for every implementation; a subclass defines the fixture ``open_store``."""

    OpenStore = Callable[[Path, str], Store]

    @pytest.fixture(
        scope="class",
        params=[(key, dtype) for key in ("string", "int") for dtype in DTYPES],
        ids="-".join,
    )
    @classmethod
    def bundle(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Path:
        return make_bundle(tmp_path_factory.mktemp("bundles") / "bundle", *request.param)

    @pytest.fixture(scope="class", params=["user", "item"])
    @classmethod
    def case(
        cls, request: pytest.FixtureRequest, bundle: Path, open_store: OpenStore
    ) -> Iterator[tuple[Store, dict[Key, list[float]]]]:
        yield open_store(bundle, request.param), expected_rows(bundle, request.param)

    def test_every_key_has_its_row(self, case: Any) -> None:
        store, rows = case
        assert store.dtype == ("string" if "a" in rows else "int")
        assert len(rows) == len(STRING_KEYS if "a" in rows else INT_KEYS)
        check_lookup(store, rows, list(rows))
        check_lookup(store, rows, list(reversed(rows)))

    def test_any_mix_of_keys(self, case: Any) -> None:
        store, rows = case
        unknown: list[Key] = [*UNKNOWN_STRINGS] if "a" in rows else [*UNKNOWN_INTS]

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.sampled_from([*rows, *unknown, None]), max_size=30))
        def check(keys: list[Key | None]) -> None:
            check_lookup(store, rows, keys)

        check()

    def test_no_keys_and_unknown_keys(self, case: Any) -> None:
        store, rows = case
        check_lookup(store, rows, [])
        check_lookup(store, rows, [None, None])
        check_lookup(store, rows, ["no such key" if "a" in rows else 12345])

    def test_more_keys_than_fit_one_round_trip(self, case: Any) -> None:
        store, rows = case
        check_lookup(store, rows, [*rows, None] * 150)

    def test_the_caller_owns_the_result(self, case: Any) -> None:
        store, rows = case
        embeddings, is_stored = store.lookup(list(rows))
        embeddings[:] = -1.0
        is_stored[:] = False
        check_lookup(store, rows, list(rows))

    def test_concurrent_lookups(self, case: Any) -> None:
        store, rows = case
        keys = list(rows)

        def work(seed: int) -> None:
            for _ in range(20):
                check_lookup(store, rows, keys[seed:] + keys[:seed])

        with ThreadPoolExecutor(8) as threads:
            for future in [threads.submit(work, seed) for seed in range(8)]:
                future.result()
