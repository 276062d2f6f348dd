"""`thinwire probe`: measure the network and the machines that it is started on, and write a cluster file."""

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from thinwire.measure.findings import Findings
    from thinwire.train.runtime import Surroundings

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
) -> None:
    """Measure links, shared uplinks, racks, compute and memory of the ranks it is started on; write a cluster file.

    Started by torchrun, srun, mpiexec or the lab, once for each device.
    """
    from thinwire.errors import UserError
    from thinwire.train.runtime import read_surroundings

    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype!r}: allowed are auto, float32, bfloat16")
    surroundings = read_surroundings()
    if surroundings.place is None or surroundings.place.world_size < 2:
        raise UserError(HOW_TO_START)
    _run(surroundings, (output, json_path), name or output.stem, (dtype, timeout_s))


def _run(surroundings: "Surroundings", files: tuple[Path, Path | None], name: str, how: tuple[str, float]) -> None:
    """Be one rank. Whatever goes wrong becomes one line, for the launcher if it listens."""
    from thinwire.train.failure import Failure, explain, write_error_file

    try:
        _work(surroundings, files, name, how)
    except Exception as error:
        failure = explain(error, surroundings.place)
        who = f"rank {surroundings.place.rank}" if surroundings.place else "this rank"
        if failure.kind == "lost":
            failure = Failure(
                "lost", f"{who} lost the connection to another rank in the middle of the probe; nothing was written"
            )
        if failure.kind == "timeout":
            failure = Failure("timeout", f"{who} waited {how[1]:g} s for another rank; raise --timeout-s if it is only slow")
        if surroundings.error_file:
            write_error_file(surroundings.error_file, failure)
        print(f"thinwire: error: {failure.line}", file=sys.stderr, flush=True)
        _leave(2 if failure.kind == "user" else 1)


def _work(surroundings: "Surroundings", files: tuple[Path, Path | None], name: str, how: tuple[str, float]) -> None:
    from thinwire.errors import UserError
    from thinwire.measure.probe import Seat, gather, measure
    from thinwire.train.runtime import process_group

    place = surroundings.place
    assert place is not None
    dtype, timeout_s = how
    with process_group(place, "gloo", timeout_s):
        problem = gather(_not_writable(files) if place.rank == 0 else None)[0]
        if problem and place.rank == 0:
            raise UserError(problem)
        if problem:
            _leave(2)
        seat = Seat(
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            host=socket.gethostname(),
            master_address=place.master_address,
            master_port=place.master_port,
        )
        findings = measure(seat, dtype, lambda line: print(line, flush=True))
        if place.rank == 0:
            _conclude(findings, files, name, paced=bool(surroundings.lab and surroundings.lab.paced))


def _conclude(findings: "Findings", files: tuple[Path, Path | None], name: str, *, paced: bool) -> None:
    """Write the files, print the table and what stands out."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from thinwire.cluster import dump_cluster
    from thinwire.measure.findings import to_cluster
    from thinwire.measure.show import sentences, table

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
    """Told before anything is measured."""
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


def _leave(code: int) -> None:
    """Not through the interpreter's end: a broken process group may wait there for peers that are gone."""
    import os

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
