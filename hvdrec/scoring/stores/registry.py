"""Registry of embedding stores: the scheme of a store's URL selects the implementation."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

from hvdrec.scoring.bundle import BundleInfo, read_bundle
from hvdrec.scoring.errors import StoreError, choices
from hvdrec.scoring.stores.protocol import Store, StoreFactory

GROUP = "hvdrec.stores"
_REDIS = "hvdrec.scoring.stores.redis.store:open_redis"
# A built-in store is given by name and imported on use: its database client may not be installed.
_factories: dict[str, StoreFactory | str] = {"redis": _REDIS, "rediss": _REDIS, "unix": _REDIS}


def register_store(scheme: str, factory: StoreFactory) -> None:
    """Make `open_stores` accept URLs of another scheme.

    A package can instead declare its factory as an entry point of the group ``hvdrec.stores`` whose
    name is the scheme. Then `open_stores` and ``hvdrec serve --store`` find it without a call of
    this function.

    Args:
        scheme: The part of the URL before ``://``.
        factory: Opens the stores of users and items for a bundle. It should connect only at the
            first lookup, so that a service can start while its database is down.
    """
    _factories[scheme] = factory


def open_stores(url: str, bundle: str | Path | BundleInfo) -> tuple[Store, Store]:
    """Open the embedding stores of users and items for a bundle.

    Args:
        url: Address of the store; its scheme chooses the implementation.
        bundle: The bundle or its directory. The stores return the embeddings of its model.

    Returns:
        The store of users and the store of items.

    Raises:
        StoreError: No store is registered for the scheme, or the store refuses the URL.
        BundleError: The bundle cannot be read.
    """
    scheme, separator, _ = url.partition("://")
    factory = _factories.get(scheme) if separator else None
    if factory is None:
        from importlib.metadata import entry_points  # here: it is slow to import

        factory = next((point.load() for point in entry_points(group=GROUP, name=scheme)), None)
    if factory is None:  # do not show the URL in the message: it may contain a password
        known = choices(f"{name}://" for name in sorted(_factories))
        raise StoreError(f"store: the URL has an unknown scheme; known: {known}", field="store")
    if isinstance(factory, str):
        factory = resolve_name(factory)
    info = bundle if isinstance(bundle, BundleInfo) else read_bundle(Path(bundle), verify=False)
    return factory(url, info)
