"""The state of a process that speaks Horovod's API: whether it is initialised, which rank it is, its engine and process sets.

The API hands out no handle, so the state has to be somewhere: in the one `CONTEXT` here, which `init` fills and `shutdown`
empties.
"""

import atexit
import socket
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from thinwire.adapters.horovod.engine import Engine
from thinwire.adapters.horovod.members import ProcessSet
from thinwire.adapters.horovod.request import HorovodInternalError, Request
from thinwire.collectives import backend
from thinwire.collectives.groups import backend_of
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.start import init as start
from thinwire.environment import horovod_timeline, read_environment

NOT_YET = "Horovod has not been initialized; use hvd.init()."


class Context:
    """See the top of the file."""

    def __init__(self) -> None:
        self.everyone = ProcessSet([])
        self._engine: Engine | None = None
        self._generation = 0
        self._hosts: list[str] = []
        self._sets: list[ProcessSet] = []

    @property
    def engine(self) -> Engine:
        """ValueError before `init`."""
        if self._engine is None:
            raise ValueError(NOT_YET)
        return self._engine

    def init(self, comm: Any = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
        """Start, or do nothing where it has begun. Collective: all ranks call it.

        If torch.distributed has no process group yet, `thinwire.init()` makes one of the ranks that torchrun, srun or mpiexec has
        started; else the group that is there is used, and its ledger and chosen collectives if it is thinwire's.
        process_sets: those of these ranks are made at once. More can be added at any time, as with "dynamic".

        ValueError for a `comm` (name process sets instead), and for process sets that are given twice.
        """
        if comm:
            raise ValueError(f"hvd.init(comm={comm!r}): Horovod runs on all ranks here; name others as process_sets")
        if self._engine is not None:
            return
        sets: list[Any] = [] if process_sets is None or process_sets == "dynamic" else list(process_sets)
        _check_sets(sets)
        self._generation += 1
        self._engine = Engine(f"horovod {self._generation}", *_metered_group())
        self._hosts = [""] * self._engine.size
        dist.all_gather_object(self._hosts, socket.gethostname(), group=self._engine.groups[0])
        self._register(self.everyone, list(range(self._engine.size)), 0)
        if self._generation == 1:
            atexit.register(self.shutdown)
        for one in sets:
            self.add_process_set(one)
        path, cycles = horovod_timeline()
        if path:
            self.start_timeline(path, cycles)

    def shutdown(self) -> None:
        """End. What is under way on any rank fails there. Nothing where it has not begun."""
        if self._engine is None:
            return
        self.stop_timeline()
        self._engine.close()
        for one in [self.everyone, *self._sets]:
            one.process_set_id = None
        self._engine, self._sets = None, []

    def is_initialized(self) -> bool:
        """Whether `init` was called, and `shutdown` was not."""
        return self._engine is not None

    def size(self) -> int:
        """Number of ranks."""
        return self.engine.size

    def rank(self) -> int:
        """Of this process."""
        return self.engine.rank

    def ledger(self) -> Ledger:
        """What this rank has sent: thinwire's own, `hvd.ledger().sent_bytes` for example."""
        return self.engine.ledger

    def local_size(self) -> int:
        """Number of ranks on this host."""
        return len(self._here())

    def local_rank(self) -> int:
        """Of this process among those of its host."""
        return self._here().index(self.engine.rank)

    def cross_size(self) -> int:
        """Number of hosts that have a rank with this one's `local_rank`."""
        return len(self._beside())

    def cross_rank(self) -> int:
        """Of this process among those of the same `local_rank`."""
        return self._beside().index(self.engine.rank)

    def is_homogeneous(self) -> bool:
        """Whether all hosts have as many ranks."""
        return len({self._hosts.count(host) for host in self._hosts[: self.engine.size]}) == 1

    def _here(self) -> list[int]:
        own = self._hosts[self.engine.rank]
        return [rank for rank, host in enumerate(self._hosts) if host == own]

    def _beside(self) -> list[int]:
        hosts, place = self._hosts, self.local_rank()
        return [rank for rank, host in enumerate(hosts) if hosts[:rank].count(host) == place]

    def add_process_set(self, process_set: ProcessSet | Sequence[int]) -> ProcessSet:
        """Register a set, given as such or as ranks. Collective: all ranks call it, in the same order.

        ValueError for a set that exists, has no ranks, or ranks that there are not.
        """
        made = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
        ranks, size = made.ranks or [], self.engine.size
        if not ranks or len(set(ranks)) < len(ranks) or not 0 <= ranks[0] <= ranks[-1] < size:
            raise ValueError(f"add_process_set: {ranks} is no set of some of the ranks 0 to {size - 1}")
        try:
            handle = self.engine.submit(Request(kind="add_process_set", name="process set", splits=tuple(ranks)))
            handle.value()
        except HorovodInternalError as error:
            raise ValueError(str(error)) from None
        self._register(made, ranks, handle.result)
        self._sets.append(made)
        return made

    def remove_process_set(self, process_set: ProcessSet) -> bool:
        """Forget a set. Collective, as adding. Whether it was registered; the global one stays."""
        number = process_set.process_set_id
        if not number:
            return False
        self.engine.submit(Request(kind="remove_process_set", name="process set", root=number)).value()
        process_set.process_set_id = None
        self._sets = [one for one in self._sets if one is not process_set]
        return True

    def start_timeline(self, file_path: str, mark_cycles: bool = False) -> None:
        """Record on rank 0 what is asked for and run, from now on (`timeline`)."""
        self.engine.timeline.start(file_path, mark_cycles)

    def stop_timeline(self) -> None:
        """Write the file."""
        self.engine.timeline.stop()

    def _register(self, process_set: ProcessSet, ranks: list[int], number: int) -> None:
        process_set.ranks, process_set.process_set_id, process_set.own_rank = ranks, number, self.engine.rank


CONTEXT = Context()


def _check_sets(sets: Sequence[ProcessSet]) -> None:
    for number, one in enumerate(sets):
        if not isinstance(one, ProcessSet):
            raise ValueError(f"hvd.init: process_sets holds {one!r}, which is no hvd.ProcessSet")
        if any(one.ranks == other.ranks for other in sets[:number]):
            raise ValueError(f"hvd.init: {one.ranks} is among process_sets twice")


def _metered_group() -> tuple[Ledger, str | None]:
    """The ledger and, if it is not the default group's, the backend on which calls run; makes a default group if need be."""
    if not dist.is_initialized():
        if read_environment().place is None:
            return start(store=dist.HashStore(), rank=0, world_size=1), None
        return start(), None
    world = dist.group.WORLD
    if isinstance(world, backend.MeteredGroup) and backend_of(world, "cpu") is not None:
        return world.ledger, None
    ledger, name = Ledger(), f"{backend.NAME}-horovod-{len(dist.Backend.backend_list)}"
    backend.register(ledger, name)
    return ledger, name
