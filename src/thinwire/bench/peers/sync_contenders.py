"""One rank of `thinwire bench sync`: every method in this one process, the stock peers beside ours, on the same batches.

    python -m thinwire.bench.peers.sync_contenders time|learn|time,learn RESULTS '{"methods": [...], ...}'

time: the methods take turns; in its turn one trains a few steps, with compute at the declared rate where the lab asks for it.
Stock peers run on a gloo group of their own. learn: one method after another trains from the same weights, seed by seed, and is
scored on the held-out part; all run on the metered group, so that the ledger counts what the stock peers send too.

Peers of other packages (`Method.package`) come here alone, one to a start of the ranks, as they bring servers and processes that
would work and send in the others' turns. They send past the ledger, and what their helpers compute counts as theirs.
"""

import hashlib
import json
import socket
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.bench.peers.outside import alone, helpers_s
from thinwire.bench.progress import tell
from thinwire.bench.stock_sync import SILENT, StockSync
from thinwire.bench.sync_learned import keep, kept
from thinwire.bench.sync_methods import Method, make_method
from thinwire.cluster import load_cluster
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.layout import AXES, Layout
from thinwire.sync.make import make_synchroniser
from thinwire.train.optimizers import make_optimizer
from thinwire.train.pace import Pacer
from thinwire.train.runtime import process_group, read_environment
from thinwire.train.setup import make_task, set_collectives
from thinwire.train.step import Stepper

WARM_STEPS, MOST_STEPS = 2, 20
SLOW_STEP_S, SLOW_TURN_S = 10.0, 20.0
"""Of a rehearsal or step after which a contender is warm, and of a turn after which it takes no other: the wire sets such times,
not chance."""
TELL_EVERY = 50
"""Steps of learning between two words of how far it is."""


class Rank:
    """What all contenders of this rank share."""

    def __init__(self, told, ledger, environment):
        self.told, self.ledger, self.environment = told, ledger, environment
        self.place = environment.place
        world_size = self.place.world_size
        self.layouts = {False: Layout(data=world_size), True: Layout(outer=world_size)}
        self.meshes = {rare: init_device_mesh("cpu", of.degrees, mesh_dim_names=AXES) for rare, of in self.layouts.items()}
        self.methods = [make_method(name, told["base"], fused=told["fused"]) for name in told["methods"]]
        self.num_micro = self.methods[0].config.sync.accumulate

    def task(self, config):
        """Collective."""
        return make_task(config, Layout(data=self.place.world_size), self.environment)

    def sync(self, method, group):
        """group: of stock peers."""
        if method.hook is not None:
            return StockSync(method.hook, method.rank, group)
        config = method.config
        if method.package:
            return self.foreign(method)
        return make_synchroniser(config.sync, config.compress, self.layouts[config.sync.rare], self.ledger)

    def foreign(self, method):
        """Of a package that need not be installed, so it is imported here."""
        lab = self.environment.lab
        address = socket.gethostbyname(lab.host) if lab else "127.0.0.1"
        if method.package == "torchft":
            from thinwire.bench.peers.torchft_sync import TorchftSync

            return TorchftSync(method.name, method.config.sync, address)
        from thinwire.bench.peers.hivemind_sync import HivemindSync

        return HivemindSync(method.name, method.code, address)

    def processor_s(self):
        """Used by this rank so far, with its helpers where there are any."""
        return time.process_time() + (helpers_s() if any(method.package for method in self.methods) else 0.0)

    def stepper(self, method, task, group, stack):
        """A replica of its own, ready to train, and the seconds of its rehearsal. Collective."""
        model = task.build_model()
        check_equal(model, f"{method.name}: before training")  # nobody broadcasts the first weights
        train = method.config.train
        optimizer, sync = make_optimizer(model, train), self.sync(method, group)
        stepper = Stepper(
            model=stack.enter_context(sync.attached(model, optimizer, self.meshes[method.config.sync.rare])),
            optimizer=optimizer,
            sync=sync,
            loss=task.loss,
            precision=nullcontext,
            train=train,
        )
        dist.barrier()
        started = time.perf_counter()
        stepper.rehearse(task.batch(0, self.place.rank))
        return stepper, model, time.perf_counter() - started

    def step(self, stepper, task, step):
        """One step of one contender. Collective."""
        batches = [task.batch(step, micro * self.place.world_size + self.place.rank) for micro in range(self.num_micro)]
        return stepper.run(step, batches, self.num_micro)

    def sum(self, values):
        """Over the ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, value):
        """As rank 0 has it."""
        told = [value]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def tell(self, done, total, what):
        """Rank 0 only."""
        if self.place.rank == 0:
            tell(Path(self.told["progress"]), done, total, what)


@dataclass
class Contender:
    """One that takes turns. steps: in each of its turns, whole periods of `every` steps."""

    name: str
    stepper: Stepper
    pacer: Pacer | None
    every: int = 1
    steps: int = 1
    done: int = 0
    slow: bool = False
    """Whether one turn said it all."""
    measured: dict = field(default_factory=lambda: {"step_s": [], "processor_s": [], "card_bytes": [], "wait_s": []})


def measure_time(rank):
    """{"no exchange" or the method: {"step_s": [of each turn], ...}}."""
    told, place = rank.told, rank.place
    stock_group = dist.new_group(backend="gloo")
    task = rank.task(rank.methods[0].config)
    silent = Method("no exchange", make_method("ddp", told["base"]).config, hook=SILENT)
    flops_per_s = pace_of(rank.environment.lab, place.rank)
    methods = [silent, *rank.methods]
    parts = len(methods) * (told["turns"] + 1)
    with ExitStack() as stack:
        contenders = []
        for index, method in enumerate(methods):
            stepper, model, rehearsal_s = rank.stepper(method, task, stock_group, stack)
            pacer = Pacer.of(task.workload, flops_per_s) if flops_per_s else None
            if pacer:
                stack.enter_context(pacer.attached(model, task.workload))
            contender = Contender(method.name, stepper, pacer, getattr(method.config.sync, "every", 1))
            warm_up(rank, contender, task, rehearsal_s)
            contenders.append(contender)
            rank.tell(index + 1, parts, f"{method.name} is warm")
        for turn in range(told["turns"]):
            for index, contender in enumerate(contenders):
                if contender.slow:
                    continue
                take_turn(rank, contender, task)
                done = len(methods) * (turn + 1) + index + 1
                rank.tell(done, parts, f"turn {turn + 1}: {contender.name} {contender.measured['step_s'][-1]:.3f} s a step")
        torn = {contender.name: torn_exchanges(rank, contender.stepper.sync) for contender in contenders}
    return {
        contender.name: {
            **contender.measured,
            "late": contender.pacer.missed_fraction if contender.pacer else None,
            "torn": torn[contender.name],
        }
        for contender in contenders
    }


def warm_up(rank, contender, task, rehearsal_s):
    """Untimed steps, and how many fit into a turn; as rank 0 says."""
    step_s = rehearsal_s
    for _ in range(WARM_STEPS):
        if rank.agree(step_s > SLOW_STEP_S):
            break
        dist.barrier()
        started = time.perf_counter()
        rank.step(contender.stepper, task, contender.done)
        contender.done += 1
        step_s = time.perf_counter() - started
    fitting = rank.agree(round(rank.told["turn_s"] / step_s))
    contender.steps = -(-min(max(1, fitting), MOST_STEPS) // contender.every) * contender.every
    contender.done = 0 if contender.every > 1 else contender.done
    if contender.pacer:
        contender.pacer.late_s = contender.pacer.declared_s = 0.0


def take_turn(rank, contender, task):
    """Timed between barriers; the card's counter is read outside."""
    first = contender.done
    times = []
    dist.barrier()
    counts = rank.environment.lab is not None and rank.place.local_rank == 0  # outside a lab the cards carry others' bytes
    sent = card_bytes() if counts else 0
    used = rank.processor_s()
    started = time.perf_counter()
    for step in range(first, first + contender.steps):
        times.append(rank.step(contender.stepper, task, step)[1])
    dist.barrier()
    seconds, used = time.perf_counter() - started, rank.processor_s() - used
    sent = card_bytes() - sent if counts else 0
    contender.done += contender.steps
    sums = rank.sum([sent])
    measured = contender.measured
    measured["step_s"].append(seconds / contender.steps)
    measured["processor_s"].append(used / contender.steps)
    measured["card_bytes"].append(sums[0] / contender.steps / rank.place.world_size)
    enough = 2 if contender.every > 1 else 1  # a rare method's first exchange, which nothing has warmed, is in its first turn
    contender.slow = rank.agree(seconds > SLOW_TURN_S and len(measured["step_s"]) >= enough)
    if contender.stepper.sync.ready_at:  # stock peers do not say
        measured["wait_s"].append(sum(time.wait_s for time in times) / contender.steps)


def learn(rank):
    """Every method with every seed that is not in the file of what was learned; each goes there as soon as it is over."""
    told = rank.told
    path = Path(told["learned"])
    known = rank.agree(list(kept(path)))
    wanted = [
        (seed, method, key)
        for seed in told["seeds"]
        for method in rank.methods
        if (key := told["keys"][f"{method.name} {seed}"]) not in known
    ]
    task, task_seed = None, None
    for done, (seed, method, key) in enumerate(wanted):
        if seed != task_seed:
            base = {**told["base"], "train": {**told["base"]["train"], "seed": seed}}
            task, task_seed = rank.task(make_method("ddp", base).config), seed
        found = learn_one(rank, method, task, seed, (done, len(wanted)))
        if rank.place.rank == 0:
            keep(path, key, {"method": method.name, "seed": seed, **found})
        rank.tell(done + 1, len(wanted), f"{method.name}, seed {seed}: held-out loss {found['heldout_loss']:.4f}")


def learn_one(rank, method, task, seed, progress):
    """Train one method from the beginning; the bytes are those of the later half of the steps, of all if they come rarely."""
    steps, (done, parts) = method.config.train.steps, progress
    counted_from = 0 if method.config.sync.rare else steps // 2
    curve, sent = [], 0
    with ExitStack() as stack:
        stepper, model, _ = rank.stepper(method, task, dist.group.WORLD, stack)
        for step in range(steps):
            if step == counted_from:
                sent = rank.ledger.sent_bytes
            if step and step % TELL_EVERY == 0:
                rank.tell(done + step / steps, parts, f"{method.name}, seed {seed}: step {step}")
            rank.step(stepper, task, step)
            if step + 1 in rank.told["curve"]:
                before = rank.ledger.sent_bytes
                with stepper.sync.averaged():
                    total, weight = rank.sum(task.score(model, rank.place.rank))
                curve.append([step + 1, total / weight])
                sent += rank.ledger.sent_bytes - before
        sent = rank.ledger.sent_bytes - sent
        stepper.sync.finish()
        with stepper.sync.averaged():
            apart = weights_apart(model)
            if method.package != "hivemind":
                check_equal(model, f"{method.name}, seed {seed}: after training")
            total, weight, sent = rank.sum([*task.score(model, rank.place.rank), sent])
        torn = torn_exchanges(rank, stepper.sync)
    sent_per_step = None if method.package else sent / rank.place.world_size / (steps - counted_from)
    return {
        "heldout_loss": total / weight,
        "wire_bytes_per_step": sent_per_step,
        "curve": curve,
        "weights_apart": apart,
        "torn": torn,
    }


def torn_exchanges(rank, sync):
    """The part of the exchanges that lacked values, mean over the ranks; only hivemind goes on then. Collective."""
    return rank.sum([getattr(sync, "torn", 0.0)])[0] / rank.place.world_size


def weights_apart(model):
    """The largest difference between two replicas' values of a weight. Collective."""
    with torch.no_grad():
        low = torch.cat([parameter.reshape(-1) for parameter in model.parameters()])
        high = low.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        return float((high - low).max())


def check_equal(model, name):
    """Replicas are bit-equal or the benchmark is worth nothing. Collective."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        sys.exit(f"{name} the replicas differ: {', '.join(digest[:8] for digest in digests)}")


def pace_of(lab, rank):
    """flops_per_s to keep; None where nobody asks for a pace."""
    rates = load_cluster(lab.cluster).declared_rates if lab and lab.paced else None
    return rates[rank] if rates else None


def card_bytes():
    """Sent by all cards of this host but loopback; 0 where the system does not say."""
    counters = Path("/proc/net/dev")
    lines = counters.read_text().splitlines()[2:] if counters.is_file() else []
    cards = dict(line.split(":") for line in lines)
    return sum(int(numbers.split()[8]) for name, numbers in cards.items() if name.strip() != "lo")


def main(phases, results, settings):
    """See the top of the file."""
    environment = read_environment()
    torch.set_num_threads(1)
    ledger = Ledger()
    told = json.loads(settings)
    set_collectives(make_method("ddp", told["base"]).config, environment, ledger)
    with process_group(environment.place, backend.NAME, told["timeout_s"]):
        rank = Rank(told, ledger, environment)
        for phase in phases.split(","):
            found = measure_time(rank) if phase == "time" else learn(rank)
            if found is not None and environment.place.rank == 0:
                (Path(results) / f"{phase}.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    names = json.loads(sys.argv[3])["methods"]
    if any(make_method(name, {}).package for name in names):
        alone(lambda: main(*sys.argv[1:]), ", ".join(names))
    else:
        main(*sys.argv[1:])
