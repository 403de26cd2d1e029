"""prepare and export by many workers: the same bytes, one voice, and one end for all."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hvdrec.storage.artifacts import read_manifest, verify_artifact, write_manifest
from tests.parallel.conftest import HVDREC
from tests.parallel.launch import PROGRAMS, launch

MANY = [("mpirun", 4), ("pool", 2)]


def spread(command: list[str], how: str, workers: int) -> tuple[int, str, str]:
    """Run a verb on some workers of a kind."""
    if how == "pool":
        done = launch([*command, "--workers", str(workers)], 1)
    else:
        done = launch(command, workers, how)
    return done.returncode, done.stdout, done.stderr


def checksums(directory: Path) -> dict[str, str]:
    return {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def prepared(small: Path) -> str:
    """Return the configuration that the small run was prepared with."""
    return str(small.with_name("tasks.toml"))


@pytest.fixture
def work(small: Path) -> Path:
    """Return where the small run was prepared, by one process."""
    return small.parent / "work"


@pytest.mark.parametrize(("how", "workers"), MANY)
def test_prepare_writes_the_same_bytes(prepared: str, work: Path, how: str, workers: int) -> None:
    before = checksums(work / "features")
    code, said, told = spread([HVDREC, "prepare", prepared, "--overwrite"], how, workers)
    assert code == 0, told
    assert checksums(work / "features") == before
    assert len(before) == 16
    # One rank talks.
    assert said.count("wrote ") == 1
    assert told.count("encoding train") == 1
    verify_artifact(work / "features", "features")


@pytest.fixture(scope="session")
def bundle(small: Path, train: Callable[..., Path]) -> Path:
    run = train(1, "", into=small.parent / "work/run")
    done = launch([HVDREC, "export", str(run), "--workers", "1"], 1)
    assert done.returncode == 0, done.stderr
    return small.parent / "work/bundle"


@pytest.mark.parametrize(("how", "workers"), [("mpirun", 4), ("pool", 2)])
def test_export_writes_the_same_bytes(bundle: Path, how: str, workers: int) -> None:
    before = checksums(bundle)
    code, said, told = spread(
        [HVDREC, "export", str(bundle.parent / "run"), "--overwrite"], how, workers
    )
    assert code == 0, told
    assert checksums(bundle) == before
    assert said.count("wrote ") == 1
    verify_artifact(bundle, "bundle")


def test_blocks_of_users_come_together_in_order(small: Path, bundle: Path, tmp_path: Path) -> None:
    found = {}
    for how, count in (("pool", 1), ("pool", 3), ("mpirun", 2), ("mpirun", 4)):
        out = tmp_path / f"{how}-{count}"
        program = [sys.executable, str(PROGRAMS / "embed.py"), str(small), str(bundle), str(out)]
        is_pool = how == "pool"
        done = launch([*program, str(count if is_pool else 0)], 1 if is_pool else count, how)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{count - 1} helpers\n"
        found[out.name] = (out / "users/embeddings.npy").read_bytes()
    assert len(set(found.values())) == 1
    # The bundle's were computed in one block of all users.
    ours = np.load(tmp_path / "pool-1/users/embeddings.npy", allow_pickle=False)
    theirs = np.load(bundle / "users/embeddings.npy", allow_pickle=False)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def one_line(told: str) -> str:
    """Return the only line of hvdrec's own about what went wrong."""
    [line] = [line for line in told.splitlines() if line.startswith("hvdrec: error: ")]
    assert "Traceback" not in told
    return line


@pytest.fixture
def spoiled(small: Path, work: Path, tmp_path: Path) -> list[str]:
    """Return how to prepare samples one of which names a user that is in no table."""
    samples = tmp_path / "samples"
    shutil.copytree(work / "samples", samples)
    meta = read_manifest(samples, "samples").meta
    part = max((samples / "train").glob("*.parquet"))
    rows = pq.read_table(part)
    place = rows.column_names.index("user_id")
    users = pc.replace_with_mask(
        rows["user_id"].combine_chunks(),
        pa.array(np.arange(len(rows)) == len(rows) - 5),
        pa.array(["stranger"]),
    )
    pq.write_table(rows.set_column(place, "user_id", users), part)
    write_manifest(samples, "samples", meta)
    features = str(tmp_path / "features")
    options = ["--paths.samples", str(samples), "--paths.features", features]
    return [HVDREC, "prepare", str(small), *options]


@pytest.mark.parametrize(("how", "workers"), [("mpirun", 3), ("pool", 3), ("pool", 1)])
def test_an_error_in_a_worker_ends_all_of_them(
    spoiled: list[str], tmp_path: Path, how: str, workers: int
) -> None:
    code, said, told = spread(spoiled, how, workers)
    assert code == 2, told
    assert "user_id 'stranger' of a sample is in no row of" in one_line(told)
    assert said == ""
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_a_mistake_on_the_first_rank_ends_the_others(small: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    command = [HVDREC, "prepare", str(small), "--paths.samples", missing]
    code, _, told = spread([*command, "--paths.features", str(tmp_path / "new")], "mpirun", 2)
    assert code == 2
    assert f"{missing}: no samples artifact here" in one_line(told)
    code, _, told = spread([HVDREC, "export", str(tmp_path)], "mpirun", 2)
    assert code == 2
    assert "no run here" in one_line(told)


def test_a_rank_that_is_killed_ends_the_job(small: Path, tmp_path: Path) -> None:
    """It is killed while it works: tasks of that rank end it."""
    program = [sys.executable, str(PROGRAMS / "killed.py"), str(tmp_path / "features")]
    done = launch(program, 3, "mpirun", timeout=60)
    assert done.returncode not in (0, 2), done.stderr
    assert re.search(r"signal 9|Killed", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_horovodrun_with_mpi_is_as_mpirun(prepared: str, work: Path) -> None:
    before = checksums(work / "features")
    code, said, told = spread([HVDREC, "prepare", prepared, "--overwrite"], "horovodrun-mpi", 2)
    assert code == 0, told
    assert said.count("wrote ") == 1
    assert checksums(work / "features") == before


def test_horovodrun_without_mpi_says_what_to_do(prepared: str, work: Path) -> None:
    before = checksums(work / "features")
    code, _, told = spread([HVDREC, "prepare", prepared, "--overwrite"], "horovodrun", 2)
    assert code != 0
    assert told.count("hvdrec: error: these ranks have no MPI") == 1
    assert "mpirun or horovodrun --mpi, or by itself with --workers N" in told
    assert checksums(work / "features") == before
