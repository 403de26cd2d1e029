"""MkDocs hooks: generate the references of the configuration and of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from hvdrec.cli.fields import field_options, show_default, show_type
from hvdrec.cli.parser import make_parser

CONFIGURATION, COMMAND_LINE = "<!-- configuration -->", "<!-- command line -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of generated parts."""
    if CONFIGURATION in markdown:
        markdown = markdown.replace(CONFIGURATION, configuration())
    if COMMAND_LINE in markdown:
        markdown = markdown.replace(COMMAND_LINE, command_line())
    return markdown


def configuration() -> str:
    """Return a section for each table of the configuration, with its fields."""
    sections: dict[str, list[str]] = {}
    for field in field_options():
        *table, name = field.path
        default = "required" if field.default is dataclasses.MISSING else f"`{show_default(field)}`"
        row = f"| `{name}` | {cell(show_type(field.kind))} | {cell(default)} | {cell(field.doc)} |"
        sections.setdefault(".".join(table), []).append(row)
    return "\n\n".join(
        f"## {heading(table)}\n\n| Field | Type | Default | Meaning |\n|---|---|---|---|\n"
        + "\n".join(rows)
        for table, rows in sections.items()
    )


def heading(table: str) -> str:
    """Return a table's name as TOML writes it."""
    if not table:
        return "Top level"
    name = table.removesuffix(".N")
    return f"`[[{name}]]`" if table.endswith(".N") else f"`[{name}]`"


def cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def command_line() -> str:
    """Return the help text of each command."""
    os.environ["COLUMNS"] = "90"
    parser = make_parser()
    commands = next(
        action.choices
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    sections = [f"```text\n{parser.format_help()}```"]
    sections += [
        f"## {name}\n\n```text\n{command.format_help()}```" for name, command in commands.items()
    ]
    return "\n\n".join(sections)
