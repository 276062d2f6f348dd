"""Which way a group takes for an op and a class of sizes: the first rank knows or asks for advice, all of them measure.

A class holds the sizes between two powers of two. Ways are timed in turns, each after a barrier, on the size that came first;
the seconds of a turn are those of the slowest rank, of a way the median of its turns (gloo's all-to-all, for one, is fast at
times); of equal ones the first advised is the best. It replaces the backend's own collective only if it takes less than `WORTH`
of its time (`SHORT_WORTH` for short calls). All ranks see the same numbers, and so choose alike.

What was measured in an earlier run on this network (`network`, `cache`) is timed once more when it is first used in a run, alone,
and on the size that it was measured on: others of its class take up to twice as long. It holds if that took between 1 / `STALE`
and `STALE` of the seconds that are kept; else the network is not what it was, and all is measured.
"""

import socket
import sys
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from thinwire.cluster import Cluster
from thinwire.collectives.choose.calibrate import PROBE_BYTES
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.run.engine import Engine
from thinwire.collectives.run.links import Place
from thinwire.collectives.schedules.doubling import recursive_doubling
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.cache import Cache, beside
from thinwire.collectives.tuned.network import Network, network_of
from thinwire.collectives.tuned.way import NATIVE, Call, Way, example, perform, wire_bytes
from thinwire.errors import UserError
from thinwire.units import show

TURNS = 3
STEADY_TURNS, BETTER, MOST_TURNS = 5, 0.95, 30
"""What messages cost is the least of as many turns as it takes until so many in a row were no better: ranks that have only just
begun are slower for a while."""
REPEATED, REPEATED_S = 10, 0.05
"""So many times in a turn what takes less."""
WORTH, SHORT_WORTH, SHORT_S = 0.97, 0.67, 0.02
"""What is short differs from one time to the next, and our way to a schedule is longer than that to gloo: it must win clearly."""
Key = tuple[tuple[int, ...], str, int, int]
"""Ranks of the group, op, class of sizes, root."""
EQUAL = 0.05
"""Less is made good by the steps that the first advised way has fewer, once ranks compute too: FSDP2 among 8 hosts took 1.43 s a
step with one of 1 step, 1.49 s with one of 3 that had been 3 % faster alone."""
STALE = 1.5
LONG_S = 1.0
"""Of what takes longer a single turn is enough."""
CONNECT_S = 0.3
"""What takes longer the first time is not short, even if it had to connect first."""


def say_to_stderr(line: str) -> None:
    """Where a user sees it."""
    print(f"thinwire: {line}", file=sys.stderr, flush=True)


class Tuner:
    """One per process. measures: False takes the best by price, unmeasured. advisor and cache are used on the first rank only."""

    def __init__(
        self, advisor: Advisor, cache: Cache | None = None, *, measures: bool = True, say: Callable[[str], None] = say_to_stderr
    ) -> None:
        self._advisor, self._cache, self._measures, self._say = advisor, cache or Cache(None), measures, say
        self._calibrated: set[int] = set()
        self._hosts: dict[tuple[int, ...], list[str]] = {}
        self._sure: set[str] = set()
        """Calls that were timed in this run."""
        self.chosen: dict[Key, Way] = {}
        """What groups of this process have decided, for predictions."""

    @property
    def costs(self) -> Costs:
        """Of messages, as far as this rank knows them."""
        return self._advisor.costs

    def decide(self, engine: Engine, call: Call) -> Way:
        """In a job of `engine`. Collective."""
        way = self._decided(engine, call)
        self.chosen[engine.place.ranks, call.op, size_class(call.message_bytes), call.root] = way
        return way

    def _decided(self, engine: Engine, call: Call) -> Way:
        place = engine.place
        key = f"{engine.links.name}: {call.op} {size_class(call.message_bytes)} {call.root} {','.join(map(str, place.ranks))}"
        # The first rank says whether, since others may have been in other groups of this size.
        if self._measures and engine.told(place.size not in self._calibrated if place.rank == 0 else None):
            self._calibrate(engine)
        self._say_host(place)
        told = _heard(engine, call, lambda: self._kept(key, call, place))
        if told is not None:
            kept = Way.from_plain(told["way"])
            timed = example(call.op, told["bytes"], engine, call.root)
            if not told["timed"] or self._holds(engine, kept, timed, told["seconds"]):
                self._sure.add(key)
                return kept
        ways = [Way.from_plain(one) for one in _heard(engine, call, lambda: self._offers(call, place))]
        if len(ways) == 1:
            return ways[0]
        seconds = measure(engine, ways, example(call.op, call.message_bytes, engine, call.root))
        native_s = next(time_s for way, time_s in zip(ways, seconds, strict=True) if way.native)
        tie_s = min(seconds) * (1 + EQUAL)
        best_s, best = next((time_s, way) for time_s, way in zip(seconds, ways, strict=True) if time_s <= tie_s)
        if best_s >= (WORTH if native_s > SHORT_S else SHORT_WORTH) * native_s:
            best_s, best = native_s, NATIVE
        if place.rank == 0:
            found = {"way": best.to_plain(), "bytes": call.message_bytes, "seconds": best_s, "native_s": native_s}
            self._cache.keep(key, self._network(place), found)
            self._sure.add(key)
            self._say(f"{_about(call, place)}: {best.name}, {show(best_s, 's')} (native {show(native_s, 's')})")
        return best

    def _say_host(self, place: Place) -> None:
        """To the first rank, once for each group: where this one runs."""
        if place.ranks not in self._hosts:
            place.store.set(f"host/{place.rank}", socket.gethostname())
            hosts = [place.store.get(f"host/{rank}").decode() for rank in range(place.size)] if place.rank == 0 else []
            self._hosts[place.ranks] = hosts

    def _network(self, place: Place) -> Network:
        """On the first rank. UserError for ranks that the cluster does not have."""
        self._advisor.check(place.ranks)
        return network_of(self._advisor.cluster, place.ranks, self._hosts[place.ranks])

    def _kept(self, key: str, call: Call, place: Place) -> dict[str, Any] | None:
        """On the first rank: what was measured on this network; None if nothing was, or what is kept cannot be used."""
        cache, instead = self._cache, "measuring" if self._measures else "taking the best by price"
        if cache.dropped:
            self._say(f"{cache.path} {cache.dropped}: it is begun anew")
            cache.dropped = ""
        found = cache.find(key, self._network(place))
        if found is None:
            if cache.elsewhere(key):
                self._say(f"{_about(call, place)}: what {cache.path} holds was measured on another network; {instead}")
            return None
        try:
            Way.from_plain(found["way"]).check(call, place.size)
            if size_class(found["bytes"]) != size_class(call.message_bytes):
                raise ValueError(f"{found['bytes']} bytes")
            kept = {"way": found["way"], "bytes": found["bytes"], "seconds": float(found["seconds"])}
        except Exception as error:
            self._say(f"{_about(call, place)}: what {cache.path} holds cannot be used ({error}); {instead}")
            return None
        return {**kept, "timed": self._measures and key not in self._sure}

    def _holds(self, engine: Engine, way: Way, call: Call, kept_s: float) -> bool:
        """Whether `way` takes about as long as when it was measured, on `call`. Collective."""
        (now_s,) = measure(engine, [way], call)
        if max(now_s, kept_s) <= STALE * min(now_s, kept_s):
            return True
        if engine.place.rank == 0:
            self._say(
                f"{_about(call, engine.place)}: {way.name} takes {show(now_s, 's')}, and took {show(kept_s, 's')} when it was "
                "measured; measuring again"
            )
        return False

    def _offers(self, call: Call, place: Place) -> list[dict[str, Any]]:
        """On the first rank: what to try, all of it proven right."""
        priced = self._advisor.ways(call.op, call.message_bytes, place.ranks, call.root)
        ways = [way for way, _ in (priced if self._measures else priced[:1])]
        for way in ways:
            way.check(call, place.size)
        return [way.to_plain() for way in ways]

    def _calibrate(self, engine: Engine) -> None:
        """Once for each number of ranks: what do messages cost here?"""
        p = engine.place.size
        self._calibrated.add(p)
        doubling = Way("recursive doubling", recursive_doubling(p))
        ways, call = [doubling, NATIVE], example("all_reduce", PROBE_BYTES, engine)
        repeats, least, steady = _ready(engine, ways, call), [inf, inf], 0
        for _ in range(MOST_TURNS):
            turn = _turn(engine, ways, call, repeats)
            steady = 0 if any(now < BETTER * before for now, before in zip(turn, least, strict=True)) else steady + 1
            least = list(map(min, turn, least))
            if steady == STEADY_TURNS:
                break
        if engine.place.rank == 0:
            self._advisor.calibrate(p, *least)


def make_tuner(cluster: Cluster | None, file: str, *, measures: bool, cache: str = "") -> Tuner:
    """file: that `cluster` came from; what is measured is kept beside it, if it is one, or in `cache`."""
    kept = Path(cache) if cache else beside(Path(file)) if Path(file).is_file() else None
    return Tuner(Advisor(cluster), Cache(kept), measures=measures)


def _heard(engine: Engine, call: Call, say: Callable[[], Any]) -> Any:
    """What `say` returns on the first rank. Collective. Its error is told too, or the others would wait: UserError on all."""
    told: dict[str, Any] | None = None
    if engine.place.rank == 0:
        try:
            told = {"value": say()}
        except Exception as error:
            told = {"error": str(error) if isinstance(error, UserError) else f"{call.op}: {type(error).__name__}: {error}"}
    told = engine.told(told)
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def _about(call: Call, place: Place) -> str:
    return f"{call.op} of {show(call.message_bytes, 'B')} among {place.size} ranks"


def size_class(message_bytes: int) -> int:
    """The least power of two that is not below, as its exponent."""
    return max(0, message_bytes - 1).bit_length()


def measure(engine: Engine, ways: list[Way], call: Call) -> list[float]:
    """Seconds of each way, the same on all ranks. In a job of `engine`; collective."""
    repeats = _ready(engine, ways, call)
    turns = [_turn(engine, ways, call, repeats)]
    if max(turns[0]) <= LONG_S:
        turns += [_turn(engine, ways, call, repeats) for _ in range(TURNS - 1)]
    return [median(seconds) for seconds in zip(*turns, strict=True)]


def _ready(engine: Engine, ways: list[Way], call: Call) -> list[int]:
    """Connect and compile; how often each way is to be repeated in a turn."""
    once = [1] * len(ways)
    seconds = _turn(engine, ways, call, once)
    if min(seconds) < CONNECT_S:  # it may be short without that
        seconds = list(map(min, _turn(engine, ways, call, once), _turn(engine, ways, call, once)))
    return [REPEATED if one < REPEATED_S else 1 for one in seconds]


def _turn(engine: Engine, ways: list[Way], call: Call, repeats: list[int]) -> list[float]:
    """Of the slowest rank, for each way."""
    return _slowest(engine, [_timed(engine, way, call, count) for way, count in zip(ways, repeats, strict=True)])


def _timed(engine: Engine, way: Way, call: Call, repeats: int) -> float:
    total = 0.0
    for _ in range(repeats):
        engine.talk.barrier(dist.BarrierOptions()).wait()
        started = time.perf_counter()
        perform(way, call, engine)
        engine.links.settle()
        engine.note(call.op, call.message_bytes, wire_bytes(way, call, engine))
        total += time.perf_counter() - started
    return total / repeats


def _slowest(engine: Engine, seconds: list[float]) -> list[float]:
    """Of each number, the largest of any rank."""
    values = torch.tensor(seconds, dtype=torch.float64)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
    engine.talk.allreduce([values], options).wait()
    engine.note("all_reduce", 8 * len(seconds), None)
    found: list[float] = values.tolist()
    return found
