"""Links of a host that fall silent for a while, like a pulled plug, a switch that restarts or a lost radio.

    HOST:AT:FOR    from AT on, for so long, no frame passes from or to any card of HOST

AT counts from the start of the commands, and for `thinwire train` from its first step, however long torch takes to load.

The other ends of the host's cards are taken off their bridges: the cards stay up and send, and every frame is lost there. TCP
survives that, but it tries less and less often, so what it carries goes on up to FOR later than the link does:

    tries at r, 3 r, 7 r, ... (2^k - 1) r after the first loss        r: TCP's time-out, 0.2 s or a little more

Only `ip` is needed for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from thinwire.cluster import Cluster
from thinwire.errors import UserError
from thinwire.lab.wiring import Wiring
from thinwire.units import parse


@dataclass(frozen=True, slots=True)
class Stall:
    """No frame from or to `host` in [at_s, at_s + for_s)."""

    host: str
    at_s: float
    for_s: float

    @classmethod
    def read(cls, text: str) -> "Stall":
        """From HOST:AT:FOR, times in seconds or with their unit. UserError."""
        host, *times = text.split(":")
        if len(times) != 2 or not host:
            raise UserError(f"--stall {text}: write HOST:AT:FOR, e.g. host1:20:60 for silence from 20 s on, for 60 s")
        at_s, for_s = (parse(time, "s") for time in times)
        if at_s < 0 or for_s <= 0:
            raise UserError(f"--stall {text}: it begins at 0 s or later and lasts longer than 0 s")
        return cls(host, at_s, for_s)


@dataclass(frozen=True, slots=True)
class StallStep:
    """At `at_s`: the lines for `ip` that take a host's cards off their bridges or put them back, and the message about it."""

    at_s: float
    lines: tuple[str, ...]
    message: str


def steps_of(stalls: Sequence[Stall], cluster: Cluster, wiring: Wiring) -> list[StallStep]:
    """What is to be done when, in order. UserError for a host that is not there, or two stalls of one at a time."""
    found = []
    for host in dict.fromkeys(stall.host for stall in stalls):
        cards = [card for card in wiring.cards if card.host == host]
        if not cards:
            raise UserError(f"--stall: {cluster.name} has no host {host!r}; known: {', '.join(wiring.netns)}")
        own = sorted((stall for stall in stalls if stall.host == host), key=lambda stall: stall.at_s)
        for before, after in pairwise(own):
            if after.at_s < before.at_s + before.for_s:
                raise UserError(f"--stall: {host} is to fall silent at {after.at_s:g} s, and is silent then already")
        off = tuple(f"link set {card.core_interface} nomaster" for card in cards)
        back = tuple(f"link set {card.core_interface} master {wiring.bridges[card.switch]}" for card in cards)
        for stall in own:
            found.append(StallStep(stall.at_s, off, f"{host} is silent from {stall.at_s:g} s on, for {stall.for_s:g} s"))
            found.append(StallStep(stall.at_s + stall.for_s, back, f"{host} is heard again"))
    return sorted(found, key=lambda step: step.at_s)
