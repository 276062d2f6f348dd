"""What runs on a thread of ours, as c10d sees it."""

import threading
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Pending(dist._Work):
    """`finish` or `fail` it once; what comes later is ignored. C++ sees the future, Python the exception itself."""

    def __init__(self) -> None:
        super().__init__()
        self._outcome: Future[list[torch.Tensor]] = Future()
        self._lock = threading.Lock()
        self._future: torch.futures.Future[Any] | None = None

    def finish(self, tensors: list[torch.Tensor]) -> None:
        """The results are in `tensors`."""
        with suppress(InvalidStateError):
            self._outcome.set_result(tensors)

    def fail(self, error: Exception) -> None:
        """Whoever waits, or will, gets `error`."""
        with suppress(InvalidStateError):
            self._outcome.set_exception(error)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        try:
            error = self._outcome.exception(timeout.total_seconds() or None)
        except TimeoutError:
            raise RuntimeError(f"timed out after {timeout.total_seconds():g} s in Work.wait") from None
        if error is not None:
            raise error
        return True

    def get_future(self) -> "torch.futures.Future[Any]":
        """Made when it is asked for, once: who only waits has no use for it."""
        with self._lock:
            if self._future is None:
                value: torch.futures.Future[Any] = torch.futures.Future()
                # A C++ waiter sees errors that a callback has raised, but none that were set.
                self._future = value.then(_checked)
                self._outcome.add_done_callback(lambda outcome: value.set_result(outcome.exception() or outcome.result()))
            return self._future

    def is_completed(self) -> bool:
        return self._outcome.done()

    def is_success(self) -> bool:
        return self._outcome.done() and self._outcome.exception() is None

    def exception(self) -> BaseException | None:
        return self._outcome.exception() if self._outcome.done() else None


def _checked(future: "torch.futures.Future[Any]") -> Any:
    value = future.value()
    if isinstance(value, Exception):
        raise value
    return value
