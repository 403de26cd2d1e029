"""Features and bundles in an S3 store: a local server that is stopped and restarted."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diskcache import FanoutCache
from moto.server import ThreadedMotoServer

from hvdrec.config import load_config
from hvdrec.config.data_sections import Loader
from hvdrec.data.loader import ShardLoader
from hvdrec.errors import UserError
from hvdrec.samples.engine import connect
from hvdrec.storage.artifacts import MANIFEST, read_manifest, verify_artifact
from hvdrec.storage.urls import Url
from tests.integration.conftest import SmallRun, hvdrec, succeed
from tests.integration.test_bad_input import refused


class Server:
    """A server that can be stopped and restarted at its address without losing data."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = Server()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client must not retry by itself
        patch.setenv("NO_PROXY", "127.0.0.1")
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("hvdrec")
        yield server
        server.stop()


@pytest.fixture(scope="module")
def features(server: Server, small_run: SmallRun) -> Url:
    """Encode the features of the small run into the store with two workers; return their URL."""
    url = "s3://hvdrec/small/features"
    done = succeed("prepare", small_run.config, "--paths.features", url, "--workers", "2")
    assert done["path"] == url
    return Url(url)


def test_remote_and_local_features_have_equal_files(features: Url, small_run: SmallRun) -> None:
    here = read_manifest(small_run.work / "features", "features")
    there = read_manifest(features, "features")
    assert there.files == here.files
    assert set(features.sizes()) == {MANIFEST, *there.files}


def test_a_run_on_remote_features_and_bundle_equals_a_local_one(
    features: Url, small_run: SmallRun, tmp_path: Path
) -> None:
    run, bundle = tmp_path / "run", "s3://hvdrec/small/bundle"
    options = ["--paths.features", features, "--loader.cache-dir", tmp_path / "cache"]
    trained = succeed("train", small_run.config, "--paths.run", run, *options)
    assert trained["validation"] == small_run.train["validation"]
    # Five shards of 960 training rows and one of 600, in row groups of at most 300.
    assert len(FanoutCache(str(tmp_path / "cache"), 6)) == 5 * 4 + 2
    report = succeed("evaluate", run)
    assert report["ranking"] == small_run.report["ranking"]
    assert report["retrieval"] == small_run.report["retrieval"]
    exported = succeed("export", run, "--to", bundle)
    assert exported["path"] == bundle
    assert exported["parity"] == small_run.export["parity"]
    refused(hvdrec("export", run, "--to", bundle), f"{bundle}: already exists; pass --overwrite")

    to = tmp_path / "served"
    assert succeed("fetch", bundle, to) == {"path": str(to), "source": bundle, "fetched": True}
    assert succeed("fetch", bundle, to)["fetched"] is False
    files = verify_artifact(to, "bundle").files
    assert files == read_manifest(small_run.work / "bundle", "bundle").files
    asked = ("--user", "u1", "--scene", "hour=23", "-k", "5")
    ours, theirs = (
        succeed("recommend", place, *asked)["items"] for place in (to, small_run.work / "bundle")
    )
    assert ours == theirs


def test_each_row_is_delivered_once_while_the_server_restarts(
    server: Server, features: Url, small_run: SmallRun, caplog: pytest.LogCaptureFixture
) -> None:
    retried = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "no response" in record.getMessage():
                retried.set()

    def restart() -> None:
        assert retried.wait(120)
        server.start()

    loader = ShardLoader(
        features / "train",
        load_config(small_run.config).schema,
        Loader(shuffle_rows=300, prefetch=1),
        batch_size=100,
        rank=0,
        world_size=1,
    )
    listener, restarter = Listener(), threading.Thread(target=restart)
    logger = logging.getLogger("hvdrec.storage.urls")
    logger.addHandler(listener)
    rows: list[tuple[int, int, float, float]] = []
    try:
        for number, batch in enumerate(loader.epoch(0)):
            if number == 3:
                server.stop()
                restarter.start()
            columns = (batch.user_index, batch.item_index, batch.label, batch.features["age"])
            rows += zip(*(column[: batch.rows].tolist() for column in columns), strict=True)
    finally:
        logger.removeHandler(listener)
        retried.set()
        restarter.join()
    here = ShardLoader(
        small_run.work / "features/train",
        load_config(small_run.config).schema,
        batch_size=4800,
        rank=0,
        world_size=1,
        shuffle=False,
    )
    [whole] = here.epoch(0)
    columns = (whole.user_index, whole.item_index, whole.label, whole.features["age"])
    expected = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(rows) == 4800
    assert sorted(rows) == sorted(expected)
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        re.match(r"hvdrec/small/features/train/.*: responds again after .* s", line)
        for line in lines
    )


@pytest.mark.usefixtures("server")
def test_a_missing_remote_artifact_is_refused_in_one_line(
    small_run: SmallRun, tmp_path: Path
) -> None:
    url = "s3://hvdrec/nowhere"
    done = hvdrec(
        "train", small_run.config, "--paths.features", url, "--paths.run", tmp_path / "run"
    )
    refused(done, f"{url}: no features artifact here (manifest.json is missing)")
    refused(hvdrec("fetch", url, tmp_path / "to"), f"{url}: no bundle artifact here")
    assert list(tmp_path.iterdir()) == []
    refused(
        hvdrec("samples", small_run.config, "--paths.samples", url),
        f"paths.samples = '{url}': must be a directory",
    )


def test_raw_tables_in_the_store(server: Server) -> None:
    store = Url("s3://hvdrec/raw").filesystem
    store.pipe("hvdrec/raw/log/day=1/a.csv", b"x,y\n1,2\n")
    store.pipe("hvdrec/raw/log/day=2/b.csv", b"x,y\n3,4\n")
    store.pipe("hvdrec/raw/t.jsonl", b'{"x": 1}\n')
    with store.open("hvdrec/raw/t.parquet", "wb") as file:
        pq.write_table(pa.table({"x": [5]}), file)
    with connect() as engine:
        for raw, name, rows in (
            (Url("s3://hvdrec/raw"), "log", 2),
            (Path("data"), "s3://hvdrec/raw/log/*/*.csv", 2),
            (Url("s3://hvdrec/raw"), "t.jsonl", 1),
            (Url("s3://hvdrec/raw"), "t.parquet", 1),
        ):
            columns = engine.collect(engine.read(raw, name))
            assert len(columns["x"]) == rows, name
            assert ("day" in columns) == (rows == 2)
        with pytest.raises(UserError) as raised:
            engine.read(Url("s3://hvdrec/raw"), "none.csv")
    assert raised.value.field == "s3://hvdrec/raw/none.csv"
