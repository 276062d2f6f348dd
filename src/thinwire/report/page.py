"""The page of a run folder: one HTML file that asks for nothing else, so it opens offline and can be mailed.

One function a section: Facts in, a <section> out. Where something is missing, a sentence in its place names it.
"""

import math
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path

from thinwire.record import PICTURE, Record, RunFolder
from thinwire.report.charts import BLUE, GREEN, GREY, ORANGE, PINK, SKY, Segment, Series, legend, line_chart, stacked_bars
from thinwire.report.diagram import RAMP, busy_share, cables, diagram
from thinwire.report.facts import (
    OTHER,
    PARTS,
    Facts,
    card_rows,
    final_loss,
    setup_bytes,
    step_rows,
    transfer_rows,
    unaccounted,
)
from thinwire.report.markup import Markup, join, tag
from thinwire.report.network import Direction, picture
from thinwire.report.passes import timeline
from thinwire.report.table import cells, circumstances
from thinwire.report.text import UNKNOWN, Scale, moment, percent, plain, quantity, share, verdict, whole
from thinwire.stepcost import StepCost

MAX_LINES = 12
PART_COLOURS = {"compute_s": BLUE, "exposed_s": ORANGE, "waiting_s": PINK, "optimizer_s": GREEN, "host_s": SKY}


def write_report(folder: RunFolder) -> Path:
    """Write report.html into the run folder and return its path. UserError if the folder is damaged."""
    folder.write_text("report.html", page(Facts(folder)))
    return folder.path / "report.html"


def page(facts: Facts) -> str:
    """The page as text."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{facts.name} · thinwire"),
        tag("style", _asset("page.css")),
    )
    sections = (section(facts) for section in (headline, loss, examples, step, pipeline, sent, network, assumptions, settings))
    body = tag("body", tag("main", *sections), tag("script", _asset("page.js")))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> Markup:
    return Markup((resources.files("thinwire.report") / name).read_text(encoding="utf-8"))


def headline(facts: Facts) -> Markup:
    """What ran, on what, when, how it ended; the verdict; the six numbers to remember."""
    record, measured = facts.record, facts.measured
    hosts = len(set(record.hosts))
    where = f"{facts.cluster.name}, " if facts.cluster else ""
    what = f"{record.num_parameters:,} parameters".replace(",", "\u2009") if record.num_parameters else "a model"
    ran = f"{what} on {where}{hosts} host{'s' * (hosts != 1)}, {record.world_size} rank{'s' * (record.world_size != 1)}"
    held_out = plain(final_loss(facts.evals), 3) if facts.evals else "not recorded"
    tiles = [("held-out loss", "not finite" if held_out == UNKNOWN else held_out, _beside_baseline(facts))]
    if scored := record.score:
        beside = f"{scored.baseline.name}: {plain(scored.baseline.score, 2)}"
        tiles.insert(0, (scored.name, f"{plain(facts.final_score, 2)}\u202f{scored.unit}", beside))
    if measured:
        source = "median of steady steps" if facts.measured_from == "measured.json" else facts.measured_from
        tiles += [
            ("a step", quantity(measured.step_s, "s"), source),
            ("waiting for the wire", share(measured.exposed_s, measured.step_s), "of a step"),
            (f"{record.item}s per second", whole(measured.tokens_per_s), "all ranks together"),
            ("sent by a rank", quantity(measured.wire_bytes_per_step, "B"), "per step"),
        ]
    tiles.append(("steps", str(facts.steps[-1].step) if facts.steps else "0", facts.finished))
    chips = [tag("li", line) for line in circumstances(facts)]
    boxes = [tag("div", tag("dt", name), tag("dd", value), tag("small", note)) for name, value, note in tiles]
    return tag(
        "header",
        tag("p", f"thinwire {record.thinwire} · started {moment(record.started)} · {facts.finished}", class_="when"),
        tag("h1", facts.name),
        tag("p", ran, class_="ran"),
        tag("p", verdict(facts.measured, facts.predicted).replace(" %", "\u00a0%"), class_="verdict"),
        tag("dl", *boxes, class_="tiles"),
        tag("ul", *chips, class_="chips") if chips else None,
    )


def loss(facts: Facts) -> Markup:
    """Loss over time and over tokens, with the baseline."""
    if not facts.steps and not facts.evals:
        return _section("loss", "Loss", _gap("No loss was recorded: events.jsonl holds no step."))
    unit = facts.record.unit
    baseline = facts.record.baseline
    levels = [(f"{baseline.name} {plain(baseline.loss, 3)}", baseline.loss)] if baseline else []
    time = _time_axis([event.time_s for event in facts.losses])
    charts = []
    for over, key, axis, factor in (("time", "time_s", *time), (f"{facts.record.item}s", "tokens", f"{facts.record.item}s", 1.0)):
        lines = []
        for name, colour, events in (("train", GREY, facts.steps), ("held-out", BLUE, facts.evals)):
            points = [(getattr(event, key) * factor, event.loss) for event in events]
            labels = [f"step {event.step} · {name} {plain(event.loss, 3)} · {quantity(event.time_s, 's')}" for event in events]
            lines += [Series(name, colour, points, labels, dots=events is facts.evals)] if events else []
        charts.append(line_chart(lines, levels, f"Loss over {over}, {unit}", axis))
    bad = [event.step for event in facts.losses if not math.isfinite(event.loss)]
    gaps = [_gap(f"The loss was not a finite number at {len(bad)} events, first at step {min(bad)}.")] if bad else []
    gaps += [] if facts.evals else [_gap("No held-out loss was recorded.")]
    gaps += [] if baseline or facts.record.score else [_gap("No baseline loss was recorded.")]
    return _section("loss", "Loss", tag("div", *charts, class_="two"), *gaps)


def examples(facts: Facts) -> Markup | None:
    """What the model says of held-out examples; nothing where a task shows none."""
    if facts.examples is None:
        return None
    items = [
        tag("li", *(tag("img", src=line, alt="") if line.startswith(PICTURE) else tag("p", line) for line in lines))
        for lines in facts.example_lines
    ]
    note = tag("p", f"Of the held-out part, by the model of step {facts.examples.step}.", class_="note")
    return _section("examples", "Examples", note, tag("ul", *items, class_="examples"))


def step(facts: Facts) -> Markup:
    """The step broken down, predicted against measured, and its time over the run."""
    rows = step_rows(facts)
    if not rows:
        return _section("step", "A step", _gap("Nothing was predicted and no step was recorded."))
    sides = [("predicted", facts.predicted), ("measured", facts.measured)]
    scale = Scale(cost.step_s for _, cost in sides if cost)
    bars = stacked_bars([(name, _segments(cost)) for name, cost in sides if cost], scale.with_unit)
    lines = [[*cells(row, rows)] for row in rows]
    grid = _table(["", "predicted", "measured", "off by"], lines, bold=[row.key == "step_s" for row in rows], words=1)
    gaps = [_gap(sentence) for sentence in facts.missing if sentence.startswith(("predicted.json", "measured.json", "No step"))]
    chart = None
    if facts.steps:
        levels = [("predicted", facts.predicted.step_s * scale.factor)] if facts.predicted else []
        points = [(float(event.step), event.step_s * scale.factor) for event in facts.steps]
        labels = [f"step {event.step} · {scale.with_unit(event.step_s)}" for event in facts.steps]
        line = Series("measured", ORANGE, points, labels)
        chart = line_chart([line], levels, f"Time of a step, {scale.unit}", "step", zero=True)
    return _section("step", "A step: predicted against measured", bars, tag("div", grid, chart, class_="two"), *gaps)


def pipeline(facts: Facts) -> Markup | None:
    """When each stage computed which micro-batch, predicted above measured; nothing where there are no stages."""
    sides = [("predicted", facts.predicted), ("measured, in the last step", facts.measured)]
    shown = [(name, cost.passes) for name, cost in sides if cost and cost.passes]
    if not shown:
        return None
    ranks = sorted({one.rank for _, passes in shown for one in passes})
    names = {rank: f"{facts.record.hosts[rank]}: rank {rank}" for rank in ranks}
    note = "The pipeline of rank 0. Each rank's clock begins with its step; between boxes it waits. Numbers are micro-batches."
    return _section("pipeline", "The pipeline", tag("p", note, class_="note"), timeline(shown, names))


def sent(facts: Facts) -> Markup:
    """Bytes by Transfer, predicted against the ledger; bytes by host, the ledger against the cards."""
    rows = transfer_rows(facts)
    parts: list[Markup] = []
    if rows:
        equal = sum(row.equal for row in rows if math.isfinite(row.predicted_bytes))
        known = sum(math.isfinite(row.predicted_bytes) for row in rows)
        if known and facts.ledger:
            parts.append(tag("p", f"{equal} of {known} predicted transfers are equal to the ledger to the byte, on every rank."))
        heads = ["carries", "op", "axis", "calls", "predicted, bytes", "ledger, bytes", "equal"]
        lines = []
        for row in rows:
            counts = [whole(row.calls), whole(row.predicted_bytes), _range(row.ledger_low, row.ledger_high)]
            lines.append([row.label, row.op, row.axis, *counts, _equal(row.predicted_bytes, row.ledger_low, row.equal)])
        parts.append(_table(heads, lines, words=3))
        parts.append(tag("p", "Bytes sent by one rank over all recorded steps; two numbers where ranks differ.", class_="note"))
    if not facts.predicted or not facts.predicted.transfers:
        parts.append(_gap("No transfer was predicted."))
    if facts.ledger is None:
        parts.append(_gap("ledger.json is absent: bytes by call are not known."))
    elif setup := setup_bytes(facts):
        parts.append(tag("p", f"Before the first step all ranks together sent {quantity(setup, 'B')} more.", class_="note"))
    return _section("bytes", "Bytes on the wire", *parts, tag("h3", "The network cards' own counters"), *_cards(facts))


def _cards(facts: Facts) -> list[Markup]:
    rows = card_rows(facts)
    if not rows:
        return [_gap("cards.json is absent: the cards' own counters are read only in the lab.")]
    known = [row.difference for row in rows if math.isfinite(row.difference)]
    words = _gap("The ledger's bytes by host were not recorded.")
    if known:
        least, most = percent(min(known), signed=True), percent(max(known), signed=True)
        between = most if least == most else f"{least} to {most}"
        why = "over the whole command; frame headers and acknowledgements are not in the ledger"
        words = tag("p", f"Card against ledger: {between}, {why}.")
    heads = ["host", "card", "ledger: sent, bytes", "card: sent, bytes", "card counts", "card: received, bytes"]
    lines = []
    for row in rows:
        counts = [whole(row.ledger_bytes), whole(row.sent_bytes), percent(row.difference, signed=True), whole(row.received_bytes)]
        lines.append([row.host, row.interfaces, *counts])
    return [words, _folded(_table(heads, lines, words=2), len(lines), "hosts")]


def network(facts: Facts) -> Markup:
    """The cluster drawn, and a table of its links."""
    if facts.cluster is None:
        return _section("network", "The network", _gap("cluster.toml is absent: the network cannot be drawn."))
    loads = facts.predicted.links if facts.predicted else ()
    step_s = facts.predicted.step_s if facts.predicted else None
    seen = picture(facts.cluster, loads)
    drawn = [diagram(seen, step_s, _notes(facts.record))]
    if loads:
        keys = legend([(f"{20 * k}–{20 * k + 20} %", colour, "box") for k, colour in enumerate(RAMP)])
        drawn = [tag("p", "Busy share of the predicted step; width: predicted bytes per step.", class_="note"), keys, *drawn]
    pairs = [(child.name, parent.name, child.up, child.down) for parent, child in cables(seen)]
    pairs += [(source, target, direction, None) for source, target, direction in seen.others]
    lines = [line for pair in pairs for line in _link(*pair, step_s)]
    heads = ["link", "line rate", "delay", "known", "for the axis", "bytes a step", "busy"]
    grid = _folded(_table(heads, lines, words=1), len(lines), "links") if lines else _gap("The cluster file has no links.")
    gaps = [] if loads else [_gap("The load of the links was not predicted: they are drawn without it.")]
    figure = tag("div", tag("figure", *drawn), tag("div", grid), class_="two")
    return _section("network", f"The network: {facts.cluster.name}", *gaps, figure)


def _notes(record: Record) -> dict[str, str]:
    """By host, its ranks and where they are on the axes."""
    notes: dict[str, list[str]] = {}
    for rank, (host, place) in enumerate(zip(record.hosts, record.places, strict=False)):
        where = ", ".join(f"{axis} {number}" for axis, number in place.items())
        notes.setdefault(host, []).append(f"{rank}: {where}" if where else str(rank))
    return {host: f"rank{'s' * (len(ranks) > 1)} {'; '.join(ranks)}" for host, ranks in notes.items()}


def assumptions(facts: Facts) -> Markup:
    """What the prediction assumes, and what the folder does not hold."""
    given = facts.predicted.assumptions if facts.predicted else ()
    parts = [tag("ul", *(tag("li", line) for line in [*circumstances(facts), *given]))] if given or circumstances(facts) else []
    if not given:
        parts.append(_gap("The prediction states no assumptions." if facts.predicted else "Nothing was predicted."))
    missing = [tag("h3", "Not in this run folder"), tag("ul", *(tag("li", line) for line in facts.missing))]
    return _section("assumptions", "Assumptions and gaps", *parts, *(missing if facts.missing else []))


def settings(facts: Facts) -> Markup:
    """run.toml and the environment."""
    record = facts.record
    data = record.data
    pairs = [
        ("run folder", str(facts.folder.path.resolve())),
        ("started", moment(record.started)),
        ("ended", facts.finished),
        ("thinwire", record.thinwire),
        ("torch", record.torch),
        ("device", record.device),
        ("dtype", record.dtype),
        ("parameters", whole(record.num_parameters) if record.num_parameters else None),
        ("hosts by rank", _hosts_by_rank(record.hosts)),
        ("data", f"{data.source}, {whole(data.files)} files, {quantity(data.bytes, 'B')}" if data else None),
        ("SHA-256 of the data", data.sha256 if data else None),
        ("checkpoints", ", ".join(point.path for point in facts.checkpoints) or "none"),
        ("resumed", "; ".join(f"at step {note.step}, {note.dropped} later events dropped" for note in facts.resumes) or "no"),
    ]
    grid = tag("dl", *(join([tag("dt", name), tag("dd", value or "not recorded")]) for name, value in pairs), class_="pairs")
    toml = tag("pre", facts.run_toml) if facts.run_toml else _gap("run.toml is absent: the settings are not known.")
    return _section("settings", "Settings and environment", grid, tag("h3", "run.toml"), toml)


def _section(name: str, title: str, *children: Markup) -> Markup:
    return tag("section", tag("h2", title), *children, id=name)


def _gap(sentence: str) -> Markup:
    return tag("p", sentence, class_="gap")


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], words: int, bold: Sequence[bool] = ()) -> Markup:
    """A table whose first `words` columns are words and whose others are numbers, aligned right."""
    kinds = ["w" if k < words else "n" for k in range(len(heads))]
    head = tag("tr", *(tag("th", text, class_=kind, scope="col") for text, kind in zip(heads, kinds, strict=True)))
    body = []
    for line, is_sum in zip(lines, bold or [False] * len(lines), strict=True):
        row = (tag("td", text, class_=kind) for text, kind in zip(line, kinds, strict=True))
        body.append(tag("tr", *row, class_="sum" if is_sum else None))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex="0")


def _segments(cost: StepCost) -> list[Segment]:
    known = [(PARTS[key], PART_COLOURS[key], getattr(cost, key)) for key in PARTS]
    segments = [Segment(name, colour, seconds) for name, colour, seconds in known if math.isfinite(seconds)]
    rest = unaccounted(cost)
    return [*segments, Segment(OTHER, GREY, rest)] if rest > 0.005 * cost.step_s else segments


def _link(child: str, parent: str, up: Direction | None, down: Direction | None, step_s: float | None) -> list[list[str]]:
    """One line where both directions are alike, else one each."""
    ends = [(f"{child} ↔ {parent}", up)]
    if up != down:
        ends = [(f"{child} → {parent}", up), (f"{parent} → {child}", down)]
    lines = []
    for name, direction in ends:
        if direction:
            load, busy = direction.bytes_per_step, percent(busy_share(direction, step_s))
            known = "measured" if direction.measured else "declared"
            rates = [quantity(direction.bandwidth_bps, "bit/s"), quantity(direction.latency_s, "s"), known]
            axes = ", ".join(f"{axis} {percent(part / load)}" for axis, part in direction.axes.items() if load)
            lines.append([name, *rates, axes, UNKNOWN if load is None else quantity(load, "B"), busy])
    return lines


def _folded(grid: Markup, count: int, what: str) -> Markup:
    """A long table behind a line to click on."""
    return grid if count <= MAX_LINES else tag("details", tag("summary", f"All {count} {what}"), grid)


def _hosts_by_rank(hosts: Sequence[str]) -> str:
    """host0 ×2, host1 ×2, ...; of many only the first few."""
    counted = [(host, sum(1 for _ in ranks)) for host, ranks in groupby(hosts)]
    names = [f"{host} ×{count}" if count > 1 else host for host, count in counted]
    more = f", … {len(names) - MAX_LINES} more" if len(names) > MAX_LINES + 1 else ""
    return ", ".join(names[:MAX_LINES] if more else names) + more


def _beside_baseline(facts: Facts) -> str:
    baseline = facts.record.baseline
    return f"{baseline.name}: {plain(baseline.loss, 3)}" if baseline else facts.record.unit


def _range(low: float, high: float) -> str:
    return whole(low) if low == high or not math.isfinite(low) else f"{whole(low)} … {whole(high)}"


def _equal(predicted: float, ledger: float, equal: bool) -> str:
    if not math.isfinite(ledger):
        return "no ledger"
    return ("yes" if equal else "no") if math.isfinite(predicted) else "not predicted"


def _time_axis(times: Sequence[float]) -> tuple[str, float]:
    longest = max(times, default=0.0)
    return ("seconds", 1.0) if longest < 300 else ("minutes", 1 / 60) if longest < 3 * 3600 else ("hours", 1 / 3600)
