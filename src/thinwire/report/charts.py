"""Line charts and stacked bars as inline SVG, 560 units wide: they scale with the page and need no library.

Colour-blind readers can tell the colours apart too (Okabe and Ito, 2008).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from thinwire.report.markup import Markup, join, tag

WIDTH, HEIGHT = 560.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 12.0, 46.0
MAX_POINTS = 400

BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a929b"


@dataclass(frozen=True)
class Series:
    """A line through (x, y); a y that is nan leaves a gap. `labels`: shown when hovering, one a point."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    dots: bool = False


@dataclass(frozen=True)
class Segment:
    """One coloured part of a bar."""

    name: str
    colour: str
    seconds: float


def line_chart(
    series: Sequence[Series],
    levels: Sequence[tuple[str, float]],
    title: str,
    axis: str,
    zero: bool = False,
) -> Markup:
    """A chart with a legend. levels: names and heights of horizontal lines; zero: y starts at zero."""
    drawn, levels = [_thinned(line) for line in series], [level for level in levels if math.isfinite(level[1])]
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points if math.isfinite(y)]
    ys += [y for _, y in levels]
    x_low, x_high = _span(xs, from_zero=True, margin=0.0)
    y_low, y_high = _span(ys, from_zero=zero, margin=0.06)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    shapes: list[Markup] = []
    for y in _ticks(y_low, y_high):
        height = at(0.0, y)[1]
        shapes.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="grid"))
        shapes.append(tag("text", _short(y), x=LEFT - 8, y=height, dy="0.35em", class_="end"))
    for x in _ticks(x_low, x_high):
        shapes.append(tag("text", _short(x), x=at(x, 0.0)[0], y=HEIGHT - BOTTOM + 18, class_="middle"))
    shapes.append(tag("text", axis, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="middle axis"))
    shapes += [_path(line, at) for line in drawn]
    for _, y in levels:
        height = at(0.0, y)[1]
        shapes.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="level"))
    hover = sorted((at(x, y_low)[0], label) for line in drawn for (x, _), label in zip(line.points, line.labels, strict=False))
    svg = tag(
        "svg",
        tag("title", title),
        *shapes,
        tag("line", x1=0.0, x2=0.0, y1=TOP, y2=HEIGHT - BOTTOM, class_="cursor"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        data_hover=json.dumps([[round(x, 1), label] for x, label in hover], ensure_ascii=False) if hover else None,
    )
    names = [(line.name, line.colour, "") for line in series] + [(name, "#3c4650", "dashed") for name, _ in levels]
    caption = tag("figcaption", title, tag("span", "\u00a0", class_="readout"))
    return tag("figure", caption, legend(names), svg)


def legend(names: Sequence[tuple[str, str, str]]) -> Markup:
    """Name, colour and kind ("", "dashed", "box") of each line or bar."""
    keys = (tag("span", tag("i", class_=f"key {kind}".strip(), style=f"--c:{colour}"), name) for name, colour, kind in names)
    return tag("div", *keys, class_="legend")


def stacked_bars(bars: Sequence[tuple[str, Sequence[Segment]]], write: Callable[[float], str]) -> Markup:
    """Horizontal bars under one scale, each a row of segments with their values where they fit."""
    longest = max((sum(segment.seconds for segment in segments) for _, segments in bars), default=0.0) or 1.0
    rows = []
    for name, segments in bars:
        total = sum(segment.seconds for segment in segments)
        parts = []
        for segment in (segment for segment in segments if segment.seconds > 0):
            value, share = write(segment.seconds), segment.seconds / longest
            style = f"--c:{segment.colour};width:{100 * share:.2f}%"
            parts.append(tag("span", value if share > 0.14 else None, style=style, title=f"{name}, {segment.name}: {value}"))
        rows.append(tag("div", tag("b", name), tag("span", write(total)), class_="barname"))
        rows.append(tag("div", *parts, class_=f"bar {name}"))
    colours = {segment.name: segment.colour for _, segments in bars for segment in segments if segment.seconds > 0}
    keys = legend([(name, colour, "box") for name, colour in colours.items()])
    return tag("figure", keys, *rows, class_="bars")


def _thinned(line: Series) -> Series:
    """At most MAX_POINTS of the points, the first and the last among them: evenly spaced, none invented."""
    count = len(line.points)
    if count <= MAX_POINTS:
        return line
    chosen = [round(k * (count - 1) / (MAX_POINTS - 1)) for k in range(MAX_POINTS)]
    labels = [line.labels[k] for k in chosen] if line.labels else ()
    return replace(line, points=[line.points[k] for k in chosen], labels=labels)


def _path(line: Series, at: Callable[[float, float], tuple[float, float]]) -> Markup:
    commands, dots, pen = [], [], "M"
    finite = [math.isfinite(y) for _, y in line.points]
    for k, (x, y) in enumerate(line.points):
        if not finite[k]:
            pen = "M"
            continue
        px, py = at(x, y)
        commands.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
        alone = not any(finite[max(0, k - 1) : k]) and not any(finite[k + 1 : k + 2])
        if alone or (line.dots and len(line.points) <= 60):
            dots.append(tag("circle", cx=px, cy=py, r=3.5, fill=line.colour))
    path = tag("path", d=" ".join(commands), stroke=line.colour, class_="line") if commands else None
    return join([path, *dots])


def _span(values: Sequence[float], from_zero: bool, margin: float) -> tuple[float, float]:
    """The least and the greatest of `values`, with a margin, a share of their range, around them; never empty."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(low, 0.0) if from_zero else low
    if not high > low:
        low, high = (low, low + (abs(low) or 1.0)) if from_zero else (low - 0.5, high + 0.5)
    return (low if from_zero else low - margin * (high - low)), high + margin * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], four to eight of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for letter, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value:.4g}"
