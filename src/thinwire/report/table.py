"""Predicted against measured for the terminal, and the same numbers as plain data."""

import math
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from thinwire.record import finite
from thinwire.report.facts import Facts, Row, card_rows, final_loss, score_line, step_rows, transfer_rows
from thinwire.report.text import Scale, percent, plain, quantity, verdict

TRANSFER_KEYS = ("label", "axis", "op", "predicted_bytes", "equal")
CARD_KEYS = ("host", "sent_bytes", "received_bytes", "difference")


def table(facts: Facts) -> Group:
    """The step predicted beside measured, the loss, the bytes, in a form that rich prints."""
    rows = step_rows(facts)
    grid = Table()
    grid.add_column("a step")
    for heading in ("predicted", "measured", "prediction off by"):
        grid.add_column(heading, justify="right")
    for row in rows:
        grid.add_row(*cells(row, rows), style="bold" if row.key == "step_s" else None)
    return Group(Text(verdict(facts.measured, facts.predicted)), *([grid] if rows else []), *map(Text, _lines(facts)))


def cells(row: Row, rows: list[Row]) -> tuple[str, str, str, str]:
    """Name, predicted, measured, difference of a row, seconds of all rows in one unit."""
    scale = Scale(value for other in rows if other.unit == "s" for value in (other.predicted, other.measured))

    def write(value: float) -> str:
        return scale.with_unit(value) if row.unit == "s" else quantity(value, row.unit)

    return row.name, write(row.predicted), write(row.measured), percent(row.difference, signed=True)


def as_json(facts: Facts) -> dict[str, Any]:
    """The numbers of the report; null where not known."""
    baseline = facts.record.baseline
    content: dict[str, Any] = {
        "run": str(facts.folder.path),
        "started": facts.record.started,
        "ended": facts.end.reason if facts.end else None,
        "unit": facts.record.unit,
        "held_out_loss": final_loss(facts.evals),
        "train_loss": final_loss(facts.steps),
        "baseline_loss": baseline.loss if baseline else None,
        "measured_from": facts.measured_from,
        "rows": [_named(row, "predicted", "measured", "difference", name="key") for row in step_rows(facts)],
        "transfers": [
            _named(row, *TRANSFER_KEYS, ledger_bytes_low="ledger_low", ledger_bytes_high="ledger_high")
            for row in transfer_rows(facts)
        ],
        "cards": [_named(row, *CARD_KEYS, ledger_sent_bytes="ledger_bytes") for row in card_rows(facts)],
        "missing": facts.missing,
    }
    if facts.record.score:
        content |= {"held_out_score": facts.final_score, "score": facts.record.score.model_dump()}
    known: dict[str, Any] = finite(content)
    return known


def _named(row: object, *same: str, **attributes: str) -> dict[str, Any]:
    """{key: the attribute of `row` that is named}."""
    return {key: getattr(row, attribute) for key, attribute in ({name: name for name in same} | attributes).items()}


def _lines(facts: Facts) -> list[str]:
    """What stands below the table, a line each."""
    lines = []
    baseline = facts.record.baseline
    if facts.evals:
        beside = f"; {baseline.name}: {plain(baseline.loss, 3)}" if baseline else ""
        lines.append(f"held-out loss {plain(final_loss(facts.evals), 3)} {facts.record.unit}{beside}")
    lines += [line] if (line := score_line(facts)) else []
    transfers = [row for row in transfer_rows(facts) if math.isfinite(row.predicted_bytes)]
    if transfers and facts.ledger:
        equal = sum(row.equal for row in transfers)
        lines.append(f"ledger: {equal} of {len(transfers)} predicted transfers equal to the byte")
    known = [abs(row.difference) for row in card_rows(facts) if math.isfinite(row.difference)]
    if known:
        lines.append(f"network cards: within {percent(max(known))} of the ledger on every host (headers are theirs)")
    return [*lines, *circumstances(facts)]


def circumstances(facts: Facts) -> list[str]:
    """What a reader must know before believing the seconds: paced, lab, delay, a pace that was missed."""
    record = facts.record
    lines = ["paced: each rank computes at the rate that the cluster file declares"] if record.paced else []
    missed = facts.measured.missed_pace if facts.measured else None
    if missed:
        lines.append(f"the machine could not quite keep that rate: compute took {percent(missed)} longer than declared")
    if record.lab:
        delays = {"applied": "delay applied", "none": "no delay: latency is not imitated"}
        lines += ["lab: the network is imitated on one machine", delays.get(record.delay, f"delay {record.delay}")]
    return lines
