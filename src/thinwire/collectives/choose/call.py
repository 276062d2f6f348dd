"""The collective call for which a schedule is to be chosen: the group on its network, the op, the bytes, the root."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from thinwire.cluster import Cluster
from thinwire.cluster.graph import Routes
from thinwire.collectives.synthesis.bounds import OPS
from thinwire.errors import UserError


@dataclass(frozen=True)
class CollectiveCall:
    """cluster: of the group alone, rank i being position i of the group. message_bytes as in `schedules.ops.block_sizes`."""

    cluster: Cluster
    op: str
    message_bytes: int
    root: int

    @property
    def p(self) -> int:
        return self.cluster.world_size

    @cached_property
    def routes(self) -> Routes:
        return Routes(self.cluster)


def collective_call(
    cluster: Cluster, op: str, message_bytes: int, ranks: Sequence[int] | None = None, root: int = 0
) -> CollectiveCall:
    """ranks: the global ranks of the group (default: all); root: a position in it. UserError for what makes no sense."""
    if op not in OPS:
        raise UserError(f"unknown collective {op!r}; known: {', '.join(OPS)}")
    chosen = tuple(range(cluster.world_size)) if ranks is None else tuple(ranks)
    wrong = next((rank for rank in chosen if not 0 <= rank < cluster.world_size), None)
    if wrong is not None:
        raise UserError(f"there is no rank {wrong}; ranks of {cluster.name} are 0 to {cluster.world_size - 1}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"ranks {list(chosen)}: a group has one rank or more, and each once")
    if not 0 <= root < len(chosen):
        raise UserError(f"root = {root}, but the group has ranks 0 to {len(chosen) - 1}")
    if message_bytes < 1:
        raise UserError(f"{message_bytes} bytes: a message has 1 byte or more")
    group = replace(cluster, ranks=tuple(cluster.ranks[rank] for rank in chosen))
    return CollectiveCall(group, op, message_bytes, root)
