"""`hvdrec init`: what is guessed about unlike tables, and that the configuration runs on them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec.cli.init_command import ask_on_terminal
from hvdrec.config import Config, load_config
from hvdrec.errors import UserError
from hvdrec.samples import make_samples
from hvdrec.start.init_run import InitResult, init
from hvdrec.start.sniff import find_delimiter, has_header, split_lines
from hvdrec.start.words import says, words

ROWS, USERS, ITEMS = 900, 30, 20
START = datetime(2024, 5, 1)
random = np.random.default_rng(0)
USER = random.integers(1, USERS + 1, ROWS)
ITEM = random.integers(1, ITEMS + 1, ROWS)
SECONDS = [600 * row for row in range(ROWS)]
STARS = random.integers(1, 6, ROWS)


def write_config(
    folder: Path, *names: str, at_least: int = ROWS, **options: Any
) -> tuple[InitResult, Config]:
    """Write a configuration, and make samples with it."""
    to = folder / "run.toml"
    result = init([folder / name for name in names], to=to, **options)
    config = load_config(to, {"paths.work": str(folder / "work")})
    samples = make_samples(config, progress=False)
    assert sum(samples.rows.values()) >= at_least
    assert sum(samples.positives.values()) > 0
    return result, config


def values(result: InitResult) -> dict[str, str]:
    return {field: choice["value"] for field, choice in result.choices.items()}


def columns(result: InitResult, side: str) -> dict[str, str]:
    return {name: f["kind"] for name, f in result.features.items() if f["side"] == side}


# -------------------------------------------------------------------------- unlike tables


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Files as those of MovieLens-100K: no header, tab or bar, Latin-1."""
    pairs = zip(USER, ITEM, STARS, SECONDS, strict=True)
    (tmp_path / "u.data").write_text(
        "".join(f"{u}\t{i}\t{s}\t{880_000_000 + t}\n" for u, i, s, t in pairs)
    )
    (tmp_path / "u.user").write_text(
        "".join(f"{u}|{20 + u}|{'MF'[u % 2]}|{50000 + u}\n" for u in range(1, USERS + 1))
    )
    lines = [f"{i}|Amélie, part {i} (1995)|0{i % 9 + 1}-Jan-1995||{i % 2}\n" for i in range(1, 21)]
    (tmp_path / "u.item").write_bytes("".join(lines).encode("latin-1"))
    return tmp_path


def test_latin_1_files_without_header(films: Path) -> None:
    result, config = write_config(films, "u.item", "u.user", "u.data")
    assert result.interactions == "u.data"
    assert values(result) == {
        "user": "user_id",
        "item": "item_id",
        "time": "time",
        "label": f"rating >= {min((3, 4), key=lambda t: abs((t <= STARS).mean() - 0.5))}",
    }
    assert (config.samples.users, config.samples.items) == ("u.user", "u.item")
    assert config.samples.title == "item_1"
    formats = {table.path: table for table in config.samples.tables}
    assert formats["u.data"].columns == ("user_id", "item_id", "rating", "time")
    assert (formats["u.item"].encoding, formats["u.item"].delimiter) == ("latin-1", "|")
    assert result.skipped["rating"] == "known only after the item was shown"
    assert [*columns(result, "item")] == ["item_id", "item_2", "item_4"]
    assert result.skipped["item_3"] == "it is empty"
    assert set(columns(result, "user")) >= {"user_id", "user_1", "user_2"}
    assert columns(result, "scene") == {"hour": "categorical", "weekday": "categorical"}
    titles = pq.read_table(films / "work/samples/items.parquet").column("title").to_pylist()
    assert titles[0].startswith("Amélie")


def test_a_csv_file_of_string_keys(tmp_path: Path) -> None:
    lines = ["userId;sku;shown_at;device;price;watchSeconds;clicked"]
    for u, i, t in zip(USER, ITEM, SECONDS, strict=True):
        at = START + timedelta(seconds=t)
        clicked = int((u + i) % 3 == 0)
        lines.append(
            f"u-{u};s{i:03};{at};{'ab'[t // 600 % 2]};{i * 1.5};{t % 90 * clicked};{clicked}"
        )
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    result, config = write_config(tmp_path, "log.csv")
    assert values(result) == {
        "user": "userId",
        "item": "sku",
        "time": "shown_at",
        "label": "clicked",
    }
    assert not config.samples.tables
    assert columns(result, "item") == {"sku": "categorical", "price": "numeric"}
    assert set(result.skipped) >= {"watchSeconds", "clicked"}


def test_sessions_with_several_actions(tmp_path: Path) -> None:
    actions = ["view", "view", "view", "cart", "purchase"]
    with (tmp_path / "events.jsonl").open("w") as file:
        for row, (u, i, t) in enumerate(zip(USER, ITEM, SECONDS, strict=True)):
            event = {
                "event_time": (START + timedelta(seconds=t)).isoformat(),
                "event_type": actions[row % 5],
                "product_id": int(i),
                "brand": f"b{i % 4}",
                "user_id": int(u),
                "user_session": f"{u}-{row}",
            }
            file.write(json.dumps(event) + "\n")
    result, _ = write_config(tmp_path, "events.jsonl")
    assert values(result) == {
        "user": "user_id",
        "item": "product_id",
        "time": "event_time",
        "label": "event_type IN ('cart', 'purchase')",
    }
    assert columns(result, "item") == {"product_id": "categorical", "brand": "categorical"}
    assert set(result.skipped) == {"event_type", "user_session"}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Parquet tables: purchases only, and a table of items with a key of another name."""
    log = pa.table({"customer": [f"c{u}" for u in USER], "article": ITEM, "t": SECONDS})
    pq.write_table(log, tmp_path / "log.parquet")
    genres = ["Action|Drama", "Action|Comedy", "Drama|Comedy", "Action", "Drama", "Comedy"]
    combined = ["Action|Comedy|Drama", "Comedy|Action"]
    items = {
        "id": list(range(1, ITEMS + 1)),
        "name": [f"Article number {i}" for i in range(ITEMS)],
        "genres": [[*genres, *combined][i % 8] for i in range(ITEMS)],
        "constant": ["x"] * ITEMS,
    }
    pq.write_table(pa.table(items), tmp_path / "articles.parquet")
    return tmp_path


def test_parquet_with_a_side_table_and_positive_rows_only(shop: Path) -> None:
    result, config = write_config(shop, "log.parquet", "articles.parquet", given={"time": "t"})
    assert values(result) == {"user": "customer", "item": "article", "time": "t", "label": "1"}
    assert config.samples.negatives.per_positive == 4
    assert config.samples.tables[0].rename == {"id": "article"}
    assert columns(result, "item") == {"article": "categorical", "genres": "categorical_list"}
    assert result.skipped["constant"] == "all rows have one value"
    row = pq.read_table(shop / "work/samples/items.parquet").to_pylist()[0]
    assert row["genres"] == ["Action", "Drama"]


def test_exposures_with_a_table_of_clicks(tmp_path: Path) -> None:
    shown = ["user_id,item_id,shown_at"]
    clicks = ["user_id,item_id,clicked_at"]
    for row, (u, i, t) in enumerate(zip(USER, ITEM, SECONDS, strict=True)):
        shown.append(f"u{u},i{i},{1_700_000_000_000 + 1000 * t}")
        if row % 3 == 0:
            clicks.append(f"u{u},i{i},{1_700_000_000_000 + 1000 * t + 5000}")
    (tmp_path / "shown.csv").write_text("\n".join(shown) + "\n")
    (tmp_path / "clicks.csv").write_text("\n".join(clicks) + "\n")
    result, config = write_config(tmp_path, "clicks.csv", "shown.csv", at_least=ROWS // 2)
    assert result.interactions == "shown.csv"
    assert values(result)["label"] == "click_count > 0"
    assert config.samples.time_unit == "ms"
    [feedback] = config.samples.feedback
    assert (feedback.name, feedback.table, feedback.time) == ("click", "clicks.csv", "clicked_at")
    assert (feedback.on, feedback.time_unit) == (("user_id", "item_id"), "ms")


# --------------------------------------------------------------------- answers and refusals


def test_answers_replace_guesses(shop: Path) -> None:
    asked: dict[str, tuple[str, Sequence[str]]] = {}

    def ask(field: str, guess: str, why: str, allowed: Sequence[str]) -> str:
        asked[field] = (guess, allowed)
        assert why
        return {"user": "article", "item": "customer", "time": "", "label": "t // 600 % 2"}[field]

    result, config = write_config(shop, "log.parquet", ask=ask)
    assert asked["user"] == ("customer", ["customer", "article", "t"])
    assert values(result) == {
        "user": "article",
        "item": "customer",
        "time": "",
        "label": "t // 600 % 2",
    }
    assert config.samples.split.method == "random"
    assert not config.samples.history


def test_an_existing_file_is_kept(shop: Path) -> None:
    to = shop / "mine.toml"
    to.write_text("mine")
    with pytest.raises(UserError) as raised:
        init([shop / "log.parquet"], to=to)
    assert raised.value.field == str(to)
    assert "--overwrite" in str(raised.value)
    assert to.read_text() == "mine"
    init([shop / "log.parquet"], to=to, overwrite=True)
    assert load_config(to).samples.user == "customer"


@pytest.mark.parametrize(
    ("given", "field", "word"),
    [
        ({"user": "custommer"}, "user", "customer"),
        ({"label": "liked = 1"}, "samples.label", "[customer, article, t]"),
    ],
)
def test_wrong_answers_are_refused(
    shop: Path, given: dict[str, str], field: str, word: str
) -> None:
    with pytest.raises(UserError) as raised:
        init([shop / "log.parquet"], to=shop / "run.toml", given=given)
    assert raised.value.field == field
    assert raised.value.value == next(iter(given.values()))
    assert word in str(raised.value)
    assert not (shop / "run.toml").exists()


def test_a_table_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,y\n1.5,2.5\n2.5,3.5\n")
    with pytest.raises(UserError) as raised:
        init([tmp_path / "t.csv"], to=tmp_path / "run.toml")
    assert raised.value.field == "samples.user"
    assert "--user" in str(raised.value)


def test_questions_repeat_until_the_answer_is_a_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("colour\nb\n\n-\n"))
    assert ask_on_terminal("user", "a", "by its name", ["a", "b"]) == "b"
    assert "no such column: colour" in capsys.readouterr().err
    assert ask_on_terminal("item", "a", "by its name", ["a", "b"]) == "a"
    assert ask_on_terminal("time", "a", "by its name", ["", "a"]) == ""
    with pytest.raises(UserError) as raised:
        ask_on_terminal("label", "1", "no label", ())
    assert raised.value.field == "label"
    assert "--yes" in str(raised.value)


def test_only_the_head_of_a_large_file_is_read(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdrec.start.look.TEXT_BYTES", 4096)
    lines = "".join(f"u{u},i{i},{u % 2}\n" for u, i in zip(USER, ITEM, strict=True))
    (shop / "big.csv").write_text(f"user,item,liked\n{lines}")
    init([shop / "big.csv"], to=shop / "run.toml")
    first = (shop / "run.toml").read_text().splitlines()[0]
    rows = int(first.split(" rows of ")[0].split()[-1])
    assert 300 < rows < ROWS
    assert 'label = "liked"' in (shop / "run.toml").read_text()


# ------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a,b", "1,2"], (",", True)),
        (["1::Up, it's::x|y", "2::Heat::z"], ("::", True)),
        (["a;b;c", "1,5;2;3", "1,5;3;4"], (";", True)),
        (['1|"Up" and down|x', '2|"b|y'], ("|", False)),
        (["just", "words"], (",", True)),
    ],
)
def test_delimiters(lines: list[str], expected: tuple[str, bool]) -> None:
    assert find_delimiter(lines) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user,item\na,b\n", True),
        ("user,item\n1,2\n", True),
        ("1,2\n3,4\n", False),
        ("view,i1\ncart,i2\nview,i3\n", False),
        ("a,a\nb,c\n", False),
        ("u1,2024-05-01\nu2,2024-05-02\n", False),
    ],
)
def test_headers(text: str, expected: bool) -> None:
    assert has_header(split_lines(text.splitlines(), ",", True)) is expected


def test_words_of_names() -> None:
    assert words("userTags") == ["user", "tag"]
    assert says("productId", {"product"})
    assert says("customerid", {"customer"})
    assert says("is_clicked", {"clicked"})
    assert not says("users_price", {"use"})
