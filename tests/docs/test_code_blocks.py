"""Every code block of the README and the documentation runs, on a small film data set."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hvdrec.cli.parser import parse
from hvdrec.config import load_config
from tests.docs.blocks import CodeBlock, code_blocks, hvdrec_commands, run_blocks
from tests.docs.film_data import write_film_data

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
LANGUAGES = {"bash", "python", "toml", "text", "json", "ini"}
MINUTE = 60.0


def page_name(page: Path) -> str:
    """Return a page's path in the repository."""
    return str(page.relative_to(REPOSITORY))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configurations, raw tables, and a trained and exported run."""
    directory = tmp_path_factory.mktemp("docs")
    shutil.copytree(REPOSITORY / "configs", directory / "configs")
    shutil.copytree(REPOSITORY / "examples", directory / "examples")
    write_film_data(directory / "data" / "movielens-1m")
    config = "configs/movielens-1m.toml"
    # Batches of 4096 of these 6000 rows would leave too few steps to beat popularity.
    file = directory / config
    file.write_text(file.read_text().replace("batch_size = 4096", "batch_size = 128"))
    for command in (
        f"samples {config}",
        f"prepare {config}",
        f"train {config} --train.epochs 1",
        "export runs/movielens-1m/run",
    ):
        subprocess.run(
            [Path(sys.executable).parent / "hvdrec", *command.split()], cwd=directory, check=True
        )
    return directory


@pytest.fixture
def workspace(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained directory, with the settings that launchers need on one machine."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(trained, tmp_path / "work")
    return tmp_path / "work"


def runnable(page: Path) -> bool:
    """Return True for a page with a block that runs."""
    return any(b.language in ("bash", "python") and not b.reason for b in code_blocks(page))


@pytest.mark.timeout(20 * MINUTE)
@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=page_name)
def test_blocks_run(page: Path, workspace: Path) -> None:
    # The tables lie there already: tests do not download the data set.
    adapted = workspace / "page.md"
    adapted.write_text(page.read_text().replace("\nhvdrec data movielens-1m\n", "\nhvdrec data\n"))
    ended = run_blocks(adapted, workspace, 20 * MINUTE)
    assert ended.returncode == 0, f"{page_name(page)}: {ended.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_name_their_language(page: Path) -> None:
    fences = [line for line in page.read_text().splitlines() if line.startswith("```")]
    opening = fences[::2]
    assert all(fence.removeprefix("```").strip() in LANGUAGES for fence in opening), opening
    assert len(fences) % 2 == 0


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_of_blocks_that_do_not_run_are_accepted_by_the_parser(page: Path) -> None:
    for block in code_blocks(page):
        if block.reason and block.language == "bash":
            for command in hvdrec_commands(block.code):
                parse(shlex.split(command)[1:])


def toml_blocks() -> list[tuple[Path, CodeBlock]]:
    """Return the TOML blocks of all pages."""
    return [(p, b) for p in PAGES for b in code_blocks(p) if b.language == "toml"]


@pytest.mark.parametrize(
    ("page", "block"),
    toml_blocks(),
    ids=[f"{page_name(page)}:{block.line}" for page, block in toml_blocks()],
)
def test_configuration_blocks_are_valid(page: Path, block: CodeBlock, tmp_path: Path) -> None:
    fragment = tomllib.loads(block.code)
    template = tomllib.loads((REPOSITORY / "configs" / "template.toml").read_text())
    file = tmp_path / "config.toml"
    file.write_text(to_toml(merged(template, fragment)))
    load_config(file)


def merged(base: dict[str, Any], fragment: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with a fragment on top; lists of tables are matched by name."""
    result = dict(base)
    for key, value in fragment.items():
        if isinstance(value, dict):
            result[key] = merged(result.get(key, {}), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            names = [entry.get("name") for entry in value]
            kept = [entry for entry in result.get(key, []) if entry.get("name") not in names]
            result[key] = kept + value
        else:
            result[key] = value
    return result


def to_toml(table: dict[str, Any]) -> str:
    """Write a configuration as TOML with inline tables."""
    return "\n".join(f"{key} = {inline(value)}" for key, value in table.items())


def inline(value: Any) -> str:
    """Write a value as TOML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if not isinstance(value, str) else '"' + escaped(value) + '"'


def escaped(text: str) -> str:
    """Escape a string for TOML."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
