"""Who differs from whom, in lines for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvdrec
from hvdrec.parallel.agreement import (
    difference,
    different_fields,
    different_versions,
    digest,
    places,
    versions,
)

HOSTS = ["hv1", "hv1", "hv2", "hv2", "hv3"]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([2], "rank 2 on hv2"),
        ([0, 1], "ranks 0, 1 on hv1"),
        ([1, 2, 4], "ranks 1 on hv1 and 2 on hv2 and 4 on hv3"),
    ],
)
def test_places(ranks: list[int], text: str) -> None:
    assert places(ranks, HOSTS) == text


def test_many_places_are_counted() -> None:
    hosts = [f"hv{rank // 8}" for rank in range(64)]
    assert places([*range(1, 8), 63], hosts) == "ranks 1-7 on hv0 and 63 on hv7"
    assert places(range(64), hosts) == (
        "ranks 0-7 on hv0 and 8-15 on hv1 and 16-23 on hv2 and 24-31 on hv3 and "
        "more on 4 other hosts"
    )
    assert places(range(5), list("abcde")).endswith(" and 3 on d and more on another host")


def test_difference_groups_ranks_by_value_and_host() -> None:
    assert difference(["a"] * 5, HOSTS) is None
    assert difference(["a", "a", "b", "b", "a"], HOSTS) == (
        "a on hv1 (ranks 0, 1) and hv3 (rank 4), b on hv2 (ranks 2, 3)"
    )


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=4))
def test_difference_is_none_exactly_where_all_are_alike(values: list[str]) -> None:
    told = difference(values, [f"hv{rank}" for rank in range(len(values))])
    assert (told is None) == (len(set(values)) == 1)
    for rank, value in enumerate(values if told else []):
        part = next(part for part in (told or "").split(", ") if part.startswith(f"{value} on "))
        assert f"hv{rank} (rank {rank})" in part


def test_every_version_that_differs_is_in_the_line() -> None:
    mine = {"hvdrec": "1.0 (source ab)", "torch": "2.13.0", "Python": "3.11"}
    assert different_versions([mine, mine], ["hv1", "hv2"]) is None
    other = {"hvdrec": "1.0 (source cd)", "torch": "2.13.0"}
    assert different_versions([mine, other], ["hv1", "hv2"]) == (
        "different versions: hvdrec 1.0 (source ab) on hv1 (rank 0), 1.0 (source cd) on hv2 "
        "(rank 1); Python 3.11 on hv1 (rank 0), not known on hv2 (rank 1); install the same on "
        "every host"
    )


def test_versions_name_what_runs_here() -> None:
    found = versions()
    assert list(found) == ["hvdrec", "torch", "Horovod", "Python"]
    assert found["hvdrec"].startswith(f"{hvdrec.__version__} (source ")


def test_fields_that_differ_are_named_by_their_place() -> None:
    mine = {"train": {"epochs": 2}, "features": [{"name": "a"}, {"name": "b"}], "seed": 0}
    other = {"train": {"epochs": 2}, "features": [{"name": "a"}, {"name": "c"}], "seed": 0}
    assert different_fields([mine, mine], ["hv1", "hv2"]) is None
    assert different_fields([mine, other], ["hv1", "hv2"]) == (
        'different configurations: features.1.name is "b" on hv1 (rank 0), "c" on hv2 (rank 1); '
        "give every host the same file and arguments"
    )


def test_many_fields_are_counted() -> None:
    mine, other = ({f"field{i}": value for i in range(9)} for value in (1, 2))
    line = different_fields([mine, other], ["hv1", "hv2"])
    assert line is not None
    assert line.count(" is 1 on hv1 (rank 0), 2 on hv2 (rank 1)") == 4
    assert "; 5 more fields differ; " in line


def test_a_digest_is_that_of_a_file_or_of_an_artifacts_manifest(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    assert digest(file) == "not there"
    file.write_bytes(b"abc")
    assert digest(file) == "ba7816bf8f01"  # the standard's own example
    folder.mkdir()
    assert digest(folder) == "a directory"
    (folder / "manifest.json").write_bytes(b"abc")
    assert digest(folder) == digest(file)
