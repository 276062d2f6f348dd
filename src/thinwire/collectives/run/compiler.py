"""From a schedule to the instructions of one rank for one size: where each slot lies, when receives begin, what waits for what.

The program of the rank (`schedules.program`) is taken in its own order. A slot lies

    in the input         until something is added to it; the input is only read
    in the output        if the chunk is due here, from the first value on that is written
    in scratch memory    otherwise

A message is received in place if its chunks are due here, lie in one piece, and that piece is free when the receive begins;
else into scratch memory, and is added or copied from there. Receives begin `AHEAD` messages before they are needed, so that no
sender waits for this rank to get round to it, and those of a step all together, before its sends: so two ranks that send each
other the same chunk do not wait for each other for ever, and word that a receive has begun does not queue behind data that is
sent the same way.

Scratch memory is given back when the last use of it is over, and then used again; a piece that may still be on its way out is
used again only if there would be more than `SPARE` elements otherwise, and if it left in an earlier step: by induction over the
steps, what a rank waits for never waits for that rank.

In-place ops (all_reduce, broadcast, reduce at the root) have one buffer, called output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from thinwire.collectives.run.instructions import (
    INPUT,
    OUTPUT,
    SCRATCH,
    Add,
    Arrive,
    Compiled,
    Copy,
    Expect,
    Instruction,
    Leave,
    Piece,
    Send,
)
from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.program import Action, programs
from thinwire.collectives.schedules.schedule import Schedule

AHEAD = 16
"""Messages that are expected before they are needed."""
SPARE = 1 << 20
"""Elements of scratch memory up to which no piece is used twice while it may be on its way out."""


def compile_for(schedule: Schedule, rank: int, sizes: Sequence[int], ahead: int = AHEAD) -> Compiled:
    """sizes[b]: elements of block b. ahead: 0 begins no receive before its step. The schedule should have been verified."""
    return _Compiler(schedule, rank, sizes, ahead).compiled()


def in_place(op: str, root: int | None, rank: int) -> bool:
    """Whether `rank` has one buffer for what it gives and what it gets."""
    return op in ("all_reduce", "broadcast") or (op == "reduce" and rank == root)


@dataclass(slots=True)
class _Region:
    """A stretch of scratch memory. users: slots and messages in it; leaving: sends that may still read it."""

    piece: Piece
    users: int = 0
    leaving: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Receive:
    """A receive that has begun: where to, and whether that is its final place."""

    into: Piece
    region: _Region | None


class _Compiler:
    """See the top of the file."""

    def __init__(self, schedule: Schedule, rank: int, sizes: Sequence[int], ahead: int) -> None:
        self._ahead = ahead
        self._out: list[Instruction] = []
        self._ranges = schedule.ranges(sizes)
        op, p, root = schedule.op, schedule.p, schedule.root
        given, due = ops.inputs(op, p, root, rank), ops.outputs(op, p, root, rank)
        one = in_place(op, root, rank)
        given_at, due_at = ops.offsets(given, sizes), ops.offsets(due, sizes)
        self._due = {c: self._piece(OUTPUT, due_at, c) for c, chunk in enumerate(schedule.chunks) if chunk.block in due_at}
        self._slot = {
            c: self._piece(OUTPUT if one else INPUT, given_at, c)
            for c, chunk in enumerate(schedule.chunks)
            if chunk.block in given_at
        }
        lengths = sum(sizes[block] for block in given), sum(sizes[block] for block in due)
        self._lengths = (max(lengths), max(lengths)) if one else lengths
        program = programs(schedule)[rank]
        filled = [replace(action, chunks=tuple(c for c in action.chunks if len(self._ranges[c]))) for action in program]
        self._actions = [action for action in filled if action.chunks]
        self._step_of = {action.message: action.step for action in self._actions}
        numbers = {action.message: at for at, action in enumerate(self._actions)}
        self._place = {at: numbers[action.message] for at, action in enumerate(program) if action.message in numbers}
        self._last_use = {c: at for at, action in enumerate(self._actions) for c in action.chunks}
        self._home: dict[int, _Region] = {}
        self._regions: list[_Region] = []
        self._scratch = 0
        self._begun: dict[int, _Receive] = {}
        self._next = 0
        self._leaving: dict[int, Piece] = {}
        self._left: set[int] = set()
        self._step = self._done = -1

    def _piece(self, buffer: int, offsets: dict[int, int], chunk: int) -> Piece:
        where = self._ranges[chunk]
        return Piece(buffer, offsets[where.block] + where.first, offsets[where.block] + where.last)

    def compiled(self) -> Compiled:
        reduces = any(action.kind == "reduce" for action in self._actions)
        if not reduces:  # what is given and due here is in its place from the start
            self._settle(self._slot)
        for at, action in enumerate(self._actions):
            if action.step != self._step:
                self._expect(at)
            if action.kind == "send":
                self._send(action)
            else:
                self._receive(at, action)
            self._done = at
            self._let_go(at, action)
        self._settle(self._due)
        for message in list(self._leaving):
            self._leave(message)
        sent = sum(len(told.what) for told in self._out if isinstance(told, Send))
        return Compiled(tuple(self._out), (*self._lengths, self._scratch), sent)

    def _settle(self, chunks: Sequence[int] | dict[int, Piece]) -> None:
        """Of these chunks, copy to the output those that are due here and lie elsewhere."""
        moves = [
            (self._due[c], self._slot[c]) for c in chunks if c in self._due and self._slot.get(c, self._due[c]) != self._due[c]
        ]
        for into, what in _merged(moves):
            self._copy(into, what)
        self._slot.update({c: self._due[c] for c in chunks if c in self._due})

    # -- one action ------------------------------------------------------------------------------------------------------

    def _send(self, action: Action) -> None:
        pieces = _joined([self._slot[c] for c in action.chunks])
        what = pieces[0]
        if len(pieces) > 1:
            region = self._region(sum(map(len, pieces)))
            at = region.piece.first
            for piece in pieces:
                self._copy(Piece(SCRATCH, at, at + len(piece)), piece)
                at += len(piece)
            what = region.piece
            region.leaving.append(action.message)
        else:
            for region in {id(self._home[c]): self._home[c] for c in action.chunks if c in self._home}.values():
                region.leaving.append(action.message)
        self._out.append(Send(action.message, action.peer, what))
        self._leaving[action.message] = what

    def _receive(self, at: int, action: Action) -> None:
        self._expect(at)
        self._out.append(Arrive(action.message))
        receive = self._begun.pop(action.message)
        parts = self._parts(receive.into, action.chunks)
        if action.kind == "reduce":
            self._apply(action.chunks, parts, receive)
        else:
            moves = [(self._due[c], parts[c]) for c in action.chunks if c in self._due and receive.region is not None]
            for into, what in _merged(moves):
                self._copy(into, what)
            for c in action.chunks:
                self._move(c, *((self._due[c], None) if c in self._due else (parts[c], receive.region)))
        if receive.region is not None:
            receive.region.users -= 1

    def _apply(self, chunks: Sequence[int], parts: dict[int, Piece], receive: _Receive) -> None:
        sums: list[tuple[Piece, Piece, Piece]] = []
        for c in chunks:
            own = self._slot[c]
            into = own if own.buffer == SCRATCH else self._due.get(c, parts[c])
            sums.append((into, own, parts[c]))
        for into, own, part in _merged(sums):
            self._free(into)
            self._out.append(Add(into, own, part))
        for c, (into, _, _) in zip(chunks, sums, strict=True):
            if into == parts[c]:
                self._move(c, into, receive.region)
            elif into != self._slot[c]:
                self._move(c, into, None)

    def _expect(self, at: int) -> None:
        """Begin receives until those of the next messages ahead have begun, and all of this step."""
        self._step = self._actions[at].step
        for action in self._actions[self._next :]:
            if len(self._begun) >= self._ahead and action.step > self._step:
                break
            self._next += 1
            if action.kind == "send":
                continue
            length = sum(len(self._ranges[c]) for c in action.chunks)
            pieces = _joined([self._due[c] for c in action.chunks]) if all(c in self._due for c in action.chunks) else []
            region = None
            if action.kind == "copy" and len(pieces) == 1 and self._is_free(action, pieces[0]):
                into = pieces[0]
            else:
                region = self._region(length)
                region.users += 1
                into = region.piece
            self._begun[action.message] = _Receive(into, region)
            self._out.append(Expect(action.message, action.peer, into))

    def _is_free(self, action: Action, into: Piece) -> bool:
        """Whether `into` may be overwritten now: all that the program wants done before has been done."""
        before = [self._place[at] for at in action.after if at in self._place]
        return all(at <= self._done for at in before) and not any(piece.overlaps(into) for piece in self._leaving.values())

    # -- memory ----------------------------------------------------------------------------------------------------------

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

    def _let_go(self, at: int, action: Action) -> None:
        """Slots in scratch memory that nobody needs any more."""
        for c in action.chunks:
            if self._last_use[c] == at and c not in self._due and (region := self._home.pop(c, None)) is not None:
                region.users -= 1

    def _region(self, length: int) -> _Region:
        """Scratch memory that nobody uses."""
        idle = [region for region in self._regions if not region.users and len(region.piece) >= length]
        free = [region for region in idle if all(message in self._left for message in region.leaving)]
        if not free and idle and self._scratch + length > SPARE:
            early = [region for region in idle if self._begins(region.leaving) < self._step]
            free = [min(early, key=lambda region: self._begins(region.leaving))] if early else []
        if not free:
            free = [_Region(Piece(SCRATCH, self._scratch, self._scratch + length))]
            self._scratch += length
        region = min(free, key=lambda one: len(one.piece))
        if region in self._regions:
            self._regions.remove(region)
        for message in region.leaving:
            self._leave(message)
        taken = _Region(Piece(SCRATCH, region.piece.first, region.piece.first + length))
        self._regions.append(taken)
        if length < len(region.piece):
            self._regions.append(_Region(Piece(SCRATCH, taken.piece.last, region.piece.last)))
        return taken

    def _begins(self, messages: Sequence[int]) -> int:
        """The step of the last of them."""
        return max((self._step_of[message] for message in messages), default=-1)

    def _free(self, piece: Piece) -> None:
        """Wait until no send reads `piece`."""
        for message in [message for message, what in self._leaving.items() if what.overlaps(piece)]:
            self._leave(message)

    def _leave(self, message: int) -> None:
        if self._leaving.pop(message, None) is not None:
            self._left.add(message)
            self._out.append(Leave(message))

    def _copy(self, into: Piece, what: Piece) -> None:
        if len(what):
            self._free(into)
            self._out.append(Copy(into, what))


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same memory in the same order, in as few pieces as can be."""
    return [first for (first,) in _merged([(piece,) for piece in pieces])] or list(pieces[:1])


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
