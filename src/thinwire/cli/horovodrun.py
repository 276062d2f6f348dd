"""`thinwire horovodrun -np 4 python train.py`: ranks of a program on this machine, as Horovod's command line starts them."""

import re
import socket
from pathlib import Path
from typing import Annotated

import typer

from thinwire.errors import UserError

IN_ORDER = {"allow_interspersed_args": False}
"""Options behind the program are the program's."""
HERE = ("localhost", "127.0.0.1", "::1")


def horovodrun(
    program: Annotated[list[str], typer.Argument(metavar="PROGRAM", help="And its arguments: python train.py --epochs 3.")],
    num_proc: Annotated[int, typer.Option("-np", "--num-proc", min=1, help="How many ranks.")],
    hosts: Annotated[
        str, typer.Option("-H", "--hosts", metavar="HOST:SLOTS,...", help="This machine, with room for so many.")
    ] = "",
    hostfile: Annotated[Path | None, typer.Option("-hostfile", "--hostfile", help="The same, a line each: HOST slots=N.")] = None,
    timeline: Annotated[Path | None, typer.Option("--timeline-filename", help="Where rank 0 records a trace.")] = None,
    cycles: Annotated[bool, typer.Option("--timeline-mark-cycles", help="With a mark for each announcement.")] = False,
) -> None:
    """Start the ranks of a program that speaks Horovod's API, on this machine."""
    if hosts and hostfile:
        raise UserError("-H and --hostfile both say where ranks run; leave one of them out")
    slots = _read_file(hostfile) if hostfile else _read(hosts.split(","), r"(?P<host>[^\s:]+):(?P<slots>\d+)") if hosts else {}
    here = (*HERE, socket.gethostname())
    if elsewhere := [host for host in slots if host not in here]:
        raise UserError(
            f"{elsewhere[0]} is another machine, on which nothing is started from here; on each one give torchrun "
            f"--nnodes {len(slots)} --node-rank I --nproc-per-node N --rdzv-endpoint HOST:PORT {' '.join(program)}"
        )
    if slots and num_proc > sum(slots.values()):
        raise UserError(f"-np {num_proc}: there is room for {sum(slots.values())} ranks; raise the slots or lower -np")

    from thinwire.environment import environment_variables, loopback_environment

    with environment_variables({"TORCH_CPP_LOG_LEVEL": "ERROR"}):  # which torch reads when it is loaded
        from thinwire.train.agent import Nodes, launch_program

    variables = loopback_environment()
    if timeline is not None:
        variables["HOROVOD_TIMELINE"] = str(timeline.absolute())
    if cycles:
        variables["HOROVOD_TIMELINE_MARK_CYCLES"] = "1"
    raise typer.Exit(launch_program(Nodes(ranks_per_node=num_proc), program, variables))


def _read_file(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--hostfile {path}: cannot be read: {error}") from None
    written = [line for line in (line.partition("#")[0].strip() for line in lines) if line]
    return _read(written, r"(?P<host>\S+)\s+slots\s*=\s*(?P<slots>\d+)")


def _read(texts: list[str], form: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        if not (match := re.fullmatch(form, text)):
            raise UserError(f"{text!r} names no host with its slots; write HOST:SLOTS for -H, HOST slots=N in a file")
        found[match["host"]] = found.get(match["host"], 0) + int(match["slots"])
    return found
