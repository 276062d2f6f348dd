"""The run folder: everything a run leaves behind, as plain files that people and the report can read. No torch.

    run.toml  cluster.toml      what was run, and on what (cluster.toml may be absent)
    record.json                 what the run is: versions, hosts by rank, data, baseline
    events.jsonl                one JSON object a line: step, eval, checkpoint, resume, end
    predicted.json  measured.json   seconds and bytes of one step, before and after
    examples.json               what the model says of held-out examples (absent where the task shows none)
    ledger.json  cards.json     bytes by call, and by the network cards' own counters (lab only)

One class a file or event, checked when written and when read. Seconds, bytes and tokens are in the unit that the name ends
in. A number that is not finite is null in the file, since JSON has no word for it, and nan here. Unknown keys (of a newer
version) are kept.

JSON files are written aside and renamed, so a reader sees the old file or the new one, never half of one. Events are
appended and flushed a line at a time; a last line cut off by a crash is ignored. Only one process (rank 0) writes.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from thinwire.errors import UserError
from thinwire.files import written_aside
from thinwire.stepcost import Entry, Number, StepCost

PICTURE = "data:image/"


class Data(Entry):
    """The text that was trained on: where it came from, and its sha256."""

    source: str
    files: int = 0
    documents: int = 0
    bytes: int = 0
    sha256: str = ""
    skipped: str = ""
    """What was said of records left out."""


class Baseline(Entry):
    """What a simple table scores on the same held-out text."""

    name: str
    loss: Number


class BaselineScore(Entry):
    """What a trivial method scores on the same held-out part."""

    name: str
    score: Number


class Scored(Entry):
    """What a task is judged by besides its loss. margin: by so much, in its unit, it has to be better than the baseline, stated
    before the run; higher: whether more is better."""

    name: str
    unit: str
    margin: float
    baseline: BaselineScore
    higher: bool = True

    def gain(self, score: float) -> float:
        """By how much a score is better than the baseline."""
        return score - self.baseline.score if self.higher else self.baseline.score - score

    def held(self, score: float) -> bool:
        """Whether the margin is kept."""
        return self.gain(score) >= self.margin


class Record(Entry):
    """record.json. `hosts[r]` is the host of rank r, `places[r]` its place on each axis that has more than one rank; `delay` is
    "applied", "none" or "refused: why"."""

    thinwire: str
    started: str
    world_size: int
    hosts: tuple[str, ...]
    places: tuple[dict[str, int], ...] = ()
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
    item: str = "token"
    """What `tokens` count."""
    score: Scored | None = None


class Examples(Entry):
    """examples.json: held-out examples beside what the model of `step` says of them. An empty line ends one; if there is none,
    each line is one. A line that begins with `PICTURE` is the URI of a picture."""

    step: int
    lines: tuple[str, ...]


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
    """One network card's own counters over the command: whole frames; `*_share` is the part of the line rate that was used."""

    host: str
    interface: str
    sent_bytes: int
    received_bytes: int
    sent_share: Number = math.nan
    received_share: Number = math.nan


class Cards(Entry):
    """cards.json: each card's own counters over the whole command, and the bytes that each host sent by the ledger."""

    cards: tuple[Card, ...]
    ledger_sent_bytes: dict[str, float] = Field(default_factory=dict)


class _Event(Entry):
    event: str
    step: int
    time_s: Number


class Step(_Event):
    """A progress event of rank 0; `wire_bytes`: sent by this rank per step since the last event."""

    event: Literal["step"] = "step"
    tokens: int
    loss: Number
    step_s: Number
    compute_s: Number = math.nan
    exposed_s: Number = math.nan
    waiting_s: Number = math.nan
    optimizer_s: Number = math.nan
    host_s: Number = math.nan
    tokens_per_s: Number = math.nan
    wire_bytes: Number = math.nan
    learning_rate: Number = math.nan


class Eval(_Event):
    """The held-out loss after `step` steps, and the score of a task that has one."""

    event: Literal["eval"] = "eval"
    tokens: int
    loss: Number
    score: Number = math.nan


class Checkpoint(_Event):
    """A checkpoint is whole; `path` is relative to the run folder. blocked_s: for how long training stood still, of `save_s`."""

    event: Literal["checkpoint"] = "checkpoint"
    path: str
    save_s: Number = math.nan
    blocked_s: Number = math.nan


class Resume(_Event):
    """The run went on from `step`; `dropped` later events were taken out of the file."""

    event: Literal["resume"] = "resume"
    dropped: int


class Assigned(_Event):
    """From `step` on each replica has so many micro-batches of a step, by its number: planned anew while it trained."""

    event: Literal["assigned"] = "assigned"
    micro_batches: tuple[int, ...]


class Replanned(_Event):
    """From `step` on these keys of run.toml have other values, and predicted.json is of them: planned anew while it trained."""

    event: Literal["replanned"] = "replanned"
    changes: dict[str, Any]
    why: str


class End(_Event):
    """The last event; `reason` is "done", "interrupted" or "failed: why"."""

    event: Literal["end"] = "end"
    reason: str


Event = Step | Eval | Checkpoint | Resume | Assigned | Replanned | End
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
SCHEMAS: dict[str, type[Entry]] = {
    "record.json": Record,
    "predicted.json": StepCost,
    "measured.json": StepCost,
    "examples.json": Examples,
    "ledger.json": Ledger,
    "cards.json": Cards,
}

_EntryT = TypeVar("_EntryT", bound=Entry)
_EventT = TypeVar("_EventT", Step, Eval, Checkpoint, Resume, End)


@dataclass(frozen=True)
class RunFolder:
    """A run folder at `path`. `create` makes one for writing, `open` finds one for reading."""

    path: Path

    @classmethod
    def create(cls, path: Path | str, resume: bool = False) -> "RunFolder":
        """A new folder, or with `resume` one that is a run folder already. UserError before anything is harmed."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"run folder {path} is a file: choose another folder")
        present = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        if resume and "record.json" not in present:
            raise UserError(f"run folder {path} cannot be resumed: it has no record.json")
        if present and not resume:
            hint = "continue it with --resume or choose another" if "record.json" in present else "choose another"
            raise UserError(f"run folder {path} is not empty ({len(present)} entries, {present[0]!r} first): {hint}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {path} cannot be made: {error.strerror}") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """An existing run folder; UserError where there is none."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"run folder {path} does not exist")
        if not (path / "record.json").is_file():
            raise UserError(f"{path} is not a run folder: it has no record.json")
        return cls(path)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def write(self, name: str, content: Mapping[str, Any] | BaseModel) -> None:
        """Write one of the JSON files ("record.json", "ledger.json", ...), checked against its schema first."""
        plain = content.model_dump(mode="python") if isinstance(content, BaseModel) else dict(content)
        _validate(SCHEMAS[name], plain, str(self.path / name))
        self.write_text(name, json.dumps(finite(plain), indent=1, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file aside, make it durable, rename it into place."""
        target = self.path / name
        try:
            with written_aside(target) as aside, aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror}") from error

    def read_text(self, name: str) -> str | None:
        """The text of a file of the folder, None if it is absent."""
        try:
            return (self.path / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be read: {error.strerror}") from error

    def record(self) -> Record:
        record = self._read("record.json", Record)
        if record is None:
            raise UserError(f"{self.path} is not a run folder: it has no record.json")
        return record

    def predicted(self) -> StepCost | None:
        return self._read("predicted.json", StepCost)

    def measured(self) -> StepCost | None:
        return self._read("measured.json", StepCost)

    def examples(self) -> Examples | None:
        return self._read("examples.json", Examples)

    def ledger(self) -> Ledger | None:
        return self._read("ledger.json", Ledger)

    def cards(self) -> Cards | None:
        return self._read("cards.json", Cards)

    def append(self, event: Mapping[str, Any] | BaseModel) -> None:
        """Add one event, on disk as one whole line when this returns."""
        plain = event.model_dump(mode="python") if isinstance(event, BaseModel) else dict(event)
        target = self.path / "events.jsonl"
        _validate(EVENT, plain, str(target))
        try:
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(plain), ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror}") from error

    def events(self) -> Iterator[Event]:
        """All events in order. A last line without its newline was cut off by a crash and is left out."""
        lines = (self.read_text("events.jsonl") or "").split("\n")
        for number, line in enumerate(lines[:-1], start=1):
            where = f"{self.path / 'events.jsonl'}:{number}"
            yield _validate(EVENT, _parse(line, where), where)

    def steps(self) -> list[Step]:
        return self._events_of(Step)

    def evals(self) -> list[Eval]:
        return self._events_of(Eval)

    def checkpoints(self) -> list[Checkpoint]:
        return self._events_of(Checkpoint)

    def resumes(self) -> list[Resume]:
        return self._events_of(Resume)

    def end(self) -> End | None:
        """How the run ended; None while it runs, or when it was killed."""
        return next(iter(self._events_of(End)[-1:]), None)

    def resume_at(self, step: int) -> Resume:
        """Take out what came after `step` (and every end), note that in the file, and return the note.

        Its `time_s` is the time of the last event kept: the clock of the resumed run goes on from there.
        """
        everything = list(self.events())
        kept = [event for event in everything if event.step <= step and not isinstance(event, End)]
        note = Resume(step=step, time_s=max((event.time_s for event in kept), default=0.0), dropped=len(everything) - len(kept))
        lines = (json.dumps(finite(event.model_dump()), ensure_ascii=False) + "\n" for event in [*kept, note])
        self.write_text("events.jsonl", "".join(lines))
        return note

    def _events_of(self, kind: type[_EventT]) -> list[_EventT]:
        return [event for event in self.events() if isinstance(event, kind)]

    def _read(self, name: str, schema: type[_EntryT]) -> _EntryT | None:
        text, where = self.read_text(name), str(self.path / name)
        return None if text is None else _validate(schema, _parse(text, where), where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _validate(schema: Any, plain: Any, where: str) -> Any:
    """`plain` as an instance of `schema`; a UserError names the file, the key and the value of the first mistake."""
    validate = schema.validate_python if isinstance(schema, TypeAdapter) else schema.model_validate
    try:
        return validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "(whole)"
        given = "" if first["type"] == "missing" else f", not {str(first['input'])[:60]!r}"
        raise UserError(f"{where}: {key}: {first['msg']}{given}") from error


def finite(value: Any) -> Any:
    """The same plain data with null for nan and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
