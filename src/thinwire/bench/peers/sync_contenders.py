"""`thinwire bench sync`: every method in this one process, the stock peers beside ours, on the same batches.

time: the methods take turns; in its turn one trains a few steps, with compute at the declared rate where the lab asks for it.
Stock peers run on a gloo group of their own. learn: one method after another trains from the same weights, seed by seed, and is
scored on the held-out part; all run on the metered group, so that the ledger counts what the stock peers send too.

Peers of other packages (`Method.package`) come here alone, one to a start of the ranks. They send past the ledger, and what their
helpers compute counts as theirs.
"""

import importlib
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.bench.peers.outside import helpers_s
from thinwire.bench.peers.rank import agree, card_bytes, make_stepper
from thinwire.bench.stock_sync import SILENT, StockSync
from thinwire.bench.sync_methods import Method, keep, kept, make_method
from thinwire.cluster import load_cluster
from thinwire.layout import AXES, Layout
from thinwire.sync.initial_values import same_everywhere
from thinwire.sync.make import make_synchroniser
from thinwire.train.pace import Pacer
from thinwire.train.setup import make_task, set_collectives
from thinwire.train.step import Stepper

WARM_STEPS, MOST_STEPS = 2, 20
SLOW_STEP_S, SLOW_TURN_S = 10.0, 20.0
"""Of a rehearsal or step after which a contender is warm, and of a turn after which it takes no other: the wire sets such times,
not chance."""
REPORT_EVERY = 50
"""Steps of learning between two reports of progress."""


def register(rank):
    """The backend with the collectives that the run asks for."""
    set_collectives(make_method("ddp", rank.settings["base"]).config, rank.environment, rank.ledger)


def measure(rank):
    """What the phase `time` measured, by method; what the phase `learn` has learned goes to its file."""
    race = Race(rank)
    timed = measure_time(race) if "time" in rank.settings["phases"] else None
    if "learn" in rank.settings["phases"]:
        learn(race)
    return timed


class Race:
    """What all contenders of this rank share."""

    def __init__(self, rank):
        self.rank, self.settings, self.ledger, self.place = rank, rank.settings, rank.ledger, rank.place
        world_size = self.place.world_size
        self.layouts = {False: Layout(data=world_size), True: Layout(outer=world_size)}
        self.meshes = {rare: init_device_mesh("cpu", of.degrees, mesh_dim_names=AXES) for rare, of in self.layouts.items()}
        self.methods = [
            make_method(name, self.settings["base"], fused=self.settings["fused"]) for name in self.settings["methods"]
        ]
        self.foreign = any(method.package for method in self.methods)
        self.num_micro = self.methods[0].config.sync.accumulate
        self._tasks, self._seed = {}, None

    def task(self, method, seed=None):
        """Of as many tokens a step as the method has; made once for each number of them, of one seed at a time. seed: None for
        that of the run. Collective."""
        if seed != self._seed:
            self._tasks, self._seed = {}, seed
        if method.batches not in self._tasks:
            train = method.config.train
            train = train if seed is None else train.model_copy(update={"seed": seed})
            config = method.config.model_copy(update={"train": train})
            self._tasks[method.batches] = make_task(config, self.layouts[False], self.rank.environment)
        return self._tasks[method.batches]

    def sync(self, method, group):
        """group: of stock peers. What other packages need is imported where it is used: they need not be installed."""
        config, lab = method.config, self.rank.environment.lab
        if method.hook is not None:
            return StockSync(method.hook, method.rank, group)
        if not method.package:
            return make_synchroniser(config.sync, config.compress, self.layouts[config.sync.rare], self.ledger)
        peer = importlib.import_module(f"thinwire.bench.peers.{method.package}_sync")
        return peer.make_sync(method, socket.gethostbyname(lab.host) if lab else "127.0.0.1")

    def processor_s(self):
        """Used by this rank so far, with its helpers where there are any."""
        return time.process_time() + (helpers_s() if self.foreign else 0.0)

    def stepper(self, method, task, group, stack):
        """A replica of its own, ready to train, and the seconds of its rehearsal. Collective."""
        model = task.build_model()
        check_equal(model, f"{method.name}: before training")  # nobody broadcasts the first weights
        sync, mesh = self.sync(method, group), self.meshes[method.config.sync.rare]
        stepper = make_stepper(stack, model, sync, mesh, method.config.train, task.loss)
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

    def torn(self, sync):
        """The part of the exchanges that lacked values, mean over the ranks; only hivemind goes on then. Collective."""
        return self.sum([getattr(sync, "torn", 0.0)])[0] / self.place.world_size


@dataclass
class Contender:
    """One that takes turns. steps: in each of its turns, whole periods of `every` steps; slow: whether one turn was enough."""

    method: Method
    stepper: Stepper
    pacer: Pacer | None
    every: int = 1
    steps: int = 1
    done: int = 0
    slow: bool = False
    measured: dict = field(default_factory=lambda: {"step_s": [], "processor_s": [], "card_bytes": [], "wait_s": []})


def measure_time(race):
    """{"no exchange" or the method: {"step_s": [of each turn], ...}}."""
    turns = race.settings["turns"]
    stock_group = dist.new_group(backend="gloo")
    silent = Method("no exchange", make_method("ddp", race.settings["base"]).config, hook=SILENT)
    lab = race.rank.environment.lab
    rates = load_cluster(lab.cluster).declared_rates if lab and lab.paced else None
    methods = [silent, *race.methods]
    parts = len(methods) * (turns + 1)
    with ExitStack() as stack:
        contenders = []
        for index, method in enumerate(methods):
            task = race.task(method)
            stepper, model, rehearsal_s = race.stepper(method, task, stock_group, stack)
            pacer = Pacer.of(task.workload, rates[race.place.rank]) if rates else None
            if pacer:
                stack.enter_context(pacer.attached(model, task.workload))
            contender = Contender(method, stepper, pacer, getattr(method.config.sync, "every", 1))
            warm_up(race, contender, rehearsal_s)
            contenders.append(contender)
            race.rank.report(index + 1, parts, f"{method.name} is warm")
        for turn in range(turns):
            for index, contender in enumerate(contenders):
                if not contender.slow:
                    take_turn(race, contender)
                    step_s = contender.measured["step_s"][-1]
                    done = len(methods) * (turn + 1) + index + 1
                    race.rank.report(done, parts, f"turn {turn + 1}: {contender.method.name} {step_s:.3f} s a step")
        for one in contenders:
            late = one.pacer.missed_fraction if one.pacer else None
            one.measured |= {"late": late, "torn": race.torn(one.stepper.sync)}
    return {one.method.name: one.measured for one in contenders}


def warm_up(race, contender, rehearsal_s):
    """Untimed steps, and how many fit into a turn, as measured by rank 0."""
    step_s, task = rehearsal_s, race.task(contender.method)
    for _ in range(WARM_STEPS):
        if agree(step_s > SLOW_STEP_S):
            break
        dist.barrier()
        started = time.perf_counter()
        race.step(contender.stepper, task, contender.done)
        contender.done += 1
        step_s = time.perf_counter() - started
    fitting = agree(round(race.settings["turn_s"] / step_s))
    contender.steps = -(-min(max(1, fitting), MOST_STEPS) // contender.every) * contender.every
    contender.done = 0 if contender.every > 1 else contender.done
    if contender.pacer:
        contender.pacer.late_s = contender.pacer.declared_s = 0.0


def take_turn(race, contender):
    """Timed between barriers; the card's counter is read outside. A step's tokens are those of the run that all share."""
    place, task, times = race.place, race.task(contender.method), []
    dist.barrier()
    counts = race.rank.environment.lab is not None and place.local_rank == 0  # outside a lab the cards carry others' bytes
    sent = card_bytes() if counts else 0
    used = race.processor_s()
    started = time.perf_counter()
    for step in range(contender.done, contender.done + contender.steps):
        times.append(race.step(contender.stepper, task, step).times())
    dist.barrier()
    seconds, used = time.perf_counter() - started, race.processor_s() - used
    sent = race.sum([card_bytes() - sent if counts else 0])[0]
    contender.done += contender.steps
    measured, steps = contender.measured, contender.steps * contender.method.batches
    measured["step_s"].append(seconds / steps)
    measured["processor_s"].append(used / steps)
    measured["card_bytes"].append(sent / steps / place.world_size)
    enough = 2 if contender.every > 1 else 1  # a rare method's first exchange, which nothing has warmed, is in its first turn
    contender.slow = agree(seconds > SLOW_TURN_S and len(measured["step_s"]) >= enough)
    if contender.stepper.sync.ready_at:  # not known of stock peers
        measured["wait_s"].append(sum(time.wait_s for time in times) / steps)


def learn(race):
    """Every method with every seed that is not in the file of what was learned; each goes there as soon as it is over."""
    settings = race.settings
    path = Path(settings["learned"])
    known = agree(list(kept(path)))
    wanted = [
        (seed, method, key)
        for seed in settings["seeds"]
        for method in race.methods
        if (key := settings["keys"][f"{method.name} {seed}"]) not in known
    ]
    for done, (seed, method, key) in enumerate(wanted):
        found = learn_one(race, method, race.task(method, seed), seed, (done, len(wanted)))
        if race.place.rank == 0:
            keep(path, key, {"method": method.name, "seed": seed, **found})
        race.rank.report(done + 1, len(wanted), f"{method.name}, seed {seed}: held-out loss {found['heldout_loss']:.4f}")


def learn_one(race, method, task, seed, progress):
    """Train one method from the beginning; the bytes are those of the later half of the steps, of all if they come rarely. A step
    of several batches counts as so many."""
    steps, (done, parts), batches = method.config.train.steps, progress, method.batches
    ledger, place = race.ledger, race.place
    counted_from = 0 if method.config.sync.rare else steps // 2
    curve, scores, sent = [], [], 0
    with ExitStack() as stack:
        stepper, model, _ = race.stepper(method, task, dist.group.WORLD, stack)
        for step in range(steps):
            if step == counted_from:
                sent = ledger.sent_bytes
            if step and step % REPORT_EVERY == 0:
                race.rank.report(done + step / steps, parts, f"{method.name}, seed {seed}: step {step}")
            race.step(stepper, task, step)
            if (step + 1) * batches in race.settings["curve"]:
                before = ledger.sent_bytes
                with stepper.sync.averaged():
                    sums = race.sum(task.score(model, place.rank))
                curve.append([(step + 1) * batches, sums[0] / sums[1]])
                scores.append([(step + 1) * batches, task.score_of(sums)])
                sent += ledger.sent_bytes - before
        sent = ledger.sent_bytes - sent
        stepper.sync.finish()
        with stepper.sync.averaged():
            apart = weights_apart(model)
            if method.package != "hivemind":
                check_equal(model, f"{method.name}, seed {seed}: after training")
            *sums, sent = race.sum([*task.score(model, place.rank), sent])
        torn = race.torn(stepper.sync)
    sent_per_step = None if method.package else sent / place.world_size / (steps - counted_from) / batches
    found = {"heldout_loss": sums[0] / sums[1], "wire_bytes_per_step": sent_per_step, "curve": curve}
    if task.score_is is not None:
        found["scores"] = [*scores, [steps * batches, task.score_of(sums)]]
    return found | {"weights_apart": apart, "torn": torn}


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
    if not same_everywhere(list(model.parameters()), dist.group.WORLD):
        sys.exit(f"{name} the replicas differ")
