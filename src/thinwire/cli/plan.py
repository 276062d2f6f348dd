"""`thinwire plan`: the layouts, exchanges and batches that train a model soonest on a cluster, and why."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.files import check_folders, write_json
from thinwire.cli.plan_loop import learn_from, rewire, simulate_plan, try_plans
from thinwire.errors import UserError
from thinwire.units import parse, show

if TYPE_CHECKING:
    from thinwire.plan.explain import Explained
    from thinwire.plan.price import Priced

QUIET_S = 2.0
SCALES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def plan(  # noqa: PLR0913 - each is an option of the command line
    cluster: Annotated[
        str, typer.Option(help="A cluster file, a shipped name, or HOSTSxDEVICESxKIND@LINK: 4x8xa100-80gb@1Gbit/s.")
    ] = "",
    model: Annotated[str, typer.Option(help="A preset: 124M, 1B, 7B; else the run's.")] = "",
    tokens: Annotated[str, typer.Option(help="Of the run: 2.5B; else those of train.steps.")] = "",
    batch: Annotated[str, typer.Option(help="Tokens of a step: 0.5M; else the run's, or usual ones.")] = "",
    run: Annotated[Path | None, typer.Option(help="A run.toml whose model and data are planned for.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Keep a key: sync.kind=diloco.")] = None,
    top: Annotated[int, typer.Option(min=1, help="So many plans are shown.")] = 8,
    price: Annotated[float, typer.Option(min=0, help="Dollars of a device and hour.")] = 0.0,
    penalties: Annotated[bool, typer.Option(help="Count the tokens that rare exchanges, codes and batches cost.")] = True,
    beyond: Annotated[bool, typer.Option("--beyond", help="Also what thinwire train cannot launch: ZeRO.")] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Also how long messages of the plan wait for links.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="RUN.toml", help="Write the best plan for thinwire train.")] = None,
    export: Annotated[str, typer.Option(metavar="TARGET", help="Print it for torchrun, torchtitan, megatron or deepspeed.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the numbers here.")] = None,
    ports: Annotated[int, typer.Option(min=0, help="Of an optical switch at each host: choose the cables with the plan.")] = 0,
    simulate: Annotated[float, typer.Option(min=0, metavar="DAYS", help="Simulate so many days, with failures.")] = 0.0,
    churn: Annotated[str, typer.Option(metavar="STAY/AWAY", help="Also replicas that come and go: 2h/1h.")] = "",
    trials: Annotated[int, typer.Option(min=0, metavar="N", help="Try so many of the best plans, and keep the winner.")] = 0,
    learn: Annotated[list[Path] | None, typer.Option(metavar="RUN", help="Learn from a run folder; may be given often.")] = None,
) -> None:
    """Plan: which layout, exchange and batch train a model soonest on a cluster, and why."""
    check_folders(write, json_path)
    from dataclasses import replace

    from thinwire.environment import read_environment
    from thinwire.plan import calibration

    stored = read_environment().cache_folder / calibration.FILE
    if learn:
        learn_from(learn, stored)
        if not cluster and not run:
            return
    from thinwire.config.run import dump_run
    from thinwire.plan.explain import explain
    from thinwire.plan.problem import about, planned_run, problem_of
    from thinwire.plan.search import search

    found = problem_of(run, changes or [], cluster, model, None, _count("--batch", batch) if batch else 0.0)
    if found.rates is not None:
        from thinwire.train.outline import outline  # which loads torch

        found = replace(found, outline=outline)
    found, learnt = calibration.read(stored).applied(found)
    problem = replace(
        found,
        tokens=_count("--tokens", tokens) if tokens else found.tokens,
        penalties=penalties,
        beyond=beyond,
        dollars_per_hour=price,
    )
    if ports:
        problem = rewire(problem, ports)
    tell = Progress()
    explained = explain(problem, search(problem, tell), tell=tell)
    typer.echo(about(problem, explained.found.considered))
    if learnt:
        typer.echo(learnt)
    _table(explained, top, money=price > 0)
    for line in explained.lines():
        typer.echo(line)
    queues = _queues(explained, top) if queue else []
    if simulate or churn:
        simulate_plan(explained, simulate or 30.0, churn)
    where = cluster or problem.config.cluster.file
    where = str(Path(where).resolve()) if Path(where).is_file() else where
    best, config = explained.best, None
    if trials and ports:
        raise UserError("--trials run on the links that there are, not on those of --ports; leave one of them out")
    if trials:
        best, config = try_plans(explained, where, trials, stored)
    if write is not None:
        dump_run(config or planned_run(best, problem, where), write)
        typer.echo(f"wrote {write}: thinwire train {write}")
    if export:
        from thinwire.plan.export import exported

        typer.echo(exported(export, best, problem, str(write or "run.toml")))
    if json_path is not None:
        write_json(json_path, explained.as_json() | ({"queues": queues} if queue else {}))


class Progress:
    """A line on a terminal, from two seconds on."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - self._told > QUIET_S:
            self._told = time.monotonic()
            print(f"thinwire: planning, {done} of {of} layouts and batches", file=sys.stderr, flush=True)


def _count(option: str, text: str) -> float:
    scale = SCALES.get(text[-1:], 0.0) if not text[-1:].isdigit() else 1.0
    try:
        value = scale * parse(text[:-1] if text[-1:] in SCALES else text, "")
    except UserError:
        value = 0.0
    if value <= 0:
        raise UserError(f"{option} {text}: write a number of tokens, as 2.5B, 300M or 1e9")
    return value


def _table(explained: "Explained", top: int, *, money: bool) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from thinwire.plan.explain import family, show_time

    ranking = explained.found.ranking
    ranking = (explained.best, *ranking)
    shown: dict[tuple[object, ...], Priced] = {}
    for one in ranking:
        shown.setdefault(family(one), one)
    grid = Table(box=SIMPLE, pad_edge=False)
    grid.add_column("plan: .., micro-batches x sequences", max_width=60)
    for heading in ("a step", "in all", "tokens", "memory", "sent a token", *["dollars"] * money):
        grid.add_column(heading, justify="right", no_wrap=True)
    for one in list(shown.values())[:top]:
        more = 1.0
        for factor in one.penalties.values():
            more *= factor
        cells = [
            str(one.candidate),
            show(one.step_s, "s"),
            show_time(one.time_s),
            f"x {more:.2f}",
            show(one.memory_bytes, "B"),
            show(one.wire_bytes / one.tokens_per_step, "B"),
        ]
        grid.add_row(*cells, *[f"{one.dollars:,.0f}"] * money)
    Console().print(grid)


def _queues(explained: "Explained", top: int) -> list[dict[str, Any]]:
    """A table of the fullest links, and the servers that would do; returns the rows of all."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from thinwire.plan.queueing import of_plan, servers_of_plan

    rows = [queue.as_row() for queue in of_plan(explained.problem, explained.best)]
    grid = Table(box=SIMPLE, pad_edge=False)
    grid.add_column("link", no_wrap=True)
    headings = ("senders", "messages a second", "each takes", "in use", "wait if sent at once", "if not", "number waiting")
    for heading in headings:
        grid.add_column(heading, justify="right")
    for together, apart in list(zip(rows[::2], rows[1::2], strict=True))[:top]:
        cells = [str(together["sources"]), f"{together['arrivals_per_s']:.3g}", show(together["service_s"], "s")]
        cells += [f"{together['utilisation']:.1%}", show(together["waiting_s"], "s"), show(apart["waiting_s"], "s")]
        grid.add_row(together["queue"], *cells, f"{together['number_waiting']:.3g}")
    Console().print(grid)
    try:
        servers = servers_of_plan(explained.problem, explained.best)
        typer.echo(f"parameter servers instead: {len(servers)}, at which a push waits {show(servers[0].waiting_s, 's')}")
    except UserError as error:
        typer.echo(f"parameter servers instead: {error}")
    return rows
