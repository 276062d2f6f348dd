"""`thinwire lab`: a cluster in a box, made of network namespaces with shaped links."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.files import write_text
from thinwire.cli.report import conclude
from thinwire.units import show

if TYPE_CHECKING:
    from thinwire.lab.run import LabResult

app = typer.Typer(help="A cluster in a box: namespaces with shaped links.", no_args_is_help=True)


@app.command()
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- CMD ARG...", help="What to run on the hosts.")],
    cluster: Annotated[str, typer.Option(help="A cluster file, or the name of a shipped one.")],
    no_delay: Annotated[bool, typer.Option("--no-delay", help="Go on without the declared latencies.")] = False,
    unpaced: Annotated[bool, typer.Option("--unpaced", help="Do not hold hosts to their declared compute.")] = False,
    stall: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:AT:FOR", help="No frame passes from or to HOST from AT on for FOR: host1:20:60 (seconds)."),
    ] = None,
    bare: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Hosts as Debian leaves them: own names are 127.0.1.1, no variable names a card, and no disk is shared: each "
            "finds its own FOLDER/HOST at FOLDER.",
        ),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the cards' counters here.")] = None,
) -> None:
    """Run a command on every host of a cluster: `thinwire train` once a host, any other command once a rank.

    Ends with each network card's own byte counters. Nothing is left behind, whatever ends it.
    """
    from thinwire.cluster import load_cluster
    from thinwire.lab.commands import processes_for
    from thinwire.lab.run import LabOptions, launch, prepare
    from thinwire.lab.stalls import Stall
    from thinwire.measure.memory import has_gpu
    from thinwire.record import Cards

    network = load_cluster(cluster)
    stalls = tuple(Stall.read(text) for text in stall or [])
    options = LabOptions(delay=not no_delay, paced=not unpaced, stalls=stalls, bare=bare is not None, disks=bare)
    processes = processes_for(network, command)
    prepared = prepare(network, options)
    for note in prepared[1].notes:
        typer.echo(f"thinwire: lab: {note}", err=True)
    if unpaced:
        typer.echo("thinwire: lab: compute is not paced; hosts that wait lend their cores to the others", err=True)
    size = f"{len(network.hosts)} hosts, {len(network.links)} links"
    typer.echo(f"lab: {network.name}, {size}; starting {len(processes)} processes (torch takes some seconds to load)")
    if has_gpu():
        from thinwire.measure.compute import shared_gpus

        if line := shared_gpus(network.world_size):
            typer.echo(f"lab: {line}")
    result = launch(network, processes, options, prepared)
    _show_cards(result)
    if result.run_folder and result.failure is None:
        conclude(result.run_folder)
    if json_path:
        write_text(json_path, Cards(cards=result.cards).model_dump_json(indent=1) + "\n")
    if result.failure:
        typer.echo(f"thinwire: error: {result.failure}", err=True)
    raise typer.Exit(result.exit_code)


def _show_cards(result: "LabResult") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("card", title=f"network cards, {show(result.seconds, 's')}", title_justify="left")
    for name in ("sent", "of its rate", "received", "of its rate"):
        table.add_column(name, justify="right")
    for card in result.cards:
        sent = show(card.sent_bytes, "B"), f"{card.sent_share:.1%}"
        table.add_row(f"{card.host} {card.interface}", *sent, show(card.received_bytes, "B"), f"{card.received_share:.1%}")
    Console().print(table)


@app.command()
def check(
    json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what this kernel can do for a lab, and what follows. Exit code 0 if a lab can be built."""
    from thinwire.lab import kernel as lab_kernel

    kernel = lab_kernel.examine()
    abilities = lab_kernel.check(kernel)
    if json_output:
        typer.echo(json.dumps({"reason": kernel.reason, "abilities": [asdict(ability) for ability in abilities]}))
        raise typer.Exit(1 if kernel.reason else 0)
    from rich.console import Console
    from rich.table import Table

    table = Table("ability", "here", "needed", "what follows")
    for ability in abilities:
        here = "[green]yes[/]" if ability.available else "[red]no[/]" if ability.needed else "no"
        table.add_row(ability.name, here, "yes" if ability.needed else "", ability.follows)
    Console().print(table)
    typer.echo(f"thinwire: error: {kernel.reason}" if kernel.reason else "a lab can be built here", err=bool(kernel.reason))
    raise typer.Exit(1 if kernel.reason else 0)
