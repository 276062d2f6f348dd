"""A schedule as text to read, and as text to store.

The table has a row per step and a column per rank; a cell says what the rank sends: "0-3,7+>2" is chunks 0 to 3 and 7 to rank 2,
added there; without the plus sign they are copied. The stored form is JSON, one short list per message:

    {"thinwire_schedule": 1, "name": .., "op": .., "p": .., "root": null, "chunks": [[block, weight], ..],
     "steps": [[[source, target, "reduce" | "copy", [chunk, ..]], ..], ..]}
"""

import json
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule
from thinwire.errors import UserError


def to_text(schedule: Schedule) -> str:
    """The table, with a line above that says what it is."""
    root = "" if schedule.root is None else f" root {schedule.root},"
    size = f"{schedule.p} ranks, {len(schedule.chunks)} chunks, {len(schedule.steps)} steps"
    title = f"{schedule.name}: {schedule.op},{root} {size}"
    rows = [["step", *(f"rank {rank}" for rank in range(schedule.p))]]
    for number, step in enumerate(schedule.steps):
        cells: list[list[str]] = [[] for _ in range(schedule.p)]
        for message in step:
            cells[message.source].append(f"{_short(message.chunks)}{'+' if message.reduce else ''}>{message.target}")
        rows.append([str(number), *(" ".join(cell) or "." for cell in cells)])
    widths = [max(len(row[column]) for row in rows) for column in range(schedule.p + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *lines])


def to_json(schedule: Schedule) -> str:
    """One line."""
    steps = [[[m.source, m.target, "reduce" if m.reduce else "copy", m.chunks] for m in step] for step in schedule.steps]
    head = {"thinwire_schedule": 1, "name": schedule.name, "op": schedule.op, "p": schedule.p, "root": schedule.root}
    chunks = [[chunk.block, chunk.weight] for chunk in schedule.chunks]
    return json.dumps({**head, "chunks": chunks, "steps": steps}, separators=(",", ":"))


def from_json(text: str) -> Schedule:
    """The schedule that `to_json` wrote; UserError if it is none. It is well formed, but not proven right: see `verify`."""
    try:
        stored = _Stored.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "text"
        raise UserError(f"this is not a stored schedule: {where}: {first['msg']}") from None
    steps = tuple(tuple(Message(a, b, tuple(c), kind == "reduce") for a, b, kind, c in step) for step in stored.steps)
    chunks = tuple(Chunk(block, weight) for block, weight in stored.chunks)
    return Schedule(op=stored.op, p=stored.p, root=stored.root, chunks=chunks, steps=steps, name=stored.name)


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    thinwire_schedule: Literal[1]
    name: str
    op: str
    p: int
    root: int | None
    chunks: list[tuple[int, int]]
    steps: list[list[tuple[int, int, Literal["reduce", "copy"], list[int]]]]


def _short(numbers: tuple[int, ...]) -> str:
    """Runs of numbers: 0-3,7."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
