"""Verification detects inconsistent contents in arrays of the right type and shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring import BundleError, verify
from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.verify import verify_arrays
from hvdrec.storage.artifacts import write_manifest
from tests.bundles import write_bundle

GENRES = "items/filters/genres"
ARRAYS: Mapping[str, Any] = {
    "items/trending.npy": np.array([0, 3, 0, 1]),
    f"{GENRES}/values.npy": np.array([b"Drama", b"War"]),
    f"{GENRES}/offsets.npy": np.array([0, 2, 4]),
    f"{GENRES}/rows.npy": np.array([0, 1, 1, 3], dtype=np.int32),
    "items/filters/year/values.npy": np.array([1990, 2000]),
    "items/filters/year/offsets.npy": np.array([0, 1, 2]),
    "items/filters/year/rows.npy": np.array([3, 0], dtype=np.int32),
    "users/seen_offsets.npy": np.array([0, 3, 3]),
    "users/seen_rows.npy": np.array([2, 0, 3], dtype=np.int32),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "b")


def write(bundle: Path, arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(bundle / name, array)
    meta = json.loads((bundle / "manifest.json").read_text())["meta"]
    write_manifest(bundle, "bundle", meta)


def check(bundle: Path) -> None:
    verify_arrays(read_bundle(bundle, verify=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 1 << 18])
def test_a_complete_bundle_passes_with_blocks_of_any_size(
    bundle: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "BLOCK_ROWS", rows)
    write(bundle, ARRAYS)
    check(bundle)


def test_a_bundle_without_users_or_items_passes(tmp_path: Path) -> None:
    check(write_bundle(tmp_path / "b", users={}, items={}))
    check(write_bundle(tmp_path / "int", users={}, items={}, key_dtype="int"))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("items/trending.npy", lambda a: a[:3], "(3,)"),
        ("items/trending.npy", lambda a: a - 1, "negative"),
        ("items/trending.npy", lambda a: a / 1, "float64"),
        (f"{GENRES}/values.npy", lambda a: a[::-1], "unique keys in ascending order"),
        (f"{GENRES}/values.npy", lambda a: a[[0, 0]], "unique keys in ascending order"),
        (f"{GENRES}/values.npy", lambda a: np.array([b"A", b"\xff"]), "not UTF-8"),
        (f"{GENRES}/values.npy", lambda a: np.array([1.0, 2.0]), "float64"),
        (f"{GENRES}/offsets.npy", lambda a: a + 1, "4 values into 2 parts"),
        (f"{GENRES}/offsets.npy", lambda a: a[[0, 2, 1]], "4 values into 2 parts"),
        (f"{GENRES}/offsets.npy", lambda a: a[[0, 2]], "4 values into 2 parts"),
        (f"{GENRES}/rows.npy", lambda a: a + 1, "outside of 4 items"),
        (f"{GENRES}/rows.npy", lambda a: a - 1, "outside of 4 items"),
        (f"{GENRES}/rows.npy", lambda a: a[[1, 0, 2, 3]], "does not ascend within a value"),
        (f"{GENRES}/rows.npy", lambda a: a[[0, 0, 2, 3]], "does not ascend within a value"),
        (f"{GENRES}/rows.npy", lambda a: a.astype(np.int64), "int64"),
        ("users/seen_offsets.npy", lambda a: a[[0, 0, 0]], "3 values into 2 parts"),
        ("users/seen_offsets.npy", lambda a: a[:2], "3 values into 2 parts"),
        ("users/seen_offsets.npy", lambda a: np.array([0, 9, 3]), "does not ascend"),
        ("users/seen_rows.npy", lambda a: a + 1, "outside of 4 items"),
    ],
)
def test_inconsistent_contents_are_refused(
    bundle: Path, name: str, change: Callable[[Any], Any], words: str
) -> None:
    write(bundle, {**ARRAYS, name: change(ARRAYS[name])})
    with pytest.raises(BundleError) as caught:
        check(bundle)
    assert caught.value.field == f"{bundle}/{name}"
    assert words in str(caught.value)
    assert str(caught.value).endswith("; export the bundle again")


@pytest.mark.parametrize(
    "name",
    [
        "items/titles.npy",
        "items/titles_offsets.npy",
        "users/seen_rows.npy",
        "users/seen_offsets.npy",
        f"{GENRES}/rows.npy",
        f"{GENRES}/offsets.npy",
    ],
)
def test_one_of_two_files_that_belong_together_is_missing(bundle: Path, name: str) -> None:
    write(bundle, ARRAYS)
    (bundle / name).unlink()
    write(bundle, {})
    with pytest.raises(BundleError) as caught:
        check(bundle)
    assert caught.value.field == str(bundle)
    assert f"'{name}' is missing from the bundle" in str(caught.value)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_keys_are_compared_across_blocks(
    bundle: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "BLOCK_ROWS", rows)
    for keys in ([b"10", b"10", b"30", b"40"], [b"10", b"30", b"20", b"40"]):
        write(bundle, {"items/keys.npy": np.array(keys)})
        with pytest.raises(
            BundleError, match=r"items/keys.npy: does not hold unique keys in ascending"
        ):
            check(bundle)


def test_a_character_must_not_span_two_keys(bundle: Path) -> None:
    """The two halves are adjacent in the file, but neither key is valid UTF-8."""
    write(bundle, {"items/keys.npy": np.array([b"a\xc3", b"\xa4b", b"c", b"d"])})
    with pytest.raises(BundleError, match=r"items/keys.npy: "):
        check(bundle)
    write(bundle, {"items/keys.npy": np.array(["aä".encode(), "bä".encode(), b"c", b"d"])})
    check(bundle)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_of_int8_embeddings_must_be_finite(bundle: Path, scale: float) -> None:
    arrays = {
        "items/embeddings.npy": np.full((4, 3), -128, dtype=np.int8),
        "items/scales.npy": np.ones(4, dtype=np.float32),
    }
    write(bundle, arrays)
    check(bundle)
    arrays["items/scales.npy"][2] = scale
    write(bundle, arrays)
    with pytest.raises(BundleError, match=r"items/scales.npy: holds numbers that are not finite"):
        check(bundle)
    (bundle / "items/scales.npy").unlink()
    write(bundle, {})
    with pytest.raises(BundleError, match=r"'items/scales.npy' is missing from the bundle"):
        check(bundle)
