"""`thinwire collectives`: which algorithm a collective should take on a network, and why; the settings for NCCL."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.files import check_folders, write_json, write_text
from thinwire.errors import UserError
from thinwire.units import parse, show

if TYPE_CHECKING:
    from thinwire.collectives.choose.select import Selection

app = typer.Typer(help="Collectives that fit the network: which one, and why.", no_args_is_help=True)

LINKS_SHOWN = 6


@app.command()
def explain(  # noqa: PLR0913 - each is an option of the command line
    op: Annotated[str, typer.Option(help="all_reduce, reduce_scatter, all_gather, broadcast, reduce or all_to_all.")],
    size: Annotated[str, typer.Option("--bytes", metavar="SIZE", help="E.g. 25M or 4MiB. all_gather: what one rank gives.")],
    cluster: Annotated[str | None, typer.Option(help="A cluster file, or the name of a shipped one.")] = None,
    ranks: Annotated[str | None, typer.Option(metavar="A,B-C", help="The group; by default all.")] = None,
    root: Annotated[int, typer.Option(help="Of a broadcast or reduce: its place in the group.")] = 0,
    cores_shared: Annotated[float, typer.Option(min=1, help="Ranks for each core; in a lab there are several.")] = 1.0,
    draw: Annotated[Path | None, typer.Option(metavar="F.svg", help="Draw it on the cluster.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Print who sends which chunk to whom, step by step.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
    topology: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of a cluster: a matrix (.json, .csv) or NCCL's .xml.")
    ] = None,
    cpu_gbytes_per_s: Annotated[float | None, typer.Option(help="Between two CPUs of an NCCL topology.")] = None,
    pcie_gbytes_per_s: Annotated[float | None, typer.Option(help="Of its PCIe links of unknown speed.")] = None,
    nvlink_gbytes_per_s: Annotated[float | None, typer.Option(help="Of one NVLink of a GPU that NCCL does not know.")] = None,
    xgmi_gbytes_per_s: Annotated[float | None, typer.Option(help="Of one xGMI link of a GPU that RCCL does not know.")] = None,
) -> None:
    """Say which algorithm fits a network: what it sends over which link, predicted seconds, the bound, and the next best."""
    if (cluster is None) == (topology is None):
        raise UserError("give one of --cluster and --topology")
    message_bytes = _bytes(size)
    rates = {
        "cpu_gbytes_per_s": cpu_gbytes_per_s,
        "pcie_gbytes_per_s": pcie_gbytes_per_s,
        "nvlink_gbytes_per_s": nvlink_gbytes_per_s,
        "xgmi_gbytes_per_s": xgmi_gbytes_per_s,
    }
    if topology is not None:
        others = {"--ranks": ranks, "--draw": draw, "--json": json_path, "--table": table}
        given = [name for name, value in others.items() if value]
        if given:
            raise UserError(f"{given[0]} is for a --cluster; of a --topology the optimum and its trees are shown")
        _explain_topology(topology, (op, message_bytes, root), rates)
        return
    if given := [name for name, rate in rates.items() if rate is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is for a --topology; a cluster file has all rates")
    check_folders(draw, json_path)

    from thinwire.cluster import load_cluster
    from thinwire.collectives.choose.call import collective_call
    from thinwire.collectives.choose.costs import Costs
    from thinwire.collectives.choose.explain import as_dict, schedule_of
    from thinwire.collectives.choose.select import choose
    from thinwire.collectives.schedules.table import to_text

    assert cluster is not None
    group = collective_call(load_cluster(cluster), op, message_bytes, _ranks(ranks), root)
    selection = choose(group, Costs(cores_shared=cores_shared))
    _show(selection)
    if table:
        schedule = schedule_of(selection)
        typer.echo("the schedule has too many messages to print" if schedule is None else to_text(schedule))
    if draw:
        _draw(selection, draw)
    if json_path:
        write_json(json_path, as_dict(selection))


@app.command("nccl-csv")
def nccl_csv(
    measured: Annotated[Path, typer.Argument(help="JSON: a list of coll, bytes, algo, proto, nodes, ranks, seconds, ..")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
) -> None:
    """Write the file of NCCL's example tuner plugin from measurements: the fastest setting of each size that was measured."""
    from thinwire.collectives.nccl_csv import ranges, read_measured, to_csv

    try:
        text = measured.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{measured}: cannot be read: {error}") from None
    try:
        lines = ranges(read_measured(text))
    except UserError as error:
        raise UserError(f"{measured}: {error}") from None
    write_text(output, to_csv(lines))
    typer.echo(f"wrote {output}: {len(lines)} ranges")


def _bytes(text: str) -> int:
    """25M is 25 MB; whole bytes only."""
    value = parse(text if re.search(r"[B\d.\s]$", text) else f"{text}B", "B")
    if value < 1 or value != int(value):
        raise UserError(f"--bytes {text}: that is {value:g} bytes; give a whole number, 1 or more")
    return int(value)


def _ranks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})(?:-(\d{1,7}))?\s*", part)
        own = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not own:
            raise UserError(f"--ranks {text!r}: {part!r} is no rank; e.g. 0,2,4-7")
        found += own
    return found


def _show(selection: "Selection") -> None:
    from rich.console import Console
    from rich.table import Table

    from thinwire.collectives.choose.explain import fullest, lines
    from thinwire.collectives.price import link_seconds

    call, best = selection.call, selection.best
    what = f"{call.op} of {show(call.message_bytes, 'B')} among {call.p} ranks of {call.cluster.name}"
    rooted = f", root {call.root}" if call.op in ("broadcast", "reduce") else ""
    _print_lines(what + rooted, lines(selection))
    links = fullest(best)
    if not links:
        return
    grid = Table("link", "rate", "payload", "busy")
    for column in grid.columns[1:]:
        column.justify = "right"
    for link, size in links[:LINKS_SHOWN]:
        busy = f"{link_seconds(link, size) / best.seconds:.0%}"
        grid.add_row(f"{link.source} -> {link.target}", show(link.bandwidth_bps.value, "bit/s"), show(size, "B"), busy)
    console = Console()
    console.print(grid)
    if len(links) > LINKS_SHOWN:
        console.print(f"and {len(links) - LINKS_SHOWN} links that are less busy, or as much", markup=False, highlight=False)


def _print_lines(title: str, lines: list[tuple[str, str]]) -> None:
    typer.echo(title)
    width = max(len(name) for name, _ in lines)
    for name, words in lines:
        typer.echo(f"  {name:<{width}}  {words}")


def _draw(selection: "Selection", path: Path) -> None:
    from thinwire.report.schedule import schedule_svg

    call, best = selection.call, selection.best
    if best.run is None:
        raise UserError(f"--draw: {call.p} ranks exchange too many messages to draw; give fewer --ranks")
    title = f"{call.op}, {show(call.message_bytes, 'B')}: {best.candidate.title}, {show(best.seconds, 's')}"
    write_text(path, schedule_svg(call.cluster, title, best.run))
    typer.echo(f"wrote {path}")


def _explain_topology(path: Path, call: tuple[str, int, int], rates: dict[str, float | None]) -> None:
    from thinwire.collectives.synthesis.file import read_topology
    from thinwire.collectives.synthesis.summary import summary

    graph = read_topology(path, **rates)
    op, message_bytes, root = call
    if not 0 <= root < graph.world_size:
        raise UserError(f"root = {root}, but {path} has ranks 0 to {graph.world_size - 1}")
    _print_lines(f"{op} on {path}", summary(graph, op, message_bytes, root))
