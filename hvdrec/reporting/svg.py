"""Small charts as inline SVG. The page's style sets their colors, for light and for dark mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
TICKS = 4
NOTHING = '<p class="none">not defined for these rows</p>'


def line_chart(
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    diagonal: bool = False,
    mark: tuple[float, float] | None = None,
    unit: bool = False,
) -> str:
    """Draw lines.

    Args:
        series: Name of a line -> its points.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        diagonal: Also draw the line from (0, 0) to (1, 1).
        mark: A point to mark.
        unit: Let both axes run from 0 to 1.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return NOTHING
    everything = [point for points in drawn.values() for point in points]
    bounds = (0.0, 1.0, 0.0, 1.0) if unit else _bounds(everything)
    parts = [_axes(bounds, x, y)]
    if diagonal:
        parts.append(f'<polyline class="guide" points="{_path([(0, 0), (1, 1)], bounds)}"/>')
    for number, points in enumerate(drawn.values()):
        kind = f"s{number % 5}"
        if len(points) > 1:
            parts.append(f'<polyline class="line {kind}" points="{_path(points, bounds)}"/>')
        if len(points) <= 30:
            for point in points:
                cx, cy = _place(point, bounds)
                title = f"<title>{point[0]:.4g}, {point[1]:.4g}</title>"
                parts.append(
                    f'<circle class="dot {kind}" cx="{cx}" cy="{cy}" r="3">{title}</circle>'
                )
    if mark is not None and all(value == value for value in mark):
        cx, cy = _place(mark, bounds)
        parts.append(f'<circle class="mark" cx="{cx}" cy="{cy}" r="6"/>')
    legend = _legend(list(drawn)) if len(drawn) > 1 else ""
    return _figure(parts, f"{y} against {x}") + legend


def bar_chart(values: Mapping[str, float], *, y: str, zero: float = 0.0) -> str:
    """Draw horizontal bars, one for each name, from `zero` to its value."""
    known = {name: value for name, value in values.items() if value == value}
    if not known:
        return NOTHING
    low, high = min(zero, *known.values()), max(zero, *known.values())
    span = (high - low) or 1.0
    left, row = 150, 20
    width = WIDTH - left - 64
    start = left + (zero - low) / span * width
    parts = []
    for number, (name, value) in enumerate(known.items()):
        end = left + (value - low) / span * width
        top = number * row + 4
        parts.append(
            f'<text class="label" x="{left - 6}" y="{top + 11}" text-anchor="end">'
            f"{escape(_short(name))}</text>"
            f'<rect class="bar" x="{min(start, end):.1f}" y="{top}" '
            f'width="{max(abs(end - start), 0.5):.1f}" height="13"/>'
            f'<text class="value" x="{max(start, end) + 4:.1f}" y="{top + 11}">{value:.4g}</text>'
        )
    return _figure(parts, y, height=len(known) * row + 8)


def _figure(parts: Sequence[str], label: str, height: int = HEIGHT) -> str:
    body = "".join(parts)
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height}">{body}</svg>'
    )


def _bounds(points: Points) -> tuple[float, float, float, float]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    margin = (max(ys) - min(ys)) * 0.08 or abs(max(ys)) * 0.1 or 1.0
    right = max(xs) if max(xs) > min(xs) else min(xs) + 1
    return min(xs), right, min(ys) - margin, max(ys) + margin


def _place(point: tuple[float, float], bounds: tuple[float, ...]) -> tuple[float, float]:
    x0, x1, y0, y1 = bounds
    x = LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    return round(x, 1), round(y, 1)


def _path(points: Points, bounds: tuple[float, ...]) -> str:
    return " ".join(f"{x},{y}" for x, y in (_place(point, bounds) for point in points))


def _axes(bounds: tuple[float, ...], x: str, y: str) -> str:
    x0, x1, y0, y1 = bounds
    parts = []
    for tick in range(TICKS + 1):
        at_x, at_y = x0 + (x1 - x0) * tick / TICKS, y0 + (y1 - y0) * tick / TICKS
        px, py = _place((at_x, at_y), bounds)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}"/>'
            f'<text class="tick" x="{LEFT - 5}" y="{py + 4}" text-anchor="end">{at_y:.3g}</text>'
            f'<text class="tick" x="{px}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">'
            f"{at_x:.3g}</text>"
        )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{escape(x)}</text>'
        f'<text class="axis" transform="translate(12 {HEIGHT / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y)}</text>'
    )
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    entries = "".join(
        f'<span><i class="key s{number % 5}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{entries}</p>'


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
