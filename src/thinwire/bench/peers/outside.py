"""What the ranks of other people's systems have in common: waits that end, an end without loose threads, the work of helpers.

Their background threads and processes outlive a failed rank and keep the interpreter from ending; so a rank that is over, well or
not, prints one line and leaves at once. Whoever started it ends what it left.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def leave(code: int, message: str = "") -> None:
    """End this process here and now."""
    if message:
        print(f"thinwire: error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def within(limit_s: float, what: str) -> Iterator[None]:
    """What is inside ends in time, or the process does, with a line that names it."""
    timer = threading.Timer(limit_s, leave, (1, f"{what} took more than {limit_s:.0f} s"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def alone(main: Callable[[], None], who: str) -> None:
    """Run `main` and leave; what it raises becomes the line."""
    try:
        main()
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        leave(1, lines[0] if isinstance(error, SystemExit) else f"{who}: {type(error).__name__}: {lines[0]}")
    leave(0)


def helpers_s() -> float:
    """Processor seconds of all processes that this one has started, and theirs; 0 where the system has no such numbers."""
    parents, used = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        number = int(entry.parent.name)
        parents[number], used[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    family, found = {os.getpid()}, True
    while found:
        found = {number for number, parent in parents.items() if parent in family} - family
        family |= found
    ticks = sum(used.get(number, 0) for number in family - {os.getpid()})
    return ticks / os.sysconf("SC_CLK_TCK")
