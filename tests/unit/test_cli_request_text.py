"""Users, keys and scenes as they are typed on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdrec.cli.request_text import parse_key, parse_scene, parse_user
from hvdrec.scoring import RequestError, Scorer
from tests.bundles import write_bundle


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    folder: Path = tmp_path_factory.mktemp("bundles")
    return {
        dtype: Scorer.load(write_bundle(folder / dtype, key_dtype=dtype))
        for dtype in ("string", "int")
    }


def test_keys_take_the_bundles_type(scorers: dict[str, Scorer]) -> None:
    assert parse_key(scorers["string"], "item", "10") == "10"
    assert parse_key(scorers["int"], "item", "10") == 10
    assert parse_user(scorers["int"], "-1") == -1
    with pytest.raises(RequestError, match=r"^user = 'x': the key is an integer$"):
        parse_user(scorers["int"], "x")


def test_a_user_as_json(scorers: dict[str, Scorer]) -> None:
    parsed = parse_user(scorers["string"], ' {"age": 20, "history": ["10"], "user_id": "1"}')
    assert scorers["string"].embed_user(parsed).tolist() == pytest.approx([2.0, 2.0, 0.2])
    with pytest.raises(RequestError, match=r"^user = '\{age: 20\}': is not valid JSON \("):
        parse_user(scorers["string"], "{age: 20}")


def test_scenes(scorers: dict[str, Scorer]) -> None:
    pairs = ["hour=21", "place=a=b", "temperature=-1.5"]
    parsed = parse_scene(scorers["string"], pairs)
    assert parsed == {"hour": 21, "place": "a=b", "temperature": -1.5}
    assert parse_scene(scorers["string"], ["hour=", "place="]) == {"hour": None, "place": None}
    assert parse_scene(scorers["string"], []) == {}


@pytest.mark.parametrize(
    ("pair", "field", "words"),
    [
        ("hour", "scene", "= 'hour': must be FIELD=VALUE; for example hour=21"),
        ("hr=1", "scene.hr", "unknown field; known: [hour, place, temperature]"),
        ("hour=9pm", "scene.hour", "= '9pm': must be an integer"),
        ("temperature=warm", "scene.temperature", "= 'warm': must be a number"),
    ],
)
def test_invalid_scenes_are_refused(
    scorers: dict[str, Scorer], pair: str, field: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_scene(scorers["string"], [pair])
    assert caught.value.field == field
    assert words in str(caught.value)
