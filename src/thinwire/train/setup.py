"""What the ranks settle before they train: MPI or gloo, which collectives, cluster, run folder, data, dtype, compute rates.

Rank 0 decides and broadcasts. All but `uses_mpi` and `find_cluster` are collective.
"""

import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.cluster import Cluster, Device, Host, load_cluster
from thinwire.cluster.order import along_links, in_order
from thinwire.collectives.backend import register
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.mpi.start import Mpi, started
from thinwire.collectives.nccl import register_nccl
from thinwire.collectives.price import Carrier
from thinwire.collectives.scheduled import ScheduledGroup, register_scheduled
from thinwire.collectives.synthesis.bounds import OPS
from thinwire.collectives.tuned.tuner import Chosen, Tuner, make_tuner
from thinwire.config.run import RunConfig
from thinwire.environment import DEFAULT_PORT, Environment, Place
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.measure.compute import fast_dtype
from thinwire.measure.gather import gather
from thinwire.measure.memory import Free, Room, free_memory, rooms
from thinwire.record import RunFolder
from thinwire.traffic import Transfer
from thinwire.train.checkpoint.disks import Disks, find_disks, share_run_files
from thinwire.train.step import Stepper, without_trace
from thinwire.train.task import Task, new_task
from thinwire.workload import Workload

TIMED_PASSES = 3
WARM_PASSES = 5
"""Before them on a device, whose first ones compile and choose kernels; one on the CPU."""


def uses_mpi(backend: str, place: Place, device: torch.device) -> bool:
    """Do the exchanges of this run go over MPI? backend: train.backend."""
    if backend == "mpi" and device.type != "cpu" and place.rank == 0:
        print("the ranks talk over MPI, through pinned memory of the host", flush=True)
    if backend != "auto" or device.type != "cpu" or not place.by_mpiexec:
        return backend == "mpi"
    if find_spec("mpi4py") is not None:
        return True
    if place.rank == 0:
        print("thinwire: the ranks talk over gloo: mpi4py is not installed (the extra `mpi`)", file=sys.stderr, flush=True)
    return False


@contextmanager
def mpi_ranks(place: Place, timeout_s: float) -> Iterator[tuple[Place, Mpi]]:
    """MPI, started; the place with the address where the ranks meet, the same on all."""
    with started(timeout_s) as mpi:
        mpi.check_place(place.rank, place.world_size)
        wanted_port = place.master_port if place.master_port != DEFAULT_PORT else 0
        address, port = mpi.meet(place.master_address, wanted_port, timeout_s)
        if place.rank == 0:
            print(f"{place.world_size} ranks over {mpi.library.version}", flush=True)
        yield replace(place, master_address=address, master_port=port), mpi


def find_cluster(config: RunConfig, environment: Environment, world_size: int, kind: str = "cpu") -> Cluster:
    """The lab's cluster, else the named one, else `world_size` ranks on devices of this kind with no wire between them. UserError
    if the size differs."""
    lab, named = environment.lab, config.cluster.file
    if lab is None and not named:
        devices = tuple(Device(name=f"here/{'cpu' if kind == 'cpu' else 'gpu'}{index}", kind=kind) for index in range(world_size))
        return Cluster(name="here", hosts=(Host(name="here", devices=devices),))
    cluster = load_cluster(lab.cluster if lab else named)
    if cluster.world_size != world_size:
        raise UserError(
            f"cluster {cluster.name} has {cluster.world_size} ranks, but {world_size} were started; "
            f"set cluster.file to the cluster you run on, or start {cluster.world_size} ranks"
        )
    return cluster


def along_the_links(config: RunConfig, environment: Environment) -> tuple[Environment, tuple[int, ...]]:
    """The environment in which this rank has the number that layout.map gives it, and by number the rank that was started as
    another; nothing where none was, or where MPI has given the numbers. Rank 0 stays it, and says so. UserError as for
    `find_cluster`."""
    place = environment.place
    assert place is not None, "a launcher has started this process"
    if config.layout.map == "ranks" or place.by_mpiexec or not (environment.lab or config.cluster.file):
        return environment, ()
    cluster = find_cluster(config, environment, place.world_size)
    order = along_links(cluster)
    if order == tuple(range(cluster.world_size)):
        return environment, ()
    if place.rank == 0:
        places = ", ".join(f"{started} as {number}" for number, started in enumerate(order) if number != started)
        print(f"ranks are numbered along the links of {cluster.name}: {places} (layout.map = 'ranks' leaves them)", flush=True)
    return replace(environment, place=replace(place, rank=order.index(place.rank))), order


def set_collectives(
    config: RunConfig,
    environment: Environment,
    ledger: Ledger,
    mpi: Mpi | None = None,
    *,
    order: Sequence[int] = (),
    device: str = "cpu",
) -> Tuner | None:
    """Register the metered backend, before the process group is made; None where it chooses all algorithms itself.

    order: as of `along_the_links`; device: the type of this rank's; over NCCL where that is no CPU, unless over MPI. UserError
    for collectives that cannot be chosen there.
    """
    kind, lab, named = config.collectives.kind, environment.lab, config.cluster.file
    if mpi and device != "cpu":
        if kind != "native":
            raise UserError(f"collectives.kind = {kind!r} is for CPUs, and for GPUs over NCCL; over MPI set it to 'native'")
        register(ledger, inner=mpi.inner, devices=("cpu", device))
        return None
    assert environment.place is not None, "a launcher has started this process"
    tuner = None
    if kind != "native":
        cluster = find_cluster(config, environment, environment.place.world_size) if lab or named else None
        cluster = in_order(cluster, order) if cluster and order else cluster
        tuner = make_tuner(cluster, "" if lab else named, measures=kind == "measured")
    if device != "cpu":
        register_nccl(ledger, tuner)
    else:
        register_scheduled(ledger, tuner, inner=mpi.inner if mpi else None)
    return tuner


def choose_carrier(
    tuner: Tuner | None, cluster: Cluster, groups: Mapping[str, dist.ProcessGroup], transfers: Sequence[Transfer]
) -> Carrier:
    """Decides about all `transfers` now, by axis, so that they can be predicted. Every rank gives the same transfers."""
    if tuner is None:
        return Carrier()
    for transfer in transfers:
        group = groups.get(transfer.axis)
        if isinstance(group, ScheduledGroup) and transfer.op in OPS:
            group.prepare(transfer.op, transfer.message_bytes)
    return Chosen(tuner, cluster)


def agree_on_folder(config: RunConfig, resume: Path | None) -> tuple[RunFolder, Disks]:
    """Rank 0 makes the run folder, or opens the one to resume; hosts that do not share it make one of the same name. UserError
    on all ranks if one cannot write there."""
    path: list[Any] = [None]
    if dist.get_rank() == 0 and resume is None:
        wanted = Path(config.train.run or datetime.datetime.now().strftime("runs/%Y%m%d-%H%M%S"))
        path = [str(RunFolder.create(wanted).path)]
    dist.broadcast_object_list(path, 0)
    folder = resume or Path(path[0])
    disks = find_disks(folder / "checkpoints")
    if resume is not None:
        share_run_files(folder, disks)
        if dist.get_rank() == 0:
            RunFolder.create(folder, resume=True)
    return RunFolder(folder.resolve()), disks


def make_task(config: RunConfig, layout: Layout, environment: Environment) -> Task:
    """Rank 0 first, so that the tokens are written once where ranks share a disk. UserError, on all ranks, for unequal texts."""
    task = new_task(config, layout, environment.cache_folder) if dist.get_rank() == 0 else None
    dist.barrier()
    task = task or new_task(config, layout, environment.cache_folder)
    sums = gather(task.sha256)
    if len(set(sums)) > 1:
        other = next(rank for rank, found in enumerate(sums) if found != sums[0])
        raise UserError(
            f"{_source(config)} is not the same on all ranks (sha256 {sums[0][:12]} on rank 0, "
            f"{sums[other][:12]} on rank {other}); copy rank 0's to all hosts"
        )
    return task


def _source(config: RunConfig) -> str:
    if config.task.is_language_model:
        return f"data source {str(config.data)!r}"
    return f"the data of task.kind = {config.task.kind!r}"


def find_room(device: torch.device, host: str, *, in_lab: bool = False) -> list[Room]:
    """Where the ranks share memory, and how much of it is free. in_lab: all hosts have the same GPUs."""
    mine: tuple[str, Free | None] = host, free_memory()
    if device.type != "cpu":
        name = str(device) if in_lab else f"{host} {device}"
        mine = name, Free(float(torch.get_device_module(device).mem_get_info(device)[0]), name)
    return rooms(gather(mine))


def agree_on_dtype(config: RunConfig, device: torch.device, resumed: RunFolder | None, task: Task) -> str:
    """Of the matrix products: that of the model; of one in float32 what train.dtype says. A resumed run keeps what it had; "auto"
    is tried out on rank 0, on the model's largest matrix."""
    if config.model.dtype != "float32":
        return config.model.dtype
    if task.shape is None and config.train.dtype == "auto":
        return "float32"
    chosen: list[Any] = [config.train.dtype]
    if dist.get_rank() == 0 and chosen[0] == "auto":
        matrices = [parameter for parameter in task.workload.parameters if len(parameter.shape) == 2]
        outputs, inputs = max(matrices, key=lambda parameter: parameter.numel).shape
        had = resumed.record().dtype if resumed else None
        chosen = [had or fast_dtype(device, (task.workload.tokens_per_microbatch, inputs, outputs))]
    dist.broadcast_object_list(chosen, 0)
    return chosen[0]


def timed_rates(workload: Workload, batch: object, stepper: Stepper, ledger: Ledger) -> tuple[float, ...]:
    """Flop/s of each rank on one micro-batch, all computing at once, no gradients exchanged. workload: of this rank's part."""
    seconds = []
    with ledger.label("calibration"), without_trace(stepper.model), stepper.waits.set_up():
        dist.barrier()
        warm = WARM_PASSES if stepper.clock.on_device else 1
        for _ in range(warm + TIMED_PASSES - 1):
            stepper.waits.clear()
            begun = time.perf_counter()
            stepper.timed_pass(batch)
            if stepper.clock.on_device:
                torch.accelerator.synchronize(next(stepper.model.parameters()).device)
            seconds.append(time.perf_counter() - begun - stepper.waits.seconds())
        stepper.optimizer.zero_grad(set_to_none=False)
        return tuple(gather(workload.flops_per_microbatch / min(seconds[warm:])))
