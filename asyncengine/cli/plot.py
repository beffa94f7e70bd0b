"""The plot of a benchmark, as one SVG document: three distributions and the rate of tokens over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from asyncengine.cli.figures import Figures, percentile

_WIDTH, _HEIGHT = 900, 620
_PANEL_WIDTH, _PANEL_HEIGHT = 360, 200
CORNERS = ((70, 80), (510, 80), (70, 360), (510, 360))
_POINTS = 240
_BINS = 60
_MARK_WIDTH = 70
"""Room that the name of a mark takes."""

Points = list[tuple[float, float]]


def draw(figures: Figures, title: str) -> str:
    """The document.

    Args:
        figures: What is drawn.
        title: What was measured, and how.
    """
    said = f"{figures.requests} requests, {figures.tokens:,} tokens, {figures.tokens_per_second:,.1f} tokens/s"
    parts: list[str] = []
    for corner, (name, values) in zip(CORNERS, figures.latencies.items(), strict=False):
        milliseconds = [1000 * value for value in values]
        marks = [(f"p{p}", percentile(milliseconds, p)) for p in (50, 99)] if milliseconds else []
        panel = Panel(corner, f"{name}, ms", "% of them", _distribution(milliseconds), 100.0)
        parts += panel.draw(marks)
    rate = Panel(CORNERS[3], "seconds", "tokens/s", _rate(figures.deltas), None)
    parts += rate.draw([])
    return document(title, said, parts)


def document(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The document around the panels, of which there is room for four, at `CORNERS`."""
    begin = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="70" y="34" font-size="17" font-weight="600">{escape(title)}</text>',
        f'<text x="70" y="54" fill="#555">{escape(subtitle)}</text>',
    ]
    return "\n".join([*begin, *parts, "</svg>\n"])


class Panel:
    """A curve with its axes.

    Args:
        corner: Its upper left.
        x_name: What is to the right.
        y_name: What is up.
        points: The curve.
        y_most: The end of the y-axis; None fits it to the curves.
        limit: A second curve, dashed.
        logarithmic: Whether the x-axis is; its ticks are then at the curve's points.
    """

    def __init__(
        self,
        corner: tuple[int, int],
        x_name: str,
        y_name: str,
        points: Points,
        y_most: float | None = None,
        limit: Points | None = None,
        logarithmic: bool = False,
    ) -> None:
        self._left, self._top = corner
        self._names = (x_name, y_name)
        self._points = points
        self._limit = limit or []
        self._logarithmic = logarithmic
        self._x_least, self._x_most = 0.0, max((x for x, _ in points), default=0.0) or 1.0
        if logarithmic:
            self._x_least = min(x for x, _ in points)
        self._y_most = y_most or max((y for _, y in (*points, *self._limit)), default=0.0) * 1.05 or 1.0

    def draw(self, marks: Sequence[tuple[str, float]]) -> Iterator[str]:
        """Its parts; `marks` are names and values on the x-axis."""
        left, top, right, bottom = self._left, self._top, self._left + _PANEL_WIDTH, self._top + _PANEL_HEIGHT
        for value in ticks(self._y_most):
            y = self._y(value)
            yield f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>'
            yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{_number(value)}</text>'
        for value in [x for x, _ in self._points] if self._logarithmic else ticks(self._x_most):
            x = self._x(value)
            yield f'<path d="M{x:.1f} {bottom}v4" stroke="#888"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{_number(value)}</text>'
        yield f'<path d="M{left} {bottom}H{right}" stroke="#888"/>'
        x_name, y_name = self._names
        yield f'<text x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">{x_name}</text>'
        yield f'<text x="{left}" y="{top - 8}">{y_name}</text>'
        for _, value in marks:
            yield f'<path d="M{self._x(value):.1f} {top}V{bottom}" stroke="#c2410c" stroke-dasharray="3 3"/>'
        if self._limit:
            path = "L".join(f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in self._limit)
            yield f'<path d="M{path}" fill="none" stroke="#c2410c" stroke-width="2" stroke-dasharray="5 4"/>'
        if self._points:
            path = "L".join(f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in self._points)
            yield f'<path d="M{path}" fill="none" stroke="#1d4ed8" stroke-width="2" stroke-linejoin="round"/>'
        for row, (name, value) in enumerate(marks):
            # A share that has been reached stays reached: right of a mark and low, the curve is not in the way.
            x = self._x(value)
            place = f'x="{x + 4:.1f}"' if right - x > _MARK_WIDTH else f'x="{x - 4:.1f}" text-anchor="end"'
            halo = 'stroke="#fff" stroke-width="4" paint-order="stroke"'
            yield f'<text {place} y="{bottom - 24 + 16 * row}" fill="#c2410c" {halo}>{name} {_number(value)}</text>'

    def _x(self, value: float) -> float:
        least, most = self._x_least, self._x_most
        if self._logarithmic:  # with room for a 0
            least, most, value = (math.log2(max(x, most / (1 << 17))) for x in (least, most, value))
        return self._left + (value - least) / ((most - least) or 1.0) * _PANEL_WIDTH

    def _y(self, value: float) -> float:
        return self._top + _PANEL_HEIGHT - value / self._y_most * _PANEL_HEIGHT


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to `most`, four to nine of them."""
    step: float = 10 ** math.floor(math.log10(most / 4))
    for factor in (1, 2, 5, 10):
        if most / (step * factor) <= 8:
            step *= factor
            break
    return [step * index for index in range(math.floor(most / step + 1e-9) + 1)]


def _distribution(values: Sequence[float]) -> Points:
    """Share of the sorted values up to each, at most `_POINTS` of them."""
    count = len(values)
    chosen = sorted({round(index * (count - 1) / _POINTS) for index in range(_POINTS + 1)}) if count else []
    return [(0.0, 0.0), *((values[index], 100 * (index + 1) / count) for index in chosen)]


def _rate(deltas: Sequence[tuple[float, int]]) -> Points:
    if not deltas:
        return []
    width = max(deltas[-1][0], 1e-9) / _BINS
    sums = [0] * _BINS
    for at, count in deltas:
        sums[min(int(at / width), _BINS - 1)] += count
    return [point for index, total in enumerate(sums) for point in _step(index, total, width)]


def _step(index: int, total: int, width: float) -> Points:
    return [(index * width, total / width), ((index + 1) * width, total / width)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
