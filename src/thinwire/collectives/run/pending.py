"""What runs on a thread of ours, as c10d sees it."""

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Pending(dist._Work):
    """`finish` or `fail` it once; what comes later is ignored. C++ sees the future, Python the exception itself."""

    def __init__(self) -> None:
        super().__init__()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._result: Any = None
        self._value: torch.futures.Future[Any] | None = None
        self._future: torch.futures.Future[Any] | None = None

    def finish(self, tensors: list[torch.Tensor]) -> None:
        """The results are in `tensors`."""
        self._end(tensors, None)

    def fail(self, error: Exception) -> None:
        """Whoever waits, or will, gets `error`."""
        self._end(error, error)

    def _end(self, value: Any, error: Exception | None) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._error, self._result = error, value
            self._over.set()
        if self._value is not None:
            self._value.set_result(value)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if not self._over.wait(timeout.total_seconds() or None):
            raise RuntimeError(f"timed out after {timeout.total_seconds():g} s in Work.wait")
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> "torch.futures.Future[Any]":
        """Made when it is asked for, once: who only waits has no use for it."""
        with self._lock:
            if self._future is not None:
                return self._future
            self._value = torch.futures.Future()
            # A C++ waiter sees errors that a callback has raised, but none that were set.
            self._future, over = self._value.then(_checked), self._over.is_set()
        if over:
            self._value.set_result(self._result)
        return self._future

    def is_completed(self) -> bool:
        return self._over.is_set()

    def is_success(self) -> bool:
        return self._over.is_set() and self._error is None

    def exception(self) -> Exception | None:
        return self._error


def _checked(future: "torch.futures.Future[Any]") -> Any:
    value = future.value()
    if isinstance(value, Exception):
        raise value
    return value
