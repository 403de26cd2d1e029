"""Code blocks of Markdown pages, and a program that runs those of one page in order.

``bash`` and ``python`` blocks run; Python blocks of one page share names. ``toml`` blocks must be
valid configuration. A comment ``<!-- not run: REASON -->`` on the line before a ``bash`` block
says why it cannot run in a test; the parser must still accept its ``hvdrec`` commands.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block: its language, its code, its line, and why it does not run (or empty)."""

    language: str
    code: str
    line: int
    reason: str


def code_blocks(page: Path) -> list[CodeBlock]:
    """Return the fenced blocks of a page in their order."""
    text = page.read_text()
    return [
        CodeBlock(
            match["language"],
            match["code"],
            text.count("\n", 0, match.start("code")) + 1,
            match["reason"] or "",
        )
        for match in FENCE.finditer(text)
    ]


def hvdrec_commands(code: str) -> list[str]:
    """Return the ``hvdrec VERB …`` commands of a shell block, one line each."""
    lines = code.replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:^|[\s;&])(hvdrec [a-z].*)", line) for line in lines)
    return [match[1].split(" #")[0].split(" | ")[0].strip() for match in found if match]


def run_blocks(page: Path, directory: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a page's blocks in a directory, in one process, and return how it ended."""
    blocks = [asdict(block) for block in code_blocks(page) if not block.reason]
    return subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(blocks),
        cwd=directory,
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> None:
    """Run the blocks that standard input lists; stop at the first that fails."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in json.load(sys.stdin):
        print(f"--- line {block['line']}", file=sys.stderr, flush=True)
        if block["language"] == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]], check=True)
        elif block["language"] == "python":
            exec(compile(block["code"], f"line {block['line']}", "exec"), names)


if __name__ == "__main__":
    main()
