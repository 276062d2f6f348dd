"""Which implementation a group takes for an op and a class of sizes: the first rank knows or asks for advice, all measure.

A class holds the sizes between two powers of two. Implementations are timed in turns, each after a barrier, on the size that came
first; the seconds of a turn are those of the slowest rank, of an implementation the median of its turns (gloo's all-to-all, for
one, is fast at times); of equal ones the first advised is the best. It replaces the backend's own only if it takes less than
`WORTH` of its time (`SHORT_WORTH` for short calls). All ranks see the same numbers, and so choose alike.

What was measured in an earlier run on this network (`cache`) is timed once more when it is first used in a run, alone,
and on the size that it was measured on: others of its class take up to twice as long. It holds if that took between 1 / `STALE`
and `STALE` of the stored seconds; else the network is not what it was, and all is measured.

What groups have decided is what predictions go by (`Chosen`): bytes and seconds of the implementations that were chosen.
"""

import functools
import socket
import sys
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from thinwire.cluster import Cluster
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.call import CollectiveCall, collective_call
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.native import closed_form_s, simulate_native
from thinwire.collectives.choose.simulate import simulate
from thinwire.collectives.price import Carrier
from thinwire.collectives.run.engine import Engine
from thinwire.collectives.run.transport import Place
from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.doubling import recursive_doubling
from thinwire.collectives.tuned.advice import PROBE_BYTES, Advisor
from thinwire.collectives.tuned.cache import Cache, Network, network_of
from thinwire.collectives.tuned.implementation import NATIVE, Call, Implementation, example, perform, wire_bytes
from thinwire.collectives.wire import Flow, flows
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.units import show

TURNS = 3
STEADY_TURNS, BETTER, MOST_TURNS = 5, 0.95, 30
"""What messages cost is the least of as many turns as it takes until so many in a row were no better: ranks that have only just
started are slower for a while."""
REPEATED, REPEATED_S = 10, 0.05
"""So many times in a turn what takes less."""
WORTH, SHORT_WORTH, SHORT_S = 0.97, 0.67, 0.02
"""What is short differs from one time to the next, and a schedule takes longer to call than gloo: it must win clearly."""
Key = tuple[tuple[int, ...], str, int, int]
"""Ranks of the group, op, class of sizes, root."""
EQUAL = 0.05
"""A smaller lead is worth less than the steps that the first advised one saves, once ranks compute too: FSDP2 among 8 hosts took
1.43 s a step with one of 1 step, 1.49 s with one of 3 that had been 3 % faster alone."""
STALE = 1.5
LONG_S, FAR = 1.0, 2.0
"""Of what takes longer a single turn is enough, and none if, with connecting, it took more than so many times the fastest's."""
CONNECT_S = 0.3
"""What takes longer the first time is not short, even if it had to connect first."""


def print_to_stderr(line: str) -> None:
    """Where a user sees it."""
    print(f"thinwire: {line}", file=sys.stderr, flush=True)


class Tuner:
    """One per process. measures: False takes the best by price, unmeasured. advisor and cache are used on the first rank only.

    chosen: what groups of this process have decided, for predictions.
    """

    def __init__(
        self,
        advisor: Advisor,
        cache: Cache | None = None,
        *,
        measures: bool = True,
        report: Callable[[str], None] = print_to_stderr,
    ) -> None:
        self.advisor, self._cache, self._measures, self._report = advisor, cache or Cache(None), measures, report
        self.chosen: dict[Key, Implementation] = {}
        self.round = 0
        """Groups decide anew when it has changed."""
        self._calibrated: set[int] = set()
        self._hosts: dict[tuple[int, ...], list[str]] = {}
        self._timed: set[str] = set()
        """Calls that were timed in this run."""

    def again(self, cluster: Cluster) -> None:
        """Decide all anew, for links as they are now. On every rank between the same two calls; the first one's cluster counts.
        What is measured from here on is not kept for other runs."""
        self.advisor.cluster, self._cache = cluster, Cache(None)
        self.round += 1
        self.chosen.clear()

    def decide(self, engine: Engine, call: Call) -> Implementation:
        """In a job of `engine`. Collective."""
        chosen = self._decided(engine, call)
        self.chosen[engine.place.ranks, call.op, size_class(call.message_bytes), call.root] = chosen
        return chosen

    def _decided(self, engine: Engine, call: Call) -> Implementation:
        place = engine.place
        ranks = ",".join(map(str, place.ranks))
        key = f"{engine.transport.name}: {call.op} {size_class(call.message_bytes)} {call.root} {ranks}"
        # The first rank decides, since others may have been in other groups of this size.
        if self._measures and engine.broadcast(place.size not in self._calibrated if place.rank == 0 else None):
            self._calibrate(engine)
        self._gather_hosts(place)
        stored = _from_first(engine, call, lambda: self._stored(key, call, place))
        if stored is not None:
            chosen = Implementation.from_plain(stored["way"])
            timed = example(call.op, stored["bytes"], engine, call.root)
            if not stored["timed"] or self._holds(engine, chosen, timed, stored["seconds"]):
                self._timed.add(key)
                return chosen
        offers = _from_first(engine, call, lambda: self._offers(call, place))
        implementations = [Implementation.from_plain(one) for one in offers]
        if len(implementations) == 1:
            return implementations[0]
        seconds = measure(engine, implementations, example(call.op, call.message_bytes, engine, call.root))
        timed_s = list(zip(implementations, seconds, strict=True))
        native_s = next(time_s for one, time_s in timed_s if one.native)
        best, best_s = next((one, time_s) for one, time_s in timed_s if time_s <= min(seconds) * (1 + EQUAL))
        if best_s >= (WORTH if native_s > SHORT_S else SHORT_WORTH) * native_s:
            best, best_s = NATIVE, native_s
        if place.rank == 0:
            found = {"way": best.to_plain(), "bytes": call.message_bytes, "seconds": best_s, "native_s": native_s}
            self._cache.store(key, self._network(place), found)
            self._timed.add(key)
            self._report(f"{_about(call, place)}: {best.name}, {show(best_s, 's')} (native {show(native_s, 's')})")
        return best

    def _gather_hosts(self, place: Place) -> None:
        """On the first rank, once for each group: where its ranks run."""
        if place.ranks not in self._hosts:
            place.store.set(f"host/{place.rank}", socket.gethostname())
            hosts = [place.store.get(f"host/{rank}").decode() for rank in range(place.size)] if place.rank == 0 else []
            self._hosts[place.ranks] = hosts

    def _network(self, place: Place) -> Network:
        """On the first rank. UserError for ranks that the cluster does not have."""
        self.advisor.check(place.ranks)
        return network_of(self.advisor.cluster, place.ranks, self._hosts[place.ranks])

    def _stored(self, key: str, call: Call, place: Place) -> dict[str, Any] | None:
        """On the first rank: what was measured on this network; None if nothing was, or what is stored cannot be used."""
        cache, instead = self._cache, "measuring" if self._measures else "taking the best by price"
        if cache.dropped:
            self._report(f"{cache.path} {cache.dropped}: it is started anew")
            cache.dropped = ""
        found = cache.find(key, self._network(place))
        if found is None:
            if cache.elsewhere(key):
                self._report(f"{_about(call, place)}: what {cache.path} holds was measured on another network; {instead}")
            return None
        try:
            Implementation.from_plain(found["way"]).check(call, place.size)
            if size_class(found["bytes"]) != size_class(call.message_bytes):
                raise ValueError(f"{found['bytes']} bytes")
            stored = {"way": found["way"], "bytes": found["bytes"], "seconds": float(found["seconds"])}
        except Exception as error:
            self._report(f"{_about(call, place)}: what {cache.path} holds cannot be used ({error}); {instead}")
            return None
        return {**stored, "timed": self._measures and key not in self._timed}

    def _holds(self, engine: Engine, chosen: Implementation, call: Call, stored_s: float) -> bool:
        """Whether it takes about as long as when it was measured, on `call`. Collective."""
        (now_s,) = measure(engine, [chosen], call)
        if max(now_s, stored_s) <= STALE * min(now_s, stored_s):
            return True
        if engine.place.rank == 0:
            took = f"{chosen.name} takes {show(now_s, 's')}, and took {show(stored_s, 's')} when it was measured"
            self._report(f"{_about(call, engine.place)}: {took}; measuring again")
        return False

    def _offers(self, call: Call, place: Place) -> list[dict[str, Any]]:
        """On the first rank: what to try, all of it proven right."""
        advised = self.advisor.implementations(call.op, call.message_bytes, place.ranks, call.root)
        offers = advised if self._measures else advised[:1]
        for one in offers:
            one.check(call, place.size)
        return [one.to_plain() for one in offers]

    def _calibrate(self, engine: Engine) -> None:
        """Once for each number of ranks: what do messages cost here?"""
        p = engine.place.size
        self._calibrated.add(p)
        both = [Implementation("recursive doubling", recursive_doubling(p)), NATIVE]
        call = example("all_reduce", PROBE_BYTES, engine)
        repeats, least, steady = list(map(_repeats, _warm_up(engine, both, call))), [inf, inf], 0
        for _ in range(MOST_TURNS):
            turn = _turn(engine, both, call, repeats)
            steady = 0 if any(now < BETTER * before for now, before in zip(turn, least, strict=True)) else steady + 1
            least = list(map(min, turn, least))
            if steady == STEADY_TURNS:
                break
        if engine.place.rank == 0:
            self.advisor.calibrate(p, *least)


def make_tuner(cluster: Cluster | None, file: str, *, measures: bool, cache: str = "") -> Tuner:
    """file: that `cluster` came from; what is measured is stored beside it, if it is one, or in `cache`."""
    beside = Path(file).with_suffix(".collectives.json") if Path(file).is_file() else None
    return Tuner(Advisor(cluster), Cache(Path(cache) if cache else beside), measures=measures)


def _from_first(engine: Engine, call: Call, function: Callable[[], Any]) -> Any:
    """What `function` returns on the first rank. Collective. Its error is sent too, since the others wait: UserError on all."""
    answer: dict[str, Any] | None = None
    if engine.place.rank == 0:
        try:
            answer = {"value": function()}
        except Exception as error:
            answer = {"error": str(error) if isinstance(error, UserError) else f"{call.op}: {type(error).__name__}: {error}"}
    answer = engine.broadcast(answer)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def _about(call: Call, place: Place) -> str:
    return f"{call.op} of {show(call.message_bytes, 'B')} among {place.size} ranks"


def size_class(message_bytes: int) -> int:
    """The least power of two that is not below, as its exponent."""
    return max(0, message_bytes - 1).bit_length()


def measure(engine: Engine, implementations: list[Implementation], call: Call) -> list[float]:
    """Seconds of each, the same on all ranks. In a job of `engine`; collective."""
    seconds = _warm_up(engine, implementations, call)
    again = undecided(seconds)
    rest, repeats = [implementations[place] for place in again], [_repeats(seconds[place]) for place in again]
    turns = [_turn(engine, rest, call, repeats)]
    if max(turns[0]) <= LONG_S:
        turns += [_turn(engine, rest, call, repeats) for _ in range(TURNS - 1)]
    for place, *own in zip(again, *turns, strict=True):
        seconds[place] = median(own)
    return seconds


def undecided(seconds: Sequence[float]) -> list[int]:
    """The places of those that a warm-up in `seconds` leaves in the race."""
    return [place for place, own in enumerate(seconds) if own <= max(LONG_S, FAR * min(seconds))]


def _repeats(seconds: float) -> int:
    """In a turn, of what takes `seconds`."""
    return REPEATED if seconds < REPEATED_S else 1


def _warm_up(engine: Engine, implementations: list[Implementation], call: Call) -> list[float]:
    """Connect and compile; the seconds of each."""
    once = [1] * len(implementations)
    seconds = _turn(engine, implementations, call, once)
    if min(seconds) < CONNECT_S:  # it may be short without that
        seconds = list(map(min, _turn(engine, implementations, call, once), _turn(engine, implementations, call, once)))
    return seconds


def _turn(engine: Engine, implementations: list[Implementation], call: Call, repeats: list[int]) -> list[float]:
    """Seconds of the slowest rank, for each."""
    own = [_timed(engine, one, call, count) for one, count in zip(implementations, repeats, strict=True)]
    values = torch.tensor(own, dtype=torch.float64)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
    engine.control.allreduce([values], options).wait()
    engine.record("all_reduce", values.nbytes, None)
    slowest: list[float] = values.tolist()
    return slowest


def _timed(engine: Engine, implementation: Implementation, call: Call, repeats: int) -> float:
    total = 0.0
    for _ in range(repeats):
        engine.control.barrier(dist.BarrierOptions()).wait()
        started = time.perf_counter()
        perform(implementation, call, engine)
        engine.transport.synchronize()
        engine.record(call.op, call.message_bytes, wire_bytes(implementation, call, engine))
        total += time.perf_counter() - started
    return total / repeats


class Chosen(Carrier):
    """What the groups of this process have decided so far; gloo's own for the rest.

    Of a group that this rank is not in, it takes what a group of as many ranks has decided.
    """

    def __init__(self, tuner: Tuner, cluster: Cluster) -> None:
        self._tuner, self._cluster = tuner, cluster
        self._simulated_s = functools.cache(self._simulate)

    def flows(self, transfer: Transfer, group: Sequence[int]) -> tuple[Flow, ...]:
        op, message_bytes, p = transfer.op, transfer.message_bytes, len(group)
        chosen = self._implementation(transfer, tuple(group))
        if chosen.schedule is not None:
            return chosen.schedule.flows(ops.block_sizes(op, p, message_bytes // transfer.item_bytes), transfer.item_bytes)
        if chosen.order is not None:
            own = flows(op, message_bytes, p, chosen.order.index(0))
            return tuple((chosen.order[source], chosen.order[target], size) for source, target, size in own)
        return super().flows(transfer, group)

    def seconds(self, routes: Routes, transfer: Transfer, group: Sequence[int]) -> float:
        chosen = self._implementation(transfer, tuple(group))
        if chosen.native:
            return super().seconds(routes, transfer, group)
        return self._simulated_s(chosen, transfer.op, transfer.message_bytes, tuple(group))

    def about(self) -> str:
        names = sorted({f"{op} by {one.name}" for (_, op, _, _), one in self._tuner.chosen.items() if not one.native})
        return f"collectives: {', '.join(names)}; for the rest gloo's own" if names else super().about()

    def _implementation(self, transfer: Transfer, group: tuple[int, ...]) -> Implementation:
        chosen, call = self._tuner.chosen, (transfer.op, size_class(transfer.message_bytes), 0)
        alike = (one for (ranks, *other), one in chosen.items() if len(ranks) == len(group) and tuple(other) == call)
        return chosen.get((group, *call)) or next(alike, NATIVE)

    def _simulate(self, chosen: Implementation, op: str, message_bytes: int, group: tuple[int, ...]) -> float:
        return predicted_s(chosen, collective_call(self._cluster, op, message_bytes, group), self._tuner.advisor.costs)


def predicted_s(implementation: Implementation, call: CollectiveCall, costs: Costs, calls: int = 1) -> float:
    """Seconds of one of `calls` back to back."""
    if implementation.schedule is not None:
        return simulate(implementation.schedule, call.message_bytes, call.routes, costs, calls).seconds / calls
    run = simulate_native(call, implementation.order, costs, calls)
    return run.seconds / calls if run else closed_form_s(call, implementation.order)
