"""Layout: a degree for each parallel axis, and the rank <-> coordinates arithmetic.

Slow axis first, fast axis last: neighbours on the last axis have neighbouring ranks, so they share a host.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from thinwire.errors import UserError

AXES = ("outer", "pipe", "data", "expert", "seq", "shard", "tensor")
REPLICAS = "replicas"
"""Not an axis of its own: the ranks that differ on REPLICA_AXES only, each of which sees other tokens."""
DENSE = "dense"
"""Nor is this: the ranks that average gradients of what experts' ranks each have whole; those that differ on these two."""
DENSE_AXES = ("data", "expert")
REPLICA_AXES = ("outer", "data", "expert", "shard")
EVERYONE = "everyone"
"""All ranks, where they differ on other axes too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees of the axes. Their product is the world size; 1 means the axis is not used."""

    outer: int = 1
    pipe: int = 1
    data: int = 1
    expert: int = 1
    seq: int = 1
    shard: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(f"layout.{axis} = {getattr(self, axis)}: a degree is 1 or more")

    @property
    def degrees(self) -> tuple[int, ...]:
        """The degrees in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """The number of ranks: the product of the degrees."""
        return prod(self.degrees)

    def check(self, world_size: int) -> None:
        """Raise UserError unless the layout uses exactly `world_size` ranks."""
        if self.world_size != world_size:
            raise UserError(
                f"layout {self} needs {self.world_size} ranks, but there are {world_size}; change [layout] or the number of ranks"
            )

    def coordinates(self, rank: int) -> dict[str, int]:
        """The place of `rank` on each axis. UserError for a rank outside of the layout."""
        if not 0 <= rank < self.world_size:
            raise UserError(f"there is no rank {rank} in layout {self}, which has {self.world_size}")
        place = {}
        for axis, degree in zip(reversed(AXES), reversed(self.degrees), strict=True):
            rank, place[axis] = divmod(rank, degree)
        return {axis: place[axis] for axis in AXES}

    @property
    def replicas(self) -> int:
        """How many see other tokens: copies of the model, or ranks that share the experts or the states of one."""
        return self.outer * self.data * self.expert * self.shard

    @property
    def dense(self) -> int:
        """Ranks along DENSE."""
        return self.data * self.expert

    @property
    def replica_axis(self) -> str:
        """The axis along which replicas lie, REPLICAS if several are used."""
        used = [axis for axis in REPLICA_AXES if getattr(self, axis) > 1]
        return REPLICAS if len(used) > 1 else used[0] if used else "data"

    @property
    def of_gradients(self) -> "Layout":
        """The same ranks, as who averages gradients sees them: those that share sequences have other tokens, as replicas do. Not
        of experts' parameters, which ranks of the expert axis do not share, and whose model cannot share sequences."""
        return self if self.seq == 1 else replace(self, data=self.data * self.expert * self.seq, expert=1, seq=1)

    @property
    def report_axis(self) -> str:
        """The axis along which all ranks lie: EVERYONE if replicas of several ranks are several."""
        if self.replicas == self.world_size:
            return self.replica_axis
        return next((axis for axis in AXES if getattr(self, axis) == self.world_size), EVERYONE)

    def replica(self, rank: int) -> int:
        """The number of the replica that `rank` belongs to."""
        place = self.coordinates(rank)
        return ((place["outer"] * self.data + place["data"]) * self.expert + place["expert"]) * self.shard + place["shard"]

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """The groups of ranks that differ on `axis` only, each in the order of the axis. UserError for an unknown axis."""
        several = {REPLICAS: REPLICA_AXES, EVERYONE: AXES, DENSE: DENSE_AXES}
        if axis not in (*AXES, *several):
            raise UserError(f"there is no axis {axis!r}; axes: {', '.join(AXES)}")
        return list(_groups(self, several.get(axis, (axis,))))

    def senders(self, axis: str) -> list[tuple[int, ...]]:
        """The groups in which what training sends over `axis` travels: averages over replicas go over ranks of a sequence too."""
        return (self if axis == "seq" else self.of_gradients).groups(axis)

    def __str__(self) -> str:
        used = [f"{axis} {degree}" for axis, degree in zip(AXES, self.degrees, strict=True) if degree > 1]
        return " x ".join(used) or "data 1"


@lru_cache(maxsize=1024)
def _groups(layout: Layout, varied: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        members.setdefault(tuple(place[other] for other in AXES if other not in varied), []).append(rank)
    return tuple(tuple(group) for group in members.values())


def check_sequence(sequence: int, degree: int) -> None:
    """UserError unless so many tokens can be shared out to `degree` ranks of the seq axis."""
    if degree > 1 and sequence % (2 * degree):
        possible = [one for one in range(1, sequence + 1) if one == 1 or sequence % (2 * one) == 0]
        nearest = min(possible, key=lambda one: abs(one - degree))
        raise UserError(
            f"layout.seq = {degree}: each rank takes two of {2 * degree} equal slices of a sequence, and {sequence} tokens are "
            f"no multiple of {2 * degree}; the nearest degree that can be taken is {nearest}"
        )
