"""`thinwire probe`: measure the network and the machines that it is started on, and write a cluster file."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.cli.rank import BIND, USER_ERROR, be_rank, leave
from thinwire.errors import UserError

if TYPE_CHECKING:
    from thinwire.environment import Environment
    from thinwire.measure.findings import Findings
    from thinwire.train.failure import Failure

HOW_TO_START = (
    "a probe measures between ranks, so start it on every machine: "
    "torchrun --nnodes N --node-rank I --master-addr HOST0 --master-port 29500 --no-python thinwire probe -o cluster.toml, "
    "or srun / mpiexec thinwire probe -o cluster.toml, or thinwire lab run --cluster C -- thinwire probe -o cluster.toml"
)


def probe(
    output: Annotated[Path, typer.Option("--output", "-o", help="The cluster file to write.")],
    name: Annotated[str | None, typer.Option(help="The cluster's name; by default that of the file.")] = None,
    dtype: Annotated[str, typer.Option(help="For the compute rate: float32, bfloat16 or auto.")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all that was found here.")] = None,
    timeout_s: Annotated[float, typer.Option(help="How long ranks wait for each other.")] = 60.0,
    bind: Annotated[str, typer.Option(metavar="ADDRESS", help=BIND)] = "",
) -> None:
    """Measure links, shared uplinks, racks, compute and memory of the ranks it is started on; write a cluster file.

    Started by torchrun, srun, mpiexec or the lab, once for each device.
    """
    from thinwire.environment import read_environment

    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype!r}: allowed are auto, float32, bfloat16")
    environment = read_environment()
    if environment.place is None or environment.place.world_size < 2:
        raise UserError(HOW_TO_START)
    who = f"rank {environment.place.rank}"

    def reword(failure: "Failure") -> "Failure":
        if failure.kind == "lost":
            return replace(
                failure, line=f"{who} lost the connection to another rank in the middle of the probe; nothing was written"
            )
        if failure.kind == "timeout":
            return replace(failure, line=f"{who} waited {timeout_s:g} s for another rank; raise --timeout-s if it is only slow")
        return failure

    be_rank(environment, lambda: _work(environment, (output, json_path), name or output.stem, (dtype, timeout_s, bind)), reword)


def _work(environment: "Environment", files: tuple[Path, Path | None], name: str, how: tuple[str, float, str]) -> None:
    from thinwire.collectives.address import address_of_default_group
    from thinwire.measure.compute import shared_gpus
    from thinwire.measure.gather import gather
    from thinwire.measure.probe import measure
    from thinwire.train.runtime import process_group

    place = environment.place
    assert place is not None
    dtype, timeout_s, bind = how
    with process_group(place, "gloo", timeout_s, bind):
        problem = gather(_not_writable(files) if place.rank == 0 else None)[0]
        if problem and place.rank == 0:
            raise UserError(problem)
        if problem:
            leave(USER_ERROR)
        number, ranks_here = environment.here
        if place.rank == 0 and (line := shared_gpus(ranks_here)):
            print(line, flush=True)
        findings = measure(number, address_of_default_group(), dtype, lambda line: print(line, flush=True))
        if place.rank == 0:
            _conclude(findings, files, name, paced=bool(environment.lab and environment.lab.paced))


def _conclude(findings: "Findings", files: tuple[Path, Path | None], name: str, *, paced: bool) -> None:
    """Write the files, print the table and what stands out."""
    from rich.console import Console

    from thinwire.cluster import dump_cluster
    from thinwire.measure.findings import sentences, table, to_cluster

    output, json_path = files
    dump_cluster(to_cluster(findings, name), output)
    if json_path:
        stands_out = {"slow_hosts": [host.name for host, _, _ in findings.slow_hosts()], "sentences": sentences(findings)}
        json_path.write_text(json.dumps({**asdict(findings), **stands_out}, indent=1) + "\n", encoding="utf-8")
    Console().print(table(findings))
    for line in sentences(findings):
        print(line)
    if paced:
        print("in the lab all hosts share this machine: training is paced to the declared compute rate, the probe is not")
    print(f"wrote {output}", flush=True)


def _not_writable(files: tuple[Path, Path | None]) -> str | None:
    """What is wrong with the files, known before anything is measured."""
    for path in files:
        if path is None:
            continue
        existed = path.exists()
        try:
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            return f"{path} cannot be written: {error.strerror}; give another file with -o"
        if not existed:
            path.unlink()
    return None
