"""Process settings for training."""

from __future__ import annotations

import gc

from hvdrec.training.machine import no_gc_pauses


def test_objects_are_frozen_out_of_gc_only_within_the_block() -> None:
    assert gc.get_freeze_count() == 0
    try:
        with no_gc_pauses():
            assert gc.get_freeze_count() > 0
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert gc.get_freeze_count() == 0
