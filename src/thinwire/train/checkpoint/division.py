"""How the model is divided among the ranks: which part of it each holds. Ranks with the same part are replicas of each other.

Where there are several parts, each is a file of what is alike on the ranks that hold it, with parameters under the names that
they have in the whole model. A name may be in several parts: of tied weights, whose values are equal in all, and of parameters of
which tensor ranks have parts themselves (`shards`), which the file says.
"""

import hashlib
from dataclasses import dataclass

import torch.distributed as dist

from thinwire.measure.gather import gather
from thinwire.train.checkpoint.disks import Disks
from thinwire.train.checkpoint.shards import to_plain
from thinwire.train.checkpoint.state import Parts


@dataclass(frozen=True)
class Division:
    """part_of: by rank. cut: a checksum of what each rank holds, "" where each holds all."""

    part_of: tuple[int, ...]
    cut: str = ""

    def writes(self, disks: Disks) -> bool:
        """Whether this rank writes its part: the lowest with it on its disk does."""
        mine = self.part_of[disks.rank]
        return disks.rank == next(rank for rank in disks.ranks_of(disks.leader) if self.part_of[rank] == mine)


def find_division(parts: Parts | None) -> Division:
    """Collective over the default group, unless there is but one part (None: likewise)."""
    if parts is None or parts.num_parts == 1:
        return Division((0,) * dist.get_world_size())
    held = "\n".join(parts.model.state_dict())
    if parts.shards:
        held += str(to_plain(parts.shards, parts.model.state_dict()))
    everyone = gather((parts.part, hashlib.sha256(held.encode()).hexdigest()))
    assert {part for part, _ in everyone} == set(range(parts.num_parts)), "each part is held by some rank"
    cut = hashlib.sha256("".join(digest for _, digest in everyone).encode()).hexdigest()
    return Division(tuple(part for part, _ in everyone), cut)
