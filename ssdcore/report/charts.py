"""Line charts as inline SVG. Their colours are those of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ssdcore.report.html import Html, tag

# In units of the drawing, which are CSS pixels where a chart has its natural width.
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 12, 38  # margins around the plot, for the numbers and names of the axes
MAX_TICKS = 6


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]  # None interrupts the line


def line_chart(
    title: str,
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Html:
    """Draw lines in one plot.

    Args:
        title: stands above the chart.
        series: at least one. More than one get a legend.
        x_name, y_name: names of the axes.
        x_range, y_range: what the axes show. By default all values, and for y also 0.
    """
    xs = [x for line in series for x in line.xs]
    ys = [y for line in series for y in line.ys if y is not None]
    x_range = _not_empty(x_range or (min(xs, default=0.0), max(xs, default=1.0)))
    y_range = _not_empty(y_range or (min([0.0, *ys]), max([0.0, *ys])))

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawing: list[Html] = []
    for y in _ticks(*y_range):
        x1, height = at(x_range[0], y)
        drawing.append(tag("line", x1=x1, x2=WIDTH - RIGHT, y1=f"{height:.1f}", y2=f"{height:.1f}", class_="grid"))
        drawing.append(tag("text", f"{y:.4g}", x=x1 - 6, y=f"{height + 4:.1f}", text_anchor="end"))
    for x in _ticks(*x_range):
        width, y1 = at(x, y_range[0])
        drawing.append(tag("text", f"{x:.4g}", x=f"{width:.1f}", y=y1 + 16, text_anchor="middle"))
    middle_x, middle_y = LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2
    drawing.append(tag("text", x_name, x=middle_x, y=HEIGHT - 5, text_anchor="middle"))
    turned = f"translate(11 {middle_y}) rotate(-90)"
    drawing.append(tag("text", y_name, transform=turned, text_anchor="middle"))
    for index, line in enumerate(series):
        for xs_ys in _pieces(line):
            points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in xs_ys)
            if len(xs_ys) == 1:
                x, y = at(*xs_ys[0])
                drawing.append(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=f"s{index}"))
            else:
                drawing.append(tag("polyline", points=points, class_=f"s{index}"))

    legend = [tag("span", tag("i", class_=f"s{index}"), line.name, class_="key") for index, line in enumerate(series)]
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), legend if len(series) > 1 else ()),
        tag("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {y_name} by {x_name}"),
        class_="chart",
    )


def _not_empty(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    return (low, high) if high > low else (low - 0.5, low + 0.5) if low else (0.0, 1.0)


def _ticks(low: float, high: float) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten from `low` to `high`, `MAX_TICKS` at most."""
    least = (high - low) / (MAX_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _pieces(line: Series) -> list[list[tuple[float, float]]]:
    """The parts of a line between its interruptions."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.xs, line.ys, strict=True):
        if y is not None:
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
