"""A process group of one's own, for a thread that must not share its group with anybody."""

from typing import Any

import torch.distributed as dist


def private_copy(group: dist.ProcessGroup, description: str, backend: str | None = None) -> dist.ProcessGroup:
    """A new group of the same ranks, on the same backend unless `backend` names another.

    Collective over all ranks, whatever their group: each must make all groups in one order.

    (torch could let the members of a group make it alone, but it names such a group by its ranks and what each process has made
    before, and members with different pasts then wait for each other for ever.)
    """
    groups: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(groups, tuple(dist.get_process_group_ranks(group)))
    backend = backend or dist.get_backend(group)
    made = {ranks: dist.new_group(ranks, backend=backend, group_desc=description) for ranks in sorted(set(groups))}
    return made[tuple(dist.get_process_group_ranks(group))]
