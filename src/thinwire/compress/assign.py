"""Which averager takes which parameter of a bucket: the one that sends the fewest bytes for it, and what rides along with it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from thinwire.compress.averager import RIDE_BYTES, Averager, Piece
from thinwire.workload import Parameter

Part = TypeVar("Part", Piece, Parameter)
Assigned = tuple[Averager, list[Part], list[Part]]
"""What an averager codes, and what rides along with it."""


class Assignment:
    """Among `averagers`, of which the last one averages plainly."""

    def __init__(self, averagers: Sequence[Averager], is_coded: Callable[[str, Sequence[int]], bool]) -> None:
        self._averagers, self._is_coded, self._plain = averagers, is_coded, len(averagers) - 1

    def of(self, parts: Sequence[Part], world_size: int) -> "list[Assigned[Part]]":
        """Each averager that has a share of the bucket: what it codes, and what rides along with it."""
        routes = self._routes(parts, world_size)
        coding = sorted({route for route in routes if route != self._plain})
        assigned: list[Assigned[Part]] = [(averager, [], []) for averager in self._averagers]
        for part, route in zip(parts, routes, strict=True):
            if route != self._plain:
                assigned[route][1].append(part)
            else:
                able = [other for other in coding if self._averagers[other].carries(part.numel, world_size)]
                assigned[able[0] if able else self._plain][2].append(part)
        return [one for one in assigned if one[1] or one[2]]

    def codes(self, part: "Piece | Parameter", world_size: int) -> bool:
        """Whether an averager codes it."""
        return self._cheapest(part.name, part.shape, world_size) != self._plain

    def _routes(self, parts: "Sequence[Part]", world_size: int) -> list[int]:
        """The cheapest averager of each part; but what saves less than its collectives cost rides along with another, exactly."""
        p, plain = world_size, self._plain
        routes = [self._cheapest(part.name, part.shape, p) for part in parts]
        for route in sorted(set(routes) - {plain}):
            mine = [part for part, its in zip(parts, routes, strict=True) if its == route]
            others = [self._averagers[other] for other in set(routes) - {route, plain}]
            coded, exact = (
                sum(self._averagers[index].sent_bytes(part.shape, p) or 0 for part in mine) for index in (route, plain)
            )
            if exact - coded <= RIDE_BYTES and all(any(other.carries(part.numel, p) for other in others) for part in mine):
                routes = [plain if its == route else its for its in routes]
        return routes

    def _cheapest(self, name: str, shape: Sequence[int], world_size: int) -> int:
        """Index of the averager; at equal bytes the first one, so that plainly is the last resort."""
        if world_size == 1 or not self._is_coded(name, shape):
            return self._plain
        sizes = [averager.sent_bytes(shape, world_size) if averager.takes(name) else None for averager in self._averagers]
        return min((size, index) for index, size in enumerate(sizes) if size is not None)[1]
