"""Tests of `scripts/gpu_check --pack`: which wheels, what is trimmed, the limit of the size."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "gpu"))
import pack  # noqa: E402


def write_wheel(file: Path, names: list[str]) -> None:
    """Write a wheel whose files hold their own names."""
    record = "".join(f"{name},sha256=x,1\n" for name in names)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, name)
        archive.writestr("demo-1.0.dist-info/RECORD", record)


def test_versions_are_those_of_the_constraints() -> None:
    constraints = "# why\npyarrow==26.0.1\npyyaml==6.0.3\nPydantic-Core==2.1\n"
    names = ["PyYAML", "pyarrow", "pydantic-core", "wheel"]
    expected = ["PyYAML==6.0.3", "pyarrow==26.0.1", "pydantic-core==2.1", "wheel"]
    assert pack.pinned(names, constraints) == expected


def test_a_wheel_loses_unused_files_and_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "UNUSED", {"demo": ("demo/tests/*",)})
    wheel, small = tmp_path / "demo-1.0-py3-none-any.whl", tmp_path / "small.whl"
    write_wheel(wheel, ["demo/__init__.py", "demo/tests/test_a.py"])
    pack.trim(wheel, small)
    with zipfile.ZipFile(small) as archive:
        assert archive.namelist() == ["demo/__init__.py", "demo-1.0.dist-info/RECORD"]
        assert archive.read("demo/__init__.py") == b"demo/__init__.py"
        assert archive.read("demo-1.0.dist-info/RECORD") == b"demo/__init__.py,sha256=x,1\n"


def test_the_archive_holds_all_parts_and_their_sizes_add_up(tmp_path: Path) -> None:
    content = tmp_path / "content"
    (content / "wheels").mkdir(parents=True)
    (content / "repository" / "scripts").mkdir(parents=True)
    (content / "wheels" / "small.whl").write_bytes(b"s")
    (content / "wheels" / "large.whl").write_bytes(bytes(1000))
    (content / "repository" / "scripts" / "a").write_text("a")
    (content / "requirements.txt").write_text("numpy\n")
    names = [str(path.relative_to(content)) for path in pack.parts_of(content)]
    assert names == ["wheels/large.whl", "wheels/small.whl", "repository", "requirements.txt"]
    items = pack.compress(content, tmp_path / "pack.tar.xz", lambda line: None)
    assert [item.name for item in items[:-1]] == names
    assert sum(item.size for item in items) == (tmp_path / "pack.tar.xz").stat().st_size
    with tarfile.open(tmp_path / "pack.tar.xz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    assert (tmp_path / "there" / "repository" / "scripts" / "a").read_text() == "a"
    assert (tmp_path / "there" / "wheels" / "large.whl").read_bytes() == bytes(1000)


def test_one_wheel_of_each_package_is_taken(tmp_path: Path) -> None:
    with pytest.raises(pack.PackError, match="no wheel of"):
        pack.newest_wheels([])
    wheels = [tmp_path / f"{pack.normalized(name)}-1-py3-none-any.whl" for name in pack.NEEDS]
    for wheel in wheels:
        wheel.touch()
    assert pack.newest_wheels(wheels) == wheels
    lines = pack.requirements(wheels).splitlines()
    assert len(lines) == len(pack.NEEDS)
    assert "cmake<4" in lines
    assert any(line.startswith("pyarrow>=") for line in lines)
    assert not any(line.startswith("torch") for line in lines)


def test_a_pack_over_the_limit_names_the_largest_files() -> None:
    items = [pack.Item("wheels/pyarrow.whl", 40_000_000), pack.Item("repository", 3_000_000)]
    pack.check_size(items)
    with pytest.raises(pack.PackError, match=r"43\.0 MB.*pyarrow"):
        pack.check_size(items, limit_mb=42)


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / "kept").write_text("mine")
    assert pack.make_pack(tmp_path, "3.12", lines.append) == 1
    assert "exists" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_start_program_is_a_shell_script_that_names_what_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.write_text(pack.RUN.format(python="3.99", horovod=pack.HOROVOD, archive=pack.ARCHIVE))
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(
        ["sh", str(run)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "is not Python 3.99" in done.stderr
