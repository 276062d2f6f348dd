"""mpiexec inside a lab: what a cluster's administrator sets up, so that `mpiexec -n 4 PROGRAM` starts a rank on each host.

mpiexec is told by variables which hosts there are and how a command gets to one of them, and MPI to use the hosts' cards and
nothing else: all hosts of a lab are one machine in truth, and an MPI that noticed would go through its memory, past every link.

    MPICH      HYDRA_* for mpiexec (hydra), UCX_* and FI_* for the ranks
    Open MPI   PRTE_MCA_* for mpiexec (prte), OMPI_MCA_* for the ranks
"""

from collections.abc import Mapping
from pathlib import Path

LAUNCHERS = ("mpiexec", "mpirun")
CARD = "eth0"


def is_launcher(program: str) -> bool:
    """Is this a command that starts MPI ranks? With a suffix too: mpiexec.hydra."""
    return Path(program).name.startswith(LAUNCHERS)


def host_files(ranks: Mapping[str, list[int]]) -> dict[str, str]:
    """The hosts and their places, by file name, as either mpiexec reads them. ranks: by host, in the order of their first."""
    return {
        "hosts.mpich": "".join(f"{host}:{len(own)}\n" for host, own in ranks.items()),
        "hosts.openmpi": "".join(f"{host} slots={len(own)}\n" for host, own in ranks.items()),
    }


def variables(root: str, enter: str) -> dict[str, str]:
    """For mpiexec and, since it passes them on, for the ranks. root: the folder of the host files; enter: the remote shell."""
    return {
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": enter,
        "HYDRA_HOST_FILE": f"{root}/hosts.mpich",
        "HYDRA_IFACE": CARD,
        "UCX_TLS": "tcp",
        "UCX_NET_DEVICES": CARD,
        "FI_PROVIDER": "tcp",
        "FI_TCP_IFACE": CARD,
        "PRTE_MCA_plm_ssh_agent": enter,
        "PRTE_MCA_prte_default_hostfile": f"{root}/hosts.openmpi",
        "PRTE_MCA_prte_if_include": CARD,
        "PRTE_MCA_prte_tmpdir_base": root,  # files are named by process ids, which start anew in each lab
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,self",
        "OMPI_MCA_btl_tcp_if_include": CARD,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",  # inside a lab everybody is root
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
