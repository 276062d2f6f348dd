"""Collectives that our own hooks issue, entered in the ledger under a label, whatever the backend.

The metered backend enters its calls itself; those over any other (NCCL on CUDA) are entered here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from thinwire.collectives.backend import ALL_GATHER, MeteredGroup, bytes_of
from thinwire.collectives.clock import clock_of
from thinwire.collectives.ledger import Group, Ledger, axis_of


def all_reduce(
    tensor: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> dist.Work:
    """Sum `tensor` over `group` in place, asynchronously. Collective: every rank of the group, in the same order."""
    issue = partial(dist.all_reduce, tensor, op, group=group, async_op=True)
    return _issued("all_reduce", tensor, group, ledger, label, issue)


def all_gather(output: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str) -> dist.Work:
    """The `own` of all ranks of `group`, in their order, into `output`, asynchronously. Collective as `all_reduce`."""
    if own.numel() and isinstance(group, MeteredGroup) and group.is_pair:
        chunks = output.view(2, own.numel())
        chunks[group.rank()].copy_(own.view(-1))
        issue = partial(group.in_pair, "all_gather", own, chunks[1 - group.rank()], own)
    else:
        issue = partial(ALL_GATHER, output, own, group=group, async_op=True)
    return _issued("all_gather", own, group, ledger, label, issue)


def all_to_all(output: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str) -> dist.Work:
    """Row s of `rows` goes to rank s of `group`, and row s of `output` comes from it, asynchronously. Collective as above."""
    if rows.numel() and isinstance(group, MeteredGroup) and group.is_pair:
        mine, theirs = group.rank(), 1 - group.rank()
        taken, given = output.view(2, -1), rows.view(2, -1)
        taken[mine].copy_(given[mine])
        issue = partial(group.in_pair, "all_to_all", rows, taken[theirs], given[theirs])
    else:
        issue = partial(dist.all_to_all_single, output, rows, group=group, async_op=True)
    return _issued("all_to_all", rows, group, ledger, label, issue)


def _issued(
    op: str, message: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str, issue: Callable[[], dist.Work]
) -> dist.Work:
    clock = clock_of(message.device)
    with ledger.label(label):
        issued = clock.now()
        total = None if isinstance(group, MeteredGroup) else ledger.enter(op, bytes_of(message), _group(group))
        work = issue()
    if total is not None:
        work.get_future().add_done_callback(partial(ledger.completed, total, clock, issued))
    return work


def together(messages: Sequence[dist.P2POp]) -> list[dist.Work]:
    """Begin sends and receives of one group, each of which may wait for another one's."""
    group = messages[0].group
    return group.together(messages) if isinstance(group, MeteredGroup) else dist.batch_isend_irecv(list(messages))


def swap(tensor: torch.Tensor, peer: int, group: dist.ProcessGroup, ledger: Ledger, label: str) -> torch.Tensor:
    """Send `tensor` to rank `peer` of `group` and return the peer's, of the same shape. Both call. Waits for the network.

    Both directions are begun before either is waited for, so that nobody must go first.
    """
    theirs = torch.empty_like(tensor)
    clock = clock_of(tensor.device)
    with ledger.label(label):
        issued = clock.now()
        total = None if isinstance(group, MeteredGroup) else ledger.enter("send", bytes_of(tensor), _group(group))
        calls = [  # the receive first, as in `MeteredGroup.in_pair`
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
            dist.P2POp(dist.isend, tensor, group=group, group_peer=peer),
        ]
        for work in together(calls):
            work.wait()
    if total is not None:
        ledger.completed(total, clock, issued)
    return theirs


def _group(group: dist.ProcessGroup) -> Group:
    return Group(group.group_name, group.rank(), group.size(), axis_of(group.group_desc))
