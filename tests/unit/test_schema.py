from __future__ import annotations

from typing import Any

import pytest

from hvdrec.config.schema import Feature, Schema
from hvdrec.errors import UserError

USER = Feature("user_id")
ITEM = Feature("item_id", side="item")
HISTORY = Feature("history", kind="sequence")
GENRES = Feature("genres", side="item", kind="categorical_list")
PRICE = Feature("price", side="item", kind="numeric", dtype="float")
BUCKETS = Feature("hour", side="scene", kind="numeric", dtype="int", transform="quantile")
SHOP = Feature("shop", side="scene", kind="hashed", dtype="int", default=3)


def schema(*features: Feature) -> Schema:
    return Schema(features, "user_id", "item_id")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "a b"}, "feature 'a b': a name is letters, digits and underscores"),
        ({"name": ""}, "feature '': a name is letters, digits and underscores"),
        (
            {"name": "label"},
            "feature 'label': the names [user_index, item_index, label, weight] are taken; "
            "rename the column",
        ),
        (
            {"name": "x", "kind": "numeric"},
            "feature 'x': numeric needs dtype [int, float], not 'string'",
        ),
        (
            {"name": "x", "kind": "hashed", "dtype": "float"},
            "feature 'x': hashed needs dtype 'int', not 'float'",
        ),
        (
            {"name": "x", "dtype": "float"},
            "feature 'x': categorical needs dtype [string, int], not 'float'",
        ),
        (
            {"name": "x", "kind": "categorical_list", "dtype": "float"},
            "feature 'x': categorical_list needs dtype [string, int], not 'float'",
        ),
        (
            {"name": "x", "kind": "sequence", "side": "item"},
            "feature 'x': a sequence of items belongs to side 'user', not 'item'",
        ),
        ({"name": "x", "default": "a"}, "feature 'x': a default is for scene features only"),
    ],
)
def test_a_feature_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as error:
        Feature(**options)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("field", "value"), [("min_count", 0), ("max_length", -1), ("buckets", 0), ("dimension", -1)]
)
def test_refuses_numbers_out_of_range(field: str, value: int) -> None:
    with pytest.raises(UserError, match="greater than") as caught:
        Feature("x", **{field: value})  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.value) == (f"Feature.{field}", value)


@pytest.mark.parametrize(
    ("features", "text"),
    [
        ((USER, USER), "feature 'user_id': declared 2 times"),
        (
            (Feature("user_id", side="item"),),
            "feature 'user_id': is the user key, side must be 'user'",
        ),
        (
            (Feature("item_id", side="scene"),),
            "feature 'item_id': is the item key, side must be 'item'",
        ),
        (
            (Feature("user_id", kind="categorical_list"),),
            "feature 'user_id': is the user key and cannot be a list",
        ),
        (
            (USER, HISTORY),
            "feature 'history': shares 'item_id', which is no feature; known: [user_id, history]",
        ),
        (
            (Feature("item_id", side="item", dtype="int"), HISTORY),
            "feature 'history': cannot share 'item_id' (categorical, dtype int); "
            "both need a vocabulary of one dtype",
        ),
        (
            (PRICE, Feature("other", shares="price")),
            "feature 'other': cannot share 'price' (numeric, dtype float); "
            "both need a vocabulary of one dtype",
        ),
        (
            (Feature("a", shares="b"), Feature("b", shares="c"), Feature("c")),
            "feature 'a': 'b' itself shares another; name that",
        ),
    ],
)
def test_features_that_do_not_go_together(features: tuple[Feature, ...], text: str) -> None:
    with pytest.raises(UserError) as error:
        schema(*features)
    assert str(error.value) == text


@pytest.mark.parametrize("kind", ["numeric", "hashed"])
def test_only_a_feature_with_a_vocabulary_may_share_one(kind: Any) -> None:
    with pytest.raises(UserError) as error:
        schema(Feature("a", dtype="int"), Feature("n", kind=kind, dtype="int", shares="a"))
    assert str(error.value) == (
        "feature 'n': cannot share 'a' (categorical, dtype int); "
        "both need a vocabulary of one dtype"
    )


def test_keys_are_column_names() -> None:
    with pytest.raises(UserError) as error:
        Schema((USER,), "user id", "item_id")
    assert str(error.value) == "samples.user: 'user id' is no column name"


def test_sides_keep_the_order_of_declaration() -> None:
    whole = schema(SHOP, HISTORY, ITEM, GENRES, USER, PRICE, BUCKETS)
    assert whole.side("user") == (HISTORY, USER)
    assert whole.side("item") == (ITEM, GENRES, PRICE)
    assert whole.side("scene") == (SHOP, BUCKETS)


def test_a_feature_is_found_by_its_name() -> None:
    assert schema(USER, ITEM)["item_id"] is ITEM
    with pytest.raises(KeyError):
        schema(USER, ITEM)["nobody"]


def test_whose_vocabulary_a_feature_uses() -> None:
    liked = Feature("liked", kind="categorical_list", shares="genres")
    whole = schema(USER, ITEM, GENRES, HISTORY, liked)
    owners = {feature.name: whole.vocabulary_of(feature) for feature in whole.features}
    assert owners == {
        "user_id": "user_id",
        "item_id": "item_id",
        "genres": "genres",
        "history": "item_id",
        "liked": "genres",
    }


@pytest.mark.parametrize(
    ("feature", "is_list", "is_embedded", "has_vocabulary"),
    [
        (USER, False, True, True),
        (GENRES, True, True, True),
        (HISTORY, True, True, True),
        (PRICE, False, False, False),
        (BUCKETS, False, True, False),
        (SHOP, False, True, False),
    ],
)
def test_what_follows_from_a_kind(
    feature: Feature, is_list: bool, is_embedded: bool, has_vocabulary: bool
) -> None:
    found = (feature.is_list, feature.is_embedded, feature.has_vocabulary)
    assert found == (is_list, is_embedded, has_vocabulary)
