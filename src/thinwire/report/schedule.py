"""A collective as one SVG file: the network with what each link carries, and below it who sends what to whom, when.

One row a rank (host: rank), one bar a message, from when its turn came on the connection to when its last byte had left.
Messages to several ranks at a time share the row's height. Hovering names both ends, bytes and times.
"""

from collections.abc import Sequence

from thinwire.cluster import Cluster
from thinwire.collectives.choose.simulate import Simulated, Transfer
from thinwire.collectives.price import link_seconds
from thinwire.report.charts import BLUE, ORANGE, WIDTH
from thinwire.report.diagram import shapes
from thinwire.report.markup import Markup, join, tag
from thinwire.report.network import picture
from thinwire.report.text import quantity
from thinwire.stepcost import LinkLoad

ROW, TITLE, LABEL, RIGHT, FOOT = 22.0, 30.0, 100.0, 14.0, 44.0
MARGIN = 30.0
"""For labels of the network that stand out on the right."""
HOST_LETTERS = 9
MOST_BARS = 5000
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #57626d; } .head { font-size: 14px; font-weight: 600; fill: #1c232b; }
.link { fill: none; } .host { fill: #fff; stroke: #1c232b; } .switch { fill: #e8eef4; stroke: #57626d; } g text { fill: #1c232b; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .slow { fill: #7a1f10; font-weight: 700; } .rule { stroke: #d5dbe1; }
"""


def schedule_svg(cluster: Cluster, title: str, run: Simulated) -> str:
    """cluster: whose rank i is rank i of the schedule."""
    loads = [
        LinkLoad(source=link.source, target=link.target, bytes_per_step=size, busy_s=link_seconds(link, size))
        for link, size in run.link_bytes.items()
    ]
    network, height = shapes(picture(cluster, loads), run.seconds, per="call")
    top = TITLE + height
    whole = top + ROW * cluster.world_size + FOOT
    return tag(
        "svg",
        tag("title", title),
        tag("style", STYLE),
        tag("rect", width=WIDTH + MARGIN, height=whole, fill="#fff"),
        tag("text", title, x=4.0, y=20.0, class_="head"),
        tag("g", network, transform=f"translate(0 {TITLE:g})"),
        tag("g", _timeline(cluster, run), transform=f"translate(0 {top:g})"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH + MARGIN:g} {whole:g}",
        role="img",
    )


def _timeline(cluster: Cluster, run: Simulated) -> Markup:
    scale = (WIDTH - LABEL - RIGHT) / run.seconds if run.seconds else 0.0
    p = cluster.world_size
    sends = sorted(run.transfers, key=lambda one: (one.source, one.began_s, one.target))
    parts = []
    for rank in range(p):
        name = f"{cluster.host_of(rank).name[:HOST_LETTERS]}: {rank}"
        title = tag("title", f"rank {rank} on {cluster.ranks[rank]}")
        parts.append(tag("text", name, title, x=LABEL - 8, y=ROW * (rank + 0.5), dy="0.35em", class_="end"))
        parts += _bars([one for one in sends[:MOST_BARS] if one.source == rank], ROW * rank, scale)
    foot = ROW * p
    parts.append(tag("line", x1=LABEL, y1=foot, x2=WIDTH - RIGHT, y2=foot, class_="rule"))
    parts.append(tag("text", "0", x=LABEL, y=foot + 16))
    parts.append(tag("text", quantity(run.seconds, "s"), x=WIDTH - RIGHT, y=foot + 16, class_="end"))
    left_out = f"; the first {MOST_BARS} of {len(sends)} messages" if len(sends) > MOST_BARS else ""
    for place, (colour, word) in enumerate(((BLUE, "added there"), (ORANGE, f"copied there{left_out}"))):
        x = LABEL + 140.0 * place
        parts.append(tag("rect", x=x, y=foot + 24, width=10.0, height=10.0, fill=colour))
        parts.append(tag("text", f"sent, {word}", x=x + 15, y=foot + 33))
    return join(parts)


def _bars(sends: Sequence[Transfer], top: float, scale: float) -> list[Markup]:
    """Bars that overlap in time lie in lanes of their own."""
    free: list[float] = []
    lanes = []
    for send in sends:
        lane = next((number for number, end in enumerate(free) if end <= send.began_s), len(free))
        free[lane : lane + 1] = [send.left_s]
        lanes.append(lane)
    height = (ROW - 4) / max(len(free), 1)
    bars = []
    for send, lane in zip(sends, lanes, strict=True):
        times = f"{quantity(send.began_s, 's')} to {quantity(send.left_s, 's')}"
        title = tag("title", f"rank {send.source} → {send.target}, {quantity(send.payload_bytes, 'B')}, {times}")
        x, y, width = LABEL + scale * send.began_s, top + 2 + lane * height, max(scale * (send.left_s - send.began_s), 0.2)
        fill = BLUE if send.reduce else ORANGE
        bars.append(tag("rect", title, x=x, y=y, width=width, height=height, fill=fill, stroke="#fff", stroke_width=0.3))
    return bars
