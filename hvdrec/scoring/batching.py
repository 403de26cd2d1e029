"""Types of scoring requests, and the grouping of small requests by `Scorer.score_many`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.candidates import Key
from hvdrec.scoring.embedder import BLOCK_ROWS
from hvdrec.scoring.errors import RequestError, invalid_request
from hvdrec.scoring.graph_inputs import as_list

Raw = Mapping[str, Any]
Scenes = Mapping[str, Sequence[Any] | Array]
Entries = Sequence[Key | Raw | None] | Array
Request = tuple[Key | Raw | None, Entries, Raw | None]
ALONE_ITEMS = 64
"""A request with at least this many items is scored alone: with a single user, the ranker's graph
computes the user's part of its first layer once instead of once per item."""


def shared_runs(counts: Sequence[int]) -> Iterator[list[int]]:
    """Group requests so that one run of the ONNX graphs scores a group; yield each group's indices.

    A group has at most BLOCK_ROWS items. A request with ALONE_ITEMS or more is a group of its own.

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
        RequestError: The request does not have three values, or its items are not a list.
    """
    name = f"requests[{index}]"
    if not isinstance(request, tuple | list) or len(request) != 3:
        raise invalid_request(name, request, "must be three values, user, items and scene")
    user, items, scene = request
    return user, as_list(items, f"{name}.items"), scene


def name_invalid(
    score: Callable[[Key | Raw | None, Entries, Raw | None], Array], index: int, request: Request
) -> None:
    """Score one request of many; if it is invalid, raise an error that names its index."""
    try:
        score(*request)
    except RequestError as error:
        name = f"requests[{index}]."
        field = name + error.field
        raise RequestError(f"{name}{error}", field=field, value=error.value) from None


def require_tasks(info: BundleInfo) -> None:
    """Raise RequestError if a bundle's ranker has no tasks."""
    if not info.tasks:
        problem = "tasks: this bundle's ranker has a single label"
        remedy = "score without tasks, or export a model with [[tasks]]"
        raise RequestError(f"{problem}; {remedy}", field="tasks")
