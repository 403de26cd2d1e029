"""The interface of an embedding store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo

Array = NDArray[Any]


class Store(Protocol):
    """Embeddings of users or of items by key. Implementations must be thread-safe."""

    @property
    def dtype(self) -> str:
        """Type of the keys: ``"string"`` or ``"int"``."""

    @property
    def model(self) -> str:
        """`Scorer.model` of the bundle that computed the embeddings."""

    def lookup(self, keys: Sequence[str | int | None]) -> tuple[Array, Array]:
        """Look up embeddings by key.

        Args:
            keys: k keys of type `dtype`; None is never stored.

        Returns:
            Two new arrays: embeddings, float32 [k, width], with zeros for keys that are not stored;
            and bool [k], True for each key that is stored.

        Raises:
            StoreError: The store cannot answer now.
        """


StoreFactory = Callable[[str, BundleInfo], tuple[Store, Store]]
"""Opens the stores of users and items: ``factory(url, bundle) -> (users, items)``."""
