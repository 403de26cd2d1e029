"""Tests of the messages about ranks and hosts that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvdrec
from hvdrec.parallel.agreement import (
    config_differences,
    describe_difference,
    describe_ranks,
    digest,
    version_differences,
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
def test_ranks_are_grouped_by_host(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks, HOSTS) == text


def test_runs_of_ranks_are_shortened_and_further_hosts_counted() -> None:
    hosts = [f"hv{rank // 8}" for rank in range(64)]
    assert describe_ranks([*range(1, 8), 63], hosts) == "ranks 1-7 on hv0 and 63 on hv7"
    assert describe_ranks(range(64), hosts) == (
        "ranks 0-7 on hv0 and 8-15 on hv1 and 16-23 on hv2 and 24-31 on hv3 and "
        "more on 4 other hosts"
    )
    assert describe_ranks(range(5), list("abcde")).endswith(" and 3 on d and more on 1 other host")


def test_a_difference_groups_ranks_by_value_and_host() -> None:
    assert describe_difference(["a"] * 5, HOSTS) is None
    assert describe_difference(["a", "a", "b", "b", "a"], HOSTS) == (
        "a (ranks 0, 1 on hv1 and 4 on hv3), b (ranks 2, 3 on hv2)"
    )


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=4))
def test_a_difference_names_every_rank_unless_all_values_are_equal(values: list[str]) -> None:
    text = describe_difference(values, [f"hv{rank}" for rank in range(len(values))])
    assert (text is None) == (len(set(values)) == 1)
    for rank, value in enumerate(values if text else []):
        part = next(part for part in (text or "").split(")") if f"{value} (" in part)
        assert f"{rank} on hv{rank}" in part


def test_every_different_version_is_named() -> None:
    mine = {"hvdrec": "1.0 (source ab)", "torch": "2.13.0", "Python": "3.11"}
    assert version_differences([mine, mine], ["hv1", "hv2"]) is None
    other = {"hvdrec": "1.0 (source cd)", "torch": "2.13.0"}
    assert version_differences([mine, other], ["hv1", "hv2"]) == (
        "versions differ: hvdrec = 1.0 (source ab) (rank 0 on hv1), 1.0 (source cd) (rank 1 on "
        "hv2); Python = 3.11 (rank 0 on hv1), unknown (rank 1 on hv2); install the same versions "
        "on every host"
    )


def test_versions_are_those_of_this_process() -> None:
    here = versions()
    assert list(here) == ["hvdrec", "torch", "Horovod", "Python"]
    assert here["hvdrec"].startswith(f"{hvdrec.__version__} (source ")


def test_different_fields_have_dotted_names() -> None:
    mine = {"train": {"epochs": 2}, "features": [{"name": "a"}, {"name": "b"}], "seed": 0}
    other = {"train": {"epochs": 2}, "features": [{"name": "a"}, {"name": "c"}], "seed": 0}
    assert config_differences([mine, mine], ["hv1", "hv2"]) is None
    assert config_differences([mine, other], ["hv1", "hv2"]) == (
        'configurations differ: features.1.name = "b" (rank 0 on hv1), "c" (rank 1 on hv2); '
        "use the same file and arguments on every host"
    )


def test_further_fields_are_counted() -> None:
    mine, other = ({f"field{i}": value for i in range(9)} for value in (1, 2))
    line = config_differences([mine, other], ["hv1", "hv2"])
    assert line is not None
    assert line.count(" = 1 (rank 0 on hv1), 2 (rank 1 on hv2)") == 4
    assert "; 5 more fields differ; " in line


def test_a_digest_covers_a_file_or_the_manifest_of_an_artifact(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    assert digest(file) == "missing"
    file.write_bytes(b"abc")
    assert digest(file) == "ba7816bf8f01"  # the example of FIPS 180-2
    folder.mkdir()
    assert digest(folder) == "a directory"
    (folder / "manifest.json").write_bytes(b"abc")
    assert digest(folder) == digest(file)
