"""A process that is asked to end by a signal ends its children first: SIGTERM and SIGHUP become SystemExit."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit (128 + number), so that every `finally` runs, and children are ended there.

    Ctrl-C does so by itself. Signals reach the main thread only; in another one this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda got, frame: sys.exit(128 + got)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
