"""The sections of the page, one function each: Facts in, a <section> out. What is missing is said in its place."""

import math
from collections.abc import Sequence
from itertools import groupby

from thinwire.record import StepCost
from thinwire.report.charts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    Level,
    Segment,
    Series,
    legend,
    line_chart,
    stacked_bars,
)
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
from thinwire.report.network import Way, picture
from thinwire.report.table import cells, circumstances
from thinwire.report.text import UNKNOWN, Scale, moment, percent, plain, quantity, share, verdict, whole

MAX_LINES = 12
PART_COLOURS = {"compute_s": BLUE, "exposed_s": ORANGE, "waiting_s": PINK, "optimizer_s": GREEN}


def headline(facts: Facts) -> Markup:
    """What ran, on what, when, how it ended; the verdict; the six numbers to remember."""
    record, measured = facts.record, facts.measured
    hosts = len(set(record.hosts))
    where = f"{facts.cluster.name}, " if facts.cluster else ""
    what = f"{record.num_parameters:,} parameters".replace(",", "\u2009") if record.num_parameters else "a model"
    ran = f"{what} on {where}{hosts} host{'s' * (hosts != 1)}, {record.world_size} rank{'s' * (record.world_size != 1)}"
    held_out = plain(final_loss(facts.evals), 3) if facts.evals else "not recorded"
    tiles = [("held-out loss", "not finite" if held_out == UNKNOWN else held_out, _beside_baseline(facts))]
    if measured:
        tiles += [
            (
                "a step",
                quantity(measured.step_s, "s"),
                "median of steady steps" if facts.measured_from == "measured.json" else facts.measured_from,
            ),
            ("waiting for the wire", share(measured.exposed_s, measured.step_s), "of a step"),
            ("tokens per second", whole(measured.tokens_per_s), "all ranks together"),
            ("sent by a rank", quantity(measured.wire_bytes_per_step, "B"), "per step"),
        ]
    tiles.append(("steps", str(facts.steps[-1].step) if facts.steps else "0", facts.finished))
    chips = [tag("li", line) for line in circumstances(facts)]
    return tag(
        "header",
        tag("p", f"thinwire {record.thinwire} · started {moment(record.started)} · {facts.finished}", class_="when"),
        tag("h1", facts.name),
        tag("p", ran, class_="ran"),
        tag("p", verdict(facts.measured, facts.predicted).replace(" %", "\u00a0%"), class_="verdict"),
        tag(
            "dl",
            *(tag("div", tag("dt", name), tag("dd", value), tag("small", note)) for name, value, note in tiles),
            class_="tiles",
        ),
        tag("ul", *chips, class_="chips") if chips else None,
    )


def loss(facts: Facts) -> Markup:
    """Loss over time and over tokens, with the baseline."""
    if not facts.steps and not facts.evals:
        return _section("loss", "Loss", _gap("No loss was recorded: events.jsonl holds no step."))
    unit = facts.record.unit
    baseline = facts.record.baseline
    levels = (
        [Level(f"{baseline.name} {plain(baseline.loss, 3)}", baseline.loss)] if baseline and math.isfinite(baseline.loss) else []
    )
    time = _time_axis([event.time_s for event in facts.losses])
    charts = []
    for over, key, axis, factor in (("time", "time_s", *time), ("tokens", "tokens", "tokens", 1.0)):
        train = [(getattr(event, key) * factor, event.loss) for event in facts.steps]
        held = [(getattr(event, key) * factor, event.loss) for event in facts.evals]
        labels = [f"step {e.step} · train {plain(e.loss, 3)} · {quantity(e.time_s, 's')}" for e in facts.steps]
        held_labels = [f"step {e.step} · held-out {plain(e.loss, 3)} · {quantity(e.time_s, 's')}" for e in facts.evals]
        lines = [Series("train", GREY, train, labels)] if train else []
        lines += [Series("held-out", BLUE, held, held_labels, dots=True)] if held else []
        charts.append(line_chart(lines, levels, f"Loss over {over}, {unit}", axis, (_short, _short)))
    bad = [event.step for event in facts.losses if not math.isfinite(event.loss)]
    said = [_gap(f"The loss was not a finite number at {len(bad)} events, first at step {min(bad)}.")] if bad else []
    said += [] if facts.evals else [_gap("No held-out loss was recorded.")]
    said += [] if baseline else [_gap("No baseline loss was recorded.")]
    return _section("loss", "Loss", tag("div", *charts, class_="two"), *said)


def step(facts: Facts) -> Markup:
    """The step broken down, predicted against measured, and its time over the run."""
    rows = step_rows(facts)
    if not rows:
        return _section("step", "A step", _gap("Nothing was predicted and no step was recorded."))
    sides = [("predicted", facts.predicted), ("measured", facts.measured)]
    scale = Scale(cost.step_s for _, cost in sides if cost)
    bars = stacked_bars(
        [(name, _segments(cost)) for name, cost in sides if cost], lambda value: f"{scale.show(value)} {scale.unit}"
    )
    lines = [[*cells(row, rows)] for row in rows]
    grid = _table(["", "predicted", "measured", "off by"], lines, bold=[row.key == "step_s" for row in rows], words=1)
    said = [_gap(sentence) for sentence in facts.missing if sentence.startswith(("predicted.json", "measured.json", "No step"))]
    chart = None
    if facts.steps:
        levels = [Level("predicted", facts.predicted.step_s * scale.factor)] if facts.predicted else []
        points = [(float(event.step), event.step_s * scale.factor) for event in facts.steps]
        labels = [f"step {event.step} · {scale.show(event.step_s)} {scale.unit}" for event in facts.steps]
        chart = line_chart(
            [Series("measured", ORANGE, points, labels)],
            levels,
            f"Time of a step, {scale.unit}",
            "step",
            (_short, _short),
            zero=True,
        )
    return _section("step", "A step: predicted against measured", bars, tag("div", grid, chart, class_="two"), *said)


def sent(facts: Facts) -> Markup:
    """Bytes by Transfer, predicted against the ledger; bytes by host, the ledger against the cards."""
    rows = transfer_rows(facts)
    parts: list[Markup] = []
    if rows:
        equal = sum(row.equal for row in rows if math.isfinite(row.predicted_bytes))
        known = sum(math.isfinite(row.predicted_bytes) for row in rows)
        if known and facts.ledger:
            parts.append(tag("p", f"{equal} of {known} predicted transfers are equal to the ledger to the byte, on every rank."))
        parts.append(
            _table(
                ["carries", "op", "axis", "calls", "predicted, bytes", "ledger, bytes", "equal"],
                [
                    [
                        row.label,
                        row.op,
                        row.axis,
                        whole(row.calls),
                        whole(row.predicted_bytes),
                        _range(row.ledger_low, row.ledger_high),
                        _equal(row.predicted_bytes, row.ledger_low, row.equal),
                    ]
                    for row in rows
                ],
                words=3,
            )
        )
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
    lines = [
        [
            row.host,
            row.interfaces,
            whole(row.ledger_bytes),
            whole(row.sent_bytes),
            percent(row.difference, signed=True),
            whole(row.received_bytes),
        ]
        for row in rows
    ]
    return [words, _folded(_table(heads, lines, words=2), len(lines), "hosts")]


def network(facts: Facts) -> Markup:
    """The cluster drawn, and a table of its links."""
    if facts.cluster is None:
        return _section("network", "The network", _gap("cluster.toml is absent: the network cannot be drawn."))
    loads = facts.predicted.links if facts.predicted else ()
    step_s = facts.predicted.step_s if facts.predicted else None
    seen = picture(facts.cluster, loads)
    names = [f"{20 * k}–{20 * k + 20} %" for k in range(len(RAMP))]
    drawn = [diagram(seen, step_s)]
    if loads:
        keys = legend([(name, ramp, "box") for name, ramp in zip(names, RAMP, strict=True)])
        drawn = [
            tag("p", "Busy share of the predicted step; width: predicted bytes per step.", class_="note"),
            keys,
            *drawn,
        ]
    pairs = [(child.name, parent.name, child.up, child.down) for parent, child in cables(seen)]
    pairs += [(source, target, way, None) for source, target, way in seen.others]
    lines = [line for pair in pairs for line in _link(*pair, step_s)]
    heads = ["link", "line rate", "delay", "known", "bytes a step", "busy"]
    grid = _folded(_table(heads, lines, words=1), len(lines), "links") if lines else _gap("The cluster file has no links.")
    said = [] if loads else [_gap("The load of the links was not predicted: they are drawn without it.")]
    return _section(
        "network",
        f"The network: {facts.cluster.name}",
        *said,
        tag("div", tag("figure", *drawn), tag("div", grid), class_="two"),
    )


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
        (
            "resumed",
            "; ".join(f"at step {note.step}, {note.dropped} later events dropped" for note in facts.resumes) or "no",
        ),
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
    body = (
        tag(
            "tr",
            *(tag("td", text, class_=kind) for text, kind in zip(line, kinds, strict=True)),
            class_="sum" if k < len(bold) and bold[k] else None,
        )
        for k, line in enumerate(lines)
    )
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex="0")


def _segments(cost: StepCost) -> list[Segment]:
    known = [(PARTS[key], PART_COLOURS[key], getattr(cost, key)) for key in PARTS]
    segments = [Segment(name, colour, seconds) for name, colour, seconds in known if math.isfinite(seconds)]
    rest = unaccounted(cost)
    return [*segments, Segment(OTHER, GREY, rest)] if rest > 0.005 * cost.step_s else segments


def _link(child: str, parent: str, up: Way | None, down: Way | None, step_s: float | None) -> list[list[str]]:
    """One line where both directions are alike, else one each."""
    ends = [(f"{child} ↔ {parent}", up)]
    if up != down:
        ends = [(f"{child} → {parent}", up), (f"{parent} → {child}", down)]
    return [
        [
            name,
            quantity(way.bandwidth_bps, "bit/s"),
            quantity(way.latency_s, "s"),
            "measured" if way.measured else "declared",
            quantity(way.bytes_per_step, "B") if way.bytes_per_step is not None else UNKNOWN,
            percent(busy_share(way, step_s)),
        ]
        for name, way in ends
        if way
    ]


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


def _short(value: float) -> str:
    for letter, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value:.4g}"
