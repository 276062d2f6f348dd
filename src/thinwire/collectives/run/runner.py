"""Schedules on real tensors, over the send and receive of a process group that nobody else uses.

The tag of a message is its number in the schedule, and in the bits that are left (15 of gloo's, 13 of MPICH's) which call this is
and of what (op, sizes, type). Ranks that do not agree on those do not take each other's messages for their own.

Where messages have no tags they match in order, and those of a step start as one batch (`compiler`).
"""

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from thinwire.collectives.run.compiler import compile_for, compile_without_tags
from thinwire.collectives.run.instructions import (
    Combine,
    Compiled,
    Copy,
    Piece,
    Start,
    StartBatch,
    Wait,
)
from thinwire.collectives.run.transport import GlooTransport
from thinwire.collectives.schedules.schedule import Schedule
from thinwire.errors import UserError

KEPT = 256
"""Compiled programs that a runner keeps."""
MOST_MESSAGES = 1 << 16

COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}
"""Reductions by name. avg: the sum, divided by the number of ranks at the end."""


class Runner:
    """One per group and rank. `group`: a process group or backend with send(tensors, peer, tag) and recv(tensors, peer, tag).

    most_tag: 0 if it has no tags; it then has c10d's _start_coalescing(device) and _end_coalescing(device) too.
    """

    def __init__(self, group: Any, rank: int, most_tag: int = GlooTransport.most_tag) -> None:
        self._group, self._rank = group, rank
        self._compile = compile_for if most_tag else compile_without_tags
        self._call_tags = max(1, (most_tag + 1) // MOST_MESSAGES)
        # By identity, since to hash a schedule takes as long as to run a short one; it is kept, so the number stays its own.
        self._compiled: OrderedDict[tuple[int, tuple[int, ...]], tuple[Schedule, Compiled]] = OrderedDict()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._calls = 0
        self._lock = threading.Lock()

    def run(
        self, schedule: Schedule, sizes: Sequence[int], given: torch.Tensor, got: torch.Tensor, reduction: str = "sum"
    ) -> None:
        """Collective: every rank of the group, with the same schedule, sizes, type and reduction. Returns when all is done here.

        sizes[b]: elements of block b. given, got: flat and contiguous, one tensor where the op is in place on this rank (see
        `compiler.in_place`). `schedule` has been verified. UserError for tensors of other sizes.
        """
        compiled = self._program(schedule, tuple(sizes))
        if (given.numel(), got.numel()) != compiled.lengths[:2]:
            raise UserError(
                f"{schedule.name}: rank {self._rank} of this {schedule.op} gives {given.numel()} elements, gets {got.numel()}; "
                f"the sizes ask for {compiled.lengths[0]} and {compiled.lengths[1]}"
            )
        what = zlib.crc32(f"{schedule.op} {schedule.name} {list(sizes)} {got.dtype}".encode())
        tag = (what + self._calls) % self._call_tags * MOST_MESSAGES
        self._execute(compiled, tag, (given, got, self._memory(compiled, got)), COMBINE[reduction])
        self._calls += 1
        if reduction == "avg":
            got.div_(schedule.p)

    def sent_elements(self, schedule: Schedule, sizes: Sequence[int]) -> int:
        """What this rank sends in one run."""
        return self._program(schedule, tuple(sizes)).sent

    def _program(self, schedule: Schedule, sizes: tuple[int, ...]) -> Compiled:
        key = id(schedule), sizes
        with self._lock:  # who issues a call asks for its bytes while an earlier one runs on another thread
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key][1]
            if len(schedule.messages) > MOST_MESSAGES:
                raise UserError(
                    f"{schedule.name}: {len(schedule.messages)} messages; at most {MOST_MESSAGES} can be run: use fewer segments"
                )
            made = self._compile(schedule, self._rank, sizes)
            self._compiled[key] = schedule, made
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return made

    def _memory(self, compiled: Compiled, like: torch.Tensor) -> torch.Tensor:
        needed = compiled.lengths[2] * like.itemsize
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8, device=like.device)
        return self._scratch[:needed].view(like.dtype)

    def _execute(
        self, compiled: Compiled, tag: int, memory: tuple[torch.Tensor, ...], combine: Callable[..., torch.Tensor]
    ) -> None:
        group, device, works = self._group, memory[1].device, {}

        def view(piece: Piece) -> torch.Tensor:
            return memory[piece.buffer][piece.first : piece.last]

        def start(one: Start, tag: int) -> Any:
            return (group.send if one.sends else group.recv)([view(one.piece)], one.peer, tag)

        for instruction in compiled.instructions:
            match instruction:
                case Start(message):
                    works[message] = start(instruction, tag + message)
                case StartBatch(parts):
                    group._start_coalescing(device)
                    for part in parts:
                        start(part, 0)
                    works.update(dict.fromkeys((part.message for part in parts), group._end_coalescing(device)))
                case Wait(message):
                    works.pop(message).wait()
                case Combine(into, a, b):
                    combine(view(a), view(b), out=view(into))
                case Copy(into, source):
                    view(into).copy_(view(source))
