"""Collectives of stock gloo and of the backend that chooses schedules, in turns, one rank.

    python -m thinwire.bench.peers.collective_turns RESULTS '{"cases": [["all_reduce", 4194304, true], ...], ...}'

A case: op, message bytes, and whether the native collective on the best order of ranks takes turns too. Rank 0 writes for each
case the seconds of each turn, of the slowest rank, and what was predicted. Short calls are repeated in a turn: each after a
barrier ("after barrier"), and one after the other ("back to back"); the seconds are those of one call.
"""

import json
import sys
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from thinwire.bench.turns import write_result
from thinwire.cluster import load_cluster
from thinwire.collectives.backend import NAME
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.run.engine import Engine
from thinwire.collectives.run.transport import Place
from thinwire.collectives.scheduled import register_scheduled
from thinwire.collectives.schedules.orders import ring_order
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.carrier import predicted_s
from thinwire.collectives.tuned.implementation import NATIVE, Call, Implementation, example, perform
from thinwire.collectives.tuned.tuner import Tuner, size_class
from thinwire.train.runtime import process_group, read_environment

TIMEOUT_S = 300.0
BACK_TO_BACK = 16
"""Calls that are simulated one after the other."""


def issue(call: Call, group: dist.ProcessGroup) -> None:
    """As user code does it."""
    match call.op:
        case "all_reduce":
            dist.all_reduce(call.got, group=group)
        case "broadcast":
            dist.broadcast(call.got, call.root, group=group)
        case "reduce":
            dist.reduce(call.given, call.root, group=group)
        case "all_gather":
            dist.all_gather_into_tensor(call.got, call.given, group=group)
        case "reduce_scatter":
            dist.reduce_scatter_tensor(call.got, call.given, group=group)
        case "all_to_all":
            dist.all_to_all_single(call.got, call.given, group=group)


def mean_s(run, repeats, before_each):
    """Seconds of a call."""
    total = 0.0
    for _ in range(repeats):
        before_each()
        started = time.perf_counter()
        run()
        total += time.perf_counter() - started
    return total / repeats


def slowest(values, native):
    """Of each number, the largest of any rank."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=native)
    return tensor.tolist()


def measure(case, told, groups, advisor):
    """One case; the same on all ranks but for what is predicted, which rank 0 knows."""
    op, message_bytes, ordered = case
    native, ours, pause, engine, order = groups
    call = example(op, message_bytes, engine)
    barrier = partial(dist.barrier, group=pause)  # of neither: its threads are awake afterwards
    contenders = {"native": partial(issue, call, native), "ours": partial(issue, call, ours)}
    if ordered:
        way = Implementation("native reordered", None, order)
        contenders["ordered"] = lambda: engine.ask("a reordered collective", partial(perform, way, call, engine))
    for run in contenders.values():
        run()
    short = slowest([mean_s(run, 1, barrier) for run in contenders.values()], native)[0] < told["short_s"]
    repeats = told["repeats"] if short else 1
    found = {"op": op, "bytes": message_bytes, "turns": {name: [] for name in contenders}, "back_to_back": {}}
    for _ in range(told["turns"]):
        turn = slowest([mean_s(run, repeats, barrier) for run in contenders.values()], native)
        for name, seconds in zip(contenders, turn, strict=True):
            found["turns"][name].append(seconds)
    if short:
        found["back_to_back"] = {name: [] for name in contenders}
        for _ in range(told["turns"]):
            turn = []
            for run in contenders.values():
                barrier()
                turn.append(mean_s(run, repeats, lambda: None))
            for name, seconds in zip(contenders, slowest(turn, native), strict=True):
                found["back_to_back"][name].append(seconds)
    way = ours._decided[op, size_class(call.message_bytes), 0]
    found["algorithm"] = way.name
    if dist.get_rank() == 0:
        asked = collective_call(advisor.cluster, op, call.message_bytes)

        def predicted(calls):
            return {name: predicted_s(one, asked, advisor.costs, calls) for name, one in (("ours", way), ("native", NATIVE))}

        found["predicted"] = predicted(1)
        if short:
            found["predicted_back_to_back"] = predicted(BACK_TO_BACK)
    return found


def main(results, settings):
    """One rank."""
    told = json.loads(settings)
    environment = read_environment()
    place, cluster = environment.place, load_cluster(str(environment.lab.cluster))
    torch.set_num_threads(1)
    advisor = Advisor(cluster, tried=told["tried"], costs=Costs(**told["costs"]))
    register_scheduled(Ledger(), Tuner(advisor))
    with process_group(place, NAME, TIMEOUT_S):
        native, pause = (dist.new_group(backend="gloo") for _ in range(2))
        store = dist.PrefixStore("ordered", dist.distributed_c10d._get_default_store())
        engine = Engine(Place(store, place.rank, tuple(range(place.world_size)), timedelta(seconds=TIMEOUT_S)))
        groups = native, dist.group.WORLD, pause, engine, ring_order(cluster)
        found = [measure(case, told, groups, advisor) for case in told["cases"]]
        if place.rank == 0:
            write_result(results, "collectives", found)
        dist.barrier(group=native)
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
