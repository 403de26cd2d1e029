"""Two hundred reloads under load: no call fails and no result mixes two bundles."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvdrec.scoring import Scorer
from hvdrec.scoring.scorer import WatchedScorer
from tests.bundles import write_bundle
from tests.other_bundle import point, put, write_other_bundle

RELOADS = 200
THREADS = 3
SECONDS = 120.0
SCENE = {"hour": 21, "place": "home"}

Verb = Callable[[Any], Any]
VERBS: list[Verb] = [
    lambda scorer: scorer.score("1", ["10", "20", "never seen"], SCENE).tolist(),
    lambda scorer: scorer.score("never seen", ["20"]).tolist(),
    lambda scorer: scorer.score({"age": 30, "history": ["10"]}, ["10", {"year": 2000}]).tolist(),
    lambda scorer: [
        part.tolist()
        for part in scorer.score_many([("1", ["10"], SCENE), ("2", ["20", "30"], None)])
    ],
    lambda scorer: scorer.recommend("2", SCENE, k=3),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return write_bundle(folder / "ours"), write_other_bundle(folder / "other")


@pytest.mark.parametrize(
    ("way", "reloads"), [("renamed", RELOADS), ("linked", RELOADS // 4)], ids=["renamed", "linked"]
)
def test_reloads_under_load(
    pair: tuple[Path, Path], tmp_path: Path, way: str, reloads: int
) -> None:
    """Each result comes from one bundle, and the current bundle is the latest one."""
    scorers = [Scorer.load(bundle) for bundle in pair]
    allowed = [[verb(scorer) for verb in VERBS] for scorer in scorers]
    assert all(ours != other for ours, other in zip(*allowed, strict=True))
    path = tmp_path / "b"

    def replace(bundle: Path) -> None:
        if way == "renamed":
            put(bundle, path)
        else:
            point(path, bundle)

    replace(pair[0])
    reloaded, stop = threading.Semaphore(0), threading.Event()
    wrong: list[Any] = []
    answered = [0, 0]

    def ask(watched: WatchedScorer) -> None:
        while not stop.is_set():
            for number, verb in enumerate(VERBS):
                try:
                    result = verb(watched)
                except Exception as error:
                    wrong.append(error)
                    return
                matches = [result == results[number] for results in allowed]
                if not any(matches):
                    wrong.append((number, result))
                    return
                answered[matches.index(True)] += 1

    watched = Scorer.watch(path, interval=0.001, on_reload=lambda _: reloaded.release())
    with watched:
        threads = [threading.Thread(target=ask, args=(watched,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(1, reloads + 1):
                replace(pair[turn % 2])
                assert reloaded.acquire(timeout=SECONDS), watched.last_error
                assert watched.current.version == scorers[turn % 2].version
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert wrong == []
        assert watched.last_error is None
        assert watched.reloads == reloads
        assert [verb(watched) for verb in VERBS] == allowed[0]
        assert min(answered) > reloads, "both bundles answered many calls"
