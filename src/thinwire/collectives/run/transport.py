"""What carries a set of ranks: the inner group for their calls, and private groups in which schedules run. Here over gloo.

Ranks whose calls differ wait in a private group for messages that nobody sends. gloo can end such a wait only by the end of its
connections; so they are shut down, which their other ends notice too.
"""

import os
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.address import GlooDevices
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
    def from_options(options: Any) -> "Place":
        """From what c10d passes to the creator of a backend."""
        ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
        return Place(dist.PrefixStore("schedules", options.store), options.group_rank, ranks, inherited(options.timeout))


class Transport:
    """Of one group and rank. name: kept with what is measured over it; most_tag: the largest tag of a message, 0 where there are
    none; device: of the tensors; control: a group of the same ranks for their agreements; None: the private one will do.
    """

    name: str
    most_tag: int
    device = torch.device("cpu")
    control: Any = None

    def new_group(self, name: str, order: Sequence[int]) -> Any:
        """A private group in which position i belongs to rank order[i]. Collective."""
        raise NotImplementedError

    def abort(self) -> None:
        """End every wait in the private groups of this rank with an error. They are of no use from then on."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until all that was started in them is over, where a wait only enqueues on the device."""


InnerFactory = Callable[[Any, Place], tuple[Any, Transport]]
"""From what c10d passes to the creator of a backend: the inner group, which is never aborted, and the transport."""


class OverGloo:
    """An `InnerFactory`, whose groups share their sockets' thread."""

    def __init__(self) -> None:
        self._devices = GlooDevices()

    def __call__(self, options: Any, place: Place) -> tuple[Any, Transport]:
        group = self._devices.group(options.store, place.rank, place.size, place.timeout)
        return group, GlooTransport(place, self._devices)


class GlooTransport(Transport):
    """See the top of the file."""

    name = "gloo"
    most_tag = (1 << 31) - 1

    def __init__(self, place: Place, devices: GlooDevices | None = None) -> None:
        """devices: shared with other groups of this process."""
        self._place, self._devices, self._sockets = place, devices or GlooDevices(), list[int]()

    def new_group(self, name: str, order: Sequence[int]) -> Any:
        place, before = self._place, _sockets()
        store = dist.PrefixStore(name, place.store)
        group = self._devices.group(store, order.index(place.rank), place.size, place.timeout)
        self._sockets += _sockets() - before
        return group

    def abort(self) -> None:
        for number in self._sockets:
            with suppress(OSError):  # closed by now, or one that listens: gloo would not survive its end
                _shut_down(number)


def _sockets() -> set[int]:
    found = set()
    for number in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # the directory itself, closed by now
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
    return found


def _shut_down(number: int) -> None:
    """The connection, if it is one; its number stays with whoever has opened it."""
    with socket.socket(fileno=os.dup(number)) as connection:
        connection.getpeername()
        connection.shutdown(socket.SHUT_RDWR)
