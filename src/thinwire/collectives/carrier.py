"""Who carries a collective, as predictions see it: gloo's own algorithms, or what has been chosen for a group."""

from collections.abc import Sequence
from typing import Protocol

from thinwire.cluster.graph import Routes
from thinwire.collectives.price import price
from thinwire.collectives.wire import Flow, flows
from thinwire.traffic import Transfer


class Carrier(Protocol):
    """`group`: global ranks, in the order of the group; flows are between positions in it."""

    def flows(self, transfer: Transfer, group: Sequence[int]) -> tuple[Flow, ...]:
        """(source, target, payload bytes) of one call."""

    def seconds(self, routes: Routes, transfer: Transfer, group: Sequence[int]) -> float:
        """Of one call, nothing else on the wires."""

    def about(self) -> str:
        """In words, for the assumptions of a prediction."""


class Native:
    """gloo."""

    def flows(self, transfer: Transfer, group: Sequence[int]) -> tuple[Flow, ...]:
        return flows(transfer.op, transfer.message_bytes, len(group))

    def seconds(self, routes: Routes, transfer: Transfer, group: Sequence[int]) -> float:
        return price(routes, transfer.op, transfer.message_bytes, group).seconds

    def about(self) -> str:
        return "gloo's own algorithms"
