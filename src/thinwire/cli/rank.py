"""Being one of several ranks: whatever goes wrong becomes one line, for the launcher if it listens, and the process ends."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinwire.train.runtime import Surroundings

FAILED, USER_ERROR = 1, 2


def be_rank(surroundings: "Surroundings", work: Callable[[], None], timeout_option: str = "train.timeout_s") -> None:
    """Run `work`; on an exception tell why and leave. timeout_option: what the line about a time-out advises to raise."""
    from thinwire.train.failure import Failure, explain, write_error_file

    try:
        work()
    except Exception as error:
        failure = explain(error, surroundings.place)
        line = failure.line.replace("train.timeout_s", timeout_option)
        if surroundings.error_file:
            write_error_file(surroundings.error_file, Failure(failure.kind, line))
        else:
            print(f"thinwire: error: {line}", file=sys.stderr, flush=True)
        # Not through the interpreter's end: a broken process group may wait there for peers that are gone.
        _leave(USER_ERROR if failure.kind == "user" else FAILED)


def _leave(code: int) -> None:
    import os

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
