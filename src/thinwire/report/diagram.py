"""The cluster as inline SVG: the middle of the network on the left, hosts on the right, one line for each direction.

Width shows predicted bytes per step, colour the share of the predicted step for which the link is busy. The ramp goes
from light to dark in one direction, so it reads without colour. A link slower than half of what hosts usually have is named slow.
"""

import math
import statistics
from collections.abc import Iterator, Mapping

from thinwire.report.charts import WIDTH
from thinwire.report.markup import Markup, join, tag
from thinwire.report.network import Direction, Node, Picture
from thinwire.report.text import percent, quantity

ROW, BOX_HEIGHT, EDGE = 46.0, 30.0, 4.0
NOTE_LETTERS = 26
LABEL_WIDTH = 130.0
"""Space for what is written on the right of a host."""
RAMP = ("#c3ccd5", "#fdc675", "#f08c3c", "#c9481f", "#7a1f10")
"""Busy below 20 %, 40 %, 60 %, 80 %, and above."""
UNKNOWN_COLOUR = "#9aa4ae"


def diagram(picture: Picture, step_s: float | None, notes: Mapping[str, str] = {}) -> Markup:
    """The picture as SVG. step_s: predicted, for the share of it that a link is busy; notes: by host, what runs there."""
    drawn, height = shapes(picture, step_s, notes=notes)
    title = tag("title", "the network, and the predicted load of its links")
    box = f"0 0 {WIDTH:g} {height:g}"
    return tag("svg", title, drawn, xmlns="http://www.w3.org/2000/svg", viewBox=box, role="img", class_="network")


def shapes(picture: Picture, step_s: float | None, per: str = "step", notes: Mapping[str, str] = {}) -> tuple[Markup, float]:
    """Links, nodes and labels without the frame, and how high they are. per: what the bytes and `step_s` are of."""
    depth = max(_depth(root) for root in picture.roots)
    drawn = [direction for _, node in cables(picture) for direction in node.directions]
    drawn += [direction for _, _, direction in picture.others]
    heaviest = max((direction.bytes_per_step or 0.0 for direction in drawn), default=0.0)
    pen = _Pen(step_s, heaviest, slow_below=_slow_below(picture), depth=depth, per=per)
    pen.notes = notes
    top = 8.0
    for root in picture.roots:
        pen.place(root, 0, top)
        top += root.leaves * ROW
    for source, target, direction in picture.others:
        pen.other(source, target, direction)
    return join([*pen.links, *pen.boxes, *pen.labels]), top + 8


def cables(picture: Picture) -> Iterator[tuple[Node, Node]]:
    """(parent, child) of each cable of the tree."""
    stack = list(reversed(picture.roots))
    while stack:
        node = stack.pop()
        yield from ((node, child) for child in node.children)
        stack += reversed(node.children)


def busy_share(direction: Direction, step_s: float | None) -> float:
    """Share of the predicted step for which the link is busy; nan if nothing was predicted."""
    return direction.busy_s / step_s if direction.busy_s is not None and step_s else math.nan


def _slow_below(picture: Picture) -> float:
    """Half the usual rate of a host's cable, its slower direction counted."""
    hosts = [child for _, child in cables(picture) if child.kind == "host"]
    rates = [min(direction.bandwidth_bps for direction in host.directions) for host in hosts for _ in host.members]
    return statistics.median(rates) / 2 if rates else 0.0


def _depth(node: Node) -> int:
    return 1 + max((_depth(child) for child in node.children), default=0)


class _Pen:
    """Collects the shapes; remembers where each node was put."""

    def __init__(self, step_s: float | None, heaviest: float, slow_below: float, depth: int, per: str) -> None:
        self.links: list[Markup] = []
        self.labels: list[Markup] = []
        self.boxes: list[Markup] = []
        self._step_s, self._heaviest, self._slow_below, self._per = step_s, heaviest, slow_below, per
        free = WIDTH - 2 * EDGE - LABEL_WIDTH
        self._box_width = min(120.0, free / (depth + 0.5 * (depth - 1)))
        self._column = (free - self._box_width) / max(depth - 1, 1)
        self._places: dict[str, tuple[float, float]] = {}
        self.notes: Mapping[str, str] = {}

    def place(self, node: Node, level: int, top: float) -> tuple[float, float]:
        """Draw `node` and all below it; returns the middle of its left edge."""
        x, y = EDGE + level * self._column, top + node.leaves * ROW / 2
        self._places[node.name] = (x, y)
        below = top
        for child in node.children:
            child_x, child_y = self.place(child, level + 1, below)
            self._cable(node, child, (x + self._box_width, y), (child_x, child_y))
            below += child.leaves * ROW
        self._box(node, x, y)
        return x, y

    def other(self, source: str, target: str, direction: Direction) -> None:
        """A link outside the tree: an arc on the left of its two nodes."""
        (x1, y1), (x2, y2) = self._places[source], self._places[target]
        bend = min(x1, x2) - 40
        path = f"M{x1:.1f} {y1:.1f}C{bend:.1f} {y1:.1f} {bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        self.links.append(self._line(path, direction, f"{source} → {target}"))

    def _cable(self, parent: Node, child: Node, start: tuple[float, float], end: tuple[float, float]) -> None:
        (x1, y1), (x2, y2) = start, end
        middle = (x1 + x2) / 2
        for direction, shift, ends in ((child.up, -4.0, (child, parent)), (child.down, 4.0, (parent, child))):
            if direction is not None:
                left, right = y1 + shift, y2 + shift
                path = f"M{x1:.1f} {left:.1f}C{middle:.1f} {left:.1f} {middle:.1f} {right:.1f} {x2:.1f} {right:.1f}"
                self.links.append(self._line(path, direction, f"{ends[0].name} → {ends[1].name}"))
        busiest = max(child.directions, key=lambda direction: direction.busy_s or 0.0)
        slow = busiest.bandwidth_bps < self._slow_below
        share = busy_share(busiest, self._step_s)
        words = quantity(busiest.bandwidth_bps, "bit/s") + (f" · {percent(share)}" if math.isfinite(share) else "")
        right = x2 + self._box_width + 8
        place = (right, y2, "0.35em") if not child.children else (right - 8, y2 + BOX_HEIGHT / 2, "1em")
        kind = ("" if not child.children else "end ") + ("slow" if slow else "")
        words += " slow" if slow else ""
        self.labels.append(tag("text", words, x=place[0], y=place[1], dy=place[2], class_=kind or None))
        if not child.children and (note := self.notes.get(child.name)):
            self.labels.append(tag("text", _short(note, NOTE_LETTERS), x=right, y=y2, dy="1.6em", class_="note"))

    def _line(self, path: str, direction: Direction, name: str) -> Markup:
        share = busy_share(direction, self._step_s)
        width = 1.5 + (5.0 * (direction.bytes_per_step or 0.0) / self._heaviest if self._heaviest else 0.0)
        colour = RAMP[min(int(share * len(RAMP)), len(RAMP) - 1)] if math.isfinite(share) else UNKNOWN_COLOUR
        load = ", load not predicted"
        if direction.bytes_per_step is not None:
            axes = f" ({', '.join(direction.axes)})" if direction.axes else ""
            load = f", predicted {quantity(direction.bytes_per_step, 'B')} per {self._per}{axes}, busy {percent(share)}"
        title = f"{name}: {quantity(direction.bandwidth_bps, 'bit/s')}, {quantity(direction.latency_s, 's')}{load}"
        return tag("path", tag("title", title), d=path, stroke=colour, stroke_width=width, class_="link")

    def _box(self, node: Node, x: float, y: float) -> None:
        count = f" ×{len(node.members)}" if len(node.members) > 1 else ""
        name = _short(node.members[0], int(self._box_width / 7.2) - len(count)) + count
        kind, radius = ("host", 4.0) if node.kind == "host" else ("switch", 15.0)
        size = {"width": self._box_width, "height": BOX_HEIGHT, "rx": radius}
        shape = tag("rect", x=x, y=y - BOX_HEIGHT / 2, **size, class_=kind)
        text = tag("text", name, x=x + self._box_width / 2, y=y, dy="0.35em", class_="middle")
        title = ", ".join([node.name, node.kind, *([node.detail] if node.detail else [])])
        self.boxes.append(tag("g", tag("title", title), shape, text))


def _short(name: str, most: int) -> str:
    """`name` in at most so many letters: the middle goes, since names differ at their ends."""
    return name if len(name) <= most else f"{name[: (most - 1) // 2]}…{name[len(name) - most // 2 :]}"
