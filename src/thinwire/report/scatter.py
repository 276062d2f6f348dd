"""Named points over a logarithmic axis as one SVG file: what nothing beats is joined by a line, and named."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.report.charts import BLUE, GREY
from thinwire.report.markup import tag

WIDTH, HEIGHT = 760.0, 440.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 24.0, 40.0, 52.0
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57626d; } .head { font-size: 14px; font-weight: 600; fill: #1c232b; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .grid { stroke: #d5dbe1; } .front { fill: none; stroke-width: 2; }
.on { fill: #1c232b; }
"""


@dataclass(frozen=True)
class Dot:
    """x above 0. marked: whether nothing beats it, which has both less."""

    name: str
    x: float
    y: float
    marked: bool


def scatter(dots: Sequence[Dot], title: str, x_axis: str, y_axis: str) -> str:
    """Without dots, an empty frame."""
    logs = [math.log10(dot.x) for dot in dots] or [0.0]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    ys = [dot.y for dot in dots] or [1.0]
    step = 0.1 if max(ys) - min(ys) <= 1 else 0.5
    bottom, top = step * math.floor(min(ys) / step - 0.5), step * math.ceil(max(ys) / step + 0.5)

    def at(log: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (log - low) / (high - low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM),
        )

    shapes = [tag("text", title, x=LEFT, y=22.0, class_="head")]
    for power in range(low, high + 1):
        x = at(power, bottom)[0]
        shapes.append(tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        shapes.append(tag("text", f"{10.0**power:g}", x=x, y=HEIGHT - BOTTOM + 18, class_="middle"))
    for number in range(round(bottom / step), round(top / step) + 1):
        y = at(low, number * step)[1]
        shapes.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        shapes.append(tag("text", f"{number * step:.1f}", x=LEFT - 8, y=y, dy="0.35em", class_="end"))
    shapes.append(tag("text", f"{x_axis}; upwards: {y_axis}", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 10, class_="middle"))
    front = sorted((at(math.log10(dot.x), dot.y) for dot in dots if dot.marked), key=lambda point: point[0])
    if front:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in front)
        shapes.append(tag("path", d=path, stroke=BLUE, class_="front"))
    for dot in dots:
        x, y = at(math.log10(dot.x), dot.y)
        named = tag("title", f"{dot.name}: {dot.x:.3g}, {dot.y:.3f}")
        shapes.append(tag("circle", named, cx=x, cy=y, r=4.0, fill=BLUE if dot.marked else GREY))
        shapes.append(tag("text", dot.name, x=x + 6, y=y - 6, class_="on" if dot.marked else None))
    return tag(
        "svg",
        tag("title", title),
        tag("style", STYLE),
        tag("rect", width=WIDTH, height=HEIGHT, fill="#fff"),
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
    )
