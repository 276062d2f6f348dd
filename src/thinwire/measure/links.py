"""Rounds of flows and of round trips among hosts: every host calls the same methods with the same rounds. No torch."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from thinwire.errors import UserError
from thinwire.measure.fit import mean_bps, steady_bps
from thinwire.measure.rounds import Flow, Round
from thinwire.measure.wire import Peer, flow, round_trips

SKIP = 0.35
"""Of a flow's time: slow start and the bytes that ride free."""
TRIPS = 24
TRIPS_LIMIT_S = 0.25


@dataclass(frozen=True, slots=True)
class Sample:
    """What one flow of one round achieved, as payload."""

    round: int
    flow: Flow
    steady_bps: float
    mean_bps: float


class Links:
    """The lines between hosts, seen from one process. me: index of its host; None for one that only waits along.

    gather(value) -> the values of all processes, on all of them; barrier() -> when all have called it.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        me: int | None,
        listener: socket.socket,
        gather: Callable[[Any], list[Any]],
        barrier: Callable[[], None],
    ) -> None:
        self._peers, self._me, self._listener = peers, me, listener
        self._gather, self._barrier = gather, barrier

    def stream(self, rounds: Sequence[Round], seconds: float) -> list[Sample]:
        """Run the rounds, `seconds` each; all samples on every process. Collective."""
        mine = []
        for index, flows in enumerate(rounds):
            to, caller = self._part(flows)
            self._barrier()
            if to is None and caller is None:
                continue
            with self._lines(to, caller):
                arrivals = flow(self._listener, self._peers[to] if to is not None else None, caller is not None, seconds)
            if caller is not None and self._me is not None:
                mean = mean_bps(arrivals, SKIP * seconds, seconds)
                steady = steady_bps(arrivals, SKIP * seconds, seconds)
                mine.append(Sample(index, (caller, self._me), steady or mean, mean))
        return [sample for samples in self._gather(mine) for sample in samples]

    def trips(self, rounds: Sequence[Round]) -> dict[Flow, list[float]]:
        """Half of each round trip in seconds, by pair, on every process. Collective."""
        mine = []
        for flows in rounds:
            to, caller = self._part(flows)
            self._barrier()
            if to is not None or caller is not None:
                with self._lines(to, caller):
                    seconds = round_trips(self._listener, self._peers[to] if to is not None else None, TRIPS, TRIPS_LIMIT_S)
                if to is not None and self._me is not None:
                    mine.append(((self._me, to), [0.5 * trip for trip in seconds]))
        return {pair: halves for told in self._gather(mine) for pair, halves in told}

    @contextmanager
    def _lines(self, to: int | None, caller: int | None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            others = " or ".join(self._peers[host].host for host in (to, caller) if host is not None)
            raise UserError(
                f"the line to {others} broke in the middle of the probe: {error}; is its process still there?"
            ) from None

    def _part(self, flows: Round) -> tuple[int | None, int | None]:
        """(to whom this host sends, who sends to it)"""
        to = next((target for source, target in flows if source == self._me), None)
        caller = next((source for source, target in flows if target == self._me), None)
        return to, caller
