"""`thinwire report RUN`, and the end of a training command: the table on the terminal, the page in the run folder."""

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of the table.")] = False,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Print predicted against measured, and write RUN/report.html."""
    path = _report(run, as_json=as_json)
    if browse:
        typer.launch(path.resolve().as_uri())


def conclude(run_folder: Path) -> None:
    """Print predicted beside measured, and write the report."""
    _report(run_folder, more=f"run folder: {run_folder}\n")


def _report(run: Path, more: str = "", as_json: bool = False) -> Path:
    from rich.console import Console

    from thinwire.record import RunFolder
    from thinwire.report import Facts, table, write_report
    from thinwire.report import as_json as numbers

    folder = RunFolder.open(run)
    facts = Facts(folder)
    path = write_report(folder)
    if as_json:
        typer.echo(json.dumps(numbers(facts), indent=1, ensure_ascii=False))
    else:
        console = Console()
        console.print(table(facts))
        console.print(f"{more}report: {path}", soft_wrap=True, markup=False, highlight=False)
    return path
