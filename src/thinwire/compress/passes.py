"""The backward passes of an exchange, and what becomes of one in which a gradient is not finite.

On the CPU that is known when the results of a bucket have arrived: all ranks raise one error that names parameter, ranks and
step, or the memory takes back what it has kept in the pass.

On a device the host would have to wait to know. So the memory is told by a flag (`Memory.commit`), and where an error was asked
for, the flag is copied to the host and read one pass later, or before the state is saved: the step that it spoils is made, the
next one is not, and no checkpoint of it is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
import torch.distributed as dist

from thinwire.collectives.clock import has_streams
from thinwire.collectives.groups import timeout_of
from thinwire.compress.census import Meeting, not_finite
from thinwire.compress.memory import Memory
from thinwire.config.compress import NonFinite
from thinwire.errors import UserError


@dataclass
class Found:
    """What is on its way from a device to the host: of one pass, once `over`."""

    step: int
    number: int
    """Of the pass."""
    names: list[str]
    spoiled: torch.Tensor
    """[] bool: something is not finite on some rank."""
    bad: torch.Tensor
    """[names] bool: what is not on this one."""
    over: torch.Event | None

    @property
    def own(self) -> list[str]:
        """Names of what is not finite on this rank."""
        return [name for name, bad in zip(self.names, self.bad.tolist(), strict=True) if bad]


class Findings:
    """Of passes whose flags lie on a device: what of them is on its way to the host, oldest first."""

    def __init__(self) -> None:
        self._found: list[Found] = []

    def add(self, step: int, number: int, looked: Sequence[tuple[Sequence[str], torch.Tensor]], spoiled: torch.Tensor) -> None:
        """looked: names, and flags of each, [names] bool."""
        names = [name for some, _ in looked for name in some]
        bad = torch.cat([flags for _, flags in looked]) if looked else spoiled.new_zeros(0)
        self._found.append(_fetched(step, number, names, spoiled, bad))

    def next(self, *, all_of_them: bool) -> Found | None:
        """The first that was spoiled, of all but the latest; those before it are forgotten, and if there is one all are."""
        while len(self._found) > (0 if all_of_them else 1):
            found = self._found.pop(0)
            if found.over is not None:
                found.over.synchronize()
            if bool(found.spoiled):
                self._found = []
                return found
        return None


class Passes:
    """Of the ranks of `group`; the same calls in the same order on each. See the top of the file."""

    def __init__(self, nonfinite: NonFinite, memory: Memory, *, on_device: bool, tracks_use: bool) -> None:
        self._nonfinite, self._memory, self._on_device = nonfinite, memory, on_device
        self._step = 0
        self._staged = nonfinite == "average" or (on_device and tracks_use)
        if self._staged:
            memory.stage()
        self._number, self._spoiled = 0, False
        """Of the passes so far, and whether something in the one that is under way is not finite."""
        self._flags: list[torch.Tensor] = []
        self._looked: list[tuple[Sequence[str], torch.Tensor]] = []
        """On a device, of the pass under way: the flags of its shares, and what this rank has looked at."""
        self._findings = Findings()
        """Where an error was asked for."""

    def meet(self, meeting: Meeting, group: dist.ProcessGroup) -> None:
        self._meeting, self._group = meeting, group

    def begin(self, *, last: bool) -> None:
        """One of its buckets is handed over."""
        self._number += last

    def census(self, about: str) -> Callable[[Sequence[str]], dict[str, list[int]]]:
        """Of one share, which may be asked more than once."""
        numbers, passes = count(), self._number

        def ask(found: Sequence[str]) -> dict[str, list[int]]:
            return self._ask(f"pass {passes} {about} {next(numbers)}", found)

        return ask

    def _ask(self, about: str, found: Sequence[str]) -> dict[str, list[int]]:
        return self._meeting.census(about, found, timeout_of(self._group))

    def look(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Before the first stage of a bucket: on a device, where an error may have to name the gradients of this rank."""
        if self._on_device and self._nonfinite == "raise" and gradients:
            largest = torch.stack(torch._foreach_norm(list(gradients.values()), torch.inf))
            self._looked.append((list(gradients), ~torch.isfinite(largest)))

    def conclude(self, nonfinite: Mapping[str, list[int]], flags: Sequence[torch.Tensor], step: int, *, last: bool) -> None:
        """After all results of a bucket, in the order of the buckets. UserError where one is asked for and the host knows.

        nonfinite: as `Share.nonfinite`; flags: as `Share.spoiled`, on a device.
        """
        self._flags += flags
        self._step = step
        if nonfinite and self._nonfinite == "raise":
            raise UserError(not_finite(nonfinite, step))
        self._spoiled |= bool(nonfinite)
        if not last:
            return
        if self._on_device:
            self._end_on_device()
        elif self._staged and self._spoiled:
            self._memory.rollback()
        elif self._staged:
            self._memory.commit()
        self._spoiled = False

    def _end_on_device(self) -> None:
        if self._staged:
            self._memory.commit(torch.stack(self._flags).any() if self._flags else None)
        self._fetch()

    def _fetch(self) -> None:
        """Of what the pass has learned so far, begin to tell the host, if an error was asked for."""
        if self._nonfinite == "raise" and self._flags:
            self._findings.add(self._step, self._number, self._looked, torch.stack(self._flags).any())
        self._flags, self._looked = [], []

    def check(self, *, all_of_them: bool = False) -> None:
        """UserError, on all ranks, if a pass before the latest one was spoiled and an error was asked for; all_of_them: or the
        latest one was, or what there is of the next, which waits for it."""
        if all_of_them and self._nonfinite == "raise":
            self._fetch()
        found = self._findings.next(all_of_them=all_of_them)
        if found is not None:
            nonfinite = self._ask(f"pass {found.number} seen late", found.own) or {found.names[0]: []}
            raise UserError(not_finite(nonfinite, found.step))


def _fetched(step: int, number: int, names: list[str], spoiled: torch.Tensor, bad: torch.Tensor) -> Found:
    """Copies begun on the current stream."""
    if not has_streams(spoiled.device):
        return Found(step, number, names, spoiled, bad, None)
    copies = [torch.empty_like(one, device="cpu", pin_memory=True) for one in (spoiled, bad)]
    for copy, one in zip(copies, (spoiled, bad), strict=True):
        copy.copy_(one, non_blocking=True)
    over = torch.Event(spoiled.device)
    over.record()
    return Found(step, number, names, copies[0], copies[1], over)
