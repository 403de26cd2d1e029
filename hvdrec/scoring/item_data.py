"""Read a bundle's data about items: titles, popularity, filters and the items each user has seen.

All arrays are memory-mapped. Types, shapes and the first and last offset are checked when a bundle
is loaded. The other offsets and the rows are checked at each read, so that a damaged bundle cannot
cause a read outside an array.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from hvdrec.scoring.array_files import (
    Array,
    read_array,
    read_offsets,
    read_vector,
    unexpected_array,
)
from hvdrec.scoring.bundle import BundleInfo, Field
from hvdrec.scoring.errors import (
    BundleError,
    choices,
    invalid_bundle,
    invalid_request,
    type_words,
    unknown_field,
)
from hvdrec.scoring.graph_inputs import DESCRIPTIONS, as_list, check_names

FILTERS = "items/filters"
SHOWN_VALUES = 20
"""Largest number of a filter's values that an error message lists."""


def filter_folder(info: BundleInfo, field: Field) -> str:
    """Return the name of the folder with the filter of an item field."""
    return f"{FILTERS}/{info.filters.get(field.name, field.name)}"


class ItemData:
    """Titles, popularity, trending counts and filters of items, and the items users have seen."""

    def __init__(self, info: BundleInfo, users: int, items: int) -> None:
        """Open the arrays of a bundle that stores ``users`` users and ``items`` items."""
        self._info = info
        self.titles = Titles(info, items)
        self._counts = {
            name: read_vector(info, f"items/{name}.npy", "<i8", items)
            for name in ("popularity", "trending")
            if info.holds(f"items/{name}.npy")
        }
        self.filters = {
            field.name: ItemFilter(info, field, items)
            for field in info.side("item")
            if info.holds(f"{filter_folder(info, field)}/values.npy")
        }
        self._seen: RowLists | None = None
        if info.holds("users/seen_offsets.npy"):
            self._seen = RowLists(
                info, "users/seen_offsets.npy", "users/seen_rows.npy", users, items
            )
        self._orders: dict[str, Array] = {}

    def counts(self, name: str) -> Array:
        """Return the number of positive samples of each item, int64 [items].

        Args:
            name: "popularity" to count the training split, "trending" to count the last days of the
                log. A bundle without trending counts uses popularity instead.
        """
        counts = self._counts.get(name, self._counts.get("popularity"))
        if counts is None:
            return read_vector(self._info, "items/popularity.npy", "<i8")
        return counts

    def order(self, name: str) -> Array:
        """Return all item rows sorted by descending `counts`, int32 [items].

        Items with the same trending count are sorted by popularity, then by row. The first call
        sorts; the result is kept.
        """
        order = self._orders.get(name)
        if order is None:
            keys = [self.counts("popularity")]
            if name == "trending":
                keys.append(self.counts("trending"))
            order = np.lexsort([-count for count in keys]).astype(np.int32)
            # If two threads sort at the same time, they get the same result.
            self._orders[name] = order
        return order

    def first(self, name: str, count: int, excluded: Array, allowed: Array | None) -> Array:
        """Return the items with the largest counts, int64 [at most count].

        Args:
            name: "popularity" or "trending", as in `counts`.
            count: Largest number of rows to return.
            excluded: Rows to leave out; a row may occur more than once.
            allowed: True for each row that may be returned, bool [items]; None to allow all rows.
        """
        order = self.order(name)
        searched = count + len(excluded)
        while True:
            rows = order[:searched]
            if allowed is not None:
                rows = rows[allowed[rows]]
            if excluded.size:
                rows = rows[~np.isin(rows, excluded)]
            if len(rows) >= count or searched >= len(order):
                return rows[:count].astype(np.int64)
            searched *= 8

    def seen(self, user_row: int) -> Array:
        """Return the rows of the items that a user has seen, int32 [n].

        For a user who is not stored, ``user_row`` is -1 and the result is empty. Raises
        RequestError if the bundle was exported without seen items.
        """
        if self._seen is None:
            problem = "the bundle does not hold the items that users have seen"
            raise invalid_request("skip_seen", True, problem, "export it with export.seen = true")
        return self._seen[user_row] if user_row >= 0 else np.empty(0, dtype=np.int32)

    def allowed(self, wanted: Mapping[str, Any] | None) -> Array | None:
        """Return True for each item that passes a request's filters, bool [items].

        ``wanted`` maps fields to lists of values: an item passes if, in every field, it has at
        least one of the listed values. The result is None, which allows all items, if ``wanted`` is
        None or empty. Raises RequestError if a field is unknown or a value has the wrong type.
        """
        if wanted is None:
            return None
        if not isinstance(wanted, Mapping):
            check_names(wanted, (), "allowed")
        allowed: Array | None = None
        for name, values in wanted.items():
            if name not in self.filters:
                is_feature = any(field.name == name for field in self._info.side("item"))
                remedy = f"name '{name}' in export.filters and export again" if is_feature else ""
                raise unknown_field(f"allowed.{name}", self.filters, remedy)
            matching = self.filters[name].matching(values)
            allowed = matching if allowed is None else allowed & matching
        return allowed


class Titles:
    """Titles of items, stored as one UTF-8 text and the offset at which each title begins."""

    def __init__(self, info: BundleInfo, items: int) -> None:
        """Open the titles if the bundle has any."""
        self._path = info.path
        self._offsets: Array | None = None
        if info.holds("items/titles.npy"):
            self._text = read_vector(info, "items/titles.npy", "|u1")
            self._offsets = read_offsets(info, "items/titles_offsets.npy", items, len(self._text))

    def __getitem__(self, rows: Array) -> list[str | None]:
        """Return the titles of item rows, None for an item without one.

        Raises BundleError if the stored offsets or the text are damaged.
        """
        if self._offsets is None:
            return [None] * len(rows)
        starts, stops = self._offsets[rows], self._offsets[rows + 1]
        if (starts < 0).any() or (starts > stops).any() or (stops > len(self._text)).any():
            raise self._damaged()
        text = self._text.data
        try:
            return [
                str(text[start:stop], "utf-8") or None
                for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
            ]
        except UnicodeDecodeError:
            raise self._damaged() from None

    def _damaged(self) -> BundleError:
        problem = "does not divide items/titles.npy into titles"
        return invalid_bundle(self._path / "items/titles_offsets.npy", problem)


class RowLists:
    """Lists of item rows, stored as one concatenated array and the offset of each list in it."""

    def __init__(self, info: BundleInfo, offsets: str, rows: str, lists: int, items: int) -> None:
        """Open lists of item rows.

        Args:
            info: The bundle.
            offsets: File name of the offsets, int64 [lists + 1].
            rows: File name of the concatenated rows, int32.
            lists: Number of lists.
            items: Number of items; every row must be smaller than this.
        """
        self._offsets_file, self._rows_file, self._items = (
            info.path / offsets,
            info.path / rows,
            items,
        )
        self._rows = read_vector(info, rows, "<i4")
        self._offsets = read_offsets(info, offsets, lists, len(self._rows))

    def __getitem__(self, index: int) -> Array:
        """Return the rows of one list, int32 [n]; raise BundleError if the list is damaged."""
        start, stop = self._offsets[index : index + 2].tolist()
        if not 0 <= start <= stop <= len(self._rows):
            raise invalid_bundle(self._offsets_file, "does not ascend")
        rows = self._rows[start:stop]
        if rows.size and not (rows.min() >= 0 and rows.max() < self._items):
            raise invalid_bundle(self._rows_file, f"holds rows outside of {self._items} items")
        return rows


class ItemFilter:
    """The distinct values of an item feature, and for each value the items that have it."""

    def __init__(self, info: BundleInfo, field: Field, items: int) -> None:
        """Open the filter of one field; the values are stored as int64 or fixed-width UTF-8."""
        self._field, self._items = field, items
        name = filter_folder(info, field)
        self._values = read_array(info.path, f"{name}/values.npy")
        kind = "S" if field.dtype == "string" else "i"
        if self._values.ndim != 1 or self._values.dtype.kind != kind:
            expected = f"one dimension of values of feature '{field.name}' of type {field.dtype}"
            raise unexpected_array(info, f"{name}/values.npy", self._values, expected)
        self._lists = RowLists(
            info, f"{name}/offsets.npy", f"{name}/rows.npy", len(self._values), items
        )

    def values(self, count: int | None = None) -> list[str | int]:
        """Return the ``count`` smallest values in ascending order; all values if it is None."""
        values: list[Any] = self._values[:count].tolist()
        return [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values]

    def matching(self, values: Any) -> Array:
        """Return True for each item that has one of the values, bool [items]."""
        name = f"allowed.{self._field.name}"
        matching = np.zeros(self._items, dtype=bool)
        for value in as_list(list(values) if isinstance(values, Set) else values, name):
            index = self._index(self._checked(value, name))
            if index >= 0:
                matching[self._lists[index]] = True
        return matching

    def _checked(self, value: Any, name: str) -> str | int:
        if self._field.dtype == "string":
            if isinstance(value, str):
                return str(value)
        elif isinstance(value, int | np.integer) and not isinstance(value, bool):
            return int(value)
        known: list[Any] = self.values(SHOWN_VALUES)
        if len(self._values) > SHOWN_VALUES:
            known.append("...")
        problem = f"must be {DESCRIPTIONS[self._field.dtype]}, not {type_words(value)}"
        raise invalid_request(name, value, problem, f"known: {choices(known)}")

    def _index(self, value: str | int) -> int:
        """Return the index of a value by binary search; -1 if no item has it."""
        stored: Any = value
        if isinstance(value, str):
            # numpy drops trailing NULs and cuts text that is too wide. Such text is never stored,
            # but the text that numpy makes of it could equal a stored value.
            stored = value.encode(errors="surrogatepass")
            if len(stored) > self._values.dtype.itemsize or stored.endswith(b"\0"):
                return -1
        elif not -(2**63) <= value < 2**63:
            return -1
        index = int(np.searchsorted(self._values, np.array(stored, dtype=self._values.dtype)))
        return index if index < len(self._values) and self._values[index] == stored else -1
