"""From a schedule to the instructions of one rank for one size: where each slot lies, when receives start, what waits for what.

The program of the rank (`schedules.program`) is taken in its own order. A slot lies

    in the input         until something is added to it; the input is only read
    in the output        if the chunk is due here, from the first value on that is written
    in scratch memory    otherwise

A message is received in place if its chunks are due here, lie in one piece, and that piece is free when the receive starts;
else into scratch memory, and is added or copied from there. Receives start `AHEAD` messages before they are needed, so that no
sender waits for this rank; and those of a step start all together, before its sends, so that two ranks that send each other the
same chunk do not wait for each other for ever, and the notice that a receive has started does not queue behind data.

Scratch memory is released after its last use, and then used again; a piece from which a send may still read is used again only
if there would be more than `SPARE` elements otherwise, and if that send started in an earlier step: by induction over the steps,
what a rank waits for never waits for that rank.

In-place ops (all_reduce, broadcast, reduce at the root) have one buffer, called output.

Without tags (NCCL) messages between two ranks match in the order in which they start. What starts as one batch goes on side by
side; what comes after starts when all of the batch is over. There a rank starts all receives and sends of a step as one batch,
and those of the next step after they are over: the executor for which every schedule is proven free of deadlock and to match in
order (`schedules.verify`). With a receive and a send one after the other, two ranks that exchange something would deadlock.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from thinwire.collectives.run.instructions import (
    INPUT,
    OUTPUT,
    SCRATCH,
    Combine,
    Compiled,
    Copy,
    Instruction,
    Piece,
    Start,
    StartBatch,
    Wait,
)
from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.program import Action, programs
from thinwire.collectives.schedules.schedule import Schedule

AHEAD = 16
"""Messages whose receives start before they are needed."""
SPARE = 1 << 20
"""Elements of scratch memory up to which no piece is used twice while a send may read it."""


def compile_for(schedule: Schedule, rank: int, sizes: Sequence[int], ahead: int = AHEAD) -> Compiled:
    """sizes[b]: elements of block b. ahead: 0 starts no receive before its step. The schedule should have been verified."""
    return _Compiler(schedule, rank, sizes, ahead).compiled()


def compile_without_tags(schedule: Schedule, rank: int, sizes: Sequence[int]) -> Compiled:
    """As `compile_for`, for carriers whose messages have no tags."""
    compiled = compile_for(schedule, rank, sizes, ahead=0)
    return replace(compiled, instructions=_in_batches(compiled.instructions))


def in_place(op: str, root: int | None, rank: int) -> bool:
    """Whether `rank` has one buffer for what it gives and what it gets."""
    return op in ("all_reduce", "broadcast") or (op == "reduce" and rank == root)


@dataclass(slots=True)
class _Region:
    """A stretch of scratch memory. users: slots and messages in it; readers: sends that may still read it."""

    piece: Piece
    users: int = 0
    readers: list[int] = field(default_factory=list)


class _Compiler:
    def __init__(self, schedule: Schedule, rank: int, sizes: Sequence[int], ahead: int) -> None:
        self._ahead = ahead
        self._out: list[Instruction] = []
        self._ranges = schedule.ranges(sizes)
        op, p, root = schedule.op, schedule.p, schedule.root
        given, due = ops.inputs(op, p, root, rank), ops.outputs(op, p, root, rank)
        one = in_place(op, root, rank)
        given_at, due_at = ops.offsets(given, sizes), ops.offsets(due, sizes)
        blocks = [chunk.block for chunk in schedule.chunks]
        self._due = {c: self._piece(OUTPUT, due_at[block], c) for c, block in enumerate(blocks) if block in due_at}
        own = OUTPUT if one else INPUT
        self._slot = {c: self._piece(own, given_at[block], c) for c, block in enumerate(blocks) if block in given_at}
        lengths = sum(sizes[block] for block in given), sum(sizes[block] for block in due)
        self._lengths = (max(lengths), max(lengths)) if one else lengths
        program = programs(schedule)[rank]
        filled = [replace(action, chunks=tuple(c for c in action.chunks if len(self._ranges[c]))) for action in program]
        self._actions = [action for action in filled if action.chunks]
        self._step_of = {action.message: action.step for action in self._actions}
        numbers = {action.message: at for at, action in enumerate(self._actions)}
        self._position = {at: numbers[action.message] for at, action in enumerate(program) if action.message in numbers}
        self._last_use = {c: at for at, action in enumerate(self._actions) for c in action.chunks}
        self._home: dict[int, _Region] = {}
        self._regions: list[_Region] = []
        self._scratch = 0
        self._receiving: dict[int, tuple[Piece, _Region | None]] = {}
        """Where to, and in which scratch memory (None: it is the final place)."""
        self._next = 0
        self._sending: dict[int, Piece] = {}
        self._sent: set[int] = set()
        self._step = self._done = -1

    def _piece(self, buffer: int, at: int, chunk: int) -> Piece:
        """Of a chunk whose block begins at element `at`."""
        return Piece(buffer, at + self._ranges[chunk].start, at + self._ranges[chunk].stop)

    def compiled(self) -> Compiled:
        if not any(action.kind == "reduce" for action in self._actions):
            self._deliver(self._slot)  # what is given and due here is in its place from the start
        for at, action in enumerate(self._actions):
            if action.step != self._step:
                self._start_receives(at)
            if action.kind == "send":
                self._send(action)
            else:
                self._receive(at, action)
            self._done = at
            self._release(at, action)
        self._deliver(self._due)
        for message in list(self._sending):
            self._wait_send(message)
        sent = sum(len(one.piece) for one in self._out if isinstance(one, Start) and one.sends)
        return Compiled(tuple(self._out), (*self._lengths, self._scratch), sent)

    def _deliver(self, chunks: Iterable[int]) -> None:
        """Of these chunks, copy to the output those that are due here and lie elsewhere."""
        due = {c: self._due[c] for c in chunks if c in self._due}
        for into, source in _merged([(due[c], self._slot[c]) for c in due if self._slot.get(c, due[c]) != due[c]]):
            self._copy(into, source)
        self._slot.update(due)

    def _send(self, action: Action) -> None:
        pieces = _joined([self._slot[c] for c in action.chunks])
        source = pieces[0]
        if len(pieces) > 1:
            region = self._region(sum(map(len, pieces)))
            at = region.piece.first
            for piece in pieces:
                self._copy(Piece(SCRATCH, at, at + len(piece)), piece)
                at += len(piece)
            source = region.piece
            region.readers.append(action.message)
        else:
            for region in {id(self._home[c]): self._home[c] for c in action.chunks if c in self._home}.values():
                region.readers.append(action.message)
        self._out.append(Start(action.message, action.peer, source, sends=True))
        self._sending[action.message] = source

    def _receive(self, at: int, action: Action) -> None:
        self._start_receives(at)
        self._out.append(Wait(action.message, sends=False))
        received, region = self._receiving.pop(action.message)
        parts = self._parts(received, action.chunks)
        if action.kind == "reduce":
            self._apply(action.chunks, parts, region)
        else:
            moves = [(self._due[c], parts[c]) for c in action.chunks if c in self._due and region is not None]
            for into, source in _merged(moves):
                self._copy(into, source)
            for c in action.chunks:
                self._move(c, *((self._due[c], None) if c in self._due else (parts[c], region)))
        if region is not None:
            region.users -= 1

    def _apply(self, chunks: Sequence[int], parts: dict[int, Piece], region: _Region | None) -> None:
        sums: list[tuple[Piece, Piece, Piece]] = []
        for c in chunks:
            own = self._slot[c]
            into = own if own.buffer == SCRATCH else self._due.get(c, parts[c])
            sums.append((into, own, parts[c]))
        for into, own, part in _merged(sums):
            self._wait_for_readers(into)
            self._out.append(Combine(into, own, part))
        for c, (into, _, _) in zip(chunks, sums, strict=True):
            if into == parts[c]:
                self._move(c, into, region)
            elif into != self._slot[c]:
                self._move(c, into, None)

    def _start_receives(self, at: int) -> None:
        """Start receives until those of the next `ahead` messages have started, and all of this step."""
        self._step = self._actions[at].step
        for action in self._actions[self._next :]:
            if len(self._receiving) >= self._ahead and action.step > self._step:
                break
            self._next += 1
            if action.kind == "send":
                continue
            pieces = _joined([self._due[c] for c in action.chunks]) if all(c in self._due for c in action.chunks) else []
            region = None
            if action.kind == "copy" and len(pieces) == 1 and self._is_free(action, pieces[0]):
                into = pieces[0]
            else:
                region = self._region(sum(len(self._ranges[c]) for c in action.chunks))
                region.users += 1
                into = region.piece
            self._receiving[action.message] = into, region
            self._out.append(Start(action.message, action.peer, into, sends=False))

    def _is_free(self, action: Action, into: Piece) -> bool:
        """Whether `into` may be overwritten now: all that the program wants done before has been done."""
        before = [self._position[at] for at in action.after if at in self._position]
        return all(at <= self._done for at in before) and not any(piece.overlaps(into) for piece in self._sending.values())

    def _parts(self, whole: Piece, chunks: Sequence[int]) -> dict[int, Piece]:
        parts, at = {}, whole.first
        for c in chunks:
            parts[c] = Piece(whole.buffer, at, at + len(self._ranges[c]))
            at = parts[c].last
        return parts

    def _move(self, chunk: int, piece: Piece, region: _Region | None) -> None:
        """The slot of `chunk` lies in `piece` from now on."""
        old = self._home.pop(chunk, None)
        if old is not None:
            old.users -= 1
        self._slot[chunk] = piece
        if region is not None:
            region.users += 1
            self._home[chunk] = region

    def _release(self, at: int, action: Action) -> None:
        """Give up slots in scratch memory that nobody needs any more."""
        for c in action.chunks:
            if self._last_use[c] == at and c not in self._due and (region := self._home.pop(c, None)) is not None:
                region.users -= 1

    def _region(self, length: int) -> _Region:
        """Scratch memory of `length` elements that nobody uses."""
        idle = [region for region in self._regions if not region.users and len(region.piece) >= length]
        free = [region for region in idle if all(message in self._sent for message in region.readers)]
        if not free and idle and self._scratch + length > SPARE:
            early = [region for region in idle if self._latest_step(region.readers) < self._step]
            free = [min(early, key=lambda region: self._latest_step(region.readers))] if early else []
        if not free:
            free = [_Region(Piece(SCRATCH, self._scratch, self._scratch + length))]
            self._scratch += length
        region = min(free, key=lambda one: len(one.piece))
        if region in self._regions:
            self._regions.remove(region)
        for message in region.readers:
            self._wait_send(message)
        taken = _Region(Piece(SCRATCH, region.piece.first, region.piece.first + length))
        self._regions.append(taken)
        if length < len(region.piece):
            self._regions.append(_Region(Piece(SCRATCH, taken.piece.last, region.piece.last)))
        return taken

    def _latest_step(self, messages: Sequence[int]) -> int:
        return max((self._step_of[message] for message in messages), default=-1)

    def _wait_for_readers(self, piece: Piece) -> None:
        for message in [message for message, source in self._sending.items() if source.overlaps(piece)]:
            self._wait_send(message)

    def _wait_send(self, message: int) -> None:
        if self._sending.pop(message, None) is not None:
            self._sent.add(message)
            self._out.append(Wait(message, sends=True))

    def _copy(self, into: Piece, source: Piece) -> None:
        self._wait_for_readers(into)
        self._out.append(Copy(into, source))


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same memory in the same order, in as few pieces as can be."""
    return [first for (first,) in _merged([(piece,) for piece in pieces])]


def _merged(rows: Sequence[tuple[Piece, ...]]) -> list[tuple[Piece, ...]]:
    """Rows of pieces that follow one upon the other in every column become one; empty ones are left out."""
    result: list[tuple[Piece, ...]] = []
    for row in rows:
        if not len(row[0]):
            continue
        if result and all(a.buffer == b.buffer and a.last == b.first for a, b in zip(result[-1], row, strict=True)):
            result[-1] = tuple(Piece(a.buffer, a.first, b.last) for a, b in zip(result[-1], row, strict=True))
        else:
            result.append(row)
    return result


def _in_batches(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    out: list[Instruction] = []
    parts: list[Start] = []
    for instruction in instructions:
        match instruction:
            case Start(sends=False):
                over = any(part.sends for part in parts)  # receives come first in a step: this is the next one
            case Wait(message, sends=True):
                over = any(part.message == message for part in parts)
            case Wait() | Combine():
                over = True
            case _:
                over = False
        if over and parts:
            out.append(StartBatch(tuple(parts)))
            parts = []
        if isinstance(instruction, Start):
            parts.append(instruction)
        else:
            out.append(instruction)  # before what has not started: it copies what is about to be sent
    return (*out, StartBatch(tuple(parts))) if parts else tuple(out)
