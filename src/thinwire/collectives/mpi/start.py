"""The whole of it for a program that mpiexec has started: MPI, the store where the ranks meet, the process group, and the end.

    with process_group() as ledger:                         # init_process_group, over MPI and metered
        model = DistributedDataParallel(model)              # sub-groups, DeviceMesh, FSDP2 too
        ...
    # MPI has ended on all ranks

The backend's name is the metered one's, so that everything that looks for it finds it. Of what is entered in the ledger the
message bytes of each call are exact; the wire bytes are those of the algorithms in `collectives.wire`, whatever MPI chose. Summed
over the ranks they are the least that must be sent for all_reduce, all_gather, all_to_all, broadcast, gather, scatter and send,
so that cards count more and never less; for reduce_scatter they are twice the least, which is what gloo sends. What the ranks
send to compare their calls (40 B to each other rank before each collective) is not entered.
"""

import atexit
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from thinwire import environment
from thinwire.collectives.backend import NAME, register
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.mpi.buffers import Reductions
from thinwire.collectives.mpi.engine import Engine, Lane
from thinwire.collectives.mpi.group import MpiGroup
from thinwire.collectives.mpi.library import Library, abandon, wait_for
from thinwire.collectives.run.transport import Place, Transport
from thinwire.collectives.store import open_store
from thinwire.errors import UserError
from thinwire.listening import LOOPBACK


class Mpi:
    """MPI in this process, from `started` to its end."""

    def __init__(self, library: Library, engine: Engine) -> None:
        self.library, self.engine = library, engine
        self._reductions = Reductions(library.MPI)

    def check_place(self, rank: int, world_size: int) -> None:
        """UserError unless MPI and whoever started the ranks agree."""
        library = self.library
        if (library.rank, library.size) != (rank, world_size):
            raise UserError(
                f"{library.version} counts {library.size} rank(s) and calls this one {library.rank}; the launcher said rank "
                f"{rank} of {world_size}: start the ranks with the mpiexec that belongs to {library.version}"
            )

    def group(self, ranks: Sequence[int], name: str, timeout: timedelta) -> MpiGroup:
        """A process group of `ranks` of the world. Each of them calls, with the same name."""
        timeout_s = timeout.total_seconds()
        comm = self.library.communicator(ranks, name, timeout_s)
        return MpiGroup(self.library, self.engine, self._reductions, comm, Lane(name, timeout_s))

    def inner(self, options: Any, place: Place) -> tuple[Any, Transport]:
        """An `InnerFactory`: groups and schedules over MPI."""
        return self.group(place.ranks, options.group_id, place.timeout), MpiTransport(self, place, options.group_id)

    def meet(self, address: str, port: int, timeout_s: float) -> tuple[str, int]:
        """Agree on an address and a port of rank 0, where it opens the store that torch.distributed wants beside MPI.

        port 0: one that is free. Where the ranks are on several hosts, loopback becomes the name of rank 0's host. Collective.
        """
        own = socket.gethostname(), address, port or _free_port()
        everyone = wait_for(lambda: self.library.world.allgather(own), "agreeing on where to meet", timeout_s)
        first, address, port = everyone[0]
        several = len({host for host, _, _ in everyone}) > 1
        return first if several and address == LOOPBACK else address, port

    def ranks(self, timeout: timedelta, bind: str = "") -> dict[str, Any]:
        """Arguments of init_process_group: who this rank is, and the store where all meet. Collective.

        bind: as of `open_store`.
        """
        address, port = self.meet(LOOPBACK, 0, timeout.total_seconds())
        rank, size = self.library.rank, self.library.size
        place = environment.Place(rank=rank, world_size=size, local_rank=0, master_address=address, master_port=port)
        store = open_store(place, timeout.total_seconds(), bind)
        return {"store": store, "rank": rank, "world_size": size, "timeout": timeout}


class MpiTransport(Transport):
    """A private group is a communicator of its own. MPI cannot end a wait, but the engine, which tests now and then, gives up
    what is under way in it. Other ranks do not notice, and give up when they look into the store (`run.engine`).

    group: what c10d calls the group, the same on all its ranks.
    """

    def __init__(self, mpi: Mpi, place: Place, group: str) -> None:
        self._mpi, self._place, self._group = mpi, place, group
        self.name, self.most_tag = mpi.library.version, mpi.library.most_tag
        self._made: list[MpiGroup] = []

    def new_group(self, name: str, order: Sequence[int]) -> MpiGroup:
        ranks = [self._place.ranks[at] for at in order]
        self._made.append(self._mpi.group(ranks, f"{self._group} {name}", self._place.timeout))
        return self._made[-1]

    def abort(self) -> None:
        for group in self._made:
            group.give_up("the ranks differ in what they call")


@contextmanager
def started(timeout_s: float) -> Iterator[Mpi]:
    """Start MPI; at the end of the `with`, end it. Collective. After an exception it is not ended, see `library.abandon`."""
    engine = Engine()
    library = engine.call(Library, "starting MPI", timeout_s)
    yield Mpi(library, engine)
    engine.close(library.close)


def started_for_good(timeout_s: float) -> Mpi:
    """Start MPI; it ends when the program does. If that is by an exception, all ranks end. Collective."""
    until_exit = ExitStack()
    mpi = until_exit.enter_context(started(timeout_s))
    atexit.register(_end, until_exit)
    return mpi


def _end(until_exit: ExitStack) -> None:
    if getattr(sys, "last_value", None) is not None:  # an exception that nobody has caught
        abandon(1)
    else:
        until_exit.close()


@contextmanager
def process_group(ledger: Ledger | None = None, timeout_s: float = 300.0) -> Iterator[Ledger]:
    """torch.distributed over MPI, ready inside; gives the ledger that all calls enter. An exception ends all ranks."""
    ledger = ledger or Ledger()
    timeout = timedelta(seconds=timeout_s)
    with started(timeout_s) as mpi:
        register(ledger, inner=mpi.inner)
        dist.init_process_group(NAME, **mpi.ranks(timeout))
        try:
            yield ledger
        except Exception:
            traceback.print_exc()
            mpi.library.MPI.COMM_WORLD.Abort(1)
        dist.barrier()  # nobody leaves while another still needs the store
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
