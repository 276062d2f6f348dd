"""What carries a set of ranks: the backend's own group for their calls, and private ones in which schedules run. Here over gloo.

Ranks that part ways wait in a private group for messages that nobody sends. gloo knows no way to end such a wait but the end of
its connections; so they are shut, which the other ends see too.
"""

import os
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from thinwire.collectives.groups import inherited


@dataclass(frozen=True)
class Place:
    """A rank's place in its group. ranks: the global ranks, in the order of the group."""

    store: dist.Store
    rank: int
    ranks: tuple[int, ...]
    timeout: timedelta

    @property
    def size(self) -> int:
        return len(self.ranks)

    @staticmethod
    def told(told: Any) -> "Place":
        """From what c10d tells the creator of a backend."""
        ranks = tuple(told.global_ranks_in_group) or tuple(range(told.group_size))
        return Place(dist.PrefixStore("schedules", told.store), told.group_rank, ranks, inherited(told.timeout))


class Links(Protocol):
    """name: of what carries, for what is measured over it; most_tag: the largest tag of a message, 0 where there are none;
    device: of the tensors; talk: a group of the same ranks, in which they tell each other things; None: the private one will do.
    """

    @property
    def name(self) -> str: ...

    @property
    def most_tag(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def talk(self) -> Any | None: ...

    def join(self, name: str, order: Sequence[int]) -> Any:
        """A private group in which place i belongs to rank order[i]. Collective."""

    def cut(self) -> None:
        """End every wait in the private groups of this rank with an error. They are of no use from then on."""

    def settle(self) -> None:
        """Wait until all that was begun in them is over, where a wait only tells the device to wait."""


class OnHost:
    """What Links over messages from the host's memory have in common."""

    device = torch.device("cpu")
    talk = None

    def settle(self) -> None:
        """See `Links`."""


Inner = Callable[[Any, Place], tuple[Any, Links]]
"""From what c10d tells the creator of a backend: the group of its own, not cut ever, and the links."""


def over_gloo(told: Any, place: Place) -> tuple[Any, Links]:
    """An `Inner`."""
    return dist.ProcessGroupGloo(told.store, place.rank, place.size, place.timeout), GlooLinks(place)


class GlooLinks(OnHost):
    """See the top of the file."""

    name = "gloo"
    most_tag = (1 << 31) - 1

    def __init__(self, place: Place) -> None:
        self._place, self._sockets = place, list[int]()

    def join(self, name: str, order: Sequence[int]) -> Any:
        place, before = self._place, _sockets()
        store = dist.PrefixStore(name, place.store)
        group = dist.ProcessGroupGloo(store, order.index(place.rank), place.size, place.timeout)
        self._sockets += _sockets() - before
        return group

    def cut(self) -> None:
        for number in self._sockets:
            _shut(number)


def _sockets() -> set[int]:
    """Numbers of the sockets of this process."""
    found = set()
    for number in map(int, os.listdir("/dev/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
        except OSError:  # the directory itself, closed by now
            continue
    return found


def _shut(number: int) -> None:
    """The connection ends, if it is one; its number stays with whoever has opened it."""
    try:
        with socket.socket(fileno=os.dup(number)) as connection:
            connection.getpeername()  # OSError for one that listens: gloo would not survive its end
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
