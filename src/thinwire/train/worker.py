"""What one rank does from its start to its end: join the others, build everything, train, write down what happened."""

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from thinwire.cluster import Cluster
from thinwire.cluster.order import in_order
from thinwire.collectives import backend
from thinwire.collectives.groups import give_timeout
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.tuned.tuner import Tuner
from thinwire.config.run import RunConfig
from thinwire.environment import Environment, set_variables, shared_gpu_variables
from thinwire.errors import UserError
from thinwire.lab.commands import TRAINING
from thinwire.layout import EVERYONE, REPLICA_AXES, REPLICAS, Layout
from thinwire.measure.compute import find_device, kind_of, shared_gpus
from thinwire.measure.gather import gather
from thinwire.parallel.mesh import make_mesh
from thinwire.plan import fitting, memory
from thinwire.plan.cost import Prediction, Setting, predict, ranks_per_core
from thinwire.sync.make import make_synchroniser
from thinwire.sync.single_rank import SingleRank
from thinwire.train import results, setup
from thinwire.train.assign import Assignment, first_assignment
from thinwire.train.checkpoint.disks import describe, share_run_files
from thinwire.train.checkpoint.files import Progress
from thinwire.train.checkpoint.restore import find_checkpoint
from thinwire.train.checkpoint.saver import Saver
from thinwire.train.checkpoint.state import Parts, load
from thinwire.train.failure import Heartbeat
from thinwire.train.loggers import open_boards
from thinwire.train.metrics import exposition, metrics_served
from thinwire.train.optimizers import make_optimizer
from thinwire.train.pace import Pacer
from thinwire.train.part import Part, Place, Precision, take_part
from thinwire.train.pipelined import Pace
from thinwire.train.runtime import StopRequest, process_group
from thinwire.train.step import Stepper
from thinwire.train.task import Task
from thinwire.train.timeline import Timeline
from thinwire.train.trainer import Trainer
from thinwire.train.updates import activations_on_host, check_on_host

if TYPE_CHECKING:
    from thinwire.train.replan import Replanner


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank whose process group exists. tuner: who chooses collectives, None if they are the backend's own.
    order: by number the rank of the cluster file, where that is another."""

    config: RunConfig
    environment: Environment
    layout: Layout
    ledger: Ledger
    device: torch.device
    stop: StopRequest
    tuner: Tuner | None = None
    order: tuple[int, ...] = ()

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
    environment, order = setup.along_the_links(config, environment)
    place = environment.place
    assert place is not None, "a launcher has started this process"
    layout = config.laid_out(place.world_size)
    stop = StopRequest()
    stop.listen()
    ledger = Ledger()
    device, group_backend = _device(environment, config.train.backend, chosen=config.collectives.kind != "native")
    check_on_host(config.train.on_host, device)
    rank = Rank(config=config, environment=environment, layout=layout, ledger=ledger, device=device, stop=stop, order=order)
    timeout_s = config.train.timeout_s
    with ExitStack() as stack:
        mpi = None
        if setup.uses_mpi(config.train.backend, place, device):
            place, mpi = stack.enter_context(setup.mpi_ranks(place, timeout_s))
        if group_backend == backend.NAME:
            tuner = setup.set_collectives(config, environment, ledger, mpi, order=order, device=device.type)
            rank = replace(rank, tuner=tuner)
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
    mesh, groups = make_mesh(layout, rank.device.type)
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
    cluster = in_order(cluster, rank.order) if rank.order else cluster
    folder, disks = setup.agree_on_folder(config, resume)
    task = setup.make_task(config, layout, rank.environment)
    room = setup.find_room(rank.device, rank.host, in_lab=rank.environment.lab is not None)
    on_device, casts = rank.device.type != "cpu", config.train.dtype == "bfloat16"
    needed = partial(memory.need, config, task.shape, layout, on_device=on_device) if task.shape else None
    if task.shape and needed:
        fitting.check(needed(casts=casts), room, fitting.leaner(config, task.shape, layout, casts=casts, on_device=on_device))
    dtype = setup.agree_on_dtype(config, rank.device, folder if resume else None, task)
    casts = dtype != config.model.dtype
    if number == 0 and needed:
        print(fitting.line(needed(casts=casts), room), flush=True)

    precision: Precision = partial(torch.autocast, rank.device.type, dtype=torch.bfloat16) if casts else nullcontext
    if "activations" in config.train.on_host:
        precision = partial(activations_on_host, rank.device, precision)
    place = Place(
        layout=layout,
        rank=number,
        groups=groups,
        ledger=ledger,
        device=rank.device,
        precision=precision,
        casts=casts,
        rates=cluster.declared_rates,
    )
    part = take_part(task, config, place)
    stack.callback(part.close)
    alone = config.train.updates == "early" and not config.sync.rare
    sync = SingleRank() if alone else make_synchroniser(config.sync, config.compress, gradients, ledger)
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
        replicas=layout.expert > 1,
        copies=part.pipeline.copies if part.pipeline else {},
    )
    progress = Progress(step=0, tokens=0, world_size=layout.world_size, assignment=())
    if resume is not None:
        with ledger.label("checkpoint"):
            found = find_checkpoint(folder.path / "checkpoints", disks, parts)
        if found.progress.replanned:
            config = fitting.changed(config, found.progress.replanned, "what the checkpoint says was planned anew")
            rank, sync = replace(rank, config=config), make_synchroniser(config.sync, config.compress, gradients, ledger)
            parts = replace(parts, sync=sync)
        load(found.path, parts, with_own=found.with_own)
        progress = found.progress
    attached = stack.enter_context(sync.attached(part.module, optimizer, mesh))
    stepper = part.stepper(attached, optimizer, sync, task, config.train)
    with ledger.label("replica set-up"), part.waits.set_up():
        stepper.rehearse(task.batch(0, replica))
    setting, prediction, pacer, assignment = _predict(rank, cluster, task, part, stepper, progress, groups)
    if pacer:
        stack.enter_context(part.paced(pacer))

    hosts = gather(rank.host)
    reporter = None
    if number == 0:
        described = {"parameters": task.workload.num_parameters, "layout": layout, "sync": config.sync.kind}
        boards = open_boards(folder.path, config.watch.loggers, described | {"compress": config.compress.kind})
        reporter = results.Reporter(folder, config.train.steps, task, boards)
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
    if config.watch.metrics_port:
        port = config.watch.metrics_port + rank.environment.here[0]
        stack.enter_context(metrics_served(partial(exposition, ledger, number), port, f"watch.metrics_port: rank {number}"))
    trainer = Trainer(
        task=task,
        stepper=stepper,
        train=config.train,
        parts=parts,
        group=group,
        replica=replica,
        pipeline=layout.groups("pipe")[0] if layout.pipe > 1 else (),
        loss_ranks=layout.tensor * layout.seq,
        device=rank.device,
        stop=rank.stop,
        saver=Saver(folder.path / "checkpoints", disks, config.train.checkpoints_kept, config.train.checkpoint_copies, parts),
        reporter=reporter,
        assignment=assignment,
        bubble_s=prediction.waiting_s if part.pipeline else 0.0,
        by_speed=config.sync.by_speed,
        replanner=_replanner(rank, task, setting, groups),
        tokens=progress.tokens,
        saved_step=progress.step if resume else -1,
        timeline=Timeline(ledger, number, config.watch.timeline_steps) if config.watch.timeline_steps else None,
    )
    reason = trainer.run(progress.step)
    trainer.write_end(pacer, rank.environment.results)
    return Outcome(reason=reason, folder=folder.path)


def _device(environment: Environment, wanted: str = "auto", *, chosen: bool = False) -> tuple[torch.device, str]:
    """This rank's device and the backend of its group. Ranks that share a CPU get one thread each. wanted: train.backend; chosen:
    not the backend's own collectives; UserError where they cannot be on this device."""
    place, (number, ranks_here) = environment.place, environment.here
    assert place is not None
    device = find_device(number, alone=place.world_size == 1)
    if device.type == "cpu":
        return device, backend.NAME
    if place.rank == 0 and (line := shared_gpus(ranks_here)):
        print(line, flush=True)
    if wanted == "mpi":
        return device, backend.NAME
    over_nccl = dist.is_nccl_available() and wanted == "auto"
    why = "this torch has no NCCL" if wanted == "auto" else "train.backend is 'gloo'"
    if chosen and not over_nccl:
        raise UserError(f"collectives.kind chooses on GPUs over NCCL, and {why}; set it to 'native'")
    if chosen:
        return device, backend.NAME
    if over_nccl:
        return device, f"cpu:gloo,{device.type}:nccl"
    if place.rank == 0:
        print(f"the ranks talk over gloo, through pinned memory of the host: {why}", flush=True)
    return device, f"cpu:gloo,{device.type}:gloo"


def _predict(
    rank: Rank,
    cluster: Cluster,
    task: Task,
    part: Part,
    stepper: Stepper,
    progress: Progress,
    groups: Mapping[str, dist.ProcessGroup],
) -> tuple[Setting, Prediction, Pacer | Pace | None, Assignment]:
    """What a step is made of, and will cost; the pacer that holds this rank to the declared rate, if the lab asks for one; and
    who has how many micro-batches. Collective."""
    lab, layout, config = rank.environment.lab, rank.layout, rank.config
    declared, pacer = cluster.declared_rates, None
    if lab and lab.paced and declared and rank.device.type == "cpu":  # a host that sleeps holds up no device
        rates, rates_are = declared, "declared, and kept by pacing"
        pacer = part.pacer(declared[dist.get_rank()])
    else:
        batch = task.batch(0, layout.replica(dist.get_rank()))
        rates, rates_are = setup.timed_rates(part.workload, batch, stepper, rank.ledger), "timed on this model before training"
    assignment = _assign(config, layout, rates, progress.assignment)
    setting = replace(
        part.outline.setting(config, layout, cluster, rates),
        rates_are=rates_are,
        assignment=assignment,
        kind=kind_of(rank.device),
        ranks_per_core=ranks_per_core(layout.world_size) if pacer else 1.0,
    )
    replica = layout.replica(dist.get_rank())
    transfers = [
        *part.outline.transfers(config, layout, stepper.sync, task.num_sums),
        *stepper.evaluation_traffic(task, replica),
        *part.evaluation_traffic(task, replica, config.train),
    ]
    carrier = setup.choose_carrier(rank.tuner, cluster, groups, transfers)
    prediction = predict(setting, transfers, carrier=carrier)
    lines = filter(None, (shared_gpus(rank.environment.here[1]), part.first_visits(task, config.sync.accumulate)))
    prediction = replace(prediction, assumptions=(*prediction.assumptions, *lines))
    return setting, prediction, pacer, assignment


def _replanner(rank: Rank, task: Task, setting: Setting, groups: Mapping[str, dist.ProcessGroup]) -> "Replanner | None":
    if not rank.config.train.replan or task.shape is None:
        return None
    from thinwire.train.replan import Collectives, Replanner  # which loads the planner

    chosen = Collectives(rank.tuner, groups) if rank.tuner else None
    return Replanner(rank.config, task.shape, setting.cluster, setting.flops_per_s, setting.ranks_per_core, chosen)


def _assign(config: RunConfig, layout: Layout, rates: Sequence[float], saved: Assignment) -> Assignment:
    """Micro-batches of a step by replica: as saved, if that fits this run, else by `rates`, which all ranks know."""
    equal = (config.sync.accumulate,) * layout.replicas
    if not config.sync.by_speed:
        return saved if config.train.replan and len(saved) == len(equal) and sum(saved) == sum(equal) else equal
    slowest = [min(rate for rank, rate in enumerate(rates) if layout.replica(rank) == replica) for replica in range(len(equal))]
    return first_assignment(equal, [1 / rate for rate in slowest], saved)
