"""The choice of an embedding store by the scheme of its URL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring import Scorer
from hvdrec.scoring.bundle import BundleInfo, read_bundle
from hvdrec.scoring.errors import BundleError, StoreError
from hvdrec.scoring.stores import Store, open_stores, register_store, registry
from tests.bundles import write_bundle


@pytest.fixture(autouse=True)
def factories(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo registrations after each test."""
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    yield


class ConstantStore:
    """A store with the three members of the protocol and nothing else."""

    dtype = "string"

    def __init__(self, model: str, width: int) -> None:
        self.model = model
        self.width = width

    def lookup(self, keys: Sequence[str | int | None]) -> tuple[Any, Any]:
        is_stored = np.array([key is not None for key in keys])
        return np.full((len(keys), self.width), 0.5, np.float32), is_stored


def open_constant(url: str, bundle: BundleInfo) -> tuple[Store, Store]:
    assert url == "constant://half"
    return (
        ConstantStore(bundle.model, bundle.user_width),
        ConstantStore(bundle.model, bundle.item_width),
    )


def test_a_scorer_uses_a_store_of_user_code(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    register_store("constant", open_constant)
    users, items = open_stores("constant://half", bundle)
    scorer = Scorer.load(bundle, users=users, items=items)
    np.testing.assert_array_equal(scorer.embed_user("anyone"), np.full(3, 0.5, np.float32))
    assert len(set(scorer.score("1", ["10", "20", "new"]).tolist())) == 1


def test_stores_of_another_model_are_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    users = ConstantStore("another model", 3)
    with pytest.raises(BundleError, match="another model"):
        Scorer.load(bundle, users=users)


def test_a_store_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("constant", f"{__name__}:open_constant", "hvdrec.stores")]

    def entry_points(*, group: str, name: str) -> list[EntryPoint]:
        return [point for point in points if (point.group, point.name) == (group, name)]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    users, _ = open_stores("constant://half", write_bundle(tmp_path / "bundle"))
    assert users.lookup(["anyone", None])[1].tolist() == [True, False]
    with pytest.raises(StoreError):
        open_stores("other://half", tmp_path / "bundle")


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix"])
def test_built_in_schemes(scheme: str, tmp_path: Path) -> None:
    info = read_bundle(write_bundle(tmp_path / "bundle"), verify=False)
    users, items = open_stores(f"{scheme}://localhost/0", info)
    assert users.model == items.model == info.model


@pytest.mark.parametrize("url", ["mongo://user:s3cret@host", "s3cret", "", "redis:s3cret"])
def test_an_unknown_scheme_lists_the_known_ones(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"known: .*redis://.*unix://") as caught:
        open_stores(url, tmp_path)
    assert caught.value.field == "store"
    assert "s3cret" not in str(caught.value)
