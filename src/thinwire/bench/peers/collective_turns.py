"""Collectives of a stock backend (gloo, on GPUs NCCL) and of the one that chooses schedules, in turns: a script of `thinwire
bench collectives` and `gpu`.

`cases` among the settings: op, message bytes, and whether the native collective on the best order of ranks takes turns too. Left
for each are the seconds of each turn, of the slowest rank, and what was predicted. Short calls are repeated in a turn: each after
a barrier ("turns"), and one after the other ("back_to_back"); the seconds are those of one call. Before the turns each is called
once; where all take long, that is the first turn.
"""

import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from thinwire.bench.collectives import turns_worth
from thinwire.cluster import load_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.nccl import NcclTransport, register_nccl
from thinwire.collectives.run.engine import Engine
from thinwire.collectives.run.transport import Place
from thinwire.collectives.scheduled import register_scheduled
from thinwire.collectives.schedules.orders import ring_order
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.implementation import NATIVE, Implementation, example, perform
from thinwire.collectives.tuned.tuner import Tuner, predicted_s, size_class
from thinwire.measure.compute import find_device
from thinwire.units import show

TIMEOUT_S = 300.0
ONE_HOST_BPS = 1e11
BACK_TO_BACK = 16
"""Calls that are simulated one after the other."""
CONNECT_BYTES, LONG_S = 1024, 1.0
"""What a contender that needs no more than connections sends first; what takes longer is the same the first time."""


def register(rank):
    """The backend that chooses; outside of a lab for ranks of one host."""
    rank.device, lab = find_device(rank.environment.here[0]), rank.environment.lab
    rank.cluster = load_cluster(str(lab.cluster)) if lab else equal_hosts(rank.place.world_size, ONE_HOST_BPS)
    rank.advisor = Advisor(rank.cluster, tried=rank.settings["tried"], costs=Costs(**rank.settings["costs"]))
    rank.done = 0
    tuner = Tuner(rank.advisor, report=partial(say, rank))
    (register_scheduled if rank.device.type == "cpu" else register_nccl)(rank.ledger, tuner)


def say(rank, what):
    """What rank 0 does next, or has found."""
    rank.report(rank.done, len(rank.settings["cases"]), what)


def measure(rank):
    """Of each case what was measured and predicted."""
    on_cpu = rank.device.type == "cpu"
    native, pause = dist.new_group(backend="gloo" if on_cpu else "nccl"), dist.new_group(backend="gloo")
    store = dist.PrefixStore("ordered", dist.distributed_c10d._get_default_store())
    place = Place(store, rank.place.rank, tuple(range(rank.place.world_size)), timedelta(seconds=TIMEOUT_S))
    engine = Engine(place, transport=None if on_cpu else NcclTransport(place))
    found = []
    for case in rank.settings["cases"]:
        found.append(measure_case(case, rank, native, pause, engine))
        rank.done += 1
    dist.barrier(group=pause)
    engine.close()
    return found


def measure_case(case, rank, native, pause, engine):
    """The same on all ranks but for what is predicted, which rank 0 knows. pause: the group of barriers, whose threads are awake
    afterwards."""
    op, message_bytes, ordered = case
    call, small, ours = example(op, message_bytes, engine), example(op, CONNECT_BYTES, engine), dist.group.WORLD
    barrier, about = partial(dist.barrier, group=pause), f"{op} of {show(call.message_bytes, 'B')}"
    contenders = {name: partial(ISSUED[op], group=group) for name, group in (("native", native), ("ours", ours))}
    if ordered:
        way = Implementation("native reordered", None, ring_order(rank.cluster))
        contenders["ordered"] = lambda call: engine.ask("a reordered collective", partial(perform, way, call, engine))
    say(rank, f"{about}: choosing what to run")
    for name, run in contenders.items():
        run(call if name == "ours" else small)

    def once_s(name):
        say(rank, f"{about}: {name}, once")
        return mean_s(partial(contenders[name], call), 1, barrier)

    def take_turns(time_one, turns, title):
        while len(turns) < count:
            say(rank, f"{about}: {title} {len(turns) + 1} of {count}")
            turns.append(slowest([time_one(partial(run, call)) for run in contenders.values()], pause))
        return {name: list(seconds) for name, seconds in zip(contenders, zip(*turns, strict=True), strict=True)}

    def back_to_back_s(run):
        barrier()
        return mean_s(run, repeats, lambda: None)

    first = slowest(list(map(once_s, contenders)), pause)
    short = first[0] < rank.settings["short_s"]
    repeats = rank.settings["repeats"] if short else 1
    count = turns_worth([seconds * repeats for seconds in first], rank.settings["turns"])
    found = {"turns": take_turns(lambda run: mean_s(run, repeats, barrier), [first] if min(first) > LONG_S else [], "turn")}
    found["back_to_back"] = take_turns(back_to_back_s, [], "back to back, turn") if short else {}
    say(rank, f"{about}: predicting")
    way = getattr(ours, "_decided", {}).get((op, size_class(call.message_bytes), 0), NATIVE)  # NCCL's own on one host
    found["algorithm"] = way.name
    if rank.place.rank == 0:
        asked = collective_call(rank.cluster, op, call.message_bytes)
        for key, calls in (("predicted", 1), ("predicted_back_to_back", BACK_TO_BACK))[: 1 + short]:
            pairs = (("ours", way), ("native", NATIVE))
            found[key] = {name: predicted_s(one, asked, rank.advisor.costs, calls) for name, one in pairs}
    return found


ISSUED = {
    "all_reduce": lambda call, group: dist.all_reduce(call.got, group=group),
    "broadcast": lambda call, group: dist.broadcast(call.got, call.root, group=group),
    "reduce": lambda call, group: dist.reduce(call.given, call.root, group=group),
    "all_gather": lambda call, group: dist.all_gather_into_tensor(call.got, call.given, group=group),
    "reduce_scatter": lambda call, group: dist.reduce_scatter_tensor(call.got, call.given, group=group),
    "all_to_all": lambda call, group: dist.all_to_all_single(call.got, call.given, group=group),
}
"""As user code does it."""


def mean_s(run, repeats, before_each):
    """Seconds of a call."""
    total, on_gpu = 0.0, torch.accelerator.is_available()
    for _ in range(repeats):
        before_each()
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.accelerator.synchronize()
        total += time.perf_counter() - started
    return total / repeats


def slowest(values, group):
    """Of each number, the largest of any rank."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor.tolist()
