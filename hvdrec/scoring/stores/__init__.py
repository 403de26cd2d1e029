"""Embedding stores: the places from which a scorer reads the embeddings of users and items.

By default a scorer reads them from the bundle. A store in a database can be shared by many services
and updated without a new bundle. The scheme of its URL selects the implementation:

>>> users, items = open_stores("redis://host:6379/0", "bundle/")  # doctest: +SKIP
>>> scorer = Scorer.load("bundle/", users=users, items=items)  # doctest: +SKIP
"""

from hvdrec.scoring.stores.protocol import Store, StoreFactory
from hvdrec.scoring.stores.registry import open_stores, register_store

__all__ = ["Store", "StoreFactory", "open_stores", "register_store"]
