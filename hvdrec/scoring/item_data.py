"""What a bundle tells of items beside embeddings: titles, counts, filters, and who met them.

All of it is memory-mapped. Shapes and both ends of offsets are checked when a bundle is loaded;
what lies between is checked where it is read, so that no damage leads out of an array.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, Field, read_array
from hvdrec.scoring.errors import (
    BundleError,
    RequestError,
    choices,
    invalid_request,
    unknown_field,
)
from hvdrec.scoring.graph_inputs import WANTED, check_names, listed

Array = NDArray[Any]
FILTERS = "items/filters"
SHOWN_VALUES = 20
"""So many of a filter's values stand in an error's line."""


class ItemData:
    """Items' titles, popularity, trending counts and filters, and what users have seen."""

    def __init__(self, info: BundleInfo, users: int, items: int) -> None:
        self._info = info
        self._items = items
        self.titles = Titles(info, items)
        self._counts = {
            name: _counts(info, name, items)
            for name in ("popularity", "trending")
            if info.holds(f"items/{name}.npy")
        }
        self.filters = {
            field.name: Postings(info, field, items)
            for field in info.side("item")
            if info.holds(f"{FILTERS}/{field.name}/values.npy")
        }
        self._seen: RowLists | None = None
        if info.holds("users/seen_offsets.npy"):
            self._seen = RowLists(
                info, "users/seen_offsets.npy", "users/seen_rows.npy", users, items
            )
        self._orders: dict[str, Array] = {}

    def popularity(self) -> Array:
        """Return how often items were liked in the training split, int64 [items]."""
        if "popularity" not in self._counts:
            raise BundleError(
                f"{self._info.path}: 'items/popularity.npy' is missing from the bundle; "
                "export it again"
            )
        return self._counts["popularity"]

    def trending(self) -> Array:
        """Return how often items were liked of late, int64 [items]; if not told, popularity."""
        return self._counts["trending"] if "trending" in self._counts else self.popularity()

    def order(self, name: str) -> Array:
        """Return all rows int32 [items] by "popularity" or "trending", most first, sorted once.

        Of what trends alike the more popular comes first, then the first in the order of keys.
        """
        order = self._orders.get(name)
        if order is None:
            keys = [self.popularity()] + ([self.trending()] if name == "trending" else [])
            order = np.lexsort([-count for count in keys]).astype(np.int32)
            # Two threads may both sort: they find the same.
            self._orders[name] = order
        return order

    def first(self, name: str, count: int, excluded: Array, allowed: Array | None) -> Array:
        """Return the first ``count`` rows int64 of an order that are allowed and not excluded.

        excluded: rows, any number of times; allowed: None or bool [items].
        """
        order = self.order(name)
        looked = count + len(excluded)
        while True:
            rows = order[:looked]
            if allowed is not None:
                rows = rows[allowed[rows]]
            if excluded.size:
                rows = rows[~np.isin(rows, excluded)]
            if len(rows) >= count or looked >= len(order):
                return rows[:count].astype(np.int64)
            looked *= 8

    def seen(self, user_row: int) -> Array:
        """Return the rows int32 of the items a stored user met in the log, none for row -1.

        Raises RequestError where the bundle does not hold that.
        """
        if self._seen is None:
            problem = "the bundle does not hold the items that users have seen"
            raise invalid_request("skip_seen", True, problem, "export it with export.seen = true")
        return self._seen[user_row] if user_row >= 0 else np.empty(0, dtype=np.int32)

    def allowed(self, wanted: Mapping[str, Any] | None) -> Array | None:
        """Return which items have one of the wanted values in each named field, bool [items].

        None where nothing is wanted. A value that no item has matches nothing. Raises RequestError
        for an unknown field and for a value of another type.
        """
        if wanted is None:
            return None
        if not isinstance(wanted, Mapping):
            check_names(wanted, (), "allowed")
        found: Array | None = None
        for name, values in wanted.items():
            if name not in self.filters:
                raise self._no_filter(name)
            matching = self.filters[name].matching(values)
            found = matching if found is None else found & matching
        return found

    def _no_filter(self, name: Any) -> RequestError:
        is_feature = any(field.name == name for field in self._info.side("item"))
        remedy = f"name '{name}' in export.filters and export again" if is_feature else ""
        return unknown_field(f"allowed.{name}", self.filters, remedy)


class Titles:
    """What items are called, where the bundle tells: a UTF-8 blob and its offsets int64 [n + 1]."""

    def __init__(self, info: BundleInfo, items: int) -> None:
        self._info, self._items = info, items
        self._offsets: Array | None = None
        if not info.holds("items/titles.npy"):
            return
        self._blob = read_array(info.path, "items/titles.npy")
        self._offsets = read_array(info.path, "items/titles_offsets.npy")
        if (
            self._blob.dtype != np.uint8
            or self._blob.ndim != 1
            or self._offsets.dtype != np.dtype("<i8")
            or self._offsets.shape != (items + 1,)
            or self._offsets[0] != 0
            or self._offsets[-1] != self._blob.size
        ):
            raise self._damaged()

    def __getitem__(self, row: int) -> str | None:
        """Return the title of an item's row; None where it has none."""
        return self.of(np.array([row]))[0]

    def of(self, rows: Array) -> list[str | None]:
        """Return the titles of rows, None where one has none; BundleError where it is damaged."""
        if self._offsets is None:
            return [None] * len(rows)
        starts, stops = self._offsets[rows], self._offsets[rows + 1]
        ends = np.concatenate([[0], starts, stops, [len(self._blob)]])
        if (starts > stops).any() or ends.min() < 0 or ends.max() > len(self._blob):
            raise self._damaged()
        text = self._blob.data
        try:
            return [
                str(text[start:stop], "utf-8") or None
                for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
            ]
        except UnicodeDecodeError:
            raise self._damaged() from None

    def _damaged(self) -> BundleError:
        return BundleError(
            f"{self._info.path}/items/titles_offsets.npy: does not fit {self._items} items and "
            "their titles; export the bundle again"
        )


class RowLists:
    """Rows of items in lists, one behind the other: offsets int64 [lists + 1] and rows int32."""

    def __init__(self, info: BundleInfo, offsets: str, rows: str, lists: int, items: int) -> None:
        self._info, self._names, self._items = info, (offsets, rows), items
        if not info.holds(rows):
            raise BundleError(f"{info.path}: '{rows}' is missing from the bundle; export it again")
        self._offsets, self._rows = read_array(info.path, offsets), read_array(info.path, rows)
        if self._rows.dtype != np.dtype("<i4") or self._rows.ndim != 1:
            raise self._damaged(1, f"is {self._rows.dtype} of shape {self._rows.shape}, not int32")
        if (
            self._offsets.dtype != np.dtype("<i8")
            or self._offsets.shape != (lists + 1,)
            or self._offsets[0] != 0
            or self._offsets[-1] != len(self._rows)
        ):
            raise self._damaged(0, f"does not cut {len(self._rows)} rows into {lists} lists")

    def __getitem__(self, place: int) -> Array:
        """Return the rows of one list, int32; BundleError where it holds what is no row."""
        start, stop = self._offsets[place : place + 2].tolist()
        if not 0 <= start <= stop <= len(self._rows):
            raise self._damaged(0, "does not ascend")
        rows = self._rows[start:stop]
        if rows.size and not (rows.min() >= 0 and rows.max() < self._items):
            raise self._damaged(1, f"holds rows that are not among {self._items} items")
        return rows

    def _damaged(self, which: int, what: str) -> BundleError:
        return BundleError(
            f"{self._info.path / self._names[which]}: {what}; export the bundle again"
        )


class Postings:
    """An item feature's values, and which items have each: what `recommend` filters by.

    values: int64 or UTF-8 in fixed-width bytes, sorted, each once; a list of rows for each.
    """

    def __init__(self, info: BundleInfo, field: Field, items: int) -> None:
        self._field, self._items = field, items
        folder = f"{FILTERS}/{field.name}"
        self._values = read_array(info.path, f"{folder}/values.npy")
        kind = "S" if field.dtype == "string" else "i"
        if self._values.ndim != 1 or self._values.dtype.kind != kind:
            raise BundleError(
                f"{info.path}/{folder}/values.npy: is {self._values.dtype} of shape "
                f"{self._values.shape}, feature '{field.name}' is of type {field.dtype}; "
                "export the bundle again"
            )
        names = f"{folder}/offsets.npy", f"{folder}/rows.npy"
        for name in names:
            if not info.holds(name):
                raise BundleError(
                    f"{info.path}: '{name}' is missing from the bundle; export it again"
                )
        self._lists = RowLists(info, *names, len(self._values), items)

    def values(self, count: int | None = None) -> list[str | int]:
        """Return the values that items have, the first ``count`` of them in ascending order."""
        values: list[Any] = self._values[:count].tolist()
        return [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values]

    def matching(self, values: Any) -> Array:
        """Return which items have a wanted value, bool [items]; RequestError for a wrong type."""
        name = f"allowed.{self._field.name}"
        found = np.zeros(self._items, dtype=bool)
        for value in listed(list(values) if isinstance(values, Set) else values, name):
            place = self._place(self._checked(value, name))
            if place >= 0:
                found[self._lists[place]] = True
        return found

    def _checked(self, value: Any, name: str) -> str | int:
        if self._field.dtype == "string":
            if isinstance(value, str):
                return str(value)
        elif isinstance(value, int | np.integer) and not isinstance(value, bool):
            return int(value)
        more = ", ..." if len(self._values) > SHOWN_VALUES else ""
        known = choices(self.values(SHOWN_VALUES))[:-1] + more
        problem = f"must be {WANTED[self._field.dtype]}, not {type(value).__name__}"
        raise invalid_request(name, value, problem, f"known: {known}]")

    def _place(self, value: str | int) -> int:
        """Return a value's place; -1 where no item has it."""
        wanted: Any
        if isinstance(value, str):
            # Fixed-width bytes lose trailing NULs and cut what is longer: neither is stored.
            wanted = value.encode(errors="surrogatepass")
            if len(wanted) > self._values.dtype.itemsize or wanted.endswith(b"\0"):
                return -1
        elif -(2**63) <= value < 2**63:
            wanted = value
        else:
            return -1
        place = int(np.searchsorted(self._values, np.array(wanted, dtype=self._values.dtype)))
        return place if place < len(self._values) and self._values[place] == wanted else -1


def _counts(info: BundleInfo, name: str, items: int) -> Array:
    counts = read_array(info.path, f"items/{name}.npy")
    if counts.shape != (items,) or counts.dtype != np.dtype("<i8"):
        raise BundleError(
            f"{info.path}/items/{name}.npy: is {counts.dtype} of shape {counts.shape}, "
            f"expected int64 of ({items},); export the bundle again"
        )
    return counts
