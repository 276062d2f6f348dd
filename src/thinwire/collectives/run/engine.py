"""The schedules of one group: a thread that runs them in the order of their calls, on a private group of the same ranks.

A caller that would wait at once runs its schedule itself, if none is under way: to wake a thread and be woken by it takes longer
than a short message.

Before ranks run something new together they tell each other what it is (`agree`): what differs is an error on all of them. Ranks
that part ways later wait for messages that nobody sends. So whoever waits longer than `LOOK_S` writes into the store what it is
waiting in, and reads what the others wrote: if one is in the same call with something else, both are named, in the store too, and
the private groups are cut (`links`), which ends every wait in them. A rank that calls nothing is found by the group's time-out.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.run.links import GlooLinks, Links, Place
from thinwire.collectives.run.pending import Pending
from thinwire.collectives.run.runner import Runner
from thinwire.errors import UserError

LOOK_S = 5.0
CLOSE_S = 10.0
APART = "apart"
"""The key in the store under which a rank says which two differ."""
TOLD_BYTES = 160
"""Of what ranks tell each other that they are about to run."""


@dataclass(slots=True)
class _Job:
    number: int
    what: str
    run: Callable[[], Any]
    pending: Pending
    tensors: list[torch.Tensor]
    value: Any = None
    started_s: float = 0.0


class Engine:
    """One per group and rank. Whatever is submitted is submitted by all ranks of the group, in one order."""

    def __init__(
        self,
        place: Place,
        note: Callable[[str, int, int | None], None] = lambda op, message_bytes, wire_bytes: None,
        links: Links | None = None,
    ) -> None:
        """note: hears of what is sent beside the calls themselves: op, bytes handed in, bytes sent (None: as gloo does it).
        links: of this place; None: gloo's."""
        self.place, self.note, self.links = place, note, links or GlooLinks(place)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._count = 0
        self._current: _Job | None = None
        self._broken: Exception | None = None
        self._threads: list[threading.Thread] = []
        self._private: Any = None
        self._runner: Runner | None = None
        self._reordered: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()
        self._open = 0

    # -- what the thread's jobs use ---------------------------------------------------------------------------------------

    @property
    def private(self) -> Any:
        """A group of the same ranks that only jobs use. Collective when it is first used."""
        if self._private is None:
            self._private = self.links.join("private", range(self.place.size))
        return self._private

    @property
    def talk(self) -> Any:
        """The group in which ranks tell each other things, on the CPU. Collective when it is first used."""
        return self.links.talk or self.private

    @property
    def runner(self) -> Runner:
        """Of schedules, on the private group. Collective when it is first used."""
        if self._runner is None:
            self._runner = Runner(self.private, self.place.rank, self.links.most_tag)
        return self._runner

    def reordered(self, order: Sequence[int]) -> Any:
        """A private group in which place i belongs to rank order[i]. Collective when it is first used."""
        order = tuple(order)
        if order not in self._reordered:
            self._reordered[order] = self.links.join("-".join(map(str, order)), order)
        return self._reordered[order]

    def agree(self, what: str) -> None:
        """UserError on every rank, which names two, unless all say the same. Collective, in a job."""
        own = torch.frombuffer(bytearray(what.encode()[:TOLD_BYTES].ljust(TOLD_BYTES)), dtype=torch.uint8)
        everyone = torch.empty(self.place.size * TOLD_BYTES, dtype=torch.uint8)
        self.talk._allgather_base(everyone, own).wait()
        self.note("all_gather", TOLD_BYTES, None)
        told = [bytes(row.tolist()).decode().strip() for row in everyone.view(self.place.size, TOLD_BYTES)]
        other = next((rank for rank, one in enumerate(told) if one != told[0]), None)
        if other is not None:
            raise self._apart((0, told[0]), (other, told[other]))

    def told(self, value: Any = None) -> Any:
        """What position 0 of the group says, as JSON goes. Collective, in a job."""
        text = json.dumps(value).encode() if self.place.rank == 0 else b""
        length = torch.tensor([len(text)])
        self._broadcast(length)
        content = torch.frombuffer(bytearray(text or bytes(int(length))), dtype=torch.uint8)
        self._broadcast(content)
        return json.loads(bytes(content.tolist()))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self.talk.broadcast([tensor], dist.BroadcastOptions()).wait()
        self.note("broadcast", tensor.numel() * tensor.element_size(), None)

    # -- jobs -------------------------------------------------------------------------------------------------------------

    def submit(
        self, what: str, run: Callable[[], Any], tensors: Sequence[torch.Tensor] = (), *, blocking: bool = False
    ) -> Pending:
        """`run` after all before it. what: in words, for errors; tensors: where results will be; blocking: the caller waits."""
        job = _Job(0, what, run, Pending(), list(tensors))
        if self._broken is not None:
            job.pending.fail(self._broken)
            return job.pending
        if not self._threads:
            for target in (self._work, self._watch):
                self._threads.append(threading.Thread(target=target, name=f"thinwire {target.__name__}", daemon=True))
                self._threads[-1].start()
        with self._lock:
            self._count += 1
            self._open += 1
            job.number, alone = self._count, self._open == 1
        if blocking and alone:
            self._do(job)
        else:
            self._jobs.put(job)
        return job.pending

    def ask(self, what: str, run: Callable[[], Any]) -> Any:
        """What `run` returns; waits for it."""
        found: list[Any] = []
        self.submit(what, lambda: found.append(run())).wait()
        return found[0]

    def close(self) -> None:
        """No more jobs will come. The private groups end here, unless a job is still waiting in one."""
        self._closed.set()
        self._jobs.put(None)
        for thread in self._threads:
            thread.join(0.0 if self._broken else CLOSE_S)
        if not any(thread.is_alive() for thread in self._threads):
            self._private = self._runner = None
            self._reordered.clear()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            job = None  # or what it holds would live until the next one

    @torch.no_grad()
    def _do(self, job: _Job) -> None:
        try:
            if self._broken is not None:
                raise self._broken
            job.started_s, self._current = time.monotonic(), job
            job.run()
        except Exception as error:
            self._fail(job, error if isinstance(error, UserError) else self._lost(job, error))
        else:
            with self._lock:
                self._open -= 1
            job.pending.finish(job.tensors)
        self._current = None

    def _fail(self, job: _Job, error: Exception) -> None:
        self._broken = self._broken or error  # the ranks may have parted: nothing that comes after can be trusted
        job.pending.fail(self._broken)

    def _lost(self, job: _Job, error: Exception) -> UserError:
        apart = self._broken or self._compared(job)
        if isinstance(apart, UserError):
            return apart
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        waited_s = time.monotonic() - job.started_s
        return UserError(
            f"rank {self._of(self.place.rank)}: {job.what} failed after {waited_s:.1f} s of at most "
            f"{self.place.timeout.total_seconds():g}: {reason}; has each rank called it, and are all alive?"
        )

    # -- watching ---------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while self._broken is None and not self._closed.wait(LOOK_S / 5):
            job = self._current
            if job is None or time.monotonic() - job.started_s < LOOK_S:
                continue
            if (error := self._compared(job)) is not None:
                self._fail(job, error)
                self.links.cut()

    def _compared(self, job: _Job) -> UserError | None:
        """Of a job that takes long or was broken off: who runs something else in the same call, or was found to."""
        store, own = self.place.store, self.place.rank
        store.set(f"in/{job.number}/{own}", job.what)
        if store.check([APART]):
            return UserError(store.get(APART).decode())
        for rank in range(self.place.size):
            key = f"in/{job.number}/{rank}"
            if rank != own and store.check([key]) and (theirs := store.get(key).decode()) != job.what:
                apart = self._apart(*sorted([(own, job.what), (rank, theirs)]))
                store.set(APART, str(apart))
                return apart
        return None

    def _apart(self, one: tuple[int, str], other: tuple[int, str]) -> UserError:
        return UserError(
            f"ranks differ in what they call: rank {self._of(one[0])} {one[1]}, rank {self._of(other[0])} {other[1]}; "
            "every rank of a group must make the same calls, with the same sizes, in the same order"
        )

    def _of(self, position: int) -> int:
        return self.place.ranks[position]
