"""What a scoring thread does for a request: from the bytes of its body to those of its answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson

from hvdrec.scoring import BundleError, Recommendation, RequestError, Scorer, StoreError
from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.errors import shown
from hvdrec.serving.bodies import (
    RecommendBody,
    ScoreBody,
    checked,
    field_of,
    from_json,
    with_integers,
)
from hvdrec.serving.description import LARGEST_NUMBER
from hvdrec.serving.problems import Problem, unavailable

LOG = logging.getLogger("hvdrec.serving")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's body, and the number of items that it is about."""

    content: bytes
    items: int


def score(scorer: Scorer, body: bytes, max_candidates: int) -> Answer:
    """Answer `/v1/score`; raises Problem."""
    return _answered(_score, scorer, body, max_candidates)


def recommend(scorer: Scorer, body: bytes, max_candidates: int) -> Answer:
    """Answer `/v1/recommend`; raises Problem."""
    return _answered(_recommend, scorer, body, max_candidates)


def _answered(
    answer: Callable[[Scorer, Any, int], Answer], scorer: Scorer, body: bytes, max_candidates: int
) -> Answer:
    values = from_json(body)
    try:
        try:
            return answer(scorer, values, max_candidates)
        except Problem as problem:
            if problem.status != 422:
                raise
        # Whether an integer was written as 3.0 is only asked once something is refused.
        return answer(scorer, with_integers(values), max_candidates)
    except RecursionError:
        raise Problem(422, "body: is nested too deeply", "body") from None


def _score(scorer: Scorer, values: Any, max_candidates: int) -> Answer:
    asked = checked(ScoreBody, values, max_candidates)
    check_numbers(scorer.info, "user", [asked.user])
    check_numbers(scorer.info, "scene", [asked.scene])
    check_numbers(scorer.info, "item", asked.items)
    request = asked.user, asked.items, asked.scene
    answer: dict[str, Any] = {}
    if asked.tasks:
        answer["tasks"] = _scored(scorer, "items", lambda: scorer.score_tasks(*request))
        scores = answer["tasks"].pop("score")
    else:
        scores = _scored(scorer, "items", lambda: scorer.score(*request))
    if not np.isfinite(scores).all():
        raise Problem(422, "the score is not finite; check the numbers among the features")
    answer = {"scores": scores, **answer}
    return Answer(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), len(scores))


def _recommend(scorer: Scorer, values: Any, max_candidates: int) -> Answer:
    asked = checked(RecommendBody, values, max_candidates)
    for name, wanted in (asked.allowed or {}).items():
        for value in wanted:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                text = f"allowed.{name} = {shown(value)}: does not fit 64 bits"
                raise Problem(422, text, f"allowed.{name}")
    check_numbers(scorer.info, "user", [asked.user])
    check_numbers(scorer.info, "scene", [asked.scene])
    items = _scored(
        scorer,
        "exclude",
        lambda: scorer.recommend(
            asked.user,
            asked.scene,
            asked.k,
            candidates=asked.candidates,
            exclude=asked.exclude,
            allowed=asked.allowed,
            skip_seen=asked.skip_seen,
            diversity=asked.diversity,
        ),
    )
    if not np.isfinite([(item.score, item.retrieval_score) for item in items]).all():
        raise Problem(422, "the score is not finite; check the numbers among the features")
    if asked.tasks:
        items = _with_tasks(scorer, asked, items)
    return Answer(orjson.dumps({"items": items}), len(items))


def _with_tasks(
    scorer: Scorer, asked: RecommendBody, items: list[Recommendation]
) -> list[dict[str, Any]]:
    """Return recommendations with each task's probability; those few are scored once more."""
    keys = [item.item for item in items]
    by_task = _scored(scorer, "exclude", lambda: scorer.score_tasks(asked.user, keys, asked.scene))
    columns = [by_task[task].tolist() for task in scorer.tasks]
    return [
        {**asdict(item), "tasks": dict(zip(scorer.tasks, values, strict=True))}
        for item, *values in zip(items, *columns, strict=True)
    ]


def check_numbers(info: BundleInfo, side: str, entries: list[Any]) -> None:
    """Raise Problem for a number of which float32 would make an infinite one."""
    fields = [field for field in info.side(side) if field.dtype == "float"]
    if not fields:
        return
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        for field in fields:
            value = entry.get(field.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and abs(number) > LARGEST_NUMBER:
                    raise Problem(
                        422,
                        f"{field.name} = {shown(number)}: must be within {LARGEST_NUMBER:g} of 0",
                        f"{'items' if side == 'item' else side}.{field.name}",
                    )


def _scored(scorer: Scorer, items: str, call: Callable[[], Any]) -> Any:
    """Return what the scorer answers; Problem where it raises."""
    try:
        return call()
    except RequestError as error:
        raise Problem(422, str(error), field_of(str(error), scorer.info, items)) from None
    except StoreError as error:
        raise unavailable(str(error)) from None
    except BundleError as error:  # a large tower opens late, and may be gone by then
        LOG.error("%s", error)
        raise unavailable("the bundle cannot be read") from None
