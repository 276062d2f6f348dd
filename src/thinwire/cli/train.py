"""`thinwire train`: started alone it starts its ranks; started by torchrun, srun or mpiexec it is one of them."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.rank import BIND, be_rank
from thinwire.cli.report import conclude
from thinwire.errors import UserError

if TYPE_CHECKING:
    from thinwire.config.run import RunConfig


def train(
    run: Annotated[Path | None, typer.Argument(help="run.toml; without it, a small model on the standard library.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key: train.steps=50.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run folder to go on with, from its last checkpoint.")] = None,
    bind: Annotated[str, typer.Option(metavar="ADDRESS", help=BIND)] = "",
) -> None:
    """Train a model; print and record predicted and measured times and bytes."""
    from thinwire.environment import environment_variables, read_environment

    environment = read_environment()
    place = environment.place
    if place is None:
        raise typer.Exit(_launch(run, changes or [], resume, bind))

    def train_as_rank() -> None:
        config = _configure(run, changes or [], resume)
        from thinwire.train.worker import work

        outcome = work(config, environment, resume, bind)
        if environment.results is None and place.rank == 0:  # nobody else waits for the run folder
            conclude(outcome.folder)

    with environment_variables({"TORCH_CPP_LOG_LEVEL": "ERROR"}):  # an error is one line
        be_rank(environment, train_as_rank)


def _configure(run: Path | None, changes: list[str], resume: Path | None) -> "RunConfig":
    from thinwire.config.run import load_run

    if resume is not None and run is not None:
        raise UserError(f"--resume {resume} goes on with that folder's run.toml; leave out {run} and use --set for changes")
    if resume is not None and not (resume / "run.toml").is_file():
        raise UserError(f"--resume {resume}: this is not a run folder; there is no run.toml in it")
    return load_run(resume / "run.toml" if resume else run, changes)


def _launch(run: Path | None, changes: list[str], resume: Path | None, bind: str) -> int:
    """Start the ranks on this machine, then print the table and write the report."""
    from thinwire.cluster import load_cluster

    config = _configure(run, changes, resume)
    ranks = config.train.ranks or (load_cluster(config.cluster.file).world_size if config.cluster.file else 2)
    layout = config.layout.resolve(ranks, rare=config.sync.rare)
    if config.train.backend == "mpi":
        raise UserError(f"train.backend = 'mpi': ranks that talk over MPI are started by mpiexec -n {ranks} thinwire train ...")

    from thinwire.measure.memory import Room, free_memory, has_gpu
    from thinwire.plan.memory import check, need

    if (free := free_memory()) and not has_gpu():  # ranks look at their GPUs
        check(
            need(config, config.model.shape(), layout, casts=config.train.dtype == "bfloat16"),
            [Room("this machine", ranks, free.bytes)],
        )

    from thinwire.environment import loopback_environment
    from thinwire.train.agent import Nodes, launch

    arguments = [str(run)] if run else []
    for change in changes:
        arguments += ["--set", change]
    if resume:
        arguments += ["--resume", str(resume)]
    typer.echo(f"starting {ranks} ranks on this machine")
    with tempfile.TemporaryDirectory(prefix="thinwire-") as results:
        code = launch(Nodes(ranks_per_node=ranks, bind=bind), arguments, loopback_environment() | {"THINWIRE_RESULTS": results})
        run_folder = Path(results) / "run_folder"
        if run_folder.is_file():
            conclude(Path(run_folder.read_text(encoding="utf-8")))
    return code
