"""What the files of a run folder hold: one class a file or event, frozen, checked when written and when read.

Seconds, bytes and tokens are plain numbers in the unit that the name ends in. A number that is not finite is null in
the file, since JSON has no word for it, and nan here. Unknown keys (of a newer version) are kept and ignored.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Entry(BaseModel):
    """Base of everything in the folder."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Data(Entry):
    """The text that was trained on: where it came from, and its sha256."""

    source: str
    files: int = 0
    bytes: int = 0
    sha256: str = ""


class Baseline(Entry):
    """What a simple table scores on the same held-out text."""

    name: str
    loss: Number


class Record(Entry):
    """record.json. `hosts[r]` is the host of rank r; `delay` is "applied", "none" or "refused: why"."""

    thinwire: str
    started: str
    world_size: int
    hosts: tuple[str, ...]
    torch: str | None = None
    device: str | None = None
    dtype: str | None = None
    paced: bool = False
    lab: bool = False
    delay: str = "none"
    data: Data | None = None
    num_parameters: int | None = None
    unit: str = "loss"
    baseline: Baseline | None = None


class TransferCost(Entry):
    """One predicted Transfer: `calls` of `message_bytes` every `every` steps, and what rank 0 sends for it a step.

    even: whether all ranks send as much.
    """

    label: str
    axis: str
    op: str
    message_bytes: int
    calls: int
    every: int
    wire_bytes_per_step: Number
    seconds: Number = math.nan
    even: bool = True


class LinkLoad(Entry):
    """Bytes that cross one directed link in a step, headers not counted, and the seconds they keep it busy."""

    source: str
    target: str
    bytes_per_step: Number
    busy_s: Number


class StepCost(Entry):
    """predicted.json and measured.json: one step in seconds and in bytes sent by one rank."""

    step_s: Number
    compute_s: Number = math.nan
    exposed_s: Number = math.nan
    waiting_s: Number = math.nan
    optimizer_s: Number = math.nan
    tokens_per_s: Number = math.nan
    wire_bytes_per_step: Number = math.nan
    assumptions: tuple[str, ...] = ()
    transfers: tuple[TransferCost, ...] = ()
    links: tuple[LinkLoad, ...] = ()
    missed_pace: float | None = None
    """Paced runs: how much longer than declared compute took, as a fraction, on the rank where it was most."""


class LedgerEntry(Entry):
    """Alike calls on one rank between two steps (inclusive; -1 is set-up): `message_bytes` of one, `wire_bytes` of all."""

    rank: int
    label: str
    axis: str
    op: str
    calls: int
    message_bytes: int
    wire_bytes: Number
    world_size: int = 0
    seconds: Number = math.nan
    first_step: int = -1
    last_step: int = -1


class Ledger(Entry):
    """ledger.json: all ranks' ledgers, one after another."""

    entries: tuple[LedgerEntry, ...]


class Card(Entry):
    """One network card's own counters over the command."""

    host: str
    interface: str
    sent_bytes: int
    received_bytes: int


class Cards(Entry):
    """cards.json: each card's own counters over the whole command, and what the ledger says each host sent."""

    cards: tuple[Card, ...]
    ledger_sent_bytes: dict[str, float] = Field(default_factory=dict)


class Step(Entry):
    """A progress event of rank 0; `wire_bytes`: sent by this rank per step since the last event."""

    event: Literal["step"] = "step"
    step: int
    time_s: Number
    tokens: int
    loss: Number
    step_s: Number
    compute_s: Number = math.nan
    exposed_s: Number = math.nan
    waiting_s: Number = math.nan
    optimizer_s: Number = math.nan
    tokens_per_s: Number = math.nan
    wire_bytes: Number = math.nan
    learning_rate: Number = math.nan


class Eval(Entry):
    """The held-out loss after `step` steps."""

    event: Literal["eval"] = "eval"
    step: int
    time_s: Number
    tokens: int
    loss: Number


class Checkpoint(Entry):
    """A checkpoint is whole; `path` is relative to the run folder."""

    event: Literal["checkpoint"] = "checkpoint"
    step: int
    time_s: Number
    path: str
    save_s: Number = math.nan


class Resume(Entry):
    """The run went on from `step`; `dropped` later events were taken out of the file."""

    event: Literal["resume"] = "resume"
    step: int
    time_s: Number
    dropped: int


class End(Entry):
    """The last event; `reason` is "done", "interrupted" or "failed: why"."""

    event: Literal["end"] = "end"
    step: int
    time_s: Number
    reason: str


Event = Annotated[Step | Eval | Checkpoint | Resume | End, Field(discriminator="event")]
EVENT: TypeAdapter[Step | Eval | Checkpoint | Resume | End] = TypeAdapter(Event)
SCHEMAS: dict[str, type[Entry]] = {
    "record.json": Record,
    "predicted.json": StepCost,
    "measured.json": StepCost,
    "ledger.json": Ledger,
    "cards.json": Cards,
}
