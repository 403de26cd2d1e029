"""What is set for the process that trains."""

from __future__ import annotations

import gc

from hvdrec.training.machine import collector_spared


def test_the_collector_passes_over_what_is_there_only_while_it_is_spared() -> None:
    assert gc.get_freeze_count() == 0
    try:
        with collector_spared():
            assert gc.get_freeze_count() > 0
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert gc.get_freeze_count() == 0
