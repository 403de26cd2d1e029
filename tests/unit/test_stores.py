"""Embedding stores: the same tests for a bundle's arrays, SQLite and simulated Redis replies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdrec.scoring.bundle import read_bundle
from hvdrec.scoring.errors import StoreError
from hvdrec.scoring.stores import Store
from hvdrec.scoring.stores.arrays import ArrayStore
from hvdrec.scoring.stores.redis.layout import (
    MARK,
    Names,
    SideInfo,
    VersionInfo,
    buckets_for,
    meta_fields,
    pack,
    parse_meta,
    unpack,
)
from hvdrec.scoring.stores.redis.store import RedisStore, VersionReader
from tests.stores import WIDTH, StoreSuite, make_bundle


class Replies:
    """A Redis server in memory, for the commands of a store; counts round trips."""

    label = "redis://test:6379/0"

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.hashes: dict[str, dict[bytes, bytes]] = {}
        self.trips = 0

    def run(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.trips += 1
        return [getattr(self, name)(*arguments) for name, *arguments in commands]

    def GET(self, key: str) -> bytes | None:
        return self.values.get(key)

    def HGETALL(self, key: str) -> dict[bytes, bytes]:
        return self.hashes.get(key, {})

    def HMGET(self, key: str, *fields: bytes) -> list[bytes | None]:
        return [self.hashes.get(key, {}).get(field) for field in fields]

    def HLEN(self, key: str) -> int:
        return len(self.hashes.get(key, {}))


NAMES = Names("test", "0123456789ab")


def put(replies: Replies, name: str, stores: dict[str, ArrayStore], buckets: int) -> None:
    """Write a version as `publish` does and make it current."""
    sides = {
        side: SideInfo(len(s), WIDTH, s.embeddings.dtype.name, s.dtype, buckets)
        for side, s in stores.items()
    }
    version = VersionInfo(name, "bundle", "now", sides)
    for key in NAMES.all_of(version):
        replies.hashes[key] = {MARK: b"1"}
    meta = {key.encode(): str(value).encode() for key, value in meta_fields(version).items()}
    replies.hashes[NAMES.meta(name)] = meta
    for side, store in stores.items():
        rows = pack(sides[side], store.embeddings, store.scales)
        for key, row in zip(store.keys.tolist(), rows, strict=True):
            field = key if isinstance(key, bytes) else str(key).encode()
            bucket = NAMES.bucket(name, side, sides[side].bucket_of(field))
            replies.hashes[bucket][field] = row
    replies.values[NAMES.current()] = name.encode()


def array_stores(bundle: Path) -> dict[str, ArrayStore]:
    info = read_bundle(bundle, verify=False)
    return {side: ArrayStore(info, side, WIDTH) for side in ("user", "item")}


def redis_stores(replies: Any, keys: str = "string") -> tuple[RedisStore, RedisStore]:
    expected = {side: (WIDTH, keys) for side in ("user", "item")}
    reader = VersionReader(replies, NAMES, expected)
    return RedisStore(reader, "user"), RedisStore(reader, "item")


class TestArrays(StoreSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def open_store(cls) -> StoreSuite.OpenStore:
        def opened(bundle: Path, side: str) -> Store:
            return array_stores(bundle)[side]

        return opened


class TestRedisReplies(StoreSuite):
    @pytest.fixture(scope="class", params=[1, 7], ids="{} buckets".format)
    @classmethod
    def open_store(cls, request: pytest.FixtureRequest) -> StoreSuite.OpenStore:
        def opened(bundle: Path, side: str) -> Store:
            replies, stores = Replies(), array_stores(bundle)
            put(replies, "v1", stores, buckets=request.param)
            users, items = redis_stores(replies, stores[side].dtype)
            return users if side == "user" else items

        return opened


class TestVersions:
    @pytest.fixture
    def replies(self, tmp_path: Path) -> Replies:
        self.stores = array_stores(make_bundle(tmp_path / "bundle"))
        replies = Replies()
        put(replies, "v1", self.stores, buckets=3)
        return replies

    def put(self, replies: Replies, name: str, value: float) -> None:
        for store in self.stores.values():
            store.embeddings = np.full_like(store.embeddings, value)
        put(replies, name, self.stores, buckets=2)

    def test_a_lookup_of_many_keys_is_one_round_trip(self, replies: Replies) -> None:
        users, _ = redis_stores(replies)
        users.lookup(["a"])
        assert replies.trips == 3  # the current version, its metadata, and the rows
        users.lookup(["a", "b", "no such key", *map(str, range(60))])
        assert replies.trips == 4

    def test_the_second_lookup_after_a_switch_reads_the_new_version(self, replies: Replies) -> None:
        users, _ = redis_stores(replies)
        first = users.lookup(["a"])[0].tolist()
        self.put(replies, "v2", 2.0)
        # This lookup learns of the switch in the round trip that reads the old version's rows.
        assert users.lookup(["a"])[0].tolist() == first
        assert users.lookup(["a"])[0].tolist() == [[2.0] * WIDTH]

    def test_items_come_from_the_version_of_their_user(self, replies: Replies) -> None:
        users, items = redis_stores(replies)
        first = users.lookup(["a"])[0], items.lookup(["b"])[0].tolist()
        self.put(replies, "v2", 2.0)
        assert users.lookup(["a"])[0].tolist() == first[0].tolist()
        assert items.lookup(["b"])[0].tolist() == first[1]
        assert users.lookup(["a"])[0].tolist() == [[2.0] * WIDTH]
        assert items.lookup(["b"])[0].tolist() == [[2.0] * WIDTH]

    def test_item_lookups_alone_follow_a_switch_after_a_second(
        self, replies: Replies, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [100.0]
        monkeypatch.setattr("hvdrec.scoring.stores.redis.store.time.monotonic", lambda: now[0])
        users, items = redis_stores(replies)
        users.lookup(["a"])
        first = items.lookup(["b"])[0].tolist()
        self.put(replies, "v2", 2.0)
        for _ in range(3):
            assert items.lookup(["b"])[0].tolist() == first
        now[0] += 1.0
        assert items.lookup(["b"])[0].tolist() == [[2.0] * WIDTH]

    def test_an_expired_version_is_replaced_at_once(self, replies: Replies) -> None:
        users, items = redis_stores(replies)
        users.lookup(["a"])
        self.put(replies, "v2", 2.0)
        for key in [key for key in replies.hashes if ":v1:" in key]:
            del replies.hashes[key]
        assert items.lookup(["b", None])[0].tolist() == [[2.0] * WIDTH, [0.0] * WIDTH]
        assert users.lookup(["a"])[0].tolist() == [[2.0] * WIDTH]

    def test_a_missing_bucket_is_an_error(self, replies: Replies) -> None:
        users, _ = redis_stores(replies)
        for number in range(3):
            key = NAMES.bucket("v1", "user", number)
            kept, replies.hashes[key] = replies.hashes[key], {}
            with pytest.raises(StoreError, match=r"version v1 of .* is incomplete"):
                users.lookup([*map(str, range(60))])
            replies.hashes[key] = kept
        assert users.lookup(["1"])[1].all()

    def test_a_lookup_before_the_first_publication(self) -> None:
        users, _ = redis_stores(Replies())
        with pytest.raises(StoreError, match=r"^redis://test:6379/0: nothing is published under"):
            users.lookup(["a"])
        assert users.lookup([None])[1].tolist() == [False]  # sends no command

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            (b"format", b"2", "format '2', expected 1"),
            (b"user.width", None, "'user.width' is missing"),
            (b"user.width", b"4", "users have string keys and width 4, the bundle has string"),
            (b"item.keys", b"int", "items have int keys and width 3"),
            (b"item.dtype", b"object", "the metadata of items is not valid"),
            (b"user.buckets", b"0", "the metadata of users is not valid"),
            (b"user.rows", b"many", "invalid literal"),
            (b"bundle", b"\xff", "codec can't decode"),
        ],
    )
    def test_damaged_metadata(
        self, replies: Replies, field: bytes, value: bytes | None, reason: str
    ) -> None:
        meta = replies.hashes[NAMES.meta("v1")]
        if value is None:
            del meta[field]
        else:
            meta[field] = value
        users, _ = redis_stores(replies)
        with pytest.raises(StoreError) as caught:
            users.lookup(["a"])
        assert str(caught.value).startswith(
            "redis://test:6379/0: version v1 of model 0123456789ab cannot be read ("
        )
        assert reason in str(caught.value)

    @pytest.mark.parametrize("damage", [b"", b"123", bytes(11), bytes(13), bytes(24)])
    def test_a_row_of_the_wrong_length(self, replies: Replies, damage: bytes) -> None:
        users, _ = redis_stores(replies)
        for number in range(3):
            bucket = replies.hashes[NAMES.bucket("v1", "user", number)]
            if b"ab" in bucket:
                bucket[b"ab"] = damage
        with pytest.raises(StoreError) as caught:
            users.lookup(["a", None, "ab", "b"])
        assert str(caught.value) == (
            "redis://test:6379/0: user 'ab' in version v1 of model 0123456789ab has "
            f"{len(damage)} bytes, expected 12; run hvdrec publish"
        )
        assert users.lookup(["a", "b"])[1].all()


def test_the_bytes_of_a_row() -> None:
    # Worked out by hand: 1 = 3f800000, -2 = c0000000 in float32; 3c00, c000 in float16.
    full, half, small = (SideInfo(1, 2, d, "int", 1) for d in ("float32", "float16", "int8"))
    row = np.array([[1.0, -2.0]], dtype=np.float32)
    assert pack(full, row, None) == [bytes.fromhex("0000803f000000c0")]
    assert pack(half, row.astype(np.float16), None) == [bytes.fromhex("003c00c0")]
    stored, scales = np.array([[2, -127]], np.int8), np.array([0.5], np.float32)
    assert pack(small, stored, scales) == [bytes.fromhex("0000003f0281")]
    assert unpack(full, [bytes.fromhex("0000803f000000c0")] * 2).tolist() == [[1.0, -2.0]] * 2
    assert unpack(half, [bytes.fromhex("003c00c0")]).tolist() == [[1.0, -2.0]]
    assert unpack(small, [bytes.fromhex("0000003f0281")]).tolist() == [[1.0, -63.5]]
    one = SideInfo(1, 1, "int8", "int", 1)
    assert unpack(one, [bytes.fromhex("0000003f02")]).tolist() == [[1.0]]


def test_names_of_keys_and_metadata() -> None:
    # crc32(b"123456789") is the check value of CRC-32.
    assert SideInfo(0, 1, "int8", "int", 1000).bucket_of(b"123456789") == 0xCBF43926 % 1000
    assert [buckets_for(rows) for rows in (0, 1, 16384, 16385, 1_000_000)] == [1, 1, 1, 2, 62]
    sides = {side: SideInfo(5, 2, "int8", "int", 2) for side in ("user", "item")}
    version = VersionInfo("v", "b", "c", sides)
    assert NAMES.all_of(version) == [
        "test:{0123456789ab}:v:meta",
        "test:{0123456789ab}:v:user:0",
        "test:{0123456789ab}:v:user:1",
        "test:{0123456789ab}:v:item:0",
        "test:{0123456789ab}:v:item:1",
    ]
    fields = {k.encode(): str(v).encode() for k, v in meta_fields(version).items()}
    assert parse_meta("v", fields) == version
    for prefix in ("", "a b", "{a}", "a\n"):
        with pytest.raises(StoreError, match=r"^prefix = .*: must be"):
            Names(prefix, "0123456789ab")
