"""A command line -> the processes of each host.

`thinwire train ARGS` starts one agent a host, which starts that host's ranks, as on real machines. `mpiexec ARGS` is started
once, on the first host, and starts the ranks itself. Any other command is started once for each rank with the variables that
launchers set.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from thinwire.cluster import Cluster
from thinwire.errors import UserError
from thinwire.lab.mpi import is_launcher, variables

ROOT = "/run/thinwire"
"""Where a lab keeps what its processes are to know."""
MASTER_PORT = 29500
TRAINING = "training"
"""What `thinwire train` leaves among the results when its first step begins."""
FIRST_CARD = {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}


@dataclass(frozen=True, slots=True)
class Process:
    """A command to start on `host`, with variables added to the environment that the lab was started with.

    begins: the file among the results by which it says that it has begun what it is for; "": it says nothing.
    """

    host: str
    argv: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    begins: str = ""


def processes_for(cluster: Cluster, argv: Sequence[str]) -> list[Process]:
    """What `thinwire lab run -- ARGV` starts, the process of rank 0 first."""
    if not argv:
        raise UserError("no command was given; write it after --, e.g. thinwire lab run --cluster C.toml -- thinwire train")
    if Path(argv[0]).name == "thinwire" and list(argv[1:2]) == ["train"]:
        return _agents(cluster, argv[2:])
    if is_launcher(argv[0]):
        return [_launcher(cluster, argv)]
    return _ranks(cluster, argv)


def ranks_by_host(cluster: Cluster) -> dict[str, list[int]]:
    """The ranks of each host that has any, hosts in the order of their first rank."""
    ranks: dict[str, list[int]] = {}
    for rank in range(cluster.world_size):
        ranks.setdefault(cluster.host_of(rank).name, []).append(rank)
    return ranks


def _agents(cluster: Cluster, arguments: Sequence[str]) -> list[Process]:
    ranks = ranks_by_host(cluster)
    first = next(iter(ranks))
    for host, own in ranks.items():
        if own != list(range(own[0], own[0] + len(own))):
            raise UserError(
                f"{cluster.name}: {host} carries the ranks {own}; an agent a host numbers its ranks one after another, "
                "so `ranks` must list the devices of a host together"
            )
    return [
        Process(
            host,
            (
                *(sys.executable, "-m", "thinwire.train.agent"),
                *("--nnodes", str(len(ranks)), "--node-rank", str(index), "--nproc-per-node", str(len(own))),
                *("--rdzv-endpoint", f"{first}:{MASTER_PORT}", "--", *arguments),
            ),
            FIRST_CARD,
            begins=TRAINING,
        )
        for index, (host, own) in enumerate(ranks.items())
    ]


def _launcher(cluster: Cluster, argv: Sequence[str]) -> Process:
    first = next(iter(ranks_by_host(cluster)))
    trains = any(Path(a).name == "thinwire" and b == "train" for a, b in pairwise(argv))
    return Process(first, tuple(argv), FIRST_CARD | variables(ROOT, f"{ROOT}/enter"), begins=TRAINING if trains else "")


def _ranks(cluster: Cluster, argv: Sequence[str]) -> list[Process]:
    ranks = ranks_by_host(cluster)
    first = next(iter(ranks))
    nodes = list(ranks)
    processes = []
    for rank in range(cluster.world_size):
        host = cluster.host_of(rank).name
        told = {
            "RANK": str(rank),
            "WORLD_SIZE": str(cluster.world_size),
            "LOCAL_RANK": str(ranks[host].index(rank)),
            "LOCAL_WORLD_SIZE": str(len(ranks[host])),
            "NODE_RANK": str(nodes.index(host)),
            "MASTER_ADDR": first,
            "MASTER_PORT": str(MASTER_PORT),
        }
        processes.append(Process(host, tuple(argv), told | FIRST_CARD))
    return processes
