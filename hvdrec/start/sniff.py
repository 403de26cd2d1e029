"""Find the form of a text table from its first bytes: encoding, delimiter, quotes, header."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Sequence

from hvdrec.config.data_sections import TableFormat
from hvdrec.samples.raw_files import RawFiles

HEAD_BYTES = 1 << 20
"""Number of bytes from which the delimiter and the header are found."""
ENCODING_BYTES = 1 << 26
"""Number of bytes that are decoded to find the encoding."""
DELIMITERS = ("\t", "|", ";", ",", "::")
LINES = 500
CONSISTENT = 0.98
"""Share of lines that must have the same number of fields."""
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
DATE = re.compile(r"\s*\d{4}-\d{2}-\d{2}.*|\s*\d{1,2}[-/.]\w{2,3}[-/.]\d{2,4}\s*|https?://.*")
NAME = re.compile(r"[A-Za-z_][\w .:-]{0,63}")


def sniff(files: RawFiles, path: str) -> TableFormat | None:
    """Return the format to declare for a table, or None if its suffix says enough.

    Args:
        files: The files of the table.
        path: The table as the configuration names it.
    """
    if files.format != "csv":
        return None
    head, encoding = read_head(files)
    delimiter, quote = find_delimiter(head)
    rows = split_lines(head[:LINES], delimiter, quote)
    header = has_header(rows)
    plain = delimiter in ",\t;|" and encoding == "utf-8" and header and quote
    if plain and files.options.path == path and _has_known_suffix(files):
        return None
    return TableFormat(
        path=path, delimiter=delimiter, encoding=encoding, header=header, quote='"' if quote else ""
    )


def read_head(files: RawFiles) -> tuple[list[str], str]:
    """Return the first lines of a table, and the encoding that decodes its first 64 MiB."""
    with files.open(files.paths[0]) as file:
        head = file.read(HEAD_BYTES)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return _lines(head, "utf-16"), "utf-16"
        decoder = codecs.getincrementaldecoder("utf-8")()
        encoding, block, left = "utf-8", head, ENCODING_BYTES
        while block and left > 0:
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                # Bytes 0x80 to 0x9f are control characters in Latin-1, and letters in cp1252.
                encoding = "cp1252" if re.search(rb"[\x80-\x9f]", block) else "latin-1"
                break
            left -= len(block)
            block = file.read(HEAD_BYTES)
    return _lines(head, encoding), encoding


def _lines(head: bytes, encoding: str) -> list[str]:
    lines = head.decode(encoding, errors="replace").removeprefix("\ufeff").splitlines()
    return lines[:-1] if len(head) == HEAD_BYTES else lines


def find_delimiter(lines: Sequence[str]) -> tuple[str, bool]:
    """Return a delimiter that gives nearly all lines the same number of fields.

    Among such delimiters, the one with the most fields wins. If there is none, it is a comma. The
    second result is True if fields may be quoted.
    """
    found: list[tuple[int, str, bool]] = []
    for delimiter in DELIMITERS:
        for quote in (True, False):
            widths = [len(row) for row in split_lines(lines[:LINES], delimiter, quote)]
            width = max(set(widths), key=widths.count, default=0)
            if width > 1 and widths.count(width) >= CONSISTENT * len(widths):
                found.append((width, delimiter, quote))
                break
    if not found:
        return ",", True
    width, delimiter, quote = max(found, key=lambda each: each[0])
    return delimiter, quote


def split_lines(lines: Sequence[str], delimiter: str, quote: bool) -> list[list[str]]:
    """Split lines into fields; with `quote`, return no lines if a quote is not closed properly."""
    if len(delimiter) > 1 or not quote:
        return [line.split(delimiter) for line in lines if line]
    text = io.StringIO("\n".join(lines) + "\n")
    try:
        return [row for row in csv.reader(text, delimiter=delimiter, strict=True) if row]
    except csv.Error:
        return []


def has_header(rows: Sequence[Sequence[str]]) -> bool:
    """Return True if the first row looks like names of columns.

    Names are different texts that begin with a letter, and none of them is a value of its column.
    """
    if len(rows) < 2:
        return True
    first, others = rows[0], rows[1:]
    if len(set(first)) < len(first) or not all(NAME.fullmatch(name.strip()) for name in first):
        return False
    if any(DATE.fullmatch(name) for name in first):
        return False
    columns = list(zip(*(row for row in others if len(row) == len(first)), strict=False))
    return not any(name in column for name, column in zip(first, columns, strict=False))


def _has_known_suffix(files: RawFiles) -> bool:
    return files.paths[0].endswith((".csv", ".tsv", ".csv.gz", ".tsv.gz"))
