"""The command `thinwire` and its sub-commands."""

import sys
from typing import Annotated

import typer

from thinwire import __version__
from thinwire.cli import collectives, lab, train
from thinwire.cli.bench import bench
from thinwire.cli.export import export
from thinwire.cli.generate import generate
from thinwire.cli.horovodrun import IN_ORDER, horovodrun
from thinwire.cli.plan import plan
from thinwire.cli.probe import probe
from thinwire.cli.replicas import replicas, serve
from thinwire.cli.report import report
from thinwire.cli.shrink import shrink
from thinwire.cli.tasks import evaluate, predict
from thinwire.cli.why import why
from thinwire.errors import UserError

USER_ERROR = 2

app = typer.Typer(
    name="thinwire",
    help="Train language models over networks that are too slow for it: measure, plan, train, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (train.train, plan, replicas, serve, probe, report, evaluate, predict, generate, export, shrink, bench):
    app.command()(command)
app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(why)
app.command(context_settings=IN_ORDER)(horovodrun)
app.add_typer(lab.app, name="lab")
app.add_typer(collectives.app, name="collectives")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"thinwire {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. A UserError is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"thinwire: error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except BrokenPipeError:
        sys.exit(1)
