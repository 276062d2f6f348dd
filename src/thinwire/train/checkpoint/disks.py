"""Which ranks see the same run folder: machines on plain Ethernet share no disk, ranks of one machine do.

Each rank leaves a file whose name nobody has looked up before, and then looks for those of the others. The lowest rank whose file
it sees leads its disk: it writes there what is alike, and ends each checkpoint.
"""

import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from thinwire.errors import UserError
from thinwire.measure.gather import gather

RUN_FILES = ("run.toml", "record.json", "cluster.toml", "predicted.json")
"""What a host needs of a run to go on with it."""


@dataclass(frozen=True)
class Disks:
    """leader_of: the leader's rank, by rank. rank: this one. token: random, the same on all, and of no other Disks."""

    leader_of: tuple[int, ...]
    rank: int
    token: str

    @property
    def leader(self) -> int:
        return self.leader_of[self.rank]

    @property
    def leads(self) -> bool:
        return self.leader == self.rank

    @property
    def leaders(self) -> list[int]:
        """One rank for each disk."""
        return sorted(set(self.leader_of))

    def ranks_of(self, leader: int) -> list[int]:
        """On one disk."""
        return [rank for rank, its in enumerate(self.leader_of) if its == leader]


def find_disks(folder: Path) -> Disks:
    """Who shares the disk of `folder`, which is made where it does not exist. Collective over the default group.

    UserError on all ranks if one of them cannot write there.
    """
    rank, token = dist.get_rank(), [secrets.token_hex(8)]
    dist.broadcast_object_list(token, 0)
    error = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _mark(folder, rank, token[0]).touch()
    except OSError as reason:
        error = (
            f"rank {rank} on {socket.gethostname()} cannot write to {folder}: {reason.strerror}; set train.run to a folder it can"
        )
    try:
        if errors := [one for one in gather(error) if one]:
            raise UserError(errors[0])
        leader = next(other for other in range(rank + 1) if _mark(folder, other, token[0]).exists())
        return Disks(tuple(gather(leader)), rank, token[0])
    finally:
        with suppress(OSError):
            _mark(folder, rank, token[0]).unlink()


def share_run_files(folder: Path, disks: Disks) -> None:
    """Gives each disk the run's small files that it lacks. Collective over the default group."""
    if len(disks.leaders) == 1:
        return
    mine = {name: (folder / name).read_text(encoding="utf-8") for name in RUN_FILES if (folder / name).is_file()}
    everyone: list[dict[str, str]] = gather(mine if disks.leads else {})
    for name in RUN_FILES if disks.leads else ():
        if name not in mine and (having := [files[name] for files in everyone if name in files]):
            (folder / name).write_text(having[0], encoding="utf-8")


def describe(disks: Disks, hosts: list[str], folder: Path) -> str:
    """Where checkpoints go, in a line. hosts: by rank."""
    shares = "; ".join(
        f"{hosts[leader]} keeps rank{'s' if len(ranks := disks.ranks_of(leader)) > 1 else ''} {', '.join(map(str, ranks))}"
        for leader in disks.leaders
    )
    return f"checkpoints: no disk is shared by all hosts, so each writes to its own {folder}: {shares}"


def _mark(folder: Path, rank: int, token: str) -> Path:
    return folder / f".rank-{rank}-{token}"
