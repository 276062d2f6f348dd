"""The thread that starts MPI, makes every exchange progress and ends MPI; and the Work that a caller waits for.

An exchange is a generator that starts requests of MPI and yields them; it is resumed when they are complete, and is complete when
it returns. MPI moves data only while somebody calls it, so the thread tests again and again, and sleeps in between: briefly at
first, then up to LONGEST_PAUSE_S, during which the kernel's socket buffers take what arrives. With nothing under way it waits
for the next order and costs nothing.

A lane is the queue of one group: of its collectives one is under way at a time. Sends and receives have no lane. One that has
failed breaks its lane, as with every backend: what the other ranks have done by then is unknown. Calls that all ranks refuse in
agreement break nothing.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from thinwire.collectives.mpi.library import wait_for
from thinwire.collectives.run.pending import Pending
from thinwire.errors import UserError

EAGER_TESTS = 10
FIRST_PAUSE_S = 20e-6
LONGEST_PAUSE_S = 400e-6
LAST_TESTS_S = 1.0

Steps = Generator[list[Any], None, None]
"""Yields lists of requests; each is resumed when all of its requests are complete."""


class Lane:
    """The exchanges of one group that run one after another. `broken`: why it takes no more."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.queue: deque[Exchange] = deque()
        self.broken = ""


class MpiWork(Pending):
    """What a caller gets. source: of a message that has come."""

    def __init__(self, outputs: list[torch.Tensor]) -> None:
        super().__init__()
        self._outputs = outputs
        self.source = -1

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def _source_rank(self) -> int:
        return self.source

    source_rank = _source_rank


class Receive:
    """A request to receive, whose status is wanted, and that can be cancelled."""

    def __init__(self, request: Any, status: Any) -> None:
        self._request, self._status = request, status

    def Test(self) -> bool:
        return bool(self._request.Test(self._status))

    def cancel(self) -> None:
        self._request.Cancel()


class Exchange:
    """One call: its steps, the requests under way, its Work. what: for messages, such as "all_reduce of 4 B"."""

    def __init__(self, what: str, steps: Steps, work: MpiWork, lane: Lane, ordered: bool) -> None:
        self.what, self.work, self.lane, self.ordered = what, work, lane, ordered
        self._steps, self._pending = steps, list[Any]()
        self.deadline: float | None = None

    def advance(self) -> bool | None:
        """None: nothing new; False: a step further; True: complete. Raises what went wrong."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self.lane.timeout_s
        try:
            try:
                self._pending = _incomplete(self._pending)
            except Exception as error:  # one of MPI's, which the steps may know how to word
                self._pending = self._steps.throw(error)
            if not self._pending:
                self._pending = next(self._steps)
                return False
        except StopIteration:
            return True
        if time.monotonic() > self.deadline:
            raise RuntimeError(f"timed out after {self.lane.timeout_s:g} s: another rank has not called it")
        return None

    def give_up(self) -> None:
        """After a failure: receive nothing any more. MPI can cancel no sends and no collectives."""
        for request in self._pending:
            if isinstance(request, Receive):
                with suppress(Exception):  # it may be what has failed
                    request.cancel()

    def is_over(self) -> bool:
        """After a failure: whether MPI is through with it. The other ranks may have come too late."""
        with suppress(Exception):
            self._pending = _incomplete(self._pending)
        return not self._pending


class Engine:
    """One a process. `submit` and `call` may be used from any thread."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._under_way: list[Exchange] = []
        self._failed: list[Exchange] = []
        self._last: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="mpi", daemon=True)
        self._thread.start()

    def submit(self, exchange: Exchange) -> MpiWork:
        """Returns at once."""
        self._orders.put(partial(self._admit, exchange))
        return exchange.work

    def give_up(self, lane: Lane, why: str) -> None:
        """End all exchanges of `lane`, and those to come, with an error. Returns at once."""
        self._orders.put(partial(self._give_up, lane, why))

    def call(self, function: Callable[[], Any], what: str, timeout_s: float) -> Any:
        """What `function` returns or raises, called by the thread. It may block: nothing else progresses meanwhile."""
        return wait_for(function, what, timeout_s, self._orders.put)

    def close(self, last: Callable[[], None]) -> None:
        """End the thread when all submitted is done, and then call `last`, which ends MPI.

        `last` is not called if MPI still waits for another rank: it might then never return.
        """
        self._last = last
        self._orders.put(None)
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        idle, closing = 0, False
        while self._under_way or not closing:
            order = self._next(idle)
            if order is None:
                closing = True
            else:
                order()
            idle = 0 if self._advance() else idle + 1
        deadline = time.monotonic() + LAST_TESTS_S
        while not (over := all([exchange.is_over() for exchange in self._failed])) and time.monotonic() < deadline:
            time.sleep(LONGEST_PAUSE_S)
        if over:
            self._last()

    def _next(self, idle: int) -> Callable[[], None] | None:
        """The next order; one to do nothing if there is none and something is under way. None: no more will come."""
        try:
            if not self._under_way:
                return self._orders.get()
            if idle < EAGER_TESTS:
                time.sleep(0)
                return self._orders.get_nowait()
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(10, (idle - EAGER_TESTS) // 4))
            return self._orders.get(timeout=pause_s)
        except queue.Empty:
            return lambda: None

    def _admit(self, exchange: Exchange) -> None:
        lane = exchange.lane
        if lane.broken:
            exchange.work.fail(RuntimeError(lane.broken))
            return
        if not (exchange.ordered and lane.queue):
            self._under_way.append(exchange)
        if exchange.ordered:
            lane.queue.append(exchange)

    def _advance(self) -> bool:
        """Test all that is under way; True if something moved."""
        moved = False
        for exchange in list(self._under_way):
            try:
                complete = exchange.advance()
            except Exception as error:
                self._fail(exchange, error)
                complete = False
            if complete:
                self._remove(exchange)
                exchange.work.finish(exchange.work.result())
            moved = moved or complete is not None
        return moved

    def _give_up(self, lane: Lane, why: str) -> None:
        lane.broken = lane.broken or why
        for exchange in [one for one in self._under_way if one.lane is lane]:
            self._fail(exchange, RuntimeError(why))

    def _remove(self, exchange: Exchange) -> None:
        self._under_way.remove(exchange)
        if exchange.ordered:
            queued = exchange.lane.queue
            queued.popleft()
            if queued:
                self._under_way.append(queued[0])

    def _fail(self, exchange: Exchange, error: Exception) -> None:
        lane = exchange.lane
        if isinstance(error, UserError):
            self._remove(exchange)
            exchange.work.fail(error)
            return
        lane.broken = " ".join(f"{exchange.what} in group {lane.name!r} over MPI: {error}".split())
        exchange.give_up()
        self._failed.append(exchange)  # keeps its memory, into which MPI may still write
        self._under_way.remove(exchange)
        exchange.work.fail(RuntimeError(lane.broken))
        if exchange.ordered:
            for waiting in lane.queue:  # of these the first is this one
                waiting.work.fail(RuntimeError(lane.broken))
            lane.queue.clear()


def _incomplete(requests: list[Any]) -> list[Any]:
    return [request for request in requests if not request.Test()]
