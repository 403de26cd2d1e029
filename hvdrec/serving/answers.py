"""Pydantic models that describe the responses in the OpenAPI document. The service writes its JSON
without these models, which is faster.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ScoreAnswer(BaseModel):
    """The probability of each item, in the order of the request; on request also of each task."""

    scores: list[float]
    tasks: dict[str, list[float]] | None = None


class RankedItem(BaseModel):
    """A recommended item; on request with the probability of each task."""

    item: str | int
    title: str | None
    score: float
    retrieval_score: float
    source: Literal["stored", "features", "trending"]
    tasks: dict[str, float] | None = None


class RecommendAnswer(BaseModel):
    """Recommended items, best first."""

    items: list[RankedItem]


class KeyAnswer(BaseModel):
    """Name and type of the key that identifies users, or items."""

    name: str
    dtype: Literal["string", "int"]


class FieldAnswer(BaseModel):
    """A raw feature that a request may contain."""

    name: str
    side: Literal["user", "item", "scene"]
    dtype: Literal["string", "int", "float"]
    list: bool
    default: str | int | float | None


class LimitsAnswer(BaseModel):
    """Limits of the service."""

    max_body: int
    max_candidates: int
    max_requests: int
    max_wait: float


class ExamplesAnswer(BaseModel):
    """Keys that are stored in the bundle, for use in examples."""

    users: list[str | int]
    items: list[str | int]


class BundleAnswer(BaseModel):
    """The bundle that the service uses."""

    name: str
    version: str
    model: str
    users: int
    items: int
    user_key: KeyAnswer
    item_key: KeyAnswer
    fields: list[FieldAnswer]
    filters: list[str]
    tasks: list[str]
    metrics: dict[str, Any]
    limits: LimitsAnswer
    examples: ExamplesAnswer


class StateAnswer(BaseModel):
    """State of the service, for health checks."""

    state: str


class ErrorAnswer(BaseModel):
    """An error: a message of one line, and the field at fault, such as ``scene.hour``."""

    status: int
    error: str
    field: str | None
