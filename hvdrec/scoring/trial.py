"""Try a newly loaded bundle before it takes over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvdrec.scoring.candidates import Key
from hvdrec.scoring.errors import invalid_bundle, shown

if TYPE_CHECKING:
    from hvdrec.scoring.scorer import Scorer


def try_scorer(scorer: Scorer) -> None:
    """Run every graph and retrieval once.

    Raises:
        BundleError: An output has the wrong shape or is not finite.
    """
    scorer.warm()
    info = scorer.info
    keys: list[Key | None] = [None]
    for user in (None, *scorer.some_users(1)):
        keys += [each.item for each in scorer.recommend(user, k=1)]
    task_scores = scorer.score_tasks(None, keys) if info.tasks else {}
    outputs = (
        ("user_tower.onnx", scorer.embed_user(None), (info.user_width,)),
        ("item_tower.onnx", scorer.embed_items(keys), (len(keys), info.item_width)),
        ("ranker.onnx", scorer.score(None, keys), (len(keys),)),
        *(("ranker.onnx", scores, (len(keys),)) for scores in task_scores.values()),
    )
    for name, output, shape in outputs:
        if output.shape != shape or not np.isfinite(output).all():
            problem = f"returns {shown(output.tolist())} for missing values, expected finite "
            raise invalid_bundle(info.path / name, f"{problem}numbers of shape {shape}")
