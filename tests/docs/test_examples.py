"""The scripts in examples/ run and print what they are about."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BIN = Path(sys.executable).parent


def run(*command: str | Path, text: str = "") -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of the run that train_from_python.py makes, and what the script prints."""
    directory = tmp_path_factory.mktemp("shop")
    return directory, run(sys.executable, EXAMPLES / "train_from_python.py", directory)


def test_a_configuration_in_python_trains_a_model_that_ranks(shop: tuple[Path, str]) -> None:
    auc, *items = shop[1].splitlines()
    assert float(auc.split()[-1]) > 0.68  # the generator's own probabilities reach 0.74
    scores = [float(line.split()[0]) for line in items]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


def test_a_service_answers_requests_and_names_the_field_at_fault(shop: tuple[Path, str]) -> None:
    requests = [{"user": "u1", "scene": {"hour": 21}}, {"user": "u1", "scene": {"hours": 21}}]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    bundle = shop[0] / "work" / "bundle"
    good, bad = run(
        sys.executable, EXAMPLES / "score_in_a_service.py", bundle, text=lines
    ).splitlines()
    assert len(json.loads(good)["items"]) == 10
    assert "hours" in json.loads(bad)["error"]
    assert json.loads(bad)["field"]


def test_a_feature_kind_of_two_columns_reaches_the_scores(tmp_path: Path) -> None:
    printed = run(sys.executable, EXAMPLES / "custom_feature_kind.py", tmp_path)
    full, half = map(float, re.findall(r"price (\d\.\d+)", printed))
    assert half > full


def test_a_loss_of_ones_own_trains_the_towers(tmp_path: Path) -> None:
    printed = run(sys.executable, EXAMPLES / "custom_loss.py", tmp_path)
    assert float(printed.split()[-1]) > 0.1


def test_ten_lines_train_on_two_ranks(shop: tuple[Path, str], tmp_path: Path) -> None:
    config = tmp_path / "shop.toml"
    work = shop[0] / "work"
    config.write_text(
        f'name = "shop"\npaths = {{ work = "{work}", run = "{tmp_path / "run"}" }}\n'
        '[samples]\ninteractions = "shown.parquet"\nlabel = "clicked"\ntime = "time"\n'
        "[model]\ndimension = 8\n[train]\nbatch_size = 512\nepochs = 1\n"
        '[[features]]\nname = "user_id"\n[[features]]\nname = "age"\nkind = "numeric"\n'
        'dtype = "int"\n[[features]]\nname = "item_id"\nside = "item"\n'
        '[[features]]\nname = "hour"\nside = "scene"\ndtype = "int"\ndefault = 20\n'
    )
    printed = run(
        BIN / "horovodrun",
        *("--gloo", "--network-interfaces", "lo", "-np", "2"),
        *(sys.executable, EXAMPLES / "my_train.py", config),
    )
    assert "auc" in printed
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["world_size"] == 2
