"""The verdict in words, and as data. No torch."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from thinwire.units import show
from thinwire.why.causes import Case, Cause, causes
from thinwire.why.remedies import Remedy, remedies

LINKS_SHOWN, REMEDIES_SHOWN, RANKS_SHOWN = 4, 10, 16


@dataclass(frozen=True)
class Verdict:
    """causes: the named one first; remedies: what takes it away first."""

    case: Case
    causes: list[Cause]
    remedies: list[Remedy]


def judge(case: Case) -> Verdict:
    """What costs the step its time, and what to do."""
    found = causes(case)
    return Verdict(case, found, remedies(case, found))


def ranks(case: Case) -> list[dict[str, Any]]:
    """What the mean step of each rank is made of, in seconds that add up to it (but for the end of a step)."""
    profile = case.profile
    return [
        {
            "rank": rank,
            "host": case.cluster.host_of(rank).name,
            "compute_s": program.total("forward", "backward", "issuing"),
            "waiting_s": profile.waiting_s[rank],
            "exposed_s": profile.exposed_s[rank],
            "data_s": program.total("data"),
            "outside_s": program.total("outside"),
            "optimizer_s": program.total("optimizer"),
        }
        for rank, program in enumerate(profile.programs)
    ]


def overlap(case: Case) -> float:
    """The share of the calls' time on the wire under which the rank that waits most went on computing."""
    wire_s = case.profile.wire_s
    return max(0.0, 1 - max(case.profile.exposed_s) / wire_s) if wire_s else 0.0


def as_record(verdict: Verdict) -> dict[str, Any]:
    """For --json."""
    case = verdict.case
    return {
        "cause": verdict.causes[0].name,
        "step_s": case.profile.step_s,
        "steps": case.profile.steps,
        "pause_s": case.pause_s,
        "wire_s": case.profile.wire_s,
        "overlap": overlap(case),
        "ranks": ranks(case),
        "causes": [asdict(one) for one in verdict.causes],
        "remedies": [asdict(one) for one in verdict.remedies],
        "links": [
            {"source": link.source, "target": link.target, "rate_bps": link.bandwidth_bps.value, "of_step": a, "of_calls": b}
            for link, a, b in case.utilisation()
        ],
        "calls": [
            {"op": made.op, "message_bytes": made.message_bytes, "group": list(group), "service_s": made.service_s}
            for (group, _), made in case.profile.calls.items()
        ],
    }


def as_text(verdict: Verdict) -> Group:
    """For a terminal."""
    case, first = verdict.case, verdict.causes[0]
    profile, now_s = case.profile, case.profile.step_s
    saved = f": {show(first.saving_s, 's')} of a step, {first.saving_s / now_s:.0%}" if first.saving_s else ""
    lines = [
        Text(f"why: {first.name}{saved}", style="bold"),
        Text(f"     {first.about}"),
        Text(
            f"a step takes {show(now_s, 's')} (mean of {profile.steps}); {len(profile.calls)} calls keep the wire busy for "
            f"{show(profile.wire_s, 's')}, of which {overlap(case):.0%} hides under compute"
        ),
    ]
    return Group(*lines, _ranks_table(case), _links_table(case), _causes_table(verdict), _remedies_table(verdict))


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right")
    return table


def _ranks_table(case: Case) -> Table:
    names = ("compute", "waiting for slower ranks", "exposed communication", "data loader", "outside", "optimizer")
    table = _table("what a step is made of", "rank", "host", *names, left=2)
    rows = ranks(case)
    for row in rows[:RANKS_SHOWN]:
        values = (row[key] for key in ("compute_s", "waiting_s", "exposed_s", "data_s", "outside_s", "optimizer_s"))
        table.add_row(str(row["rank"]), row["host"], *(show(value, "s") for value in values))
    if len(rows) > RANKS_SHOWN:
        table.add_row("...", f"{len(rows) - RANKS_SHOWN} more")
    return table


def _links_table(case: Case) -> Table:
    table = _table("the fullest links", "link", "rate", "busy of a step", "busy while calls run")
    for link, of_step, of_calls in case.utilisation()[:LINKS_SHOWN]:
        table.add_row(
            f"{link.source} -> {link.target}", show(link.bandwidth_bps.value, "bit/s"), f"{of_step:.0%}", f"{of_calls:.0%}"
        )
    return table


def _causes_table(verdict: Verdict) -> Table:
    table = _table("what each cause costs, alone", "cause", "of a step", "evidence")
    table.columns[2].justify = "left"
    for one in verdict.causes:
        table.add_row(one.name, f"{one.saving_s / verdict.case.profile.step_s:.0%}", one.about)
    return table


def _remedies_table(verdict: Verdict) -> Table:
    table = _table("what to do", "remedy", "predicted step", "changes", "how")
    table.columns[2].justify = table.columns[3].justify = "left"
    table.columns[3].overflow = "fold"
    now_s = verdict.case.profile.step_s
    for one in verdict.remedies[:REMEDIES_SHOWN]:
        table.add_row(one.name, f"{show(one.step_s, 's')} ({now_s / one.step_s:.2f} x)", one.changes, one.line)
    return table
