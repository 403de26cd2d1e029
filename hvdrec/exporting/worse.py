"""Before export, compare a model with simple baselines; export a worse model only on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdrec.config import Config
from hvdrec.errors import invalid_file
from hvdrec.evaluation.evaluate import retrieval_worse_than_popularity
from hvdrec.evaluation.popularity import popularity_by_event
from hvdrec.evaluation.references import describe_worse
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks
from hvdrec.storage.parquet import parquet_files, read_metadata
from hvdrec.training.pointers import Checkpoint

NOT_RECORDED = (
    "the checkpoint does not record how it compares with simple baselines; hvdrec evaluate "
    "--split validation does"
)
MIN_ROWS = 200
"""With fewer validation rows, a difference may well be chance. Then it is reported, and the export
continues."""


def compare_with_baselines(
    config: Config,
    model: Recommender,
    checkpoint: Checkpoint,
    *,
    allow_worse: bool,
    notify: Callable[[str], None],
) -> list[dict[str, Any]] | None:
    """Return the baselines that are better than a checkpoint on the validation split.

    Args:
        config: Configuration of the run.
        model: The model of the checkpoint, with its tables.
        checkpoint: The checkpoint, in which training recorded a comparison.
        allow_worse: True to report better baselines instead of raising an error.
        notify: Called with a line of text for the user.

    Returns:
        The result of `references.worse_than`; None if the checkpoint has no recorded comparison.

    Raises:
        UserError: A baseline is better on at least MIN_ROWS rows, and `allow_worse` is False.
    """
    recorded = checkpoint.metrics.get("worse_than")
    if recorded is None:
        notify(NOT_RECORDED)
    worse = list(recorded or [])
    if config.train.objective != "ranking" and "events" not in checkpoint.metrics:
        worse = _with_retrieval(config, model, worse, notify)
    if not worse:
        return None if recorded is None else []
    problem = f"is worse on the validation split than {describe_worse(worse)}"
    files = parquet_files(config.paths.of("features") / "validation")
    rows = sum(read_metadata(file).num_rows for file in files)
    if rows < MIN_ROWS:
        problem += f"; its {rows} rows are too few to refuse the export"
    elif not allow_worse:
        remedy = "train a better model, or pass --allow-worse to export this one"
        raise invalid_file(checkpoint.directory, problem, remedy)
    notify(f"{checkpoint.name} {problem}")
    return worse


def _with_retrieval(
    config: Config,
    model: Recommender,
    recorded: list[dict[str, Any]],
    notify: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return the recorded baselines, with popularity compared by event where this is possible.

    Training records popularity by one list per user if it cannot read events, and not at all for
    the objective ``joint`` without a retrieval metric.
    """
    with ranks.single_rank():
        by_event, reason = popularity_by_event(config)
    if reason:
        notify(reason)
    if by_event is None and config.train.objective == "retrieval":
        return recorded
    notify("comparing retrieval with popularity")
    others = [each for each in recorded if each["baseline"] != "popularity"]
    return others + retrieval_worse_than_popularity(model, config, by_event)
