"""`thinwire bench NAME`: ours and the peer in turns, in one run; a table in the terminal, flat rows in a file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from thinwire.cli.files import write_json

PIPED_COLUMNS = 220
"""Width of a table that nobody watches in a terminal."""


def bench(  # noqa: PLR0913 - each is an option of the command line
    name: Annotated[str, typer.Argument(help="Which: `thinwire bench list` names them.")],
    cluster: Annotated[str | None, typer.Option(help="A cluster file, or the name of a shipped one.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of this benchmark.")] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Option `methods`: names, with commas between.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Option `seeds`: how many.")] = None,
    target: Annotated[float | None, typer.Option(help="Option `target`: time to the loss at this part of ddp's tokens.")] = None,
    unshaped: Annotated[bool, typer.Option("--unshaped", help="Adds `unshaped` to the links.")] = False,
    links: Annotated[str | None, typer.Option(metavar="A,B", help="Option `links`, e.g. '1 Mbit/s,unshaped'.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Option `tasks` of applications and equality: kinds.")] = None,
    cells: Annotated[str | None, typer.Option(metavar="A,B", help="Option `cells` of regret: parts of their names.")] = None,
    measurements: Annotated[Path | None, typer.Option(help="Option `measurements` of plan: a folder of tables.")] = None,
) -> None:
    """Measure on this machine and compare. Takes minutes."""
    from rich.console import Console

    from thinwire.bench import registry

    if name == "list":
        for known, about in registry.describe().items():
            typer.echo(f"{known:<8} {about}")
        return
    options: dict[str, Any] = registry.parse_options(changes or [])
    listed = {"methods": methods, "links": links, "tasks": tasks, "cells": cells}
    options |= {key: [part.strip() for part in text.split(",")] for key, text in listed.items() if text is not None}
    options |= {key: value for key, value in {"target": target, "seeds": seeds}.items() if value is not None}
    if measurements is not None:
        options["measurements"] = str(measurements)
    if unshaped:
        options.setdefault("links", []).append("unshaped")
    if name in registry.RESUMED and json_path is not None:
        options["json"] = str(json_path)
    rows = registry.find(name)(cluster, options)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPED_COLUMNS)
    for table in registry.tables(name, rows):
        console.print(table)
    if json_path is not None:
        write_json(json_path, {"bench": name, "machine": registry.machine(), "rows": rows})
