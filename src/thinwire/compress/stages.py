"""How the stages of an exchange run: on threads that wait, where tensors are the CPU's, or as launches on a stream, on a device.

An exchange of a bucket has three stages. The first computes and sends; the second waits for what has arrived, computes and
sends; the third waits and computes (`averager.Averager`). Both runners begin the first stages of the buckets in their order, the
second stages too, and the third, the same on every rank. So a process group that only first stages, or only second stages, send
on sees its calls in one order everywhere, and no rank waits for a call that another one has put behind its own.

On threads (`Threads`) a stage of the CPU really waits; while the third stage of bucket k decodes, the second one of k + 1
averages and the first one of k + 2 codes.

On a device (`Launches`) waiting is the stream's: `wait()` of a collective only tells the stream where to go on. All three stages
are launched by the thread that hands the bucket over, skewed by one bucket each, on one stream:

    bucket 0      first(0)
    bucket 1      first(1)  second(0)
    bucket 2      first(2)  second(1)  third(0)
    ...
    bucket n      first(n)  second(n-1)  third(n-2)     and, since it is the last one:     second(n)  third(n-1)  third(n)

Between first(k) and second(k) lies the launch of first(k+1), so while the stream waits for the codes of bucket k those of k + 1
are on the wire already. One stream, because the memory of a device is given back to the stream that it was taken on: what a first
stage has made may be used by the third one without any event of ours. Nothing there reads a value on the host: what an exchange
learns of values stays a flag on the device (`averager`).
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch

from thinwire.collectives.clock import has_streams
from thinwire.collectives.executor import Executor

Future = torch.futures.Future[torch.Tensor]
Stage = Callable[[], None]
Last = Callable[[], torch.Tensor]
Failed = Callable[[Exception], None]


class Stages(Protocol):
    """One per exchange, used by one thread of each rank."""

    on_device: bool
    """Whether the host must not look at what a stage computes."""

    def run(self, first: Stage, second: Stage, third: Last, buffer: torch.Tensor, failed: Failed, *, last: bool) -> Future:
        """The stages of one bucket. The future holds what the third one returns; `failed` hears of what goes wrong in any.

        buffer: what a future holds on a device if something has. last: of this backward pass.
        """

    def flush(self) -> None:
        """Whatever is left of the buckets so far goes on without the next one. Before a future is waited for."""

    def close(self) -> None:
        """Waits for what is under way."""


class Threads:
    """Of the CPU; a future holds the exception of its bucket."""

    on_device = False

    def __init__(self) -> None:
        self._threads = Executor("thinwire-first"), Executor("thinwire-second"), Executor("thinwire-third")

    def run(self, first: Stage, second: Stage, third: Last, buffer: torch.Tensor, failed: Failed, *, last: bool) -> Future:
        def then(stage: Stage, before: Future | None) -> torch.Tensor:
            if before is not None:
                before.wait()
            stage()
            return buffer

        def end() -> torch.Tensor:
            gone_on.wait()
            return third()

        begun = self._threads[0].submit(lambda: then(first, None))
        gone_on = self._threads[1].submit(lambda: then(second, begun))
        return self._threads[2].submit(end, failed)

    def flush(self) -> None:
        """Threads go on by themselves."""

    def close(self) -> None:
        for thread in self._threads:
            thread.close()


class _Bucket:
    """What is still to be launched of one bucket."""

    def __init__(self, second: Stage, third: Last, buffer: torch.Tensor, failed: Failed, future: Future) -> None:
        self._second, self._third, self._buffer, self._failed, self.future = second, third, buffer, failed, future
        self._next = 1
        """The stage that comes next; after one that has failed, none but the end."""

    def first(self, stage: Stage) -> None:
        self._launch(stage)

    def second(self) -> None:
        """Nothing if it was launched before."""
        if self._next == 2:
            self._launch(self._second)

    def end(self) -> None:
        """With the exchange's stream as the current one: whoever waits for the future has his stream wait for it."""
        self.second()
        if self._next == 3:
            self._launch(self._finish)
        self.future.set_result(self._buffer)

    def _finish(self) -> None:
        self._buffer = self._third()

    def _launch(self, stage: Stage) -> None:
        try:
            stage()
            self._next += 1
        except Exception as error:
            self._next = 0
            self._failed(error)


class Launches:
    """Of a device; a future always holds its buffer, also where a stage has failed."""

    on_device = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = new_stream(device)
        self._pending: deque[_Bucket] = deque()
        """The latest buckets, oldest first: the last one's second stage is still to come, the third of the one before it."""

    def run(self, first: Stage, second: Stage, third: Last, buffer: torch.Tensor, failed: Failed, *, last: bool) -> Future:
        future = _new_future(self._device)
        bucket = _Bucket(second, third, buffer, failed, future)
        caller = current_stream(self._device)
        if self._stream is not None and caller is not None:
            self._stream.wait_stream(caller)
        with self._on_stream():
            bucket.first(first)
            if self._pending:
                self._pending[-1].second()
            self._pending.append(bucket)
            while len(self._pending) > 2:
                self._pending.popleft().end()
        if last:
            self.flush()
        return future

    def flush(self) -> None:
        """Second stages first: others wait for what they send."""
        with self._on_stream():
            for bucket in self._pending:
                bucket.second()
            while self._pending:
                self._pending.popleft().end()

    def close(self) -> None:
        self.flush()
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.no_grad(), self._stream or nullcontext():
            yield


def launched(device: torch.device) -> bool:
    """Whether what is done to its tensors is launched, and the host must not look at them."""
    return device.type != "cpu"


def make_stages(device: torch.device) -> Stages:
    """Threads for the CPU, launches for all that computes beside the host."""
    return Launches(device) if launched(device) else Threads()


def new_stream(device: torch.device) -> torch.Stream | None:
    """Of a device that has streams, before others in its queue: what it computes is what the wire waits for."""
    return torch.Stream(device, priority=-1) if has_streams(device) else None


def current_stream(device: torch.device) -> torch.Stream | None:
    """Of a device that has streams."""
    return torch.accelerator.current_stream(device) if has_streams(device) else None


def done(tensor: torch.Tensor) -> Future:
    """A future of what is there already, or will be when the current stream has come so far."""
    future = _new_future(tensor.device)
    future.set_result(tensor)
    return future


def _new_future(device: torch.device) -> Future:
    return torch.futures.Future(devices=[device] if has_streams(device) else None)
