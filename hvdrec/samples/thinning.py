"""Keep a share of the negatives, and divide their weight by this share."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import ibis
from ibis.expr.types import BooleanValue, Table

from hvdrec.config.data_sections import Samples
from hvdrec.samples.clock import clock, is_time

SEPARATOR = "\x1f"
"""Stands between the parts of a hashed text, so that ("a", "bc") and ("ab", "c") differ."""
DIGITS = 8
"""Hexadecimal digits of the hash that are compared."""


def keep_share(table: Table, samples: Samples, labels: Sequence[str], weight: str) -> Table:
    """Keep the share ``samples.negatives.rate`` of the negatives; divide their weight by it.

    Args:
        table: Labelled rows.
        samples: The columns of user, item and time, the rate and the seed.
        labels: Columns of labels. A row in which none of them is 1 is a negative.
        weight: Column of the weight.
    """
    rate = samples.negatives.rate
    if rate == 1:
        return table
    positive = [(table[label] == 1).fill_null(False) for label in labels]
    is_negative = ~functools.reduce(operator.or_, positive)
    changed = table.mutate(
        **{weight: ibis.ifelse(is_negative, table[weight] / rate, table[weight])}
    )
    return changed.filter(~is_negative | _is_drawn(table, samples))


def _is_drawn(table: Table, samples: Samples) -> BooleanValue:
    """Return a condition that is true for the share of rows to keep.

    It is a hash of the contents of a row, so it does not depend on the order of rows.
    """
    texts = [table[samples.user].cast("string"), table[samples.item].cast("string")]
    if samples.time and is_time(table[samples.time]):
        texts.append(clock(table[samples.time], samples.time_unit).cast("string"))
    text = ibis.literal(str(samples.negatives.seed))
    for part in texts:
        text = text + SEPARATOR + part
    threshold = f"{round(samples.negatives.rate * 16**DIGITS):0{DIGITS}x}"
    # A row without a key is kept: a later check refuses it with an error that names the remedy.
    return (text.hexdigest("md5").substr(0, DIGITS) < threshold).fill_null(True)
