"""Tests of prepare and export with several workers: the same bytes, one report, a common end."""

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
    """Run a command on a number of workers, as a local pool or with a launcher."""
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
    code, output, errors = spread([HVDREC, "prepare", prepared, "--overwrite"], how, workers)
    assert code == 0, errors
    assert checksums(work / "features") == before
    assert len(before) == 23
    # Only rank 0 reports.
    assert output.count("wrote ") == 1
    assert errors.count("encoding train") == 1
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
    code, output, errors = spread(
        [HVDREC, "export", str(bundle.parent / "run"), "--overwrite"], how, workers
    )
    assert code == 0, errors
    assert checksums(bundle) == before
    assert output.count("wrote ") == 1
    verify_artifact(bundle, "bundle")


def test_blocks_of_users_are_written_in_order(small: Path, bundle: Path, tmp_path: Path) -> None:
    written = {}
    for how, count in (("pool", 1), ("pool", 3), ("mpirun", 2), ("mpirun", 4)):
        out = tmp_path / f"{how}-{count}"
        program = [sys.executable, str(PROGRAMS / "embed.py"), str(small), str(bundle), str(out)]
        is_pool = how == "pool"
        done = launch([*program, str(count if is_pool else 0)], 1 if is_pool else count, how)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{count - 1} helpers\n"
        written[out.name] = (out / "users/embeddings.npy").read_bytes()
    assert len(set(written.values())) == 1
    # The bundle computed all users in one block.
    ours = np.load(tmp_path / "pool-1/users/embeddings.npy", allow_pickle=False)
    theirs = np.load(bundle / "users/embeddings.npy", allow_pickle=False)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def one_line(errors: str) -> str:
    """Return the only error line of hvdrec."""
    [line] = [line for line in errors.splitlines() if line.startswith("hvdrec: error: ")]
    assert "Traceback" not in errors
    return line


@pytest.fixture
def broken_samples(small: Path, work: Path, tmp_path: Path) -> list[str]:
    """Return a command that prepares samples in which one user is in no table."""
    samples = tmp_path / "samples"
    shutil.copytree(work / "samples", samples)
    meta = read_manifest(samples, "samples").meta
    part = max((samples / "train").glob("*.parquet"))
    rows = pq.read_table(part)
    column = rows.column_names.index("user_id")
    users = pc.replace_with_mask(
        rows["user_id"].combine_chunks(),
        pa.array(np.arange(len(rows)) == len(rows) - 5),
        pa.array(["stranger"]),
    )
    pq.write_table(rows.set_column(column, "user_id", users), part)
    write_manifest(samples, "samples", meta)
    features = str(tmp_path / "features")
    options = ["--paths.samples", str(samples), "--paths.features", features]
    return [HVDREC, "prepare", str(small), *options]


@pytest.mark.parametrize(("how", "workers"), [("mpirun", 3), ("pool", 3), ("pool", 1)])
def test_an_error_in_a_worker_ends_all_workers(
    broken_samples: list[str], tmp_path: Path, how: str, workers: int
) -> None:
    code, output, errors = spread(broken_samples, how, workers)
    assert code == 2, errors
    assert "has no row for user_id 'stranger'" in one_line(errors)
    assert output == ""
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_an_error_on_rank_0_ends_the_others(small: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    command = [HVDREC, "prepare", str(small), "--paths.samples", missing]
    code, _, errors = spread([*command, "--paths.features", str(tmp_path / "new")], "mpirun", 2)
    assert code == 2
    assert f"{missing}: no samples artifact here" in one_line(errors)
    code, _, errors = spread([HVDREC, "export", str(tmp_path)], "mpirun", 2)
    assert code == 2
    assert "no run here" in one_line(errors)


def test_a_killed_rank_ends_the_job(small: Path, tmp_path: Path) -> None:
    """A task kills the rank that runs it."""
    program = [sys.executable, str(PROGRAMS / "killed.py"), str(tmp_path / "features")]
    done = launch(program, 3, "mpirun", timeout=60)
    assert done.returncode not in (0, 2), done.stderr
    assert re.search(r"signal 9|Killed", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_horovodrun_with_mpi_works_like_mpirun(prepared: str, work: Path) -> None:
    before = checksums(work / "features")
    code, output, errors = spread([HVDREC, "prepare", prepared, "--overwrite"], "horovodrun-mpi", 2)
    assert code == 0, errors
    assert output.count("wrote ") == 1
    assert checksums(work / "features") == before


def test_horovodrun_without_mpi_is_refused(prepared: str, work: Path) -> None:
    before = checksums(work / "features")
    code, _, errors = spread([HVDREC, "prepare", prepared, "--overwrite"], "horovodrun", 2)
    assert code != 0
    assert errors.count("hvdrec: error: these ranks have no MPI") == 1
    assert "mpirun or horovodrun --mpi, or as one process with --workers N" in errors
    assert checksums(work / "features") == before
