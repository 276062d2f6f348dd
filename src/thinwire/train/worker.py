"""What one rank does from its start to its end: find its place, join the others, build everything, train, write down what happened."""

import datetime
import json
import platform
import socket
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire import __version__
from thinwire.cluster import dump_cluster
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.config.run import RunConfig, dump_run
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout
from thinwire.plan.cost import Prediction, Setting, predict
from thinwire.record.folder import RunFolder
from thinwire.sync.every_step import EveryStepSync
from thinwire.train import checkpoint
from thinwire.train.forecast import declared_rates, find_cluster, timed_rates
from thinwire.train.pace import Pacer
from thinwire.train.reporter import Reporter
from thinwire.train.runtime import Place, StopRequest, Surroundings, process_group
from thinwire.train.step import Stepper, make_optimizer
from thinwire.train.task import LanguageModel
from thinwire.train.trainer import Trainer, report_traffic

DATA_AXIS = "data"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended on this rank."""

    reason: str
    folder: Path


def work(config: RunConfig, surroundings: Surroundings, resume: Path | None) -> Outcome:
    """Train as one of the ranks that a launcher has started. Collective. `resume`: the run folder to go on with."""
    place = surroundings.place
    assert place is not None, "a launcher has started this process"
    layout = config.layout.resolve(place.world_size)
    stop = StopRequest()
    stop.listen()
    ledger = Ledger()
    device, group_backend = _device(place)
    if group_backend == backend.NAME:
        backend.register(ledger)
    with ExitStack() as stack:
        stack.enter_context(process_group(place, group_backend, config.train.timeout_s))
        with ledger.label("set-up"):
            return _train(_Rank(config, surroundings, place, layout, ledger, device, stop), resume, stack)


@dataclass(frozen=True)
class _Rank:
    config: RunConfig
    surroundings: Surroundings
    place: Place
    layout: Layout
    ledger: Ledger
    device: torch.device
    stop: StopRequest


def _train(rank: _Rank, resume: Path | None, stack: ExitStack) -> Outcome:
    config, ledger, layout, surroundings = rank.config, rank.ledger, rank.layout, rank.surroundings
    here = rank.place.rank
    mesh = init_device_mesh(rank.device.type, layout.degrees, mesh_dim_names=AXES)
    group = mesh.get_group(DATA_AXIS)
    ledger.axes[group.group_name] = DATA_AXIS
    if isinstance(group, backend.MeteredGroup):
        backend.self_test(group, ledger)

    lab = surroundings.lab
    cluster = find_cluster(config.cluster.file, lab.cluster if lab else None, layout.world_size)
    declared = declared_rates(cluster)
    paced = bool(lab and lab.paced and declared)
    folder = _agree_on_folder(config, resume, here)
    task = _make_task(config, layout, surroundings, here)
    dtype = _agree_on_dtype(config, rank.device, folder if resume else None, task)

    model = task.build_model().to(rank.device)
    optimizer = make_optimizer(model, config.train)
    sync = EveryStepSync(config.sync, DATA_AXIS, ledger)
    replica = stack.enter_context(sync.attached(model, optimizer, mesh))
    pacer = None
    if paced and declared:
        pacer = Pacer.of(task.workload, declared[here])
        stack.enter_context(pacer.attached(task.blocks(model)))
    stepper = Stepper(
        model=replica,
        optimizer=optimizer,
        sync=sync,
        loss=task.loss,
        precision=_precision(rank.device, dtype),
        train=config.train,
    )
    parts = checkpoint.Parts(model=model, optimizer=optimizer, sync=sync, ledger=ledger, rank=here)

    if paced and declared:
        rates, rates_are = declared, "declared, and kept by pacing"
    else:
        rates, rates_are = timed_rates(task, stepper, layout, ledger, here), "timed on this model before training"
    setting = Setting(
        cluster=cluster,
        layout=layout,
        workload=task.workload,
        micro_batches=config.sync.accumulate,
        flops_per_s=rates,
        rates_are=rates_are,
        optimizer=config.train.optimizer.kind,
    )
    transfers = sync.traffic(task.workload, layout) + report_traffic(config.train, DATA_AXIS, group.size())
    prediction = predict(setting, transfers)

    progress = checkpoint.Progress(step=0, tokens=0, world_size=layout.world_size)
    if resume is not None:
        progress = checkpoint.load(checkpoint.latest(folder.path / "checkpoints"), parts)
    facts = {"dtype": dtype, "paced": paced, "host": lab.host if lab else socket.gethostname()}
    hosts: list[Any] = [None] * layout.world_size
    dist.all_gather_object(hosts, facts["host"])
    reporter = None
    if here == 0:
        reporter = Reporter(folder, config.train.steps, task.unit)
        if resume is None:
            record = _record(rank, task, hosts, facts)
            folder.write("record.json", record)
            dump_run(config, folder.path / "run.toml")
            if cluster.links:
                dump_cluster(cluster, folder.path / "cluster.toml")
            folder.write("predicted.json", prediction.as_record())
            _introduce(record, prediction, layout)
        else:
            kept = folder.resume_at(progress.step)
            reporter.started -= kept.time_s
            print(f"resumed {folder.path} at step {progress.step}; {kept.dropped} later events dropped", flush=True)
    trainer = Trainer(
        task=task,
        stepper=stepper,
        train=config.train,
        num_micro=config.sync.accumulate,
        parts=parts,
        group=group,
        device=rank.device,
        stop=rank.stop,
        checkpoints=folder.path / "checkpoints",
        reporter=reporter,
        tokens=progress.tokens,
    )
    reason = trainer.run(progress.step)
    _write_results(trainer, folder, pacer, surroundings.results)
    return Outcome(reason=reason, folder=folder.path)


def _device(place: Place) -> tuple[torch.device, str]:
    """This rank's device and the backend of its group. Ranks that share a CPU get one thread each."""
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device, "cpu:gloo,cuda:nccl"
    torch.set_num_threads(1 if place.world_size > 1 else torch.get_num_threads())
    return torch.device("cpu"), backend.NAME


def _agree_on_folder(config: RunConfig, resume: Path | None, rank: int) -> RunFolder:
    """Rank 0 makes the run folder, the others hear its path. Collective."""
    path: list[Any] = [None]
    if rank == 0:
        wanted = resume or Path(config.train.run or datetime.datetime.now().strftime("runs/%Y%m%d-%H%M%S"))
        path = [str(RunFolder.create(wanted, resume=resume is not None).path.resolve())]
    dist.broadcast_object_list(path, 0)
    return RunFolder(Path(path[0]))


def _make_task(config: RunConfig, layout: Layout, surroundings: Surroundings, rank: int) -> LanguageModel:
    """Rank 0 first, so that the tokens are written once where ranks share a disk. Collective."""
    cache = Path(config.data.cache).expanduser() if config.data.cache else surroundings.cache_folder
    if rank == 0:
        task = LanguageModel(config, layout, cache)
    dist.barrier()
    return task if rank == 0 else LanguageModel(config, layout, cache)


def _agree_on_dtype(config: RunConfig, device: torch.device, resumed: RunFolder | None, task: LanguageModel) -> str:
    """Rank 0 decides "auto"; a resumed run keeps what it had. Collective."""
    chosen: list[Any] = [config.train.dtype]
    if dist.get_rank() == 0 and chosen[0] == "auto":
        had = resumed.record().dtype if resumed else None
        chosen = [had or ("bfloat16" if _is_fast_in_bfloat16(device, task) else "float32")]
    dist.broadcast_object_list(chosen, 0)
    return chosen[0]


def _is_fast_in_bfloat16(device: torch.device, task: LanguageModel) -> bool:
    """True if the model's own largest matrix product is at least a third faster, the casts of its input included."""
    shape = max((parameter.shape for parameter in task.workload.parameters if len(parameter.shape) == 2), key=lambda s: s[0] * s[1])
    inputs, weight = torch.randn(task.workload.tokens_per_microbatch, shape[1], device=device), torch.randn(shape, device=device)
    seconds = {torch.float32: 1e9, torch.bfloat16: 1e9}
    for dtype in [*seconds] * 3:
        started = time.perf_counter()
        torch.nn.functional.linear(inputs.to(dtype), weight.to(dtype)).float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.bfloat16] < 0.75 * seconds[torch.float32]


def _precision(device: torch.device, dtype: str) -> partial[AbstractContextManager]:
    if dtype == "float32":
        return partial(nullcontext)
    return partial(torch.autocast, device.type, dtype=torch.bfloat16)


def _record(rank: _Rank, task: LanguageModel, hosts: list[Any], facts: dict[str, Any]) -> dict[str, Any]:
    lab = rank.surroundings.lab
    return {
        "thinwire": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "world_size": rank.layout.world_size,
        "hosts": hosts,
        "device": rank.device.type,
        "dtype": facts["dtype"],
        "paced": facts["paced"],
        "lab": lab is not None,
        "delay": lab.delay if lab else "none",
        "num_parameters": task.workload.num_parameters,
        "unit": task.unit,
        **task.describe(),
    }


def _introduce(record: dict[str, Any], prediction: Prediction, layout: Layout) -> None:
    """What is about to run, and what it is predicted to cost."""
    pace = ", compute paced" if record["paced"] else ""
    where = f"in the lab{pace} (delay: {record['delay']})" if record["lab"] else "no lab"
    print(
        f"{record['num_parameters']:,} parameters on {layout.world_size} ranks ({layout}), {record['dtype']}, {where}\n"
        f"data: {record['data']['source']}, {record['data']['bytes'] / 1e6:.1f} MB in {record['data']['files']} files; "
        + (f"a {record['baseline']['name']} scores {record['baseline']['loss']:.4f} {record['unit']}\n" if "baseline" in record else "")
        + f"predicted step: {prediction.step_s:.3f} s = {prediction.compute_s:.3f} computing + {prediction.exposed_s:.3f} exposed "
        f"communication + {prediction.waiting_s:.3f} waiting for slower ranks + {prediction.optimizer_s:.3f} optimizer",
        flush=True,
    )


def _write_results(trainer: Trainer, folder: RunFolder, pacer: Pacer | None, results: Path | None) -> None:
    """Gather the ledgers of all ranks; rank 0 writes what was measured. Collective."""
    mine = {"entries": trainer.ledger.entries(trainer.group.rank()), "missed": pacer.missed_fraction if pacer else None}
    everybody: list[Any] | None = [None] * trainer.group.size() if trainer.reporter else None
    dist.gather_object(mine, everybody, dst=0)
    if trainer.reporter is None or everybody is None:
        return
    transfers = trainer.measured_transfers()
    measured = {
        **trainer.reporter.medians(),
        "transfers": transfers,
        "wire_bytes_per_step": sum(row["wire_bytes_per_step"] for row in transfers),
        "missed_pace": max((told["missed"] for told in everybody if told["missed"] is not None), default=None),
    }
    if "step_s" in measured:
        folder.write("measured.json", measured)
    folder.write("ledger.json", {"entries": [entry for told in everybody for entry in told["entries"]]})
    if results is not None:
        (results / "run_folder").write_text(str(folder.path), encoding="utf-8")


def failure_line(error: BaseException, place: Place | None) -> str:
    """One line for whatever went wrong on a rank."""
    who = f"rank {place.rank}: " if place else ""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError | RuntimeError) and any(word in text for word in ("Connection closed", "Connection reset", "peer")):
        return f"{who}lost the connection to another rank ({text[:160]})"
    if "imed out" in text or "timeout" in text.lower():
        return f"{who}gave up waiting for another rank ({text[:160]}); raise train.timeout_s if the network is only slow"
    return f"{who}{type(error).__name__}: {text[:300]}"


def write_error_file(path: Path, line: str, user_error: bool) -> None:
    """For the launcher, in the form that torchrun's agent reads."""
    told = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time())), "user_error": user_error}}}
    path.write_text(json.dumps(told), encoding="utf-8")
