"""`thinwire why`: two nodes are slower than one, and the script knows nothing of thinwire: why?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.bench import PIPED_COLUMNS
from thinwire.cli.files import check_folders, write_json
from thinwire.cli.rank import leave
from thinwire.errors import UserError

if TYPE_CHECKING:
    from thinwire.why.causes import Case


def why(  # noqa: PLR0913 - each is an option of the command line
    script: Annotated[Path | None, typer.Argument(metavar="SCRIPT ARGS...", help="As after torchrun.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    steps: Annotated[int, typer.Option(min=4, help="Of the script, metered.")] = 20,
    warm_up: Annotated[int, typer.Option(min=1, help="Its first steps, left out.")] = 5,
    stop: Annotated[bool, typer.Option("--stop", help="End the script after the verdict; else it goes on.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all that was found here, on the first rank.")] = None,
    attach_json: Annotated[
        list[Path] | None,
        typer.Option(metavar="TRACE.json", help="No script: what torch.profiler wrote on GPUs, of one rank or of each."),
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="With --attach-json: a cluster file, or the name of a shipped one.")] = None,
) -> None:
    """Run a script that knows nothing of thinwire, and say why its steps are slow.

    On each rank: torchrun ... --no-python thinwire why train.py ARGS
    """
    check_folders(json_path)
    if attach_json:
        if script or not cluster:
            raise UserError("--attach-json needs a --cluster, on which the ranks of the traces ran, and takes no script")
        _show(_attached(attach_json, cluster), json_path)
        return
    if script is None or cluster:
        raise UserError("give a script: torchrun ... --no-python thinwire why train.py ARGS; --cluster is for --attach-json")

    from thinwire.why.session import Wanted, explain_script

    ended = (lambda: leave(0)) if stop else None
    explain_script(script, arguments or [], Wanted(warm_up, steps, lambda case: _show(case, json_path), ended))


def _attached(paths: list[Path], cluster: str) -> "Case":
    from thinwire.cluster import load_cluster
    from thinwire.why.causes import Case
    from thinwire.why.kineto import read_traces
    from thinwire.why.steps import profile

    network, (traces, offsets_s) = load_cluster(cluster), read_traces(paths)
    if network.world_size != len(traces):
        raise UserError(f"{network.name} has {network.world_size} ranks, the traces are of {len(traces)}")
    return Case(profile(traces, offsets_s), network)


def _show(case: "Case", json_path: Path | None) -> None:
    from rich.console import Console

    from thinwire.why.text import as_record, as_text, judge

    verdict = judge(case)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPED_COLUMNS)
    console.print(as_text(verdict))
    if json_path:
        write_json(json_path, as_record(verdict))
