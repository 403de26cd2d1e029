"""From files that hvdrec has never seen to a trained model, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.integration.conftest import hvdrec, succeed

ROWS, USERS, ITEMS = 3000, 40, 30
random = np.random.default_rng(0)
USER = random.integers(1, USERS + 1, ROWS)
ITEM = random.integers(1, ITEMS + 1, ROWS)
LIKES = (USER + ITEM) % 3 == 0


def ratings(folder: Path) -> list[str]:
    """Tab-separated ratings and Latin-1 films, without header."""
    stars = np.where(LIKES, 5, random.integers(1, 4, ROWS))
    rows = zip(USER, ITEM, stars, range(ROWS), strict=True)
    (folder / "u.data").write_text(
        "".join(f"{u}\t{i}\t{s}\t{88e7 + t:.0f}\n" for u, i, s, t in rows)
    )
    films = "".join(f"{i}|Amélie {i}|{1980 + i}|{i % 2}\n" for i in range(1, ITEMS + 1))
    (folder / "u.item").write_bytes(films.encode("latin-1"))
    return ["u.data", "u.item"]


def sessions(folder: Path) -> list[str]:
    """Session logs with several actions, as JSON lines."""
    actions = np.where(LIKES, "purchase", np.where(random.random(ROWS) < 0.1, "cart", "view"))
    with (folder / "events.jsonl").open("w") as file:
        for row in range(ROWS):
            event = {
                "event_time": f"2024-05-{1 + row // 120:02}T{row % 24:02}:00:00",
                "event_type": str(actions[row]),
                "product_id": int(ITEM[row]),
                "user_id": int(USER[row]),
            }
            file.write(json.dumps(event) + "\n")
    return ["events.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("write", [ratings, sessions])
def test_from_files_to_a_trained_model(write: object, tmp_path: Path) -> None:
    files = write(tmp_path)  # type: ignore[operator]
    config = tmp_path / "run.toml"
    assert hvdrec("init", *(tmp_path / f for f in files), "--to", config, "--yes").returncode == 0
    for verb in ("samples", "check", "prepare"):
        succeed(verb, config, "--paths.work", tmp_path / "work")
    result = succeed("train", config, "--paths.work", tmp_path / "work", "--train.epochs", 2)
    assert result["validation"]["auc"] > 0.6
