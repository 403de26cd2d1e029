"""What answers look like, for the OpenAPI document; the service writes them itself, faster."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ScoreAnswer(BaseModel):
    """A probability for each item, in the order of the request."""

    scores: list[float]
    tasks: dict[str, list[float]] | None = None
    """Of each task, where the request asks for them."""


class RankedItem(BaseModel):
    """A ranked item."""

    item: str | int
    title: str | None
    score: float
    retrieval_score: float
    source: Literal["stored", "features", "trending"]
    tasks: dict[str, float] | None = None
    """The probability of each task, where the request asks for them."""


class RecommendAnswer(BaseModel):
    """Items, best first."""

    items: list[RankedItem]


class KeyAnswer(BaseModel):
    """What users or items are known by."""

    name: str
    dtype: Literal["string", "int"]


class FieldAnswer(BaseModel):
    """A raw feature that a request may give."""

    name: str
    side: Literal["user", "item", "scene"]
    dtype: Literal["string", "int", "float"]
    list: bool
    default: str | int | float | None


class LimitsAnswer(BaseModel):
    """What the service takes on."""

    max_body: int
    max_candidates: int
    max_requests: int
    max_wait: float


class ExamplesAnswer(BaseModel):
    """Keys to try."""

    users: list[str | int]
    items: list[str | int]


class BundleAnswer(BaseModel):
    """The bundle that is served."""

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
    """How the service is."""

    state: str


class ErrorAnswer(BaseModel):
    """Why there is no answer."""

    status: int
    error: str
    """One line."""
    field: str | None
    """The part of the request that it is about: `items`, `scene.hour`."""
