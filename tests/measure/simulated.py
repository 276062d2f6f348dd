"""A network that is computed instead of measured: flows share links fairly (max-min), with noise on what comes out."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from thinwire.measure.links import Sample
from thinwire.measure.rounds import Flow, Round


def share_fairly(flows: Sequence[Flow], routes: Mapping[Flow, Sequence[str]], capacity: Mapping[str, float]) -> dict[Flow, float]:
    """Progressive filling (Bertsekas and Gallager 1987): the tightest link fixes its flows, then the next."""
    rates: dict[Flow, float] = {}
    left, waiting = dict(capacity), set(flows)
    while waiting:
        users = {link: [flow for flow in waiting if link in routes[flow]] for link in left}
        tight = min((link for link in users if users[link]), key=lambda link: left[link] / len(users[link]))
        rate = left[tight] / len(users[tight])
        for flow in users[tight]:
            rates[flow] = rate
            waiting.remove(flow)
            for link in routes[flow]:
                left[link] = max(0.0, left[link] - rate)
    return rates


@dataclass
class SimulatedLinks:
    """Hosts on cards of their own rates, in racks with uplinks (None: on the core switch); all together through
    a hub. Rates and seconds as payload."""

    send: Sequence[float]
    receive: Sequence[float]
    rack: Sequence[int | None]
    up: Sequence[float] = ()
    down: Sequence[float] = ()
    hub: float = float("inf")
    cable_s: float = 1e-4
    noise: float = 0.01
    broken: float = 0.0
    seed: int = 0
    rounds: int = 0
    seconds: float = 0.0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def route(self, flow: Flow) -> list[str]:
        a, b = flow
        links = [f"send{a}", f"receive{b}", "hub0"]
        if self.rack[a] != self.rack[b]:
            links += [f"up{self.rack[a]}"] if self.rack[a] is not None else []
            links += [f"down{self.rack[b]}"] if self.rack[b] is not None else []
        return links

    def stream(self, rounds: Sequence[Round], seconds: float) -> list[Sample]:
        rates = {"send": self.send, "receive": self.receive, "up": self.up, "down": self.down, "hub": [self.hub]}
        capacity = {f"{kind}{index}": rate for kind, values in rates.items() for index, rate in enumerate(values)}
        samples = []
        for index, flows in enumerate(rounds):
            assert len({a for a, _ in flows}) == len({b for _, b in flows}) == len(flows), "one flow a host and way"
            self.rounds += 1
            self.seconds += seconds
            for flow, rate in share_fairly(flows, {flow: self.route(flow) for flow in flows}, capacity).items():
                seen = rate * (1 - abs(self._random.gauss(0, self.noise)))
                if self._random.random() < self.broken:
                    seen *= self._random.uniform(0.3, 0.7)
                samples.append(Sample(index, flow, seen, seen))
        return samples

    def trips(self, rounds: Sequence[Round]) -> dict[Flow, list[float]]:
        return {
            (a, b): [(len(self.route((a, b))) - 1) * self.cable_s * self._random.uniform(1.0, 1.05) for _ in range(12)]
            for flows in rounds
            for a, b in flows
        }
