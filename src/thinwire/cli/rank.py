"""Being one of several ranks: whatever goes wrong becomes one line (in the launcher's error file), and the process ends."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinwire.environment import Environment
    from thinwire.train.failure import Failure

FAILED, USER_ERROR, RANK_SILENT = 1, 2, 4
BIND = "Where rank 0 listens for the others; by default at the address by which they reach it."


def be_rank(environment: "Environment", work: Callable[[], None], reword: "Callable[[Failure], Failure] | None" = None) -> None:
    """Run `work`; on an exception print or record one line and leave. reword: this command's own line instead."""
    from thinwire.collectives.mpi.library import abandon
    from thinwire.train.failure import explain, write_error_file

    try:
        work()
    except Exception as error:
        failure = explain(error, environment.place)
        failure = reword(failure) if reword else failure
        if environment.error_file:
            write_error_file(environment.error_file, failure)
        else:
            print(f"thinwire: error: {failure.line}", file=sys.stderr)
        code = {"user": USER_ERROR, "silent": RANK_SILENT}.get(failure.kind, FAILED)
        sys.stderr.flush()
        abandon(code)
        leave(code)


def leave(code: int) -> None:
    """Not through the interpreter's end: a broken process group may wait there for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
