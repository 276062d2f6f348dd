"""The schedules of one group: a thread that runs them in the order of their calls, on a private group of the same ranks.

A caller that would wait at once runs its schedule itself, if none is under way: to wake a thread and be woken by it takes longer
than a short message.

Before ranks run something new together they compare what it is (`agree`): a mismatch is an error on all of them. Ranks whose
calls differ later wait for messages that nobody sends. So whoever waits longer than `CHECK_AFTER_S` writes into the store what it
is waiting in, and reads what the others wrote: if one is in the same call with something else, both are named, in the store too,
and the private groups are aborted (`transport`), which ends every wait in them. A rank that calls nothing is found by the group's
time-out.
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

from thinwire.collectives.run.pending import Pending
from thinwire.collectives.run.runner import Runner
from thinwire.collectives.run.transport import GlooTransport, Place, Transport
from thinwire.errors import UserError

CHECK_AFTER_S = 5.0
CLOSE_S = 10.0
MISMATCH = "mismatch"
"""The key in the store under which a rank writes which two differ."""
CALL_BYTES = 160
"""Of the words in which ranks compare what they are about to run."""


@dataclass(slots=True)
class _Job:
    what: str
    run: Callable[[], Any]
    tensors: list[torch.Tensor]
    pending: Pending
    number: int = 0
    started_s: float = 0.0


class Engine:
    """One per group and rank. Whatever is submitted is submitted by all ranks of the group, in one order."""

    def __init__(
        self,
        place: Place,
        record: Callable[[str, int, int | None], None] = lambda op, message_bytes, wire_bytes: None,
        transport: Transport | None = None,
    ) -> None:
        """record: called for what is sent beside the calls themselves: op, bytes handed in, bytes sent (None: as gloo does it).
        transport: of this place; None: gloo's."""
        self.place, self.record, self.transport = place, record, transport or GlooTransport(place)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._count = 0
        self._current: _Job | None = None
        self._broken: Exception | None = None
        self._threads: list[threading.Thread] = []
        self._groups: dict[str, Any] = {}
        self._runner: Runner | None = None
        self._lock = threading.Lock()
        self._open = 0

    @property
    def private(self) -> Any:
        """A group of the same ranks that only jobs use. Collective when it is first used."""
        return self._group("private", range(self.place.size))

    @property
    def control(self) -> Any:
        """The group for agreements, on the CPU. Collective when it is first used."""
        return self.transport.control or self.private

    @property
    def runner(self) -> Runner:
        """Of schedules, on the private group. Collective when it is first used."""
        if self._runner is None:
            self._runner = Runner(self.private, self.place.rank, self.transport.most_tag)
        return self._runner

    def reordered(self, order: Sequence[int]) -> Any:
        """A private group in which position i belongs to rank order[i]. Collective when it is first used."""
        return self._group("-".join(map(str, order)), order)

    def _group(self, name: str, order: Sequence[int]) -> Any:
        if name not in self._groups:
            self._groups[name] = self.transport.new_group(name, order)
        return self._groups[name]

    def agree(self, what: str) -> None:
        """UserError on every rank, which names two, unless `what` is the same on all. Collective, in a job."""
        own = torch.frombuffer(bytearray(what.encode()[:CALL_BYTES].ljust(CALL_BYTES)), dtype=torch.uint8)
        everyone = torch.empty(self.place.size * CALL_BYTES, dtype=torch.uint8)
        self.control._allgather_base(everyone, own).wait()
        self.record("all_gather", CALL_BYTES, None)
        calls = [bytes(row.tolist()).decode().strip() for row in everyone.view(self.place.size, CALL_BYTES)]
        other = next((rank for rank, call in enumerate(calls) if call != calls[0]), None)
        if other is not None:
            raise self._mismatch((0, calls[0]), (other, calls[other]))

    def broadcast(self, value: Any = None) -> Any:
        """The `value` of position 0 of the group, which JSON can hold. Collective, in a job."""
        text = json.dumps(value).encode() if self.place.rank == 0 else b""
        length = torch.tensor([len(text)])
        self._broadcast(length)
        content = torch.frombuffer(bytearray(text or bytes(int(length))), dtype=torch.uint8)
        self._broadcast(content)
        return json.loads(bytes(content.tolist()))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self.control.broadcast([tensor], dist.BroadcastOptions()).wait()
        self.record("broadcast", tensor.nbytes, None)

    def submit(
        self, what: str, run: Callable[[], Any], tensors: Sequence[torch.Tensor] = (), *, blocking: bool = False
    ) -> Pending:
        """`run` after all before it. what: in words, for errors; tensors: where results will be; blocking: the caller waits."""
        job = _Job(what, run, list(tensors), Pending())
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
            self._runner = None
            self._groups.clear()

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
            self._fail(job, error if isinstance(error, UserError) else self._failure(job, error))
        else:
            with self._lock:
                self._open -= 1
            job.pending.finish(job.tensors)
        self._current = None

    def _fail(self, job: _Job, error: Exception) -> None:
        self._broken = self._broken or error  # the calls of the ranks may differ: nothing that comes after can be trusted
        job.pending.fail(self._broken)

    def _failure(self, job: _Job, error: Exception) -> UserError:
        mismatch = self._broken or self._found_mismatch(job)
        if isinstance(mismatch, UserError):
            return mismatch
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        waited_s = time.monotonic() - job.started_s
        return UserError(
            f"rank {self._of(self.place.rank)}: {job.what} failed after {waited_s:.1f} s of at most "
            f"{self.place.timeout.total_seconds():g}: {reason}; has each rank called it, and are all alive?"
        )

    def _watch(self) -> None:
        while self._broken is None and not self._closed.wait(CHECK_AFTER_S / 5):
            job = self._current
            if job is None or time.monotonic() - job.started_s < CHECK_AFTER_S:
                continue
            if (error := self._found_mismatch(job)) is not None:
                self._fail(job, error)
                self.transport.abort()

    def _found_mismatch(self, job: _Job) -> UserError | None:
        """Of a job that takes long or was broken off: who runs something else in the same call, or was found to."""
        store, own = self.place.store, self.place.rank
        store.set(f"in/{job.number}/{own}", job.what)
        if store.check([MISMATCH]):
            return UserError(store.get(MISMATCH).decode())
        for rank in range(self.place.size):
            key = f"in/{job.number}/{rank}"
            if rank != own and store.check([key]) and (theirs := store.get(key).decode()) != job.what:
                mismatch = self._mismatch(*sorted([(own, job.what), (rank, theirs)]))
                store.set(MISMATCH, str(mismatch))
                return mismatch
        return None

    def _mismatch(self, one: tuple[int, str], other: tuple[int, str]) -> UserError:
        return UserError(
            f"ranks differ in what they call: rank {self._of(one[0])} {one[1]}, rank {self._of(other[0])} {other[1]}; "
            "every rank of a group must make the same calls, with the same sizes, in the same order"
        )

    def _of(self, position: int) -> int:
        return self.place.ranks[position]
