"""What a run folder holds, gathered once: the step predicted beside measured, bytes by ledger beside cards, and gaps.

Nothing here is estimated. Where measured.json is absent (the run was cut off), the medians over the recorded steps
stand in for it, and `measured_from` names them. Differences are (predicted - measured) / measured.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from thinwire.cluster import load_cluster
from thinwire.record import Card, Eval, LedgerEntry, RunFolder, Step
from thinwire.stepcost import StepCost

PARTS = {
    "compute_s": "compute",
    "exposed_s": "waiting for the wire",
    "waiting_s": "waiting for slower ranks",
    "optimizer_s": "optimizer",
    "host_s": "idle until the host",
}
"""The parts of a step by key, in the order in which they are drawn; what they leave of the step is `OTHER`."""
OTHER = "not accounted for"
EVEN_OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
"""Collectives in which every rank of a group sends the same number of bytes."""


class Facts:
    """Everything the report prints. None or empty: not in the folder; `missing` has a sentence for each."""

    def __init__(self, folder: RunFolder) -> None:
        """Read the whole folder. UserError, naming file and key, if something in it is damaged."""
        self.folder, self.record = folder, folder.record()
        self.steps, self.evals = folder.steps(), folder.evals()
        self.checkpoints, self.resumes, self.end = folder.checkpoints(), folder.resumes(), folder.end()
        self.examples = folder.examples()
        self.ledger, self.cards = folder.ledger(), folder.cards()
        self.cluster = load_cluster(folder.path / "cluster.toml") if folder.has("cluster.toml") else None
        self.run_toml = folder.read_text("run.toml")
        self.predicted, self.measured, self.measured_from = folder.predicted(), folder.measured(), "measured.json"
        if self.measured is None:
            self.measured_from = "not known"
            if self.steps:
                steady, left_out = self.steps[1:] or self.steps, ", the first left out" if len(self.steps) > 1 else ""
                self.measured = _medians(steady)
                self.measured_from = f"medians over {len(steady)} of {len(self.steps)} step events{left_out}"

    @property
    def example_lines(self) -> list[list[str]]:
        """Of each example."""
        lines = self.examples.lines if self.examples else ()
        return [list(its) for some, its in groupby(lines, bool) if some] if "" in lines else [[line] for line in lines]

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def losses(self) -> list[Step | Eval]:
        """Every event that holds a loss."""
        return [*self.steps, *self.evals]

    @property
    def final_score(self) -> float:
        """Of the last evaluation that has one, nan if none has."""
        return ([event.score for event in self.evals if math.isfinite(event.score)] or [math.nan])[-1]

    @property
    def finished(self) -> str:
        """How the run ended, in a few words."""
        if self.end is None:
            return "no end recorded: still running, or killed"
        return self.end.reason if self.end.reason == "done" else f"{self.end.reason} after step {self.end.step}"

    @property
    def missing(self) -> list[str]:
        """One sentence for each thing that the folder does not hold."""
        gaps = [
            (self.run_toml is None, "run.toml is absent: the settings are not known."),
            (self.cluster is None, "cluster.toml is absent: the network cannot be drawn."),
            (not self.steps, "No step was recorded in events.jsonl."),
            (not self.evals, "No held-out loss was recorded."),
            (self.record.baseline is None and self.record.score is None, "No baseline loss was recorded."),
            (self.predicted is None, "predicted.json is absent: there is no prediction to compare with."),
            (self.measured_from != "measured.json", f"measured.json is absent: measured values are {self.measured_from}."),
            (self.ledger is None, "ledger.json is absent: bytes by call are not known."),
            (self.cards is None, "cards.json is absent: the cards' own counters are read only in the lab."),
        ]
        return [sentence for absent, sentence in gaps if absent]


@dataclass(frozen=True)
class Row:
    """One line of predicted against measured; `unit` is "s", "B" or "1/s"; nan where not known."""

    key: str
    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def difference(self) -> float:
        """(predicted - measured) / measured; nan where it has no meaning."""
        if self.predicted == self.measured:
            return 0.0
        return (self.predicted - self.measured) / self.measured if self.measured else math.nan


@dataclass(frozen=True)
class TransferRow:
    """One Transfer, predicted and in the ledger: bytes sent by one rank over the recorded steps.

    `ledger_low`, `ledger_high`: the least and the most that a rank recorded; nan without a ledger. `equal`: to the byte,
    on every rank; where ranks send unequal shares on rank 0, of which the prediction speaks.
    """

    label: str
    axis: str
    op: str
    calls: float
    predicted_bytes: float
    ledger_low: float
    ledger_high: float
    equal: bool


@dataclass(frozen=True)
class CardRow:
    """Bytes sent by a host: by the ledger and by its cards' counters; nan where the ledger does not know the host."""

    host: str
    interfaces: str
    ledger_bytes: float
    sent_bytes: float
    received_bytes: float

    @property
    def difference(self) -> float:
        """How much more the cards counted (headers, acknowledgements), as a share of the ledger's bytes."""
        return (self.sent_bytes - self.ledger_bytes) / self.ledger_bytes if self.ledger_bytes else math.nan


def step_rows(facts: Facts) -> list[Row]:
    """The step, part by part, then the whole, its tokens and its bytes. Empty if neither side is known."""
    predicted, measured = facts.predicted, facts.measured
    if predicted is None and measured is None:
        return []

    def row(key: str, name: str, unit: str) -> Row:
        return Row(key, name, unit, *(getattr(cost, key) if cost else math.nan for cost in (predicted, measured)))

    rows = [row(key, name, "s") for key, name in PARTS.items()]
    if math.isnan(rows[-1].predicted) and math.isnan(rows[-1].measured):  # of devices only
        del rows[-1]
    rest = Row("other_s", OTHER, "s", unaccounted(predicted), unaccounted(measured))
    if max(rest.predicted, rest.measured, 0.0) > 0.005 * max(cost.step_s for cost in (predicted, measured) if cost):
        rows.append(rest)
    rows += [row("step_s", "step", "s"), row("tokens_per_s", f"{facts.record.item}s per second", "1/s")]
    return [*rows, row("wire_bytes_per_step", "sent by a rank per step", "B")]


def unaccounted(cost: StepCost | None) -> float:
    """Seconds of the step that belong to none of its parts; nan if the step is not known."""
    if cost is None:
        return math.nan
    parts = [getattr(cost, key) for key in PARTS]
    return max(0.0, cost.step_s - sum(part for part in parts if math.isfinite(part)))


def transfer_rows(facts: Facts) -> list[TransferRow]:
    """Each predicted Transfer beside the ledger, then what the ledger holds in steps and nobody predicted.

    They belong together where label, axis, op and size of a message agree. Events are counted from the step of the
    first one to the last step that the ledger knows; one more may end the run, if there were more calls.
    """
    in_steps = [entry for entry in (facts.ledger.entries if facts.ledger else ()) if entry.last_step >= 0]
    end = max((entry.last_step for entry in in_steps), default=0)
    exact: dict[tuple[str, str, str, int], list[LedgerEntry]] = defaultdict(list)
    for entry in in_steps:
        exact[entry.label, entry.axis, entry.op, entry.message_bytes].append(entry)
    rows = []
    for transfer in facts.predicted.transfers if facts.predicted else ():
        key = (transfer.label, transfer.axis, transfer.op)
        found = exact.pop((*key, transfer.message_bytes), [])
        first = min((max(entry.first_step, 0) for entry in found), default=end)
        last = max((entry.last_step for entry in found), default=end)
        events = (end - first) // transfer.every + 1
        calls = sum(entry.calls for entry in found if entry.rank == found[0].rank)
        if last == end and (end - first) % transfer.every and calls > events * transfer.calls:
            events += 1
        total = events * transfer.every * transfer.wire_bytes_per_step
        rows.append(_transfer_row(key, total, found, facts, transfer.even))
    rest: dict[tuple[str, str, str], list[LedgerEntry]] = defaultdict(list)
    for (label, axis, op, _), found in exact.items():
        rest[label, axis, op] += found
    return rows + [_transfer_row(key, math.nan, found, facts) for key, found in rest.items()]


def setup_bytes(facts: Facts) -> float:
    """Bytes that all ranks sent before the first step, by the ledger."""
    return sum(entry.wire_bytes for entry in (facts.ledger.entries if facts.ledger else ()) if entry.last_step < 0)


def card_rows(facts: Facts) -> list[CardRow]:
    """One row a host, in the order of the file."""
    by_host: dict[str, list[Card]] = defaultdict(list)
    for card in facts.cards.cards if facts.cards else ():
        by_host[card.host].append(card)
    ledger = facts.cards.ledger_sent_bytes if facts.cards else {}
    return [
        CardRow(
            host=host,
            interfaces=", ".join(card.interface for card in cards),
            ledger_bytes=ledger.get(host, math.nan),
            sent_bytes=sum(card.sent_bytes for card in cards),
            received_bytes=sum(card.received_bytes for card in cards),
        )
        for host, cards in by_host.items()
    ]


def score_line(facts: Facts) -> str:
    """The last score beside its baseline; empty where a run has none."""
    scored, found = facts.record.score, facts.final_score
    if scored is None or not math.isfinite(found):
        return ""
    verdict = "held" if scored.held(found) else "not held"
    return (
        f"held-out {scored.name} {found:.2f} {scored.unit}; {scored.baseline.name}: {scored.baseline.score:.2f}; "
        f"{scored.gain(found):.2f} better, {scored.margin:g} asked: {verdict}"
    )


def final_loss(events: Iterable[Step] | Iterable[Eval]) -> float:
    """The loss of the last event, nan if there is none."""
    return ([event.loss for event in events] or [math.nan])[-1]


def _transfer_row(
    key: tuple[str, str, str], predicted_bytes: float, found: list[LedgerEntry], facts: Facts, even: bool = True
) -> TransferRow:
    nothing = math.nan if facts.ledger is None else 0.0
    even &= key[2] in EVEN_OPS
    by_rank = dict.fromkeys(range(facts.record.world_size) if even else [0], nothing)
    calls: dict[int, int] = defaultdict(int)
    for entry in found:
        by_rank[entry.rank] = by_rank.get(entry.rank, 0.0) + entry.wire_bytes
        calls[entry.rank] += entry.calls
    compared = by_rank.values() if even else [by_rank[0]]
    return TransferRow(
        *key,
        calls=max(calls.values(), default=0),
        predicted_bytes=predicted_bytes,
        ledger_low=min(by_rank.values()),
        ledger_high=max(by_rank.values()),
        equal=all(abs(predicted_bytes - known) < 0.5 for known in compared),
    )


def _medians(steps: list[Step]) -> StepCost:
    """What measured.json would hold, from the events."""

    def median(key: str) -> float:
        known = [value for step in steps if math.isfinite(value := getattr(step, key))]
        return statistics.median(known) if known else math.nan

    medians = {key: median(key) for key in ("step_s", *PARTS, "tokens_per_s")}
    return StepCost.model_validate({**medians, "wire_bytes_per_step": median("wire_bytes")})
