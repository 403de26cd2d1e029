"""Configurations in artifacts that an earlier version wrote, with options that no longer exist."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hvdrec.config import from_stored, stored
from hvdrec.errors import UserError

STORED: dict[str, Any] = {
    "name": "small",
    "features": [{"name": "user_id"}, {"name": "item_id", "side": "item"}],
    "train": {"epochs": 3, "old_schedule": "constant"},
    "model": {"tower": {"output": 8, "old_width": 0}},
}


@pytest.fixture(autouse=True)
def retired(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"train.old_schedule": "constant", "model.tower.old_width": 0, "encode.old": True}
    monkeypatch.setattr(stored, "RETIRED", defaults)


def test_a_retired_option_at_its_default_is_dropped() -> None:
    before = copy.deepcopy(STORED)
    config = from_stored(STORED)
    assert (config.train.epochs, config.model.tower.output) == (3, 8)
    assert before == STORED


def test_a_retired_option_in_use_is_refused() -> None:
    raw = {**STORED, "train": {"old_schedule": "linear"}}
    with pytest.raises(UserError) as caught:
        from_stored(raw)
    assert (caught.value.field, caught.value.value) == ("train.old_schedule", "linear")
    assert "no longer exists" in str(caught.value)
    assert "'constant'" in str(caught.value)


def test_other_unknown_keys_are_refused() -> None:
    with pytest.raises(UserError, match="unknown"):
        from_stored({**STORED, "train": {"bogus": 1}})
