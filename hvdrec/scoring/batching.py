"""Requests of the scorer: their types, and those of `Scorer.score_many` that share a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.candidates import Key
from hvdrec.scoring.embedder import BLOCK_ROWS
from hvdrec.scoring.errors import invalid_request
from hvdrec.scoring.graph_inputs import as_list

Raw = Mapping[str, Any]
Scenes = Mapping[str, Sequence[Any] | Array]
Entries = Sequence[Key | Raw | None] | Array
Request = tuple[Key | Raw | None, Entries, Raw | None]
ALONE_ITEMS = 64
"""A request of this many items runs alone: for one user, the ranker folds the user's part of its
first layer into the weights."""


def shared_runs(counts: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of the requests that share a run of the graphs.

    A run has at most BLOCK_ROWS items. A request of ALONE_ITEMS or more runs alone.

    Args:
        counts: Number of items of each request.
    """
    together: list[int] = []
    items = 0
    for index, count in enumerate(counts):
        if count >= ALONE_ITEMS:
            yield [index]
            continue
        if items + count > BLOCK_ROWS:
            yield together
            together, items = [], 0
        together.append(index)
        items += count
    if together:
        yield together


def checked_request(index: int, request: Any) -> Request:
    """Return a request as (user, items, scene), with its items as a list.

    Raises:
        RequestError: It does not have three values, or its items are not a list.
    """
    name = f"requests[{index}]"
    if not isinstance(request, tuple | list) or len(request) != 3:
        raise invalid_request(name, request, "must be three values, user, items and scene")
    user, items, scene = request
    return user, as_list(items, f"{name}.items"), scene
