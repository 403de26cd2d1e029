"""The work of a scoring thread: parse the body of a request, score, write the response's body."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import orjson

from hvdrec.scoring import BundleError, Recommendation, RequestError, Scorer, StoreError
from hvdrec.scoring.bundle import BundleInfo
from hvdrec.serving.bodies import RecommendBody, ScoreBody, from_json, parse_body, with_integers
from hvdrec.serving.description import LARGEST_NUMBER
from hvdrec.serving.problems import Problem, invalid_field, unavailable

LOG = logging.getLogger("hvdrec.serving")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The JSON body of a response, and the number of items scored or returned."""

    content: bytes
    items: int


Route = Callable[[Scorer, Any, int], Answer]


def answer(route: Route, scorer: Scorer, body: bytes, max_candidates: int) -> Answer:
    """Answer a request for at most ``max_candidates`` items; raise Problem if it is not valid."""
    values = from_json(body)
    try:
        try:
            return route(scorer, values, max_candidates)
        except Problem as problem:
            if problem.status != 422:
                raise
        # Converting floats to integers takes time, so do it only if the body was refused.
        return route(scorer, with_integers(values), max_candidates)
    except RecursionError:
        raise Problem(422, "body: is nested too deeply", "body") from None


def score(scorer: Scorer, values: Any, max_candidates: int) -> Answer:
    """Answer ``/v1/score`` for the values of a JSON body; raise Problem if they are not valid."""
    body = parse_body(ScoreBody, values, max_candidates)
    check_numbers(scorer.info, "user", [body.user])
    check_numbers(scorer.info, "scene", [body.scene])
    check_numbers(scorer.info, "item", body.items)
    request = body.user, body.items, body.scene
    if body.tasks:
        by_task = _scored(lambda: scorer.score_tasks(*request))
        scores = by_task.pop("score")
        content: dict[str, Any] = {"scores": scores, "tasks": by_task}
    else:
        scores = _scored(lambda: scorer.score(*request))
        content = {"scores": scores}
    _check_finite(scores)
    return Answer(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), len(scores))


def recommend(scorer: Scorer, values: Any, max_candidates: int) -> Answer:
    """Answer ``/v1/recommend`` for the values of a JSON body; raise Problem if they are invalid."""
    body = parse_body(RecommendBody, values, max_candidates)
    for name, accepted in (body.allowed or {}).items():
        for value in accepted:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise invalid_field(f"allowed.{name}", value, "does not fit 64 bits")
    check_numbers(scorer.info, "user", [body.user])
    check_numbers(scorer.info, "scene", [body.scene])
    items = _scored(
        lambda: scorer.recommend(
            body.user,
            body.scene,
            body.k,
            # A given value has been checked, so only the default can exceed the limit.
            candidates=min(body.candidates, max_candidates),
            exclude=body.exclude,
            allowed=body.allowed,
            skip_seen=body.skip_seen,
            diversity=body.diversity,
        ),
    )
    _check_finite([(item.score, item.retrieval_score) for item in items])
    ranked = _with_tasks(scorer, body, items) if body.tasks else items
    return Answer(orjson.dumps({"items": ranked}), len(items))


def _with_tasks(
    scorer: Scorer, body: RecommendBody, items: list[Recommendation]
) -> list[dict[str, Any]]:
    """Add the probability of each task to recommended items; this scores the items again."""
    keys = [item.item for item in items]
    by_task = _scored(lambda: scorer.score_tasks(body.user, keys, body.scene))
    columns = [by_task[task].tolist() for task in scorer.tasks]
    return [
        {**asdict(item), "tasks": dict(zip(scorer.tasks, values, strict=True))}
        for item, *values in zip(items, *columns, strict=True)
    ]


def check_numbers(info: BundleInfo, side: str, entries: list[Any]) -> None:
    """Raise Problem if a number among the raw features of one ``side`` is too large for float32."""
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
                    problem = f"must be within {LARGEST_NUMBER:g} of 0"
                    raise invalid_field(field.path, number, problem)


def _check_finite(scores: Any) -> None:
    if not np.isfinite(scores).all():
        raise Problem(422, "the score is not finite; check the numbers among the features")


def _scored(call: Callable[[], T]) -> T:
    """Call the scorer and convert its errors to Problem."""
    try:
        return call()
    except RequestError as error:
        if error.problem:
            raise invalid_field(error.field, error.value, error.problem) from None
        raise Problem(422, str(error), error.field or None) from None
    except StoreError as error:
        raise unavailable(str(error)) from None
    except BundleError as error:  # a large tower is opened on first use; its file may be gone
        LOG.error("%s", error)
        raise unavailable("the bundle cannot be read") from None
