"""Tests of the size of send buffers; tests/parallel sends rows."""

from __future__ import annotations

import pytest

from hvdrec.embeddings import alltoall
from hvdrec.embeddings.alltoall import padded_rows


def test_send_buffer_keeps_its_size_for_similar_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alltoall, "_capacities", {})
    first = padded_rows("a", 1000)
    assert first >= 1000
    assert {padded_rows("a", count) for count in (990, 1010, 1100, first)} == {first}
    larger = padded_rows("a", first + 1)
    assert larger > first
    assert padded_rows("a", 1000) == larger
    assert padded_rows("a", larger // 3) < larger, "one large batch must not hold memory for good"
