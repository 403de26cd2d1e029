"""Parts of an HTML page: tables, notes, and the page with its style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2430;--soft:#5c6773;--line:#dfe4ea;--panel:#f6f8fa;
--c0:#0b7a75;--c1:#c2571a;--c2:#5b5fc7;--c3:#a8326e;--c4:#6b7a1f}
@media(prefers-color-scheme:dark){:root{--bg:#12171d;--fg:#e4e9ee;--soft:#9aa7b4;--line:#2c3641;
--panel:#1a2129;--c0:#4fc3bd;--c1:#f0955c;--c2:#9fa2ff;--c3:#ec7fb4;--c4:#bccb62}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:24px 16px 64px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.7em;margin:0 0 4px}h2{margin:44px 0 8px;border-bottom:1px solid var(--line)}
h3{margin:18px 0 6px;font-size:1em}p{margin:6px 0 10px;max-width:75ch}
.soft,.none{color:var(--soft)}.warn{border-left:4px solid var(--c1);padding-left:10px}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:20px}
.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr))}
.grid2>div{min-width:0}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92em}
th,td{padding:3px 10px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td.n,td:first-child{white-space:nowrap}th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right}
td.hit{color:var(--c0);font-weight:600}
svg{display:block;width:100%;max-width:520px;height:auto;background:var(--panel);border-radius:6px}
svg text{fill:var(--soft);font-size:11px}svg .axis{font-size:12px;fill:var(--fg)}
svg .label{fill:var(--fg)}.grid{stroke:var(--line)}.guide{fill:none;stroke:var(--soft);
stroke-dasharray:4 4}.line{fill:none;stroke-width:2}.bar{fill:var(--c0)}
.line.s0{stroke:var(--c0)}.line.s1{stroke:var(--c1)}.line.s2{stroke:var(--c2)}
.line.s3{stroke:var(--c3)}.line.s4{stroke:var(--c4)}
.dot.s0,.key.s0{fill:var(--c0);background:var(--c0)}.dot.s1,.key.s1{fill:var(--c1);background:var(--c1)}
.dot.s2,.key.s2{fill:var(--c2);background:var(--c2)}.dot.s3,.key.s3{fill:var(--c3);background:var(--c3)}
.dot.s4,.key.s4{fill:var(--c4);background:var(--c4)}.mark{fill:none;stroke:var(--fg);stroke-width:2}
.legend span{margin-right:14px}.key{display:inline-block;width:10px;height:10px;margin-right:5px;
border-radius:2px}
pre{background:var(--panel);padding:12px;overflow-x:auto;font-size:.85em;border-radius:6px}
summary{cursor:pointer;color:var(--c0)}nav a{margin-right:14px;white-space:nowrap}a{color:var(--c0)}
@media print{:root{--bg:#fff;--fg:#000}body{max-width:none;font-size:11px}nav{display:none}
h2{break-after:avoid}table,svg,.grid2>div{break-inside:avoid}}
"""


def number(value: object, digits: int = 4) -> str:
    """Format a cell: floats with `digits` decimals, integers with commas, missing values as n/a."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format an HTML table; columns of numbers are aligned on the right."""
    if not rows:
        return '<p class="none">no rows</p>'
    is_number = [
        all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        for i in range(len(headers))
    ]
    kinds = [' class="n"' if each else "" for each in is_number]
    head = "".join(
        f"<th{kind}>{escape(name)}</th>" for name, kind in zip(headers, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(number(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def text(content: str, kind: str = "") -> str:
    """Format a paragraph; kind "warn" or "soft" changes its look."""
    return f'<p class="{kind}">{escape(content)}</p>'


def columns(*parts: tuple[str, str], wide: bool = False) -> str:
    """Put parts, each a heading and its HTML, side by side where there is room.

    With `wide`, each part gets more width.
    """
    cells = "".join(f"<div><h3>{escape(title)}</h3>{body}</div>" for title, body in parts)
    return f'<div class="grid2{" wide" if wide else ""}">{cells}</div>'


def details(summary: str, content: str) -> str:
    """Format preformatted text that is folded until it is clicked."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(content)}</pre></details>"


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return the whole page. A section is a heading and its HTML; it is left out if this is ""."""
    shown = [(heading, body) for heading, body in sections if body]
    links = " ".join(
        f'<a href="#s{index}">{escape(heading)}</a>' for index, (heading, _) in enumerate(shown)
    )
    parts = "".join(
        f'<section id="s{index}"><h2>{escape(heading)}</h2>{body}</section>'
        for index, (heading, body) in enumerate(shown)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p><nav>{links}</nav>'
        f"{parts}</body></html>\n"
    )
