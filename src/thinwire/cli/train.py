"""`thinwire train`: started alone it starts its ranks; started by torchrun, srun or mpiexec it is one of them."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from thinwire.config.run import RunConfig
    from thinwire.train.runtime import Surroundings


def train(
    run: Annotated[Path | None, typer.Argument(help="run.toml; without it, a 1M model on the standard library's sources.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key: train.steps=50.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run folder to go on with, from its last checkpoint.")] = None,
) -> None:
    """Train a model; print and record predicted and measured times and bytes."""
    from thinwire.train.runtime import read_surroundings

    surroundings = read_surroundings()
    if surroundings.place is None:
        raise typer.Exit(_launch(run, changes or [], resume))
    _work(surroundings, run, changes or [], resume)


def _configure(run: Path | None, changes: list[str], resume: Path | None) -> "RunConfig":
    from thinwire.config.run import load_run
    from thinwire.errors import UserError

    if resume is not None and run is not None:
        raise UserError(f"--resume {resume} goes on with that folder's run.toml; leave out {run} and use --set for changes")
    if resume is not None and not (resume / "run.toml").is_file():
        raise UserError(f"--resume {resume}: this is not a run folder; there is no run.toml in it")
    return load_run(resume / "run.toml" if resume else run, changes)


def _launch(run: Path | None, changes: list[str], resume: Path | None) -> int:
    """Start the ranks on this machine, then print the table and write the report."""
    from thinwire.cli.conclude import conclude
    from thinwire.cluster import load_cluster

    config = _configure(run, changes, resume)
    ranks = config.train.ranks or (load_cluster(config.cluster.file).world_size if config.cluster.file else 2)
    config.layout.resolve(ranks)

    from thinwire.train.agent import Nodes, launch
    from thinwire.train.runtime import loopback_environment

    arguments = [str(run)] if run else []
    for change in changes:
        arguments += ["--set", change]
    if resume:
        arguments += ["--resume", str(resume)]
    with tempfile.TemporaryDirectory(prefix="thinwire-") as results:
        code = launch(Nodes(ranks_per_node=ranks), arguments, loopback_environment() | {"THINWIRE_RESULTS": results})
        told = Path(results) / "run_folder"
        if told.is_file():
            conclude(Path(told.read_text(encoding="utf-8")))
    return code


def _work(surroundings: "Surroundings", run: Path | None, changes: list[str], resume: Path | None) -> None:
    """Be one rank. Whatever goes wrong becomes one line, for the launcher if it listens."""
    from thinwire.errors import UserError
    from thinwire.train.failure import failure_line, write_error_file

    try:
        config = _configure(run, changes, resume)
        from thinwire.train.worker import work

        work(config, surroundings, resume)
    except Exception as error:
        line = failure_line(error, surroundings.place)
        if surroundings.error_file:
            write_error_file(surroundings.error_file, line, isinstance(error, UserError))
        else:
            print(f"thinwire: error: {line}", file=sys.stderr, flush=True)
        # Not through the interpreter's end: a broken process group may wait there for peers that are gone.
        _leave(2 if isinstance(error, UserError) else 1)


def _leave(code: int) -> None:
    import os

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
