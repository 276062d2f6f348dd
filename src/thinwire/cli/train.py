"""`thinwire train`: started alone it starts its ranks, here or on several machines; torchrun, srun or mpiexec start it as one."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.rank import BIND, be_rank
from thinwire.cli.report import conclude
from thinwire.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from thinwire.config.run import RunConfig
    from thinwire.environment import Environment, Place
    from thinwire.train.auto import Planned

RESUME = "A run folder to go on with, from its last checkpoint; auto: that of train.run, if it has one, else begin."


def train(  # noqa: PLR0913 - each is an option of the command line
    run: Annotated[Path | None, typer.Argument(help="run.toml; without it, a small model on the standard library.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key: train.steps=50.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN|auto", help=RESUME)] = None,
    plan: Annotated[str, typer.Option(metavar="auto", help="Plan layout, exchange and micro-batches for the ranks.")] = "",
    bind: Annotated[str, typer.Option(metavar="ADDRESS", help=BIND)] = "",
    nnodes: Annotated[int, typer.Option(min=1, help="Machines on which this same command is given, as for torchrun.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of them this is; only this differs between them.")] = 0,
    rdzv_endpoint: Annotated[str, typer.Option(metavar="HOST:PORT", help="The first of them, as the others reach it.")] = "",
) -> None:
    """Train a model; print and record predicted and measured times and bytes."""
    from thinwire.environment import environment_variables, read_environment

    if plan not in ("", "auto") or (plan and resume):
        raise UserError(f"--plan {plan}: {'a resumed run keeps its plan; leave it out' if resume else 'there is auto only'}")
    environment = read_environment()
    place = environment.place
    if resume == Path("auto") and (resume := _begun(run, changes or [], first=place is None or place.rank == 0)):
        run = None
    chosen = plan == "auto" or (resume is None and _configure(run, changes or [], None).sync.kind == "auto")
    if place is None:
        _check_nodes(nnodes, node_rank, rdzv_endpoint)
        if chosen and nnodes == 1:
            raise typer.Exit(_launch_planned(run, changes or [], bind, plans=bool(plan)))
        where = {"num_nodes": nnodes, "node_rank": node_rank, "endpoint": rdzv_endpoint, "bind": bind}
        raise typer.Exit(_launch(run, changes or [], resume, where, ["--plan", "auto"] if plan else []))

    def train_as_rank() -> None:
        store = None
        if resume is not None and place.world_size > 1 and not place.by_mpiexec:
            store = _fetch_run_file(place, resume, bind)
        if chosen:
            planned, store = _plan_with_others(run, changes or [], environment, bind, plans=bool(plan))
            config = planned.config
        else:
            config = _configure(run, changes or [], resume)
        from thinwire.train.worker import work

        outcome = work(config, environment, resume, bind, store)
        if chosen and place.rank == 0 and (line := planned.saved(outcome.folder)):
            print(line, flush=True)
        if environment.results is None and place.rank == 0:  # nobody else waits for the run folder
            conclude(outcome.folder)

    with environment_variables({"TORCH_CPP_LOG_LEVEL": "ERROR"}):  # an error is one line
        be_rank(environment, train_as_rank)


def _begun(run: Path | None, changes: list[str], first: bool) -> Path | None:
    """The run folder of an earlier life of this run, if that has come to a checkpoint. All ranks see the same disk, or their own
    of the same checkpoints. What died before is put aside by the first rank. UserError without a name for the folder."""
    folder = Path(_configure(run, changes, None).train.run)
    if folder == Path():
        raise UserError("--resume auto goes on with the folder of train.run; set it, for example --set train.run=runs/mine")
    if any((folder / "checkpoints").glob("step-*/checksums.json")):
        return folder
    if first and folder.is_dir() and any(folder.iterdir()):
        number = next(number for number in range(1, 10**6) if not folder.with_name(f"{folder.name}.{number}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))
    return None


def _check_nodes(nnodes: int, node_rank: int, rdzv_endpoint: str) -> None:
    if node_rank >= nnodes:
        raise UserError(f"--node-rank {node_rank}: of {nnodes} machines (--nnodes) the last is {nnodes - 1}")
    if (nnodes > 1) != bool(rdzv_endpoint):
        raise UserError("--nnodes above 1 and --rdzv-endpoint HOST:PORT, the first machine as the others reach it, go together")


def _fetch_run_file(place: "Place", resume: Path, bind: str) -> "TCPStore":
    """A host that takes the place of another gets run.toml from one that has it. Collective; returns where the ranks have met."""
    from thinwire.config.run import TrainSection
    from thinwire.train.runtime import meet, share_text

    store, path = meet(place, TrainSection().timeout_s, bind), resume / "run.toml"
    text = share_text(place, store, "run.toml", path.read_text(encoding="utf-8") if path.is_file() else "")
    if text and not path.is_file():
        resume.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return store


def _plan_with_others(
    run: Path | None, changes: list[str], environment: "Environment", bind: str, *, plans: bool
) -> "tuple[Planned, TCPStore]":
    """The run that rank 0 plans, and where the ranks have met. Collective."""
    from thinwire.config.run import TrainSection
    from thinwire.train.auto import auto_of_ranks
    from thinwire.train.runtime import meet

    place = environment.place
    assert place is not None
    if place.by_mpiexec:
        what = "--plan auto" if plans else "sync.kind = 'auto'"
        raise UserError(f"{what}: write the plan first, thinwire plan --write run.toml, and start mpiexec with that")
    store = meet(place, TrainSection().timeout_s, bind)
    return auto_of_ranks(run, changes, environment, store, plans=plans), store


def _launch_planned(run: Path | None, changes: list[str], bind: str, *, plans: bool) -> int:
    """On this machine alone: on the cluster of the run, or on its ranks as they are probed. plans: the whole run, else as
    sync.kind = "auto" has it, which takes no links of this machine for those between ranks."""
    from thinwire.config.run import dump_run
    from thinwire.environment import environment_variables, loopback_environment, read_environment
    from thinwire.plan.calibration import FILE

    with environment_variables({"TORCH_CPP_LOG_LEVEL": "ERROR"}):
        from thinwire.train.agent import Nodes, launch
        from thinwire.train.auto import auto, auto_sync

    config = _configure(run, changes, None)
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        probed, planned, ranks = Path(folder) / "here.toml", Path(folder) / "run.toml", config.train.ranks or 2
        if plans and not config.cluster.file:
            typer.echo(f"probing {ranks} ranks on this machine")
            if code := launch(Nodes(ranks_per_node=ranks, bind=bind), ["-o", str(probed)], loopback_environment(), "probe"):
                return code
        learnt = read_environment().cache_folder / FILE
        where_to = "" if config.cluster.file or not plans else str(probed)
        plan = (auto if plans else auto_sync)(run, changes, where_to, learnt)
        found = plan.config
        typer.echo("\n".join(plan.lines))
        if not config.cluster.file:  # what links there were is known to the plan only
            found = found.model_copy(update={"cluster": config.cluster, "train": found.train.model_copy(update={"ranks": ranks})})
        dump_run(found, planned)
        where = {"num_nodes": 1, "node_rank": 0, "endpoint": "", "bind": bind}
        return _launch(planned, [], None, where, planned=plan, probed=None if config.cluster.file else probed)


def _configure(run: Path | None, changes: list[str], resume: Path | None) -> "RunConfig":
    from thinwire.config.run import load_run

    if resume is not None and run is not None:
        raise UserError(f"--resume {resume} goes on with that folder's run.toml; leave out {run} and use --set for changes")
    if resume is not None and not (resume / "run.toml").is_file():
        raise UserError(f"--resume {resume}: this is not a run folder; there is no run.toml in it")
    return load_run(resume / "run.toml" if resume else run, changes)


def _launch(
    run: Path | None,
    changes: list[str],
    resume: Path | None,
    where: dict[str, Any],
    more: Sequence[str] = (),
    planned: "Planned | None" = None,
    probed: Path | None = None,
) -> int:
    """Start the ranks on this machine, then print the table and write the report. where: of `Nodes`; more: arguments; planned:
    what the run comes from; probed: the cluster that it was planned for, which its folder keeps."""
    from thinwire.environment import environment_variables, loopback_environment

    with environment_variables({"TORCH_CPP_LOG_LEVEL": "ERROR"}):  # which torch reads when it is loaded
        from thinwire.train.agent import Nodes, devices_here, launch

    variables: dict[str, str] = {}
    if where["num_nodes"] > 1:
        ranks = devices_here()
    else:
        ranks, variables = _ranks_alone(_configure(run, changes, resume)), loopback_environment()
    arguments = [*([str(run)] if run else []), *more]
    for change in changes:
        arguments += ["--set", change]
    if resume:
        arguments += ["--resume", str(resume)]
    typer.echo(f"starting {ranks} rank{'s' if ranks > 1 else ''} on this machine")
    with tempfile.TemporaryDirectory(prefix="thinwire-") as results:
        code = launch(Nodes(ranks_per_node=ranks, **where), arguments, variables | {"THINWIRE_RESULTS": results})
        run_folder = Path(results) / "run_folder"
        if run_folder.is_file():
            folder = Path(run_folder.read_text(encoding="utf-8"))
            if probed is not None:
                shutil.copy(probed, folder / "cluster.toml")
            conclude(folder)
            if planned is not None and (line := planned.saved(folder)):
                typer.echo(line)
    return code


def _ranks_alone(config: "RunConfig") -> int:
    """How many to start where this is the only machine. UserError if it has not the memory."""
    from thinwire.cluster import load_cluster
    from thinwire.measure.memory import Room, free_memory, has_gpu
    from thinwire.plan.fitting import check, leaner
    from thinwire.plan.memory import need

    ranks = config.train.ranks or (load_cluster(config.cluster.file).world_size if config.cluster.file else 2)
    layout = config.laid_out(ranks)
    if layout.pipe > 1:
        from thinwire.parallel.schedules import orders

        orders(config.pipeline.schedule, layout.pipe, config.pipeline.per_rank, config.sync.accumulate)
    if config.train.backend == "mpi":
        raise UserError(f"train.backend = 'mpi': ranks that talk over MPI are started by mpiexec -n {ranks} thinwire train ...")
    if config.task.is_language_model and (free := free_memory()) and not has_gpu():  # ranks look at their GPUs
        shape, casts = config.model.shape(), config.train.dtype == "bfloat16"
        room = Room("this machine", ranks, free.bytes)
        check(need(config, shape, layout, casts=casts), [room], leaner(config, shape, layout, casts=casts))
    return ranks
