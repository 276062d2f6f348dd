"""A command line -> the processes of each host.

`thinwire train ARGS` starts one agent a host, which starts that host's ranks, as on real machines. `mpiexec ARGS` is started
once, on the first host, and starts the ranks itself. Any other command is started once for each rank with the variables that
launchers set.

mpiexec reads from variables which hosts there are and how a command gets to one of them, and MPI that it is to use the hosts'
cards and nothing else: all hosts of a lab are one machine in truth, and an MPI that noticed would go through its memory, past
every link.

    MPICH      HYDRA_* for mpiexec (hydra), UCX_* and FI_* for the ranks
    Open MPI   PRTE_MCA_* for mpiexec (prte), OMPI_MCA_* for the ranks
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from thinwire.cluster import Cluster
from thinwire.errors import UserError

ROOT = "/run/thinwire"
"""Where a lab keeps the files for its processes."""
ENTER = f"{ROOT}/enter"
"""The remote shell of a lab, see `thinwire.lab.enter`."""
MASTER_PORT = 29500
TRAINING = "training"
"""What `thinwire train` leaves among the results when its first step begins."""
CARD = "eth0"
FIRST_CARD = {"GLOO_SOCKET_IFNAME": CARD, "TP_SOCKET_IFNAME": CARD, "NCCL_SOCKET_IFNAME": CARD}
MPI = {
    "HYDRA_LAUNCHER": "ssh",
    "HYDRA_LAUNCHER_EXEC": ENTER,
    "HYDRA_HOST_FILE": f"{ROOT}/hosts.mpich",
    "HYDRA_IFACE": CARD,
    "UCX_TLS": "tcp",
    "UCX_NET_DEVICES": CARD,
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": CARD,
    "PRTE_MCA_plm_ssh_agent": ENTER,
    "PRTE_MCA_prte_default_hostfile": f"{ROOT}/hosts.openmpi",
    "PRTE_MCA_prte_if_include": CARD,
    "PRTE_MCA_prte_tmpdir_base": ROOT,  # files are named by process ids, which start anew in each lab
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "tcp,self",
    "OMPI_MCA_btl_tcp_if_include": CARD,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # inside a lab everybody is root
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
"""For mpiexec and, since it passes them on, for the ranks."""


@dataclass(frozen=True, slots=True)
class Process:
    """A command to start on `host`, with variables added to the environment that the lab was started with.

    begins: the file that it leaves among the results when it begins its work; "": none.
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
    if Path(argv[0]).name.startswith(("mpiexec", "mpirun")):  # with a suffix too: mpiexec.hydra
        return [_launcher(cluster, argv)]
    return _ranks(cluster, argv)


def ranks_by_host(cluster: Cluster) -> dict[str, list[int]]:
    """The ranks of each host that has any, hosts in the order of their first rank."""
    ranks: dict[str, list[int]] = {}
    for rank in range(cluster.world_size):
        ranks.setdefault(cluster.host_of(rank).name, []).append(rank)
    return ranks


def host_files(cluster: Cluster) -> dict[str, str]:
    """The hosts and how many ranks each takes, by file name, as MPICH and Open MPI read them."""
    slots = [(host, len(own)) for host, own in ranks_by_host(cluster).items()]
    return {
        "hosts.mpich": "".join(f"{host}:{count}\n" for host, count in slots),
        "hosts.openmpi": "".join(f"{host} slots={count}\n" for host, count in slots),
    }


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
            FIRST_CARD | {"TORCH_CPP_LOG_LEVEL": "ERROR"},  # else it warns of each address without a name
            begins=TRAINING,
        )
        for index, (host, own) in enumerate(ranks.items())
    ]


def _launcher(cluster: Cluster, argv: Sequence[str]) -> Process:
    trains = any(Path(a).name == "thinwire" and b == "train" for a, b in pairwise(argv))
    return Process(cluster.host_of(0).name, tuple(argv), FIRST_CARD | MPI, begins=TRAINING if trains else "")


def _ranks(cluster: Cluster, argv: Sequence[str]) -> list[Process]:
    ranks = ranks_by_host(cluster)
    processes = []
    for rank in range(cluster.world_size):
        host = cluster.host_of(rank).name
        variables = {
            "RANK": rank,
            "WORLD_SIZE": cluster.world_size,
            "LOCAL_RANK": ranks[host].index(rank),
            "LOCAL_WORLD_SIZE": len(ranks[host]),
            "NODE_RANK": list(ranks).index(host),
            "MASTER_ADDR": cluster.host_of(0).name,
            "MASTER_PORT": MASTER_PORT,
        }
        processes.append(Process(host, tuple(argv), {name: str(value) for name, value in variables.items()} | FIRST_CARD))
    return processes
