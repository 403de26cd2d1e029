from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdrec.config.names import file_name
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
    ("options", "field", "text"),
    [
        ({"name": ""}, "name", "is empty"),
        ({"name": "a\nb"}, "name", "control character"),
        ({"name": "__hvdrec_time"}, "name", "start with '__hvdrec_'"),
        ({"kind": "categoricl"}, "kind", "did you mean 'categorical'?"),
        ({"kind": "numeric"}, "dtype", "numeric needs [int, float]"),
        ({"kind": "hashed", "dtype": "float"}, "dtype", "hashed needs [int]"),
        ({"dtype": "float"}, "dtype", "categorical needs [string, int]"),
        (
            {"kind": "categorical_list", "dtype": "float"},
            "dtype",
            "categorical_list needs [string, int]",
        ),
        ({"kind": "sequence", "side": "item"}, "side", "sequence needs [user]"),
        ({"columns": ("a",)}, "columns", "categorical reads the column of its own name"),
        ({"kind": "crossed"}, "columns", "two or more features"),
        ({"kind": "crossed", "columns": ("a",)}, "columns", "two or more features"),
        ({"kind": "crossed", "columns": ("a", "b", "a")}, "columns", "each once"),
        ({"default": "a"}, "default", "scene features"),
    ],
)
def test_a_field_that_does_not_fit_is_refused(
    options: dict[str, Any], field: str, text: str
) -> None:
    arguments = {"name": "x", **options}
    with pytest.raises(UserError) as error:
        Feature(**arguments)
    assert error.value.field == f"features.{arguments['name']}.{field}"
    assert error.value.value == arguments.get(field, getattr(USER, field))
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"), [("min_count", 0), ("max_length", -1), ("buckets", 0), ("dimension", -1)]
)
def test_refuses_numbers_out_of_range(field: str, value: int) -> None:
    with pytest.raises(UserError, match="greater than") as caught:
        Feature("x", **{field: value})  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.value) == (f"Feature.{field}", value)


CROSS: dict[str, Any] = {"kind": "crossed", "columns": ("user_id", "hour")}


@pytest.mark.parametrize(
    ("features", "field", "text"),
    [
        ((USER, USER), "features.user_id.name", "declared 2 times"),
        ((Feature("user_id", side="item"),), "features.user_id.side", "'user'"),
        ((Feature("item_id", side="scene"),), "features.item_id.side", "'item'"),
        ((Feature("user_id", kind="categorical_list"),), "features.user_id.kind", "one value"),
        ((USER, HISTORY), "features.history.shares", "known: [user_id, history]"),
        (
            (Feature("item_id", side="item", dtype="int"), HISTORY),
            "features.history.shares",
            "'item_id' is categorical of int",
        ),
        (
            (PRICE, Feature("other", shares="price")),
            "features.other.shares",
            "'price' is numeric of float",
        ),
        (
            (Feature("a", shares="b"), Feature("b", shares="c"), Feature("c")),
            "features.a.shares",
            "name 'c'",
        ),
        ((USER, Feature("x", **CROSS)), "features.x.columns", "known: [user_id, x]"),
        ((USER, BUCKETS, Feature("x", **CROSS)), "features.x.columns", "side = 'scene'"),
        (
            (GENRES, BUCKETS, Feature("x", "scene", "crossed", columns=("genres", "hour"))),
            "features.x.columns",
            "'genres' does not have one code per row",
        ),
        (
            (PRICE, BUCKETS, Feature("x", "scene", "crossed", columns=("price", "hour"))),
            "features.x.columns",
            "'price' does not have one code per row",
        ),
        (
            (
                USER,
                BUCKETS,
                Feature("x", "scene", **CROSS),
                Feature("y", "scene", "crossed", columns=("x", "hour")),
            ),
            "features.y.columns",
            "'x' does not have one code per row",
        ),
    ],
)
def test_features_that_contradict_each_other_are_refused(
    features: tuple[Feature, ...], field: str, text: str
) -> None:
    with pytest.raises(UserError) as error:
        schema(*features)
    assert error.value.field == field
    assert text in str(error.value)


@pytest.mark.parametrize("kind", ["numeric", "hashed"])
def test_only_a_feature_with_a_vocabulary_may_share_one(kind: Any) -> None:
    with pytest.raises(UserError) as error:
        schema(Feature("a", dtype="int"), Feature("n", kind=kind, dtype="int", shares="a"))
    assert (error.value.field, error.value.value) == ("features.n.shares", "a")
    assert "both features need a vocabulary" in str(error.value)


def test_keys_are_column_names() -> None:
    for name in ("", "user\tid", "__hvdrec_id"):
        with pytest.raises(UserError) as error:
            Schema((USER,), name, "item_id")
        assert (error.value.field, error.value.value) == ("samples.user", name)


def test_own_names_give_way_to_keys_features_and_columns() -> None:
    pair = Feature("time", "scene", "crossed", columns=("user_id", "item_id"))
    named = Schema((USER, ITEM, pair, Feature("score", "scene")), "user_id", "label")
    names = {name: named.own_name(name) for name in ("time", "label", "score", "weight")}
    assert names == {
        "time": "__hvdrec_time",
        "label": "__hvdrec_label",
        "score": "__hvdrec_score",
        "weight": "weight",
    }
    assert named.row_columns == ("user_index", "item_index", "__hvdrec_label", "weight")


@given(st.sets(st.text(min_size=1, max_size=300), min_size=1, max_size=5))
def test_file_names_are_distinct_and_stay_in_their_folder(names: set[str]) -> None:
    files = {file_name(name) for name in names}
    assert len(files) == len(names)
    for file in files:
        assert len(file.encode()) <= 240
        assert not {"/", "\\", ".", "\0", "\n"} & set(file)


def test_identifiers_are_their_own_file_names() -> None:
    assert [file_name(name) for name in ("age", "größe", "_a1")] == ["age", "größe", "_a1"]
    assert file_name("a/b") != file_name("a%2F%b")


def test_codes_that_scene_features_combine_are_carried_by_users_and_items() -> None:
    plain, scene = Feature("place", side="scene"), ("scene", "crossed")
    whole = schema(
        USER,
        ITEM,
        SHOP,
        plain,
        Feature("a", *scene, columns=("shop", "place")),
        Feature("b", *scene, columns=("user_id", "item_id")),
        Feature("c", *scene, columns=("place", "item_id")),
    )
    assert whole.carried("user") == (USER,)
    assert whole.carried("item") == (ITEM,)
    assert [column.name for column in whole.columns()] == ["user_id", "item_id", "shop", "place"]
    assert [column.name for column in whole.columns("scene")] == ["shop", "place"]


def test_sides_keep_the_order_of_declaration() -> None:
    whole = schema(SHOP, HISTORY, ITEM, GENRES, USER, PRICE, BUCKETS)
    assert whole.side("user") == (HISTORY, USER)
    assert whole.side("item") == (ITEM, GENRES, PRICE)
    assert whole.side("scene") == (SHOP, BUCKETS)


def test_a_feature_is_found_by_its_name() -> None:
    assert schema(USER, ITEM)["item_id"] is ITEM
    with pytest.raises(KeyError):
        schema(USER, ITEM)["nobody"]


def test_the_owner_of_a_features_vocabulary() -> None:
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
def test_properties_that_follow_from_the_kind(
    feature: Feature, is_list: bool, is_embedded: bool, has_vocabulary: bool
) -> None:
    found = (feature.is_list, feature.is_embedded, feature.has_vocabulary)
    assert found == (is_list, is_embedded, has_vocabulary)
