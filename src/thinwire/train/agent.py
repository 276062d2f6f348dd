"""Starts the ranks of this host and watches them: torchrun's agent, with one line for whatever goes wrong.

    python -m thinwire.train.agent --nnodes 4 --node-rank 2 --nproc-per-node 1 --rdzv-endpoint host0:29500 -- run.toml --set ...

is what a lab starts on each host; `thinwire train` launched alone calls `launch` with one node.
"""

import argparse
import logging
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from thinwire.collectives.store import open_store
from thinwire.environment import Place, environment_variables
from thinwire.errors import UserError
from thinwire.listening import LOOPBACK, parse_address
from thinwire.train.failure import KINDS, read_error

FAILED = 1
USER_ERROR = 2
RANK_DIED = 3
RANK_SILENT = 4
"""Exit codes: a rank failed (often because another one did), a mistake of the user, a rank died and left no report, a named rank
does not answer."""
CODES = {"user": USER_ERROR, "silent": RANK_SILENT}
MEET = "thinwire"
"""Our rendezvous, by name: those of torch listen at all addresses."""
JOIN_S = 120


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """How many agents there are, which one this is, and where they meet (host:port; "" on a single node: a free port).

    bind: the address at which the first one listens; "": as `open_store` says.
    """

    num_nodes: int = 1
    node_rank: int = 0
    ranks_per_node: int = 1
    endpoint: str = ""
    bind: str = ""

    @property
    def place(self) -> Place:
        """This agent among the agents. UserError for an endpoint that is none."""
        host, port = parse_address(self.endpoint, "--rdzv-endpoint") if self.endpoint else (LOOPBACK, 0)
        return Place(
            rank=self.node_rank, world_size=self.num_nodes, local_rank=0, master_address=host, master_port=port, local_size=1
        )


class _Meeting(RendezvousHandler):
    """The agents meet in one store, as of torch's static rendezvous, and their ranks in the same one; it ends with the first."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._nodes: Nodes = parameters.config["nodes"]

    def get_backend(self) -> str:
        return MEET

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        nodes = self._nodes
        store = open_store(nodes.place, JOIN_S, nodes.bind)
        where = RendezvousStoreInfo(store.host, store.port)
        return RendezvousInfo(dist.PrefixStore("agents", store), nodes.node_rank, nodes.num_nodes, where)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """It is not used again."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return MEET

    def shutdown(self) -> bool:
        return True


def devices_here() -> int:
    """Ranks that a machine starts by itself: one for each GPU, else one."""
    return torch.cuda.device_count() or 1


def launch(nodes: Nodes, arguments: list[str], variables: dict[str, str], command: str = "train") -> int:
    """Run `thinwire COMMAND ARGUMENTS` as the ranks of this node; returns the exit code. Prints one line when it is not 0."""
    program = [sys.executable, "-m", "thinwire", command, *arguments]
    return launch_program(nodes, program, variables, "; the last whole checkpoint is kept, go on with --resume")


def launch_program(nodes: Nodes, program: list[str], variables: dict[str, str], then: str = "") -> int:
    """As `launch`, of any program. then: what the line says of a rank that has died."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # each has a level of its own; one line below replaces their output
            logging.getLogger(name).setLevel(logging.CRITICAL)
    rendezvous_handler_registry.register(MEET, _Meeting)
    config = LaunchConfig(
        min_nodes=nodes.num_nodes,
        max_nodes=nodes.num_nodes,
        nproc_per_node=nodes.ranks_per_node,
        run_id=MEET,
        role="rank",
        rdzv_backend=MEET,
        rdzv_configs={"nodes": nodes},
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    try:
        with environment_variables({"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | variables):
            elastic_launch(config, program[0])(*program[1:])
    except ChildFailedError as error:
        line, code = _root_cause(list(error.failures.values()), nodes, then)
        print(f"thinwire: error: {line}", file=sys.stderr, flush=True)
        return code
    except (UserError, dist.DistError) as error:
        reason = str(error).splitlines()[0][:200]
        advice = "" if isinstance(error, UserError) else f"; start all {nodes.num_nodes} agents, the first at {nodes.endpoint}"
        print(f"thinwire: error: {reason}{advice}", file=sys.stderr, flush=True)
        return USER_ERROR
    except SignalException as error:
        print(f"thinwire: ended by {signal.Signals(error.sigval).name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    return 0


def _root_cause(failures: list[ProcessFailure], nodes: Nodes, then: str) -> tuple[str, int]:
    """The failure that explains the others, and the exit code.

    In this order: a mistake of the user, an unexpected error, a rank that waited in vain (the one it waited for was then ended by
    the agent), a rank that died without an error file, a rank that lost another one.
    """
    reports = [read_error(process.error_file_data) for process in failures]
    without = [process for process, report in zip(failures, reports, strict=True) if report is None]
    first = min((report for report in reports if report), key=lambda report: KINDS.index(report.kind), default=None)
    if first is None or (first.kind == "lost" and without):
        process = without[0]
        rank = nodes.node_rank * nodes.ranks_per_node + process.local_rank
        code = process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"rank {rank} (process {process.pid}) {how}{then}", RANK_DIED
    return first.line, CODES.get(first.kind, FAILED)


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m thinwire.train.agent")
    parser.add_argument("--nnodes", dest="num_nodes", type=int, required=True)
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--nproc-per-node", dest="ranks_per_node", type=int, required=True)
    parser.add_argument("--rdzv-endpoint", dest="endpoint", required=True)
    parser.add_argument("--bind", default="")
    parser.add_argument("arguments", nargs="*")
    given = vars(parser.parse_args())
    arguments = given.pop("arguments")
    return launch(Nodes(**given), arguments, {})


if __name__ == "__main__":
    sys.exit(main())
