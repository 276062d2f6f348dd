"""By how much the ranks' clocks differ (Cristian 1989): the first rank asks each other one; the shortest trip counts.

offset = (sent + received) / 2 - theirs           off by half the trip at most
"""

import time

import torch
import torch.distributed as dist

TRIPS = 12


def clock_offsets(group: dist.ProcessGroup) -> list[float]:
    """Seconds to add to time.perf_counter() of each rank for that of the first; zeros on all ranks but the first. Collective."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    offsets = [0.0] * size
    theirs = torch.zeros(1, dtype=torch.float64)
    for other in range(1, size):
        trips = []
        for _ in range(TRIPS if rank in (0, other) else 0):
            if rank == 0:
                sent = time.perf_counter()
                dist.send(theirs, group=group, group_dst=other)
                dist.recv(theirs, group=group, group_src=other)
                received = time.perf_counter()
                trips.append((received - sent, (sent + received) / 2 - float(theirs)))
            else:
                dist.recv(theirs, group=group, group_src=0)
                theirs.fill_(time.perf_counter())
                dist.send(theirs, group=group, group_dst=0)
        offsets[other] = min(trips)[1] if trips else 0.0
    return offsets
