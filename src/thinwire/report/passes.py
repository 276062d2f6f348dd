"""The passes of a pipeline as inline SVG: one row a rank, one box a pass, predicted above measured on one scale of time.

A box has the colour of its kind and the number of its micro-batch; between boxes a rank waits. Hovering names stage and times.
"""

from collections.abc import Sequence

from thinwire.report.charts import BLUE, GREEN, PINK, SKY, legend
from thinwire.report.markup import Markup, join, tag
from thinwire.report.text import quantity
from thinwire.stepcost import Pass

WIDTH, ROW, LABEL, RIGHT, TITLE, FOOT = 1120.0, 24.0, 150.0, 8.0, 24.0, 22.0
LETTER = 8.0
"""About as wide as a digit."""
KINDS = {"F": ("forward", BLUE), "B": ("backward", GREEN), "I": ("backward, of inputs", PINK), "W": ("backward, of weights", SKY)}


def timeline(sides: Sequence[tuple[str, Sequence[Pass]]], names: dict[int, str]) -> Markup:
    """sides: a title and the passes of one pipeline under it; names: of its ranks, top row first."""
    longest = max((one.end_s for _, passes in sides for one in passes), default=0.0) or 1.0
    scale = (WIDTH - LABEL - RIGHT) / longest
    rows = {rank: number for number, rank in enumerate(names)}
    shapes, top = [], 0.0
    for title, passes in sides:
        end_s = max((one.end_s for one in passes), default=0.0)
        shapes.append(tag("text", f"{title}: {quantity(end_s, 's')}", x=0.0, y=top + TITLE - 8, class_="head"))
        top += TITLE
        for rank, number in rows.items():
            y = top + ROW * (number + 0.5)
            shapes.append(tag("text", names[rank], x=LABEL - 8, y=y, dy="0.35em", class_="end"))
        shapes += [_box(one, LABEL + scale * one.begin_s, top + ROW * rows[one.rank], scale) for one in passes]
        top += ROW * len(rows) + FOOT
    kinds = {one.kind for _, passes in sides for one in passes}
    keys = legend([(word, colour, "box") for kind, (word, colour) in KINDS.items() if kind in kinds])
    svg = tag(
        "svg",
        tag("title", "the passes of a pipeline in one step"),
        join(shapes),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {top:g}",
        role="img",
        class_="passes",
    )
    return tag("figure", keys, tag("div", svg, class_="scroll", tabindex="0"))


def _box(one: Pass, x: float, y: float, scale: float) -> Markup:
    word, colour = KINDS.get(one.kind, (one.kind, BLUE))
    width, number = max(scale * (one.end_s - one.begin_s), 0.5), str(one.micro)
    times = f"{quantity(one.begin_s, 's')} to {quantity(one.end_s, 's')}"
    title = tag("title", f"micro-batch {number}, stage {one.stage}, {word}, {times}")
    box = tag("rect", title, x=x, y=y + 2, width=width, height=ROW - 4, fill=colour, stroke="#fff", stroke_width=0.5)
    fits = width >= LETTER * (len(number) + 0.5)
    text = tag("text", number, x=x + width / 2, y=y + ROW / 2, dy="0.35em", class_="middle on") if fits else None
    return tag("g", box, text)
