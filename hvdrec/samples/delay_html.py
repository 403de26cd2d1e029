"""Draw a report about delays as one HTML file without links, for light and dark screens."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from hvdrec.config.durations import UNITS, duration_text
from hvdrec.samples.delay import ActionDelays, DelayResult, WindowChoice

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 210, 34, 24, 10
TICKS = (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 6 * 3600, 86_400, 7 * 86_400, 30 * 86_400)
"""Delays in seconds at which the axis of time may have a label."""
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d5dae0; --paper: #fff;
  --curve: #00796b; --band: #00796b33; --mark: #b3541e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3acb6; --line: #3a424b;
  --paper: #14181d; --curve: #4db6ac; --band: #4db6ac40; --mark: #f0a36b; } }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p.answer { font-size: 1.05rem; margin: .3rem 0; } .soft, figcaption { color: var(--soft); }
figure { margin: .8rem 0; } svg { width: 100%; height: auto; display: block; }
svg text { font: 10px system-ui, sans-serif; fill: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { padding: .25rem .4rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
@media (max-width: 30rem) { table { font-size: .72rem; } th, td { padding: .25rem .15rem; } }
tr.best td { font-weight: 700; color: var(--mark); }
"""


def render_html(result: DelayResult) -> str:
    """Return the report as one HTML page."""
    title = f"Label delays: {html.escape(result.name)}"
    actions = "\n".join(_action(action) for action in result.actions)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="soft">How long after an exposure its first feedback comes, and what each label window
would catch. Exposures near the end of the log count for as long as they were observed
(Kaplan&ndash;Meier estimate, intervals of 95&nbsp;%).</p>
{actions}
</body>
</html>
"""


def _action(action: ActionDelays) -> str:
    name = html.escape(action.name)
    facts = (
        f"{action.exposures:,} exposures, {action.positives:,} with feedback within "
        f"{action.within}. Window in the configuration: {html.escape(action.configured)}."
    )
    notes = "".join(f"<p class='soft'>Note: {html.escape(note)}.</p>" for note in action.notes)
    if action.seconds is None or action.low is None:
        return f"<h2>{name}</h2><p>{facts}</p>{notes}"
    return f"""<h2>{name}</h2>
<p class="answer">The smallest window that catches {action.share:.0%} of the positives:
<strong>{action.recommended}</strong> <span class="soft">({interval_text(action)})</span></p>
<p class="soft">{facts}</p>{notes}
<figure>{_chart(action)}<figcaption>Share of the positives caught by a window, with its interval.
The time axis is logarithmic.</figcaption></figure>
<div class="scroll">{_table(action)}</div>"""


def interval_text(action: ActionDelays) -> str:
    """Return the 95 % interval of the recommended window as text."""
    low = duration_text((action.low or 0) * UNITS["s"])
    if action.high is None:
        return f"95 % interval: {low} to more than {action.within}"
    return f"95 % interval: {low} to {duration_text(action.high * UNITS['s'])}"


def _table(action: ActionDelays) -> str:
    heads = ("window", "caught", "95&nbsp;%", "missed", "wrong 0", "unsettled")
    rows = "".join(_row(each, each.window == action.recommended) for each in action.choices)
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        "<p class='soft'>caught, missed: share of the positives labelled 1 and 0. wrong 0: share "
        "of the rows labelled 0 that are positives. unsettled: share of the exposures that wait "
        "for the next run. The newest sample is as old as the window.</p>"
    )


def _row(choice: WindowChoice, best: bool) -> str:
    cells = (
        html.escape(choice.window),
        f"{choice.caught:.1%}",
        f"{choice.low:.1%}&ndash;{choice.high:.1%}",
        f"{choice.missed:.1%}",
        f"{choice.wrong_negatives:.2%}",
        f"{choice.unsettled:.1%}",
    )
    mark = " class='best'" if best else ""
    return f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _chart(action: ActionDelays) -> str:
    """Draw the share caught as a function of the window."""
    start, end = action.curve[0][0], action.curve[-1][0]
    span = math.log(end / start) or 1.0

    def across(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * math.log(max(seconds, start) / start) / span

    def up(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    def path(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)

    band: Sequence[tuple[float, float]] = [
        *((x, low) for x, _, low, _ in action.curve),
        *((x, high) for x, _, _, high in reversed(action.curve)),
    ]
    lines = [
        f"<line x1='{LEFT}' x2='{WIDTH - 8}' y1='{up(y):.1f}' y2='{up(y):.1f}' "
        f"stroke='var(--line)'/><text x='{LEFT - 4}' y='{up(y) + 3:.1f}' text-anchor='end'>"
        f"{y:.0%}</text>"
        for y in (0, 0.25, 0.5, 0.75, 1)
    ]
    lines += [
        f"<text x='{across(x):.1f}' y='{HEIGHT - 8}' text-anchor='middle'>"
        f"{duration_text(x * UNITS['s'])}</text>"
        for x in _ticks(start, end)
    ]
    best = across(action.seconds or start)
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='Share of positives caught'>"
        f"{''.join(lines)}<polygon points='{path(band)}' fill='var(--band)'/>"
        f"<polyline points='{path((x, y) for x, y, _, _ in action.curve)}' fill='none' "
        "stroke='var(--curve)' stroke-width='2'/>"
        f"<line x1='{best:.1f}' x2='{best:.1f}' y1='{TOP}' y2='{HEIGHT - BOTTOM}' "
        "stroke='var(--mark)' stroke-dasharray='4 3'/>"
        f"<text x='{best - 4:.1f}' y='{TOP + 8}' text-anchor='end' style='fill: var(--mark)'>"
        f"{action.recommended}</text></svg>"
    )


def _ticks(start: float, end: float) -> list[float]:
    """Return the labels of the axis of time: at most six, and not too close to each other."""
    inside = [x for x in TICKS if start <= x <= end]
    while len(inside) > 6:
        inside = inside[1::2]
    return inside
