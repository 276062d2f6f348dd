"""`thinwire why`: two nodes are slower than one, and the script knows nothing of thinwire: why?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.bench import PIPED_COLUMNS
from thinwire.cli.files import check_folders, write_json
from thinwire.cli.rank import leave

if TYPE_CHECKING:
    from thinwire.why.causes import Case


def why(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT ARGS...", help="As after torchrun: the script, then its arguments.")],
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    steps: Annotated[int, typer.Option(min=4, help="Of the script, metered.")] = 20,
    warm_up: Annotated[int, typer.Option(min=1, help="Its first steps, left out.")] = 5,
    stop: Annotated[bool, typer.Option("--stop", help="End the script after the verdict; else it goes on.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all that was found here, on the first rank.")] = None,
) -> None:
    """Run a script that knows nothing of thinwire, and say why its steps are slow.

    On each rank: torchrun ... --no-python thinwire why train.py ARGS
    """
    check_folders(json_path)

    from thinwire.why.session import Wanted, explain_script

    def conclude(case: "Case") -> None:
        from rich.console import Console

        from thinwire.why.text import as_record, as_text, judge

        verdict = judge(case)
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, PIPED_COLUMNS)
        console.print(as_text(verdict))
        if json_path:
            write_json(json_path, as_record(verdict))

    wanted = Wanted(warm_up=warm_up, steps=steps, conclude=conclude, stop=(lambda: leave(0)) if stop else None)
    explain_script(script, arguments or [], wanted)
