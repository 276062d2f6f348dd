"""Explicit seams: collectives that our own hooks issue, entered in the ledger whatever the backend.

Over the metered backend the call is entered there and the seam gives the label; over any other (NCCL on CUDA) the seam enters it.
"""

import time
from functools import partial

import torch
import torch.distributed as dist

from thinwire.collectives.backend import MeteredGroup
from thinwire.collectives.ledger import Group, Ledger, Total, axis_of


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str) -> dist.Work:
    """Sum `tensor` over `group` in place, asynchronously. Collective: every rank of the group, in the same order."""
    with ledger.label(label):
        if isinstance(group, MeteredGroup):
            return dist.all_reduce(tensor, group=group, async_op=True)
        issued = time.perf_counter()
        total = ledger.enter("all_reduce", _bytes_of(tensor), _group(group))
        work = dist.all_reduce(tensor, group=group, async_op=True)
        # On CUDA the callback runs when the call is enqueued on its stream, so the seconds are those of the launch.
        work.get_future().add_done_callback(partial(_completed, ledger, total, issued))
        return work


def swap(tensor: torch.Tensor, peer: int, group: dist.ProcessGroup, ledger: Ledger, label: str) -> torch.Tensor:
    """Send `tensor` to rank `peer` of `group` and return the peer's, of the same shape. Both call. Waits for the wire.

    Both directions are begun before either is waited for, so that nobody must go first.
    """
    theirs = torch.empty_like(tensor)
    issued = time.perf_counter()
    with ledger.label(label):
        own = None if isinstance(group, MeteredGroup) else ledger.enter("send", _bytes_of(tensor), _group(group))
        calls = [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(calls):
            work.wait()
    if own is not None:
        ledger.completed(own, issued)
    return theirs


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _group(group: dist.ProcessGroup) -> Group:
    return Group(group.group_name, group.rank(), group.size(), axis_of(group.group_desc))


def _completed(ledger: Ledger, total: Total, issued: float, _future: object) -> None:
    ledger.completed(total, issued)
