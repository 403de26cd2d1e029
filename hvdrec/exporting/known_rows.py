"""Find rows to score that are not later than the data in their user's stored embedding.

The embedding that a bundle stores for a user depends on the log up to some time. If a row to score
is not later than this time, such as a held-out row of an evaluation, the embedding already reflects
the row. The row's score by user key is then better than it would have been online.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.samples.times import comparable_times
from hvdrec.scoring.array_files import read_array, read_vector
from hvdrec.scoring.bundle import BundleInfo

Array = NDArray[Any]
KNOWN_UNTIL = "users/known_until.npy"
REMEDY = (
    "to score held-out rows, give raw user features, or export with --export.users-as-of train "
    "(to score validation rows) or validation (test rows)"
)
TRAINED = "scores of training rows are too good, those of held-out rows are not"
"""Text of a warning if the stored users depend only on the training split."""


def latest_of_each(user: Array, time: Array, users: int) -> Array:
    """Return the time of each user's latest row, float64 [users]; NaN for a user without rows.

    Args:
        user: Index of each row's user, int64 [n].
        time: Time of each row, float64 [n].
        users: Number of users.
    """
    latest = np.full(users, -np.inf)
    np.maximum.at(latest, user, time)
    return np.where(np.isinf(latest), np.nan, latest)


class KnownRows:
    """Counts rows to score that are not later than the data of their user's stored embedding."""

    def __init__(self, info: BundleInfo, source: Path, names: list[str]) -> None:
        """Prepare to check a table with columns `names` that is read from the file `source`."""
        self._info, self._source = info, source
        self._record: Mapping[str, Any] | None = info.manifest["meta"].get("known")
        self._column, self._until = "", np.empty(0)
        self._known = self._unclear = self._rows = 0
        # If the table has raw features of users, the stored embeddings are not used.
        raw = {field.name for field in info.side("user")} - {info.user_key}
        self._uses_keys = not raw & set(names)
        if self._record is not None and info.holds(KNOWN_UNTIL):
            self._keys = read_array(info.path, "users/keys.npy")
            self._until = read_vector(info, KNOWN_UNTIL, "<f8", len(self._keys))
            # Samples call the column "time"; a feature of that name is something else.
            times = [self._record["time"], *({"time"} - {field.name for field in info.fields})]
            self._column = next((name for name in times if name in names), "")

    def count(self, batch: pa.RecordBatch) -> None:
        """Count the rows of a batch that are not later than the data of their user's embedding."""
        self._rows += batch.num_rows
        if not self._uses_keys or not self._column or self._record is None:
            return
        times = comparable_times(batch[self._column])
        if times is None or times[0] != self._record["type"]:
            self._unclear += batch.num_rows
            return
        self._unclear += int(np.isnan(times[1]).sum())
        row = self._stored_rows(batch[self._info.user_key])
        until = np.where(row >= 0, self._until[row], np.nan)
        self._known += int((times[1] <= until).sum())

    def warnings(self) -> list[str]:
        """Return one line if rows were counted, or if it is not known how late the rows are."""
        if not self._uses_keys or not self._rows:
            return []
        if self._record is None:
            problem = "an earlier version wrote it, so it does not say which rows its users know"
            return [f"{self._info.path}: {problem}; export it again to check the rows to score"]
        splits = ", ".join(self._record["users"]["splits"])
        known = f"what the stored users know (splits {splits})"
        if not len(self._until):
            text = f"the samples have no times, so rows to score may be part of {known}"
        elif not self._column:
            column = self._record["time"]
            text = f"has no column '{column}', so rows to score may not be later than {known}"
        elif self._known:
            text = f"{self._known} of {self._rows} rows are not later than {known}"
        elif self._unclear:
            text = (
                f"'{self._column}' is not a {self._record['type']} in {self._unclear} of "
                f"{self._rows} rows, so they may not be later than {known}"
            )
        else:
            return []
        is_trained = len(self._record["users"]["splits"]) == 1
        return [f"{self._source}: {text}; {TRAINED if is_trained else REMEDY}"]

    def _stored_rows(self, keys: pa.Array) -> Array:
        """Return the row of each user key in the bundle; -1 for a user who is not stored."""
        if self._keys.dtype.kind == "S":
            texts = keys.cast(pa.string()).to_pylist()
            wanted: Array = np.array([(text or "").encode() for text in texts], dtype=np.bytes_)
        else:
            wanted = keys.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
        row = np.searchsorted(self._keys, wanted)
        row[row == len(self._keys)] = 0
        if not len(self._keys):
            return np.full(len(wanted), -1)
        return np.where(self._keys[row] == wanted, row, -1)
