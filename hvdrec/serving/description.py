"""Describe a bundle: the response of ``/v1/bundle`` and the request schemas for OpenAPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.json_schema import models_json_schema
from typing_extensions import TypeAliasType

from hvdrec.scoring import BundleError, Scorer
from hvdrec.scoring.array_files import read_array
from hvdrec.scoring.bundle import Field as RawField
from hvdrec.scoring.item_data import filter_folder
from hvdrec.serving.answers import BundleAnswer
from hvdrec.serving.bodies import RecommendBody, ScoreBody
from hvdrec.serving.options import Options

EXAMPLES = 5
LARGEST_NUMBER = 1e30
"""Larger numbers are refused: the model computes in float32, where they may become infinite."""
TYPES: Mapping[str, Any] = {
    "string": str,
    "int": Annotated[int, Field(ge=-(2**63), le=2**63 - 1)],
    "float": Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)],
}
list_of: Any = list
"""`list`, for element types that are only known at run time: mypy would refuse `list[variable]`."""
EXAMPLE_VALUES: Mapping[str, Any] = {"string": "a", "int": 1, "float": 1.0}

Json = dict[str, Any]


def describe(scorer: Scorer, options: Options) -> BundleAnswer:
    """Describe the bundle of a scorer and the limits of the service."""
    info = scorer.info
    items = info.side("item")
    values: Json = {
        "name": info.name,
        "version": scorer.version,
        "model": scorer.model,
        "users": scorer.users,
        "items": scorer.items,
        "user_key": {"name": info.user_key, "dtype": scorer.key_dtype("user")},
        "item_key": {"name": info.item_key, "dtype": scorer.key_dtype("item")},
        "fields": [{**vars(field), "list": field.is_list} for field in info.fields],
        "filters": sorted(
            f.name for f in items if info.holds(f"{filter_folder(info, f)}/values.npy")
        ),
        "tasks": info.tasks,
        "metrics": info.manifest["meta"].get("metrics", {}),
        "limits": vars(options),
        "examples": {
            "users": _first_users(scorer),
            "items": [item.item for item in scorer.recommend(None, k=EXAMPLES)],
        },
    }
    return BundleAnswer.model_validate(values)


def add_requests(document: Json, scorer: Scorer, bundle: BundleAnswer) -> None:
    """Add the schemas and examples of requests for this bundle to an OpenAPI document, in place."""
    models = _request_models(scorer, bundle)
    _, schemas = models_json_schema(
        [(model, "validation") for model in models.values()],
        ref_template="#/components/schemas/{model}",
    )
    document["components"]["schemas"] |= schemas["$defs"]
    scene = {f.name: _example(f, bundle) for f in _features(scorer, "scene")}
    requests: dict[str, Json] = {
        "/v1/score": {"items": bundle.examples.items, "scene": scene},
        "/v1/recommend": {"scene": scene, "k": EXAMPLES},
    }
    users: Json = {"features": {f.name: _example(f, bundle) for f in _features(scorer, "user")}}
    if bundle.examples.users:
        users = {"stored": bundle.examples.users[0], **users}
    for path, model in models.items():
        examples = {
            name: {"value": {"user": user, **requests[path]}} for name, user in users.items()
        }
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        content = {"application/json": {"schema": schema, "examples": examples}}
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}


def _request_models(scorer: Scorer, bundle: BundleAnswer) -> dict[str, type[BaseModel]]:
    """Build a pydantic model of each route's body, with the bundle's keys and raw features."""
    info, most = scorer.info, bundle.limits.max_candidates
    user_key: Any = TypeAliasType("UserKey", TYPES[bundle.user_key.dtype])
    item_key: Any = TypeAliasType("ItemKey", TYPES[bundle.item_key.dtype])
    user = _features_model("User", info.side("user"), {info.user_key: user_key | None})
    item = _features_model("Item", info.side("item"), {info.item_key: item_key | None})
    scene = _features_model("Scene", info.side("scene"), {})
    dtypes = {field.name: field.dtype for field in info.side("item")}
    filters = {name: (list_of[TYPES[dtypes[name]]], _omitted(name)) for name in bundle.filters}
    allowed = _model("Allowed", filters)
    tasks: Any = (bool, _like(RecommendBody, "tasks"))
    if not info.tasks:
        no_tasks = Field(default=False, description="This bundle has no tasks.")
        tasks = (Literal[False], no_tasks)
    common: Json = {
        "user": (user_key | user | None, _like(RecommendBody, "user")),
        "scene": (scene | None, _like(RecommendBody, "scene")),
        "tasks": tasks,
    }
    candidates = _like(RecommendBody, "candidates", ge=1, le=most, default=min(500, most))
    return {
        "/v1/score": create_model(
            "ScoreRequest",
            __base__=ScoreBody,
            items=(list_of[item_key | item | None], _like(ScoreBody, "items", max_length=most)),
            **common,
        ),
        "/v1/recommend": create_model(
            "RecommendRequest",
            __base__=RecommendBody,
            k=(int, _like(RecommendBody, "k", ge=1, le=most)),
            candidates=(int, candidates),
            exclude=(list_of[item_key | None], _like(RecommendBody, "exclude")),
            allowed=(allowed | None, _like(RecommendBody, "allowed")),
            **common,
        ),
    }


def _like(model: type[BaseModel], name: str, **changes: Any) -> Any:
    """Declare a field with the default and description of field ``name`` of a model."""
    field = model.model_fields[name]
    return Field(**{"default": field.default, "description": field.description, **changes})


def _features_model(name: str, fields: Sequence[RawField], key: Json) -> Any:
    """Build the pydantic model of raw features. Each may be omitted; null is a missing value."""
    types = {field: (value, _omitted(field)) for field, value in key.items()}
    for field in fields:
        value = TYPES[field.dtype] | None
        if field.is_list:
            value = list_of[value] | None
        default = _omitted(field.name)
        if field.default is not None:
            default = Field(default=field.default, alias=field.name)
        types[field.name] = (value, default)
    return _model(name, types)


def _omitted(name: str) -> Any:
    """Declare an optional field that has no default in the schema."""
    return Field(default_factory=lambda: None, alias=name)


def _model(name: str, types: Json) -> Any:
    # Use aliases, because the name of a feature may not be a valid name for a pydantic field.
    aliased = {f"field_{number}": each for number, each in enumerate(types.values())}
    return create_model(name, __config__=ConfigDict(extra="forbid"), **aliased)


def _features(scorer: Scorer, side: str) -> list[RawField]:
    return [field for field in scorer.info.side(side) if field.name != scorer.info.user_key]


def _example(field: RawField, bundle: BundleAnswer) -> Any:
    """Return a value of a raw feature to show in an example request."""
    if field.default is not None:
        return field.default
    if not field.is_list:
        return EXAMPLE_VALUES[field.dtype]
    has_items = field.pads_left and field.dtype == bundle.item_key.dtype
    return bundle.examples.items[:2] if has_items else [EXAMPLE_VALUES[field.dtype]]


def _first_users(scorer: Scorer) -> list[str | int]:
    """Read a few user keys for examples; empty if another bundle has replaced the files."""
    try:
        keys = read_array(scorer.info.path, "users/keys.npy")[:EXAMPLES].tolist()
    except BundleError:
        return []
    return [key.decode() if isinstance(key, bytes) else key for key in keys]
