"""Open tables for a first look, which reads a bounded number of rows of each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hvdrec.config.data_sections import TableFormat
from hvdrec.errors import invalid_file
from hvdrec.samples.engine import Engine, connect
from hvdrec.samples.raw_files import SUFFIXES, RawFiles, find_files
from hvdrec.start.profile import TableProfile, profile
from hvdrec.start.sniff import sniff

TEXT_BYTES = 1 << 26
"""Of text tables, the first 64 MiB (uncompressed) are looked at."""


@dataclass(frozen=True)
class Look:
    """Tables that were looked at, and the engine that holds them.

    Attributes:
        engine: The engine, open.
        raw: Common directory of the tables, for ``paths.raw``.
        tables: Descriptions of the tables, in the order given.
    """

    engine: Engine
    raw: Path
    tables: tuple[TableProfile, ...]


@contextmanager
def look_at(paths: Sequence[Path]) -> Iterator[Look]:
    """Open tables, find the form of text files, and describe the columns.

    Args:
        paths: Files, directories or globs.

    Raises:
        UserError: A table cannot be found or read.
    """
    raw = _common_directory(paths)
    names = [os.path.relpath(path, raw) for path in paths]
    with TemporaryDirectory(prefix="hvdrec-init-") as folder:
        formats, sources = [], []
        for number, name in enumerate(names):
            files = find_files(raw, name, _any_format(raw, name))
            declared = sniff(files, name)
            formats.append(declared)
            sources.append(_source(files, name, declared, Path(folder, str(number))))
        declared_heads = [each.options for each in sources if each.options.path in each.paths]
        with connect([*filter(None, formats), *declared_heads]) as engine:
            tables = []
            for name, declared, source in zip(names, formats, sources, strict=True):
                where, what = (
                    (raw, name) if source.file == raw / name else (Path(), source.paths[0])
                )
                view = str(engine.read(where, what).get_name())
                found = profile(engine, view, name, declared)
                if not found.rows:
                    raise invalid_file(raw / name, "the table is empty", "provide rows")
                tables.append(found)
            yield Look(engine, raw, tuple(tables))


def _common_directory(paths: Sequence[Path]) -> Path:
    """Return the directory that holds all tables, without wildcards."""
    parents = []
    for path in paths:
        parent = path.parent
        while any(mark in str(parent) for mark in "*?["):
            parent = parent.parent
        parents.append(os.path.abspath(parent))
    common = os.path.commonpath(parents)
    relative = os.path.relpath(common)
    return Path(common if relative.startswith("..") else relative)


def _any_format(raw: Path, name: str) -> TableFormat | None:
    """Return a format that accepts any suffix if the suffix of the name is unknown, else None."""
    path = raw / name
    known = path.is_dir() or str(path).endswith(tuple(SUFFIXES))
    return None if known else TableFormat(path=name)


def _source(files: RawFiles, name: str, declared: TableFormat | None, folder: Path) -> RawFiles:
    """Return the files to look at: the table itself, or a copy of the head of a large text file."""
    if files.format not in ("csv", "json"):
        return files
    sizes = [os.path.getsize(path) for path in files.paths]
    if sum(sizes) <= TEXT_BYTES and not files.paths[0].endswith(".gz"):
        return files
    folder.mkdir()
    copy = folder / f"head.{'jsonl' if files.format == 'json' else 'csv'}"
    with files.open(files.paths[0]) as source, copy.open("wb") as target:
        head = source.read(TEXT_BYTES)
        end = head.rfind(b"\n") + 1 if len(head) == TEXT_BYTES else len(head)
        target.write(head[:end])
    options = replace(declared or TableFormat(path=name), path=str(copy))
    return replace(files, file=copy, paths=(str(copy),), options=options, partitions={})
