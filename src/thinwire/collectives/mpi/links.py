"""Schedules over MPI: what private groups are there, and how waits in them end where the ranks have parted.

A private group is a communicator of its own. MPI cannot end a wait from outside, but it is not MPI that waits: the engine asks it
now and then. So the engine gives up what is on its way in these groups; receives are cancelled. Other ranks do not see that, and
give up when they look into the store (`run.engine`).
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from thinwire.collectives.mpi.group import MpiGroup
from thinwire.collectives.mpi.library import Library
from thinwire.collectives.run.links import OnHost, Place

Make = Callable[[list[int], str, timedelta], MpiGroup]
"""From ranks of the world in their order, a name and a time-out to a group."""


class MpiLinks(OnHost):
    """`run.links.Links`. group: what c10d calls the group, the same on all its ranks."""

    def __init__(self, library: Library, make: Make, place: Place, group: str) -> None:
        self._library, self._make, self._place, self._group = library, make, place, group
        self._made: list[MpiGroup] = []

    @property
    def name(self) -> str:
        return self._library.version

    @property
    def most_tag(self) -> int:
        return self._library.most_tag

    def join(self, name: str, order: Sequence[int]) -> Any:
        place = self._place
        self._made.append(self._make([place.ranks[at] for at in order], f"{self._group} {name}", place.timeout))
        return self._made[-1]

    def cut(self) -> None:
        for group in self._made:
            group.give_up("the ranks differ in what they call")
