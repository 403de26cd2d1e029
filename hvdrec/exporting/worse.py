"""A model that is worse than simple baselines is exported only on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdrec.config import Config
from hvdrec.errors import invalid_file
from hvdrec.evaluation.evaluate import retrieval_worse_than_popularity
from hvdrec.evaluation.references import describe_worse
from hvdrec.models.recommender import Recommender
from hvdrec.training.pointers import Checkpoint

NOT_RECORDED = (
    "the checkpoint does not record how it compares with simple baselines; hvdrec evaluate "
    "--split validation does"
)


def compare_with_baselines(
    config: Config,
    model: Recommender,
    checkpoint: Checkpoint,
    *,
    allow_worse: bool,
    notify: Callable[[str], None],
) -> list[dict[str, Any]] | None:
    """Return the baselines that a checkpoint does not reach on the validation split.

    Args:
        config: The run.
        model: The checkpoint's model, with its tables.
        checkpoint: The checkpoint, which records the comparison that training made.
        allow_worse: Report baselines that are better, instead of refusing.
        notify: Called with a line for the user.

    Returns:
        Entries of `references.worse_than`; None if the checkpoint records none.

    Raises:
        UserError: A baseline is better, and `allow_worse` is False.
    """
    recorded = checkpoint.metrics.get("worse_than")
    if recorded is None:
        notify(NOT_RECORDED)
    worse = list(recorded or [])
    if config.train.objective == "joint":
        notify("comparing retrieval with popularity")
        worse += retrieval_worse_than_popularity(model, config)
    if not worse:
        return recorded
    problem = f"is worse on the validation split than {describe_worse(worse)}"
    if not allow_worse:
        remedy = "train a better model, or pass --allow-worse to export this one"
        raise invalid_file(checkpoint.directory, problem, remedy)
    notify(f"{checkpoint.name} {problem}")
    return worse
