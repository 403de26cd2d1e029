"""How much room rows are sent from; tests/parallel sends some."""

from __future__ import annotations

import pytest

from hvdrec.embeddings import alltoall


def test_room_stays_while_the_number_of_rows_changes_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alltoall, "_rooms", {})
    first = alltoall._room("a", 1000)
    assert first >= 1000
    assert {alltoall._room("a", count) for count in (990, 1010, 1100, first)} == {first}
    more = alltoall._room("a", first + 1)
    assert more > first
    assert alltoall._room("a", 1000) == more
    assert alltoall._room("a", more // 3) < more, "one large batch does not hold memory for good"
