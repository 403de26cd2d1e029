"""Embedding stores: where a scorer reads the embeddings of users and items.

A bundle brings its own embeddings. A store in a database is shared by many services and updated
between bundles. Its URL chooses the implementation:

>>> users, items = open_stores("redis://host:6379/0", "bundle/")  # doctest: +SKIP
>>> scorer = Scorer.load("bundle/", users=users, items=items)  # doctest: +SKIP
"""

from hvdrec.scoring.stores.protocol import Store, StoreFactory
from hvdrec.scoring.stores.registry import open_stores, register_store

__all__ = ["Store", "StoreFactory", "open_stores", "register_store"]
