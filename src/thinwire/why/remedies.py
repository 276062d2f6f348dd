"""What to do, the predicted step of each remedy, and the line that does it: first what takes the named cause away.

Then what leaves the results as they are, what costs money, what rounds, what learns otherwise; within each the fastest first. A
step is always one for the samples of a step now, so that what exchanges rarely, or on fewer hosts, compares.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.why.causes import (
    CARD,
    HOST,
    LATENCY,
    LOADER,
    ORDER,
    OUTSIDE,
    OVERLAP,
    PARTS,
    Case,
    Cause,
    best_buckets,
)
from thinwire.why.prices import with_rates
from thinwire.why.replay import scaled
from thinwire.why.steps import PHASES, Item, Program
from thinwire.workload import Parameter

WORTH = 0.97
"""A remedy is listed if its step is at most this part of the step now."""
CODECS = ("bf16", "int8", "int4")
ACCUMULATE, EVERY, FASTER = 4, 20, 10
CODED_WIDTH = 1024
CHANGES = ("nothing", "hardware", "rounding", "learning")
"""What a remedy changes beside the time: see the top of the file."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """changes: one of CHANGES. step_s: predicted."""

    name: str
    changes: str
    step_s: float
    line: str


def remedies(case: Case, found: Sequence[Cause]) -> list[Remedy]:
    """Those that shorten the step, in the order that the top of the file gives. found: of `causes`."""
    first = found[0].name
    fixes = {name: remedy for name, make in _FIXES.items() if (remedy := make(case))}
    others = [fix for name, fix in fixes.items() if name != first]
    others += [remedy for make in _OTHERS for remedy in make(case)]
    worth = [one for one in others if one.step_s < WORTH * case.profile.step_s]
    rest = sorted(worth, key=lambda one: (CHANGES.index(one.changes), one.step_s))
    return [*([fixes[first]] if first in fixes else []), *rest]


def _loader(case: Case) -> Remedy:
    programs = case.without_loader()
    step_s = case.step_s(programs)
    workers = ceil(max(program.total("data") for program in case.profile.programs) / step_s) + 1
    line = f"DataLoader(..., num_workers={workers}, persistent_workers=True)"
    return Remedy("load batches in other processes", "nothing", step_s, line)


def _outside(case: Case) -> Remedy:
    programs = [scaled(program, {"outside": 0.0}) for program in case.profile.programs]
    line = "log, evaluate and save every 100 steps only; copy batches with non_blocking=True"
    return Remedy("do less between the passes", "nothing", case.step_s(programs), line)


def _host(case: Case) -> Remedy | None:
    if not (slow := case.slow_hosts()):
        return None
    name = f"let {', '.join(slow)} compute as fast as the others"
    line = f"ssh {slow[0]} top; sensors; nvidia-smi -q -d CLOCK,PERFORMANCE   # other work, heat, a lower clock"
    return Remedy(name, "nothing", case.step_s(case.with_equal_hosts()), line)


def _card(case: Case) -> Remedy | None:
    if (equal := case.with_equal_cards()) is None:
        return None
    slow = case.slow_cards()
    line = f"ssh {slow[0]} ethtool eth0   # Speed: has the card, its cable or its port fallen back? MTU and duplex?"
    name = f"give {', '.join(slow)} a card as its peers have"
    return Remedy(name, "hardware", case.step_s(services=case.prices.all(equal)), line)


def _order(case: Case) -> Remedy | None:
    if (order := case.prices.best_order()) is None:
        return None
    hosts = list(dict.fromkeys(case.cluster.host_of(rank).name for rank in order))
    line = "torchrun --node-rank " + ", ".join(f"{number} on {host}" for number, host in enumerate(hosts))
    return Remedy("number the hosts in another order", "nothing", case.step_s(services=case.prices.all(order=order)), line)


def _buckets(case: Case) -> Remedy | None:
    if (best := best_buckets(case)) is None:
        return None
    line = f"DistributedDataParallel(model, bucket_cap_mb={best[0] >> 20})   # or one call for many tensors"
    return Remedy("larger buckets", "nothing", best[1], line)


def _overlap(case: Case) -> Remedy | None:
    if (found := case.with_overlap()) is None:
        return None
    total = sum(made.message_bytes for made in case.profile.calls.values() if made.op == "all_reduce")
    line = f"model = DistributedDataParallel(model, bucket_cap_mb={total / PARTS / 2**20:.2g})   # not one call for all"
    return Remedy("send gradients while the backward pass goes on", "nothing", case.step_s(*found), line)


_FIXES: dict[str, Callable[[Case], Remedy | None]] = {
    LOADER: _loader,
    OUTSIDE: _outside,
    HOST: _host,
    CARD: _card,
    ORDER: _order,
    LATENCY: _buckets,
    OVERLAP: _overlap,
}
"""What takes a cause away; plain bandwidth has nothing of its own."""


def _chosen(case: Case) -> list[Remedy]:
    services = case.prices.chosen()
    line = 'thinwire.init("cluster.toml") in place of init_process_group   # thinwire probe writes the file'
    return [Remedy("collectives chosen for these links", "nothing", case.step_s(services=services), line)] if services else []


def _faster(case: Case) -> list[Remedy]:
    fullest = case.utilisation()
    if not fullest:
        return []
    rate = fullest[0][0].bandwidth_bps.value
    faster = with_rates(case.cluster, {link: max(link.bandwidth_bps.value, FASTER * rate) for link in case.cluster.links})
    step_s = case.step_s(services=case.prices.all(faster))
    return [
        Remedy(
            f"links of {FASTER} times the rate", "hardware", step_s, "10 Gbit/s Ethernet in place of 1, 1 in place of 100 Mbit/s"
        )
    ]


def _alone(case: Case) -> list[Remedy]:
    """The same samples on one host, its ranks one after another as often as there are hosts."""
    hosts: dict[str, list[int]] = {}
    for rank in range(case.cluster.world_size):
        hosts.setdefault(case.cluster.host_of(rank).name, []).append(rank)
    if len(hosts) < 2 or any(len(group) < case.cluster.world_size for group, _ in case.profile.calls):
        return []
    steps = {}
    for name, ranks in hosts.items():
        times = case.cluster.world_size / len(ranks)
        sums = [(made.op, made.message_bytes) for made in case.profile.calls.values()]
        steps[name] = times * max(case.busy_s[rank] for rank in ranks)
        steps[name] += sum(case.prices.sized(ranks, op, size) for op, size in sums) if len(ranks) > 1 else 0.0
    best = min(steps, key=steps.__getitem__)
    line = f"torchrun --nnodes 1 on {best}, with {len(hosts)} times the micro-batches in a step"
    return [Remedy("one host is enough", "nothing", steps[best], line)]


def _coded(case: Case) -> list[Remedy]:
    """Of all-reduces of gradients only."""
    found = []
    sums = {
        key: made for key, made in case.profile.calls.items() if made.op == "all_reduce" and made.message_bytes >= 4 * CODED_WIDTH
    }
    if not sums:
        return []
    for kind in CODECS:
        exchange, services = make_exchange(Coded(kind=kind), Ledger()), dict(case.prices.measured)
        for key, made in sums.items():
            weight = Parameter(name="weight", shape=(max(1, made.message_bytes // 4 // CODED_WIDTH), CODED_WIDTH))
            sent = exchange.transfers("gradients", [weight], "data", len(key[0]))
            services[key] = sum(one.calls * (case.prices.sized(key[0], one.op, one.message_bytes) + one.work_s) for one in sent)
        line = f'thinwire.compress_gradients(model, "{kind}")   # model: your DistributedDataParallel'
        found.append(Remedy(f"gradients in {kind}", "rounding", case.step_s(services=services), line))
    return found


def _rarely(case: Case) -> list[Remedy]:
    """Accumulation, and replicas that exchange parameters every so many steps."""
    if any(made.op not in ("all_reduce", "broadcast", "barrier") for made in case.profile.calls.values()):
        return []
    programs = [_repeated(program, ACCUMULATE) for program in case.profile.programs]
    line = f"with model.no_sync(): ... in {ACCUMULATE - 1} of {ACCUMULATE} micro-batches, optimizer.step() after the last"
    name = f"accumulate {ACCUMULATE} micro-batches"
    found = [Remedy(name, "learning", case.step_s(programs) / ACCUMULATE, line)]
    total_s = sum(made.service_s for made in case.profile.calls.values())
    step_s = max(case.busy_s) + total_s / EVERY
    line = f"with thinwire.DiLoCo(model, optimizer, every={EVERY}):   # model: without DistributedDataParallel"
    return [*found, Remedy(f"DiLoCo, an exchange every {EVERY} steps", "learning", step_s, line)]


def _repeated(program: Program, times: int) -> Program:
    """With passes and data of more micro-batches before the first call that goes out in the backward pass."""
    more = [(times - 1) * program.total(phase) if phase != "optimizer" else 0.0 for phase in PHASES]
    if not program.items:
        return program
    first = program.items[0]
    return Program(
        (Item(first.kind, first.calls, tuple(map(sum, zip(first.busy, more, strict=True)))), *program.items[1:]), program.tail
    )


_OTHERS: Sequence[Callable[[Case], list[Remedy]]] = (_chosen, _faster, _alone, _coded, _rarely)
