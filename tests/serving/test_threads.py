"""One scorer shared by many threads: identical results, and memory does not grow."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hvdrec.scoring import Scorer
from tests.bundles import write_bundle

THREADS = 32
REQUESTS = 1000
SCENES: list[Any] = [
    None,
    {"hour": 21, "place": "home", "temperature": 17.25},
    {"hour": None, "place": "nowhere"},
    {"temperature": float("nan")},
]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer.load(write_bundle(tmp_path_factory.mktemp("bundles") / "b"))


def answer(scorer: Scorer, number: int) -> Any:
    """Return the result of a numbered request; arrays as bytes."""
    scene = SCENES[number % len(SCENES)]
    raw = {"age": float(number % 90), "history": ["10", str(number), "20"][: number % 4]}
    users: list[Any] = ["1", "2", f"never seen {number}", raw, None]
    user = users[number % 5]
    items: list[Any] = ["10", f"new {number}", {"genres": ["War"], "year": number}, "20", "30"]
    variant = number % 7
    if variant == 0:
        return scorer.score(user, ["20"], scene).tobytes()
    if variant == 1:
        requests = [(user, items[:2], scene), (users[(number + 1) % 5], ["10"], None)]
        return [part.tobytes() for part in scorer.score_many(requests)]
    if variant == 2:
        return scorer.recommend(user, scene, k=1 + number % 4, exclude=["10", f"x {number}"])
    if variant == 3:
        return scorer.embed_items(items).tobytes()
    if variant == 4:
        return scorer.score(user, ["10", "20", "30", "40"] * (1 + number % 60), scene).tobytes()
    return scorer.score(user, items, scene).tobytes()


def test_concurrent_results_equal_sequential_ones(scorer: Scorer) -> None:
    expected = [answer(scorer, number) for number in range(REQUESTS)]
    assert len({str(result) for result in expected}) > 300, "the requests differ"
    start = threading.Barrier(THREADS)

    def work(thread: int) -> list[int]:
        """Return the requests with other results; each thread starts at another request."""
        start.wait()
        order = [(number + thread * 31) % REQUESTS for number in range(REQUESTS)]
        return [number for number in order if answer(scorer, number) != expected[number]]

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [[] for _ in range(THREADS)]


def resident_bytes() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def growth(scorer: Scorer, warm_up: Iterator[int], measured: Iterator[int]) -> int:
    """Return the bytes by which the process grows over the measured requests."""
    for number in warm_up:
        answer(scorer, number)
    before = resident_bytes()
    for number in measured:
        answer(scorer, number)
    return resident_bytes() - before


@pytest.mark.slow
def test_memory_does_not_grow_with_requests(scorer: Scorer) -> None:
    """A leak of 100 bytes per request would be 10 MB; every key and scene is new."""
    bytes_more = growth(scorer, iter(range(10_000)), iter(range(10_000, 110_000)))
    assert bytes_more < 5_000_000


def test_memory_does_not_grow_with_short_lived_threads(scorer: Scorer) -> None:
    """A leak of 5 kB per thread, such as thread-local inputs, would be 10 MB."""

    def ask(first: int, last: int) -> None:
        for number in range(first, last):
            thread = threading.Thread(target=answer, args=(scorer, 5 * 7 * number + 4))
            thread.start()
            thread.join()

    ask(0, 500)
    before = resident_bytes()
    ask(500, 2500)
    assert resident_bytes() - before < 5_000_000
