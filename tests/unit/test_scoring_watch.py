"""Watched bundles: a new bundle is loaded and swapped in, or refused."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hvdrec.scoring import BundleError, RequestError, Scorer, StoreError, scorer, watch
from hvdrec.scoring.bundle import BundleInfo, read_bundle
from hvdrec.scoring.errors import ReplacedError
from hvdrec.scoring.scorer import WatchedScorer
from hvdrec.storage.artifacts import write_manifest
from tests.bundles import write_bundle
from tests.other_bundle import point, put, write_other_bundle

NEVER = 3600.0
SECONDS = 60.0
REQUEST: Any = ("1", ["10", "20", "never seen"], {"hour": 21})


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("ours") / "b")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other_bundle(tmp_path_factory.mktemp("other") / "b")


@pytest.fixture
def path(ours: Path, tmp_path: Path) -> Path:
    put(ours, tmp_path / "b")
    return tmp_path / "b"


def answers(scorer: Scorer | WatchedScorer) -> list[Any]:
    """Return the results of the scoring methods in a form that can be compared."""
    found = scorer.recommend("1", {"hour": 21}, k=3)
    many = scorer.score_many([REQUEST, ("x", ["30"], None)])
    return [scorer.score(*REQUEST).tolist(), [part.tolist() for part in many], found]


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def flip_bit(file: Path) -> bytes:
    """Flip a bit of a file and return its former contents."""
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    return held


def test_a_bundle_renamed_into_place_is_loaded(path: Path, ours: Path, other: Path) -> None:
    with Scorer.watch(path, interval=NEVER) as watched:
        assert answers(watched) == answers(Scorer.load(ours))
        assert not watched.look()
        put(other, path)
        assert watched.look()
        assert not watched.look()
        assert watched.reloads == 1
        assert answers(watched) == answers(Scorer.load(other)) != answers(Scorer.load(ours))
        assert watched.current.info.version == Scorer.load(other).info.version


def test_a_changed_link_is_followed(tmp_path: Path, ours: Path, other: Path) -> None:
    link = tmp_path / "current"
    point(link, ours)
    with Scorer.watch(link, interval=NEVER) as watched:
        assert watched.current.info.path == ours
        point(link, other)
        assert watched.look()
        assert watched.current.info.path == other
        assert answers(watched) == answers(Scorer.load(other))
        point(link, ours)
        assert watched.look()
        assert answers(watched) == answers(Scorer.load(ours))


def test_the_thread_loads_a_new_bundle(path: Path, other: Path) -> None:
    news: list[Scorer] = []
    taken = threading.Event()

    def on_reload(scorer: Scorer) -> None:
        news.append(scorer)
        taken.set()

    with Scorer.watch(path, interval=0.01, on_reload=on_reload) as watched:
        put(other, path)
        assert taken.wait(SECONDS)
        assert news == [watched.current]
        assert answers(watched) == answers(Scorer.load(other))


def test_a_damaged_bundle_is_refused_once_and_loaded_when_repaired(
    path: Path, ours: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[Any] = []
    with Scorer.watch(path, interval=NEVER, on_refused=refused.append) as watched:
        expected = answers(watched)
        put(other, path)
        embeddings = path / "items" / "embeddings.npy"
        held = flip_bit(embeddings)
        for _ in range(3):
            assert not watched.look()
        version = Scorer.load(ours).info.version
        reason = f"{embeddings}: contents differ from the manifest; export the bundle again"
        assert refusals(caplog) == [f"{path}: refused, bundle {version} stays: {reason}"]
        assert [str(error) for error in refused] == [reason]
        assert watched.last_error is refused[0]
        assert isinstance(watched.last_error, BundleError)
        assert (answers(watched), watched.reloads) == (expected, 0)

        (path / "ranker.onnx").unlink()
        assert not watched.look()
        assert str(watched.last_error) == f"{path}/ranker.onnx: is missing; export the bundle again"
        assert len(refusals(caplog)) == 1, "the manifest is the same"

        shutil.copy(other / "ranker.onnx", path)
        embeddings.write_bytes(held)
        assert watched.look()
        assert watched.last_error is None
        assert answers(watched) == answers(Scorer.load(other))

        put(ours, path)
        (path / "manifest.json").write_text("{")
        assert not watched.look()
        assert len(refusals(caplog)) == 2


def test_the_error_of_a_refused_bundle_keeps_no_references(path: Path, other: Path) -> None:
    with Scorer.watch(path, interval=NEVER) as watched:
        put(other, path)
        flip_bit(path / "users" / "embeddings.npy")
        watched.look()
        error = watched.last_error
        assert error is not None
        assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


def test_a_missing_bundle_is_refused_at_the_second_look(
    path: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Scorer.watch(path, interval=NEVER) as watched:
        expected = answers(watched)
        shutil.rmtree(path)
        assert not watched.look()
        assert (refusals(caplog), watched.last_error) == ([], None)
        for _ in range(3):
            assert not watched.look()
        assert len(refusals(caplog)) == 1
        assert str(watched.last_error).startswith(f"{path}: is not a bundle")
        assert answers(watched) == expected
        put(other, path)
        assert watched.look()
        assert answers(watched) == answers(Scorer.load(other))


def test_a_bundle_copied_file_by_file_is_loaded_when_complete(
    path: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = sorted(file.relative_to(other) for file in other.rglob("*") if file.is_file())
    files.remove(Path("manifest.json"))
    with Scorer.watch(path, interval=NEVER) as watched:
        expected = answers(watched)
        shutil.rmtree(path)
        # The manifest is copied first; each look sees one more file.
        for file in [Path("manifest.json"), *files]:
            assert not watched.look()
            assert answers(watched) == expected
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(other / file, path / file)
        assert watched.look()
        assert answers(watched) == answers(Scorer.load(other))
        assert len(refusals(caplog)) == 1


class Gate:
    """A store of users whose lookups of the key "gate" wait until the gate is opened."""

    dtype = "string"
    model = ""

    def __init__(self) -> None:
        self.asked, self.opened = threading.Event(), threading.Event()
        self.opened.set()
        self.fails = False

    def open_for(self, info: BundleInfo) -> tuple[Gate, None]:
        """Take the model of a bundle, as a store of that model would."""
        self.model = info.model
        return self, None

    def lookup(self, keys: Sequence[str | int | None]) -> tuple[Any, Any]:
        if self.fails:
            raise StoreError("the store is down")
        if keys == ["gate"]:
            self.asked.set()
            assert self.opened.wait(SECONDS)
        found = np.array([key == "gate" for key in keys])
        return np.repeat(found, 3).reshape(-1, 3).astype(np.float32), found


def test_a_running_call_ends_on_the_old_bundle_which_is_then_freed(
    path: Path, ours: Path, other: Path
) -> None:
    gate = Gate()
    gate.open_for(read_bundle(ours, verify=False))
    expected = Scorer.load(ours, users=gate).score("gate", ["10", "20"])
    found: list[Any] = []
    with Scorer.watch(path, interval=NEVER, stores=gate.open_for) as watched:
        gate.opened.clear()
        gate.asked.clear()
        old = weakref.ref(watched.current)
        call = threading.Thread(target=lambda: found.append(watched.score("gate", ["10", "20"])))
        call.start()
        assert gate.asked.wait(SECONDS)
        put(other, path)
        assert watched.look()
        gc.collect()
        assert old() is not None
        gate.opened.set()
        call.join()
        np.testing.assert_array_equal(found[0], expected)
        gc.collect()
        assert old() is None
        assert watched.score("gate", ["10", "20"]).tolist() != expected.tolist()


def test_a_bundle_is_loaded_again_after_its_store_did_not_answer(
    path: Path, other: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    asked: list[str] = []

    def stores(info: BundleInfo) -> tuple[Gate, None]:
        asked.append(info.model)
        return gate.open_for(info)

    with Scorer.watch(path, interval=NEVER, stores=stores) as watched:
        put(other, path)
        gate.fails = True
        monkeypatch.setattr(watch, "PAUSES", 1e9)
        for _ in range(3):
            assert not watched.look()
        assert isinstance(watched.last_error, StoreError)
        assert len(asked) == 2, "a retry at every look would read the bundle again and again"
        gate.fails = False
        (path / "note").touch()  # the next look retries because a file changed
        monkeypatch.setattr(watch, "PAUSES", 0.0)
        gate.fails = True
        assert not watched.look()
        gate.fails = False
        assert watched.look()
        assert (watched.last_error, len(refusals(caplog))) == (None, 1)
        assert watched.current.model == asked[-1] != asked[0]


def test_stores_of_a_replaced_bundle_are_not_used(path: Path, other: Path) -> None:
    """Otherwise vectors of one model would be scored by graphs of another."""
    gate = Gate()
    opened: list[BundleInfo] = []

    def stores(info: BundleInfo) -> tuple[Gate, None]:
        opened.append(info)
        if len(opened) == 1:
            put(other, path)
        return gate.open_for(info)

    with Scorer.watch(path, interval=NEVER, stores=stores) as watched:
        assert [info.model for info in opened] == [opened[0].model, watched.current.model]
        assert opened[0].model != watched.current.model


def change_ranker(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    graph = onnx.load(bundle / "ranker.onnx")
    change(graph)
    onnx.save(graph, bundle / "ranker.onnx")
    meta = json.loads((bundle / "manifest.json").read_text())["meta"]
    write_manifest(bundle, "bundle", meta)


def fails_when_it_runs(graph: onnx.ModelProto) -> None:
    # An odd number of scores cannot be reshaped to [7, 11].
    node = graph.graph.node[-1]
    name, node.output[0] = node.output[0], "whole"
    graph.graph.node.extend(
        [
            onnx.helper.make_node("Reshape", ["whole", "odd"], ["reshaped"]),
            onnx.helper.make_node("Flatten", ["reshaped"], [name], axis=0),
        ]
    )
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7, 11]), "odd"))


def returns_nan(graph: onnx.ModelProto) -> None:
    node = graph.graph.node[-1]
    name, node.output[0] = node.output[0], "whole"
    graph.graph.node.append(onnx.helper.make_node("Mul", ["whole", "nan"], [name]))
    nan = np.array(np.nan, dtype=np.float32)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(nan, "nan"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fails_when_it_runs, "fails ("),
        (returns_nan, "ranker.onnx: returns [nan, nan, nan] for missing values, expected"),
    ],
)
def test_a_graph_that_fails_is_refused_before_the_swap(
    path: Path, other: Path, change: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    with Scorer.watch(path, interval=NEVER) as watched:
        expected = answers(watched)
        put(other, path)
        change_ranker(path, change)
        Scorer.load(path, verify=True)  # the graph fails only when it runs
        assert not watched.look()
        assert reason in str(watched.last_error)
        assert "\n" not in str(watched.last_error)
        assert answers(watched) == expected


def test_files_of_two_bundles_are_never_mixed(
    path: Path, ours: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some files are read before another bundle replaces the first one, some after."""
    from hvdrec.scoring import ranking as module

    plain = module.GraphSession

    def replacing(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "GraphSession", plain)
        put(other, path)
        return plain(*arguments)

    monkeypatch.setattr(module, "GraphSession", replacing)
    assert answers(Scorer.load(path)) == answers(Scorer.load(other))  # the load is repeated

    def always_replacing(*arguments: Any) -> Any:
        put(ours, path)
        return plain(*arguments)

    monkeypatch.setattr(module, "GraphSession", always_replacing)
    with pytest.raises(ReplacedError, match=r"was replaced while the bundle was read"):
        Scorer.load(path)
    monkeypatch.setattr(module, "GraphSession", plain)

    put(ours, path)
    monkeypatch.setattr(module, "GraphSession", replacing)
    with Scorer.watch(path, interval=NEVER) as watched:  # the first load is repeated
        assert answers(watched) == answers(Scorer.load(other))
        put(ours, path)
        monkeypatch.setattr(module, "GraphSession", replacing)
        assert not watched.look()
        assert watched.last_error is None
        assert watched.look()
        assert answers(watched) == answers(Scorer.load(other))


def test_a_link_that_changes_during_loading_is_resolved_once(
    tmp_path: Path, ours: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files come from the directory that the link pointed to when loading began."""
    from hvdrec.scoring import ranking as module

    link, plain = tmp_path / "current", module.GraphSession
    point(link, ours)

    def pointing(*arguments: Any) -> Any:
        point(link, other)
        return plain(*arguments)

    monkeypatch.setattr(module, "GraphSession", pointing)
    assert answers(Scorer.load(link)) == answers(Scorer.load(ours))


def test_only_one_thread_looks_at_a_time(
    path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    with Scorer.watch(path, interval=NEVER) as watched:
        plain = scorer.verify_arrays

        def looking(info: Any) -> None:
            seen.append(watched.look())
            plain(info)

        monkeypatch.setattr(scorer, "verify_arrays", looking)
        put(other, path)
        assert watched.look()
    assert seen == [False]


def test_a_failing_callback_is_logged_and_the_swap_stays(
    path: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("callback")

    with Scorer.watch(path, interval=NEVER, on_reload=fails, on_refused=fails) as watched:
        put(other, path)
        assert watched.look()
        (path / "manifest.json").write_text("[]")
        assert not watched.look()
        texts = [record.getMessage() for record in caplog.records]
        assert texts.count(f"{path}: the callback failed") == 2
        assert watched.reloads == 1


def test_close_ends_the_thread_and_keeps_the_bundle(path: Path, other: Path) -> None:
    watched = Scorer.watch(path, interval=0.001)
    thread = watched._thread
    expected = answers(watched)
    watched.close()
    watched.close()
    assert not thread.is_alive()
    put(other, path)
    assert answers(watched) == expected


def test_a_callback_may_close_the_watcher(path: Path, other: Path) -> None:
    closed = threading.Event()
    watched: list[WatchedScorer] = []

    def on_reload(_: Scorer) -> None:
        watched[0].close()
        closed.set()

    watched.append(Scorer.watch(path, interval=0.001, on_reload=on_reload))
    put(other, path)
    assert closed.wait(SECONDS)
    watched[0]._thread.join(SECONDS)
    assert not watched[0]._thread.is_alive()


def test_the_thread_ends_with_the_last_reference(path: Path) -> None:
    watched = Scorer.watch(path, interval=0.001)
    thread, scorer = watched._thread, weakref.ref(watched.current)
    del watched
    thread.join(SECONDS)
    gc.collect()
    assert not thread.is_alive()
    assert scorer() is None


def test_a_process_that_does_not_close_the_watcher_exits_cleanly(path: Path) -> None:
    program = (
        "import os, sys; from hvdrec.scoring import Scorer\n"
        "watched = Scorer.watch(sys.argv[1], interval=0.0001)\n"
        "for n in range(20): os.utime(sys.argv[1] + '/manifest.json', ns=(n, n)); watched.look()\n"
        "print(watched.score('1', ['10']).shape)"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1,)\n", "")


def test_a_relative_path_is_resolved_once(
    path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    with Scorer.watch("b", interval=NEVER) as watched:
        monkeypatch.chdir("/")
        put(other, path)
        assert watched.look()


@pytest.mark.parametrize("interval", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_an_interval_must_be_positive_and_finite(path: Path, interval: Any) -> None:
    with pytest.raises(RequestError, match=r"^interval = .*: must be a positive number"):
        Scorer.watch(path, interval=interval)


def test_a_damaged_first_bundle_raises(path: Path) -> None:
    flip_bit(path / "items" / "embeddings.npy")
    with pytest.raises(BundleError, match=r"contents differ from the manifest"):
        Scorer.watch(path)
    assert "hvdrec-watch" not in [thread.name for thread in threading.enumerate()]
