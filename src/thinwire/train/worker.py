"""What one rank does from its start to its end: join the others, build everything, train, write down what happened."""

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.cluster import Cluster
from thinwire.collectives import backend
from thinwire.collectives.groups import give_timeout
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.tuned.tuner import Tuner
from thinwire.config.run import RunConfig
from thinwire.environment import Environment, set_variables, shared_gpu_variables
from thinwire.errors import UserError
from thinwire.lab.commands import TRAINING
from thinwire.layout import AXES, EVERYONE, REPLICA_AXES, REPLICAS, Layout
from thinwire.measure.compute import find_device, kind_of, shared_gpus
from thinwire.measure.gather import gather
from thinwire.plan import memory
from thinwire.plan.cost import Prediction, Setting, predict
from thinwire.sync.make import make_synchroniser
from thinwire.train import results, setup
from thinwire.train.assign import Assignment, first_assignment
from thinwire.train.checkpoint.disks import describe, share_run_files
from thinwire.train.checkpoint.files import Progress
from thinwire.train.checkpoint.restore import find_checkpoint
from thinwire.train.checkpoint.saver import Saver
from thinwire.train.checkpoint.state import Parts, load
from thinwire.train.failure import Heartbeat
from thinwire.train.optimizers import make_optimizer
from thinwire.train.pace import Pacer
from thinwire.train.part import Part, Place, take_part
from thinwire.train.pipelined import Pace
from thinwire.train.runtime import StopRequest, process_group
from thinwire.train.step import Stepper
from thinwire.train.task import LanguageModel
from thinwire.train.trainer import Trainer, report_traffic


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank whose process group exists. tuner: who chooses collectives, None if they are the backend's own."""

    config: RunConfig
    environment: Environment
    layout: Layout
    ledger: Ledger
    device: torch.device
    stop: StopRequest
    tuner: Tuner | None = None

    @property
    def host(self) -> str:
        lab = self.environment.lab
        return lab.host if lab else socket.gethostname()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended: "done" or "interrupted", and where the run folder is."""

    reason: str
    folder: Path


def work(
    config: RunConfig, environment: Environment, resume: Path | None, bind: str = "", store: dist.TCPStore | None = None
) -> Outcome:
    """Be one of the ranks that a launcher has started. Collective.

    resume: the run folder to go on with. bind: the address at which rank 0 opens the store, if the launcher has none.
    store: where the ranks have met already.
    """
    place = environment.place
    assert place is not None, "a launcher has started this process"
    layout = config.layout.resolve(place.world_size, rare=config.sync.rare)
    stop = StopRequest()
    stop.listen()
    ledger = Ledger()
    device, group_backend = _device(environment)
    if config.sync.by_speed and device.type != "cpu":
        raise UserError(f"sync.assign = 'by_speed' times the processor, not {device.type}; set it to 'equal'")
    rank = Rank(config=config, environment=environment, layout=layout, ledger=ledger, device=device, stop=stop)
    timeout_s = config.train.timeout_s
    with ExitStack() as stack:
        mpi = None
        if setup.uses_mpi(config.train.backend, place, device):
            place, mpi = stack.enter_context(setup.mpi_ranks(place, timeout_s))
        if group_backend == backend.NAME:
            rank = replace(rank, tuner=setup.set_collectives(config, environment, ledger, mpi))
        elif config.collectives.kind != "native":
            raise UserError(f"collectives.kind = {config.collectives.kind!r} is for CPUs; set it to 'native'")
        set_variables(shared_gpu_variables(place, torch.cuda.device_count(), rank.host))
        place = stack.enter_context(process_group(place, group_backend, timeout_s, bind, None if mpi else store))
        heartbeat = stack.enter_context(Heartbeat(place, rank.host, timeout_s))
        try:
            return train_as(rank, resume)
        except RuntimeError as error:
            raise heartbeat.explained(error) from error


def train_as(rank: Rank, resume: Path | None) -> Outcome:
    """Train from the beginning, or go on with the run folder `resume`. Collective over the default process group."""
    with ExitStack() as stack:
        stack.enter_context(rank.ledger.label("set-up"))
        return _train(rank, resume, stack)


def _train(rank: Rank, resume: Path | None, stack: ExitStack) -> Outcome:
    config, ledger, layout, number = rank.config, rank.ledger, rank.layout, dist.get_rank()
    gradients = layout.of_gradients
    mesh = init_device_mesh(rank.device.type, gradients.degrees, mesh_dim_names=AXES)
    groups = {name: mesh.get_group(name) for name in AXES}
    if layout.seq > 1:
        groups["seq"], _ = dist.new_subgroups_by_enumeration(layout.groups("seq"))
    for made in groups.values():
        if not isinstance(made, backend.MeteredGroup):  # the metered backend has done so itself
            give_timeout(made, timedelta(seconds=config.train.timeout_s))
    axis = gradients.report_axis
    if axis == REPLICAS:
        groups[REPLICAS] = mesh[REPLICA_AXES]._flatten(REPLICAS).get_group()
    elif axis == EVERYONE:
        groups[EVERYONE] = dist.distributed_c10d._get_default_group()
    group, replica = groups[axis], layout.replica(number)
    ledger.axes[group.group_name] = axis  # an axis as large as the world uses the default group, which has no axis
    if isinstance(group, backend.MeteredGroup):
        backend.self_test(group, ledger)
    cluster = setup.find_cluster(config, rank.environment, layout.world_size, kind_of(rank.device))
    folder, disks = setup.agree_on_folder(config, resume)
    task = setup.make_task(config, layout, rank.environment)
    room = setup.find_room(rank.device, rank.host, in_lab=rank.environment.lab is not None)
    on_device, casts = rank.device.type != "cpu", config.train.dtype == "bfloat16"
    needed = partial(memory.need, config, task.shape, layout, on_device=on_device)
    memory.check(needed(casts=casts), room, memory.leaner(config, task.shape, layout, casts=casts, on_device=on_device))
    dtype = setup.agree_on_dtype(config, rank.device, folder if resume else None, task)
    casts = dtype != config.model.dtype
    if number == 0:
        print(memory.line(needed(casts=casts), room), flush=True)

    precision = partial(torch.autocast, rank.device.type, dtype=torch.bfloat16) if casts else nullcontext
    place = Place(
        layout=layout,
        groups=groups,
        ledger=ledger,
        device=rank.device,
        precision=precision,
        casts=casts,
        rates=cluster.declared_rates,
    )
    part = take_part(task, config, place)
    stack.callback(part.close)
    sync = make_synchroniser(config.sync, config.compress, gradients, ledger)
    optimizer = make_optimizer(part.module, config.train)
    parts = Parts(
        model=part.module,
        optimizer=optimizer,
        sync=sync,
        ledger=ledger,
        rank=number,
        part=part.number,
        num_parts=part.count,
        shards=part.shards,
        exchange=part.sharded.shards.compression if part.sharded else None,
        layout=str(layout),
        replicas=part.experts is not None,
    )
    progress = Progress(step=0, tokens=0, world_size=layout.world_size, assignment=())
    if resume is not None:
        with ledger.label("checkpoint"):
            found = find_checkpoint(folder.path / "checkpoints", disks, parts)
        load(found.path, parts, with_own=found.with_own)
        progress = found.progress
    attached = stack.enter_context(sync.attached(part.module, optimizer, mesh))
    stepper = part.stepper(attached, optimizer, sync, task, config.train)
    with ledger.label("replica set-up"), part.waits.set_up():
        stepper.rehearse(task.batch(0, replica))
    prediction, pacer, assignment = _predict(rank, cluster, task, part, stepper, progress, groups)
    if pacer:
        stack.enter_context(part.paced(pacer))

    hosts = gather(rank.host)
    reporter = None
    if number == 0:
        reporter = results.Reporter(folder, config.train.steps, task.unit)
        if resume is None:
            about = results.About(
                hosts=hosts,
                device=rank.device.type,
                dtype=dtype,
                paced=pacer is not None,
                lab=rank.environment.lab,
                layout=layout,
            )
            results.write_beginning(folder, config, cluster, task, prediction, about)
        else:
            results.write_resume(folder, reporter, progress, layout.world_size, assignment)
        if config.sync.by_speed:
            reporter.assigned(progress.step, assignment)
        if len(disks.leaders) > 1:
            print(describe(disks, hosts, folder.path / "checkpoints"), flush=True)
        if rank.environment.results is not None:
            (rank.environment.results / TRAINING).touch()
    share_run_files(folder.path, disks)
    trainer = Trainer(
        task=task,
        stepper=stepper,
        train=config.train,
        parts=parts,
        group=group,
        replica=replica,
        loss_ranks=layout.tensor * layout.seq,
        device=rank.device,
        stop=rank.stop,
        saver=Saver(folder.path / "checkpoints", disks, config.train.checkpoints_kept, config.train.checkpoint_copies, parts),
        reporter=reporter,
        assignment=assignment,
        bubble_s=prediction.waiting_s if part.pipeline else 0.0,
        by_speed=config.sync.by_speed,
        tokens=progress.tokens,
        saved_step=progress.step if resume else -1,
    )
    reason = trainer.run(progress.step)
    trainer.write_end(pacer, rank.environment.results)
    return Outcome(reason=reason, folder=folder.path)


def _device(environment: Environment) -> tuple[torch.device, str]:
    """This rank's device and the backend of its group. Ranks that share a CPU get one thread each."""
    place, (number, ranks_here) = environment.place, environment.here
    assert place is not None
    device = find_device(number, alone=place.world_size == 1)
    if device.type == "cpu":
        return device, backend.NAME
    if place.rank == 0 and (line := shared_gpus(ranks_here)):
        print(line, flush=True)
    if dist.is_nccl_available():
        return device, f"cpu:gloo,{device.type}:nccl"
    if place.rank == 0:
        print("the ranks talk over gloo, through pinned memory of the host: this torch has no NCCL", flush=True)
    return device, f"cpu:gloo,{device.type}:gloo"


def _predict(
    rank: Rank,
    cluster: Cluster,
    task: LanguageModel,
    part: Part,
    stepper: Stepper,
    progress: Progress,
    groups: Mapping[str, dist.ProcessGroup],
) -> tuple[Prediction, Pacer | Pace | None, Assignment]:
    """What a step will cost; the pacer that holds this rank to the declared rate, if the lab asks for one; and who has how many
    micro-batches. Collective."""
    lab, layout, config = rank.environment.lab, rank.layout, rank.config
    declared, pacer = cluster.declared_rates, None
    if lab and lab.paced and declared and rank.device.type == "cpu":  # a host that sleeps holds up no device
        rates, rates_are = declared, "declared, and kept by pacing"
        pacer = part.pacer(declared[dist.get_rank()])
    else:
        batch = task.batch(0, layout.replica(dist.get_rank()))
        rates, rates_are = setup.timed_rates(part.workload, batch, stepper, rank.ledger), "timed on this model before training"
    assignment = _assign(config, layout, rates, progress.assignment)
    setting = Setting(
        cluster=cluster,
        layout=layout,
        workload=part.workload,
        micro_batches=config.sync.accumulate,
        flops_per_s=rates,
        rates_are=rates_are,
        optimizer=config.train.optimizer.kind,
        assignment=assignment,
        kind=kind_of(rank.device),
        stages=part.stages,
        sharded=part.sharded.passes if part.sharded else None,
        tensor_flops=part.tensor_flops,
    )
    transfers = [
        *part.traffic(config.sync.accumulate, config.train),
        *stepper.sync.traffic(part.workload, layout.of_gradients),
        *stepper.norm_traffic(),
        *stepper.evaluation_traffic(task, layout.replica(dist.get_rank())),
        *part.evaluation_traffic(task, layout.replica(dist.get_rank()), config.train),
        *report_traffic(config.train, layout.of_gradients.report_axis, layout.world_size),
    ]
    carrier = setup.choose_carrier(rank.tuner, cluster, groups, transfers)
    return predict(setting, transfers, carrier=carrier), pacer, assignment


def _assign(config: RunConfig, layout: Layout, rates: Sequence[float], saved: Assignment) -> Assignment:
    """Micro-batches of a step by replica: as saved, if that fits this run, else by `rates`, which all ranks know."""
    equal = (config.sync.accumulate,) * layout.replicas
    if not config.sync.by_speed:
        return equal
    slowest = [min(rate for rank, rate in enumerate(rates) if layout.replica(rank) == replica) for replica in range(len(equal))]
    return first_assignment(equal, [1 / rate for rate in slowest], saved)
