"""What a service tells about its bundle: in `/v1/bundle`, and as its OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hvdrec.scoring import BundleError, Scorer
from hvdrec.scoring.bundle import Field, read_array
from hvdrec.serving.options import Options

EXAMPLES = 5
LARGEST_NUMBER = 1e30
"""Above, what a model makes of a number in float32 would soon be infinite."""

Json = dict[str, Any]
OF_DTYPE: Mapping[str, Json] = {
    "string": {"type": "string"},
    "int": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "float": {"type": "number", "minimum": -LARGEST_NUMBER, "maximum": LARGEST_NUMBER},
}
OF_EXAMPLE: Mapping[str, Any] = {"string": "a", "int": 1, "float": 1.0}
FILTER = re.compile(r"items/filters/(.+)/values\.npy")


class Description:
    """A bundle in a service's words."""

    def __init__(self, scorer: Scorer, options: Options) -> None:
        self._options = options
        self._info = info = scorer.info
        self._keys = {side: OF_DTYPE[scorer.key_dtype(side)] for side in ("user", "item")}
        self._users = _first_keys(scorer)
        self._items = [found.item for found in scorer.recommend(None, k=EXAMPLES)]
        names = (FILTER.fullmatch(name) for name in info.manifest["files"])
        self._filters = sorted(name[1] for name in names if name)
        self.bundle: Json = {
            "name": info.name,
            "version": scorer.version,
            "model": scorer.model,
            "users": scorer.users,
            "items": scorer.items,
            "user_key": {"name": info.user_key, "dtype": scorer.key_dtype("user")},
            "item_key": {"name": info.item_key, "dtype": scorer.key_dtype("item")},
            "fields": [
                {
                    "name": field.name,
                    "side": field.side,
                    "dtype": field.dtype,
                    "list": field.is_list,
                    "default": field.default,
                }
                for field in info.fields
            ],
            "filters": self._filters,
            "tasks": list(info.tasks),
            "metrics": info.manifest["meta"].get("metrics", {}),
            "limits": {
                "max_body": options.max_body,
                "max_candidates": options.max_candidates,
                "max_requests": options.max_requests,
                "max_wait": options.max_wait,
            },
            "examples": {"users": self._users, "items": self._items},
        }

    def complete(self, document: Json) -> Json:
        """Return an OpenAPI document with the requests that this bundle takes, and examples."""
        info = self._info
        requests = {"/v1/score": self._score(), "/v1/recommend": self._recommend()}
        for path, (schema, examples) in requests.items():
            content = {"schema": schema, "examples": examples}
            document["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": {"application/json": content},
            }
        document["components"]["schemas"] |= {
            "UserKey": self._keys["user"],
            "ItemKey": self._keys["item"],
            "User": _features(info.side("user"), {info.user_key: self._keys["user"]}),
            "Item": _features(info.side("item"), {info.item_key: self._keys["item"]}),
            "Scene": _features(info.side("scene")),
        }
        return document

    def _score(self) -> tuple[Json, Json]:
        items = {
            "description": "Keys of items, or their raw features; the answer keeps the order.",
            "type": "array",
            "items": _any(_reference("ItemKey"), _reference("Item")),
            "maxItems": self._options.max_candidates,
        }
        properties = {"user": _USER, "items": items, "scene": _SCENE, "tasks": self._tasks()}
        schema = _object(properties, ["user", "items"])
        scene = self._scene()
        examples = {
            name: {"value": {"user": user, "items": self._items, "scene": scene}}
            for name, user in self._example_users().items()
        }
        return schema, examples

    def _recommend(self) -> tuple[Json, Json]:
        most = self._options.max_candidates
        by_name = {field.name: field for field in self._info.side("item")}
        allowed = {
            name: {"type": "array", "items": OF_DTYPE[by_name[name].dtype]}
            for name in self._filters
            if name in by_name
        }
        properties = {
            "user": _USER,
            "scene": _SCENE,
            "k": _count("How many items to return.", 10, most),
            "candidates": _count("How many items to retrieve and rank.", min(500, most), most),
            "exclude": {
                "description": "Keys of items to leave out.",
                "type": "array",
                "items": _any(_reference("ItemKey")),
                "default": [],
            },
            "allowed": {
                "description": "An item needs one of the values in each field that is named.",
                **_object(allowed),
                "type": ["object", "null"],
                "default": None,
            },
            "skip_seen": {
                "description": "Leave out what the user met in the log.",
                "type": "boolean",
                "default": False,
            },
            "diversity": {
                "description": "0: the best items; towards 1, items that differ from each other.",
                "type": "number",
                "minimum": 0,
                "exclusiveMaximum": 1,
                "default": 0.0,
            },
            "tasks": self._tasks(),
        }
        examples = {
            name: {"value": {"user": user, "scene": self._scene(), "k": EXAMPLES}}
            for name, user in self._example_users().items()
        }
        return _object(properties, ["user"]), examples

    def _tasks(self) -> Json:
        """Return the schema of what asks for tasks; only a bundle that has some can tell them."""
        names = ", ".join(self._info.tasks)
        what = f"Tell also the probability of each of the tasks {names}."
        asks: Json = {"type": "boolean", "default": False}
        if not names:
            return {"description": "This bundle has no tasks.", **asks, "enum": [False]}
        return {"description": what, **asks}

    def _example_users(self) -> Json:
        users: Json = {"features": {f.name: self._example(f) for f in self._features("user")}}
        return {"stored": self._users[0], **users} if self._users else users

    def _scene(self) -> Json:
        return {field.name: self._example(field) for field in self._features("scene")}

    def _features(self, side: str) -> list[Field]:
        return [field for field in self._info.side(side) if field.name != self._info.user_key]

    def _example(self, field: Field) -> Any:
        if field.default is not None:
            return field.default
        if not field.is_list:
            return OF_EXAMPLE[field.dtype]
        of_items = field.pads_left and OF_DTYPE[field.dtype] == self._keys["item"]
        return self._items[:2] if of_items else [OF_EXAMPLE[field.dtype]]


def _first_keys(scorer: Scorer) -> list[str | int]:
    """Return a few keys of users; none where another bundle has taken the place meanwhile."""
    try:
        keys = read_array(scorer.info.path, "users/keys.npy")[:EXAMPLES].tolist()
    except BundleError:
        return []
    return [key.decode() if isinstance(key, bytes) else key for key in keys]


def _features(fields: Iterable[Field], key: Json | None = None) -> Json:
    """Return the schema of raw features; each may be left out, and null is a missing value."""
    properties = {name: _or_null(schema) for name, schema in (key or {}).items()}
    for field in fields:
        value = _or_null(OF_DTYPE[field.dtype])
        if field.is_list:
            value = {"type": ["array", "null"], "items": value}
        if field.default is not None:
            value = {**value, "default": field.default}
        properties[field.name] = value
    return _object(properties)


def _object(properties: Json, required: Iterable[str] = ()) -> Json:
    schema: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


def _count(description: str, default: int, most: int) -> Json:
    limits = {"minimum": 1, "maximum": most, "default": default}
    return {"description": description, "type": "integer", **limits}


def _or_null(schema: Json) -> Json:
    return {**schema, "type": [schema["type"], "null"]}


def _any(*schemas: Json) -> Json:
    return {"anyOf": [*schemas, {"type": "null"}]}


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


_USER: Json = {
    "description": "A user's key, or raw features of a user; null where nothing is known.",
    **_any(_reference("UserKey"), _reference("User")),
}
_SCENE: Json = {
    "description": "What is known of the request; what is left out takes its default.",
    **_any(_reference("Scene")),
    "default": None,
}
