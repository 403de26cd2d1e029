"""Invalid requests: the error names the field, the value and the remedy."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring import RequestError, Scorer, ScoringError
from tests.bundles import write_bundle

Call = dict[str, Any]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    folder: Path = tmp_path_factory.mktemp("bundles")
    return {
        dtype: Scorer.load(write_bundle(folder / dtype, key_dtype=dtype))
        for dtype in ("string", "int")
    }


def refusal(call: Any, *arguments: Any, **options: Any) -> RequestError:
    """Call a method that must raise RequestError and return the error."""
    with pytest.raises(RequestError) as caught:
        call(*arguments, **options)
    error = caught.value
    assert isinstance(error, ScoringError)
    assert isinstance(error, ValueError)
    assert "\n" not in str(error)
    assert str(error).startswith(error.field)
    return error


def check(error: RequestError, field: str, *words: str) -> None:
    """Check the field of an error and that its text contains all words."""
    assert error.field == field
    assert [word for word in words if word not in str(error)] == [], str(error)


@pytest.mark.parametrize(
    ("user", "field", "words"),
    [
        (1, "user", ["user = 1: user_id is a string, not an integer", 'pass "1"']),
        (np.int64(1), "user", ["user = 1:", "string, not int64", 'pass "1"']),
        (1.5, "user", ["user = 1.5:", "string, not a number", 'pass "1.5"']),
        (True, "user", ["user = True:", "string, not a boolean"]),
        (b"1", "user", ["user = b'1':", "string, not bytes"]),
        (["1"], "user", ["user = ['1']:", "string, not a list"]),
        ("\ud800", "user", ["user = '\\ud800':", "Unicode"]),
        ({"age": 1, "shoe size": 4}, "user.shoe size", ["unknown", "[user_id, age, history]"]),
        ({"user_id": 1}, "user.user_id", ["= 1: must be a string, not an integer", 'pass "1"']),
        ({"age": "old"}, "user.age", ["= 'old': must be a number, not a string"]),
        ({"age": True}, "user.age", ["= True:", "number, not a boolean"]),
        ({"age": [1]}, "user.age", ["= [1]:", "number, not a list"]),
        ({"age": 10**400}, "user.age", [f"= 1{'0' * 56}...:", "too large"]),
        ({"age": 10**5000}, "user.age", ["= <int>:", "too large"]),
        ({"history": "10"}, "user.history", ["= '10':", "list, not a string"]),
        ({"history": 10}, "user.history", ["= 10:", "list, not an integer"]),
        ({"history": {"10"}}, "user.history", ["= {'10'}:", "list, not set"]),
        ({"history": ["10", 20]}, "user.history", ["= 20:", "string, not an integer", 'pass "20"']),
        ({"history": ["a", "\udfff"]}, "user.history", ["= '\\udfff':", "Unicode"]),
        ({"history": np.zeros((1, 2))}, "user.history", ["array([[0., 0.]])", "list, not ndarray"]),
    ],
)
def test_an_invalid_user_is_refused_by_every_method(
    scorers: dict[str, Scorer], user: Any, field: str, words: list[str]
) -> None:
    scorer = scorers["string"]
    check(refusal(scorer.score, user, ["10"]), field, *words)
    check(refusal(scorer.recommend, user), field, *words)
    check(refusal(scorer.embed_user, user), field, *words)
    check(refusal(scorer.score_rows, ["1", user], ["10", "10"]), field, *words)


@pytest.mark.parametrize(
    ("user", "field", "words"),
    [
        ("1", "user", ["= '1': user_id is an integer, not a string", "pass 1"]),
        ("one", "user", ["= 'one':", "integer, not a string"]),
        (True, "user", ["= True:", "integer, not a boolean"]),
        (np.True_, "user", [f"= {np.True_!r}:", f"integer, not {type(np.True_).__name__}"]),
        (1.0, "user", ["= 1.0:", "integer, not a number"]),
        (2**63, "user", [f"= {2**63}:", "64 bits"]),
        ({"user_id": -(2**63) - 1}, "user.user_id", [f"= {-(2**63) - 1}:", "64 bits"]),
        ({"user_id": 1.0}, "user.user_id", ["= 1.0:", "integer, not a number"]),
        ({"history": [10, False]}, "user.history", ["= False:", "integer, not a boolean"]),
    ],
)
def test_an_invalid_user_is_refused_where_keys_are_integers(
    scorers: dict[str, Scorer], user: Any, field: str, words: list[str]
) -> None:
    scorer = scorers["int"]
    scorer.score(1, [10])  # True and 1.0 equal the key that is now in the cache
    check(refusal(scorer.score, user, [10]), field, *words)


def test_a_remedy_is_only_suggested_where_it_helps(scorers: dict[str, Scorer]) -> None:
    assert "pass" not in str(refusal(scorers["int"].score, "one", [10]))
    assert "pass" not in str(refusal(scorers["string"].score, True, ["10"]))


def test_an_error_holds_the_value_as_it_was_passed(scorers: dict[str, Scorer]) -> None:
    assert refusal(scorers["string"].score, {"age": 10**5000}, ["10"]).value == 10**5000
    assert refusal(scorers["string"].score, "1", ["10"], {"hour": "21"}).value == "21"
    assert refusal(scorers["string"].recommend, "1", k=0).value == 0


@pytest.mark.parametrize(
    ("items", "field", "words"),
    [
        ("10", "items", ["= '10': must be a list, not a string"]),
        ({"item_id": "10"}, "items", ["= {'item_id': '10'}:", "list, not an object"]),
        ({"10"}, "items", ["= {'10'}:", "list, not set"]),
        (10, "items", ["= 10:", "list, not an integer"]),
        (["10", 20], "items", ["= 20: item_id is a string, not an integer", 'pass "20"']),
        (np.array([10]), "items", ["= 10:", "string, not an integer", 'pass "10"']),
        (np.array([["10"]]), "items", ["array([['10']], dtype='<U2')", "list, not ndarray"]),
        (["10", {"title": "Ten"}], "items.title", ["unknown", "[item_id, genres, year]"]),
        ([{"year": 1999.0}], "items.year", ["= 1999.0:", "integer, not a number"]),
        ([{"year": math.inf}], "items.year", ["= inf:", "integer, not a number"]),
        ([{"year": "1999"}], "items.year", ["= '1999':", "integer, not a string"]),
        ([{"year": 2**64}], "items.year", [f"= {2**64}:", "64 bits"]),
        ([{"genres": "Drama"}], "items.genres", ["= 'Drama':", "list, not a string"]),
        ([{"genres": [1.5]}], "items.genres", ["= 1.5:", "string, not a number", 'pass "1.5"']),
    ],
)
def test_invalid_items_are_refused(
    scorers: dict[str, Scorer], items: Any, field: str, words: list[str]
) -> None:
    check(refusal(scorers["string"].score, "1", items), field, *words)
    check(refusal(scorers["string"].embed_items, items), field, *words)


def test_a_time_is_not_an_integer(scorers: dict[str, Scorer]) -> None:
    times = np.array(["2020-01-01"], dtype="datetime64[ns]")
    check(refusal(scorers["int"].score, 1, times), "items", "integer, not datetime64")
    date = datetime.date(2020, 1, 1)
    error = refusal(scorers["int"].score, 1, [{"year": date}])
    check(error, "items.year", "= datetime.date(2020, 1, 1):", "integer, not date")


@pytest.mark.parametrize(
    ("scene", "field", "words"),
    [
        ({"hours": 1}, "scene.hours", ["unknown", "[hour, place, temperature]"]),
        ({"hour": "21"}, "scene.hour", ["= '21':", "integer, not a string"]),
        ({"hour": 21.0}, "scene.hour", ["= 21.0:", "integer, not a number"]),
        ({"hour": [21]}, "scene.hour", ["= [21]:", "integer, not a list"]),
        ({"place": 4}, "scene.place", ["= 4:", "string, not an integer", 'pass "4"']),
        ({"temperature": "warm"}, "scene.temperature", ["= 'warm':", "number, not a string"]),
        ([("hour", 21)], "scene", ["= [('hour', 21)]:", "mapping of fields to values, not a list"]),
    ],
)
def test_an_invalid_scene_is_refused(
    scorers: dict[str, Scorer], scene: Any, field: str, words: list[str]
) -> None:
    check(refusal(scorers["string"].score, "1", ["10"], scene), field, *words)
    check(refusal(scorers["string"].score, "1", [], scene), field, *words)
    check(refusal(scorers["string"].recommend, "1", scene), field, *words)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"k": 0}, "k", ["= 0:", "integer of at least 1"]),
        ({"k": 2.0}, "k", ["= 2.0:", "integer of at least 1"]),
        ({"k": True}, "k", ["= True:", "integer of at least 1"]),
        ({"candidates": -1}, "candidates", ["= -1:", "integer of at least 1"]),
        ({"exclude": "10"}, "exclude", ["= '10':", "list, not a string"]),
        (
            {"exclude": [10]},
            "exclude",
            ["= 10:", "item_id is a string, not an integer", 'pass "10"'],
        ),
    ],
)
def test_invalid_options_of_recommend_are_refused(
    scorers: dict[str, Scorer], options: Call, field: str, words: list[str]
) -> None:
    check(refusal(scorers["string"].recommend, "1", **options), field, *words)


def test_invalid_rows_are_refused(scorers: dict[str, Scorer]) -> None:
    score_rows = scorers["string"].score_rows
    error = refusal(score_rows, ["1"], ["10", "20"], {"hour": [1, 2, 3]})
    check(error, "rows", "{'users': 1, 'items': 2, 'hour': 3}", "same length")
    error = refusal(score_rows, ["1"], ["10"], {"minute": [1]})
    check(error, "scene.minute", "unknown", "[hour, place, temperature]")
    error = refusal(score_rows, ["1"], ["10"], {"hour": 1})
    check(error, "scene.hour", "= 1:", "list, not an integer")
    error = refusal(score_rows, ["1"], ["10"], {"hour": ["x"]})
    check(error, "scene.hour", "= 'x':", "integer, not a string")
    check(refusal(score_rows, "1", ["10"]), "users", "= '1':", "list, not a string")


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (("1", ["10"], {"hours": 1}), "requests[1].scene.hours", ["unknown"]),
        ((1, ["10"], None), "requests[1].user", ["= 1:", "user_id is a string"]),
        (("1", "10", None), "requests[1].items", ["= '10':", "must be a list"]),
        (("1", ["10"]), "requests[1]", ["= ('1', ['10']):", "three values, user, items and scene"]),
        ("abc", "requests[1]", ["= 'abc':", "three values"]),
    ],
)
def test_score_many_names_the_invalid_request(
    scorers: dict[str, Scorer], request_: Any, field: str, words: list[str]
) -> None:
    good = ("1", ["10"], None)
    check(refusal(scorers["string"].score_many, [good, request_, good]), field, *words)


def test_a_user_whose_embedding_is_not_finite_is_refused(scorers: dict[str, Scorer]) -> None:
    error = refusal(scorers["string"].recommend, {"age": 1e300})
    check(error, "user", "= {'age': 1e+300}:", "not finite", "check its numeric features")


def test_requests_after_a_refused_one_are_scored_as_before(scorers: dict[str, Scorer]) -> None:
    before = scorers["string"].score("1", ["10", "20"], {"hour": 21})
    refusal(scorers["string"].score, "1", ["10", "20"], {"hour": "x"})
    refusal(scorers["string"].score, "1", ["10", 20], {"hour": 12})
    after = scorers["string"].score("1", ["10", "20"], {"hour": 21})
    np.testing.assert_array_equal(after, before)
