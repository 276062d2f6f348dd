"""What the environment tells a rank: who started it, and its place among the ranks. No other file reads the environment.

Known launchers: torchrun (and our own agent), Slurm's srun, MPICH / Open MPI mpiexec, and none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from thinwire.errors import UserError

DEFAULT_PORT = 29577


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among all that were started."""

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int
    by_mpiexec: bool = False
    local_size: int = 0
    """How many of them are on this host; 0: not known."""


@dataclass(frozen=True)
class Restart:
    """Of a rank that torchrun starts again after a failure. run: of the agent on this host, the same in all lives of its ranks;
    lives: how many there were before this one."""

    run: str
    lives: int


class Lab(BaseModel):
    """The file that the lab writes for its processes."""

    model_config = ConfigDict(frozen=True)

    cluster: Path
    host: str
    paced: bool
    delay: str
    results: Path


@dataclass(frozen=True, kw_only=True)
class Environment:
    """All that is read from the environment."""

    place: Place | None
    lab: Lab | None
    error_file: Path | None
    cache_folder: Path
    results: Path | None
    """The folder in which the launcher looks for `run_folder`, a file with the path of the run folder."""

    @property
    def here(self) -> tuple[int, int]:
        """This rank's number among the ranks on this machine, and how many they are: in a lab all, which share its GPUs."""
        if self.place is None:
            return 0, 1
        return (self.place.rank, self.place.world_size) if self.lab else (self.place.local_rank, self.place.local_size or 1)


def read_environment() -> Environment:
    """Read the environment. place is None when nobody has started several ranks."""
    lab_file, cache, results = _path("THINWIRE_LAB"), _path("XDG_CACHE_HOME"), _path("THINWIRE_RESULTS")
    lab = _lab(lab_file) if lab_file else None
    return Environment(
        place=_place(),
        lab=lab,
        results=results or (lab.results if lab else None),
        error_file=_path("TORCHELASTIC_ERROR_FILE"),
        cache_folder=(cache or Path.home() / ".cache") / "thinwire",
    )


def loopback_environment() -> dict[str, str]:
    """Variables for ranks that all run on this machine: gloo talks over loopback, whatever the host's name resolves to."""
    return {"GLOO_SOCKET_IFNAME": "lo" if Path("/sys/class/net/lo").exists() else "lo0"}


def shared_gpu_variables(place: Place, gpus: int, host: str) -> dict[str, str]:
    """Variables for a rank whose host has more ranks than GPUs: NCCL takes two ranks on one GPU only if it thinks them on two
    hosts. Its hosts talk through sockets; those of one machine need no card for that."""
    if not 0 < gpus < place.local_size:
        return {}
    alone = {"NCCL_SOCKET_IFNAME": "lo"} if place.local_size == place.world_size else {}
    return {"NCCL_HOSTID": f"{host}-{place.rank}", **alone}


def set_variables(variables: dict[str, str]) -> None:
    """Set `variables` for libraries of this process that read them later; those already set are the user's and stay."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def environment_variables(variables: dict[str, str]) -> Iterator[None]:
    """Set `variables` for processes started inside; those already set are the user's and stay."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def gloo_card() -> str:
    """Which card gloo takes, or several with commas, if the user says it."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "")


def agent_has_store() -> bool:
    """torchrun's agent already holds the store at the master's port; without one, rank 0 opens it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def horovod_timeline() -> tuple[str, bool]:
    """Where Horovod's users ask for a trace, "" if they do not, and whether with cycles."""
    path = os.environ.get("HOROVOD_TIMELINE", "")
    return "" if path == "DYNAMIC" else path, os.environ.get("HOROVOD_TIMELINE_MARK_CYCLES", "0") == "1"


def tracking_uri() -> str:
    """Where MLflow's users keep their runs; "" if they do not say."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def restart() -> Restart | None:
    """Where torchrun would start the ranks again (--max-restarts); None where it would not."""
    run, most = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if not run or most == "0":
        return None
    return Restart(run=f"{run}-{os.getppid()}", lives=_integer("TORCHELASTIC_RESTART_COUNT"))


def lives() -> int:
    """How many lives of this rank torchrun's store has seen before; what those have left there is not this one's."""
    found = restart()
    return found.lives if found else 0


def _place() -> Place | None:
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
        "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    }
    for launcher, (rank, size, local_rank, local_size) in names.items():
        # A Slurm allocation sets SLURM_NTASKS for a shell too; only a step started by srun has a SLURM_STEP_ID and more tasks.
        if rank not in os.environ or size not in os.environ:
            continue
        if launcher == "srun" and ("SLURM_STEP_ID" not in os.environ or os.environ[size] == "1"):
            continue
        return Place(
            rank=_integer(rank),
            world_size=_integer(size),
            local_rank=_integer(local_rank) if local_rank in os.environ else 0,
            master_address=os.environ.get("MASTER_ADDR") or _first_slurm_host() or "127.0.0.1",
            master_port=_integer("MASTER_PORT") if "MASTER_PORT" in os.environ else DEFAULT_PORT,
            by_mpiexec=launcher in ("Open MPI", "MPICH"),
            local_size=_integer(local_size) if local_size in os.environ else _slurm_local_size(),
        )
    return None


def _slurm_local_size() -> int:
    """Where it is the same on all hosts for sure; else 0."""
    hosts, ranks = os.environ.get("SLURM_STEP_NUM_NODES", ""), os.environ.get("SLURM_NTASKS", "")
    return int(ranks) if hosts == "1" and ranks.isdigit() else 1 if hosts and hosts == ranks else 0


def _path(name: str) -> Path | None:
    return Path(os.environ[name]) if os.environ.get(name) else None


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(f"environment variable {name}={os.environ[name]!r} is not a number; the launcher sets it") from None


def _first_slurm_host() -> str | None:
    """The first of "node[07-09,12]" or "a,b"."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    if not nodes:
        return None
    prefix, bracket, rest = nodes.partition("[")
    if not bracket:
        return nodes.split(",")[0]
    if "," in prefix:
        return prefix.split(",")[0]
    return prefix + rest.split("]")[0].split(",")[0].split("-")[0]


def _lab(path: Path) -> Lab:
    try:
        return Lab.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = str(error)[:200]
        raise UserError(f"THINWIRE_LAB={path} is not readable ({why}); start the command through `thinwire lab run`") from None
