"""Evaluate a trained run: load a checkpoint, then measure the model and the baselines.

This module is in `training` because it loads checkpoints. `evaluation` computes the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdrec.config import with_fields
from hvdrec.config.structure import to_dict
from hvdrec.errors import invalid_value
from hvdrec.evaluation.evaluate import measure_model
from hvdrec.evaluation.item_item import LARGEST_CATALOGUE
from hvdrec.evaluation.result import EvaluationResult, Split
from hvdrec.parallel import checks, ranks
from hvdrec.parallel.watchdog import watched
from hvdrec.training.checkpoint import load_model, load_model_and_tables, read_config
from hvdrec.training.machine import pick_device, set_threads
from hvdrec.training.pointers import Which

__all__ = ["EvaluationResult", "evaluate"]


def evaluate(
    run: Path | str,
    *,
    split: Split = "test",
    checkpoint: Which = "best",
    baselines: bool = True,
    ease_items: int = LARGEST_CATALOGUE,
    overrides: Mapping[str, Any] | None = None,
) -> EvaluationResult:
    """Measure a checkpoint of a run on a split, and the baselines on the same rows.

    Call it in one process, or on every rank of a Horovod job. The ranks then share the work and all
    return the same result.

    Args:
        run: Directory of the run.
        split: The split to measure on.
        checkpoint: "best" for the checkpoint with the best validation metric, or "latest".
        baselines: True to measure popularity, means, co-occurrence and EASE, too.
        ease_items: Largest number of items for which EASE is fitted; 0 to skip it.
        overrides: New values of fields of ``[evaluate]``, such as ``{"evaluate.seen": "shown"}``.

    Raises:
        UserError: The run or its features cannot be read, or they differ between hosts.
    """
    if ease_items < 0:
        raise invalid_value("ease_items", ease_items, "must not be negative", "0 leaves EASE out")
    for name, value in (overrides or {}).items():
        if not name.startswith("evaluate."):
            raise invalid_value(name, value, "cannot change after training", "[evaluate] can")
    world = ranks.init()
    with watched():
        run = Path(run)
        config = ranks.run_on_all(lambda: with_fields(read_config(run), overrides or {}))
        checks.require_same_config(to_dict(config))
        checks.require_same_files(
            config.paths.of("features"), "evaluate the same features everywhere"
        )
        set_threads(config.train.threads, world)
        device = ranks.run_on_all(lambda: pick_device(config.train.device, world))
        fetch_rows = None
        if world.size == 1:
            model, loaded = load_model(run, config, checkpoint)
            model.to(device)
        else:
            model, tables, loaded = load_model_and_tables(run, config, checkpoint, device)
            checks.require_same_files(loaded.directory, "evaluate the same run everywhere")
            fetch_rows = tables.fetch_rows
        measured = measure_model(
            model,
            config,
            split,
            with_baselines=baselines,
            ease_items=ease_items,
            fetch_rows=fetch_rows,
        )
    return EvaluationResult(run=str(run), checkpoint=loaded.name, **measured.report)
