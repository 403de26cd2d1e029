"""Decide whether a finished run continues when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hvdrec.config.sections import Train
from hvdrec.training.checkpoint import Position


def continued(
    position: Position, before: Mapping[str, Any], now: Train
) -> tuple[Position, str | None]:
    """Return the position at which a resumed run continues.

    A finished run continues if ``train.epochs`` is now larger than the number of epochs that it has
    trained. If it stopped early, ``train.patience`` must also be larger than the number of
    validations without improvement.

    Args:
        position: Position of the latest checkpoint.
        before: ``[train]`` section of that checkpoint, as plain values.
        now: The ``[train]`` section with all defaults filled in.

    Returns:
        The position, and a line to show to the user, which is None if the run was not finished.
    """
    if not position.finished:
        return position, None
    done, stale = position.epoch, position.stale
    if done >= now.epochs:
        return position, (
            f"this run has trained {done} of {now.epochs} epochs; raise train.epochs to train on"
        )
    if stale >= now.patience:
        return position, (
            f"this run stopped early after {done} epochs: {stale} validations brought no "
            f"improvement; set train.patience above {stale} to train on"
        )
    if done < before["epochs"] and stale < before["patience"]:
        return position, f"this run was stopped after {done} epochs by its caller, such as a search"
    return replace(position, finished=False), (
        f"training on from epoch {done} to {now.epochs}; the learning rate follows "
        f"train.schedule = '{now.schedule}' over {now.epochs} epochs"
    )
