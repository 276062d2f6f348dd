"""A process that is asked to end by a signal ends its children first: SIGTERM and SIGHUP become SystemExit."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)


def signals_unwind() -> AbstractContextManager[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit (128 + number), so that every `finally` runs, and children are ended there.

    Ctrl-C does so by itself.
    """
    return signals_handled(ENDING, lambda got, _: sys.exit(128 + got))


@contextmanager
def signals_handled(numbers: Sequence[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, `handler` gets these signals. They reach the main thread only; in another one this changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
