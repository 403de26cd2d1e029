"""Requests that are refused, on the text of the error."""

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


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call(*arguments, **options)
    assert isinstance(caught.value, ScoringError)
    assert isinstance(caught.value, ValueError)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("user", "text"),
    [
        (1, 'user_id = 1: the key is a string, not int; pass "1"'),
        (np.int64(1), 'user_id = 1: the key is a string, not int64; pass "1"'),
        (1.5, 'user_id = 1.5: the key is a string, not float; pass "1.5"'),
        (True, "user_id = True: the key is a string, not bool"),
        (b"1", "user_id = b'1': the key is a string, not bytes"),
        (["1"], "user_id = ['1']: the key is a string, not list"),
        ("\ud800", "user_id = '\\ud800': is no valid Unicode text"),
        (
            {"age": 1, "shoe size": 44},
            "user field 'shoe size' does not exist; known: [user_id, age, history]",
        ),
        ({"user_id": 1}, 'user_id = 1: must be a string, not int; pass "1"'),
        ({"age": "old"}, "age = 'old': must be a number, not str"),
        ({"age": True}, "age = True: must be a number, not bool"),
        ({"age": [1]}, "age = [1]: must be a number, not list"),
        ({"age": 10**400}, f"age = 1{'0' * 56}...: is too large a number"),
        ({"age": 10**5000}, "age = <int>: is too large a number"),
        ({"history": "10"}, "history = '10': must be a list, not str"),
        ({"history": 10}, "history = 10: must be a list, not int"),
        ({"history": {"10"}}, "history = {'10'}: must be a list, not set"),
        ({"history": ["10", 20]}, 'history = 20: must be a string, not int; pass "20"'),
        ({"history": ["a", "\udfff"]}, "history = '\\udfff': is no valid Unicode text"),
        ({"history": np.zeros((1, 2))}, "history = array([[0., 0.]]): must be a list, not ndarray"),
    ],
)
def test_users(scorers: dict[str, Scorer], user: Any, text: str) -> None:
    assert refusal(scorers["string"].score, user, ["10"]) == text
    assert refusal(scorers["string"].recommend, user) == text
    assert refusal(scorers["string"].embed_user, user) == text
    assert refusal(scorers["string"].score_rows, ["1", user], ["10", "10"]) == text


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ("1", "user_id = '1': the key is an integer, not str; pass 1"),
        ("one", "user_id = 'one': the key is an integer, not str"),
        (True, "user_id = True: the key is an integer, not bool"),
        (np.True_, f"user_id = {np.True_!r}: the key is an integer, not {type(np.True_).__name__}"),
        (1.0, "user_id = 1.0: the key is an integer, not float"),
        (2**63, f"user_id = {2**63}: does not fit 64 bits"),
        ({"user_id": -(2**63) - 1}, f"user_id = {-(2**63) - 1}: does not fit 64 bits"),
        ({"user_id": 1.0}, "user_id = 1.0: must be an integer, not float"),
        ({"history": [10, False]}, "history = False: must be an integer, not bool"),
    ],
)
def test_users_with_integer_keys(scorers: dict[str, Scorer], user: Any, text: str) -> None:
    scorer = scorers["int"]
    scorer.score(1, [10])  # True and 1.0 equal the key that is now in the cache
    assert refusal(scorer.score, user, [10]) == text


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ("10", "items = '10': must be a list, not str"),
        ({"item_id": "10"}, "items = {'item_id': '10'}: must be a list, not dict"),
        ({"10"}, "items = {'10'}: must be a list, not set"),
        (10, "items = 10: must be a list, not int"),
        (["10", 20], 'item_id = 20: the key is a string, not int; pass "20"'),
        (np.array([10]), 'item_id = 10: the key is a string, not int; pass "10"'),
        (np.array([["10"]]), "items = array([['10']], dtype='<U2'): must be a list, not ndarray"),
        (
            ["10", {"title": "Ten"}],
            "item field 'title' does not exist; known: [item_id, genres, year]",
        ),
        ([{"year": 1999.0}], "year = 1999.0: must be an integer, not float"),
        ([{"year": math.inf}], "year = inf: must be an integer, not float"),
        ([{"year": "1999"}], "year = '1999': must be an integer, not str"),
        ([{"year": 2**64}], f"year = {2**64}: does not fit 64 bits"),
        ([{"genres": "Drama"}], "genres = 'Drama': must be a list, not str"),
        ([{"genres": [1.5]}], 'genres = 1.5: must be a string, not float; pass "1.5"'),
    ],
)
def test_items(scorers: dict[str, Scorer], items: Any, text: str) -> None:
    assert refusal(scorers["string"].score, "1", items) == text
    assert refusal(scorers["string"].embed_items, items) == text


def test_times_are_no_integers(scorers: dict[str, Scorer]) -> None:
    times = np.array(["2020-01-01"], dtype="datetime64[ns]")
    assert "the key is an integer, not datetime64" in refusal(scorers["int"].score, 1, times)
    date = datetime.date(2020, 1, 1)
    text = refusal(scorers["int"].score, 1, [{"year": date}])
    assert text == "year = datetime.date(2020, 1, 1): must be an integer, not date"


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        ({"hours": 1}, "scene field 'hours' does not exist; known: [hour, place, temperature]"),
        ({"hour": "21"}, "hour = '21': must be an integer, not str"),
        ({"hour": 21.0}, "hour = 21.0: must be an integer, not float"),
        ({"hour": [21]}, "hour = [21]: must be an integer, not list"),
        ({"place": 4}, 'place = 4: must be a string, not int; pass "4"'),
        ({"temperature": "warm"}, "temperature = 'warm': must be a number, not str"),
        (
            [("hour", 21)],
            "scene = [('hour', 21)]: must be a mapping of fields to values, not list",
        ),
    ],
)
def test_scenes(scorers: dict[str, Scorer], scene: Any, text: str) -> None:
    assert refusal(scorers["string"].score, "1", ["10"], scene) == text
    assert refusal(scorers["string"].score, "1", [], scene) == text
    assert refusal(scorers["string"].recommend, "1", scene) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k = 0: must be a whole number from 1"),
        ({"k": 2.0}, "k = 2.0: must be a whole number from 1"),
        ({"k": True}, "k = True: must be a whole number from 1"),
        ({"candidates": -1}, "candidates = -1: must be a whole number from 1"),
        ({"exclude": "10"}, "exclude = '10': must be a list, not str"),
        ({"exclude": [10]}, 'item_id = 10: the key is a string, not int; pass "10"'),
    ],
)
def test_options_of_recommend(scorers: dict[str, Scorer], options: Call, text: str) -> None:
    assert refusal(scorers["string"].recommend, "1", **options) == text


def test_rows(scorers: dict[str, Scorer]) -> None:
    score_rows = scorers["string"].score_rows
    assert refusal(score_rows, ["1"], ["10", "20"], {"hour": [1, 2, 3]}) == (
        "rows = {'users': 1, 'items': 2, 'hour': 3}: users, items and scene fields must be of "
        "one length"
    )
    assert refusal(score_rows, ["1"], ["10"], {"minute": [1]}) == (
        "scene field 'minute' does not exist; known: [hour, place, temperature]"
    )
    assert refusal(score_rows, ["1"], ["10"], {"hour": 1}) == ("hour = 1: must be a list, not int")
    assert refusal(score_rows, ["1"], ["10"], {"hour": ["x"]}) == (
        "hour = 'x': must be an integer, not str"
    )
    assert refusal(score_rows, "1", ["10"]) == "users = '1': must be a list, not str"


def test_score_many_names_the_request(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["string"]
    good = ("1", ["10"], None)
    for bad, text in (
        (("1", ["10"], {"hours": 1}), "requests[1]: scene field 'hours' does not exist"),
        ((1, ["10"], None), "requests[1]: user_id = 1: the key is a string"),
        (("1", "10", None), "requests[1].items = '10': must be a list"),
        (("1", ["10"]), "requests[1] = ('1', ['10']): must be three values, user, items and scene"),
        ("abc", "requests[1] = 'abc': must be three values"),
    ):
        assert refusal(scorer.score_many, [good, bad, good]).startswith(text)


def test_an_embedding_that_is_not_finite(scorers: dict[str, Scorer]) -> None:
    assert refusal(scorers["string"].recommend, {"age": 1e300}) == (
        "user = {'age': 1e+300}: its embedding is not finite; check its numeric features"
    )


def test_a_refused_request_harms_no_later_one(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["string"]
    before = scorer.score("1", ["10", "20"], {"hour": 21})
    refusal(scorer.score, "1", ["10", "20"], {"hour": "x"})
    refusal(scorer.score, "1", ["10", 20], {"hour": 12})
    np.testing.assert_array_equal(scorer.score("1", ["10", "20"], {"hour": 21}), before)
