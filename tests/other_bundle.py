"""A second bundle, whose answers differ from those of tests/bundles.py, and ways to swap both."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import bundles


def write_other_bundle(path: Path) -> Path:
    """Write the tiny bundle with other vectors in each of its graphs, and other titles.

    All graphs differ, so an answer computed from parts of both bundles differs from both.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bundles.USERS, "1", [2.0, 0.5])
        patch.setitem(bundles.USERS, "2", [0.25, 2.0])
        patch.setitem(bundles.USERS, bundles.UNKNOWN, [0.75, 1.5])
        patch.setitem(bundles.ITEMS, "10", [1.5, 0.25])
        patch.setitem(bundles.ITEMS, "20", [0.125, 2.0])
        patch.setitem(bundles.ITEMS, bundles.UNKNOWN, [0.5, 0.125])
        patch.setitem(bundles.HOURS, "12", [-1.5])
        patch.setitem(bundles.HOURS, "21", [-2.0])
        titles = {key: f"Other {key}" for key in bundles.TITLES}
        return bundles.write_bundle(path, titles=titles)


def put(bundle: Path, path: Path) -> None:
    """Replace the bundle at ``path`` by a copy of ``bundle``, by renames as the exporter does."""
    draft, aside = path.with_name(f".{path.name}.draft"), path.with_name(f".{path.name}.old")
    shutil.copytree(bundle, draft)
    if path.exists():
        path.rename(aside)
    draft.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def point(link: Path, bundle: Path) -> None:
    """Point a link to another bundle, atomically."""
    draft = link.with_name(f".{link.name}.link")
    draft.symlink_to(bundle)
    os.replace(draft, link)
