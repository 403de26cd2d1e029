"""The scorer in an environment with only hvdrec, numpy 2, onnxruntime and pytest.

Writing the bundle of tests/bundles.py needs onnx: ``python tests/bundles.py OUT`` writes it in the
full environment; ``HVDREC_TEST_BUNDLE=OUT`` passes its path.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvdrec.scoring import RequestError, Scorer

HEAVY = ("torch", "horovod", "petastorm", "pyarrow", "pandas", "onnx", "duckdb", "pydantic")


@pytest.fixture(scope="module")
def path() -> Path:
    if "HVDREC_TEST_BUNDLE" not in os.environ:
        pytest.fail("HVDREC_TEST_BUNDLE is not set; run python tests/bundles.py OUT and set it")
    return Path(os.environ["HVDREC_TEST_BUNDLE"])


@pytest.fixture(scope="module")
def scorer(path: Path) -> Scorer:
    return Scorer.load(path, verify=True)


def logits(scores: np.ndarray) -> list[float]:
    assert scores.dtype == np.float32
    return [round(math.log(score / (1 - score)), 4) for score in scores.astype(np.float64)]


def test_the_environment_is_slim() -> None:
    assert int(np.__version__.split(".")[0]) >= 2
    assert [name for name in HEAVY if importlib.util.find_spec(name)] == []


def test_scores_are_those_computed_by_hand(scorer: Scorer) -> None:
    scene = {"hour": 21, "place": "home", "temperature": 20.0}
    assert logits(scorer.score("1", ["10", "20"], scene)) == [6.25, 6.95]
    assert logits(scorer.score("99", ["10", "no such film", "30"])) == [1.25, 0.875, 2.0]


def test_raw_values_may_have_numpy_types(scorer: Scorer) -> None:
    user = {"user_id": np.str_("1"), "age": np.float32(20), "history": np.array(["10", "10"])}
    np.testing.assert_allclose(scorer.embed_user(user), [2.5, 2.5, 0.2], rtol=1e-6)
    items = np.array(["10", "20"], dtype=np.dtypes.StringDType())
    assert logits(scorer.score("1", items, {"hour": np.int8(21)})) == [4.0, 4.7]
    assert logits(scorer.score_rows(["2", {}], ["30", "10"], {"hour": np.array([12, 21])})) == [
        1.5,
        1.0,
    ]


def test_recommendations_are_those_computed_by_hand(scorer: Scorer) -> None:
    found = scorer.recommend("1", {"hour": 21}, k=2, exclude=["10"])
    assert [(r.item, r.title, r.retrieval_score) for r in found] == [
        ("30", None, 4.0),
        ("20", "Zwölf", 3.5),
    ]


def test_filters_trending_items_and_diversity_work(scorer: Scorer) -> None:
    allowed = {"genres": np.array(["War"]), "year": [np.int64(1990), 2010]}
    found = scorer.recommend("1", allowed=allowed, skip_seen=True)
    assert [(r.item, r.source) for r in found] == [("20", "stored"), ("40", "stored")]
    found = scorer.recommend(None, k=3)
    assert [(r.item, r.retrieval_score, r.source) for r in found] == [
        ("20", 4.0, "trending"),
        ("30", 1.0, "trending"),
        ("10", 1.0, "trending"),
    ]
    found = scorer.recommend("1", diversity=np.float32(0.5))
    assert [r.item for r in found] == ["30", "10", "20", "40"]


def test_errors_show_numpy_values_as_python_values(scorer: Scorer) -> None:
    with pytest.raises(RequestError) as caught:
        scorer.score(np.int64(1), ["10"])  # type: ignore[arg-type]
    assert str(caught.value) == 'user = 1: user_id is a string, not int64; pass "1"'


def test_scoring_makes_no_deprecated_call(path: Path) -> None:
    program = (
        "import sys; from hvdrec.scoring import Scorer; scorer = Scorer.load(sys.argv[1]);"
        "print(len(scorer.recommend({'age': 1.0}, {'hour': 3})), scorer.score('1', ['10', 'x']))"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4 [0.97")


def test_the_command_line_recommends(path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from hvdrec.cli import main; main()",
        "recommend",
        str(path),
    ]
    done = subprocess.run(
        [*command, "--user", "1", "--scene", "hour=21", "-k", "2", "--exclude", "10", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [item["item"] for item in json.loads(done.stdout)["items"]] == ["30", "20"]
    done = subprocess.run(
        [*command, "--user", "1", "-k", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("hvdrec: error: k = 0")


def test_a_command_that_needs_more_packages_names_the_extra(tmp_path: Path) -> None:
    program = "from hvdrec.cli import main; main(['prepare', 'x.toml'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "not installed; this command needs the extra 'train' (scripts/install)" in done.stderr


def test_a_scorer_writes_nothing_to_the_home_directory(path: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from hvdrec.scoring import Scorer; Scorer.load(sys.argv[1]).score('1', ['10'])"
    )
    environment = {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
